"""The table in a terminal, fitted to its width without ever cutting a number.

When the terminal is too narrow, columns go in the order of `columns.DROP_ORDER`, least needed first, and a line below
says which. If the metrics alone are too wide, they are printed as several tables under each other, the costs last; the
metrics lose their ± only if that is not enough either.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qbench.reports.columns import COST, DROP_ORDER, Column, columns, is_best, legend
from qbench.reports.comparison import Comparison, ModelTable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LABEL_WIDTH = 24  # a longer label wraps between words


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
            console.print(part, crop=False)
            console.print()
    for line in legend(comparison, dropped):
        console.print(line, highlight=False, markup=False)


def _fit(table: ModelTable, comparison: Comparison, console: Console) -> tuple[list[Table], set[str]]:
    """The richest form that fits, and the kinds of column that it leaves out."""
    for form in _forms(table):
        parts = [columns(table, comparison, metrics, dropped) for metrics, dropped in form]
        if all(_width(part) <= console.width for part in parts):
            break
    # If nothing fits, the last form is printed too wide and the terminal breaks its lines: no digit is lost.
    left_out = set.intersection(*(dropped for _, dropped in form)) & _kinds(table, comparison)
    return [_draw(table, part) for part in parts], left_out


def _forms(table: ModelTable) -> Iterator[list[tuple[tuple[str, ...], set[str]]]]:
    """Ways to print a table, richest first; each is parts of (metrics, kinds of column left out)."""
    # Rows of mixed protocols always show theirs.
    order = [kind for kind in DROP_ORDER if kind != "contract" or len(table.contracts) == 1]
    for n in range(len(order)):
        yield [(table.metrics, set(order[:n]))]
    ratios, costs = {"ratio", "± of ratio"}, [kind for kind in order if kind in COST]
    for beside in (ratios | set(costs), set(order)):  # left out beside the metrics
        for n_chunks in range(2, len(table.metrics) + 1):
            size = -(-len(table.metrics) // n_chunks)
            chunks = [(table.metrics[i : i + size], beside) for i in range(0, len(table.metrics), size)]
            for n in range(len(costs)):
                yield [*chunks, ((), beside - set(costs[n:]))]
    yield [((key,), set(order)) for key in table.metrics] or [((), set(order))]


def _width(part: list[Column]) -> int:
    """Characters that a table needs, two blanks between columns."""
    return sum(map(_column_width, part)) + 2 * (len(part) - 1)


def _column_width(column: Column) -> int:
    from rich.cells import cell_len

    cells = max(map(cell_len, column.cells))
    return max(min(cells, LABEL_WIDTH) if column.kind == "method" else cells, *map(cell_len, column.header))


def _kinds(table: ModelTable, comparison: Comparison) -> set[str]:
    """Kinds of column that there is something to show of."""
    kinds = {column.kind for column in columns(table, comparison, table.metrics)}
    scores = [score for block in table.blocks for row in block.rows for score in row.scores.values()]
    kinds |= {"± of value"} if any(score.half_width is not None for score in scores) else set()
    kinds |= {"± of ratio"} if any(score.ratio_half_width is not None for score in scores) else set()
    return kinds


def _draw(table: ModelTable, shown: list[Column]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for column in shown:
        label = column.kind == "method"
        drawn.add_column(
            Text("\n".join(column.header)),
            justify="left" if column.kind in ("method", "scheme", "contract") else "right",
            no_wrap=not label,
            overflow="fold",
            min_width=_column_width(column),
        )
    line = 0
    for block in table.blocks:
        for row in block.rows:
            cells = [(column.kind, column.cells[line]) for column in shown]
            drawn.add_row(
                *(Text(cell, "bold" if kind == "value" and is_best(cell) else "") for kind, cell in cells),
                style="dim" if row.result.is_baseline else None,
            )
            line += 1
        drawn.add_section()
    return drawn
