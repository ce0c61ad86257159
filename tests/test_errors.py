"""The first line of other people's errors, as a part of a sentence."""

from __future__ import annotations

import pytest

from qbench.errors import first_line, kind_and_first_line


@pytest.mark.parametrize(
    ("message", "line", "with_kind"),
    [
        ("no kernel image.\nsecond line", "no kernel image", "RuntimeError: no kernel image"),
        ("\n  indented:\n", "indented", "RuntimeError: indented"),
        ("", "RuntimeError", "RuntimeError"),
        ("x" * 500, "x" * 300, "RuntimeError: " + "x" * 300),
    ],
    ids=["two lines", "blanks around it", "nothing said", "too long"],
)
def test_first_line(message: str, line: str, with_kind: str) -> None:
    assert first_line(RuntimeError(message)) == line
    assert kind_and_first_line(RuntimeError(message)) == with_kind
