"""Token windows: what a method may look at, and what it is scored on, each with a fingerprint.

A text is tokenized once, as one stream. Calibration windows start at seeded random places, as in the authors'
code (AffineQuant, OmniQuant: Python's `random`, `randint(0, n - seq_len - 1)`); evaluation windows do not
overlap, and the last partial one is dropped.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbench.data.text import Text
from qbench.errors import DataError

# Evaluation windows drawn from a text of documents that does not say how many.
DOCUMENT_WINDOWS = 256


@dataclass(frozen=True)
class TokenWindows:
    """Windows of equal length cut from one tokenized text."""

    ids: Tensor  # [n, seq_len], int64
    dataset: str
    split: str
    fingerprint: str  # sha256 of the ids and their shape
    bos_policy: str  # "none", or where the tokenizer puts a BOS: "stream start", "document start"
    n_tokens_total: int  # of the whole text; of the drawn documents where windows come from documents
    scheme_note: str  # how the windows were cut
    text_fingerprint: str  # sha256 of the text they were cut from, the same for every seed


def draw_calibration(text: Text, tokenizer: Any, n_samples: int, seq_len: int, seed: int) -> TokenWindows:
    """Draw `n_samples` windows at seeded random places.

    A text that keeps its documents apart (C4) gives windows that never cross a document.

    Raises:
        DataError: If the text, or every document of it, is too short for a window.
    """
    rng = random.Random(seed)
    if text.documents is not None:
        return _from_documents(text, tokenizer, n_samples, seq_len, rng)
    stream = _tokenize(text, tokenizer)
    if len(stream) <= seq_len:
        raise _too_short(text, len(stream), seq_len + 1)
    starts = [rng.randint(0, len(stream) - seq_len - 1) for _ in range(n_samples)]
    ids = torch.stack([stream[start : start + seq_len] for start in starts])
    return _windows(ids, text, tokenizer, len(stream), "random starts in one stream")


def evaluation_windows(text: Text, tokenizer: Any, seq_len: int, limit: int | None = None) -> TokenWindows:
    """Cut the text into windows that do not overlap; `limit` keeps the first ones.

    Where the dataset's protocol says otherwise it is followed: C4 scores 256 windows, drawn with seed 0 from
    random documents.

    Raises:
        DataError: If the text is shorter than one window.
    """
    most = min((n for n in (limit, text.max_windows) if n is not None), default=None)
    if text.documents is not None:
        # `limit` cuts what was drawn, so a limited run scores a part of the full run's windows.
        return _from_documents(text, tokenizer, most or DOCUMENT_WINDOWS, seq_len, random.Random(0))
    stream = _tokenize(text, tokenizer)
    count = len(stream) // seq_len
    if count == 0:
        raise _too_short(text, len(stream), seq_len)
    count = count if most is None else min(count, most)
    ids = stream[: count * seq_len].view(count, seq_len).clone()
    return _windows(ids, text, tokenizer, len(stream), "consecutive, last partial window dropped")


def fingerprint(ids: Tensor) -> str:
    """Hash the ids together with their shape, so that 2 x 8 and 4 x 4 tokens differ."""
    digest = hashlib.sha256(f"{tuple(ids.shape)}:".encode())
    digest.update(ids.to(torch.int64).contiguous().cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _from_documents(
    text: Text, tokenizer: Any, n_samples: int, seq_len: int, rng: random.Random
) -> TokenWindows:
    """Draw documents with replacement until one exceeds a window, then a place in it, as the authors do.

    Their code crashes on a document of exactly `seq_len` tokens, which is passed over here.
    """
    assert text.documents is not None
    streams: dict[int, Tensor] = {}  # of the documents drawn so far
    usable = 0
    windows: list[Tensor] = []
    while len(windows) < n_samples:
        index = rng.randint(0, len(text.documents) - 1)
        if index not in streams:
            streams[index] = _encode(tokenizer, text.documents[index])
            usable += len(streams[index]) > seq_len
            if not usable and len(streams) == len(text.documents):
                raise DataError(
                    f"No document of {text.name!r} has more than the {seq_len} tokens of a window (longest: "
                    f"{max(map(len, streams.values()))}); choose a shorter sequence length or other text."
                )
        stream = streams[index]
        if len(stream) > seq_len:
            start = rng.randint(0, len(stream) - seq_len - 1)
            windows.append(stream[start : start + seq_len])
    total = sum(len(stream) for stream in streams.values() if len(stream) > seq_len)
    return _windows(torch.stack(windows), text, tokenizer, total, "random starts in random documents")


def _tokenize(text: Text, tokenizer: Any) -> Tensor:
    if not text.text.strip():
        raise DataError(
            f"The {text.split} text of {text.name!r} is empty; give a file or dataset with text in it."
        )
    return _encode(tokenizer, text.text)


def _encode(tokenizer: Any, text: str) -> Tensor:
    # verbose=False: the warning about the model's limit is meant for one prompt, and this is a whole corpus.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _windows(ids: Tensor, text: Text, tokenizer: Any, total: int, note: str) -> TokenWindows:
    bos = getattr(tokenizer, "bos_token_id", None)
    place = "stream start" if text.documents is None else "document start"
    policy = place if bos is not None and _encode(tokenizer, "a")[:1].tolist() == [bos] else "none"
    return TokenWindows(ids, text.name, text.split, fingerprint(ids), policy, total, note, text.fingerprint)


def _too_short(text: Text, n_tokens: int, needed: int) -> DataError:
    return DataError(
        f"The {text.split} text of {text.name!r} has {n_tokens} tokens, a window needs {needed}; "
        "choose a shorter sequence length or a longer text."
    )
