"""One metric of one row, over its seeds, with the items that statistics need; and the average over tasks.

`stats` computes with plain numbers; this turns records into them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from qbench import provenance
from qbench.reports import stats
from qbench.reports.comparability import seed_of
from qbench.results import Metric, Result, split_metric

NORMAL_95 = 1.959964  # for a metric that kept no items, only a standard error
ACCURACIES = ("acc", "acc_norm")  # of a task that has both, the papers average acc
AVERAGE = "average/acc"  # key of the mean over tasks, which no record holds
CORRECT = "correct"  # items_name of items that are right or wrong, and independent of their neighbours


def task_keys(metrics: Iterable[str]) -> tuple[str, ...]:
    """One accuracy of every task, those that the average is of."""
    found: dict[str, str] = {}
    for name in ACCURACIES:
        for key in metrics:
            task, metric = split_metric(key)
            if metric == name:
                found.setdefault(task, key)
    return tuple(key for key in metrics if key in found.values())


@dataclass(frozen=True, eq=False)
class Measured:
    """One metric of one row with everything that statistics need: the records' values and their items.

    Attributes:
        values: One per seed.
        scores: Items, None where some record kept none.
        log_scale: Whether items are losses of which the value is the exponential.
        stderr: What the record says, for want of items.
        chance: What guessing gives; of an average, on average.
    """

    values: tuple[float, ...]
    scores: stats.Scores | None
    log_scale: bool
    higher_is_better: bool
    stderr: float | None
    chance: float | None
    what: tuple[tuple[str, str], ...]  # items' name and protocol of every task: only equal ones are paired

    @property
    def value(self) -> float:
        """The mean over seeds: of losses where the value is on a log scale."""
        if len(self.values) == 1:
            return self.values[0]
        if self.log_scale and self.scores is not None:
            return math.exp(self.scores.mean) if self.scores.mean < 700 else math.inf
        return math.fsum(self.values) / len(self.values)

    @cached_property
    def interval(self) -> tuple[float, float, float] | None:
        """Half width and ends of the value's own 95% interval."""
        own = stats.interval_of(self.scores) if self.scores is not None else None
        if own is None:
            if self.stderr is None or len(self.values) > 1:
                return None
            reach = NORMAL_95 * self.stderr
            return reach, self.value - reach, self.value + reach
        if self.log_scale:
            # A few windows of a collapsed model may differ by hundreds of nats.
            low, high = (math.exp(min(end, 700)) for end in (own.low, own.high))
            return self.value * own.half_width, low, high
        return own.half_width, own.low, own.high

    @property
    def guesses(self) -> bool:
        """Whether its interval does not lie above what guessing gives."""
        return self.chance is not None and self.interval is not None and self.interval[1] <= self.chance

    def pairs_with(self, other: Measured) -> bool:
        """Whether two were measured item by item on the same items (their contracts being equal)."""
        return (
            self.scores is not None
            and other.scores is not None
            and self.what == other.what
            and self.scores.pairs_with(other.scores)
        )


def measured(results: Sequence[Result], key: str, tasks: Sequence[str] = ()) -> Measured | None:
    """One metric of a row, or the average of its tasks; None where a record lacks it.

    Args:
        results: Of all seeds of the row.
        key: Of `Result.metrics`, or `AVERAGE`.
        tasks: What the average is of.
    """
    keys = tasks if key == AVERAGE else (key,)
    per_seed = [[result.metrics.get(k) for k in keys] for result in results]
    rows = [[metric for metric in row if metric is not None] for row in per_seed]
    if any(len(row) < len(keys) for row in rows):
        return None
    first = rows[0]
    what = tuple((metric.items_name, metric.protocol) for metric in first)
    values = tuple(math.fsum(metric.value for metric in row) / len(row) for row in rows)
    return Measured(
        values=values,
        scores=_scores(rows, results),
        log_scale=len(first) == 1 and first[0].log_scale,
        higher_is_better=first[0].higher_is_better,
        stderr=first[0].stderr if len(first) == 1 else None,
        chance=_chance(first),
        what=what,
    )


def _chance(metrics: Sequence[Metric]) -> float | None:
    known = [metric.chance for metric in metrics if metric.chance is not None]
    return math.fsum(known) / len(known) if len(known) == len(metrics) else None


def _scores(rows: Sequence[Sequence[Metric]], results: Sequence[Result]) -> stats.Scores | None:
    """Items by task and seed, if all were kept and are of one kind."""
    tasks = list(zip(*rows, strict=True))
    for task in tasks:
        if len({(m.items_name, m.protocol, len(m.items or ())) for m in task}) > 1 or not task[0].items:
            return None
    independent = {task[0].items_name == CORRECT for task in tasks}
    if len(independent) > 1:
        return None
    strata = tuple(tuple(metric.items or () for metric in task) for task in tasks)
    seeds = tuple(
        None if len(results) == 1 and r.is_baseline
        else provenance.calibration_fingerprint(r.contract_fields) or seed_of(r)
        for r in results
    )  # fmt: skip
    return stats.Scores(strata, seeds, independent.pop())
