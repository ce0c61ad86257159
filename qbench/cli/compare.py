"""`qbench compare`: rows of earlier runs in one table. Needs neither torch nor a model."""

from __future__ import annotations

import click

from qbench.reports.comparison import FORMATS, Comparison
from qbench.reports.comparison import compare as compare_results
from qbench.results import BASELINE


@click.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@click.option(
    "--baseline", default=BASELINE, show_default=True, help="Method that the others are divided by."
)
@click.option(
    "--allow-mixed", is_flag=True, help="Put rows of different protocols into one table all the same."
)
@click.option("--format", "format_", type=click.Choice(FORMATS), default="table", help="Default: table.")
def compare(folders: tuple[str, ...], baseline: str, allow_mixed: bool, format_: str) -> None:
    """Compare the results in one or more folders.

    Rows are ranked per model and scheme, pairwise on the same windows of text; a row that the data cannot tell from the
    best is marked as tied. Rows of different protocols are refused.
    """
    show(compare_results(*folders, baseline=baseline, allow_mixed=allow_mixed), format_)


def show(comparison: Comparison, format_: str) -> None:
    """Print a comparison to stdout; the table with colours where the terminal has them."""
    if format_ != "table":
        click.echo(comparison.render(format_).rstrip("\n"))
        return
    from rich.console import Console

    from qbench.reports.table import print_table

    print_table(comparison, Console())
