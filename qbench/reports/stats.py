"""Statistics of paired scores: intervals that respect neighbouring windows and seeds, ties, what more would tell.

Two rows are scored on the same items, so only the difference item by item is compared. `docs/statistics.md` explains in
plain words what comes out, with the simulation that chose these methods (`benchmarks/simulate_statistics.py`).

**Windows of text.** Windows that follow each other are alike, so n windows are worth fewer than n independent ones: an
ordinary t-interval is too short. Measured on 321 windows of 512 tokens of the standard library's text: the differences
between a small LLaMA at W4A4 (SmoothQuant) and at full precision have autocorrelations of 0.38, 0.28 and 0.21 at lags 1
to 3, and the standard error below is twice the ordinary one.

The interval is the equal-weighted cosine (EWC) one. Source: Lazarus, Lewis, Stock & Watson, "HAR Inference:
Recommendations for Practice", J. Business & Economic Statistics 36(4), 2018, 541-559. With d_1 ... d_n the differences
in the text's order,

    Λ_j = sqrt(2/n) Σ_t d_t cos(π j (t - 1/2) / n),    j = 1 ... B      (orthonormal type-II cosine transform)
    Var(mean d) ≈ (1/n) · (1/B) Σ_j Λ_j²,              mean d ± t_B(0.975) · sqrt(Var)

The lowest B frequencies hold the variance that survives averaging; their number is B = 0.4 n^(2/3), the paper's rule.
B = n - 1 is exactly the ordinary t-interval. Ours: B is at least 4 where n allows, because t_1 to t_3 intervals are so
long that small runs could say nothing.

**Questions.** Items that are right or wrong are independent. The test is McNemar's exact one (Psychometrika 12, 1947,
153-157): a binomial test on the items that only one of the two got right. The interval of the difference is Bonett &
Price's adjusted Wald one (J. Educational and Behavioral Statistics 37(4), 2012, 479-488: as if one more item of either
kind had been seen), and that of one accuracy Wilson's.

**Seeds.** With S calibration seeds scored on the same n items, d_sw = μ + item_w + seed_s + rest_sw; the variance of
the mean has a part that more items shrink, one that more seeds shrink, and one that both do. The first is estimated
from the items' means over seeds, as above; the second from the seeds' means over items; the rest, which both hold, from
what remains. Degrees of freedom are Satterthwaite's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
POWER = 0.80
MIN_COSINES = 4
MOST = 10**7  # windows, items or seeds beyond which "this many more" is no advice
EXACT_UP_TO = 20_000  # items for which McNemar's power is summed exactly


@dataclass(frozen=True)
class Interval:
    """Mean of a series with its standard error and 95% interval.

    Attributes:
        df: Degrees of freedom of the t distribution; for windows of text the number of cosines.
        p_value: Two-sided, for the hypothesis that the true mean is zero.
    """

    mean: float
    stderr: float
    df: float
    low: float
    high: float
    p_value: float
    n: int

    @property
    def half_width(self) -> float:
        """What stands behind ±."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Scores:
    """Everything that one row scored on one metric.

    Attributes:
        strata: `strata[task][seed]` is one number per item, in the text's order. Several tasks are averaged with equal
            weight; a perplexity has one. All seeds of a task have the same items.
        seeds: Names of the calibration seeds, in the order of the values.
        independent: Whether items are independent of their neighbours: questions are, windows of a text are not.
    """

    strata: tuple[tuple[Sequence[float], ...], ...]
    seeds: tuple[Hashable, ...] = (None,)
    independent: bool = False

    @classmethod
    def of(cls, values: Sequence[float], independent: bool = False) -> Scores:
        """One task, one seed."""
        return cls(((values,),), independent=independent)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """One array per task  # [seeds, items]."""
        import numpy as np

        return tuple(np.asarray(task, dtype=np.float64) for task in self.strata)

    @property
    def n_items(self) -> int:
        """Items of all tasks."""
        return sum(len(task[0]) for task in self.strata)

    @property
    def enough(self) -> bool:
        """Whether there are numbers only, and two items of each task to see a spread in."""
        return self.finite and min(len(task[0]) for task in self.strata) > 1

    @cached_property
    def mean(self) -> float:
        """Over items, seeds and tasks."""
        return math.fsum(float(task.sum()) / task.size for task in self.arrays) / len(self.arrays)

    @cached_property
    def finite(self) -> bool:
        """Whether there is nothing but numbers."""
        import numpy as np

        # A sum is finite only where all its terms are; the other way round it may overflow.
        return all(
            task.size > 0 and (math.isfinite(task.sum()) or bool(np.isfinite(task).all()))
            for task in self.arrays
        )

    @cached_property
    def negligible(self) -> float:
        """A standard error that is rounding and no spread: a constant series differs from its mean by that much."""
        return 1e-14 * max(float(max(task.max(), -task.min())) for task in self.arrays)

    @cached_property
    def variance(self) -> Variance:
        """Of the mean."""
        return _variance(self.arrays, self.independent)

    def times(self, factor: float) -> Scores:
        """The same scores, scaled."""
        return Scores(tuple(tuple(task * factor) for task in self.arrays), self.seeds, self.independent)

    @cached_property
    def right_or_wrong(self) -> bool:
        """Whether this is one task's zeros and ones with one seed, for which there are exact tests."""
        values = self.arrays[0]
        return (
            self.independent
            and len(self.arrays) == len(self.seeds) == 1
            and bool(((values == 0) | (values == 1)).all())
        )

    def pairs_with(self, other: Scores) -> bool:
        """Whether both can be compared item by item."""
        return self.independent == other.independent and (
            [len(task[0]) for task in self.strata] == [len(task[0]) for task in other.strata]
        )


@dataclass(frozen=True)
class Variance:
    """Variance of a mean by its sources.

    Attributes:
        items: The part that only more items shrink; with one seed, everything.
        seeds: The part that only more seeds shrink; None where there is one seed, so that nothing is known.
        both: The part that either shrinks.
        n: Items.
        n_seeds: Seeds of the row, or of the row that has more of them.
        item_df: Degrees of freedom of the items' part.
        seed_df: Of the seeds' part.
        independent: Whether the items are.
    """

    items: float
    seeds: float | None
    both: float
    n: int
    n_seeds: int
    item_df: float
    seed_df: float
    independent: bool

    def total(self, n: float | None = None, n_seeds: float | None = None) -> float:
        """Of the mean of so many items and seeds."""
        by_items = self.n / (n or self.n)
        by_seeds = self.n_seeds / (n_seeds or self.n_seeds)
        return self.items * by_items + (self.seeds or 0.0) * by_seeds + self.both * by_items * by_seeds

    def df(self, n: int | None = None, n_seeds: int | None = None) -> float:
        """Satterthwaite's degrees of freedom at so many items and seeds."""
        by_items = self.n / (n or self.n)
        by_seeds = self.n_seeds / (n_seeds or self.n_seeds)
        items_df = self.item_df
        if n is not None:
            items_df *= (n - 1) / (self.n - 1) if self.independent else n_cosines(n) / n_cosines(self.n)
        from_items = (self.items + self.both * by_seeds) * by_items
        from_seeds = (self.seeds or 0.0) * by_seeds
        if from_seeds == 0 or self.seed_df == 0:
            return items_df
        seed_df = self.seed_df * ((n_seeds or self.n_seeds) - 1) / (self.n_seeds - 1)
        return (from_items + from_seeds) ** 2 / (from_items**2 / items_df + from_seeds**2 / seed_df)

    @property
    def seed_share(self) -> float | None:
        """Share of the variance that only more seeds shrink; None where seeds are unknown."""
        total = self.total()
        return None if self.seeds is None else self.seeds / total if total > 0 else 0.0


@dataclass(frozen=True)
class Difference:
    """Mean of one row minus mean of another on the same items, and what is known of the truth.

    Attributes:
        test: What the p-value comes from, in words.
        variance: Of the mean, by source.
        discordant: Items that only the first, and only the second, got right; None for anything but one task and seed.
        one_sided_seeds: Only one of the two rows has several seeds; the other's spread is not in the interval.
    """

    mean: float
    low: float
    high: float
    p_value: float
    test: str
    variance: Variance
    discordant: tuple[int, int] | None = None
    one_sided_seeds: bool = False

    @property
    def half_width(self) -> float:
        """What stands behind ±."""
        return (self.high - self.low) / 2

    def separates(self, level: float = LEVEL) -> bool:
        """Whether the data tell the two rows apart."""
        return self.p_value < 1 - level


@dataclass(frozen=True)
class Needed:
    """How much more would tell two rows apart, if their true difference is the one seen.

    Attributes:
        items: Further windows or questions with the seeds there are; None: no number would, or beyond `MOST`.
        seeds: Further calibration seeds with the items there are; None likewise, or where there is one seed only.
    """

    items: int | None
    seeds: int | None


def n_cosines(n: int) -> int:
    """Number B of cosine terms for n windows."""
    return min(n - 1, max(MIN_COSINES, round(0.4 * n ** (2 / 3))))


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Interval of the mean of one series in the text's order; None with fewer than two values.

    A value that is not finite leaves nothing to estimate: None as well.
    """
    return interval_of(Scores.of(values), level)


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Interval of mean(a - b), both scored on the same items in the same order.

    Raises:
        ValueError: If the lengths differ: then these are not the same items.
    """
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], level)


def interval_of(scores: Scores, level: float = LEVEL) -> Interval | None:
    """Interval of one row's own mean: how far another text or other questions of the kind might take it.

    None with fewer than two items in a task, or a value that is not finite.
    """
    if not scores.enough:
        return None
    interval = _t_interval(scores.mean, scores.variance, scores.negligible, level)
    if scores.right_or_wrong:
        low, high = _wilson(scores.mean, interval.n, level)
        return replace(interval, low=low, high=high)
    return interval


def difference(a: Scores, b: Scores, level: float = LEVEL) -> Difference | None:
    """Compare two rows on the same items.

    Rows with the same seeds are paired by seed as well: a seed draws the same calibration windows for every method.

    Returns:
        None with fewer than two items, or where a value is not finite.

    Raises:
        ValueError: If the items are not the same in number: then these are not the same items.
    """
    if not a.pairs_with(b):
        raise ValueError("these rows were not scored on the same items")
    if not (a.enough and b.enough):
        return None
    if set(a.seeds) == set(b.seeds) or len(a.seeds) == len(b.seeds) == 1:
        order = [b.seeds.index(seed) for seed in a.seeds] if len(a.seeds) > 1 else slice(None)
        variance = _variance([x - y[order] for x, y in zip(a.arrays, b.arrays, strict=True)], a.independent)
    else:
        variance = _unpaired_seeds(a, b)
    if a.right_or_wrong and b.right_or_wrong:
        return _mcnemar(a.arrays[0][0], b.arrays[0][0], variance, level)
    mean = a.mean - b.mean
    interval = _t_interval(mean, variance, max(a.negligible, b.negligible), level)
    one_sided = (len(a.seeds) == 1) != (len(b.seeds) == 1)
    test = "paired t" if a.independent else "paired t, neighbouring windows alike"
    if variance.seeds is not None:
        test += ", with the spread of seeds"
    return Difference(mean, interval.low, interval.high, interval.p_value, test, variance, None, one_sided)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of McNemar's test, from the items that only one of two rows got right."""
    from scipy import special

    m = only_a + only_b
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), m, 0.5))) if m else 1.0


def needed(
    seen: Difference, power: float = POWER, level: float = LEVEL, comparisons: int = 1
) -> Needed | None:
    """How many further items, or seeds, would separate two rows with the stated power.

    The difference and the spread are taken to be those seen; both are estimates, so this is an order of magnitude.

    Args:
        seen: Of the rows.
        power: Probability that the larger experiment tells them apart.
        level: 1 - α.
        comparisons: How many rows are compared with the best: Holm's first step has α divided by it.

    Returns:
        None where no difference was seen at all. Zero means that such an experiment would be large enough already.
    """
    alpha = (1 - level) / comparisons
    variance = seen.variance
    if seen.mean == 0 or variance.total() <= 0:
        return None
    if seen.discordant is not None:
        a, b = (count / variance.n for count in seen.discordant)

        def at_items(n: int) -> float:
            return mcnemar_power(n, a, b, alpha)
    else:

        def at_items(n: int) -> float:
            return _power(seen.mean, variance.total(n), variance.df(n), alpha)

    def at_seeds(n: int) -> float:
        return _power(seen.mean, variance.total(n_seeds=n), variance.df(n_seeds=n), alpha)

    items = _smallest(at_items, power, variance.n)
    seeds = _smallest(at_seeds, power, variance.n_seeds) if variance.seeds is not None else None
    return Needed(
        None if items is None else items - variance.n, None if seeds is None else seeds - variance.n_seeds
    )


def mcnemar_power(n: int, only_a: float, only_b: float, alpha: float = 1 - LEVEL) -> float:
    """Probability that McNemar's exact test on n items tells two rows apart.

    Args:
        n: Items.
        only_a: Probability that only the first row gets an item right.
        only_b: Probability that only the second does.
        alpha: Of the two-sided test.
    """
    import numpy as np
    from scipy import special

    discordant = only_a + only_b
    if discordant == 0:
        return 0.0
    share = only_a / discordant
    if n > EXACT_UP_TO:  # Connor, Biometrics 43 (1987): normal approximation without conditioning
        delta = only_a - only_b
        z = special.ndtri(1 - alpha / 2)
        return float(
            special.ndtr(
                (abs(delta) * math.sqrt(n) - z * math.sqrt(discordant)) / math.sqrt(discordant - delta**2)
            )
        )
    spread = 8 * math.sqrt(n * discordant * (1 - discordant)) + 8
    low, high = max(0, math.floor(n * discordant - spread)), min(n, math.ceil(n * discordant + spread))
    m = np.arange(low, high + 1)
    log_weight = (
        special.gammaln(n + 1) - special.gammaln(m + 1) - special.gammaln(n - m + 1)
        + special.xlogy(m, discordant) + special.xlog1py(n - m, -discordant)
    )  # fmt: skip
    # The largest k with 2 P(Bin(m, 1/2) ≤ k) < α: reject where the smaller count is at most that.
    k = np.floor(special.bdtrik(alpha / 2, m, 0.5))
    k = np.where(2 * special.bdtr(np.maximum(k, 0), m, 0.5) < alpha, k, k - 1)
    rejected = np.where(
        k >= 0, special.bdtr(np.maximum(k, 0), m, share) + special.bdtr(np.maximum(k, 0), m, 1 - share), 0.0
    )
    return float(np.sum(np.exp(log_weight) * rejected))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values by Holm's step-down procedure (Scand. J. Statistics 6, 1979, 65-70).

    The smallest is multiplied by their number, the next by one less, and so on, never falling below the one before.
    Rejecting those below α keeps the probability of any false rejection at α, whatever their dependence.
    """
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class Ranking:
    """The best row of a group and what the data say of the others.

    Attributes:
        best: Key of the row with the best mean.
        tied: Keys of the others that this data cannot tell from the best.
        adjusted_p: Of every other row against the best, after Holm.
        behind: Difference of every other row to the best, where there is one.
    """

    best: str
    tied: frozenset[str]
    adjusted_p: Mapping[str, float]
    behind: Mapping[str, Difference]


def tied_with_best(
    rows: Mapping[str, Scores | Sequence[float]], *, higher_is_better: bool = False, level: float = LEVEL
) -> Ranking | None:
    """Find the best of several rows scored on the same items, and all that are tied with it.

    Every other row is compared with the best by the two-sided paired test above, corrected by Holm for the number of
    comparisons. Two-sided although the best is known to be ahead in the sample: that pays for having chosen it by
    looking. The group so found contains the truly best row with at least the stated probability (simulated in the
    tests).

    Args:
        rows: Key to scores, or to per-item values in the text's order; all on the same items.
        higher_is_better: Direction of the values (losses: False).
        level: 1 - α.

    Returns:
        None if no row has finite values only; a row that has others is never tied. A comparison on a single item
        decides nothing: tied.
    """
    scores = {key: s if isinstance(s, Scores) else Scores.of(s) for key, s in rows.items()}
    scores = {key: s for key, s in scores.items() if s.finite}
    if not scores:
        return None
    means = {key: s.mean for key, s in scores.items()}
    best = max(means, key=lambda key: means[key] if higher_is_better else -means[key])
    others = [key for key in scores if key != best]
    behind = {key: d for key in others if (d := difference(scores[key], scores[best], level)) is not None}
    adjusted = dict(
        zip(others, holm([behind[key].p_value if key in behind else 1.0 for key in others]), strict=True)
    )
    tied = frozenset(key for key, p in adjusted.items() if p >= 1 - level)
    return Ranking(best, tied, adjusted, behind)


def _variance(tasks: Sequence[np.ndarray], independent: bool) -> Variance:
    """Of the mean over tasks, [seeds, items] each: every task's part, then what the seeds add."""
    import numpy as np

    n_tasks, n_seeds, n = len(tasks), len(tasks[0]), sum(task.shape[1] for task in tasks)
    items, rest, weights = 0.0, 0.0, 0.0
    for task in tasks:
        over_seeds = task.mean(axis=0) if n_seeds > 1 else task[0]
        part = _mean_variance(over_seeds, independent)
        items += part
        weights += part**2 / _item_df(len(over_seeds), independent)
        if n_seeds > 1:
            parts = [_mean_variance(seed - over_seeds, independent) for seed in task]
            rest += float(np.mean(parts)) / (n_seeds - 1)
    item_df = items**2 / weights if weights > 0 else float(max(1, n - n_tasks))
    items, rest = items / n_tasks**2, rest / n_tasks**2
    if n_seeds == 1:
        return Variance(items, None, 0.0, n, 1, item_df, 0.0, independent)
    seed_means = sum(task.mean(axis=1) for task in tasks)
    between = float(np.var(seed_means / n_tasks, ddof=1)) / n_seeds
    return Variance(
        items=max(items - rest, 0.0),
        seeds=max(between - rest, 0.0),
        both=rest,
        n=n,
        n_seeds=n_seeds,
        item_df=item_df,
        seed_df=n_seeds - 1.0,
        independent=independent,
    )


def _unpaired_seeds(a: Scores, b: Scores) -> Variance:
    """Of the difference of two rows whose seeds are not the same: paired by items, apart in seeds."""
    over_seeds = [(x.mean(axis=0) - y.mean(axis=0))[None] for x, y in zip(a.arrays, b.arrays, strict=True)]
    of_items = _variance(over_seeds, a.independent)
    sides = [side for side in (a.variance, b.variance) if side.seeds is not None]
    both = sum(side.both for side in sides)
    parts = [side.seeds or 0.0 for side in sides]
    seeds = sum(parts)
    spread = sum(part**2 / side.seed_df for part, side in zip(parts, sides, strict=True))
    return Variance(
        items=max(of_items.items - both, 0.0),
        seeds=seeds,
        both=both,
        n=of_items.n,
        n_seeds=max(side.n_seeds for side in sides),
        item_df=of_items.item_df,
        seed_df=seeds**2 / spread if spread > 0 else min(side.seed_df for side in sides),
        independent=a.independent,
    )


def _mean_variance(series: np.ndarray, independent: bool) -> float:
    """Variance of a series' mean by its lowest cosines; of independent items by all of them, the ordinary one."""
    n = series.size
    centred = series - series.sum() / n
    if independent:
        return float(centred @ centred) / (n - 1) / n
    waves = _cosines(n) @ centred
    return float(waves @ waves) / len(waves) / n


@lru_cache(maxsize=64)
def _cosines(n: int) -> np.ndarray:
    """The lowest cosines of the orthonormal type-II transform  # [B, n]."""
    import numpy as np

    j, t = np.arange(1, n_cosines(n) + 1)[:, None], np.arange(1, n + 1)[None]
    return math.sqrt(2 / n) * np.cos(np.pi * j * (t - 0.5) / n)


def _item_df(n: int, independent: bool) -> float:
    return float(n - 1 if independent else n_cosines(n))


def _t_interval(mean: float, variance: Variance, negligible: float, level: float) -> Interval:
    from scipy import special

    stderr, df = math.sqrt(variance.total()), variance.df()
    if stderr <= negligible:
        certain = 1.0 if abs(mean) <= negligible else 0.0
        return Interval(mean, 0.0, df, mean, mean, certain, variance.n)
    reach = _t_quantile(df, 0.5 + level / 2) * stderr
    p_value = 2 * float(special.stdtr(df, -abs(mean) / stderr))
    return Interval(mean, stderr, df, mean - reach, mean + reach, p_value, variance.n)


@lru_cache(maxsize=1024)
def _t_quantile(df: float, share: float) -> float:
    from scipy import special

    return float(special.stdtrit(df, share))


def _wilson(share: float, n: int, level: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion (J. American Statistical Association 22, 1927, 209-212)."""
    from scipy import special

    z2 = float(special.ndtri(0.5 + level / 2)) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _mcnemar(a: np.ndarray, b: np.ndarray, variance: Variance, level: float) -> Difference:
    from scipy import special

    n = len(a)
    only_a, only_b = int((a > b).sum()), int((a < b).sum())
    mean = (only_a - only_b) / n
    p_value = mcnemar_p(only_a, only_b)
    # Bonett & Price: as if one more item of either kind had been seen, so that no discordant item is no certainty.
    one, other = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    reach = float(special.ndtri(0.5 + level / 2)) * math.sqrt((one + other - (one - other) ** 2) / (n + 2))
    low, high = max(-1.0, one - other - reach), min(1.0, one - other + reach)
    low, high = min(low, mean), max(high, mean)
    if p_value >= 1 - level:  # the exact test is the stricter: an interval beside it never contradicts it
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(mean, low, high, p_value, "exact McNemar", variance, (only_a, only_b))


def _power(mean: float, variance: float, df: float, alpha: float) -> float:
    """Of the two-sided t test; the chance of rejecting on the wrong side is left out."""
    from scipy import special

    shift = abs(mean) / math.sqrt(variance)
    critical = float(special.stdtrit(df, 1 - alpha / 2))
    if df > 10_000 or shift > 30:  # the noncentral t's function is slow or fails there
        return float(special.ndtr(shift - critical))
    power = 1 - float(special.nctdtr(df, shift, critical))
    return power if math.isfinite(power) else float(special.ndtr(shift - critical))


def _smallest(power_at: Callable[[int], float], power: float, least: int) -> int | None:
    """The smallest number from `least` on at which the power is reached; None if none up to `MOST` is."""
    low, high = least, least
    while power_at(high) < power:
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > max(1, low // 1000):  # three digits are more than the estimate holds
        middle = (low + high) // 2
        low, high = (low, middle) if power_at(middle) >= power else (middle, high)
    return high


def seed_spread(values: Sequence[float]) -> float | None:
    """Standard deviation of a row's value between calibration seeds; None with one."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
