"""Tables as the papers print them, and the leaderboard, as one simple shape that any output format can draw.

A paper's table has methods for rows, schemes one under the other, and models, schemes or tasks for columns. The best
of a scheme is bold and the next underlined; but a row that the data cannot tell from the best is marked as tied with
it, and "second" is the best row that is not tied. Full precision is above all of them and competes with none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from qbench.errors import unknown_name
from qbench.reports.columns import (
    MISSING,
    SHORT_NAMES,
    detail_keys,
    format_half_width,
    format_seconds,
    format_value,
    most,
)
from qbench.reports.comparison import Score
from qbench.reports.leaderboard import Entry, Section
from qbench.reports.measured import ACCURACIES, AVERAGE
from qbench.results import BASELINE, split_metric

Mark = Literal["best", "tied", "second"]
Columns = Literal["auto", "models", "schemes", "tasks"]
PERCENT = frozenset({"acc", "acc_norm", "top1_agreement", "exact_match", "f1"})
# What stands in the papers' tables unless others are asked for; the CSV and a row's details have everything.
HEADLINES = frozenset({"perplexity", "word_perplexity", "kl_mean", "top1_agreement", *ACCURACIES})
GIB = 1 << 30


@dataclass(frozen=True)
class Cell:
    """One value as it is written: number, what stands behind it, and its rank."""

    text: str
    half_width: str = ""
    mark: Mark | None = None


@dataclass(frozen=True)
class Line:
    """One row; `rule` puts a line above it, `dim` sets it back: full precision, or a dominated row."""

    cells: tuple[Cell, ...]
    dim: bool = False
    rule: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table ready to be drawn.

    Attributes:
        header: One title per column.
        n_labels: The first columns are labels, aligned left and repeated where a table is split.
        footer: Lines below: protocols, contracts, notes.
    """

    title: str
    header: tuple[str, ...]
    n_labels: int
    lines: tuple[Line, ...]
    footer: tuple[str, ...] = ()


def paper_sheets(
    sections: Sequence[Section], columns: Columns = "auto", metrics: Sequence[str] = ()
) -> list[Sheet]:
    """The papers' tables of some sections.

    Args:
        sections: Rows, ranked within each section only.
        columns: What the columns are. auto: models where there are several, else schemes; tasks for accuracies.
        metrics: Keys to print, in this order; default: all but further quantiles of one measurement.

    Raises:
        ConfigError: If a metric is not among the rows, or `columns` is none of those named.
    """
    if columns not in get_args(Columns):
        raise unknown_name("kind of columns", columns, get_args(Columns))
    known = list(dict.fromkeys(key for section in sections for key in section.table.metrics))
    for key in metrics:
        if key not in known:
            raise unknown_name("metric among these rows", key, known)
    details = detail_keys(known)
    shown = list(metrics) or [k for k in known if k not in details and split_metric(k)[1] in HEADLINES]
    accuracies = {key for key in shown if split_metric(key)[1] in ACCURACIES}
    others = [key for key in shown if key not in accuracies]
    sheets = []
    if columns in ("auto", "models", "schemes"):
        together = columns == "models" or (columns == "auto" and len({s.model for s in sections}) > 1)
        single = shown if columns != "auto" else others
        for key in single:
            there = [section for section in sections if key in section.table.metrics]
            if together:
                sheets.append(_by_models(there, key))
            else:
                sheets += [_by_schemes(section, key) for section in there]
    if columns in ("auto", "tasks"):
        wanted = accuracies if columns == "auto" else set(shown)
        for section in sections:
            keys = [key for key in section.table.metrics if key in wanted]
            sheets += [_by_tasks(section, keys)] if keys else []
    return sheets


def ranks(scores: Mapping[str, Score]) -> dict[str, Mark]:
    """Marks of the rows of one scheme on one metric: the comparison's, and which is second."""
    marks: dict[str, Mark] = {key: score.mark for key, score in scores.items() if score.mark is not None}
    rest = {key: score.value for key, score in scores.items() if key not in marks}
    rest = {key: value for key, value in rest.items() if value == value}
    if marks and rest:
        pick = max if any(score.higher_is_better for score in scores.values()) else min
        marks[pick(rest, key=lambda key: rest[key])] = "second"
    return marks


def _by_models(sections: Sequence[Section], key: str) -> Sheet:
    """One metric: schemes and methods for rows, models for columns."""
    names = _names(sections)
    lines = []
    cells: dict[tuple[str, str], dict[str, Cell]] = {}
    for section in sections:
        for (scheme, label), cell in _cells(section, key).items():
            cells.setdefault((scheme, label), {})[names[section]] = cell
    previous = None
    for (scheme, label), found in _schemes_together(cells).items():
        values = [found.get(name, Cell(MISSING)) for name in names.values()]
        if all(value.text == MISSING for value in values):
            continue
        heading = Cell(scheme if scheme != previous else "")
        lines.append(Line((heading, Cell(label), *values), dim=label == BASELINE, rule=scheme != previous))
        previous = scheme
    footer = [
        f"{name}: {_protocol(section, key)}, contract {section.contract[:8]}"
        for section, name in names.items()
    ]
    header = ("scheme", "method", *names.values())
    return Sheet(_title(key, sections), header, 2, tuple(lines), tuple(footer))


def _schemes_together(cells: Mapping[tuple[str, str], dict[str, Cell]]) -> dict[tuple[str, str], dict]:
    """Rows in order of appearance, those of one scheme next to each other, full precision first."""
    schemes = list(dict.fromkeys(scheme for scheme, _ in cells))
    schemes.sort(key=lambda scheme: scheme != FULL)
    return {row: found for scheme in schemes for row, found in cells.items() if row[0] == scheme}


def _by_schemes(section: Section, key: str) -> Sheet:
    """One metric of one model: methods for rows, schemes for columns."""
    cells = _cells(section, key)
    schemes = list(dict.fromkeys(scheme for scheme, _ in cells if scheme != FULL))
    lines = []
    full = cells.get((FULL, BASELINE))
    if full is not None:
        lines.append(Line((Cell(BASELINE), *([full] * max(len(schemes), 1))), dim=True, rule=True))
    for label in dict.fromkeys(label for scheme, label in cells if scheme != FULL):
        values = tuple(cells.get((scheme, label), Cell(MISSING)) for scheme in schemes)
        if all(value.text == MISSING for value in values):
            continue
        lines.append(Line((Cell(label), *values), rule=len(lines) == (full is not None)))
    footer = (_protocol(section, key), f"contract {section.contract[:8]}")
    header = ("method", *(schemes or [FULL]))
    return Sheet(f"{section.model}: {_title(key, [section])}", header, 1, tuple(lines), footer)


def _by_tasks(section: Section, keys: Sequence[str]) -> Sheet:
    """One model: schemes and methods for rows, tasks and their average for columns."""
    found = {key: _cells(section, key) for key in keys}
    lines, previous = [], None
    for row in _schemes_together({row: {} for key in keys for row in found[key]}):
        scheme, label = row
        values = [found[key].get(row, Cell(MISSING)) for key in keys]
        if all(value.text == MISSING for value in values):
            continue
        heading = Cell(scheme if scheme != previous else "")
        lines.append(Line((heading, Cell(label), *values), dim=label == BASELINE, rule=scheme != previous))
        previous = scheme
    header = ("scheme", "method", *(short_name(key) for key in keys))
    footer = tuple(f"{short_name(key)}: {_protocol(section, key)}" for key in keys)
    footer += (f"contract {section.contract[:8]}",)
    return Sheet(f"{section.model}: tasks", header, 2, tuple(lines), footer)


FULL = "FP"


def _cells(section: Section, key: str) -> dict[tuple[str, str], Cell]:
    """Cells of one metric by (scheme, label)."""
    cells: dict[tuple[str, str], Cell] = {}
    marks = marks_of(section, key)
    for block in section.table.blocks:
        for row in block.rows:
            where = (FULL if row.result.is_baseline else row.result.scheme_label, row.label)
            if key in row.scores:
                cells[where] = score_cell(key, row.scores[key], marks.get(row.result.id))
            else:
                cells.setdefault(where, Cell(MISSING))
    return cells


def marks_of(section: Section, key: str) -> dict[str, Mark]:
    """Ranks on one metric within each scheme, by the row's id; none on times, of which rows of a scheme share one."""
    marks: dict[str, Mark] = {}
    if latency_keys([key]):
        return marks
    for block in section.table.blocks:
        marks |= ranks(
            {r.result.id: r.scores[key] for r in block.rows if key in r.scores and not r.result.is_baseline}
        )
    return marks


def score_cell(key: str, score: Score, mark: Mark | None = None) -> Cell:
    """A score as the papers print it: accuracies in percent (° if a guess may do as well)."""
    metric = split_metric(key)[1]
    factor = 100 if metric in PERCENT else 1
    value = score.value * factor
    half = "" if score.half_width is None else format_half_width(score.half_width * factor, value)
    guessed = "°" if score.above_chance is False else ""
    return Cell(format_value(value) + guessed, half, mark)


def leaderboard_sheets(sections: Sequence[Section]) -> list[Sheet]:
    """The leaderboard: one table per section, with costs; dominated rows are dim."""
    return [_leaderboard(section) for section in sections]


def latency_keys(metrics: Iterable[str]) -> list[str]:
    """Metrics that are times: their unit is in their name."""
    return [key for key in metrics if split_metric(key)[1].endswith(("_ms", "_per_s"))]


def _leaderboard(section: Section) -> Sheet:
    average = [AVERAGE] if AVERAGE in section.table.metrics else []
    single = section.task_keys if len(section.task_keys) == 1 else ()
    keys = [*section.perplexities, *single, *average, *latency_keys(section.table.metrics)]
    tables = {key: _cells(section, key) for key in keys}
    lines, previous = [], None
    for entry in section.entries:
        scheme = FULL if entry.result.is_baseline else entry.result.scheme_label
        cells = [tables[key].get((scheme, entry.row.label), Cell(MISSING)) for key in keys]
        star = "●" if entry.place == "front" else ""
        lines.append(
            Line(
                (Cell(scheme), Cell(f"{entry.row.label} {star}".strip()), *cells, *costs(entry)),
                dim=entry.result.is_baseline or entry.place == "dominated",
                rule=scheme != previous,
            )
        )
        previous = scheme
    header = ["scheme", "method", *(short_name(key) for key in keys)]
    header += ["recovery %", "bits/weight", "time", "GPU GiB", "CPU GiB"]
    footer = [f"{short_name(key)}: {_protocol(section, key)}" for key in keys]
    footer += [f"recovery: what is left of full precision's {short_name(section.quality_key or '')}, paired"]
    footer += ["● on the Pareto front of quality against stored bits (weights, activations, cache)"]
    footer += [f"contract {section.contract[:8]}"]
    return _without_empty(Sheet(section.model, tuple(header), 2, tuple(lines), tuple(footer)))


def costs(entry: Entry) -> list[Cell]:
    """Recovery, effective bits, time and memory of a row."""
    recovery, score = Cell(MISSING), entry.quality
    if score is not None and score.recovery is not None and not entry.row.is_reference:
        value, half = 100 * score.recovery, score.recovery_half_width
        around = "" if half is None else f"±{100 * half:.1f}" if half > 5e-4 else "±<0.1"
        recovery = Cell(f"{value:.1f}", around)
    bits, each = entry.result.bits_per_weight, [result.cost for result in entry.row.results]
    return [
        recovery,
        Cell(MISSING if bits is None else f"{bits:.2f}"),
        Cell(format_seconds(entry.row.seconds)),
        Cell(_gib(most(cost.peak_gpu_bytes for cost in each))),
        Cell(_gib(most(cost.peak_cpu_bytes for cost in each))),
    ]


def _without_empty(sheet: Sheet) -> Sheet:
    """Drop columns in which no row has a value."""
    kept = [
        i
        for i in range(len(sheet.header))
        if i < sheet.n_labels or any(line.cells[i].text != MISSING for line in sheet.lines)
    ]
    lines = tuple(replace(line, cells=tuple(line.cells[i] for i in kept)) for line in sheet.lines)
    return replace(sheet, header=tuple(sheet.header[i] for i in kept), lines=lines)


def _gib(size: int | None) -> str:
    return MISSING if size is None else f"{size / GIB:.2f}"


def _names(sections: Sequence[Section]) -> dict[Section, str]:
    """Column titles: the model's last part, with the contract where one model has several."""
    short = [section.model.rstrip("/").rpartition("/")[2] or section.model for section in sections]
    return {
        section: name if short.count(name) == 1 else f"{name} ({section.contract[:6]})"
        for section, name in zip(sections, short, strict=True)
    }


def short_name(key: str) -> str:
    """A metric as a column's title: a task's accuracy by the task's name alone."""
    task, metric = split_metric(key)
    if key == AVERAGE:
        return "tasks average"
    return task if metric == "acc" else f"{task} {SHORT_NAMES.get(metric, metric)}"


def _title(key: str, sections: Sequence[Section]) -> str:
    task, metric = split_metric(key)
    scores = [e.row.scores[key] for s in sections for e in s.entries if key in e.row.scores]
    arrow = "↑" if any(score.higher_is_better for score in scores) else "↓"
    return f"{task} {metric}{' %' if metric in PERCENT else ''} {arrow}"


def _protocol(section: Section, key: str) -> str:
    return section.table.protocols.get(key, MISSING)


def notes_of(sections: Sequence[Section]) -> tuple[str, ...]:
    """The rows' notes, each once, with the rows that it is about."""
    notes: dict[str, list[str]] = {}
    for section in sections:
        for entry in section.entries:
            who = f"{entry.row.label} {entry.result.scheme_label}"
            for note in entry.row.notes:
                if who not in notes.setdefault(note, []):
                    notes[note].append(who)
    return tuple(f"{', '.join(who)}: {note}" for note, who in notes.items())
