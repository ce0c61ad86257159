"""`qbench ablate`: what each switch of a method contributes and costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qbench.cells import Cell
from qbench.cli.grid import failures_said, grid_options, read
from qbench.cli.options import Command, Option, format_option
from qbench.errors import ConfigError, NumericalError
from qbench.reports.columns import format_seconds, format_value
from qbench.results import write_atomically

WHAT = "What to change"


def _ablate(**given: Any) -> None:
    """Measure what each switch of a method contributes, with intervals, and what it costs.

    Switches are the method's yes/no options, its options with named choices, and numbers with declared alternatives.
    All runs are cells of one sweep: lanes of one pass, resumable, kept in the output folder.
    """
    config, grid = read(given)
    from qbench import ablation, runner
    from qbench import sweep as sweeps
    from qbench.cli.sweep_view import watching
    from qbench.config import validated
    from qbench.methods import METHODS

    if len(config.models) > 1:
        raise ConfigError(f"ablate takes one model, not {len(config.models)}.")
    design = given["design"]
    described = runner.describe(grid[0].config)
    plans = []
    cells: dict[str, Cell] = {}
    seeds = sorted({cell.config.calibration.seed for cell in grid})
    for cell in grid:
        if cell.config.calibration.seed != seeds[0]:
            continue
        cls = METHODS.load(cell.request.name)
        method = validated(cls, cell.request.options, f"method {cell.request.name}")
        found = ablation.switches(method.resolve(cell.scheme, described.spec), given["switches"])
        runs = ablation.variants(found, design, given["samples"])
        made = ablation.cells(cell.config, cell.request, str(cell.scheme), runs, seeds)
        plans.append((cell, found, runs, made))
        cells |= {c.label: c for c in made.values()}
    click.echo(f"{len(cells)} runs, checked before anything is computed …", err=True)
    executor = sweeps.checked(config.executor, list(cells.values()))
    with watching() as view:
        outcome = sweeps.sweep(list(cells.values()), executor, view, given["retry_failed"])
    results = []
    for cell, found, runs, made in plans:
        rows = {key: outcome.rows[c.label] for key, c in made.items() if c.label in outcome.rows}
        failed = {
            name: outcome.failures[c.label].error
            for (name, _), c in made.items()
            if c.label in outcome.failures
        }
        name, scheme = cell.request.name, str(cell.scheme)
        results.append(ablation.analyse(name, scheme, design, found, runs, rows, seeds, failed))
    data = [result.as_json() for result in results]
    folder = Path(config.output) / "ablations"
    folder.mkdir(parents=True, exist_ok=True)
    for result, plain in zip(results, data, strict=True):
        path = folder / f"{result.method}-{result.scheme}-{result.design}"
        write_atomically(path.with_name(f"{path.name}.json"), json.dumps(plain, indent=1).encode())
        if drawn := ablation.as_svg(result):
            write_atomically(path.with_name(f"{path.name}.svg"), drawn.encode())
    if given["format_"] == "json":
        click.echo(json.dumps(data, indent=1))
    else:
        click.echo("\n\n".join(as_markdown(result) for result in results))
    if outcome.failures:
        raise NumericalError(
            f"{failures_said(outcome.failures, len(cells))} The tables above are of the others, in {config.output}. "
            "Give the command again with --retry-failed to try the failed ones once more."
        )


def as_markdown(result: Any) -> str:
    """One ablation as a Markdown table, readable in a terminal too."""
    seeds = f", seeds {', '.join(map(str, result.seeds))}" if len(result.seeds) > 1 else ""
    lines = [
        f"### {result.method} {result.scheme}, {result.design}",
        "",
        f"{result.metric} {format_value(result.perplexity)} on {result.n_windows} windows{seeds}, "
        f"{format_seconds(result.seconds) if result.seconds > 0 else '0s'}. Reference: {result.base}.",
        "",
        "| change | perplexity | effect, nats/token | | time | bits/weight |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for effect in result.effects:
        half = "" if effect.half_width is None else f" ± {effect.half_width:.4f}"
        ppl = "—" if effect.perplexity is None else format_value(effect.perplexity)
        spread = "" if effect.seed_std is None else f" (seeds ± {effect.seed_std:.4f})"
        lines.append(
            f"| {effect.switch} | {ppl} | {effect.nats:+.4f}{half}{spread} | {effect.verdict} "
            f"| {effect.seconds:+.1f}s | {effect.bits_per_weight:+.2f} |"
        )
    lines += [f"| {name} | — | | failed: {error} | | |" for name, error in result.failed.items()]
    return "\n".join(lines)


ablate = Command(
    "ablate",
    _ablate,
    [
        *grid_options(),
        Option(
            WHAT, ["--design"], type=click.Choice(["leave-one-out", "one-at-a-time", "factorial"]),
            default="leave-one-out", help="Which runs to make. Default: leave-one-out.",
        ),
        Option(WHAT, ["--switch", "switches"], multiple=True, metavar="OPTION", help="Only these; repeatable."),
        Option(
            WHAT, ["--samples"], multiple=True, type=click.IntRange(1),
            help="Also with N calibration windows; repeatable.",
        ),
        Option("Where", ["--retry-failed"], is_flag=True, help="Also compute runs whose failure is on record."),
        Option("Where", ["--restart"], is_flag=True, help="Ignore earlier checkpoints and results."),
        format_option("Where", ("markdown", "json")),
    ],
)  # fmt: skip
