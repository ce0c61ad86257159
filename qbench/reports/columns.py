"""Columns and numbers: how a comparison's values are written, the same in a terminal, in Markdown and in LaTeX.

Digits follow the papers (12.34), ± follows its value's decimals, and a missing value is a dash, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

from qbench.reports.comparison import Comparison, ModelTable, Row, Score
from qbench.reports.measured import ACCURACIES, AVERAGE, task_keys
from qbench.results import BASELINE, split_metric

MISSING = "—"
SHORT_NAMES = {
    "perplexity": "ppl", "word_perplexity": "word ppl", "kl_mean": "KL", "top1_agreement": "top-1", BASELINE: "FP"
}  # fmt: skip
# Further views of one measurement; acc_norm is one where the task has acc as well.
DETAILS = frozenset(
    {"kl_median", "kl_p95", "kl_p99", "kl_max", "kl_missing", "loss_change", "first_difference"}
)
GUESSED = "° not shown to be above what guessing gives"
GIB = 1 << 30
LABEL_WIDTH = 24  # a longer label wraps between words
# Least needed first: what a narrow terminal leaves out. Method, scheme and the values themselves always stay.
DROP_ORDER = (
    "details", "recovery", "contract", "CPU memory", "GPU memory", "time", "spread of seeds", "± of ratio",
    "bits/weight", "ratio", "± of value",
)  # fmt: skip
COST = {"bits/weight", "time", "GPU memory", "CPU memory", "contract"}


@dataclass(frozen=True)
class Column:
    """One column of one model's table: the header's lines, and a cell for each row of each block."""

    kind: str  # a name of DROP_ORDER, or "method", "scheme", "value", which stay
    header: tuple[str, ...]
    cells: tuple[str, ...]

    @property
    def title(self) -> str:
        """The header in one line."""
        return " ".join(self.header).replace("/ ", "/")

    @cached_property
    def empty(self) -> bool:
        """Whether no row has a value, so that the column need not be shown."""
        return self.kind != "value" and all(cell == MISSING for cell in self.cells)

    @cached_property
    def width(self) -> int:
        """Characters that it takes in a terminal; a long label is wrapped between words."""
        cells = max(map(cell_width, self.cells))
        if self.kind == "method":
            longest = max(cell_width(word) for cell in self.cells for word in cell.split())
            cells = min(cells, max(LABEL_WIDTH, longest))
        return max(cells, *map(cell_width, self.header))


class TableColumns:
    """The columns of one model's table, each made once: a narrow terminal tries many choices of them."""

    def __init__(self, table: ModelTable, comparison: Comparison) -> None:
        self.table, self.comparison = table, comparison
        self.rows = [row for block in table.blocks for row in block.rows]
        self.details = detail_keys(table.metrics)
        self._metrics: dict[tuple[str, bool, bool], list[Column]] = {}

    def __call__(self, metrics: Sequence[str], dropped: Set[str] = frozenset()) -> list[Column]:
        """Those of some metrics that are not dropped and not empty throughout."""
        shown = [key for key in metrics if "details" not in dropped or key not in self.details]
        found = [
            *self._labels,
            *(column for key in shown for column in self._metric(key, dropped)),
            *self._costs,
        ]
        return [column for column in found if column.kind not in dropped and not column.empty]

    @cached_property
    def _labels(self) -> list[Column]:
        return [
            Column("method", ("method",), tuple(_label(row, self.comparison) for row in self.rows)),
            Column("scheme", ("scheme",), tuple(row.result.scheme_label for row in self.rows)),
        ]

    @cached_property
    def _costs(self) -> list[Column]:
        rows = self.rows
        bits = tuple(_bits(row.result.bits_per_weight) for row in rows)
        gpu, cpu = (
            tuple(_gib(most(getattr(result.cost, field) for result in row.results)) for row in rows)
            for field in ("peak_gpu_bytes", "peak_cpu_bytes")
        )
        return [
            Column("bits/weight", ("bits/", "weight"), bits),
            Column("time", ("time",), tuple(format_seconds(row.seconds) for row in rows)),
            Column("GPU memory", ("GPU", "GiB"), gpu),
            Column("CPU memory", ("CPU", "GiB"), cpu),
            Column("contract", ("contract",), tuple(row.result.contract[:8] for row in rows)),
        ]

    def _metric(self, key: str, dropped: Set[str]) -> list[Column]:
        form = (key, "± of value" not in dropped, "± of ratio" not in dropped)
        if form not in self._metrics:
            self._metrics[form] = _metric_columns(self.table, self.comparison, self.rows, *form)
        return self._metrics[form]


def columns(
    table: ModelTable, comparison: Comparison, metrics: Sequence[str], dropped: Set[str] = frozenset()
) -> list[Column]:
    """All columns that are not dropped and not empty throughout."""
    return TableColumns(table, comparison)(metrics, dropped)


def _metric_columns(
    table: ModelTable,
    comparison: Comparison,
    rows: Sequence[Row],
    key: str,
    with_value: bool,
    with_ratio: bool,
) -> list[Column]:
    """A metric's values; where a row is judged by it also what is left of the reference's, and the seeds' spread.

    `with_value` and `with_ratio` say whether ± stands behind them.
    """
    reference = SHORT_NAMES.get(comparison.reference, comparison.reference)
    scores = [row.scores.get(key) for row in rows]
    task, metric = split_metric(key)
    higher = any(score.higher_is_better for score in scores if score is not None)
    name = f"{SHORT_NAMES.get(metric, metric)} {'↑' if higher else '↓'}"
    found = [Column("value", (*_folded(task), name), _values(scores, with_value))]
    if not _stands_for_quality(table, key):
        return found
    if higher:
        found.append(Column("ratio", (f"% of {reference}",), _shares(scores, with_ratio)))
    else:
        found.append(Column("ratio", (f"÷ {reference}",), _ratios(scores, with_ratio)))
        found.append(Column("recovery", (f"% of {reference}",), _shares(scores, False)))
    spreads = [None if score is None or score.seed_spread is None else score for score in scores]
    found.append(Column("spread of seeds", ("σ of", "seeds"), tuple(map(_spread, spreads))))
    return found


def _stands_for_quality(table: ModelTable, key: str) -> bool:
    """Whether a row is judged by this metric: a perplexity, the average of tasks, or a task where there is but one."""
    metric = split_metric(key)[1]
    if metric in ACCURACIES:
        return key == AVERAGE or (AVERAGE not in table.metrics and key in task_keys(table.metrics))
    return metric.endswith("perplexity")


def detail_keys(metrics: Sequence[str]) -> frozenset[str]:
    """Metrics that a table can do without: further quantiles, and the other accuracy of a task."""
    averaged = task_keys(metrics)
    names = {key: split_metric(key)[1] for key in metrics}
    return frozenset(
        key
        for key, name in names.items()
        if name in DETAILS or (name in ACCURACIES and key != AVERAGE and key not in averaged)
    )


def legend(comparison: Comparison, dropped: Set[str] = frozenset(), best: str = "*") -> list[str]:
    """What stands below a table: marks (`best` being how the best is marked), protocols, columns left out, notes."""
    lines = []
    scores = [s for t in comparison.tables for b in t.blocks for row in b.rows for s in row.scores.values()]
    marks = {score.mark for score in scores}
    if "best" in marks:
        tied = "; ≈ tied with it (paired, 95%, Holm)" if "tied" in marks else ""
        lines.append(f"{best} best of its scheme{tied}")
    reference = SHORT_NAMES.get(comparison.reference, comparison.reference)
    if any(score.half_width is not None for score in scores) and "± of value" not in dropped:
        shown = [s for s in scores if s.ratio_half_width is not None and "± of ratio" not in dropped]
        paired = (
            f"; of ÷ {reference}: paired window by window"
            if any(not s.higher_is_better for s in shown)
            else ""
        )
        paired += (
            f"; of % of {reference}: paired question by question"
            if any(s.higher_is_better for s in shown)
            else ""
        )
        lines.append("± 95% interval" + paired)
    guessed = {
        split_metric(key)[0]: f"{score.chance:.3g}"
        for table in comparison.tables
        for key in table.metrics
        for block in table.blocks
        for score in (row.scores[key] for row in block.rows if key in row.scores)
        if score.above_chance is False
    }
    if guessed:
        chances = ", ".join(f"{task} {chance}" for task, chance in guessed.items())
        lines.append(f"{GUESSED} ({chances}); where full precision is not, rows are not ranked")
    if any(score.n_seeds > 1 for score in scores):
        lines.append(
            "several calibration seeds: values are means over them, ± counts their spread; σ is its size (how many)"
        )
    lines += _protocols(comparison)
    contracts = dict.fromkeys(contract[:8] for table in comparison.tables for contract in table.contracts)
    lines.append(f"contract {', '.join(contracts)}")
    for table in comparison.tables:
        hashes = " / ".join(contract[:8] for contract in table.contracts)
        if table.mixed:
            named = ", ".join(f"{name} ({' / '.join(values)})" for name, values in table.differences.items())
            lines.append(f"different protocols {hashes}: {named or 'in fields that were not recorded'}")
        elif len(table.contracts) > 1:
            lines.append(f"contracts {hashes} differ only in what else was measured")
    if dropped:
        names = [kind for kind in DROP_ORDER if kind in dropped]
        lines.append(f"not shown at this width: {', '.join(names)} (--format csv has everything)")
    return lines + [f"[{number}] {note}" for note, number in comparison.footnotes.items()]


def _protocols(comparison: Comparison) -> list[str]:
    """What each task was measured on, with the names of the metrics that share it."""
    sharing: dict[tuple[str, str], dict[str, None]] = {}
    for table in comparison.tables:
        for key, protocol in table.protocols.items():
            task, metric = split_metric(key)
            sharing.setdefault((task, protocol), {})[SHORT_NAMES.get(metric, metric)] = None
    return [f"{task} {', '.join(metrics)}: {protocol}" for (task, protocol), metrics in sharing.items()]


def _label(row: Row, comparison: Comparison) -> str:
    numbers = ",".join(str(comparison.footnotes[note]) for note in row.notes)
    return f"{row.label} [{numbers}]" if numbers else row.label


def _folded(task: str, width: int = 14) -> tuple[str, ...]:
    """A task's name in header lines of at most 14 characters."""
    return tuple(task[i : i + width] for i in range(0, len(task), width))


def format_value(value: float) -> str:
    """About four significant digits, as papers print a perplexity, three below 0.01: what is not 0 never shows as 0."""
    if not math.isfinite(value):
        return "∞" if value > 0 else MISSING
    size = abs(value)
    return f"{value:.{_decimals(size)}f}" if size == 0 or 1e-6 <= size < 1e5 else f"{value:.2e}"


def _decimals(size: float) -> int:
    if 0 < size < 0.01:
        return 2 - math.floor(math.log10(size))
    return 3 if size < 10 else 2 if size < 1000 else 1


def format_half_width(half_width: float, value: float) -> str:
    """± with the value's decimals, or with one significant digit where those would show ±0."""
    if not math.isfinite(half_width):
        return ""
    if half_width == 0 or abs(value) >= 1e5 or 0 < abs(value) < 1e-6:
        return f"±{half_width:.2g}"
    return f"±{half_width:.{max(_decimals(abs(value)), -math.floor(math.log10(half_width)))}f}"


def format_seconds(seconds: float) -> str:
    """12.3s, 4m05s, 1h02m; a row that took no time has none."""
    if seconds <= 0:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _bits(bits: float | None) -> str:
    return MISSING if bits is None else f"{bits:.2f}"


def _gib(size: int | None) -> str:
    return MISSING if size is None else f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def cell_width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def is_best(cell: str) -> bool:
    """Whether a value's cell carries the mark of the best."""
    return cell.endswith("*")


def _values(scores: Sequence[Score | None], with_interval: bool) -> tuple[str, ...]:
    """Cells such as `12.34 ±0.56 *`: digits, ± and mark each in line with those of the other rows."""
    marks = [{"best": " *", "tied": " ≈"}.get(score.mark or "", "") if score else "" for score in scores]
    pairs = [
        None if score is None else (score.value, score.half_width if with_interval else None)
        for score in scores
    ]
    return _aligned(pairs, marks, [score is not None and score.above_chance is False for score in scores])


def _ratios(scores: Sequence[Score | None], with_interval: bool) -> tuple[str, ...]:
    pairs = [
        None if score is None or score.ratio is None
        else (score.ratio, score.ratio_half_width if with_interval else None)
        for score in scores
    ]  # fmt: skip
    return _aligned(pairs, [""] * len(pairs))


def _shares(scores: Sequence[Score | None], with_interval: bool) -> tuple[str, ...]:
    """Recovery in percent; one decimal, since the third digit of a perplexity's is noise."""
    cells = []
    for score in scores:
        if score is None or score.recovery is None:
            cells.append(MISSING)
            continue
        half = score.recovery_half_width if with_interval else None
        cells.append(f"{100 * score.recovery:.1f}" + ("" if half is None else f" ±{100 * half:.1f}"))
    width = max((len(cell.partition(" ")[2]) for cell in cells), default=0)
    parts = [cell.partition(" ") for cell in cells]
    return tuple(
        cell if cell == MISSING or not width else f"{number} {half.ljust(width)}"
        for cell, (number, _, half) in zip(cells, parts, strict=True)
    )


def _spread(score: Score | None) -> str:
    if score is None or score.seed_spread is None:
        return MISSING
    return f"{format_half_width(score.seed_spread, score.value).removeprefix('±')} ({score.n_seeds})"


def most(sizes: Iterable[int | None]) -> int | None:
    """The largest of what was measured."""
    return max((size for size in sizes if size is not None), default=None)


def _aligned(
    pairs: Sequence[tuple[float, float | None] | None], marks: Sequence[str], guesses: Sequence[bool] = ()
) -> tuple[str, ...]:
    halves = ["" if p is None or p[1] is None else " " + format_half_width(p[1], p[0]) for p in pairs]
    halves = [half + ("°" if i < len(guesses) and guesses[i] else "") for i, half in enumerate(halves)]
    half, mark = max(map(len, halves), default=0), max(map(len, marks), default=0)
    return tuple(
        MISSING if pair is None else format_value(pair[0]) + halves[i].ljust(half) + marks[i].ljust(mark)
        for i, pair in enumerate(pairs)
    )
