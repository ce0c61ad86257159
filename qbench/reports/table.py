"""The table in a terminal, fitted to its width without ever cutting a number.

When the terminal is too narrow, columns go in the order of `columns.DROP_ORDER`, least needed first, and a line below
says which. If the metrics alone are too wide, they are printed as several tables under each other, the costs last; the
metrics lose their ± only if that is not enough either.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qbench.reports.columns import COST, DROP_ORDER, Column, columns, detail_keys, is_best, legend
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

    def width(metrics: tuple[str, ...], dropped: set[str]) -> int:
        return _width(columns(table, comparison, metrics, dropped))

    for form in _forms(table, console.width, width):
        if all(width(metrics, dropped) <= console.width for metrics, dropped in form):
            break
    # If nothing fits, the last form is printed too wide and the terminal breaks its lines: no digit is lost.
    left_out = set.intersection(*(dropped for _, dropped in form)) & _kinds(table, comparison)
    drawn = [_draw(table, columns(table, comparison, metrics, dropped)) for metrics, dropped in form]
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
    kinds |= {"details"} if detail_keys(table.metrics) else set()
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
