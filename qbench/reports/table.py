"""The table in a terminal, fitted to its width without ever cutting a number.

When the terminal is too narrow, columns go in the order of `columns.DROP_ORDER`, least needed first, and a line below
says which. If the metrics alone are too wide, they are printed as several tables under each other, the costs last; the
metrics lose their ± only if that is not enough either.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qbench.reports.columns import (
    COST,
    DROP_ORDER,
    Column,
    TableColumns,
    cell_width,
    detail_keys,
    is_best,
    legend,
)
from qbench.reports.comparison import Comparison, ModelTable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

GAP = "  "  # between columns


def as_text(comparison: Comparison, width: int | None = None) -> str:
    """The table without colours, for a terminal of this width; default: the real one's."""
    from rich.console import Console

    file = io.StringIO()
    print_table(comparison, Console(file=file, width=width, color_system=None))
    return file.getvalue()


def print_table(comparison: Comparison, console: Console) -> None:
    """Print for a terminal: best rows bold, the full-precision row dim, notes below."""
    dropped: set[str] = set()
    for table in comparison.tables:
        console.print(table.model, style="bold", highlight=False, markup=False)
        drawn, left_out = _fit(table, comparison, console)
        dropped |= left_out
        for part in drawn:
            console.print(part, soft_wrap=True)
    for line in legend(comparison, dropped):
        console.print(line, highlight=False, markup=False)


def _fit(table: ModelTable, comparison: Comparison, console: Console) -> tuple[list[Text], set[str]]:
    """The richest form that fits, and the kinds of column that it leaves out."""
    part = TableColumns(table, comparison)

    def width(metrics: tuple[str, ...], dropped: set[str]) -> int:
        return _width(part(metrics, dropped))

    for form in _forms(table, console.width, width):
        if all(width(metrics, dropped) <= console.width for metrics, dropped in form):
            break
    # If nothing fits, the last form is printed too wide and the terminal breaks its lines: no digit is lost.
    left_out = set.intersection(*(dropped for _, dropped in form)) & _kinds(part)
    drawn = [_draw(table, part(metrics, dropped)) for metrics, dropped in form]
    return drawn, left_out


Part = tuple[tuple[str, ...], set[str]]  # metrics, and the kinds of column left out beside them


def _forms(
    table: ModelTable, available: int, width: Callable[[tuple[str, ...], set[str]], int]
) -> Iterator[list[Part]]:
    """Ways to print a table, richest first."""
    # Rows of mixed protocols always show theirs.
    order = [kind for kind in DROP_ORDER if kind != "contract" or len(table.contracts) == 1]
    main = tuple(key for key in table.metrics if key not in detail_keys(table.metrics))
    for n in range(len(order)):
        yield [(table.metrics, set(order[:n]))]
    costs = [kind for kind in order if kind in COST]
    for kept in ({"ratio", "± of value"}, {"± of value"}, set()):
        beside = set(order) - kept
        parts = _packed(main, beside, available, width)
        for n in range(len(costs)):
            yield [*parts, ((), set(order) - set(costs[n:]))]
    yield [((key,), set(order)) for key in main] or [((), set(order))]


def _packed(
    metrics: tuple[str, ...],
    beside: set[str],
    available: int,
    width: Callable[[tuple[str, ...], set[str]], int],
) -> list[Part]:
    """Metrics in as few tables as they fit into, in their order."""
    parts: list[tuple[str, ...]] = []
    for key in metrics:
        if parts and width((*parts[-1], key), beside) <= available:
            parts[-1] = (*parts[-1], key)
        else:
            parts.append((key,))
    return [(part, beside) for part in parts]


def _width(part: list[Column]) -> int:
    """Characters that a table needs."""
    return sum(column.width for column in part) + len(GAP) * (len(part) - 1)


def _kinds(part: TableColumns) -> set[str]:
    """Kinds of column that there is something to show of."""
    table = part.table
    kinds = {column.kind for column in part(table.metrics)}
    scores = [score for block in table.blocks for row in block.rows for score in row.scores.values()]
    kinds |= {"± of value"} if any(score.half_width is not None for score in scores) else set()
    kinds |= {"details"} if part.details else set()
    kinds |= {"± of ratio"} if any(score.ratio_half_width is not None for score in scores) else set()
    return kinds


def _draw(table: ModelTable, shown: list[Column]) -> Text:
    """The table as lines of one text: rich's own tables take seconds for 1,000 rows, and strip cells' last blanks."""
    from rich.text import Text

    widths = [column.width for column in shown]
    height = max(len(column.header) for column in shown)
    headers = [("",) * (height - len(column.header)) + column.header for column in shown]
    drawn = Text()
    for line in zip(*headers, strict=True):
        drawn.append(_joined(shown, widths, line) + "\n", "bold")
    drawn.append("─" * _width(shown) + "\n")
    i = 0
    for block in table.blocks:
        if i:
            drawn.append("\n")
        for row in block.rows:
            _draw_row(drawn, shown, widths, i, "dim" if row.result.is_baseline else "")
            i += 1
    return drawn


def _draw_row(drawn: Text, shown: list[Column], widths: list[int], i: int, style: str) -> None:
    """One row, in as many lines as its label needs."""
    cells = [
        textwrap.wrap(column.cells[i], width, break_on_hyphens=False)
        if column.kind == "method"
        else [column.cells[i]]
        for column, width in zip(shown, widths, strict=True)
    ]
    for line in itertools.zip_longest(*cells, fillvalue=""):
        start = len(drawn)
        text = _joined(shown, widths, line)
        drawn.append(text + "\n", style)
        place = start
        for column, width, cell in zip(shown, widths, line, strict=True):
            if column.kind == "value" and is_best(cell):
                drawn.stylize("bold", place, place + width)
            place += width + len(GAP)


def _joined(shown: list[Column], widths: list[int], cells: Sequence[str]) -> str:
    """One line: words to the left, numbers to the right."""
    left = [column.kind in ("method", "scheme", "contract") for column in shown]
    padded = [
        cell + " " * (width - cell_width(cell)) if flag else " " * (width - cell_width(cell)) + cell
        for cell, width, flag in zip(cells, widths, left, strict=True)
    ]
    return GAP.join(padded).rstrip()
