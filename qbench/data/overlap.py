"""Does the calibration text hold the evaluation text? Counted as contamination is: by n-grams that both have.

A method that has seen the windows it is scored on looks better than it is. Thirteen tokens in a row are what GPT-3's
authors counted as a collision (Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix C, there in words); here
they are tokens, since both sides are at hand as the model sees them. Texts of one language share formulas and
licences, so a small share is normal; the row carries it, and a person judges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NGRAM = 13
# Names of one corpus: other splits, subsets or readings of the same collection.
CORPORA = {"c4_new": "c4", "ptb_new": "ptb"}


@dataclass(frozen=True)
class Overlap:
    """n-grams of the evaluation's windows that occur in the calibration's.

    Attributes:
        n: Tokens of an n-gram.
        shared: Places in the evaluation windows whose n-gram occurs in a calibration window.
        total: Places there are.
        windows: Evaluation windows, or questions, with at least one such place.
    """

    n: int
    shared: int
    total: int
    windows: int

    @property
    def share(self) -> float:
        """Of all places; 0 where windows are shorter than an n-gram."""
        return self.shared / self.total if self.total else 0.0

    def record(self) -> dict[str, Any]:
        """As the row's record has it."""
        return {
            "n": self.n,
            "shared": self.shared,
            "total": self.total,
            "windows": self.windows,
            "share": self.share,
        }

    def notes(self, name: str) -> list[str]:
        """What the row says of it: nothing where nothing is shared."""
        if not self.shared:
            return []
        percent = 100 * self.share
        shown = f"{percent:.1f}%" if percent >= 0.05 else "less than 0.1%"
        return [f"{shown} of the {self.n}-grams of {name} are in the calibration windows"]


def ngram_overlap(
    calibration: Iterable[Sequence[int]], evaluation: Iterable[Sequence[int]], n: int = NGRAM
) -> Overlap:
    """Count the n-grams that evaluation windows share with calibration windows; none crosses a window's end.

    Args:
        calibration: Token ids of each window; windows may differ in length.
        evaluation: The same of what is scored.
        n: Tokens of an n-gram.
    """
    known = np.unique(np.concatenate([_hashes(window, n) for window in calibration] or [_hashes((), n)]))
    shared = total = windows = 0
    for window in evaluation:
        hashes = _hashes(window, n)
        found = (
            int((known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] == hashes).sum())
            if len(known)
            else 0
        )
        shared, total, windows = shared + found, total + len(hashes), windows + (found > 0)
    return Overlap(n, shared, total, windows)


def _hashes(window: Sequence[int], n: int) -> np.ndarray:
    """A 64-bit hash of every n-gram of a window: a polynomial in a mixed token id, modulo 2^64.

    Of 10^5 n-grams on either side two different ones collide with a chance of 10^-9.
    """
    ids = np.asarray(window, dtype=np.uint64)
    places = len(ids) - n + 1
    if places < 1:
        return np.zeros(0, np.uint64)
    # Token ids are small and alike: splitmix64's finalizer spreads them over all bits first.
    mixed = (ids + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    hashes = np.zeros(places, np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(0x9FB21C651E98DF25) + mixed[i : i + places]
    return hashes


def same_corpus(calibration: str, evaluation: str) -> bool:
    """Whether two dataset names or paths are of one corpus, whatever split is read of it.

    Args:
        calibration: Name or path that the calibration text was loaded by.
        evaluation: Name or path of the evaluation text.
    """
    sides = []
    for target in (calibration, evaluation):
        path = Path(target).expanduser()
        sides.append(str(path.resolve()) if path.exists() else CORPORA.get(target, target))
    return sides[0] == sides[1]
