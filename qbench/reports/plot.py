"""Plots as inline SVG: a few hundred bytes a line, sharp at any size, in the page's own colours, without a script.

Written by hand because matplotlib's SVG brings its fonts as paths and its colours as constants: twenty times as long,
and black on black in a dark page. Colours are CSS variables (`--c0` … of the page); a mark has a `<title>`, which is
its tooltip and what a screen reader says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 80, 16, 14, 50
COLLAPSED = 20  # times the best value: above it a row is drawn at the plot's edge, so that the others can be told apart
FAR = 8  # times the median end of an interval: where an effect is drawn at the edge
N_COLOURS = 8
SHAPES = ("circle", "square", "diamond", "up", "down", "cross", "star", "bar")


@dataclass(frozen=True)
class Point:
    """One mark. `row` is the id of the record that a click opens."""

    x: float
    y: float
    label: str
    series: int = 0
    half_width: float | None = None
    row: str = ""
    filled: bool = True


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    values: Sequence[tuple[float, float]]
    series: int = 0
    dashed: bool = False
    row: str = ""


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value; values beyond an end stay at it."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value
        )  # fmt: skip
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, -0.02), 1.02) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round values within the axis."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next((m * power for m in (1, 2, 2.5, 5) if m * power >= step * 0.999), 10 * power)


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(ticks) >= 3:
            return ticks[:: max(1, len(ticks) // 6)]
    return [low, high]


def _axis(values: Sequence[float], start: float, end: float, log: bool, pad: float = 0.06) -> Axis:
    low, high = min(values), max(values)
    if log:
        reach = math.log(high / low) * pad if high > low else 0.05
        return Axis(low * math.exp(-reach), high * math.exp(reach), start, end, True)
    reach = (high - low) * pad if high > low else abs(high) * 0.05 + 1e-9
    return Axis(low - reach, high + reach, start, end)


def scatter(
    points: Sequence[Point],
    fronts: Sequence[Sequence[Point]],
    series: Sequence[str],
    x_title: str,
    y_title: str,
    reference: float | None = None,
) -> str:
    """Points with error bars, and lines along the fronts.

    Args:
        points: Those with values that are not finite are left out, and the caption says how many.
        fronts: Each a list of points in order of x.
        series: Names by series number, for the legend.
        x_title: What is on the x axis.
        y_title: What is on the y axis; it becomes logarithmic if values span more than a factor of 4.
        reference: Height of a horizontal line: full precision.
    """
    shown = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not shown:
        return ""
    ys = [p.y for p in shown] + ([] if reference is None else [reference])
    ys = [y for y in ys if not is_collapsed(y, ys)]
    log = min(ys) > 0 and max(ys) > 4 * min(ys)
    spread = [p.y + s * (p.half_width or 0) for p in shown for s in (-1, 1)]
    spread = [y for y in spread if min(ys) / 2 < y < 2 * max(ys)] + ys
    xs = _axis([p.x for p in shown], LEFT, WIDTH - RIGHT, False)
    vertical = _axis(spread, HEIGHT - BOTTOM, TOP, log)
    parts = [_frame(xs, vertical, x_title, y_title)]
    if reference is not None:
        parts.append(f'<path class="reference" d="M{LEFT} {vertical(reference):.1f}H{WIDTH - RIGHT}"/>')
    for front in fronts:
        places = " ".join(f"{xs(p.x):.1f},{vertical(p.y):.1f}" for p in front if math.isfinite(p.y))
        parts.append(f'<polyline class="frontline" points="{places}"/>')
    for point in shown:
        x, y = xs(point.x), vertical(point.y)
        bar = ""
        if point.half_width and math.isfinite(point.half_width) and not is_collapsed(point.y, ys):
            high = vertical(point.y + point.half_width)
            low = vertical(max(point.y - point.half_width, vertical.low))
            bar = f'<path class="bar" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
        role = f' data-row="{escape(point.row)}" tabindex="0" role="button"' if point.row else ""
        parts.append(
            f'<g class="mark s{point.series % N_COLOURS}{"" if point.filled else " hollow"}"{role}>'
            f"<title>{escape(point.label)}</title>{bar}{_shape(point.series, x, y)}</g>"
        )
    label = f"{y_title} against {x_title}, {len(shown)} rows"
    return _svg(parts, label) + _legend(series, sorted({p.series for p in shown}), marks=True)


def is_collapsed(value: float, values: Sequence[float]) -> bool:
    """Whether a value is so far above the least that no axis should hold both."""
    return min(values) > 0 and value > COLLAPSED * min(values)


def lines(
    curves: Sequence[Line], series: Sequence[str], x_title: str, y_title: str, whole_x: bool = False
) -> str:
    """Curves; the y axis becomes logarithmic if positive values span more than a factor of 4."""
    curves = [
        Line(c.label, [(x, y) for x, y in c.values if math.isfinite(y)], c.series, c.dashed, c.row)
        for c in curves
    ]
    curves = [curve for curve in curves if curve.values]
    if not curves:
        return ""
    ys = [y for curve in curves for _, y in curve.values]
    log = min(ys) > 0 and max(ys) > 4 * min(ys)
    xs = _axis([x for curve in curves for x, _ in curve.values], LEFT, WIDTH - RIGHT, False, 0.02)
    vertical = _axis(ys, HEIGHT - BOTTOM, TOP, log)
    parts = [_frame(xs, vertical, x_title, y_title, whole_x)]
    for curve in curves:
        places = " ".join(f"{xs(x):.0f},{vertical(y):.1f}" for x, y in curve.values)
        kind = f"curve s{curve.series % N_COLOURS}{' dashed' if curve.dashed else ''}"
        if len(curve.values) == 1:
            x, y = curve.values[0]
            body = f'<circle class="{kind} dot" cx="{xs(x):.1f}" cy="{vertical(y):.1f}" r="4"/>'
        else:
            body = f'<polyline class="{kind}" points="{places}"/>'
        role = f' data-row="{escape(curve.row)}"' if curve.row else ""
        parts.append(f"<g{role}><title>{escape(curve.label)}</title>{body}</g>")
    label = f"{y_title} against {x_title}, {len(curves)} curves"
    return _svg(parts, label) + _legend(series, sorted({c.series for c in curves}), marks=False)


@dataclass(frozen=True)
class Effect:
    """One bar of an effects plot, with its 95% interval."""

    label: str
    value: float
    low: float
    high: float
    row: str = ""


def effects(bars: Sequence[Effect], x_title: str) -> str:
    """Effects with intervals, one below the other; an interval that holds zero is drawn pale.

    Values many times those of most others stay at the plot's edge, with their value beside the label, so that the
    others can be told apart.
    """
    bars = [bar for bar in bars if all(map(math.isfinite, (bar.value, bar.low, bar.high)))]
    if not bars:
        return ""
    left, row_height = 210, 26
    height = TOP + BOTTOM + row_height * len(bars)
    ends = [v for bar in bars for v in (bar.low, bar.high)]
    limit = FAR * median(map(abs, ends))
    ends = [v for v in ends if abs(v) <= limit] if limit else ends
    axis = _axis([0.0, *ends], left, WIDTH - RIGHT, False)
    parts = []
    for tick in axis.ticks():
        parts.append(
            f'<path class="grid" d="M{axis(tick):.1f} {TOP}V{height - BOTTOM}"/>'
            f'<text class="tick" x="{axis(tick):.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">'
            f"{_number(tick)}</text>"
        )
    parts.append(f'<path class="zero" d="M{axis(0):.1f} {TOP}V{height - BOTTOM}"/>')
    for i, bar in enumerate(bars):
        y = TOP + row_height * (i + 0.5)
        sure = "" if bar.low > 0 or bar.high < 0 else " unsure"
        role = f' data-row="{escape(bar.row)}" tabindex="0" role="button"' if bar.row else ""
        said = f"{bar.label}: {_number(bar.value)} [{_number(bar.low)}, {_number(bar.high)}]"
        far = "" if not limit or abs(bar.value) <= limit else f" ({bar.value:+.3g})"
        shown = _cut(bar.label, 32 - len(far)) + far
        parts.append(
            f'<g class="mark s{0 if bar.value > 0 else 1}{sure}"{role}><title>{escape(said)}</title>'
            f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(shown)}</text>'
            f'<path class="bar wide" d="M{axis(bar.low):.1f} {y:.1f}H{axis(bar.high):.1f}"/>'
            f'<circle cx="{axis(bar.value):.1f}" cy="{y:.1f}" r="5"/></g>'
        )
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(_text("title", middle, height - 10, x_title))
    return _svg(parts, f"{x_title}, {len(bars)} settings", height)


def standalone(svg: str) -> str:
    """A plot as a file of its own, with the page's light and dark colours."""
    style = (
        "svg{--ink:#57606a;--line:#d8dee4;--paper:#fff;--c0:#2857c4;--c1:#c2410c;background:var(--paper);"
        "font-family:system-ui,sans-serif}@media(prefers-color-scheme:dark){svg{--ink:#9aa4b2;--line:#333b45;"
        "--paper:#14181d;--c0:#8fb0ff;--c1:#fb9a6b}}text{fill:var(--ink);font-size:12px}.grid{stroke:var(--line)}"
        ".zero{stroke:var(--ink);stroke-dasharray:4 4}.s0{fill:var(--c0);stroke:var(--c0)}"
        ".s1{fill:var(--c1);stroke:var(--c1)}.mark text{stroke:none}.bar{stroke-width:4;opacity:.45}"
        ".unsure>:not(text){opacity:.4}.mark text{fill:var(--ink)}"
    )
    opening = '<svg xmlns="http://www.w3.org/2000/svg" '
    head, _, rest = svg.removeprefix("<svg ").partition(">")
    return f"{opening}{head}><style>{style}</style>{rest}\n"


def _svg(parts: Sequence[str], label: str, height: float = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="group" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _frame(x: Axis, y: Axis, x_title: str, y_title: str, whole_x: bool = False) -> str:
    parts = []
    ticks = [t for t in x.ticks() if not whole_x or t == round(t)]
    for tick in ticks:
        parts.append(
            f'<path class="grid" d="M{x(tick):.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
            + _text("tick", x(tick), HEIGHT - BOTTOM + 18, _number(tick))
        )
    for tick in y.ticks():
        parts.append(
            f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(_text("title", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_title))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="title" transform="translate(15 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title + (' (log)' if y.log else ''))}</text>"
    )
    return "".join(parts)


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _legend(names: Sequence[str], used: Sequence[int], marks: bool) -> str:
    items = []
    for i in used:
        mark = _shape(i, 8, 8) if marks else '<path d="M1 8H15"/>'
        kind = f"mark s{i % N_COLOURS}" if marks else f"curve s{i % N_COLOURS}"
        icon = f'<svg viewBox="0 0 16 16" aria-hidden="true"><g class="{kind}">{mark}</g></svg>'
        items.append(f"<li>{icon}{escape(names[i])}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _shape(series: int, x: float, y: float) -> str:
    """Shape and colour both tell the series, so that neither colour vision nor a printer is needed."""
    r = 5.0
    drawn: dict[str, Callable[[], str]] = {
        "circle": lambda: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>',
        "square": lambda: f'<path d="M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z"/>',
        "diamond": lambda: f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>',
        "up": lambda: f'<path d="M{x:.1f} {y - 6:.1f}l6 11h-12z"/>',
        "down": lambda: f'<path d="M{x:.1f} {y + 6:.1f}l6 -11h-12z"/>',
        "cross": lambda: f'<path d="M{x - 2:.1f} {y - 6:.1f}h4v4h4v4h-4v4h-4v-4h-4v-4h4z"/>',
        "star": lambda: f'<path d="M{x:.1f} {y - 7:.1f}l2 5l5 2l-5 2l-2 5l-2 -5l-5 -2l5 -2z"/>',
        "bar": lambda: f'<path d="M{x - 6:.1f} {y - 2.5:.1f}h12v5h-12z"/>',
    }
    return drawn[SHAPES[series % len(SHAPES)]]()


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _number(value: float) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
