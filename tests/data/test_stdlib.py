"""The embedded corpus: splits by module name, the same on every Python."""

from __future__ import annotations

import hashlib

import pytest

from qbench.data import stdlib
from qbench.errors import DataError

SPLITS = ("train", "calibration", "evaluation")


def test_every_document_is_in_exactly_one_split() -> None:
    names = [document.name for split in SPLITS for document in stdlib.documents(split)]
    assert len(names) == len(set(names)) > 300


def test_splits_have_their_sizes() -> None:
    size = {split: len(stdlib.text(split)) for split in SPLITS}
    total = sum(size.values())
    assert 0.84 < size["train"] / total < 0.92
    assert 0.05 < size["calibration"] / total < 0.09
    assert 0.05 < size["evaluation"] / total < 0.09
    assert size["evaluation"] > 300_000


@pytest.mark.parametrize(
    ("module", "split"),
    [
        ("asyncio", "train"),
        ("urllib", "calibration"),
        ("pickletools", "evaluation"),
        ("traceback", "evaluation"),
    ],
)
def test_a_module_stays_in_its_split(module: str, split: str) -> None:
    """The shipped models were trained on this assignment; if it moves, they have seen the evaluation text."""
    assert stdlib.split_of(module) == split
    assert any(document.name.partition(".")[0] == module for document in stdlib.documents(split))


def test_a_package_and_its_private_twin_share_a_split() -> None:
    assert stdlib.family("_pydecimal") == stdlib.family("decimal") == "decimal"
    assert stdlib.family("_collections_abc") == "collections_abc"
    assert stdlib.family("asyncio.events") == "asyncio"
    assert stdlib.family("pydoc") == "pydoc"
    where = {d.name: split for split in SPLITS for d in stdlib.documents(split)}
    urllib = {split for name, split in where.items() if name.partition(".")[0] == "urllib"}
    assert urllib == {"calibration"}


def test_neither_tests_nor_tables_nor_other_packages() -> None:
    for split in SPLITS:
        for document in stdlib.documents(split):
            parts = set(document.name.split("."))
            assert not parts & {
                "test",
                "tests",
                "idle_test",
                "encodings",
                "lib2to3",
                "idlelib",
                "site-packages",
                "pip",
            }


def test_documents_are_source_text_and_topics() -> None:
    documents = {d.name: d.text for split in SPLITS for d in stdlib.documents(split)}
    assert "def dumps(" in documents["json"]  # a package's __init__.py has the package's name
    assert "lambda" in documents["topic:lambda"]
    assert not documents["topic:lambda"].startswith(("'", '"'))


def test_order_mixes_packages_and_does_not_depend_on_what_is_installed() -> None:
    evaluation = stdlib.documents("evaluation")
    tops = [stdlib.family(document.name) for document in evaluation]
    assert tops != sorted(tops)
    digests = [
        hashlib.sha256(f"{stdlib.SALT}:{document.name}".encode()).hexdigest() for document in evaluation
    ]
    assert digests == sorted(digests)  # so removing a document keeps the order of the others


def test_text_is_the_documents_joined() -> None:
    first, second, *_ = stdlib.documents("calibration")
    assert stdlib.text("calibration").startswith(first.text + "\n\n" + second.text + "\n\n")


def test_test_suite_has_no_test_of_a_held_out_module() -> None:
    for document in stdlib.test_suite_documents():
        subject = document.name.removeprefix("test.").removeprefix("test_").partition(".")[0]
        assert stdlib.split_of(stdlib.family(subject)) == "train", document.name
    assert not any("test_traceback" in document.name for document in stdlib.test_suite_documents())


def test_no_sources_is_a_data_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stdlib, "_root", lambda: tmp_path)
    stdlib._library.cache_clear()
    with pytest.raises(DataError, match="No standard-library sources"):
        stdlib.documents("evaluation")
    stdlib._library.cache_clear()


def test_broken_files_are_passed_over(tmp_path, monkeypatch) -> None:
    (tmp_path / "abc.py").write_bytes(b"# \xff not utf-8")
    (tmp_path / "ast.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    (tmp_path / "mine.py").write_text("not the standard library's")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_ast.py").write_text("a test")
    monkeypatch.setattr(stdlib, "_root", lambda: tmp_path)
    stdlib._library.cache_clear()
    found = [document for split in SPLITS for document in stdlib.documents(split)]
    stdlib._library.cache_clear()
    assert [document.name for document in found] == ["ast"]
    assert "é" in found[0].text
