"""The paired comparison of two rows: difference, interval, p-value, verdict, and what more would tell them apart.

A table compares every row with the best of its block and corrects for their number; this takes two rows, which may be
of different schemes, and says all that the data hold. One p-value per metric, not corrected for the number of metrics:
each is a question of its own.
"""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qbench.errors import ConfigError
from qbench.reports import stats
from qbench.reports.columns import SHORT_NAMES, format_half_width, format_value
from qbench.reports.comparability import (
    contract_differences,
    describe_differences,
    same_evaluation,
    seed_groups,
)
from qbench.reports.measured import AVERAGE, CORRECT, Measured, measured, task_keys
from qbench.results import Result, split_metric

FORMATS = ("table", "json", "csv")


@dataclass(frozen=True)
class PairedMetric:
    """One metric of both rows.

    Attributes:
        difference: A minus B with its interval; of losses in nats where values are perplexities. None where `why_not`.
        why_not: Why there is no interval.
        needed: Of windows, questions and seeds, what would separate the rows; None where they are, or nothing can.
        unit: What an item is: "windows" or "questions".
    """

    key: str
    a: Measured
    b: Measured
    difference: stats.Difference | None
    why_not: str | None
    needed: stats.Needed | None
    unit: str

    @property
    def better(self) -> Literal["A", "B"] | None:
        """Which row the data show to be the better; None if they cannot tell."""
        if self.difference is None or not self.difference.separates():
            return None
        return "A" if (self.difference.mean > 0) == self.a.higher_is_better else "B"

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """A ÷ B with the ends of its interval, for perplexities."""
        if self.difference is None or not self.a.log_scale:
            return None
        mean, low, high = (
            math.exp(min(x, 700)) for x in (self.difference.mean, self.difference.low, self.difference.high)
        )
        return mean, low, high


@dataclass(frozen=True)
class Pair:
    """Two rows, each of one or several seeds.

    Attributes:
        differences: What else than the method differs, where mixing was allowed.
        alone: Metrics that only one of the two has: key to "A" or "B".
    """

    a: tuple[Result, ...]
    b: tuple[Result, ...]
    metrics: tuple[PairedMetric, ...]
    differences: Mapping[str, tuple[str, ...]] | None
    alone: Mapping[str, str]

    @property
    def labels(self) -> tuple[str, str]:
        """Method, scheme and, where these are equal, what tells the rows apart."""
        one, other = self.a[0], self.b[0]
        names = [f"{r.method} {r.scheme_label}" for r in (one, other)]
        if names[0] == names[1]:
            keys = [k for k in {**one.options, **other.options} if one.options.get(k) != other.options.get(k)]
            for i, r in enumerate((one, other)):
                settings = [f"{key}={json.dumps(r.options.get(key, 'default'))}" for key in keys]
                names[i] += " " + (" ".join(settings) or f"#{r.id[:6]}")
        return names[0], names[1]


def pair(a: Sequence[Result], b: Sequence[Result], allow_mixed: bool = False) -> Pair:
    """Compare two rows, each given by the records of its seeds.

    Raises:
        ConfigError: If they differ in more than the method; `allow_mixed` compares all the same what was measured on
            the same windows and questions.
    """
    differences = contract_differences([*a, *b])
    if differences is not None and not allow_mixed:
        raise ConfigError(
            f"These two rows differ in more than the method: in {describe_differences(differences)}. "
            "Compare rows of one protocol, or allow it with --allow-mixed."
        )
    keys = [dict.fromkeys(key for result in side for key in result.metrics) for side in (a, b)]
    common = [key for key in keys[0] if key in keys[1]]
    tasks = task_keys(common)
    metrics = []
    for key in [*common, AVERAGE] if len(tasks) > 1 else common:
        one, other = measured(a, key, tasks), measured(b, key, tasks)
        if one is not None and other is not None:
            same = differences is None or all(
                same_evaluation(a[0], b[0], k) for k in (tasks if key == AVERAGE else [key])
            )
            metrics.append(_paired_metric(key, one, other, same))
    alone = {key: side for i, side in enumerate("AB") for key in keys[i] if key not in keys[1 - i]}
    return Pair(tuple(a), tuple(b), tuple(metrics), differences, alone)


def _paired_metric(key: str, a: Measured, b: Measured, same: bool) -> PairedMetric:
    unit = "questions" if {name for name, _ in a.what} == {CORRECT} else "windows"
    difference, why_not = None, None
    if a.scores is None or b.scores is None:
        why_not = "no values per item were kept"
    elif not same or not a.pairs_with(b):
        why_not = "not measured on the same items"
    elif not (a.scores.finite and b.scores.finite):
        why_not = "a loss is not finite"
    else:
        difference = stats.difference(a.scores, b.scores)
        why_not = "a single item shows no spread" if difference is None else None
    needed = None if difference is None or difference.separates() else stats.needed(difference)
    return PairedMetric(key, a, b, difference, why_not, needed, unit)


def match(a: Sequence[Result], b: Sequence[Result]) -> list[tuple[tuple[Result, ...], tuple[Result, ...]]]:
    """Which rows of one side are compared with which of the other; records that are seeds of each other are one row.

    One row on either side are a pair, whatever they are. Of more, those of one model and scheme where there is one on
    either side, or else of the same method and options too. Full precision is left out of more, and so is a record
    beside itself.
    """
    sides = [seed_groups(side) for side in (a, b)]
    if len(sides[0]) == len(sides[1]) == 1:
        return [(sides[0][0], sides[1][0])]
    sides = [[group for group in side if not group[0].is_baseline] for side in sides]
    pairs = []
    for place in dict.fromkeys((g[0].model, g[0].scheme) for g in sides[0]):
        here = [[g for g in side if (g[0].model, g[0].scheme) == place] for side in sides]
        if len(here[0]) == len(here[1]) == 1:
            pairs.append((here[0][0], here[1][0]))
            continue
        for group in here[0]:
            alike = [
                [g for g in side if (g[0].method, g[0].options) == (group[0].method, group[0].options)]
                for side in here
            ]
            if len(alike[0]) == len(alike[1]) == 1:
                pairs.append((group, alike[1][0]))
    return [(one, other) for one, other in pairs if one[0].id != other[0].id]


def render(pairs: Sequence[Pair], format: str, width: int) -> str:
    """Pairs as text for a terminal of this width, as JSON, or as CSV with a line per metric."""
    if format == "json":
        return json.dumps([_fields(p) for p in pairs], indent=2, allow_nan=False)
    if format == "csv":
        lines = [line for p in pairs for line in _flat_fields(p)]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]) if lines else ["model"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()
    return "\n\n".join("\n".join(_wrapped(p, width)) for p in pairs) + "\n"


def _wrapped(pair: Pair, width: int) -> Iterator[str]:
    for line in _lines(pair):
        indent = " " * (len(line) - len(line.lstrip()))
        yield from textwrap.wrap(
            line, width, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
        ) or [""]


def _lines(pair: Pair) -> Iterator[str]:
    """The comparison line by line, each a sentence that may be wrapped."""
    models = dict.fromkeys(side[0].model for side in (pair.a, pair.b))
    yield " and ".join(models)
    for name, label, results in zip("AB", pair.labels, (pair.a, pair.b), strict=True):
        seeds = f", mean of {len(results)} calibration seeds" if len(results) > 1 else ""
        yield f"{name}  {label}{seeds}  (contract {results[0].contract[:8]}, id {results[0].id[:8]})"
    if pair.differences is not None:
        yield f"Not the method alone differs: {describe_differences(pair.differences)}."
    for metric in pair.metrics:
        yield ""
        yield from _metric_lines(metric)
    if pair.alone:
        yield ""
        for side in "AB":
            names = [_name(key) for key, owner in pair.alone.items() if owner == side]
            if names:
                yield f"Only {side}: {', '.join(names)}"
    single = [
        n
        for n, side in zip("AB", (pair.a, pair.b), strict=True)
        if len(side) == 1 and not side[0].is_baseline
    ]
    if single and any(metric.difference is not None for metric in pair.metrics):
        yield ""
        yield (
            f"{' and '.join(single)}: one calibration seed. What another draw of calibration windows would change is "
            "not in these intervals."
        )


def _metric_lines(metric: PairedMetric) -> Iterator[str]:
    a, b = metric.a, metric.b
    n = f", {a.scores.n_items} {metric.unit}" if a.scores is not None else ""
    yield f"{_name(metric.key)} {'↑' if a.higher_is_better else '↓'}{n}"
    yield f"  A {_value(a)}   B {_value(b)}"
    seen = metric.difference
    if seen is None:
        yield f"  No interval: {metric.why_not}."
        return
    if metric.ratio is not None:
        ratio, low, high = metric.ratio
        yield f"  A ÷ B {_number(ratio)}, 95% interval {_number(low)} to {_number(high)}; {_p(seen.p_value)}"
    else:
        low_high = f"{_signed(seen.low)} to {_signed(seen.high)}"
        yield f"  A − B {_signed(seen.mean)}, 95% interval {low_high}; {_p(seen.p_value)}"
    if seen.discordant is not None:
        yield f"  right in A alone {seen.discordant[0]}, in B alone {seen.discordant[1]} (exact McNemar test)"
    if seen.variance.seed_share is not None:
        yield f"  {_source(seen, metric.unit)}"
    if metric.better is not None:
        yield f"  {metric.better} is better."
    else:
        yield f"  The data cannot tell them apart. {_advice(metric)}"


def _source(seen: stats.Difference, unit: str) -> str:
    """Which source of the interval's width dominates: what is worth having more of."""
    variance = seen.variance
    total = variance.total()
    if total == 0:
        return "no spread, neither between seeds nor between items"
    parts = {
        unit: variance.items,
        "calibration seeds": variance.seeds or 0.0,
        "their interaction": variance.both,
    }
    first = max(parts, key=lambda name: parts[name])
    shares = ", ".join(f"{name} {100 * part / total:.0f}%" for name, part in parts.items())
    verdict = f"{first} dominate" if first != "their interaction" else "more of either helps"
    alone = "; one row has a single seed, its spread is missing" if seen.one_sided_seeds else ""
    return f"spread from {shares}: {verdict}{alone}"


def _advice(metric: PairedMetric) -> str:
    needed = metric.needed
    if needed is None:
        return "No difference was seen."
    ways = []
    if needed.items is not None:
        ways.append(f"{_about(needed.items)} more {metric.unit}")
    if needed.seeds is not None:
        ways.append(f"{_about(needed.seeds)} more seeds")
    if not ways:
        return "No further number would, if the difference is the one seen."
    return f"If the difference is the one seen, {' or '.join(ways)} would, with 80% power."


def _about(n: int) -> str:
    """A number to two digits: it is an estimate from an estimate."""
    if n < 100:
        return str(n)
    digits = len(str(n)) - 2
    return f"about {round(n, -digits):,}"


def _name(key: str) -> str:
    task, metric = split_metric(key)
    return f"{task} {SHORT_NAMES.get(metric, metric)}"


def _value(own: Measured) -> str:
    interval = own.interval
    half = "" if interval is None else " " + format_half_width(interval[0], own.value)
    return format_value(own.value) + half.rstrip()


def _number(value: float) -> str:
    """A ratio: four digits after the point where it is near 1, three digits where it is far from it."""
    return (
        f"{value:.4f}" if abs(value - 1) < 0.1 else f"{value:.3f}" if 0.1 < value < 1000 else f"{value:.3g}"
    )


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _p(p_value: float) -> str:
    return "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _fields(pair: Pair) -> dict[str, Any]:
    """Everything, for programs."""
    sides = {
        name: {
            "label": label, "model": side[0].model, "method": side[0].method, "scheme": side[0].scheme,
            "options": side[0].options, "contract": side[0].contract, "ids": [result.id for result in side],
        }
        for name, label, side in zip("ab", pair.labels, (pair.a, pair.b), strict=True)
    }  # fmt: skip
    return {
        **sides,
        "differences": None
        if pair.differences is None
        else {k: list(v) for k, v in pair.differences.items()},
        "metrics": {metric.key: _metric_fields(metric) for metric in pair.metrics},
    }


def _metric_fields(metric: PairedMetric) -> dict[str, Any]:
    seen, needed = metric.difference, metric.needed
    ratio = metric.ratio or (None, None, None)
    return {
        "a": _finite(metric.a.value),
        "b": _finite(metric.b.value),
        "higher_is_better": metric.a.higher_is_better,
        "n": metric.a.scores.n_items if metric.a.scores else None,
        "unit": metric.unit,
        "scale": "nats" if metric.a.log_scale else "value",
        "difference": seen and _finite(seen.mean),
        "low_95": seen and _finite(seen.low),
        "high_95": seen and _finite(seen.high),
        "ratio": _finite(ratio[0]),
        "ratio_low_95": _finite(ratio[1]),
        "ratio_high_95": _finite(ratio[2]),
        "p": seen and seen.p_value,
        "test": seen and seen.test,
        "only_a": seen.discordant[0] if seen and seen.discordant else None,
        "only_b": seen.discordant[1] if seen and seen.discordant else None,
        "seed_share": seen.variance.seed_share if seen else None,
        "better": metric.better and metric.better.lower(),
        "why_not": metric.why_not,
        "items_needed": needed.items if needed else None,
        "seeds_needed": needed.seeds if needed else None,
    }


def _flat_fields(pair: Pair) -> Iterator[dict[str, Any]]:
    for metric in pair.metrics:
        labels = dict(zip(("row_a", "row_b"), pair.labels, strict=True))
        yield {"model": pair.a[0].model, **labels, "metric": metric.key, **_metric_fields(metric)}
