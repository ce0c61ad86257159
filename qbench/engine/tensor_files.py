"""Dictionaries of tensors saved by torch.save, read without unpickling anything else."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from qbench.errors import ConfigError, DataError


def load_dictionary(path: str, what: str) -> dict[Any, Any]:
    """Read a file on the CPU.

    Args:
        path: The file.
        what: What it is, to begin the error with.

    Raises:
        ConfigError: If it cannot be opened.
        DataError: If it holds Python objects besides tensors, is damaged, or is no dictionary.
    """
    try:
        with Path(path).open("rb"):
            pass  # what cannot be opened is another sentence than what cannot be read
    except OSError as error:
        raise ConfigError(f"Cannot read {what.lower()} {path!r}: {error.strerror}.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols: what they hold is refused just below
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{what} {path!r} holds Python objects besides tensors, or is damaged; qbench unpickles none, because that "
            "can run code. Save plain dictionaries of tensors."
        ) from error
    except Exception as error:  # whatever its unpickler makes of bytes that torch.save did not write
        raise DataError(
            f"{what} {path!r} was not written by torch.save, or is damaged. Copy it again, or name another."
        ) from error
    if not isinstance(data, dict) or not data:
        raise DataError(f"{what} {path!r} is no dictionary of tensors.")
    return data
