"""Text by name or path: what each dataset name means exactly, and any file or folder beside them.

The names and variants are those of the authors' loaders (GPTQ's datautils.py, kept by OmniQuant and
AffineQuant), since "c4" and "c4_new" are different numbers. A calibration text is never the evaluation split
of the same name.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qbench.data import stdlib
from qbench.data.hub import TEXT_COLUMNS, load_folder_rows, load_hub_rows, pick_column
from qbench.errors import ConfigError, DataError, suggest

Split = Literal["calibration", "evaluation"]

BLANK_LINE = "\n\n"
# What the authors' loaders score on C4, whatever the shard holds.
C4_WINDOWS = 256
BINARY_SUFFIXES = frozenset(
    {
        ".parquet",
        ".arrow",
        ".zst",
        ".zip",
        ".tar",
        ".xz",
        ".bz2",
        ".safetensors",
        ".bin",
        ".pt",
        ".npy",
        ".pdf",
    }
)


@dataclass(frozen=True)
class Text:
    """One split of a dataset, read and hashed."""

    name: str
    split: str
    text: str  # empty where documents are kept apart
    fingerprint: str  # sha256 of the content
    description: str  # where it came from and how it was joined
    documents: Sequence[str] | None = None  # windows are drawn within these, if given
    max_windows: int | None = None  # evaluation windows that the named protocol scores


def parse_dataset(spec: str) -> tuple[str, str]:
    """Split "NAME=PATH" into the name shown in tables and the name or path to load; either may stand alone.

    Raises:
        ConfigError: If one side of the = is empty.
    """
    if "=" in spec and not Path(spec).exists():
        name, _, target = spec.partition("=")
        if not name.strip() or not target.strip():
            raise ConfigError(
                f"Dataset {spec!r} has nothing on one side of '='; write NAME=PATH, as in wiki=wiki.txt."
            )
        return name.strip(), target.strip()
    if spec in NAMES:
        return spec, spec
    path = Path(spec)
    stem = Path(path.stem).stem if path.suffix == ".gz" else path.stem
    return (path.name if path.is_dir() else stem) or spec, spec


def require_source(name_or_path: str) -> None:
    """Refuse what can be no text, without reading anything.

    Raises:
        DataError: If it is neither a dataset's name, nor a file or folder, nor written like a hub repository.
    """
    _, target = parse_dataset(name_or_path)
    if target not in NAMES and not Path(target).expanduser().exists() and not _may_be_hub(target):
        raise DataError(
            f"No dataset, file or folder {target!r}.{suggest(target, NAMES)} "
            f"Give a path that exists or one of {', '.join(NAMES)}."
        )


def _may_be_hub(target: str) -> bool:
    return bool(re.fullmatch(r"[\w-]+/[\w.-]+", target)) and not Path(target).expanduser().parent.exists()


def load_text(name_or_path: str, split: Split) -> Text:
    """Read one split of a dataset given by name, file, folder, hub repository or NAME=PATH.

    A file has one text, which serves as either split.

    Raises:
        DataError: If it is missing, unreadable, unreachable or empty.
    """
    require_source(name_or_path)
    name, target = parse_dataset(name_or_path)
    path = Path(target).expanduser()
    if target in NAMES:
        loaded = NAMES[target](split)
    elif path.is_file():
        loaded = _from_file(path)
    elif path.is_dir():
        rows, read = load_folder_rows(path, ("train",) if split == "calibration" else ("test", "validation"))
        loaded = _join(rows, BLANK_LINE, f"folder {path}, {read}")
    else:
        read = "train" if split == "calibration" else "test"
        loaded = _join(load_hub_rows(target, target, split=read), BLANK_LINE, f"{target}, {read}")
    content = loaded.documents if loaded.documents is not None else (loaded.text,)
    if not any(part.strip() for part in content):
        raise DataError(f"Dataset {name_or_path!r} has no text in its {split} split ({loaded.description}).")
    return Text(
        name, split, loaded.text, _hash(content), loaded.description, loaded.documents, loaded.max_windows
    )


@dataclass(frozen=True)
class _Loaded:
    text: str
    description: str
    documents: Sequence[str] | None = None
    max_windows: int | None = None


def _join(rows: Iterable[str], separator: str, source: str, max_windows: int | None = None) -> _Loaded:
    shown = {"\n\n": "a blank line", " ": "a space"}[separator]
    return _Loaded(separator.join(rows), f"{source}, joined by {shown}", max_windows=max_windows)


def _stdlib(split: Split) -> _Loaded:
    documents = stdlib.documents(split)
    text = stdlib.SEPARATOR.join(document.text for document in documents)
    return _Loaded(
        text,
        f"{len(documents)} documents of Python's standard library, {split} split, joined by a blank line",
    )


def _wikitext2(split: Split) -> _Loaded:
    read = "train" if split == "calibration" else "test"
    rows = load_hub_rows("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=read)
    return _join(rows, BLANK_LINE, f"Salesforce/wikitext wikitext-2-raw-v1, {read}")


def _c4(split: Split) -> _Loaded:
    """Windows within random documents of one shard; 256 of them for evaluation."""
    name, file = _C4_FILES[split]
    rows = load_hub_rows("c4", "allenai/c4", split=name, data_file=file)
    description = f"allenai/c4 {file}, documents kept apart"
    return _Loaded("", description, rows, C4_WINDOWS if split == "evaluation" else None)


def _c4_new(split: Split) -> _Loaded:
    """Calibration as c4; evaluation on the shard's first 1100 documents as one stream, first 256 windows."""
    if split == "calibration":
        return _c4(split)
    name, file = _C4_FILES[split]
    rows = load_hub_rows("c4_new", "allenai/c4", split=name, data_file=file)
    return _join(rows[:1100], " ", f"allenai/c4 {file}, first 1100 documents", C4_WINDOWS)


def _ptb(split: Split) -> _Loaded:
    read = "train" if split == "calibration" else "validation"
    return _join(_ptb_rows("ptb", read), BLANK_LINE, f"Penn Treebank, {read}")


def _ptb_new(split: Split) -> _Loaded:
    read = "train" if split == "calibration" else "test"
    return _join(_ptb_rows("ptb_new", read), " ", f"Penn Treebank, {read}")


def _ptb_rows(asked: str, split: str) -> Sequence[str]:
    # The repository itself holds a loading script, which `datasets` no longer runs; this is the hub's
    # conversion of it.
    return load_hub_rows(
        asked, "ptb-text-only/ptb_text_only", "penn_treebank", split=split, revision="refs/convert/parquet"
    )


def _pile(split: Split) -> _Loaded:
    """The Pile's validation text: 1000 documents that the authors calibrate on, then 1000 to evaluate."""
    first = 0 if split == "calibration" else 1000
    rows = load_hub_rows("pile", "mit-han-lab/pile-val-backup", split="validation")
    return _join(
        rows[first : first + 1000],
        BLANK_LINE,
        f"mit-han-lab/pile-val-backup, documents {first} to {first + 999}",
    )


_C4_FILES = {
    "calibration": ("train", "en/c4-train.00000-of-01024.json.gz"),
    "evaluation": ("validation", "en/c4-validation.00000-of-00008.json.gz"),
}
NAMES: dict[str, Callable[[Split], _Loaded]] = {
    "stdlib": _stdlib,
    "wikitext2": _wikitext2,
    "c4": _c4,
    "c4_new": _c4_new,
    "ptb": _ptb,
    "ptb_new": _ptb_new,
    "pile": _pile,
}


def _from_file(path: Path) -> _Loaded:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix.lower() in BINARY_SUFFIXES:
        raise DataError(
            f"File {str(path)!r} is not text; give the folder that holds it, or a text or jsonl file."
        )
    try:
        raw = path.read_bytes()
        content = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {str(path)!r} as UTF-8 text: {error}.") from error
    content = content.replace("\r\n", "\n")
    if suffix.lower() not in (".jsonl", ".json"):
        return _Loaded(content, f"file {path}")
    records = _json_records(content, path)
    rows = [_record_text(record, f"Record {i} of {str(path)!r}") for i, record in enumerate(records, 1)]
    return _join(rows, BLANK_LINE, f"file {path}, {len(rows)} records")


def _json_records(content: str, path: Path) -> list[object]:
    """Read a JSON array, one JSON object, or one JSON value per line, as hub files called .json hold too."""
    try:
        whole = json.loads(content)
    except json.JSONDecodeError:
        records = []
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"Line {number} of {str(path)!r} is not JSON: {error.msg}.") from error
        return records
    return whole if isinstance(whole, list) else [whole]


def _record_text(record: object, where: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise DataError(f"{where} is {type(record).__name__}; an object with a 'text' field is needed.")
    value = record[pick_column(list(record), where)]
    if not isinstance(value, str):
        raise DataError(
            f"{where} has {type(value).__name__} under {' or '.join(TEXT_COLUMNS)}, where text is needed."
        )
    return value


def _hash(parts: Iterable[str]) -> str:
    """Hash the content; a separator that UTF-8 text cannot hold keeps "ab", "c" and "a", "bc" apart."""
    digest = hashlib.sha256()
    for i, part in enumerate(parts):
        digest.update((b"\xff" if i else b"") + part.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
