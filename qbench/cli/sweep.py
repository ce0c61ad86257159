"""`qbench sweep` and `qbench plan`: a file of cells, with the options of `qbench run` laid over it."""

from __future__ import annotations

from typing import Any

import click

from qbench.cells import Cell, SweepConfig, expand, read_sweep
from qbench.cli.run import (
    CONFIG_OPTIONS,
    METHOD_OPTIONS,
    _apply,
    _Command,
    _config_option,
    _method_option,
    _Option,
    _parse_setting,
    _put,
    _Setting,
)
from qbench.errors import ConfigError, NumericalError

WHAT = "What to compute (each replaces what the file says)"
SHARED = ("Calibration", "Evaluation", "Computation")
NOT_HERE = {"seeds"}


def _options() -> list[click.Parameter]:
    made: list[click.Parameter] = [
        click.Argument(["file"], required=False, metavar="[FILE.yaml]"),
        _Option(WHAT, ["--model", "-m", "models"], multiple=True, metavar="NAME", help="Models; repeatable."),
        _Option(WHAT, ["--method", "methods"], multiple=True, metavar="NAME", help="Methods; repeatable."),
        _Option(WHAT, ["--scheme", "schemes"], multiple=True, metavar="SCHEME", help="Schemes; repeatable."),
        _Option(WHAT, ["--seeds"], metavar="N|A,B,…", help="Calibration seeds: how many from --seed on, or a list."),
        _Option(
            WHAT, ["--set", "settings"], multiple=True, metavar="[METHOD.]OPTION=VALUE",
            help="Any option of a method of the grid; repeatable.",
        ),
        _Option("Model", ["--dtype", "compute__model_dtype"], type=click.STRING, help="Precision of the models."),
    ]  # fmt: skip
    made += [_method_option(name, kind, help) for name, (kind, help) in METHOD_OPTIONS.items()]
    for title in SHARED:
        made += [
            _config_option(title, flags, path)
            for flags, path in CONFIG_OPTIONS[title]
            if path not in NOT_HERE
        ]
    where = "Where"
    made += [
        _Option(where, ["--output", "-o"], metavar="DIR", help="Folder of the records. Default: results."),
        _Option(
            where, ["--executor", "executor__kind"], type=click.Choice(["local", "ray"]),
            help="local: processes of this machine. ray: a cluster. Default: local.",
        ),
        _Option(where, ["--workers", "executor__workers"], type=int, help="Groups of cells computed at once."),
        _Option(where, ["--ray-address", "executor__address"], help="An existing cluster; auto finds it."),
    ]  # fmt: skip
    return made


def read(given: dict[str, Any]) -> tuple[SweepConfig, list[Cell]]:
    """The sweep that a command line asks for, and its cells.

    Raises:
        ConfigError: For anything that is wrong with the request.
    """
    over: dict[str, Any] = {}
    paths = [path for title in SHARED for _, path in CONFIG_OPTIONS[title] if path not in NOT_HERE]
    for path in [
        *paths,
        "compute.model_dtype",
        "executor.kind",
        "executor.workers",
        "executor.address",
        "output",
    ]:
        value = given.get(path.replace(".", "__"))
        if value is not None and value != ():
            _put(over, path, list(value) if isinstance(value, tuple) else value)
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
    settings = [
        _Setting(None, name, given[f"method__{name}"], "--" + name.replace("_", "-"))
        for name in METHOD_OPTIONS
        if given[f"method__{name}"] is not None
    ]
    settings += [_parse_setting(text) for text in given["settings"]]
    if settings:
        if not config.methods:
            raise ConfigError(
                f"{settings[0].written} is for the methods of a grid; this sweep has a list of cells only."
            )
        requests, remarks = _apply(config.methods, settings, published=False)
        for remark in remarks:
            click.echo(f"note: {remark}", err=True)
        config = config.model_copy(update={"methods": requests})
    return config, expand(config, restart=given.get("restart", False))


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError:
        raise ConfigError(f"--seeds {text!r}: write how many (3), or which (2,5,7).") from None


def _sweep(**given: Any) -> None:
    """Compute a grid or a list of cells: methods × schemes × models × seeds.

    Cells that share model, calibration and arithmetic are computed on one pass through the model. What the output
    folder has is not computed again; the same command goes on where it was interrupted.
    """
    config, cells = read(given)
    from qbench import sweep as sweeps

    click.echo(f"{len(cells)} cells, checked before anything is computed …", err=True)
    sweeps.check(cells)
    executor = sweeps.make_executor(config.executor)
    from qbench.cli.compare import show
    from qbench.cli.sweep_view import watching
    from qbench.reports.comparison import compare

    with watching() as view:
        outcome = sweeps.sweep(cells, executor, view, given["retry_failed"])
    if outcome.results:
        show(compare(outcome.results, allow_mixed=True), given["format_"])
    if outcome.failures:
        said = " ".join(f"{label}: {failure.error}" for label, failure in outcome.failures.items())
        raise NumericalError(
            f"{len(outcome.failures)} of {len(cells)} cells failed; the others are in {config.output}. {said} "
            "Give the command again with --retry-failed to try them once more."
        )


sweep = _Command(
    "sweep",
    callback=_sweep,
    params=[
        *_options(),
        _Option(
            "Where", ["--retry-failed"], is_flag=True, help="Also compute cells whose failure is on record."
        ),
        _Option("Where", ["--restart"], is_flag=True, help="Ignore earlier checkpoints and results."),
        _Option(
            "Where",
            ["--format", "format_"],
            type=click.Choice(["table", "json", "csv", "markdown", "latex"]),
            default="table",
            help="Form of the result on stdout. Default: table.",
        ),
    ],
    help=_sweep.__doc__,
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)


def _plan(**given: Any) -> None:
    """Predict what a sweep will cost, from a probe of one block, and refuse what cannot fit.

    Nothing is computed and nothing is written. Times are of this machine as it is now, with nothing else on it.
    """
    config, cells = read(given)
    from qbench import sweep as sweeps

    sweeps.check(cells)
    from qbench.cli.sweep_view import watching

    with watching() as view:
        view.begin(cells)
        plans = sweeps.plan(cells, view)
    from qbench.cli.plan_table import print_plans

    print_plans(plans, config.executor.workers or 1, given["format_"])
    problems = [f"{plan.model}: {problem}" for plan in plans for problem in plan.problems]
    if problems:
        raise ConfigError(" ".join(problems))


plan = _Command(
    "plan",
    callback=_plan,
    params=[
        *_options(),
        _Option("Where", ["--restart"], is_flag=True, help="As if there were no earlier results."),
        _Option("Where", ["--format", "format_"], type=click.Choice(["table", "json"]), default="table",
                help="Form of the result on stdout. Default: table."),
    ],
    help=_plan.__doc__,
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)  # fmt: skip
