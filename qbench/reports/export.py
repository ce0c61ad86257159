"""Tables for other programs: Markdown, LaTeX (booktabs), CSV and JSON.

Markdown and LaTeX carry what the terminal shows, notes included. CSV and JSON have one line per row at full precision;
CSV adds what the comparison computed.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from qbench.reports.columns import Column, columns, is_best, legend, most
from qbench.reports.comparison import Comparison, Row

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "≈": r"$\approx$", "σ": r"$\sigma$", "°": r"$^\circ$", "÷": r"$\div$",
    "↓": r"$\downarrow$", "↑": r"$\uparrow$", "∞": r"$\infty$", "—": "---", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def as_json(comparison: Comparison) -> str:
    """An array of rows."""
    return json.dumps([result.row() for result in comparison.results], indent=2, allow_nan=False)


def as_csv(comparison: Comparison) -> str:
    """One line per row, every column, full precision; a missing value is empty."""
    first: dict[str, Row] = {}
    for table in comparison.tables:
        for row in (row for block in table.blocks for row in block.rows):
            first.setdefault(row.result.id, row)
    metrics = list(dict.fromkeys(key for table in comparison.tables for key in table.metrics))
    # Of a row with several seeds the first record stands for all.
    lines = [csv_fields(first[result.id], metrics) for result in comparison.results if result.id in first]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def csv_fields(row: Row, metrics: list[str]) -> dict[str, Any]:
    """One row of the CSV: everything, at full precision."""
    result = row.result
    fields: dict[str, Any] = {"model": result.model, "method": result.method, "scheme": result.scheme}
    fields["options"] = json.dumps(result.options, sort_keys=True) if result.options else None
    for key in metrics:
        metric, score = result.metrics.get(key), row.scores.get(key)
        fields |= {
            key: score.value if score else None,
            f"{key} stderr": metric.stderr if metric else None,
            f"{key} n": metric.n if metric else None,
            f"{key} half_width_95": score.half_width if score else None,
            f"{key} low_95": score.low if score else None,
            f"{key} high_95": score.high if score else None,
            f"{key} ratio": score.ratio if score else None,
            f"{key} ratio_half_width_95": score.ratio_half_width if score else None,
            f"{key} recovery": score.recovery if score else None,
            f"{key} mark": score.mark if score else None,
            f"{key} rank": score.rank if score else None,
            f"{key} p_of_best": score.p_value if score else None,
            f"{key} seed_sd": score.seed_spread if score else None,
            f"{key} chance": score.chance if score else None,
        }
    costs = [one.cost for one in row.results]
    return fields | {
        "bits_per_weight": result.bits_per_weight,
        "seconds": row.seconds,
        "peak_gpu_bytes": most(cost.peak_gpu_bytes for cost in costs),
        "peak_cpu_bytes": most(cost.peak_cpu_bytes for cost in costs),
        "seeds": len(costs),
        "contract": result.contract,
        "notes": " | ".join(row.notes) or None,
        "id": " ".join(one.id for one in row.results),
    }


def as_markdown(comparison: Comparison) -> str:
    """One table per model, the full-precision row first in every scheme."""
    pieces = []
    for table in comparison.tables:
        shown = columns(table, comparison, table.metrics)
        pieces.append(f"**{escape_markdown(table.model)}**\n\n" + markdown_table(shown))
    # Two blanks at a line's end break it in Markdown.
    pieces.append("  \n".join(escape_markdown(line) for line in legend(comparison, best="bold:")))
    return "\n\n".join(pieces) + "\n"


def markdown_table(shown: Sequence[Column]) -> str:
    """Some columns as a pipe table, words to the left, numbers to the right."""
    left = ("method", "scheme", "contract")
    lines = [
        _pipes(escape_markdown(column.title) for column in shown),
        _pipes(":--" if column.kind in left else "--:" for column in shown),
    ]
    lines += [_pipes(_markdown_cell(column, i) for column in shown) for i in range(len(shown[0].cells))]
    return "\n".join(lines)


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\|*_<>\[\]`])", r"\\\1", text)


def _markdown_cell(column: Column, i: int) -> str:
    cell = " ".join(column.cells[i].split())
    if column.kind == "value" and is_best(cell):
        number, _, rest = cell.removesuffix("*").strip().partition(" ")
        return f"**{number}** {rest}".strip()
    return escape_markdown(cell)


def as_latex(comparison: Comparison) -> str:
    """A tabular per model for the booktabs package, schemes apart by a rule."""
    pieces = [r"% \usepackage{booktabs}"]
    for table in comparison.tables:
        shown = columns(table, comparison, table.metrics)
        kinds = "".join("l" if column.kind in ("method", "scheme", "contract") else "r" for column in shown)
        lines = [
            f"% {table.model}",
            rf"\begin{{tabular}}{{{kinds}}}",
            r"\toprule",
            _ampersands(escape_latex(column.title) for column in shown),
        ]
        i = 0
        for block in table.blocks:
            lines.append(r"\midrule")
            for _ in block.rows:
                lines.append(_ampersands(_latex_cell(column, i) for column in shown))
                i += 1
        lines += [r"\bottomrule", r"\end{tabular}"]
        pieces.append("\n".join(lines))
    notes = [escape_latex(line) for line in legend(comparison, best="bold:")]
    pieces.append("\\par\\smallskip\n{\\footnotesize " + "\\\\\n".join(notes) + "\\par}")
    return "\n\n".join(pieces) + "\n"


def _ampersands(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_cell(column: Column, i: int) -> str:
    cell = " ".join(column.cells[i].split())
    if column.kind == "value" and is_best(cell):
        number, _, rest = cell.removesuffix("*").strip().partition(" ")
        return rf"\textbf{{{escape_latex(number)}}} {escape_latex(rest)}".strip()
    return escape_latex(cell)
