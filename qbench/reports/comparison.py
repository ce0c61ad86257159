"""Comparison: rows put side by side, or refused. Who is best, who is tied, what each costs against the reference.

This decides *what* a table says; `table.py` decides how it looks. Rows are ranked only within one model, scheme and
protocol contract, and compared pairwise on the same windows and questions. Records that differ by the calibration seed
alone are one row: its values are means over seeds, and its statistics count the seeds' spread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from qbench.errors import ConfigError, DataError, unknown_name
from qbench.reports import stats
from qbench.reports.comparability import (
    comparable,
    contract_differences,
    describe_differences,
    seed_groups,
    short_value,
)
from qbench.reports.measured import ACCURACIES, AVERAGE, Measured, measured, task_keys
from qbench.results import BASELINE, Metric, Result, ResultStore, split_metric

Source = Result | ResultStore | str | Path | Iterable[Result]
FORMATS = ("table", "json", "csv", "markdown", "latex")


@dataclass(frozen=True)
class Score:
    """One metric of one row.

    Attributes:
        value: With several seeds the mean over them; of perplexities the geometric mean, that of their losses.
        half_width: Of the value's own 95% interval: how far another text of the kind might give another value.
        low: Lower end of that interval, which need not lie around the value.
        high: Its upper end.
        ratio: Value divided by the reference row's value, unrounded.
        ratio_half_width: Of the ratio's 95% interval, paired item by item, hence much shorter.
        higher_is_better: Direction of the metric.
        mark: Within its scheme; "tied" means that the data cannot tell it from the best.
        rank: Place by value among the rows that are ranked with it, 1 the best; None alone or unranked.
        p_value: Of the difference to the best, after Holm.
        behind: Value minus the best's with its interval (of losses for a perplexity), before Holm.
        n_seeds: Calibration seeds behind the value.
        seed_spread: Standard deviation of the value between them.
        chance: What guessing gives.
    """

    value: float
    half_width: float | None = None
    ratio: float | None = None
    ratio_half_width: float | None = None
    mark: Literal["best", "tied"] | None = None
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = False
    rank: int | None = None
    p_value: float | None = None
    behind: stats.Difference | None = None
    n_seeds: int = 1
    seed_spread: float | None = None
    chance: float | None = None

    @property
    def above_chance(self) -> bool | None:
        """Whether the value's interval lies above what guessing gives; None where nobody guesses."""
        return None if self.chance is None or self.low is None else self.low > self.chance

    @property
    def recovery(self) -> float | None:
        """Share of the reference's quality that is left, 1 for all of it: the ratio, or for losses its inverse."""
        if self.ratio is None or self.higher_is_better:
            return self.ratio
        return 1 / self.ratio if self.ratio > 0 else None

    @property
    def recovery_half_width(self) -> float | None:
        """Of the recovery's 95% interval."""
        if self.recovery is None or self.ratio is None or self.ratio_half_width is None:
            return None
        return self.recovery * self.ratio_half_width / self.ratio if self.ratio else None


@dataclass(frozen=True)
class Row:
    """One line of a block. A full-precision row appears in every block, with the same result.

    Attributes:
        result: The record; of several seeds the first.
        results: The records of all its seeds.
    """

    result: Result
    label: str
    is_reference: bool
    scores: Mapping[str, Score]
    notes: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def seconds(self) -> float:
        """What one record of the row cost, on average over its seeds."""
        costs = [result.cost.seconds for result in self.results]
        return math.fsum(costs) / len(costs)


@dataclass(frozen=True)
class Block:
    """The rows that are ranked together: one model, one scheme."""

    scheme: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class ModelTable:
    """All blocks of one model.

    Attributes:
        metrics: Keys of `Result.metrics`, in order of appearance; after the last task `AVERAGE`, if there are several.
        protocols: What each metric was measured on, and on how many items.
        contracts: Distinct contract hashes; several if some rows were measured on more, or if mixing was allowed.
        mixed: Whether rows of different protocols stand in it, on request.
        differences: What these differ in: field of the contracts to its values, one per contract.
    """

    model: str
    metrics: tuple[str, ...]
    protocols: Mapping[str, str]
    contracts: tuple[str, ...]
    blocks: tuple[Block, ...]
    mixed: bool = False
    differences: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Everything that a table of results says, before it has a form."""

    tables: tuple[ModelTable, ...]
    results: tuple[Result, ...]
    reference: str = BASELINE

    @cached_property
    def footnotes(self) -> dict[str, int]:
        """Note to its number; rows with the same note share it."""
        rows = (row for table in self.tables for block in table.blocks for row in block.rows)
        return {
            note: i for i, note in enumerate(dict.fromkeys(n for row in rows for n in row.notes), start=1)
        }

    def render(self, format: str = "table", width: int | None = None) -> str:
        """The comparison as text: table, markdown, latex, csv or json; the table fits `width` columns."""
        from qbench.reports import export, table

        if format == "table":
            return table.as_text(self, width)
        if format not in FORMATS:
            raise unknown_name("format", format, FORMATS)
        return getattr(export, f"as_{format}")(self)


def compare(*sources: Source, baseline: str = BASELINE, allow_mixed: bool = False) -> Comparison:
    """Put rows side by side.

    Args:
        sources: Results, stores, folders of records, or files of one record.
        baseline: Method whose row the others are divided by.
        allow_mixed: Rank rows of different protocols all the same. What they differ in is printed, and no statistics
            across contracts are computed.

    Raises:
        ConfigError: If rows of one model have different contracts; names the fields that differ. Also if no row has the
            baseline method.
        DataError: If there are no rows, or a record is damaged.
    """
    results = read(*sources)
    methods = {result.method for result in results}
    if baseline != BASELINE and baseline not in methods:
        raise unknown_name("method among these rows", baseline, methods)
    by_model: dict[str, list[Result]] = {}
    for result in results:
        by_model.setdefault(result.model, []).append(result)
    differences = {model: contract_differences(rows) for model, rows in by_model.items()}
    if not allow_mixed:
        for model, found in differences.items():
            if found is not None:
                n_protocols = len(set(zip(*found.values(), strict=True))) or "several"
                raise ConfigError(
                    f"The rows of {model} come from {n_protocols} different protocols and are not ranked together; "
                    f"they differ in {describe_differences(found)}. "
                    "Compare folders of one protocol, or allow it with --allow-mixed."
                )
    tables = tuple(
        _model_table(model, rows, baseline, differences[model]) for model, rows in by_model.items()
    )
    return Comparison(tables, tuple(results), baseline)


def read(*sources: Source) -> list[Result]:
    """All records of some sources; of the same record in several of them the last.

    Raises:
        DataError: If there are none, or one is damaged.
    """
    results = list({result.id: result for source in sources for result in _read(source)}.values())
    if not results:
        raise DataError("There are no results to compare.")
    return results


def _read(source: Source) -> Iterable[Result]:
    if isinstance(source, Result):
        return [source]
    if isinstance(source, str | Path):
        if Path(source).is_file():
            return [ResultStore.read_file(source)]
        source = ResultStore(source)
    return source.load_all() if isinstance(source, ResultStore) else source


@dataclass
class _Draft:
    """A row while its block is being put together."""

    results: tuple[Result, ...]
    label: str
    reference: _Draft | None = None
    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def result(self) -> Result:
        return self.results[0]


def _model_table(
    model: str, results: list[Result], baseline: str, differences: Mapping[str, tuple[str, ...]] | None
) -> ModelTable:
    groups = seed_groups(results)
    full_precision = [group for group in groups if group[0].is_baseline]
    others = [group for group in groups if not group[0].is_baseline]
    schemes = list(dict.fromkeys(group[0].scheme for group in others or full_precision))
    measured = tuple(dict.fromkeys(key for result in results for key in result.metrics))
    tasks = task_keys(measured)
    metrics = _with_average(measured, tasks)
    blocks = []
    cache: dict[tuple[str, str], Measured | None] = {}  # full precision stands in every block
    for scheme in schemes:
        members = [group for group in others if group[0].scheme == scheme]
        # stable: the reference first, the rest as given
        members.sort(key=lambda group: group[0].method != baseline)
        drafts = [_Draft(group, "") for group in full_precision + members]
        for draft in drafts:
            draft.reference = _reference(draft, drafts, baseline)
        _name(drafts)
        for key in metrics:
            _score(drafts, key, tasks, cache)
        rows = (
            Row(
                draft.result,
                draft.label,
                draft is draft.reference,
                draft.scores,
                _notes(draft.results),
                draft.results,
            )
            for draft in drafts
        )
        blocks.append(Block(scheme, tuple(rows)))
    protocols = {key: _protocol([r.metrics[key] for r in results if key in r.metrics]) for key in measured}
    if AVERAGE in metrics:
        protocols[AVERAGE] = f"mean over {', '.join(split_metric(key)[0] for key in tasks)}, equally weighted"
    contracts = tuple(dict.fromkeys(result.contract for result in results))
    return ModelTable(
        model, metrics, protocols, contracts, tuple(blocks), differences is not None, differences or {}
    )


def _with_average(metrics: tuple[str, ...], tasks: Sequence[str]) -> tuple[str, ...]:
    if len(tasks) < 2:
        return metrics
    last = max(i for i, key in enumerate(metrics) if split_metric(key)[1] in ACCURACIES)
    return (*metrics[: last + 1], AVERAGE, *metrics[last + 1 :])


def _reference(row: _Draft, block: Sequence[_Draft], baseline: str) -> _Draft | None:
    """The row that this one is divided by: the baseline's, of the same protocol."""
    return next(
        (other for other in block
         if other.result.method == baseline and comparable(other.result, row.result)),
        None,
    )  # fmt: skip


def _name(drafts: list[_Draft]) -> None:
    """Label rows by method; rows of one method also by the options that differ, or else by id."""
    for draft in drafts:
        same = [other.result for other in drafts if other.result.method == draft.result.method]
        keys = dict.fromkeys(key for result in same for key in result.options)
        differing = [key for key in keys if len({json.dumps(result.options.get(key)) for result in same}) > 1]
        settings = [f"{key}={short_value(draft.result.options.get(key, 'default'))}" for key in differing]
        draft.label = " ".join([draft.result.method, *settings])
    names = [(draft.label, draft.result.contract) for draft in drafts]
    for draft, name in zip(drafts, names, strict=True):
        if names.count(name) > 1:
            draft.label += f" #{draft.result.id[:6]}"


def _score(
    drafts: list[_Draft], key: str, tasks: Sequence[str], cache: dict[tuple[str, str], Measured | None]
) -> None:
    """Give every row its score on one metric, and mark the best and those tied with it."""
    for draft in drafts:
        if (draft.result.id, key) not in cache:
            cache[draft.result.id, key] = measured(draft.results, key, tasks)
    found = {id(draft): m for draft in drafts if (m := cache[draft.result.id, key]) is not None}
    ranked = [draft for draft in drafts if id(draft) in found and not draft.result.is_baseline]
    full = [m for draft in drafts if draft.result.is_baseline and (m := found.get(id(draft))) is not None]
    if all(m.guesses for m in full or found.values()):
        ranked = []  # whoever is ahead of a model that guesses is ahead by luck, or by its taste in answers
    places = _places([(draft.result, found[id(draft)]) for draft in ranked], key, tasks)
    for draft in drafts:
        own = found.get(id(draft))
        if own is None:
            continue
        half_width, low, high = own.interval or (None, None, None)
        reference = found.get(id(draft.reference))
        if reference is not None and not _same_items(draft.result, draft.reference, key, tasks):
            reference = None
        ratio, ratio_half_width = _ratio(own, reference)
        place = places.get(draft.result.id, _Place())
        draft.scores[key] = Score(
            value=own.value,
            half_width=half_width,
            ratio=ratio,
            ratio_half_width=ratio_half_width,
            mark=place.mark,
            low=low,
            high=high,
            higher_is_better=own.higher_is_better,
            rank=place.rank,
            p_value=place.p_value,
            behind=place.behind,
            n_seeds=len(own.values),
            seed_spread=stats.seed_spread(own.values),
            chance=own.chance,
        )


def _same_items(row: Result, reference: _Draft | None, key: str, tasks: Sequence[str]) -> bool:
    return reference is not None and all(
        comparable(row, reference.result, k) for k in (tasks if key == AVERAGE else (key,))
    )


def _ratio(own: Measured, reference: Measured | None) -> tuple[float | None, float | None]:
    """Of two values; its interval by items on a log scale exactly, else to first order."""
    if reference is None or reference.value == 0 or not math.isfinite(reference.value):
        return None, None
    ratio = own.value / reference.value
    if own is reference or not own.pairs_with(reference):
        return ratio, None
    assert own.scores is not None and reference.scores is not None
    if own.log_scale:
        difference = stats.difference(own.scores, reference.scores)
        return ratio, None if difference is None else ratio * difference.half_width
    # d(a/b) = (a - ratio·b)/b item by item
    difference = stats.difference(own.scores, reference.scores.times(ratio))
    return ratio, None if difference is None else difference.half_width / abs(reference.value)


@dataclass(frozen=True)
class _Place:
    """Where a row stands in its block on one metric."""

    mark: Literal["best", "tied"] | None = None
    rank: int | None = None
    p_value: float | None = None
    behind: stats.Difference | None = None


def _places(rows: Sequence[tuple[Result, Measured]], key: str, tasks: Sequence[str]) -> dict[str, _Place]:
    """Place by result id. One row alone is not the best of anything."""
    rows = [(result, own) for result, own in rows if not math.isnan(own.value)]
    if len(rows) < 2:
        return {}
    higher = rows[0][1].higher_is_better
    order = sorted(rows, key=lambda row: -row[1].value if higher else row[1].value)
    best, of_best = order[0]
    keys = tasks if key == AVERAGE else (key,)
    items = {
        result.id: own.scores
        for result, own in rows
        if own.scores is not None
        and all(comparable(result, best, k) for k in keys)
        and own.pairs_with(of_best)
    }
    ranking = stats.tied_with_best(items, higher_is_better=higher) if items else None
    tied = {*ranking.tied, ranking.best} - {best.id} if ranking is not None else set()
    return {
        result.id: _Place(
            mark="best" if result is best else "tied" if result.id in tied else None,
            rank=1 + sum(other.value != own.value for _, other in order[:i]),
            p_value=ranking.adjusted_p.get(result.id) if ranking is not None else None,
            behind=ranking.behind.get(result.id) if ranking is not None else None,
        )
        for i, (result, own) in enumerate(order)
    }


def _protocol(metrics: list[Metric]) -> str:
    """The protocol in words; several, if mixing was allowed."""
    return "; ".join(dict.fromkeys(f"{metric.protocol}, n={metric.n}" for metric in metrics))


def _notes(results: Sequence[Result]) -> tuple[str, ...]:
    """The row's notes, and what its transforms admit: work that stays at run time, a function that changed."""
    notes = [note for result in results for note in result.notes]
    transforms = results[0].transforms
    altering = sorted({f"{t.site} ({t.kind})" for t in transforms if not t.function_preserving})
    if altering:
        notes.append(f"not function-preserving: {', '.join(altering)}")
    staying = [t for t in transforms if not t.foldable]
    if staying:
        sites = ", ".join(sorted({f"{t.site} ({t.kind})" for t in staying}))
        flops, stored = sum(t.flops_per_token for t in staying), sum(t.stored_bits for t in staying)
        notes.append(
            f"not foldable, stays at run time: {sites}; per block {_si(flops)}FLOP per token, {_si(stored / 8)}B stored"
        )
    return tuple(dict.fromkeys(notes))


def _si(number: float) -> str:
    """Three digits and a prefix: 33_600_000 -> "33.6 M"."""
    power = next(power for power in (4, 3, 2, 1, 0) if number >= 1000**power or power == 0)
    return f"{number / 1000**power:.3g} {' kMGT'[power].strip()}"
