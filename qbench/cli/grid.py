"""A grid of cells from a command line: a sweep's file, with the options of `qbench run` laid over it.

What `sweep`, `plan` and `ablate` have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from qbench.cells import Cell, SweepConfig, expand, idle_exclusions, read_sweep
from qbench.cli.method_options import apply_settings, method_options, settings_of
from qbench.cli.options import CONFIG_OPTIONS, Option, config_option, fill
from qbench.errors import ConfigError, counted

if TYPE_CHECKING:
    from qbench.failures import Failure

WHAT = "What to compute (each replaces what the file says)"
SHARED = ("Calibration", "Evaluation", "Computation")
NOT_HERE = {"seeds"}


def grid_options() -> list[click.Parameter]:
    """The file and everything that may replace what it says."""
    made: list[click.Parameter] = [
        click.Argument(["file"], required=False, metavar="[FILE.yaml]"),
        Option(WHAT, ["--model", "-m", "models"], multiple=True, metavar="NAME", help="Models; repeatable."),
        Option(WHAT, ["--method", "methods"], multiple=True, metavar="NAME", help="Methods; repeatable."),
        Option(WHAT, ["--scheme", "schemes"], multiple=True, metavar="SCHEME", help="Schemes; repeatable."),
        Option(WHAT, ["--seeds"], metavar="N|A,B,…", help="Calibration seeds: how many from --seed on, or a list."),
        Option(
            WHAT, ["--set", "settings"], multiple=True, metavar="[METHOD.]OPTION=VALUE",
            help="Any option of a method of the grid; repeatable.",
        ),
        Option("Model", ["--dtype", "compute__model_dtype"], type=click.STRING, help="Precision of the models."),
    ]  # fmt: skip
    made += method_options()
    for title in SHARED:
        made += [
            config_option(title, flags, path) for flags, path in CONFIG_OPTIONS[title] if path not in NOT_HERE
        ]
    where = "Where"
    made += [
        Option(where, ["--output", "-o"], metavar="DIR", help="Folder of the records. Default: results."),
        Option(
            where, ["--executor", "executor__kind"], type=click.Choice(["local", "ray"]),
            help="local: processes of this machine. ray: a cluster. Default: local.",
        ),
        Option(where, ["--workers", "executor__workers"], type=int, help="Groups of cells computed at once."),
        Option(where, ["--ray-address", "executor__address"], help="An existing cluster; auto finds it."),
    ]  # fmt: skip
    return made


def read(given: dict[str, Any]) -> tuple[SweepConfig, list[Cell]]:
    """The sweep that a command line asks for, and its cells.

    Raises:
        ConfigError: For anything that is wrong with the request.
    """
    over: dict[str, Any] = {}
    paths = [path for title in SHARED for _, path in CONFIG_OPTIONS[title] if path not in NOT_HERE]
    paths += ["compute.model_dtype", "executor.kind", "executor.workers", "executor.address", "output"]
    fill(over, given, paths)
    if given["models"]:
        over["models"] = [{"name": name} for name in given["models"]]
    if given["methods"]:
        over["methods"] = [{"name": name} for name in given["methods"]]
    if given["schemes"]:
        over["schemes"] = list(given["schemes"])
    if given["seeds"]:
        over["seeds"] = _seeds(given["seeds"])
    if given["methods"] or given["schemes"]:
        over["cells"] = []
    config = read_sweep(given["file"], over)
    for idle in idle_exclusions(config):
        click.echo(f"note: exclude {idle} leaves nothing out: no cell of the grid is so", err=True)
    settings = settings_of(given)
    if settings:
        if not config.methods:
            raise ConfigError(
                f"{settings[0].written} is for the methods of a grid; this sweep has a list of cells only."
            )
        requests, remarks = apply_settings(config.methods, settings, published=False)
        for remark in remarks:
            click.echo(f"note: {remark}", err=True)
        config = config.model_copy(update={"methods": requests})
    return config, expand(config, restart=given.get("restart", False))


def failures_said(failures: Mapping[str, Failure], n_cells: int) -> str:
    """How many cells failed, and each with its error, which may begin with the cell's label itself."""
    said = [
        failure.error if failure.error.startswith(label) else f"{label}: {failure.error}"
        for label, failure in failures.items()
    ]
    return f"{len(failures)} of {counted(n_cells, 'cell')} failed. {' '.join(said)}"


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError:
        raise ConfigError(f"--seeds {text!r}: write how many (3), or which (2,5,7).") from None
