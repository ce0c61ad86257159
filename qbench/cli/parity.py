"""`qbench parity`: published numbers by name, what their recipes give here, and whether that is the same."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import click

from qbench.errors import ConfigError
from qbench.reports.parity import Verdict
from qbench.reports.published import Published, cells, find, tables

FORMATS = click.Choice(["table", "markdown", "csv", "json"])


@click.group()
def parity() -> None:
    """List published numbers, run their recipes, and say which are reproduced."""


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that pick cells."""
    for name, example in (
        ("dataset", "wikitext2, c4, piqa, avg"),
        ("scheme", "W3A16g128, W2*A8"),
        ("method", "OmniQuant, FP16"),
        ("model", "opt-125m or facebook/opt-125m"),
        ("paper", "AffineQuant"),
    ):
        command = click.option(
            f"--{name}",
            f"{name}s",
            multiple=True,
            metavar="NAME",
            help=f"Only these, such as {example}; repeatable.",
        )(command)
    return click.argument("table", metavar='["PAPER TABLE"]', required=False)(command)


@parity.command("list")
@_filters
@click.option("--format", "format_", type=FORMATS, default="table", help="Default: table.")
def list_(table: str | None, format_: str, **filters: tuple[str, ...]) -> None:
    """List published cells; without anything named, the tables that there are."""
    if table is None and not any(filters.values()) and format_ in ("table", "markdown"):
        header = ("table", "cells", "models", "methods", "schemes", "measured on")
        summaries = [_summary(name, found) for name, found in tables(cells()).items()]
        if format_ == "markdown":
            _show(header, summaries, format_)
        else:
            _describe(header, summaries)
        click.echo('\nCells of one: qbench parity list "AffineQuant Table 1" --model opt-125m', err=True)
        return
    header = ("table", "model", "method", "scheme", "dataset", "metric", "value")
    rows = [
        (c.name, c.model, c.method, c.scheme, c.dataset, c.metric, c.printed) for c in find(table, **filters)
    ]
    _show(header, rows, format_)


def _summary(name: str, found: Sequence[Published]) -> tuple[str, ...]:
    def distinct(field: str) -> str:
        return ", ".join(dict.fromkeys(getattr(cell, field) for cell in found))

    return (name, str(len(found)), *map(distinct, ("model", "method", "scheme", "dataset")))


def _describe(header: Sequence[str], summaries: Sequence[tuple[str, ...]]) -> None:
    """Each table in a few lines, broken between names only."""
    from rich.console import Console

    width = Console().width
    for name, n_cells, *lists in summaries:
        click.echo(f"{name}, {n_cells} cells")
        for title, names in zip(header[2:], lists, strict=True):
            hanging = " " * 16
            click.echo(
                textwrap.fill(
                    names,
                    width,
                    initial_indent=f"  {title:<14}",
                    subsequent_indent=hanging,
                    break_on_hyphens=False,
                )
            )


@parity.command("run")
@_filters
@click.option("--dry-run", is_flag=True, help="Print what would be run, and run nothing.")
@click.option(
    "--model-path",
    "model_paths",
    multiple=True,
    metavar="HUB_NAME=FOLDER",
    help="Weights from a folder; those of another model are computed as a stand-in, and its verdicts say so.",
)
@click.option(
    "--eval", "texts", multiple=True, metavar="NAME=PATH", help="A dataset or task from a file or folder."
)
@click.option("--calib-dataset", metavar="NAME|PATH", help="Calibrate on this text instead of the recipe's.")
@click.option(
    "--seeds", type=click.IntRange(1), default=1, help="Calibration seeds: measures the noise. Default: 1."
)
@click.option(
    "--nsamples", "n_samples", type=click.IntRange(1), help="Fewer calibration windows: not comparable."
)
@click.option("--seqlen", "seq_len", type=click.IntRange(2), help="Shorter windows: not comparable.")
@click.option("--limit", type=click.IntRange(1), help="Only the first windows and items: not comparable.")
@click.option("--epochs", type=click.IntRange(1), help="Another number of epochs: not comparable.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("-o", "--output", default="results/parity", show_default=True, help="Folder of the records.")
@click.option("--format", "format_", type=FORMATS, default="table", help="Default: table.")
def run(
    table: str | None,
    dry_run: bool,
    model_paths: tuple[str, ...],
    texts: tuple[str, ...],
    calib_dataset: str | None,
    seeds: int,
    n_samples: int | None,
    seq_len: int | None,
    limit: int | None,
    epochs: int | None,
    device: str,
    output: str,
    format_: str,
    **filters: tuple[str, ...],
) -> None:
    """Run the recipes of published cells and judge each: reproduced, off by x, or not comparable and why.

    Name what you mean: a table, and what of it. Rows that the output folder has are not computed again.
    """
    from qbench import parity as running
    from qbench.methods import METHODS

    if table is None and not any(filters.values()):
        raise ConfigError(
            'Name what to run, such as qbench parity run "AffineQuant Table 1" --model opt-125m.'
        )
    changes = running.Changes(
        models=_pairs("--model-path", model_paths, "HUB_NAME=FOLDER"),
        texts=_pairs("--eval", texts, "NAME=PATH"),
        calibration=calib_dataset,
        n_samples=n_samples,
        seq_len=seq_len,
        limit=limit,
        epochs=epochs,
    )
    settings = {"output": output, "seeds": seeds, "compute": {"device": device}}
    passes, verdicts = running.plan(find(table, **filters), changes, settings, METHODS.names())
    if dry_run:
        for each in passes:
            said = ", ".join(dict.fromkeys(label or "full precision" for *_, label in each.cells))
            click.echo(f"# {len(each.cells)} cells of {each.config.model}: {said}\n{each.config.to_yaml()}")
        for verdict in verdicts:
            click.echo(
                f"# {verdict.cell.method} {verdict.cell.scheme} of {verdict.cell.model}: {verdict.said}"
            )
        return
    from qbench.cli.progress import listening

    with listening() as listener:
        verdicts = running.run(passes, changes, listener) + verdicts
    show_verdicts(verdicts, format_)


def _pairs(option: str, given: Sequence[str], form: str) -> dict[str, str]:
    split = [text.partition("=") for text in given]
    for text, (name, _, path) in zip(given, split, strict=True):
        if not name or not path:
            raise ConfigError(f"{option} {text!r}: write {form}.")
    return {name: path for name, _, path in split}


def show_verdicts(verdicts: Sequence[Verdict], format_: str) -> None:
    """Print verdicts, and how many there are of each kind."""
    if format_ in ("csv", "json"):
        _show(tuple(_fields(verdicts[0])), [tuple(_fields(v).values()) for v in verdicts], format_)
        return
    header = (
        "model",
        "method",
        "scheme",
        "dataset",
        "published",
        "here",
        "FP published",
        "FP here",
        "verdict",
    )
    notes: dict[str, int] = {}
    rows = []
    for v in verdicts:
        here, theirs = v.full_precision or (None, None)
        values = [v.cell.printed, *(("—" if x is None else f"{x:.2f}") for x in (v.value, theirs, here))]
        said = "not comparable" if v.status == "not comparable" else v.said
        numbers = [notes.setdefault(note, len(notes) + 1) for note in (v.reason, *v.remarks) if note]
        said += f" [{','.join(map(str, numbers))}]" if numbers else ""
        rows.append((v.cell.model, v.cell.method, v.cell.scheme, v.cell.dataset, *values, said))
    _show(header, rows, format_)
    for note, number in notes.items():
        click.echo(f"[{number}] {note}")
    counts = {
        status: sum(v.status == status for v in verdicts)
        for status in ("reproduced", "off", "not comparable")
    }
    click.echo(", ".join(f"{n} {status}" for status, n in counts.items() if n), err=True)


def _fields(v: Verdict) -> dict[str, Any]:
    here, theirs = v.full_precision or (None, None)
    return {
        "table": v.cell.name, "model": v.cell.model, "method": v.cell.method, "scheme": v.cell.scheme,
        "dataset": v.cell.dataset, "metric": v.cell.metric, "published": v.cell.value, "here": v.value,
        "relative": v.relative, "low_95": v.low, "high_95": v.high, "fp_published": theirs, "fp_here": here,
        "variant": v.variant, "status": v.status, "reason": v.reason, "remarks": "; ".join(v.remarks),
    }  # fmt: skip


def _show(header: tuple[str, ...], rows: Sequence[tuple[Any, ...]], format_: str) -> None:
    if format_ == "json":
        click.echo(json.dumps([dict(zip(header, row, strict=True)) for row in rows], indent=1, default=str))
    elif format_ == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        click.echo(text.getvalue(), nl=False)
    elif format_ == "markdown":
        from qbench.reports.export import escape_markdown

        for i, row in enumerate([header, *rows]):
            click.echo("| " + " | ".join(escape_markdown(str(cell)) for cell in row) + " |")
            if i == 0:
                click.echo("|" + " :-- |" * len(header))
    else:
        _draw(header, rows)


NAMES = ("table", "model", "method", "scheme", "dataset", "metric")  # columns that may head a table instead
MAY_GO = ("FP published", "FP here")  # where there is no room for them
PROSE = 14  # characters that a verdict needs to be readable


def _draw(header: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> None:
    """Print for a terminal: what all rows share stands above them, and no number is broken."""
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    texts = [[str(cell) for cell in row] for row in rows]
    shared = [i for i, title in enumerate(header) if title in NAMES and len({row[i] for row in texts}) == 1]
    shared = shared if len(rows) > 1 else []
    kept = [i for i in range(len(header)) if i not in shared]

    def width(i: int) -> int:
        longest = max(cell_len(text) for text in (*header[i].split(), *(row[i] for row in texts)))
        return 3 + (min(longest, PROSE) if header[i] in ("table", "verdict") else longest)

    gone = [i for i in kept if header[i] in MAY_GO] if sum(map(width, kept)) > console.width else []
    kept = [i for i in kept if i not in gone]
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for i in kept:
        wraps = header[i] in ("table", "verdict")
        drawn.add_column(
            Text(header[i] if wraps else header[i].replace(" ", "\n")), no_wrap=not wraps, overflow="fold"
        )
    for row in texts:
        drawn.add_row(*(Text(row[i]) for i in kept))
    if shared:
        console.print(", ".join(texts[0][i] for i in shared), style="bold", highlight=False, markup=False)
    console.print(drawn)
    if gone:
        said = ", ".join(header[i] for i in gone)
        console.print(f"not shown at this width: {said} (--format csv has everything)", highlight=False)
