"""`qbench export`: a row of earlier results as a folder that other programs load, with its certificate."""

from __future__ import annotations

from pathlib import Path

import click

from qbench.errors import ConfigError, NumericalError

FORMATS = ("gptq", "compressed-tensors", "awq", "fake")  # deploy/formats.py, which imports torch
GIB = 1 << 30


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    required=True,
    help="Form of the folder; repeatable.",
)
@click.option("--row", help="Beginning of the row's id, where RUN holds several.")
@click.option("--method", help="The row's method.")
@click.option("--scheme", help="The row's scheme.")
@click.option("--output", "-o", help="Parent of the folder. Default: RUN/exports/FORMAT.")
@click.option(
    "--runtime",
    "runtimes",
    metavar="NAME=PYTHON",
    multiple=True,
    help="Also try the folder in a runtime of another environment: transformers, gptqmodel or auto-gptq, and a Python "
    "executable that has it; repeatable. Those installed here are tried anyway.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Write no weights: certify again the folder that an earlier export wrote, as it is now.",
)
@click.option(
    "--max-shard-gib",
    type=click.FloatRange(min=0, min_open=True),
    default=4.5,
    show_default=True,
    help="Largest file of weights.",
)
def export(
    run: str,
    formats: tuple[str, ...],
    row: str | None,
    method: str | None,
    scheme: str | None,
    output: str | None,
    runtimes: tuple[str, ...],
    check: bool,
    max_shard_gib: float,
) -> None:
    """Write a quantized row of the results folder RUN as a model folder, and certify that it computes the same.

    The folder carries the recipe, the row's record, a model card and the certificate. Exit code 3 if a runtime computes
    something else.
    """
    places = [_runtime(text) for text in runtimes]

    from qbench.cli.progress import without_loading_bars
    from qbench.deploy.export import ExportRequest
    from qbench.exports import export_row, select_row
    from qbench.results import ResultStore

    without_loading_bars()
    parents = [Path(output or Path(run) / "exports" / name) for name in formats]
    if output is not None and len(formats) > 1:
        parents = [Path(output) / name for name in formats]
    requests = [
        ExportRequest(name, parent, dict(places), int(max_shard_gib * GIB), write=not check)
        for name, parent in zip(formats, parents, strict=True)
    ]
    chosen = select_row(ResultStore(run), row, method, scheme)
    finished = export_row(run, chosen, requests, report=click.echo)
    failed = [c for c in finished.certificates if c.format in formats and not c.verified]
    if failed:
        raise NumericalError("; ".join(f"{c.folder} ({c.format}): {c.sentence()}" for c in failed))


def _runtime(text: str) -> tuple[str, str]:
    name, equals, python = text.partition("=")
    if not equals or not name or not python:
        raise ConfigError(f"Cannot read --runtime {text!r}. Write NAME=PYTHON.")
    return name, python
