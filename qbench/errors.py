"""Every error a user can act on, sorted by what the reader can do about it.

Message = what was given, what is allowed, where, what to do next. Bugs keep Python's own exceptions
and their traceback; the command line turns only these classes into one sentence and an exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QbenchError(Exception):
    """Base class; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(QbenchError):
    """The request itself is wrong: fix an option, a name or a value."""

    exit_code = 2


class UnsupportedSchemeError(ConfigError):
    """The request is well-formed, but this method, model or format cannot do it."""


class DataError(QbenchError):
    """A file, folder, dataset or checkpoint is missing, empty or damaged: fix the files."""

    exit_code = 2


class NumericalError(QbenchError):
    """The arithmetic broke down: a loss that is not finite, a singular matrix."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, as a part of a sentence; the name of its class if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(" .:")


def kind_and_first_line(error: BaseException) -> str:
    """The same behind the name of its class, where the reader may have to look for it."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean …?' for a near miss, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if not close:
        return ""
    return " Did you mean " + " or ".join(repr(c) for c in close) + "?"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not registered: what was given, suggestion, what exists."""
    names = sorted(known)
    return ConfigError(f"Unknown {kind} {name!r}.{suggest(name, names)} Known: {', '.join(names)}.")


def counted(n: int, thing: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{n} {thing}{'s' * (n != 1)}"
