"""The leaderboard: every row with its quality in a few numbers, its cost, and whether anything beats it on both.

Rows are gathered into sections of one model and one protocol contract, because only there they may be ranked. Beside
the comparison's scores a row gets the average of its tasks, its recovery, and its place relative to the Pareto front
of quality against what it stores: effective bits per weight, and the bits of activations and cache, which no average
over weights shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qbench.errors import ConfigError
from qbench.reports import stats
from qbench.reports.comparison import Comparison, ModelTable, Row, Score, compare
from qbench.results import BASELINE, Result, split_metric
from qbench.scheme import Scheme

ACCURACIES = ("acc", "acc_norm")  # of a task that has both, the papers print acc
# Further quantiles of one measurement: in the CSV and in a row's details, not columns of a table.
DETAILS = frozenset({"kl_median", "kl_p95", "kl_p99", "kl_max", "word_perplexity", "byte_perplexity"})


@dataclass(frozen=True)
class Average:
    """Mean over tasks, each task counting once; the interval takes tasks as independent."""

    value: float
    half_width: float | None
    n_tasks: int


@dataclass(frozen=True)
class Entry:
    """One row of the leaderboard.

    Attributes:
        tasks: Average over all tasks of the section; None where the row lacks one of them.
        recovery: Tasks average over that of full precision; without tasks full-precision perplexity over the row's.
        recovery_half_width: Of its 95% interval, where rows were paired.
        place: On the Pareto front of its section, or dominated: another row stores no more and is better beyond noise,
            or stores less and is no worse. None for full precision and rows without a quality or a size.
    """

    row: Row
    scheme: Scheme
    tasks: Average | None = None
    recovery: float | None = None
    recovery_half_width: float | None = None
    place: Literal["front", "dominated"] | None = None

    @property
    def result(self) -> Result:
        """The record behind the row."""
        return self.row.result


@dataclass(frozen=True, eq=False)
class Section:
    """Rows that may be ranked together: one model, one contract.

    Attributes:
        table: The comparison's table of these rows; its blocks are schemes.
        perplexities: Metric keys, the first being the quality that the front uses when there are no tasks.
        task_keys: One metric key per task: what the average averages.
        entries: Full precision first, then scheme by scheme, the best quality first.
    """

    model: str
    contract: str
    comparison: Comparison
    table: ModelTable
    perplexities: tuple[str, ...]
    task_keys: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def fields(self) -> Mapping[str, object]:
        """What the contract's hash is of."""
        return self.entries[0].result.contract_fields

    @property
    def name(self) -> str:
        """Model and contract, as a heading says them."""
        return f"{self.model} · {self.contract[:8]}"


@dataclass
class _Draft:
    row: Row
    scheme: Scheme
    tasks: Average | None
    quality: float | None  # higher is better
    place: Literal["front", "dominated"] | None = None
    recovery: float | None = None
    recovery_half_width: float | None = None


def sections(results: Iterable[Result], baseline: str = BASELINE) -> list[Section]:
    """Gather rows into sections and rank each.

    Args:
        results: Rows of any models and contracts. Of rows with the same id the last one counts.
        baseline: Method whose row the others are divided by; sections without it have no ratios.

    Raises:
        ConfigError: If no row has the baseline method.
        DataError: If there are no rows.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    rows = {result.id: result for result in results}
    for result in rows.values():
        groups.setdefault((result.model, result.contract), []).append(result)
    if not groups:
        compare([])  # says that there is nothing
    methods = {result.method for result in rows.values()}
    if baseline != BASELINE and baseline not in methods:
        raise ConfigError(f"No row has the method {baseline!r}. There are: {', '.join(sorted(methods))}.")
    return [_section(model, contract, group, baseline) for (model, contract), group in groups.items()]


def _section(model: str, contract: str, results: list[Result], baseline: str) -> Section:
    present = baseline if any(result.method == baseline for result in results) else BASELINE
    comparison = compare(results, baseline=present)
    (table,) = comparison.tables
    rows: dict[str, Row] = {}
    for block in table.blocks:
        for row in block.rows:
            rows.setdefault(row.result.id, row)
    perplexities = tuple(k for k in table.metrics if split_metric(k)[1] == "perplexity")
    tasks = _task_keys(table.metrics)
    drafts = [_draft(row, perplexities, tasks) for row in rows.values()]
    reference = next((d for d in drafts if d.row.is_reference), None)
    for draft in drafts:
        draft.recovery, draft.recovery_half_width = _recovery(draft, reference, perplexities)
    _place(drafts, perplexities, tasks)
    entries = tuple(
        Entry(d.row, d.scheme, d.tasks, d.recovery, d.recovery_half_width, d.place)
        for d in sorted(drafts, key=lambda d: _rank(d, table))
    )
    return Section(model, contract, comparison, table, perplexities, tasks, entries)


def _rank(draft: _Draft, table: ModelTable) -> tuple[bool, int, float]:
    schemes = [block.scheme for block in table.blocks]
    quality = -math.inf if draft.quality is None else draft.quality
    if draft.row.result.is_baseline:
        return False, 0, 0.0
    return True, schemes.index(draft.row.result.scheme), -quality


def _task_keys(metrics: Iterable[str]) -> tuple[str, ...]:
    """One accuracy per task, in order of appearance."""
    found: dict[str, str] = {}
    for key in metrics:
        task, metric = split_metric(key)
        if metric in ACCURACIES and split_metric(found.get(task, "/"))[1] != "acc":
            found[task] = key
    return tuple(found.values())


def _draft(row: Row, perplexities: Sequence[str], tasks: Sequence[str]) -> _Draft:
    average = _average([row.scores.get(key) for key in tasks])
    first = row.scores.get(perplexities[0]) if perplexities else None
    quality = average.value if average else None
    if not tasks and first is not None and first.value > 0:
        quality = -math.log(first.value)
    if quality is not None and math.isnan(quality):
        quality = None
    return _Draft(row, Scheme.parse(row.result.scheme.replace("*", "")), average, quality)


def _average(scores: Sequence[Score | None]) -> Average | None:
    there = [score for score in scores if score is not None]
    if not there or len(there) < len(scores):
        return None
    halves = [score.half_width for score in there if score.half_width is not None]
    n = len(there)
    half = math.sqrt(math.fsum(h * h for h in halves)) / n if len(halves) == n else None
    return Average(math.fsum(score.value for score in there) / n, half, n)


def _recovery(
    draft: _Draft, reference: _Draft | None, perplexities: Sequence[str]
) -> tuple[float | None, float | None]:
    if reference is None or draft is reference:
        return None, None
    if draft.tasks is not None and reference.tasks is not None and reference.tasks.value > 0:
        return draft.tasks.value / reference.tasks.value, None
    score = draft.row.scores.get(perplexities[0]) if perplexities else None
    if reference.tasks is not None or score is None or not score.ratio:
        return None, None
    half = score.ratio_half_width
    return 1 / score.ratio, None if half is None else half / score.ratio**2


def _place(drafts: list[_Draft], perplexities: Sequence[str], tasks: Sequence[str]) -> None:
    """Find the Pareto front. One paired test per row: against the best row that stores no more than it does."""
    ranked = [d for d in drafts if not d.row.result.is_baseline and d.quality is not None]
    ranked = [d for d in ranked if d.row.result.bits_per_weight is not None]
    for draft in ranked:
        rivals = [d for d in ranked if d is not draft and all(a <= b for a, b in _sizes(d, draft))]
        better = [d for d in rivals if _quality(d) >= _quality(draft)]
        smaller = any(any(a < b for a, b in _sizes(d, draft)) for d in better)
        beaten = bool(better) and _clearly_better(max(better, key=_quality), draft, perplexities, tasks)
        draft.place = "dominated" if smaller or beaten else "front"


def _quality(draft: _Draft) -> float:
    assert draft.quality is not None
    return draft.quality


def _sizes(one: _Draft, other: _Draft) -> list[tuple[float, float]]:
    """Pairs of what two rows store: effective bits per weight, bits of activations, bits of the cache."""
    a, b = one.row.result.bits_per_weight, other.row.result.bits_per_weight
    assert a is not None and b is not None
    # A millionth of a bit is rounding, not size.
    return [
        (round(a, 6), round(b, 6)),
        (one.scheme.abits, other.scheme.abits),
        (one.scheme.attention_bits[1], other.scheme.attention_bits[1]),
    ]


def _clearly_better(one: _Draft, other: _Draft, perplexities: Sequence[str], tasks: Sequence[str]) -> bool:
    """Whether a row is better than another beyond the noise of what both were measured on."""
    if _quality(one) <= _quality(other):
        return False
    p_value = difference_p(one.row.result, other.row.result, tasks or perplexities[:1])
    return p_value is None or p_value < 1 - stats.LEVEL


def difference_p(one: Result, other: Result, keys: Sequence[str]) -> float | None:
    """Two-sided p-value of the difference of two rows' average over some metrics, paired item by item.

    Metrics are taken as independent of each other: their standard errors add up in squares.

    Returns:
        None if a metric has no items that could be paired.
    """
    total, variance = 0.0, 0.0
    for key in keys:
        a, b = one.metrics[key], other.metrics[key]
        if not a.items or not b.items or len(a.items) != len(b.items):
            return None
        difference = stats.paired_difference(a.items, b.items)
        if difference is None:
            return None
        if len(keys) == 1:
            return difference.p_value
        total += difference.mean
        variance += difference.stderr**2
    return 1.0 if total == 0 else math.erfc(abs(total) / math.sqrt(2 * variance)) if variance else 0.0


def average_marks(entries: Sequence[Entry], keys: Sequence[str]) -> dict[str, Literal["best", "tied"]]:
    """Best tasks average of one scheme and those tied with it, by row id; Holm as for single metrics."""
    there = [e for e in entries if e.tasks is not None and not e.result.is_baseline]
    if len(there) < 2:
        return {}
    best = max(there, key=lambda e: e.tasks.value if e.tasks else 0.0)
    others = [e for e in there if e is not best]
    p_values = [difference_p(best.result, e.result, keys) for e in others]
    adjusted = stats.holm([0.0 if p is None else p for p in p_values])
    marks: dict[str, Literal["best", "tied"]] = {best.result.id: "best"}
    tied = [e for e, p in zip(others, adjusted, strict=True) if p >= 1 - stats.LEVEL]
    return marks | {e.result.id: "tied" for e in tied}
