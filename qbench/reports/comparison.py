"""Comparison: rows put side by side, or refused. Who is best, who is tied, what each costs against the reference.

This decides *what* a table says; `table.py` decides how it looks. Rows are ranked only within one model, scheme and
protocol contract, and compared pairwise on the same windows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qbench.errors import ConfigError, DataError, unknown_name
from qbench.reports import stats
from qbench.results import BASELINE, Metric, Result, ResultStore

Source = Result | ResultStore | str | Path | Iterable[Result]
FORMATS = ("table", "json", "csv", "markdown", "latex")
NORMAL_95 = 1.959964  # for a metric that kept no items, only a standard error


@dataclass(frozen=True)
class Score:
    """One metric of one row.

    Attributes:
        half_width: Of the value's own 95% interval: how far another text of the kind might give another value.
        ratio: Value divided by the reference row's value, unrounded.
        ratio_half_width: Of the ratio's 95% interval, paired window by window, hence much shorter.
        mark: Within its scheme; "tied" means that the data cannot tell it from the best.
    """

    value: float
    half_width: float | None = None
    ratio: float | None = None
    ratio_half_width: float | None = None
    mark: Literal["best", "tied"] | None = None


@dataclass(frozen=True)
class Row:
    """One line of a block. A full-precision row appears in every block, with the same result."""

    result: Result
    label: str
    is_reference: bool
    scores: Mapping[str, Score]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """The rows that are ranked together: one model, one scheme."""

    scheme: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class ModelTable:
    """All blocks of one model.

    Attributes:
        metrics: Keys of `Result.metrics`, in order of appearance.
        protocols: What each metric was measured on, and on how many items.
        contracts: Distinct contract hashes; more than one only if mixing was allowed.
    """

    model: str
    metrics: tuple[str, ...]
    protocols: Mapping[str, str]
    contracts: tuple[str, ...]
    blocks: tuple[Block, ...]


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
        sources: Results, stores, or folders of records.
        baseline: Method whose row the others are divided by.
        allow_mixed: Rank rows of different protocols all the same. Their contracts are printed, and no statistics
            across contracts are computed.

    Raises:
        ConfigError: If rows of one model have different contracts; names the fields that differ. Also if no row has the
            baseline method.
        DataError: If there are no rows, or a record is damaged.
    """
    results = list({result.id: result for source in sources for result in _read(source)}.values())
    if not results:
        raise DataError("There are no results to compare.")
    methods = {result.method for result in results}
    if baseline != BASELINE and baseline not in methods:
        raise unknown_name("method among these rows", baseline, methods)
    by_model: dict[str, list[Result]] = {}
    for result in results:
        by_model.setdefault(result.model, []).append(result)
    if not allow_mixed:
        for model, rows in by_model.items():
            _refuse_mixed(model, rows)
    tables = tuple(_model_table(model, rows, baseline) for model, rows in by_model.items())
    return Comparison(tables, tuple(results), baseline)


def _read(source: Source) -> Iterable[Result]:
    if isinstance(source, Result):
        return [source]
    if isinstance(source, str | Path):
        source = ResultStore(source)
    return source.load_all() if isinstance(source, ResultStore) else source


def _refuse_mixed(model: str, rows: list[Result]) -> None:
    contracts = {(row.contract, row.model_fingerprint): _circumstances(row) for row in rows}
    if len(contracts) < 2:
        return
    sides = list(contracts.values())
    names = dict.fromkeys(name for side in sides for name in side)
    differing = []
    for name in names:
        values = list(dict.fromkeys(_short(side.get(name, "(not recorded)")) for side in sides))
        if len(values) > 1:
            differing.append(f"{name} ({' / '.join(values[:4])}{' / …' if len(values) > 4 else ''})")
    raise ConfigError(
        f"The rows of {model} come from {len(contracts)} different protocols and are not ranked together; "
        "they differ in "
        f"{', '.join(differing) or 'fields that were not recorded'}. "
        "Compare folders of one protocol, or allow it with --allow-mixed."
    )


def _circumstances(row: Result) -> dict[str, Any]:
    return {"model_fingerprint": row.model_fingerprint, **_flat(row.contract_fields)}


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:12] + "…"


@dataclass
class _Draft:
    """A row while its block is being put together."""

    result: Result
    label: str
    reference: Result | None
    scores: dict[str, Score] = field(default_factory=dict)


def _model_table(model: str, results: list[Result], baseline: str) -> ModelTable:
    full_precision = [result for result in results if result.is_baseline]
    others = [result for result in results if not result.is_baseline]
    schemes = list(dict.fromkeys(result.scheme for result in others or full_precision))
    metrics = tuple(dict.fromkeys(key for result in results for key in result.metrics))
    blocks = []
    for scheme in schemes:
        members = [result for result in others if result.scheme == scheme]
        members.sort(
            key=lambda result: result.method != baseline
        )  # stable: the reference first, the rest as given
        drafts = [_Draft(row, "", _reference(row, full_precision + members, baseline))
                  for row in full_precision + members]  # fmt: skip
        _name(drafts)
        for key in metrics:
            _score(drafts, key)
        rows = (
            Row(
                draft.result, draft.label, draft.result is draft.reference, draft.scores, _notes(draft.result)
            )
            for draft in drafts
        )
        blocks.append(Block(scheme, tuple(rows)))
    protocols = {key: _protocol([r.metrics[key] for r in results if key in r.metrics]) for key in metrics}
    contracts = tuple(dict.fromkeys(result.contract for result in results))
    return ModelTable(model, metrics, protocols, contracts, tuple(blocks))


def _reference(row: Result, block: list[Result], baseline: str) -> Result | None:
    """The row that this one is divided by: the baseline's, of the same protocol."""
    return next(
        (other for other in block if other.method == baseline and other.contract == row.contract), None
    )


def _name(drafts: list[_Draft]) -> None:
    """Label rows by method; rows of one method also by the options that differ, or else by id."""
    for draft in drafts:
        same = [other.result for other in drafts if other.result.method == draft.result.method]
        keys = dict.fromkeys(key for result in same for key in result.options)
        differing = [key for key in keys if len({json.dumps(result.options.get(key)) for result in same}) > 1]
        settings = [f"{key}={_short(draft.result.options.get(key, 'default'))}" for key in differing]
        draft.label = " ".join([draft.result.method, *settings])
    names = [(draft.label, draft.result.contract) for draft in drafts]
    for draft, name in zip(drafts, names, strict=True):
        if names.count(name) > 1:
            draft.label += f" #{draft.result.id[:6]}"


def _score(drafts: list[_Draft], key: str) -> None:
    """Give every row its score on one metric, and mark the best and those tied with it."""
    marks = _marks([draft.result for draft in drafts if not draft.result.is_baseline], key)
    for draft in drafts:
        metric = draft.result.metrics.get(key)
        if metric is None:
            continue
        own = stats.mean_interval(metric.items) if metric.items else None
        half_width: float | None
        if own is not None:
            half_width = own.half_width * (metric.value if metric.log_scale else 1.0)
        else:
            half_width = None if metric.stderr is None else NORMAL_95 * metric.stderr
        reference = draft.reference.metrics.get(key) if draft.reference is not None else None
        ratio, ratio_half_width = _ratio(metric, reference)
        draft.scores[key] = Score(
            metric.value, half_width, ratio, ratio_half_width, marks.get(draft.result.id)
        )


def _ratio(metric: Metric, reference: Metric | None) -> tuple[float | None, float | None]:
    if reference is None or reference.value == 0 or not math.isfinite(reference.value):
        return None, None
    ratio = metric.value / reference.value
    if metric is reference or not (metric.log_scale and _paired(metric, reference)):
        return ratio, None
    assert metric.items is not None and reference.items is not None
    difference = stats.paired_difference(metric.items, reference.items)
    return ratio, None if difference is None else ratio * difference.half_width


def _paired(one: Metric, other: Metric) -> bool:
    """Whether two metrics were measured item by item on the same items (their contracts being equal)."""
    return (
        one.items is not None
        and other.items is not None
        and len(one.items) == len(other.items)
        and (one.items_name, one.protocol) == (other.items_name, other.protocol)
    )


def _marks(results: list[Result], key: str) -> dict[str, Literal["best", "tied"]]:
    """Marks by result id. One row alone is not the best of anything."""
    rows = [
        result for result in results if key in result.metrics and not math.isnan(result.metrics[key].value)
    ]
    if len(rows) < 2:
        return {}
    higher = rows[0].metrics[key].higher_is_better
    best = (max if higher else min)(rows, key=lambda result: result.metrics[key].value)
    marks: dict[str, Literal["best", "tied"]] = {best.id: "best"}
    items = {
        row.id: row.metrics[key].items or []
        for row in rows
        if row.contract == best.contract and _paired(row.metrics[key], best.metrics[key])
    }
    ranking = stats.tied_with_best(items, higher_is_better=higher) if items else None
    if ranking is not None:
        marks |= {id: "tied" for id in {*ranking.tied, ranking.best} - {best.id}}
    return marks


def _protocol(metrics: list[Metric]) -> str:
    """The protocol in words; several, if mixing was allowed."""
    return "; ".join(dict.fromkeys(f"{metric.protocol}, n={metric.n}" for metric in metrics))


def _notes(result: Result) -> tuple[str, ...]:
    """The row's notes, and what its transforms admit: work that stays at run time, a function that changed."""
    notes = list(result.notes)
    altering = sorted({f"{t.site} ({t.kind})" for t in result.transforms if not t.function_preserving})
    if altering:
        notes.append(f"not function-preserving: {', '.join(altering)}")
    staying = [t for t in result.transforms if not t.foldable]
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
