"""Which plots a page shows: quality against bits, errors of blocks, training, and effects of single options.

One set per section, because values of different models or protocols do not share an axis.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qbench.reports import plot
from qbench.reports.layouts import short_name
from qbench.reports.leaderboard import Entry, Section, difference_of


@dataclass(frozen=True)
class Figure:
    """One plot with its words; `svg` is our own markup, in which text from records is escaped."""

    title: str
    caption: str
    svg: Any


@dataclass(frozen=True)
class PlotSet:
    """The plots of one section."""

    name: str
    figures: tuple[Figure, ...]


def plots(sections: Sequence[Section]) -> list[PlotSet]:
    """All plots that the rows have data for; methods keep their colour throughout."""
    from markupsafe import Markup

    methods = list(
        dict.fromkeys(e.result.method for s in sections for e in s.entries if not e.result.is_baseline)
    )
    found = []
    for section in sections:
        drawn = [_quality(section, methods), *_block_errors(section, methods), *_training(section, methods)]
        drawn += _option_effects(section)
        figures = tuple(Figure(title, caption, Markup(svg)) for title, caption, svg in drawn if svg)
        if figures:
            found.append(PlotSet(section.name, figures))
    return found


Drawn = tuple[str, str, str]
FEW = 8  # rows of a plot up to which a second curve for each can be told apart


def _competing(section: Section) -> list[Entry]:
    return [entry for entry in section.entries if not entry.result.is_baseline]


def _quality(section: Section, methods: Sequence[str]) -> Drawn:
    """Quality against effective bits, paired intervals where rows are paired."""
    points: dict[str, plot.Point] = {}
    reference = None
    for entry in _competing(section):
        bits, score = entry.result.bits_per_weight, entry.quality
        if bits is None or score is None:
            continue
        if score.higher_is_better:
            y, half = 100 * score.value, None if score.half_width is None else 100 * score.half_width
        elif score.ratio is not None:
            y, half, reference = score.ratio, score.ratio_half_width, 1.0
        else:
            y, half = score.value, score.half_width
        label = f"{entry.row.label} {entry.result.scheme_label}: {y:.4g} at {bits:.2f} bits"
        label += f" (± {half:.2g})" if half else ""
        series, weight_only = methods.index(entry.result.method), entry.scheme.abits >= 16
        points[entry.result.id] = plot.Point(bits, y, label, series, half, entry.result.id, weight_only)
    groups: dict[tuple[int, int], list[Entry]] = {}
    for entry in _competing(section):
        if entry.place == "front" and entry.result.id in points:
            groups.setdefault((entry.scheme.abits, entry.scheme.attention_bits[1]), []).append(entry)
    fronts = [sorted((points[e.result.id] for e in group), key=lambda p: p.x) for group in groups.values()]
    y_title = short_name(section.quality_key or "")
    if reference:
        y_title += " ÷ full precision"
    elif any(e.quality is not None and e.quality.higher_is_better for e in section.entries):
        y_title += ", %"
    svg = plot.scatter(
        list(points.values()), fronts, methods, "effective bits per weight", y_title, reference
    )
    mixed = len({p.filled for p in points.values()}) > 1
    caption = "Lines: Pareto front, one for each activation width. Bars: 95 % interval"
    caption += ", paired with full precision." if reference else "."
    caption += " Hollow: activations are quantized too." if mixed else ""
    lost = sum(not math.isfinite(p.y) for p in points.values())
    caption += f" {lost} row(s) collapsed to infinity and are not drawn." if lost else ""
    finite = [p.y for p in points.values() if math.isfinite(p.y)]
    above = sum(plot.is_collapsed(y, [*finite, reference or y]) for y in finite)
    caption += f" {above} row(s) far above stand at the upper edge." if above else ""
    return "Quality against effective bits", caption, svg


def _by_scheme(section: Section) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in _competing(section):
        found.setdefault(entry.result.scheme, []).append(entry)
    return found


def _block_errors(section: Section, methods: Sequence[str]) -> list[Drawn]:
    drawn = []
    for scheme, entries in _by_scheme(section).items():
        curves = []
        for entry in entries:
            series = methods.index(entry.result.method)
            kinds = [("accumulated_error", False), ("local_error", True)]
            for name, dashed in kinds[: 2 if len(entries) <= FEW else 1]:
                values = [(float(b.index), getattr(b, name)) for b in entry.result.blocks]
                values = [(x, y) for x, y in values if y is not None]
                label = f"{entry.row.label}: {name.replace('_', ' ')}"
                curves.append(plot.Line(label, values, series, dashed, entry.result.id))
        svg = plot.lines(curves, methods, "block", "error ÷ mean square of the target", whole_x=True)
        caption = (
            "Solid: with what the quantized blocks before it give. Dashed: the block alone, where measured."
        )
        drawn.append((f"Block errors at {scheme}", caption, svg))
    return drawn


def _training(section: Section, methods: Sequence[str]) -> list[Drawn]:
    drawn = []
    for scheme, entries in _by_scheme(section).items():
        curves = []
        for entry in entries:
            trained = [b.losses for b in entry.result.blocks if len(b.losses) > 1]
            trained = [losses for losses in trained if all(v > 0 and math.isfinite(v) for v in losses)]
            if not trained:
                continue
            n = min(map(len, trained))
            values = [
                (i + 1.0, math.exp(math.fsum(math.log(ls[i] / ls[0]) for ls in trained) / len(trained)))
                for i in range(n)
            ]
            label = f"{entry.row.label}: mean of {len(trained)} blocks"
            series = methods.index(entry.result.method)
            curves.append(plot.Line(label, values, series, row=entry.result.id))
        svg = plot.lines(curves, methods, "epoch", "loss ÷ that of the first epoch", whole_x=True)
        caption = "Geometric mean over blocks. Methods have different losses: compare shapes, not heights."
        drawn.append((f"Training at {scheme}", caption, svg))
    return drawn


def _option_effects(section: Section) -> list[Drawn]:
    """What one option does, from rows of a method that differ from its commonest setting in that option alone."""
    drawn = []
    key = section.perplexities[0] if section.perplexities else None
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in _competing(section):
        groups.setdefault((entry.result.method, entry.result.scheme), []).append(entry)
    for (method, scheme), entries in groups.items():
        if key is None or len(entries) < 3:
            continue
        centre = _centre(entries)
        if centre is None:
            continue
        bars = []
        for entry in entries:
            differing = _differing(entry, centre)
            metric = entry.result.metrics.get(key)
            effect = difference_of(entry.row, centre.row, key) if len(differing) == 1 else None
            if effect is None or metric is None or not metric.log_scale:
                continue
            value, low, high = (100 * math.expm1(v) for v in (effect.mean, effect.low, effect.high))
            setting = f"{differing[0]}={_said(entry.result.options.get(differing[0]))}"
            bars.append(plot.Effect(setting, value, low, high, entry.result.id))
        if len(bars) < 2:
            continue
        bars.sort(key=lambda bar: -bar.value)
        svg = plot.effects(bars, f"change of {short_name(key)}, %")
        caption = (
            "Each row against the commonest setting, which differs from it in this option alone; paired 95 % "
        )
        caption += "intervals, not corrected for their number. Right of zero is worse; pale: the interval holds zero."
        drawn.append((f"Options of {method} at {scheme}", caption, svg))
    return drawn


def _centre(entries: Sequence[Entry]) -> Entry | None:
    """The row whose every option has its commonest value, if there is one."""
    names = {name for entry in entries for name in entry.result.options}
    common = {
        name: Counter(_said(entry.result.options.get(name)) for entry in entries).most_common(1)[0][0]
        for name in names
    }
    matching = [
        e
        for e in entries
        if all(_said(e.result.options.get(name)) == value for name, value in common.items())
    ]
    return matching[0] if matching else None


def _differing(entry: Entry, centre: Entry) -> list[str]:
    names = {**centre.result.options, **entry.result.options}
    return [n for n in names if _said(entry.result.options.get(n)) != _said(centre.result.options.get(n))]


def _said(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
