"""`qbench run`: options in qbench's or the authors' names, turned into one RunConfig and handed to the runner.

An option that the configuration has takes its help from there; one that is a method's goes to the methods that have a
field of its name. Nothing here has a default of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qbench.cli.method_options import Setting, apply_settings, method_options, settings_of
from qbench.cli.options import (
    CONFIG_OPTIONS,
    Command,
    Option,
    config_option,
    field_help,
    file_option,
    fill,
    format_option,
    put,
)
from qbench.config import RunConfig, read_mapping, validated
from qbench.errors import ConfigError
from qbench.results import require_writable
from qbench.scheme import Scheme


def _options() -> list[click.Parameter]:
    what = "What to compare"
    compared = [
        Option(what, ["--method", "methods"], multiple=True, metavar="NAME", help=field_help("methods")),
        Option(what, ["--scheme", "schemes"], multiple=True, metavar="SCHEME", help=field_help("schemes")),
        Option(what, ["--wbits"], type=int, help="Instead of --scheme: bits of weights."),
        Option(what, ["--abits"], type=int, help="With --wbits: bits of activations. Default: 16."),
        Option(what, ["--group-size"], type=int, help="With --wbits: input channels per scale."),
        Option(what, ["--symmetric"], is_flag=True, help="With --wbits: no zero points."),
        Option(
            what,
            ["--published-form"],
            is_flag=True,
            help="The quantizer and the transforms as the authors' code has them, function-preserving or not.",
        ),
        Option(
            what,
            ["--set", "settings"],
            multiple=True,
            metavar="[METHOD.]OPTION=VALUE",
            help="Any option of a method; repeatable.",
        ),
    ]
    made = {
        title: [config_option(title, flags, path) for flags, path in rows]
        for title, rows in CONFIG_OPTIONS.items()
    }
    made["Evaluation"].append(
        Option(
            "Evaluation",
            ["--eval-ppl"],
            is_flag=True,
            help="Accepted and implied: perplexity is always measured.",
        )
    )
    made["Output"] += [format_option(), file_option()]
    return [
        *made.pop("Model"),
        *compared,
        *method_options(),
        *(option for section in made.values() for option in section),
    ]


def _run(**given: Any) -> None:
    """Quantize a model by several methods and schemes, evaluate, and compare with full precision.

    With nothing else given, AffineQuant at W4A4 on a small embedded model, without network or GPU. Every row is also
    written to the output folder. Options may be written with - or _.
    """
    config, remarks = resolve(given)
    require_writable(config.output, "--output")
    if config.save_dir is not None:
        require_writable(config.save_dir, "--save-dir")
    click.echo(config.to_yaml(), err=True)
    for remark in remarks:
        click.echo(f"note: {remark}", err=True)

    from qbench import runner
    from qbench.cli.compare import echo_generations, show
    from qbench.cli.progress import listening
    from qbench.reports.comparison import compare

    with listening() as listener:
        results = runner.run(config, listener)
    echo_generations(results)
    # All rows are of this run; whatever sets them apart is printed, not refused after the work is done.
    show(compare(results, allow_mixed=True), given["format_"])


def resolve(given: dict[str, Any]) -> tuple[RunConfig, list[str]]:
    """Turn parsed options into a configuration, and remarks on how they were understood.

    Raises:
        ConfigError: For anything that is wrong with the request.
    """
    request = read_mapping(given["config"]) if given["config"] else {}
    parameters = None
    if given["resume"] is not None and _is_parameter_file(given["resume"]):
        parameters, given = given["resume"], given | {"resume": None}
    fill(request, given, (path for rows in CONFIG_OPTIONS.values() for _, path in rows))
    if given["methods"]:
        request["methods"] = list(given["methods"])
    schemes = _schemes(given)
    if schemes:
        request["schemes"] = schemes
    if given["published_form"]:
        put(request, "quantizer.zero_in_range", False)
        put(request, "quantizer.attention_granularity", "published")
    config = validated(RunConfig, request, "the run's configuration")
    settings = settings_of(given)
    if parameters is not None:
        settings.append(Setting(None, "parameters", parameters, "--resume FILE"))
    requests, remarks = apply_settings(config.methods, settings, given["published_form"])
    return config.model_copy(update={"methods": requests}), remarks


def _is_parameter_file(path: str) -> bool:
    """Whether --resume names a file of learned parameters rather than a run's folder."""
    return Path(path).is_file() or (path.endswith((".pth", ".pt")) and not Path(path).is_dir())


def _schemes(given: dict[str, Any]) -> list[str]:
    written = [f"--{name.replace('_', '-')}" for name in ("abits", "group_size") if given[name] is not None]
    written += ["--symmetric"] if given["symmetric"] else []
    if given["wbits"] is None:
        if written:
            raise ConfigError(
                f"{' and '.join(written)} without --wbits. Give that too, or one --scheme such as W4A4g128-sym."
            )
        return list(given["schemes"])
    if given["schemes"]:
        raise ConfigError("--wbits and --scheme say the same thing: use one of them.")
    abits = 16 if given["abits"] is None else given["abits"]
    return [str(Scheme(given["wbits"], abits, None, given["group_size"] or None, given["symmetric"]))]


run = Command("run", _run, _options())
