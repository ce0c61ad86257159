"""`qbench bench`: time the linears of a model in packed form, and generation with the packed model."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from qbench.errors import ConfigError, DataError
from qbench.latency import Report
from qbench.results import require_writable, write_atomically
from qbench.scheme import Scheme

BATCHES = (1, 16, 256, 4096)
SCHEMES = ("W4A16g128", "W8A8-sym")
BACKENDS = {"cpu": ("torch",), "cuda": ("humming", "torch", "gemlite")}


@click.command()
@click.option("--model", "-m", "models", multiple=True, metavar="NAME|DIR", help="Time this model's linears.")
@click.option(
    "--shapes", multiple=True, metavar="NAME", help="Time a published size's: llama-7b, -13b, -70b."
)
@click.option("--scheme", "schemes", multiple=True, help=f"Default: {', '.join(SCHEMES)}.")
@click.option(
    "--backend", "backends", multiple=True, help="reference, torch, humming, gemlite. Default: all here."
)
@click.option("--tokens", multiple=True, type=click.IntRange(1), help="Batches M. Default: 1, 16, 256, 4096.")
@click.option("--method", help="Time with the run-time work that this method's preset leaves in the model.")
@click.option(
    "--norm-matrix", is_flag=True, help="Time also with a full hidden × hidden matrix after each norm."
)
@click.option(
    "--end-to-end", is_flag=True, help="Instead of single linears: generation with the whole packed model."
)
@click.option("--batch", type=click.IntRange(1), help="With --end-to-end: sequences at once. Default: 1.")
@click.option(
    "--prompt-tokens", type=click.IntRange(1), help="With --end-to-end. Default: 512, or what fits."
)
@click.option("--new-tokens", type=click.IntRange(1), help="With --end-to-end. Default: 64.")
@click.option(
    "--checkpoint",
    metavar="DIR",
    help="With --end-to-end: pack a finished run's codes (OUTPUT/checkpoints/METHOD-SCHEME-…) instead of RTN's.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Default: auto.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: torch's.")
@click.option(
    "--loop-seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Length of one measurement on a CPU.",
)
@click.option(
    "--slow-seconds",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Rows that need longer are called slow.",
)
@click.option(
    "--max-minutes",
    type=click.FloatRange(0, min_open=True),
    help="Begin nothing after this; the same command continues.",
)
@click.option("--output", "-o", default="results/bench.json", show_default=True, help="The report, JSON.")
@click.option("--restart", is_flag=True, help="Measure again what the output already holds.")
@click.option("--render", is_flag=True, help="Measure nothing: print the report that --output holds.")
@click.option(
    "--format", "format_", type=click.Choice(["table", "markdown", "json"]), default="table",
    help="Form on stdout. Default: table.",
)  # fmt: skip
def bench(**given: Any) -> None:
    """Time a model's linears in packed form beside the unquantized ones.

    Every layer is first compared with the exact product of its integers; a wrong kernel gets no time. With nothing else
    given, the linears of the embedded tiny-llama by torch's own CPU kernels. The report is written after each round,
    and the same command continues an interrupted one.
    """
    path = Path(given["output"])
    alone = [o for o in ("batch", "prompt_tokens", "new_tokens", "checkpoint") if given[o] is not None]
    if alone and not given["end_to_end"]:
        raise ConfigError(
            f"--{alone[0].replace('_', '-')} belongs to --end-to-end: add that, or leave it out."
        )
    if given["render"]:
        show(read(path), given["format_"])
        return
    if path.is_dir():
        raise ConfigError(
            f"--output {given['output']!r} is a folder. Name a file for the report, such as bench.json."
        )
    require_writable(path.parent, "--output")
    schemes = [Scheme.parse(text) for text in given["schemes"] or SCHEMES]
    earlier = read(path) if path.exists() and not given["restart"] else None

    import torch

    from qbench.cli.progress import without_loading_bars

    device = _device(given["device"])
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    without_loading_bars()
    report = _run(given, schemes, device, path, earlier)
    show(report, given["format_"])


def _device(asked: str) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch sees no CUDA device here. Use --device cpu, or leave --device out."
        )
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _run(
    given: dict[str, Any], schemes: list[Scheme], device: str, path: Path, earlier: Report | None
) -> Report:
    import torch

    from qbench import bench, provenance
    from qbench.evals.latency import Protocol, cache_bytes
    from qbench.models.shapes import model_config, named_config, shape_set

    deadline = time.monotonic() + 60 * given["max_minutes"] if given["max_minutes"] else None
    backends, notes = bench.load_backends(given["backends"] or BACKENDS[device], device)
    configs = {name: named_config(name) for name in given["shapes"]}
    names = given["models"] if given["models"] or given["shapes"] else ("tiny-llama",)
    configs |= {name: model_config(name) for name in names}
    models = [shape_set(name, config) for name, config in configs.items()]
    bench.require_groups(schemes, models)
    matrix = bench.schemes_with_matrix(schemes, given["method"], given["norm_matrix"], list(configs.values()))
    for note in notes:
        click.echo(f"note: {note}", err=True)
    protocol = Protocol(loop_s=given["loop_seconds"], limit_s=given["slow_seconds"])
    described = torch.cuda.get_device_name() if device == "cuda" else provenance.environment()["cpu"]
    if device == "cpu":
        threads = torch.get_num_threads()
        described += f", {threads} thread{'s' if threads > 1 else ''}"
    report = Report(
        commands=[shlex.join(["qbench", *sys.argv[1:]])],
        device=described,
        cache_bytes=cache_bytes(device),
        environment=bench.environment(),
        protocol=vars(protocol),
        models=models,
        notes=notes,
    )
    if earlier is not None:
        report = _continued(report, earlier, path)
    if given["end_to_end"]:
        return _end_to_end(given, configs, schemes, backends, device, report, path, deadline)
    if report.ceilings is None:
        click.echo("measuring the device's own rates", err=True)
        report = report.model_copy(update={"ceilings": bench.ceilings(backends, device, protocol)})
    shapes, after_norm = bench.shapes_of(models)
    work = bench.Workload(
        shapes, after_norm, given["tokens"] or BATCHES, schemes, list(backends), frozenset(matrix)
    )
    for cells in bench.measure(work, backends, device, protocol, report.cells, deadline):
        report = report.model_copy(update={"cells": [*report.cells, *cells]})
        _write(report, path)
        first = cells[0]
        timed = sum(cell.status == "timed" for cell in cells)
        click.echo(
            f"{first.backend} {first.out_features}×{first.in_features} M={first.tokens}: {timed} of {len(cells)} timed",
            err=True,
        )
    _write(report, path)
    if deadline is not None and time.monotonic() > deadline:
        click.echo("note: --max-minutes is over; the same command continues where this one ended", err=True)
    return report


def _end_to_end(
    given: dict[str, Any],
    configs: dict[str, Any],
    schemes: list[Scheme],
    backends: dict[str, Any],
    device: str,
    report: Report,
    path: Path,
    deadline: float | None,
) -> Report:
    """Generation with every model; rows are added to the report one by one."""
    from functools import partial

    from qbench import generation
    from qbench.deploy.packed import finished
    from qbench.models.shapes import describe

    if given["checkpoint"] and (len(configs) > 1 or len(schemes) > 1 or given["shapes"]):
        raise ConfigError("--checkpoint belongs to one --model and one --scheme: give exactly these.")
    if given["checkpoint"]:
        (config,) = configs.values()
        finished(given["checkpoint"], describe(config)[2], schemes[0])  # refused before anything is measured
    for name, config in configs.items():
        longest = config.max_position_embeddings
        new = given["new_tokens"] or min(64, longest // 2)
        prompt = given["prompt_tokens"] or min(512, longest - new)
        if prompt + new > longest:
            raise ConfigError(
                f"--prompt-tokens {prompt} and --new-tokens {new} exceed the {longest} positions of {name}."
            )
        work = generation.Generating(given["batch"] or 1, prompt, new, given["checkpoint"])
        if name in given["shapes"]:
            make = partial(generation.random_model, config, device=device)
        else:
            make = partial(generation.loaded_model, name, device=device)
        for row in generation.speeds(name, make, schemes, backends, device, work, report.speeds):
            if isinstance(row, str):
                click.echo(f"note: {row}", err=True)
                report = report.model_copy(update={"notes": [*report.notes, row]})
            else:
                click.echo(
                    f"{row.model} {row.scheme} {row.backend}: decode {row.decode_tokens_per_s:.3g} tokens/s",
                    err=True,
                )
                report = report.model_copy(update={"speeds": [*report.speeds, row]})
            _write(report, path)
            if deadline is not None and time.monotonic() > deadline:
                click.echo(
                    "note: --max-minutes is over; the same command continues where this one ended", err=True
                )
                return report
    return report


def _continued(report: Report, earlier: Report, path: Path) -> Report:
    """The earlier report with this request's models, if its numbers may stand beside new ones."""
    for what in ("device", "protocol", "environment"):
        old, new = getattr(earlier, what), getattr(report, what)
        if (
            what == "environment"
        ):  # another commit of qbench may continue; other kernels or another torch may not
            old, new = ({k: v for k, v in found.items() if k != "commit"} for found in (old, new))
        if old != new:
            raise ConfigError(
                f"{path} was measured with another {what}: its numbers and new ones do not belong into one table. "
                "Use --restart or another --output."
            )
    models = {model.name: model for model in (*earlier.models, *report.models)}
    return earlier.model_copy(
        update={
            "models": list(models.values()),
            "notes": list(dict.fromkeys([*earlier.notes, *report.notes])),
            "commands": list(dict.fromkeys([*earlier.commands, *report.commands])),
        }
    )


def _write(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (report.model_dump_json(exclude_none=True) + "\n").encode())


def read(path: Path) -> Report:
    """Read a report.

    Raises:
        DataError: If there is none or it is damaged.
    """
    try:
        return Report.model_validate_json(path.read_text())
    except OSError as error:
        raise DataError(
            f"Cannot read the kernel report {path}: {error.strerror}. Run `qbench bench` first."
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path} is no kernel report, or a damaged one. Choose another --output, or overwrite it with --restart."
        ) from error


def show(report: Report, format_: str) -> None:
    """Print a report to stdout."""
    from qbench.reports.latency import as_markdown, circumstances, tables

    if format_ == "json":
        click.echo(report.model_dump_json(indent=1))
        return
    if format_ == "markdown":
        click.echo(as_markdown(report).rstrip("\n"))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for table in tables(report):
        if table.words:  # sentences in columns of a terminal are unreadable
            console.print(table.title, style="italic", highlight=False, markup=False)
            for row in table.rows:
                console.print(" · ".join(row), highlight=False, markup=False, soft_wrap=True)
            console.print()
            continue
        drawn = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=table.title, title_justify="left"
        )
        for i, column in enumerate(table.header):
            drawn.add_column(Text(column), justify="left" if table.is_text(i) else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        console.print(drawn)
        console.print()
    for line in circumstances(report):
        console.print(line, highlight=False, markup=False)
