"""The leaderboard: every row with its quality in one number, its cost, and whether anything beats it on both.

Rows are gathered into sections of one model and one protocol, because only there they may be ranked. Beside the
comparison's scores a row gets its place relative to the Pareto front of quality against what it stores: effective bits
per weight, and the bits of activations and cache, which no average over weights shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qbench.errors import unknown_name
from qbench.reports import stats
from qbench.reports.comparability import comparable
from qbench.reports.comparison import Comparison, ModelTable, Row, Score, compare
from qbench.reports.measured import AVERAGE, Measured, measured, task_keys
from qbench.results import BASELINE, Result, split_metric
from qbench.scheme import Scheme

Place = Literal["front", "dominated"]


@dataclass(frozen=True)
class Entry:
    """One row of the leaderboard.

    Attributes:
        quality: Its score on the section's quality, of which the recovery is too.
        place: On the Pareto front of its section, or dominated: another row stores no more and is better beyond noise,
            or stores less and is no worse. None for full precision and rows without a quality or a size.
    """

    row: Row
    scheme: Scheme
    quality: Score | None = None
    place: Place | None = None

    @property
    def result(self) -> Result:
        """The record behind the row; of several seeds the first."""
        return self.row.result


@dataclass(frozen=True, eq=False)
class Section:
    """Rows that may be ranked together: one model, one protocol.

    Attributes:
        contract: Of the first row; the others have the same, or one that differs in what else was measured.
        table: The comparison's table of these rows; its blocks are schemes.
        perplexities: Metric keys.
        task_keys: One metric key per task: what the average is of.
        quality_key: What rows are ordered by: the average of tasks, a perplexity, or the one task.
        entries: Full precision first, then scheme by scheme, the best quality first.
    """

    model: str
    contract: str
    comparison: Comparison
    table: ModelTable
    perplexities: tuple[str, ...]
    task_keys: tuple[str, ...]
    quality_key: str | None
    entries: tuple[Entry, ...]

    @property
    def fields(self) -> Mapping[str, Any]:
        """What the contract's hash is of."""
        return self.entries[0].result.contract_fields

    @property
    def name(self) -> str:
        """Model and contract, as a heading says them."""
        return f"{self.model} · {self.contract[:8]}"


def sections(results: Iterable[Result], baseline: str = BASELINE) -> list[Section]:
    """Gather rows into sections and rank each.

    Args:
        results: Rows of any models and contracts. Of rows with the same id the last one counts.
        baseline: Method whose row the others are divided by; sections without it are divided by full precision.

    Raises:
        ConfigError: If no row has the baseline method.
        DataError: If there are no rows.
    """
    rows = {result.id: result for result in results}
    groups: dict[str, list[list[Result]]] = {}
    for result in rows.values():
        of_model = groups.setdefault(result.model, [])
        group = next((group for group in of_model if _together(group[0], result)), None)
        if group is None:
            of_model.append(group := [])
        group.append(result)
    if not rows:
        compare([])  # says that there is nothing
    methods = {result.method for result in rows.values()}
    if baseline != BASELINE and baseline not in methods:
        raise unknown_name("method among these rows", baseline, methods)
    return [_section(model, group, baseline) for model, found in groups.items() for group in found]


def _together(one: Result, other: Result) -> bool:
    return one.model_fingerprint == other.model_fingerprint and comparable(one, other)


def _section(model: str, results: list[Result], baseline: str) -> Section:
    present = baseline if any(result.method == baseline for result in results) else BASELINE
    comparison = compare(results, baseline=present)
    (table,) = comparison.tables
    rows: dict[str, Row] = {}
    for block in table.blocks:
        for row in block.rows:
            rows.setdefault(row.result.id, row)
    perplexities = tuple(key for key in table.metrics if split_metric(key)[1] == "perplexity")
    tasks = task_keys(table.metrics)
    tasks = tuple(key for key in tasks if key != AVERAGE)
    quality = next(iter([*([AVERAGE] if AVERAGE in table.metrics else []), *perplexities, *tasks]), None)
    entries = [
        Entry(row, Scheme.parse(row.result.scheme), row.scores.get(quality or "")) for row in rows.values()
    ]
    places = _places(entries, quality, tasks)
    entries = [Entry(e.row, e.scheme, e.quality, places.get(e.result.id)) for e in entries]
    schemes = [block.scheme for block in table.blocks]
    entries.sort(key=lambda entry: _order(entry, schemes))
    return Section(
        model, results[0].contract, comparison, table, perplexities, tasks, quality, tuple(entries)
    )


def _order(entry: Entry, schemes: Sequence[str]) -> tuple[bool, int, float]:
    if entry.result.is_baseline:
        return False, 0, 0.0
    goodness = _goodness(entry)
    return True, schemes.index(entry.result.scheme), math.inf if math.isnan(goodness) else -goodness


def _goodness(entry: Entry) -> float:
    """The quality, higher being better; NaN where there is none."""
    if entry.quality is None:
        return math.nan
    return entry.quality.value if entry.quality.higher_is_better else -entry.quality.value


def _places(entries: Sequence[Entry], key: str | None, tasks: Sequence[str]) -> dict[str, Place]:
    """Find the Pareto front. One paired test per row: against the best row that stores no more than it does."""
    ranked = [
        (entry, _goodness(entry), sizes)
        for entry in entries
        if not entry.result.is_baseline
        and not math.isnan(_goodness(entry))
        and (sizes := _sizes(entry)) is not None
    ]
    places: dict[str, Place] = {}
    for entry, goodness, (weights, inputs, cache) in ranked:
        better = [
            (other, good, sizes)
            for other, good, sizes in ranked
            if good >= goodness
            and sizes[0] <= weights
            and sizes[1] <= inputs
            and sizes[2] <= cache
            and other is not entry
        ]
        smaller = any(sizes != (weights, inputs, cache) for _, _, sizes in better)
        rival = max(better, key=lambda row: row[1])[0] if better and not smaller else None
        beaten = rival is not None and _clearly_better(rival, entry, key or "", tasks)
        places[entry.result.id] = "dominated" if smaller or beaten else "front"
    return places


def _sizes(entry: Entry) -> tuple[float, int, int] | None:
    """What a row stores: effective bits per weight, bits of activations, bits of the cache."""
    bits = entry.result.bits_per_weight
    if bits is None:
        return None
    # A millionth of a bit is rounding, not size.
    return round(bits, 6), entry.scheme.abits, entry.scheme.attention_bits[1]


def _clearly_better(one: Entry, other: Entry, key: str, tasks: Sequence[str]) -> bool:
    """Whether a row is better than another beyond the noise of what both were measured on."""
    if _goodness(one) <= _goodness(other):
        return False
    difference = difference_of(one.row, other.row, key, tasks)
    return difference is None or difference.separates()


def difference_of(one: Row, other: Row, key: str, tasks: Sequence[str] = ()) -> stats.Difference | None:
    """Difference of two rows on one metric, item by item: of losses for a perplexity.

    None where one lacks the metric, or its items, or has others.
    """
    a: Measured | None = measured(one.results, key, tasks)
    b: Measured | None = measured(other.results, key, tasks)
    if a is None or b is None or a.scores is None or b.scores is None or not a.pairs_with(b):
        return None
    return stats.difference(a.scores, b.scores)
