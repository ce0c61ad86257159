"""Statistics against scipy, against closed forms, and against the truth of simulated texts."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks.simulate_statistics import (
    answer_coverage,
    average_coverage,
    known_answers,
    known_seeds,
    known_windows,
    naive,
    neighbouring,
    seed_coverage,
    seeds_of,
    seeds_separated,
    tie_group_of_answers,
    window_coverage,
    windows_separated,
)
from qbench.reports import stats
from qbench.reports.stats import Scores

DRAWS = 2000
NOISE_OF_COVERAGE = 3 * math.sqrt(0.95 * 0.05 / DRAWS)  # three standard deviations of a simulated 95%


FEWER = 400  # draws where each costs more; `benchmarks/simulate_statistics.py` does all of this with 2,000


def noise(rate: float, draws: int = FEWER) -> float:
    """Three standard deviations of a simulated rate."""
    return 3 * math.sqrt(rate * (1 - rate) / draws)


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
    ("rho", "lost"), [(0.0, 0.0), (0.3, 0.01), (0.6, 0.03)], ids=["independent", "weak", "strong"]
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


@pytest.mark.parametrize(("rho", "at_most"), [(0.3, 0.88), (0.6, 0.72)])
def test_an_ordinary_interval_would_not_cover(rho: float, at_most: float) -> None:
    """The reason for all this: the simulation above can fail."""
    assert window_coverage(64, rho, DRAWS, np.random.default_rng(0), {"naive": naive})["naive"] < at_most


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


# ------------------------------------------------------------------------------------------------ right and wrong


def pair(only_a: int, only_b: int, both: int = 20, neither: int = 10) -> tuple[Scores, Scores]:
    """Two rows' answers with these counts."""
    a = [1.0] * (both + only_a) + [0.0] * (only_b + neither)
    b = [1.0] * both + [0.0] * only_a + [1.0] * only_b + [0.0] * neither
    return Scores.of(a, True), Scores.of(b, True)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 6), (5, 0), (3, 9), (41, 52), (200, 260)])
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    m = only_a + only_b
    expected = scipy_stats.binomtest(only_a, m, 0.5).pvalue if m else 1.0
    assert stats.mcnemar_p(only_a, only_b) == pytest.approx(expected, rel=1e-10)
    found = stats.difference(*pair(only_a, only_b))
    assert found.p_value == pytest.approx(expected, rel=1e-10)
    assert (found.discordant, found.test) == ((only_a, only_b), "exact McNemar")
    assert found.mean == pytest.approx((only_a - only_b) / (30 + m))


def test_the_interval_of_accuracies_never_contradicts_their_test() -> None:
    for m in range(40):
        for only_a in range(m + 1):
            found = stats.difference(*pair(only_a, m - only_a))
            assert (found.low <= 0 <= found.high) == (found.p_value >= 0.05), (only_a, m)
            assert -1 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize(
    ("n", "only_a", "only_b"), [(60, 0.1, 0.1), (200, 0.2, 0.1), (800, 0.05, 0.05)], ids=str
)
def test_intervals_of_accuracies_cover_and_the_test_is_never_too_eager(
    n: int, only_a: float, only_b: float
) -> None:
    coverage, different = answer_coverage(n, only_a, only_b, FEWER, np.random.default_rng(n))
    assert coverage >= 0.95 - noise(0.95)
    if only_a == only_b:
        assert different <= 0.05 + noise(0.05)


def test_the_power_of_mcnemar_is_the_sum_over_all_outcomes() -> None:
    n, only_a, only_b = 12, 0.45, 0.1
    total = 0.0
    for i in range(n + 1):
        for j in range(n - i + 1):
            ways = math.comb(n, i) * math.comb(n - i, j)
            chance = ways * only_a**i * only_b**j * (1 - only_a - only_b) ** (n - i - j)
            if i + j and scipy_stats.binomtest(i, i + j, 0.5).pvalue < 0.05:
                total += chance
    assert stats.mcnemar_power(n, only_a, only_b) == pytest.approx(total, abs=1e-9)
    assert stats.mcnemar_power(n, 0.0, 0.0) == 0.0


def test_the_approximation_for_many_questions_joins_the_exact_power(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = stats.mcnemar_power(9000, 0.06, 0.05)
    monkeypatch.setattr(stats, "EXACT_UP_TO", 100)
    assert stats.mcnemar_power(9000, 0.06, 0.05) == pytest.approx(exact, abs=0.01)


def test_tie_groups_of_accuracies_contain_the_truly_best_row() -> None:
    held, size = tie_group_of_answers((0.5, 0.5, 0.5, 0.3), 400, FEWER, np.random.default_rng(2))
    assert held >= 0.95 - noise(0.95) and size < 3.1


# ---------------------------------------------------------------------------------------------------------- tasks


def test_a_difference_of_averages_weighs_tasks_equally() -> None:
    rng = np.random.default_rng(0)
    a, b = ([(rng.random(n) < 0.5).astype(float) for n in (50, 400)] for _ in range(2))
    found = stats.difference(*(Scores(tuple((task,) for task in row), independent=True) for row in (a, b)))
    assert found.mean == pytest.approx(sum(x.mean() - y.mean() for x, y in zip(a, b, strict=True)) / 2)
    variance = sum(np.var(x - y, ddof=1) / len(x) for x, y in zip(a, b, strict=True)) / 4
    assert found.variance.total() == pytest.approx(variance)
    parts = [np.var(x - y, ddof=1) / len(x) for x, y in zip(a, b, strict=True)]
    welch = sum(parts) ** 2 / sum(p**2 / (len(x) - 1) for p, x in zip(parts, a, strict=True))
    assert found.variance.df() == pytest.approx(welch)


def test_intervals_of_averages_cover() -> None:
    assert average_coverage((300, 100, 200), FEWER, np.random.default_rng(0)) == pytest.approx(
        0.95, abs=noise(0.95)
    )


# ---------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("n_seeds", [2, 4])
@pytest.mark.parametrize(
    "spreads", [(1.0, 0.0, 0.0), (1.0, 0.1, 1.0), (0.1, 1.0, 0.1), (0.0, 0.0, 1.0)],
    ids=["windows", "mixed", "seeds", "both"],
)  # fmt: skip
def test_intervals_cover_whatever_the_source_of_the_spread(
    n_seeds: int, spreads: tuple[float, float, float]
) -> None:
    coverage = seed_coverage(64, n_seeds, spreads, FEWER, np.random.default_rng(n_seeds))
    assert coverage >= 0.94 - noise(0.94)


def test_without_the_spread_of_seeds_the_interval_would_be_far_too_short() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        interval = stats.mean_interval(seeds_of(rng, 64, 3, 0.1, 1.0, 0.1).mean(axis=0))
        hits += interval.low <= 0 <= interval.high
    assert hits < 40


def test_the_sources_of_the_spread_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    truth = {"items": 0.8**2 / 64, "seeds": 0.2**2 / 4, "both": 0.5**2 / 64 / 4}
    zero = Scores((tuple(np.zeros((4, 64))),), tuple(range(4)))
    found = []
    for _ in range(400):
        values = seeds_of(rng, 64, 4, 0.8, 0.2, 0.5, rho=0.0)
        found.append(stats.difference(Scores((tuple(values),), tuple(range(4))), zero).variance)
    for name, value in truth.items():
        assert np.mean([getattr(v, name) for v in found]) == pytest.approx(value, rel=0.12), name
    assert np.mean([v.seed_share for v in found]) == pytest.approx(
        truth["seeds"] / sum(truth.values()), abs=0.08
    )


def test_seeds_are_paired_by_name_and_apart_where_the_names_differ() -> None:
    rng = np.random.default_rng(0)
    windows, effect = rng.normal(size=(1, 64)), np.array([[0.0], [2.0], [5.0]])
    a, b = windows + effect, windows + effect + 0.1 + 0.01 * rng.normal(size=(3, 64))
    named = Scores((tuple(a),), (1, 2, 3)), Scores((tuple(b[[2, 0, 1]]),), (3, 1, 2))
    assert stats.difference(*named).half_width < 0.05
    apart = stats.difference(named[0], Scores((tuple(b),), (4, 5, 6)))
    assert apart.half_width > 2 and apart.mean == pytest.approx((a - b).mean())
    welch = scipy_stats.ttest_ind(a.mean(axis=1), b.mean(axis=1), equal_var=False)
    assert apart.p_value == pytest.approx(welch.pvalue, rel=0.01)


def test_a_row_of_one_seed_against_one_of_several_says_so() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 64)), rng.normal(size=64)
    found = stats.difference(Scores((tuple(a),), (1, 2, 3)), Scores.of(b))
    assert found.one_sided_seeds and found.variance.n_seeds == 3
    assert not stats.difference(Scores.of(b), Scores.of(b + 1)).one_sided_seeds


def test_the_spread_of_seeds_is_the_standard_deviation() -> None:
    assert stats.seed_spread([1.0, 2.0, 4.0]) == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert stats.seed_spread([1.0]) is None and stats.seed_spread([1.0, math.inf]) is None


# ------------------------------------------------------------------------------------------ how much more would tell


@pytest.mark.parametrize(("delta", "rho"), [(0.3, 0.0), (0.3, 0.3), (0.5, 0.6)], ids=str)
def test_the_stated_number_of_windows_separates_at_the_stated_power(delta: float, rho: float) -> None:
    n = 32 + stats.needed(known_windows(delta, 32, rho)).items
    rate = windows_separated(delta, n, rho, FEWER, np.random.default_rng(1))
    assert rate == pytest.approx(
        0.80, abs=noise(0.8) + 0.02
    )  # 0.02: autocorrelation makes short texts a little eager


@pytest.mark.parametrize(("only_a", "only_b"), [(0.2, 0.1), (0.1, 0.05)], ids=str)
def test_the_stated_number_of_questions_separates_at_the_stated_power(only_a: float, only_b: float) -> None:
    n = 100 + stats.needed(known_answers(100, only_a, only_b)).items
    _, rate = answer_coverage(n, only_a, only_b, FEWER, np.random.default_rng(1))
    assert rate == pytest.approx(0.80, abs=noise(0.8))


def test_the_stated_number_of_seeds_separates_at_the_stated_power() -> None:
    spreads = (0.2, 0.3, 0.5)
    count = 2 + stats.needed(known_seeds(0.3, 64, 2, spreads)).seeds
    rate = seeds_separated(0.3, 64, count, spreads, FEWER, np.random.default_rng(1))
    assert 0.80 - noise(0.8) <= rate <= 0.83 + noise(0.8)  # twelve seeds have 83%, eleven 79.6%


def test_more_power_and_more_comparisons_need_more() -> None:
    seen = known_windows(0.2, 64, 0.3)
    plain = stats.needed(seen).items
    assert stats.needed(seen, power=0.95).items > plain < stats.needed(seen, comparisons=4).items
    assert stats.needed(known_windows(1.0, 64, 0.0)).items == 0


def test_where_no_number_would_do_none_is_stated() -> None:
    assert stats.needed(known_windows(0.0, 64, 0.3)) is None
    assert stats.needed(known_windows(1e-5, 64, 0.3)).items is None
    assert stats.needed(known_windows(0.2, 64, 0.3)).seeds is None  # one seed: nothing is known of others
    only_seeds = stats.needed(known_seeds(0.1, 64, 2, (0.0, 1.0, 0.0)))
    assert only_seeds.items is None and only_seeds.seeds > 100
    only_windows = stats.needed(known_seeds(0.05, 64, 2, (1.0, 0.0, 0.0)))
    assert only_windows.seeds is None and only_windows.items > 1000
