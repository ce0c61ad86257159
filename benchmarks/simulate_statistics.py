"""How often the table's statistics are right, on rows whose truth is known: the figures of docs/statistics.md.

    python benchmarks/simulate_statistics.py [--draws 2000] [--seed 0]

Four questions. Do the intervals of a difference cover the true one: when neighbouring windows are alike, with several
seeds, for right and wrong answers, for the average of tasks? (And do other intervals: an ordinary t, a t with as many
independent windows as the autocorrelation leaves, a block bootstrap?) Does the group "best and tied" contain the truly
best row? Does the number of windows, questions or seeds that `needed` states separate two rows as often as it says? And
how far off is that number when all that is known is one ordinary run?

CPU only; under a minute on one core with the default number of draws. A rate of 95% from 2,000 draws is known to
±1.0 percentage points (two standard deviations), one of 80% to ±1.8.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
from scipy import special

from qbench.reports import stats
from qbench.reports.stats import Scores

RESAMPLES = 499


def neighbouring(rng: np.random.Generator, draws: int, n: int, rho: float) -> np.ndarray:
    """Stationary AR(1) series with unit variance  # [draws, n]."""
    series = rng.normal(size=(draws, n))
    for t in range(1, n):
        series[:, t] = rho * series[:, t - 1] + math.sqrt(1 - rho**2) * series[:, t]
    return series


# ------------------------------------------------------------------------------------ intervals of a difference


def naive(series: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The ordinary t-interval, as if windows were independent."""
    n = len(series)
    reach = special.stdtrit(n - 1, 0.975) * series.std(ddof=1) / math.sqrt(n)
    return series.mean() - reach, series.mean() + reach


def effective(series: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """A t-interval with n (1 - r) / (1 + r) independent windows, r the autocorrelation at lag 1."""
    n = len(series)
    centred = series - series.mean()
    r = min(max(float(centred[1:] @ centred[:-1] / (centred @ centred)), 0.0), 0.99)
    left = max(2.0, n * (1 - r) / (1 + r))
    reach = special.stdtrit(left - 1, 0.975) * series.std(ddof=1) / math.sqrt(left)
    return series.mean() - reach, series.mean() + reach


def block_bootstrap(series: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Percentiles of means of circular blocks of 1.5 n^(1/3) windows."""
    n = len(series)
    length = max(1, round(1.5 * n ** (1 / 3)))
    starts = rng.integers(0, n, size=(RESAMPLES, -(-n // length)))
    places = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :n] % n
    low, high = np.quantile(series[places].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def cosines(series: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """qbench's."""
    interval = stats.mean_interval(series)
    return interval.low, interval.high


INTERVALS = {
    "ordinary t": naive,
    "effective n": effective,
    "block bootstrap": block_bootstrap,
    "qbench": cosines,
}


def window_coverage(
    n: int, rho: float, draws: int, rng: np.random.Generator, methods: dict[str, Callable] = INTERVALS
) -> dict[str, float]:
    """Share of texts of n windows, of which neighbours correlate by rho, whose interval covers the true difference."""
    hits = dict.fromkeys(methods, 0)
    for series in neighbouring(rng, draws, n, rho):
        for name, interval in methods.items():
            low, high = interval(series, rng)
            hits[name] += low <= 0 <= high
    return {name: count / draws for name, count in hits.items()}


def seeds_of(
    rng: np.random.Generator,
    n: int,
    n_seeds: int,
    windows: float,
    seeds: float,
    rest: float,
    rho: float = 0.3,
) -> np.ndarray:
    """Differences by seed and window: standard deviations of what windows, seeds and both add  # [seeds, n]."""
    return (
        windows * neighbouring(rng, 1, n, rho)
        + seeds * rng.normal(size=(n_seeds, 1))
        + rest * neighbouring(rng, n_seeds, n, rho)
    )


def seed_coverage(
    n: int, n_seeds: int, spreads: tuple[float, float, float], draws: int, rng: np.random.Generator
) -> float:
    """Share of experiments of several seeds whose interval covers the true difference."""
    zero = Scores((tuple(np.zeros((n_seeds, n))),), tuple(range(n_seeds)))
    hits = 0
    for _ in range(draws):
        scores = Scores((tuple(seeds_of(rng, n, n_seeds, *spreads)),), tuple(range(n_seeds)))
        found = stats.difference(scores, zero)
        hits += found.low <= 0 <= found.high
    return hits / draws


def answers(
    rng: np.random.Generator, n: int, both: float, only_a: float, only_b: float
) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers of two rows, from the chances of the four outcomes of a question."""
    u = rng.random(n)
    a = u < both + only_a
    b = (u < both) | ((u >= both + only_a) & (u < both + only_a + only_b))
    return a.astype(float), b.astype(float)


def answer_coverage(
    n: int, only_a: float, only_b: float, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Share of tests whose interval covers the true difference of accuracies, and share found different at 5%."""
    hits = found = 0
    for _ in range(draws):
        a, b = answers(rng, n, 0.4, only_a, only_b)
        result = stats.difference(Scores.of(a, True), Scores.of(b, True))
        hits += result.low <= only_a - only_b <= result.high
        found += result.separates()
    return hits / draws, found / draws


def average_coverage(sizes: tuple[int, ...], draws: int, rng: np.random.Generator) -> float:
    """Share of experiments in which the interval of a difference of task averages covers the true one."""
    truth, hits = 0.06 - 0.04, 0
    for _ in range(draws):
        pairs = [answers(rng, n, 0.4, 0.06, 0.04) for n in sizes]
        a, b = (Scores(tuple((pair[i],) for pair in pairs), independent=True) for i in (0, 1))
        found = stats.difference(a, b)
        hits += found.low <= truth <= found.high
    return hits / draws


# ------------------------------------------------------------------------------------------- ties with the best


def tie_group(
    means: tuple[float, ...], n: int, rho: float, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """How often "best and tied" holds the truly best row, and its mean size; rows share the text's difficulty.

    Args:
        means: True mean losses of the rows, the first the least.
        n: Windows.
        rho: Autocorrelation of what is each row's own.
        draws: Texts.
        rng: Source of randomness.
    """
    text = 5 * neighbouring(rng, draws, n, 0.6)
    own = [text + mean + neighbouring(rng, draws, n, rho) for mean in means]
    held = size = 0
    for draw in range(draws):
        ranking = stats.tied_with_best({str(i): series[draw] for i, series in enumerate(own)})
        held += "0" in {ranking.best, *ranking.tied}
        size += 1 + len(ranking.tied)
    return held / draws, size / draws


def tie_group_of_answers(
    chances: tuple[float, ...], n: int, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """The same for accuracies; half of the questions are answered alike by all rows."""
    held = size = 0
    for _ in range(draws):
        alike, guess = rng.random(n) < 0.5, rng.random(n) < 0.5
        rows = {
            str(i): Scores.of(np.where(alike, guess, rng.random(n) < chance).astype(float), True)
            for i, chance in enumerate(chances)
        }
        ranking = stats.tied_with_best(rows, higher_is_better=True)
        held += "0" in {ranking.best, *ranking.tied}
        size += 1 + len(ranking.tied)
    return held / draws, size / draws


# ------------------------------------------------------------------------------------- how much more would tell


def known_windows(delta: float, n: int, rho: float) -> stats.Difference:
    """What would be seen of AR(1) differences with unit variance if nothing had to be estimated."""
    variance = (1 + rho) / (1 - rho) / n
    parts = stats.Variance(variance, None, 0.0, n, 1, float(stats.n_cosines(n)), 0.0, False)
    return stats.Difference(delta, 0.0, 0.0, 1.0, "", parts)


def known_answers(n: int, only_a: float, only_b: float) -> stats.Difference:
    """The same of two rows' answers to n questions."""
    variance = (only_a + only_b - (only_a - only_b) ** 2) / n
    parts = stats.Variance(variance, None, 0.0, n, 1, n - 1.0, 0.0, True)
    return stats.Difference(only_a - only_b, 0.0, 0.0, 1.0, "", parts, (round(n * only_a), round(n * only_b)))


def known_seeds(
    delta: float, n: int, n_seeds: int, spreads: tuple[float, float, float], rho: float = 0.3
) -> stats.Difference:
    """The same of several seeds on n windows."""
    windows, seeds, rest = (spread**2 for spread in spreads)
    longer = (1 + rho) / (1 - rho) / n
    parts = stats.Variance(
        windows * longer, seeds / n_seeds, rest * longer / n_seeds,
        n, n_seeds, float(stats.n_cosines(n)), n_seeds - 1.0, False,
    )  # fmt: skip
    return stats.Difference(delta, 0.0, 0.0, 1.0, "", parts)


def windows_separated(delta: float, n: int, rho: float, draws: int, rng: np.random.Generator) -> float:
    """Share of texts of n windows that tell a difference of delta."""
    return float(
        np.mean([stats.mean_interval(s + delta).p_value < 0.05 for s in neighbouring(rng, draws, n, rho)])
    )


def seeds_separated(
    delta: float,
    n: int,
    n_seeds: int,
    spreads: tuple[float, float, float],
    draws: int,
    rng: np.random.Generator,
) -> float:
    """Share of experiments of n windows and so many seeds that tell a difference of delta."""
    found = 0
    for _ in range(draws):
        values = seeds_of(rng, n, n_seeds, *spreads) + delta
        found += stats.interval_of(Scores((tuple(values),), tuple(range(n_seeds)))).p_value < 0.05
    return found / draws


def from_one_run(
    delta: float, n: int, rho: float, draws: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Quartiles of (stated number of windows in all) / (right number), each stated from one run of n windows."""
    right = stats.needed(known_windows(delta, n, rho)).items + n
    zeros, stated = Scores.of(np.zeros(n)), []
    for series in neighbouring(rng, draws, n, rho) + delta:
        more = stats.needed(stats.difference(Scores.of(series), zeros))
        stated.append(math.inf if more is None or more.items is None else (more.items + n) / right)
    return tuple(float(q) for q in np.quantile(stated, [0.25, 0.5, 0.75]))


# ---------------------------------------------------------------------------------------------------- the report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draws, rng = asked.draws, np.random.default_rng(asked.seed)

    print(f"{draws} draws, seed {asked.seed}\n")
    print("Coverage of 95% intervals: mean difference of n windows, neighbours correlated by ρ\n")
    print(f"{'n':>5} {'ρ':>4}  " + "  ".join(f"{name:>15}" for name in INTERVALS))
    for n in (16, 32, 64, 320):
        for rho in (0.0, 0.3, 0.6):
            rates = window_coverage(n, rho, draws, rng)
            print(f"{n:>5} {rho:>4}  " + "  ".join(f"{100 * rate:>14.1f}%" for rate in rates.values()))

    print("\nCoverage with several seeds, 64 windows (ρ 0.3); standard deviations of windows, seeds, both\n")
    spreads = {"windows alone": (1.0, 0.0, 0.0), "mixed": (1.0, 0.1, 1.0), "both alone": (0.0, 0.0, 1.0),
               "seeds dominate": (0.1, 1.0, 0.1)}  # fmt: skip
    print(f"{'':>16}" + "".join(f"{count:>8} seeds" for count in (2, 3, 5)))
    for name, spread in spreads.items():
        rates = [seed_coverage(64, count, spread, draws, rng) for count in (2, 3, 5)]
        print(f"{name:>16}" + "".join(f"{100 * rate:>13.1f}%" for rate in rates))

    print("\nAccuracies: coverage of 95% intervals of the difference, and share found different at 5%\n")
    print(f"{'questions':>9}  {'only A right':>12}  {'only B right':>12}  {'coverage':>8}  {'different':>9}")
    for n, only_a, only_b in (
        (100, 0.05, 0.05),
        (100, 0.2, 0.1),
        (800, 0.05, 0.05),
        (800, 0.1, 0.1),
        (800, 0.1, 0.07),
    ):
        coverage, different = answer_coverage(n, only_a, only_b, draws, rng)
        print(f"{n:>9}  {only_a:>12}  {only_b:>12}  {100 * coverage:>7.1f}%  {100 * different:>8.1f}%")
    sizes = (800, 800, 1172, 800, 800, 1267)
    print(f"average of six tasks of {sizes}: coverage {100 * average_coverage(sizes, draws, rng):.1f}%")

    print('\n"Best and tied" contains the truly best row (mean size of the group)\n')
    cases = {
        "4 rows alike": (0.0,) * 4,
        "one worse by 1": (0.0, 0.0, 0.0, 1.0),
        "0, 0.1, 0.2, 0.3": (0.0, 0.1, 0.2, 0.3),
    }
    for name, means in cases.items():
        for n, rho in ((64, 0.0), (64, 0.3), (64, 0.6), (320, 0.6)):
            held, size = tie_group(means, n, rho, draws, rng)
            print(f"{name:>18}, {n:>3} windows, ρ {rho}: {100 * held:>5.1f}% ({size:.2f})")
    for chances in ((0.5,) * 4, (0.5, 0.5, 0.5, 0.35)):
        held, size = tie_group_of_answers(chances, 800, draws, rng)
        print(f"accuracies {chances}, 800 questions: {100 * held:.1f}% ({size:.2f})")

    print("\nThe stated number separates two rows: how often (stated power 80%)\n")
    for delta, rho in ((0.2, 0.0), (0.2, 0.3), (0.2, 0.6), (0.5, 0.6)):
        n = 32 + stats.needed(known_windows(delta, 32, rho)).items
        rate = windows_separated(delta, n, rho, draws, rng)
        print(f"windows, true difference {delta} σ, ρ {rho}: {n:>5} windows: {100 * rate:.1f}%")
    for only_a, only_b in ((0.06, 0.04), (0.1, 0.07), (0.2, 0.1)):
        n = 100 + stats.needed(known_answers(100, only_a, only_b)).items
        _, rate = answer_coverage(n, only_a, only_b, draws, rng)
        print(f"questions, only A right {only_a}, only B {only_b}: {n:>5} questions: {100 * rate:.1f}%")
    for delta, spread in ((0.5, (0.3, 0.3, 0.3)), (0.3, (0.2, 0.3, 0.5))):
        count = 2 + stats.needed(known_seeds(delta, 64, 2, spread)).seeds
        rate = seeds_separated(delta, 64, count, spread, draws, rng)
        print(
            f"seeds, true difference {delta}, spreads {spread}, 64 windows: {count} seeds: {100 * rate:.1f}%"
        )

    print("\nStated from one run of 64 windows: (windows stated) / (windows that are right), quartiles\n")
    for delta, rho in ((0.2, 0.3), (0.4, 0.3)):
        low, middle, high = from_one_run(delta, 64, rho, draws, rng)
        print(f"true difference {delta} σ, ρ {rho}: {low:.2g}, {middle:.2g}, {high:.2g}")


if __name__ == "__main__":
    main()
