"""`qbench sweep` and `qbench plan`: compute a grid of cells, or say what it will cost."""

from __future__ import annotations

from typing import Any

import click

from qbench.cli.grid import failures_said, grid_options, read
from qbench.cli.options import Command, Option, format_option
from qbench.errors import ConfigError, NumericalError, counted


def _sweep(**given: Any) -> None:
    """Compute a grid or a list of cells: methods × schemes × models × seeds.

    Cells that share model, calibration and arithmetic are computed on one pass through the model. What the output
    folder has is not computed again; the same command goes on where it was interrupted.
    """
    config, cells = read(given)
    from qbench import sweep as sweeps

    click.echo(f"{counted(len(cells), 'cell')}, checked before anything is computed …", err=True)
    executor = sweeps.checked(config.executor, cells)
    from qbench.cli.compare import show
    from qbench.cli.sweep_view import watching
    from qbench.reports.comparison import compare

    with watching() as view:
        outcome = sweeps.sweep(cells, executor, view, given["retry_failed"])
    if outcome.results:
        show(compare(outcome.results, allow_mixed=True), given["format_"])
    if outcome.failures:
        raise NumericalError(
            f"{failures_said(outcome.failures, len(cells))} The others are in {config.output}. "
            "Give the command again with --retry-failed to try them once more."
        )


sweep = Command(
    "sweep",
    _sweep,
    [
        *grid_options(),
        Option(
            "Where", ["--retry-failed"], is_flag=True, help="Also compute cells whose failure is on record."
        ),
        Option("Where", ["--restart"], is_flag=True, help="Ignore earlier checkpoints and results."),
        format_option("Where"),
    ],
)


def _plan(**given: Any) -> None:
    """Predict what a sweep will cost, from a probe of one block, and refuse what cannot fit.

    Nothing is computed and nothing is written. Times are of this machine as it is now, with nothing else on it.
    """
    config, cells = read(given)
    from qbench import sweep as sweeps

    sweeps.check(cells)
    from qbench.cli.sweep_view import watching
    from qbench.planning import process_age

    checked_s = process_age()
    workers, counted_by = sweeps.workers(config.executor, cells)
    with watching() as view:
        view.begin(cells)
        plans = sweeps.plan(cells, view, workers)
    from qbench.cli.plan_table import print_plans

    print_plans(plans, workers, given["format_"], checked_s, counted_by)
    problems = [f"{plan.model}: {problem}" for plan in plans for problem in plan.problems]
    if problems:
        raise ConfigError(" ".join(problems))


plan = Command(
    "plan",
    _plan,
    [
        *grid_options(),
        Option("Where", ["--restart"], is_flag=True, help="As if there were no earlier results."),
        format_option("Where", ("table", "json")),
    ],
)
