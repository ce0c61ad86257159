"""Statistics against scipy, against closed forms, and against the truth of simulated texts."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qbench.reports import stats

DRAWS = 2000
NOISE_OF_COVERAGE = 3 * math.sqrt(0.95 * 0.05 / DRAWS)  # three standard deviations of a simulated 95%


def neighbouring(rng: np.random.Generator, draws: int, n: int, rho: float) -> np.ndarray:
    """Stationary AR(1) series with unit variance  # [draws, n]."""
    series = rng.normal(size=(draws, n))
    for t in range(1, n):
        series[:, t] = rho * series[:, t - 1] + math.sqrt(1 - rho**2) * series[:, t]
    return series


def test_with_all_cosines_it_is_the_ordinary_t_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "n_cosines", lambda n: n - 1)
    values = np.random.default_rng(0).normal(0.3, 1.0, 25).tolist()
    ours, theirs = stats.mean_interval(values), scipy_stats.ttest_1samp(values, 0.0)
    low, high = theirs.confidence_interval(0.95)
    assert ours.low == pytest.approx(low, rel=1e-12)
    assert ours.high == pytest.approx(high, rel=1e-12)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-10)


def test_variance_is_the_papers_sum_over_cosines() -> None:
    d = np.random.default_rng(1).normal(size=40).tolist()
    n, terms = 40, stats.n_cosines(40)
    waves = [
        math.sqrt(2 / n) * sum(d[t - 1] * math.cos(math.pi * j * (t - 0.5) / n) for t in range(1, n + 1))
        for j in range(1, terms + 1)
    ]
    expected = math.sqrt(sum(w * w for w in waves) / terms / n)
    assert stats.mean_interval(d).stderr == pytest.approx(expected, rel=1e-12)
    assert stats.mean_interval(d).df == terms == 5


@pytest.mark.parametrize(
    ("n", "terms"), [(2, 1), (4, 3), (8, 4), (16, 4), (64, 6), (128, 10), (320, 19), (1000, 40)]
)
def test_number_of_cosines(n: int, terms: int) -> None:
    assert stats.n_cosines(n) == terms


@pytest.mark.parametrize("n", [32, 64, 320])
@pytest.mark.parametrize(
    ("rho", "lost"), [(0.0, 0.0), (0.3, 0.01), (0.5, 0.02)], ids=["independent", "weak", "strong"]
)
def test_intervals_cover_the_true_difference(n: int, rho: float, lost: float) -> None:
    """Nominal 95%; `lost` is what neighbouring windows are known to cost at these lengths (module docstring)."""
    rng = np.random.default_rng(n)
    truth = 0.05
    a = neighbouring(rng, DRAWS, n, rho) + truth
    covered = 0
    for row in a:
        interval = stats.paired_difference(row.tolist(), [0.0] * n)
        covered += interval.low <= truth <= interval.high
    assert covered / DRAWS == pytest.approx(0.95 - lost / 2, abs=NOISE_OF_COVERAGE + lost / 2)


def test_an_ordinary_interval_would_not_cover() -> None:
    """The reason for all this: the simulation above can fail."""
    series = neighbouring(np.random.default_rng(0), DRAWS, 64, 0.5)
    reach = scipy_stats.t.ppf(0.975, 63) * series.std(axis=1, ddof=1) / 8
    assert (np.abs(series.mean(axis=1)) < reach).mean() < 0.80


def test_what_both_rows_share_does_not_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    text = 10 * neighbouring(rng, 1, 64, 0.6)[0]
    own = 0.01 * rng.normal(size=64)
    paired = stats.paired_difference((text + 0.1 + own).tolist(), text.tolist())
    assert paired.half_width < 0.01 < stats.mean_interval(text.tolist()).half_width
    assert 0.09 < paired.low < paired.high < 0.11
    assert paired.p_value < 1e-6


def test_different_items_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        stats.paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    "values", [[], [1.0], [1.0, math.inf], [1.0, math.nan, 2.0]], ids=["none", "one", "inf", "nan"]
)
def test_too_little_to_say(values: list[float]) -> None:
    assert stats.mean_interval(values) is None


def test_a_constant_difference_is_certain_and_none_is_none() -> None:
    certain = stats.paired_difference([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])
    assert (certain.stderr, certain.p_value) == (0.0, 0.0)
    same = stats.paired_difference([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (same.mean, same.half_width, same.p_value) == (0.0, 0.0, 1.0)


def test_holm_against_the_definition() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.7, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []
    rng = np.random.default_rng(0)
    for _ in range(
        50
    ):  # step-down by hand: reject the smallest while it is below α over the number that is left
        p = rng.random(5).tolist()
        alpha, order, rejected = 0.3, sorted(range(5), key=p.__getitem__), set()
        for left, i in zip(range(5, 0, -1), order, strict=True):
            if p[i] > alpha / left:
                break
            rejected.add(i)
        assert {i for i, q in enumerate(stats.holm(p)) if q <= alpha} == rejected


@pytest.mark.parametrize(
    "means", [(0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 5.0), (0.0, 0.1, 0.2, 0.3), (0.0, 0.0, 5.0, 5.0)], ids=str
)
def test_the_group_contains_the_truly_best_row(means: tuple[float, ...]) -> None:
    """Over 2,000 texts with neighbouring windows alike, at the nominal rate or above, whatever the other rows are."""
    rng = np.random.default_rng(7)
    n, contained = 64, 0
    noise = [neighbouring(rng, DRAWS, n, 0.3) for _ in means]
    for draw in range(DRAWS):
        rows = {
            str(i): (series[draw] + mean).tolist()
            for i, (series, mean) in enumerate(zip(noise, means, strict=True))
        }
        ranking = stats.tied_with_best(rows)
        contained += "0" in {ranking.best, *ranking.tied}
    assert contained / DRAWS >= 0.95 - NOISE_OF_COVERAGE


def test_the_group_excludes_what_is_worse() -> None:
    rng = np.random.default_rng(3)
    excluded = 0
    for _ in range(200):
        text = rng.normal(size=64)
        rows = {
            name: (text + mean + 0.05 * rng.normal(size=64)).tolist()
            for name, mean in (("a", 0.0), ("b", 0.05))
        }
        ranking = stats.tied_with_best(rows)
        excluded += ranking.best == "a" and not ranking.tied
    assert excluded >= 190


def test_direction_and_correction() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=32)
    rows = {
        name: (base + mean + 0.1 * rng.normal(size=32)).tolist()
        for name, mean in (("a", 0.0), ("b", 1.0), ("c", 2.0))
    }
    assert stats.tied_with_best(rows).best == "a"
    high = stats.tied_with_best(rows, higher_is_better=True)
    assert (high.best, high.tied) == ("c", frozenset())
    raw = [stats.paired_difference(rows[key], rows["c"]).p_value for key in "ab"]
    assert [high.adjusted_p[key] for key in "ab"] == pytest.approx(stats.holm(raw))


def test_order_of_rows_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    rows = {name: rng.normal(0.2 * i, 1.0, 32).tolist() for i, name in enumerate("abc")}
    first = stats.tied_with_best(rows)
    for order in itertools.permutations(rows):
        other = stats.tied_with_best({name: rows[name] for name in order})
        assert (other.best, other.tied) == (first.best, first.tied)


def test_identical_rows_are_tied_and_collapsed_rows_are_not() -> None:
    values = [1.0, 2.0, 3.0, 2.0]
    ranking = stats.tied_with_best({"a": values, "b": list(values), "c": [math.inf] * 4})
    assert {ranking.best, *ranking.tied} == {"a", "b"}
    assert stats.tied_with_best({"c": [math.inf]}) is None
    assert stats.tied_with_best({}) is None


def test_a_single_window_decides_nothing() -> None:
    assert stats.tied_with_best({"a": [1.0], "b": [9.0]}).tied == {"b"}
