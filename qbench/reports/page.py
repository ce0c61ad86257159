"""The page: one HTML file that needs nothing else, opened from a disk, a mail or a web server.

The rows are in the page as a table, readable without a script; everything a row's dialog shows is beside them as
compressed JSON. Text from records is untrusted: the template escapes it, the JSON is base64, and the script turns it
into text nodes only. A content security policy in the page forbids every request.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from qbench import __version__
from qbench.reports import figures
from qbench.reports.bibliography import references
from qbench.reports.columns import MISSING, format_half_width, format_value
from qbench.reports.drawing import as_latex
from qbench.reports.layouts import (
    PERCENT,
    Cell,
    Sheet,
    costs,
    latency_keys,
    marks_of,
    notes_of,
    score_cell,
    short_name,
)
from qbench.reports.leaderboard import Entry, Section
from qbench.reports.measured import AVERAGE
from qbench.results import Result, split_metric

TITLE = "Quantization results"
BLOCK_CURVES = 3  # training curves of the first, middle and last block in a row's dialog


@dataclass(frozen=True)
class _Column:
    """A column of the page's leaderboard; `first` is the direction of the first click."""

    title: str
    kind: str
    first: str = "up"
    hint: str = "sort"


def as_html(sections: Sequence[Section], sheets: Sequence[Sheet], csv: str, title: str = TITLE) -> str:
    """The whole page.

    Args:
        sections: Rows, gathered by `leaderboard.sections`.
        sheets: The papers' tables, which the LaTeX button gives too.
        csv: What the CSV button gives.
        title: Heading of the page.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = files("qbench.reports") / "templates"
    read = {
        name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    }
    environment = Environment(
        autoescape=True,
        loader=FunctionLoader(read.get),
        undefined=StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
    )
    from markupsafe import Markup

    results = [entry.result for section in sections for entry in section.entries]
    keys = _shown_keys(sections)
    columns = _columns(sections, keys)
    rows = [row for section in sections for row in _rows(section, keys)]
    columns, rows = _without_empty(columns, rows)
    text = environment.get_template("page.html").render(
        title=title,
        lead=_lead(sections, results),
        css=Markup(read["page.css"]),
        js=Markup(read["page.js"]),
        columns=columns,
        rows=rows,
        filters=_filters(results),
        recovery=_recovery_in_words(sections),
        plots=figures.plots(sections),
        sheets=sheets,
        contracts=[_contract(section) for section in sections],
        notes=[dict(zip(("who", "text"), _split_note(note), strict=True)) for note in notes_of(sections)],
        foot=f"Made by qbench {__version__} from {len(results)} records, the newest of "
        f"{max(result.created for result in results)[:10]}. This page loads nothing from anywhere.",
        data=_data(sections, sheets, csv),
    )
    return text


def _lead(sections: Sequence[Section], results: Sequence[Result]) -> str:
    counts = [
        (len(results), "row"),
        (len({r.method for r in results if not r.is_baseline}), "method"),
        (len({r.scheme for r in results if not r.is_baseline}), "scheme"),
        (len({r.model for r in results}), "model"),
        (len(sections), "protocol contract"),
    ]
    words = [f"{n} {word}{'s' if n != 1 else ''}" for n, word in counts]
    models = {result.model for result in results}
    return " · ".join([*(models if len(models) == 1 else ()), *words])


def _shown_keys(sections: Sequence[Section]) -> list[str]:
    """Metrics with a column of their own: perplexities and latencies."""
    keys = [AVERAGE] if any(AVERAGE in section.table.metrics for section in sections) else []
    keys += [k for section in sections for k in section.task_keys if len(section.task_keys) == 1]
    keys += [key for section in sections for key in section.perplexities]
    keys += [key for section in sections for key in latency_keys(section.table.metrics)]
    return list(dict.fromkeys(keys))


def _columns(sections: Sequence[Section], keys: Sequence[str]) -> list[_Column]:
    found = [
        _Column("method", "name"),
        _Column("scheme", "text"),
        _Column("model", "text model"),
        _Column("bits/weight", "number", "up", "stored bits of the blocks' linears per weight; sort"),
        _Column("recovery %", "value", "down", "how much of full precision's quality is left; sort"),
    ]
    found += [
        *(_Column(short_name(key), "value", "down" if _upward(sections, key) else "up") for key in keys),
        _Column("time", "number"),
        _Column("GPU GiB", "number"),
        _Column("CPU GiB", "number"),
        _Column("contract", "text"),
    ]
    return found


def _without_empty(
    columns: Sequence[_Column], rows: Sequence[dict[str, Any]]
) -> tuple[list[_Column], list[dict[str, Any]]]:
    """Leave out columns in which no row has a value, and the model's if there is but one: the heading names it."""
    kept = [
        i
        for i, column in enumerate(columns)
        if any(row["cells"][i]["text"] != MISSING for row in rows)
        and (column.title != "model" or len({row["model"] for row in rows}) > 1)
    ]
    return [columns[i] for i in kept], [row | {"cells": [row["cells"][i] for i in kept]} for row in rows]


def _upward(sections: Sequence[Section], key: str) -> bool:
    scores = [entry.row.scores.get(key) for section in sections for entry in section.entries]
    return any(score.higher_is_better for score in scores if score is not None)


def _rows(section: Section, keys: Sequence[str]) -> Iterable[dict[str, Any]]:
    marks = _marks(section, keys)
    for entry in section.entries:
        result = entry.result
        recovery, bits, *rest = costs(entry)
        share = None if recovery.text == MISSING or entry.quality is None else entry.quality.recovery
        cells = [
            _cell(Cell(entry.row.label), entry.row.label),
            _cell(Cell(result.scheme_label), result.scheme_label),
            _cell(Cell(result.model), result.model),
            _cell(bits, result.bits_per_weight),
            _cell(recovery, share, share),
        ]
        for key in keys:
            score = entry.row.scores.get(key)
            cell = Cell(MISSING) if score is None else score_cell(key, score, marks.get((result.id, key)))
            cells.append(_cell(cell, None if score is None else score.value))
        values = (result.cost.seconds or None, result.cost.peak_gpu_bytes, result.cost.peak_cpu_bytes)
        cells += [_cell(cell, value) for cell, value in zip(rest, values, strict=True)]
        cells.append(_cell(Cell(result.contract[:8]), result.contract[:8]))
        yield {
            "id": result.id,
            "model": result.model,
            "method": result.method,
            "scheme": result.scheme,
            "contract": result.contract,
            "place": "baseline" if result.is_baseline else entry.place or "",
            "settings": _settings(entry),
            "n_notes": len(entry.row.notes),
            "cells": cells,
        }


def _cell(cell: Cell, sort: float | str | None, bar: float | None = None) -> dict[str, Any]:
    finite = isinstance(sort, str) or (sort is not None and not math.isnan(sort))
    share = None if bar is None or not math.isfinite(bar) else f"{100 * min(max(bar, 0.0), 1.0):.0f}"
    value = "" if not finite else sort if isinstance(sort, str) else f"{sort:.10g}".replace("inf", "Infinity")
    mark = " ".join(filter(None, [cell.mark or "", "missing" if cell.text == MISSING else ""]))
    return {"text": cell.text, "half": cell.half_width, "mark": mark, "sort": value, "bar": share}


def _settings(entry: Entry) -> str:
    """What tells a row from others of its method: options, and how many calibration seeds."""
    settings = entry.row.label.removeprefix(entry.result.method).strip()
    n = len(entry.row.results)
    return f"{settings} ({n} seeds)".strip() if n > 1 else settings


def _marks(section: Section, keys: Sequence[str]) -> dict[tuple[str, str], Any]:
    """Ranks within each scheme by (row, metric)."""
    return {(id, key): mark for key in keys for id, mark in marks_of(section, key).items()}


def _filters(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A list to choose from for each property in which rows differ."""
    found = []
    for key in ("method", "scheme", "model", "contract"):
        values = list(dict.fromkeys(getattr(result, key) for result in results))
        if len(values) > 1:
            pairs = [(value, value[:8] if key == "contract" else value) for value in values]
            found.append({"name": key.capitalize(), "key": key, "values": pairs})
    return found


def _recovery_in_words(sections: Sequence[Section]) -> str:
    names = list(
        dict.fromkeys(short_name(section.quality_key) for section in sections if section.quality_key)
    )
    return (
        f"recovery: what is left of full precision's {' or '.join(names)}, paired item by item"
        if names
        else ""
    )


def _contract(section: Section) -> dict[str, Any]:
    fields = [(key, _words(value)) for key, value in _flat(section.fields)]
    return {"hash": section.contract, "model": section.model, "n": len(section.entries), "fields": fields}


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _split_note(note: str) -> tuple[str, str]:
    who, _, text = note.partition(": ")
    return who, text


class _Table:
    """Values that many rows share, each stored once and named by its place."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        key = json.dumps(value, sort_keys=True, default=str)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


def _data(sections: Sequence[Section], sheets: Sequence[Sheet], csv: str) -> str:
    """What the script needs: every record but its items, what many share stored once."""
    protocols, environments, configs, calibrations = _Table(), _Table(), _Table(), _Table()
    rows = {}
    contracts: dict[str, Any] = {}
    for section in sections:
        contracts[section.contract] = dict(section.fields)
        marks = _marks(section, section.table.metrics)
        for entry in section.entries:
            result = entry.result
            rows[result.id] = {
                "id": result.id,
                "label": entry.row.label,
                "model": result.model,
                "scheme": result.scheme,
                "created": result.created,
                "contract": result.contract,
                "facts": _facts(entry),
                "metrics": {key: _metric(section, entry, key, marks, protocols) for key in entry.row.scores},
                "seeds": _seeds(entry),
                "notes": list(entry.row.notes),
                "options": result.options,
                "transforms": [
                    [
                        t.site,
                        t.kind,
                        _yes(t.foldable),
                        _yes(t.function_preserving),
                        t.stored_bits,
                        t.flops_per_token,
                    ]
                    for t in result.transforms
                ],
                "blocks": _blocks(result),
                "calibration": calibrations.place(result.calibration) if result.calibration else None,
                "environment": environments.place(result.provenance),
                "config": configs.place(result.config),
            }
    data = {
        "rows": rows,
        "contracts": contracts,
        "protocols": protocols.values,
        "environments": environments.values,
        "configs": configs.values,
        "calibrations": calibrations.values,
        "csv": csv,
        "latex": as_latex(sheets, notes_of(sections)),
        "bibtex": references(e.result.method for section in sections for e in section.entries),
    }
    return packed(data)


def packed(data: Any) -> str:
    """JSON, compressed, as base64: a fifth of the text, and nothing in it can end a script element."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False, default=str)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "∞" if value > 0 else MISSING
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _facts(entry: Entry) -> dict[str, str]:
    names = ("recovery %", "bits/weight", "time", "GPU GiB", "CPU GiB")
    cells = [(name, cell) for name, cell in zip(names, costs(entry), strict=True) if cell.text != MISSING]
    facts = {name: f"{cell.text} {cell.half_width}".strip() for name, cell in cells}
    if entry.place is not None:
        facts["Pareto"] = "on the front" if entry.place == "front" else "dominated"
    for name, seconds in entry.result.cost.stages.items():
        facts[f"{name} (s)"] = f"{seconds:.1f}"
    return facts


def _metric(
    section: Section, entry: Entry, key: str, marks: Mapping[tuple[str, str], Any], protocols: _Table
) -> dict[str, Any]:
    metric, score = entry.result.metrics.get(key), entry.row.scores[key]
    factor = 100 if split_metric(key)[1] in PERCENT else 1
    half = (
        "" if score.half_width is None else format_half_width(score.half_width * factor, score.value * factor)
    )
    found: dict[str, Any] = {
        "text": f"{format_value(score.value * factor)}{' %' if factor == 100 else ''} {half}".strip()
        + (" (guessing may do)" if score.above_chance is False else ""),
        "n": metric.n if metric else len(section.task_keys),
        "protocol": protocols.place(metric.protocol if metric else section.table.protocols.get(key, MISSING)),
    }
    if metric is not None and metric.n_total is not None:
        found["n_total"] = metric.n_total
    if score.ratio is not None and not entry.row.is_reference:
        around = (
            "" if score.ratio_half_width is None else format_half_width(score.ratio_half_width, score.ratio)
        )
        found["ratio"] = f"{format_value(score.ratio)} {around}".strip()
    mark = marks.get((entry.result.id, key))
    return found | ({"mark": mark} if mark else {})


def _seeds(entry: Entry) -> list[list[Any]]:
    """Of a row with several calibration seeds: each record's seed, id and value."""
    if len(entry.row.results) < 2:
        return []
    first = next((key for key in entry.row.scores if key in entry.result.metrics), "")
    return [
        [r.calibration.get("seed"), r.id[:12], format_value(r.metrics[first].value) if first else MISSING]
        for r in entry.row.results
    ]


def _blocks(result: Result) -> dict[str, Any] | None:
    """Errors of all blocks and training curves of a few, to four digits."""
    if not any(
        b.local_error is not None or b.accumulated_error is not None or b.losses for b in result.blocks
    ):
        return None
    trained = [block for block in result.blocks if len(block.losses) > 1 and block.losses[0] > 0]
    places = sorted({round(i * (len(trained) - 1) / max(BLOCK_CURVES - 1, 1)) for i in range(BLOCK_CURVES)})
    chosen = [trained[i] for i in places] if trained else []
    return {
        "first": result.blocks[0].index,
        "local": [_digits(block.local_error) for block in result.blocks],
        "accumulated": [_digits(block.accumulated_error) for block in result.blocks],
        "losses": [[b.index, [_digits(loss / b.losses[0]) for loss in b.losses]] for b in chosen],
    }


def _digits(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
