"""n-grams in common, against sets of tuples."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from qbench.data.overlap import NGRAM, Overlap, ngram_overlap, same_corpus


def by_sets(calibration: list[list[int]], evaluation: list[list[int]], n: int) -> tuple[int, int, int]:
    """The definition: places, windows, total."""
    known = {tuple(window[i : i + n]) for window in calibration for i in range(len(window) - n + 1)}
    hits = [[tuple(window[i : i + n]) in known for i in range(len(window) - n + 1)] for window in evaluation]
    return sum(map(sum, hits)), sum(any(window) for window in hits), sum(map(len, hits))


@pytest.mark.parametrize("n", [1, 2, 3, 13])
@pytest.mark.parametrize("vocabulary", [2, 5, 50_000])
def test_it_counts_what_the_definition_counts(n: int, vocabulary: int) -> None:
    rng = random.Random(n)
    draw = [[rng.randrange(vocabulary) for _ in range(rng.choice([5, 20, 60]))] for _ in range(30)]
    copied = [window[:] for window in draw[:3]] + [draw[4][2:] + draw[5]]
    calibration, evaluation = draw[:15], draw[15:] + copied
    found = ngram_overlap(calibration, evaluation, n)
    assert (found.shared, found.windows, found.total) == by_sets(calibration, evaluation, n)


def test_order_and_place_within_the_window_matter() -> None:
    window = list(range(13))
    assert ngram_overlap([window], [window]).share == 1
    assert ngram_overlap([window], [[99, *window, 98]]).shared == 1
    assert ngram_overlap([window], [window[::-1]]).shared == 0
    assert ngram_overlap([window], [[1, 0, *window[2:]]]).shared == 0
    assert ngram_overlap([window[:7], window[7:]], [window]).shared == 0  # no n-gram crosses a window's end


@pytest.mark.parametrize("calibration", [[], [[1, 2]]], ids=["no windows", "short ones"])
def test_too_little_text_shares_nothing(calibration: list[list[int]]) -> None:
    assert ngram_overlap(calibration, [list(range(20))]) == Overlap(NGRAM, 0, 8, 0)
    assert ngram_overlap(calibration, [[1, 2, 3]]).share == 0


def test_windows_of_a_run_take_a_moment() -> None:
    """128 windows of 2048, as tensors; two thirds of one evaluation window copied."""
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(0, 32_000, (128, 2048), generator=generator)
    evaluation = torch.randint(0, 32_000, (140, 2048), generator=generator)
    evaluation[3, :1365] = calibration[100, 500:1865]
    found = ngram_overlap(calibration.numpy(), evaluation.numpy())
    assert (found.shared, found.windows) == (1365 - 12, 1)
    assert found.record()["share"] == pytest.approx(1353 / (140 * 2036))


def test_the_note_is_in_percent_and_silent_where_nothing_is_shared() -> None:
    assert Overlap(13, 0, 100, 0).notes("wiki") == []
    assert Overlap(13, 5, 200, 1).notes("wiki") == [
        "2.5% of the 13-grams of wiki are in the calibration windows"
    ]
    assert Overlap(13, 1, 10**5, 1).notes("wiki")[0].startswith("less than 0.1% of the 13-grams")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("wikitext2", "wikitext2", True), ("c4", "c4_new", True), ("ptb_new", "ptb", True),
        ("wikitext2", "c4", False), ("org/data", "org/data", True), ("org/data", "org/other", False),
    ],
)  # fmt: skip
def test_splits_and_readings_are_of_one_corpus(one: str, other: str, same: bool) -> None:
    assert same_corpus(one, other) is same and same_corpus(other, one) is same


def test_one_file_by_two_paths_is_one_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert same_corpus("a.txt", str(tmp_path / "a.txt"))
    assert not same_corpus("a.txt", "b.txt")


def test_hashes_of_small_vocabularies_do_not_collide() -> None:
    """All 2^13 n-grams over two tokens against the half of them that begin with 0."""
    grams = (np.arange(2**13)[:, None] >> np.arange(13)) & 1
    found = ngram_overlap(grams[grams[:, 0] == 0], grams)
    assert found.shared == 2**12
