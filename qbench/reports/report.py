"""One report from any number of rows: text for a terminal or a paper, CSV, or a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from qbench.errors import unknown_name
from qbench.reports import drawing
from qbench.reports.export import csv_fields
from qbench.reports.layouts import Columns, leaderboard_sheets, notes_of, paper_sheets
from qbench.reports.leaderboard import Section

FORMATS = ("table", "markdown", "latex", "csv", "html")
LAYOUTS = ("all", "leaderboard", "paper")


def render(
    sections: Sequence[Section],
    format: str = "table",
    *,
    layout: str = "all",
    columns: Columns = "auto",
    metrics: Sequence[str] = (),
    intervals: bool = True,
    width: int | None = None,
) -> str:
    """A report as text.

    Args:
        sections: Rows, gathered by `leaderboard.sections`.
        format: One of `FORMATS`. CSV and HTML hold everything, whatever the layout.
        layout: The leaderboard, the papers' tables, or both.
        columns: Columns of the papers' tables, see `layouts.paper_sheets`.
        metrics: Which of them; default: all but details.
        intervals: Print ± behind values.
        width: Columns of the terminal; default: the real one's.

    Raises:
        ConfigError: For an unknown format, layout, kind of columns or metric.
    """
    for value, known, what in ((format, FORMATS, "format"), (layout, LAYOUTS, "layout")):
        if value not in known:
            raise unknown_name(what, value, known)
    if format == "csv":
        return as_csv(sections)
    sheets = leaderboard_sheets(sections) if layout in ("all", "leaderboard") else []
    if layout in ("all", "paper"):
        sheets += paper_sheets(sections, columns, metrics)
    if format == "html":
        from qbench.reports.page import as_html

        return as_html(sections, paper_sheets(sections, columns, metrics), as_csv(sections))
    if format == "table":
        return drawing.as_text(sheets, notes_of(sections), intervals, width)
    return getattr(drawing, f"as_{format}")(sheets, notes_of(sections), intervals)


def as_csv(sections: Sequence[Section]) -> str:
    """One line per row at full precision, with what the leaderboard computed; a missing value is empty."""
    metrics = list(dict.fromkeys(key for section in sections for key in section.table.metrics))
    lines: list[dict[str, Any]] = []
    for section in sections:
        for entry in section.entries:
            lines.append(
                csv_fields(entry.row, metrics)
                | {
                    "recovery": entry.quality.recovery if entry.quality else None,
                    "recovery half_width_95": entry.quality.recovery_half_width if entry.quality else None,
                    "pareto": entry.place,
                }
            )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
