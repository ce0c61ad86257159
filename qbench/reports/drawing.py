"""Sheets as text: terminal, Markdown, LaTeX (booktabs). Everything that comes from a record is escaped."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qbench.reports.columns import GUESSED
from qbench.reports.export import escape_latex, escape_markdown
from qbench.reports.layouts import Cell, Sheet

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LEGEND = "bold: best of its scheme; ≈: tied with the best (paired, 95%, Holm); underlined: best of the rest"
PLAIN_LEGEND = (
    "* best of its scheme; ≈ tied with the best (paired, 95%, Holm); _ best of the rest; ± 95% interval"
)


def as_markdown(sheets: Iterable[Sheet], notes: Sequence[str] = (), intervals: bool = True) -> str:
    """Each sheet as a pipe table with its lines below, the rows' notes at the end."""
    pieces = []
    for sheet in sheets:
        rows = ["| " + " | ".join(escape_markdown(_one_line(title)) for title in sheet.header) + " |"]
        rows.append("| " + " | ".join(_align(sheet, i) for i in range(len(sheet.header))) + " |")
        for line in sheet.lines:
            rows.append("| " + " | ".join(_markdown_cell(cell, intervals) for cell in line.cells) + " |")
        below = [*_legend(sheet, LEGEND), *sheet.footer]
        under = "  \n".join(escape_markdown(_one_line(line)) for line in below if line)
        pieces.append(f"**{escape_markdown(_one_line(sheet.title))}**\n\n" + "\n".join(rows) + f"\n\n{under}")
    if notes:
        pieces.append("\n".join(f"- {escape_markdown(_one_line(note))}" for note in notes))
    return "\n\n".join(pieces) + "\n"


def _align(sheet: Sheet, column: int) -> str:
    return ":--" if column < sheet.n_labels else "--:"


def _legend(sheet: Sheet, marks: str) -> list[str]:
    """What the signs of a sheet mean, if it has any."""
    cells = [cell for line in sheet.lines for cell in line.cells]
    return [
        *([marks] if any(cell.mark for cell in cells) else []),
        *([GUESSED] if any(cell.text.endswith("°") for cell in cells) else []),
    ]


def _markdown_cell(cell: Cell, intervals: bool) -> str:
    text = escape_markdown(_one_line(cell.text))
    if cell.mark == "best":
        text = f"**{text}**"
    elif cell.mark == "second":
        text = f"<u>{text}</u>"
    rest = [cell.half_width if intervals else "", "≈" if cell.mark == "tied" else ""]
    return " ".join([text, *filter(None, rest)])


def as_latex(sheets: Iterable[Sheet], notes: Sequence[str] = (), intervals: bool = True) -> str:
    """Each sheet as a table environment for the booktabs package, the rows' notes at the end."""
    pieces = [r"% \usepackage{booktabs}"]
    for sheet in sheets:
        kinds = "l" * sheet.n_labels + "r" * (len(sheet.header) - sheet.n_labels)
        body = [" & ".join(escape_latex(_one_line(title)) for title in sheet.header) + r" \\"]
        for line in sheet.lines:
            body += [r"\midrule"] if line.rule else []
            body.append(" & ".join(_latex_cell(cell, intervals) for cell in line.cells) + r" \\")
        if sheet.lines and not sheet.lines[0].rule:
            body.insert(1, r"\midrule")
        below = [*_legend(sheet, LEGEND), *sheet.footer]
        under = "\\\\\n".join(escape_latex(_one_line(line)) for line in below if line)
        pieces.append(
            "\n".join(
                [
                    r"\begin{table}[t]",
                    r"\centering",
                    rf"\caption{{{escape_latex(_one_line(sheet.title))}}}",
                    rf"\begin{{tabular}}{{{kinds}}}",
                    r"\toprule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    rf"\par\smallskip{{\footnotesize {under}\par}}",
                    r"\end{table}",
                ]
            )
        )
    if notes:
        lines = "\\\\\n".join(escape_latex(_one_line(note)) for note in notes)
        pieces.append(rf"{{\footnotesize {lines}\par}}")
    return "\n\n".join(pieces) + "\n"


def _latex_cell(cell: Cell, intervals: bool) -> str:
    text = escape_latex(_one_line(cell.text))
    if cell.mark == "best":
        text = rf"\textbf{{{text}}}"
    elif cell.mark == "second":
        text = rf"\underline{{{text}}}"
    if cell.mark == "tied":
        text += r"$^{\approx}$"
    half = escape_latex(cell.half_width) if intervals else ""
    return rf"{text} {{\scriptsize {half}}}" if half else text


def _one_line(text: str) -> str:
    """A name or note without line breaks, which would end a table's row."""
    return " ".join(text.split())


def print_sheets(
    sheets: Iterable[Sheet], console: Console, notes: Sequence[str] = (), intervals: bool = True
) -> None:
    """Print for a terminal: the best bold, the next underlined, both with a sign for a terminal without styles.

    A sheet that is too wide first loses its intervals, then is split into several, each with the labels.
    """
    for sheet in sheets:
        console.print(sheet.title, style="bold", highlight=False, markup=False)
        for part, with_intervals in _fitted(sheet, console.width, intervals):
            console.print(_drawn(part, with_intervals), crop=False)
        for line in [*_legend(sheet, PLAIN_LEGEND), *sheet.footer]:
            console.print(_one_line(line), highlight=False, markup=False)
        console.print()
    for note in notes:
        console.print(_one_line(note), highlight=False, markup=False)


def _fitted(sheet: Sheet, width: int, intervals: bool) -> Iterator[tuple[Sheet, bool]]:
    for with_intervals in (True, False) if intervals else (False,):
        if sum(_widths(sheet, with_intervals)) - 1 <= width:
            yield sheet, with_intervals
            return
    widths = _widths(sheet, False)
    labels, rest = list(range(sheet.n_labels)), list(range(sheet.n_labels, len(widths)))
    while rest:
        taken, used = [rest.pop(0)], sum(widths[i] for i in labels)
        used += widths[taken[0]]
        while rest and used + widths[rest[0]] - 1 <= width:
            taken.append(rest.pop(0))
            used += widths[taken[-1]]
        chosen = [*labels, *taken]
        lines = tuple(replace(line, cells=tuple(line.cells[i] for i in chosen)) for line in sheet.lines)
        yield replace(sheet, header=tuple(sheet.header[i] for i in chosen), lines=lines), False


def _widths(sheet: Sheet, intervals: bool) -> list[int]:
    """Characters that each column takes: its text, two blanks, and one to the next column (the last has none)."""
    from rich.cells import cell_len

    return [
        3
        + max(
            cell_len(text)
            for text in [sheet.header[i], *(_plain(line.cells[i], intervals) for line in sheet.lines)]
        )
        for i in range(len(sheet.header))
    ]


def _plain(cell: Cell, intervals: bool) -> str:
    sign = {"best": "*", "tied": "≈", "second": "_", None: ""}[cell.mark]
    half = cell.half_width if intervals else ""
    return " ".join(filter(None, [_one_line(cell.text), half, sign]))


def _drawn(sheet: Sheet, intervals: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for i, title in enumerate(sheet.header):
        table.add_column(
            Text(_one_line(title)),
            justify="left" if i < sheet.n_labels else "right",
            no_wrap=True,
            overflow="ignore",
        )
    for number, line in enumerate(sheet.lines):
        if line.rule and number:
            table.add_section()
        styles = {"best": "bold", "second": "underline", "tied": "", None: ""}
        table.add_row(
            *(Text(_plain(cell, intervals), styles[cell.mark]) for cell in line.cells),
            style="dim" if line.dim else None,
        )
    return table


def as_text(
    sheets: Iterable[Sheet], notes: Sequence[str] = (), intervals: bool = True, width: int | None = None
) -> str:
    """The sheets as a terminal of this width shows them, without styles."""
    from rich.console import Console

    file = io.StringIO()
    print_sheets(sheets, Console(file=file, width=width, color_system=None), notes, intervals)
    return file.getvalue()
