"""Rows of text from the `datasets` library: the hub, its local cache, dataset folders, saved datasets.

`datasets` is imported when first needed. Whatever goes wrong in it becomes one sentence that says what was
asked for and what to give instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qbench.errors import DataError, kind_and_first_line

TEXT_COLUMNS = ("text", "sentence", "content")


def load_hub_rows(
    asked: str,
    path: str,
    config: str | None = None,
    *,
    split: str,
    data_file: str | None = None,
    revision: str | None = None,
) -> Sequence[str]:
    """Read one split of a hub dataset, from the local cache if it is there.

    Args:
        asked: The name the user gave, for the error message.
        path: Repository on the hub.
        config: Its configuration.
        split: Exact split name.
        data_file: Read this file of the repository alone.
        revision: Branch or commit of the repository.
    """
    options: dict[str, Any] = {"split": split, "revision": revision}
    if data_file is not None:
        # One file of many: the sizes recorded for the whole dataset cannot match.
        options |= {"data_files": {split: data_file}, "verification_mode": "no_checks"}
    try:
        dataset = _datasets().load_dataset(path, config, **options)
    except DataError:
        raise
    except Exception as error:  # the library has dozens of exception classes for "not there"
        what = ", ".join(part for part in (path, config, data_file, f"split {split}") if part)
        raise DataError(
            f"Cannot load dataset {asked!r} ({what}): {_reason(error)}; give a text file or a folder as "
            f"{asked.rpartition('/')[2]}=PATH, or use 'stdlib', which needs no download."
        ) from error
    return _text_column(dataset, asked)


def load_folder_rows(folder: Path, splits: tuple[str, ...]) -> tuple[Sequence[str], str]:
    """Read a folder: a dataset saved by `save_to_disk`, or data files in the hub's layout.

    Args:
        folder: Where.
        splits: Split names in order of preference. A saved dataset without splits serves as any.

    Returns:
        The rows and the name of the split that was read.
    """
    datasets = _datasets()
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        dataset = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    except Exception as error:
        raise DataError(
            f"Cannot read folder {str(folder)!r} as a dataset: {_reason(error)}; it must hold a dataset "
            "saved by `save_to_disk`, or parquet, json or text files named after their splits."
        ) from error
    if isinstance(dataset, datasets.Dataset):
        return _text_column(dataset, str(folder)), "all rows"
    for split in splits:
        if split in dataset:
            return _text_column(dataset[split], str(folder)), split
    raise DataError(
        f"The dataset in {str(folder)!r} has the splits {', '.join(sorted(dataset))}, but "
        f"{' or '.join(splits)} is needed; give a text file or another folder."
    )


def pick_column(columns: Sequence[str], where: str) -> str:
    """Choose the column that holds the text.

    Raises:
        DataError: If none has a usual name.
    """
    for name in TEXT_COLUMNS:
        if name in columns:
            return name
    raise DataError(
        f"{where} has none of the fields {', '.join(map(repr, TEXT_COLUMNS))}, only "
        f"{', '.join(map(repr, columns))}; rename the one that holds the text to 'text'."
    )


def _text_column(dataset: Any, where: str) -> Sequence[str]:
    rows = dataset[pick_column(dataset.column_names, f"Dataset {where!r}")]
    if len(rows) and not isinstance(rows[0], str):
        raise DataError(f"The text column of dataset {where!r} holds {type(rows[0]).__name__}, not text.")
    return rows


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "Hub datasets and dataset folders need the package `datasets` (pip install datasets); "
            "give a text or jsonl file instead, or use 'stdlib'."
        ) from error
    datasets.disable_progress_bars()  # qbench shows its own progress
    return datasets


def _reason(error: Exception) -> str:
    """Say why in a few words: offline, or the library's own first line."""
    offline = any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in _OFFLINE)
    if offline and ("offline" in str(error).lower() or isinstance(error, (ConnectionError, ValueError))):
        return "HF_HUB_OFFLINE is set and it is not in the local cache"
    return kind_and_first_line(error)


_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
