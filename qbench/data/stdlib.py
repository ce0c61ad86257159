"""The text every Python installation has: the standard library's sources and language documentation.

It lets qbench calibrate and evaluate with no network and no files. The text is read from the running
interpreter, so nothing is shipped, and it is split by *module name*: a model trained on the `train` modules
has never seen the `evaluation` modules, on any Python version. A package and its private twin (`decimal` and
`_pydecimal`) share one name, so code cannot leak from one split into another when a version moves it between
files. The topics of `pydoc_data` (the language reference) are split one by one.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from qbench.errors import DataError

StdlibSplit = Literal["train", "calibration", "evaluation"]

SEPARATOR = "\n\n"
# Chosen so that on Python 3.10 to 3.13 both small splits have 6 to 8% of the text, no package makes up more
# than 26% of either, and both hold code and prose. Changing it moves modules: the shipped models would have
# seen the test text.
SALT = "qbench-1429"
CALIBRATION_PERCENT, EVALUATION_PERCENT = 6, 6
# Not in every installation (distribution packages leave them out, versions drop them), or tables rather than
# text.
OMITTED = frozenset(
    {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo"}
)
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """One module's source, or one topic of the language reference."""

    name: str
    text: str


def split_of(name: str) -> StdlibSplit:
    """Tell which split a family of modules (`asyncio`, `decimal`) or a topic (`topic:lambda`) belongs to."""
    percent = int.from_bytes(_digest(name)[:8], "big") % 100
    if percent < EVALUATION_PERCENT:
        return "evaluation"
    return "calibration" if percent < EVALUATION_PERCENT + CALIBRATION_PERCENT else "train"


def family(module: str) -> str:
    """Return the name that decides a module's split: `decimal` for `_pydecimal`, `asyncio` for its parts."""
    top = module.partition(".")[0]
    return top.removeprefix("_py").lstrip("_") or top


def documents(split: StdlibSplit) -> tuple[Document, ...]:
    """Return a split's documents in an order that depends on their names alone, mixing the packages."""
    return tuple(document for key, document in _library() if split_of(key) == split)


def test_suite_documents() -> tuple[Document, ...]:
    """Return the library's own tests, where installed: more to train on, none of a held-out module."""
    root = _root()
    found = []
    for path, parts in _sources(root):
        if parts[0] in OMITTED or not TEST_FOLDERS & set(parts):
            continue
        subject = parts[1] if parts[0] == "test" and len(parts) > 1 else parts[0]
        subject = subject.removeprefix("_").removeprefix("test_")
        if split_of(family(subject)) == "train" and (text := _read(path)):
            found.append(Document(".".join(parts), text))
    return tuple(sorted(found, key=lambda document: _digest(document.name)))


def text(split: StdlibSplit) -> str:
    """Return a split's documents joined by a blank line."""
    return SEPARATOR.join(document.text for document in documents(split))


@cache
def _library() -> tuple[tuple[str, Document], ...]:
    """Every document that all installations share, with the key that decides its split."""
    root = _root()
    found = []
    for path, parts in _sources(root):
        top = parts[0]
        wanted = top in sys.stdlib_module_names and top not in OMITTED and not TEST_FOLDERS & set(parts)
        if wanted and not top.startswith("_sysconfigdata") and (text := _read(path)):
            found.append((family(top), Document(".".join(parts), text)))
    found += [(topic.name, topic) for topic in _topics(root)]
    if not found:
        raise DataError(
            f"No standard-library sources under {str(root)!r}, which the dataset 'stdlib' is read from; "
            "give a text file or a dataset name instead."
        )
    return tuple(sorted(found, key=lambda pair: _digest(pair[1].name)))


def _topics(root: Path) -> Iterator[Document]:
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(_read(path)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, topic in ast.literal_eval(node.value).items():
                yield Document(f"topic:{name}", topic.strip())


def _sources(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Walk the library's .py files, giving each with its dotted name's parts."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name.isidentifier() and name != "__pycache__")
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                yield path, parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def _read(path: Path) -> str:
    """Read a source file as Python would; one that is broken (some tests are, on purpose) is empty."""
    try:
        with tokenize.open(path) as file:
            return file.read().strip()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _digest(name: str) -> bytes:
    return hashlib.sha256(f"{SALT}:{name}".encode()).digest()
