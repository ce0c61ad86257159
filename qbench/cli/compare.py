"""`qbench compare`: rows of earlier runs in one table, or two of them in pairs. Needs neither torch nor a model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import click

from qbench.errors import ConfigError, suggest
from qbench.reports import pairs
from qbench.reports.comparison import FORMATS, Comparison, read
from qbench.reports.comparison import compare as compare_results
from qbench.results import BASELINE, Result, ResultStore


@click.command()
@click.argument("sources", metavar="DIR|FILE|ROW...", nargs=-1, required=True)
@click.option(
    "--baseline", default=BASELINE, show_default=True, help="Method that the others are divided by."
)
@click.option(
    "--allow-mixed", is_flag=True, help="Put rows of different protocols into one table all the same."
)
@click.option(
    "--in", "folder", metavar="DIR", default="results", show_default=True, help="Where a ROW is looked up."
)
@click.option("--format", "format_", type=click.Choice(FORMATS), default="table", help="Default: table.")
def compare(sources: tuple[str, ...], baseline: str, allow_mixed: bool, folder: str, format_: str) -> None:
    """Compare results: folders of records, single records, or rows.

    A folder or several are put into one table: rows are ranked per model and scheme, pairwise on the same windows and
    questions; a row that the data cannot tell from the best is marked as tied. Rows of different protocols are refused.

    Two sources, A and B, are also compared in pairs: difference, interval, p-value, verdict, and how many more windows,
    questions or seeds would tell them apart. Of two folders, rows of the same model and scheme are paired.

    A ROW is a method (affinequant), a method at a scheme (affinequant@W4A4), or the beginning of an id; it is looked up
    in the folder --in, or in its own: DIR:ROW.
    """
    found = [rows_of(source, folder) for source in sources]
    whole = all(Path(source).is_dir() for source in sources)
    if len(sources) != 2:
        show(
            compare_results(
                *(row for rows in found for row in rows), baseline=baseline, allow_mixed=allow_mixed
            ),
            format_,
        )
        return
    matched = (
        [pairs.pair(a, b, allow_mixed) for a, b in pairs.match(*found)]
        if not whole or format_ == "table"
        else []
    )
    if whole:
        show(compare_results(*found, baseline=baseline, allow_mixed=allow_mixed), format_)
    elif not matched:
        raise ConfigError(
            f"No row of {sources[0]!r} can be paired with one of {sources[1]!r}. Name one row on either side, such as "
            "affinequant@W4A4 or the beginning of an id."
        )
    if not matched:
        return
    if format_ not in pairs.FORMATS:
        raise ConfigError(
            f"--format {format_} is for a table of folders; two rows have {', '.join(pairs.FORMATS)}."
        )
    if whole:
        click.echo(f"\n{sources[0]} (A) and {sources[1]} (B), row by row\n")
    click.echo(pairs.render(matched, format_, shutil.get_terminal_size().columns).rstrip("\n"))


def rows_of(source: str, folder: str) -> list[Result]:
    """The records that one argument means.

    Raises:
        ConfigError: If it is neither a folder nor a file, and no row's name or id in the folder.
        DataError: If the folder or file cannot be read.
    """
    if Path(source).exists():
        return read(source)
    place, _, name = source.rpartition(":")
    if not (place and Path(place).is_dir()):
        place, name = folder, source
    if not Path(place).is_dir():
        raise ConfigError(
            f"There is no results folder {source!r}, no such file, and no folder {place!r} to look up a row in. "
            "Give a results folder, a record, or --in DIR with the name of a row."
        )
    results = ResultStore(place).load_all()
    method, _, scheme = name.partition("@")
    found = [r for r in results if r.method == method and scheme.lower() in ("", r.scheme.lower())]
    if not found and len(name) >= 4:
        found = [r for r in results if r.id.startswith(name)]
    if not found:
        names = list(dict.fromkeys(f"{r.method}@{r.scheme}" for r in results))
        known = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
        raise ConfigError(
            f"{name!r} is no row in {place!r}.{suggest(name, names)} Give a folder, a record's file, an id, or one of: "
            f"{known or 'nothing, it is empty'}."
        )
    return found


def show(comparison: Comparison, format_: str) -> None:
    """Print a comparison to stdout; the table with colours where the terminal has them."""
    if format_ != "table":
        click.echo(comparison.render(format_).rstrip("\n"))
        return
    from rich.console import Console

    from qbench.reports.table import print_table

    print_table(comparison, Console())


def echo_generations(results: Sequence[Result]) -> None:
    """Greedy continuations side by side, on stderr: full precision above, the row's below."""
    for row in results:
        for i, made in enumerate(row.generations, 1):
            place = f"first difference at token {made.differs_at}"
            click.echo(f"\n{row.method} {row.scheme}, prompt {i}: {place}", err=True)
            for label, text in (("prompt", made.prompt[-100:]), ("full", made.reference), ("row", made.text)):
                click.echo(f"  {label:7}{text!r}", err=True)
