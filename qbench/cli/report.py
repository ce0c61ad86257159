"""`qbench report`: the papers' tables, the leaderboard and the page. Needs neither torch nor a model."""

from __future__ import annotations

from pathlib import Path

import click

from qbench.errors import ConfigError, DataError
from qbench.results import BASELINE

FORMATS = ("table", "markdown", "latex", "csv", "html")


@click.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    default="table",
    help="Default: table. html: one self-contained page.",
)
@click.option("-o", "--output", metavar="FILE", help="Write to a file instead of stdout.")
@click.option(
    "--layout",
    type=click.Choice(["all", "leaderboard", "paper"]),
    default="all",
    help="The leaderboard, the papers' tables, or both. csv and html have everything.",
)
@click.option(
    "--columns",
    type=click.Choice(["auto", "models", "schemes", "tasks"]),
    default="auto",
    help="Columns of the papers' tables. auto: models if there are several, else schemes; tasks for accuracies.",
)
@click.option(
    "--metric", "metrics", multiple=True, metavar="KEY", help="Only these, such as wikitext2/perplexity."
)
@click.option(
    "--bench",
    "benches",
    multiple=True,
    metavar="FILE",
    help="Latency from a report of `qbench bench --end-to-end`; repeatable.",
)
@click.option("--intervals/--no-intervals", default=True, help="± behind values. Default: on.")
@click.option(
    "--baseline", default=BASELINE, show_default=True, help="Method that the others are divided by."
)
def report(
    folders: tuple[str, ...],
    format_: str,
    output: str | None,
    layout: str,
    columns: str,
    metrics: tuple[str, ...],
    benches: tuple[str, ...],
    intervals: bool,
    baseline: str,
) -> None:
    """Tables and a page from the results in one or more folders.

    Rows are ranked only within one model and one protocol; rows of different protocols stand in sections of their own.
    Best bold, second underlined; a row that the data cannot tell from the best is marked as tied with it.
    """
    from qbench.reports.drawing import print_sheets
    from qbench.reports.layouts import leaderboard_sheets, notes_of, paper_sheets
    from qbench.reports.leaderboard import sections
    from qbench.reports.report import render
    from qbench.results import ResultStore

    rows = [row for folder in folders for row in ResultStore(folder).load_all()]
    if not rows:
        raise ConfigError(
            f"No records in {', '.join(map(repr, folders))}. Give the output folder of a finished run or sweep."
        )
    if benches:
        from qbench.cli.bench import read
        from qbench.reports.speeds import with_latency

        rows = with_latency(rows, [read(Path(name)) for name in benches])
    found = sections(rows, baseline)
    if format_ == "table" and output is None:
        from rich.console import Console

        sheets = leaderboard_sheets(found) if layout != "paper" else []
        sheets += paper_sheets(found, columns, metrics) if layout != "leaderboard" else []  # type: ignore[arg-type]
        print_sheets(sheets, Console(), notes_of(found), intervals)
        return
    text = render(found, format_, layout=layout, columns=columns, metrics=metrics, intervals=intervals)  # type: ignore[arg-type]
    if output is None:
        click.echo(text.rstrip("\n"))
        return
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"Cannot write {output!r}: {error.strerror}.") from None
    click.echo(
        f"{output}: {len(text.encode()) / 1e6:.2f} MB, {sum(len(s.entries) for s in found)} rows", err=True
    )
