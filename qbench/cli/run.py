"""`qbench run`: options in qbench's or the authors' names, turned into one RunConfig and handed to the runner.

An option that the configuration has takes its help from there; one that is a method's goes to the methods that have a
field of its name. Nothing here has a default of its own.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qbench.config import MethodRequest, RunConfig, read_mapping, validated
from qbench.errors import ConfigError, suggest
from qbench.results import Result, require_writable
from qbench.scheme import Scheme

# Section of --help -> (flags, path of the field in RunConfig).
CONFIG_OPTIONS: dict[str, list[tuple[str, str]]] = {
    "Model": [
        ("--model -m", "model"),
        ("--revision", "revision"),
        ("--trust-remote-code", "trust_remote_code"),
        ("--dtype", "compute.model_dtype"),
    ],
    "Calibration": [
        ("--calib-dataset --dataset", "calibration.dataset"),
        ("--nsamples --n-samples", "calibration.n_samples"),
        ("--seqlen --seq-len", "calibration.seq_len"),
        ("--seed", "calibration.seed"),
        ("--act-scales", "calibration.act_scales"),
        ("--act-shifts", "calibration.act_shifts"),
        ("--seeds", "seeds"),
    ],
    "Evaluation": [
        ("--eval", "evals.datasets"),
        ("--limit", "evals.limit"),
        ("--tasks", "evals.tasks"),
        ("--limit-items", "evals.limit_items"),
        ("--fewshot", "evals.fewshot"),
        ("--word-perplexity", "evals.word_perplexity"),
        ("--fidelity", "evals.fidelity"),
        ("--generate", "evals.generate"),
        ("--eval-batch-size", "evals.batch_size"),
    ],
    "Computation": [
        ("--device", "compute.device"),
        ("--autocast", "compute.autocast"),
        ("--batch-size", "compute.batch_size"),
        ("--micro-batch", "compute.micro_batch"),
        ("--hidden-states", "compute.hidden_states"),
        ("--threads", "compute.threads"),
        ("--allow-fallback", "compute.allow_fallback"),
    ],
    "Output": [
        ("--output -o --output-dir", "output"),
        ("--save-dir", "save_dir"),
        ("--export", "export"),
        ("--save-act-scales", "save_act_scales"),
        ("--resume", "resume"),
        ("--restart", "restart"),
    ],
}
# The authors' options that belong to a method: name of the method's field -> (type, help).
METHOD_OPTIONS: dict[str, tuple[type, str]] = {
    "let": (bool, "learn equivalent transforms"),
    "lwc": (bool, "learn the clipping of weights"),
    "use_matrix": (bool, "per-head matrices on queries and keys"),
    "use_ln_matrix": (bool, "full matrices after the norms"),
    "sf": (float, "stability factor of the gradual mask"),
    "aug_loss": (bool, "auxiliary loss"),
    "shift": (bool, "learn shifts as well"),
    "alpha": (float, "exponent of the initial scales"),
    "let_lr": (float, "learning rate of the transforms"),
    "lwc_lr": (float, "learning rate of the clipping"),
    "epochs": (int, "passes over the calibration windows for each block"),
    "bit_balance": (bool, "five levels instead of four for 2-bit weights (W2*)"),
}
METHOD_SECTION = "Options of methods (see `qbench methods NAME`; default: the method's preset for the scheme)"


class _Option(click.Option):
    """An option that knows under which heading of --help it stands."""

    def __init__(self, section: str, flags: Iterable[str], **attributes: Any) -> None:
        super().__init__(list(flags), **attributes)
        self.section = section


class _Command(click.Command):
    """A command whose --help is in sections and whose options may be written with - or _."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _field(path: str, model: type[BaseModel] = RunConfig) -> FieldInfo:
    *sections, name = path.split(".")
    for section in sections:
        annotation = model.model_fields[section].annotation
        assert isinstance(annotation, type)
        model = annotation
    return model.model_fields[name]


def _help(path: str, model: type[BaseModel] = RunConfig) -> str:
    """A field's description, with its default if that says something the description does not."""
    field = _field(path, model)
    default = field.get_default(call_default_factory=True)
    if default is None or default is False or default == [] or "Default:" in (field.description or ""):
        return field.description or ""
    shown = [getattr(item, "name", item) for item in default] if isinstance(default, list) else [default]
    return f"{field.description} Default: {', '.join(map(str, shown))}."


def _config_option(section: str, flags: str, path: str, model: type[BaseModel] = RunConfig) -> _Option:
    """An option for a configuration's field: its type from the annotation, its help from the description."""
    field = _field(path, model)
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    attributes: dict[str, Any] = {"help": _help(path, model), "default": None}
    if kinds == [bool]:
        attributes["is_flag"] = True
    elif kinds == [int]:
        attributes["type"] = click.INT
    elif get_origin(kinds[0]) is Literal:
        attributes["type"] = click.Choice(get_args(kinds[0]))
    elif get_origin(kinds[0]) is list:
        (item,) = get_args(kinds[0])
        if get_origin(item) is Literal:
            attributes |= {"multiple": True, "type": click.Choice(get_args(item))}
        else:
            attributes |= {"multiple": True, "metavar": "NAME|PATH|NAME=PATH"}
    return _Option(section, [*flags.split(), path.replace(".", "__")], **attributes)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _method_option(name: str, kind: type, help: str) -> _Option:
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    return _Option(METHOD_SECTION, [flag, f"method__{name}"], type=kind, default=None, help=help)


def form_and_file() -> list[click.Parameter]:
    """Options of every command that measures: the form of its result, and a file with the rest."""
    return [
        _Option(
            "Output",
            ["--format", "format_"],
            type=click.Choice(["table", "json", "csv", "markdown", "latex"]),
            default="table",
            help="Form of the result on stdout. Default: table.",
        ),
        _Option(
            "Output",
            ["--config"],
            metavar="FILE.yaml",
            help="Read all this from a file; options override it.",
        ),
    ]


def _options() -> list[click.Parameter]:
    what = "What to compare"
    compared = [
        _Option(what, ["--method", "methods"], multiple=True, metavar="NAME", help=_help("methods")),
        _Option(what, ["--scheme", "schemes"], multiple=True, metavar="SCHEME", help=_help("schemes")),
        _Option(what, ["--wbits"], type=int, help="Instead of --scheme: bits of weights."),
        _Option(what, ["--abits"], type=int, help="With --wbits: bits of activations. Default: 16."),
        _Option(what, ["--group-size"], type=int, help="With --wbits: input channels per scale."),
        _Option(what, ["--symmetric"], is_flag=True, help="With --wbits: no zero points."),
        _Option(
            what,
            ["--published-form"],
            is_flag=True,
            help="The quantizer and the transforms as the authors' code has them, function-preserving or not.",
        ),
        _Option(
            what,
            ["--set", "settings"],
            multiple=True,
            metavar="[METHOD.]OPTION=VALUE",
            help="Any option of a method; repeatable.",
        ),
    ]
    made = {
        title: [_config_option(title, flags, path) for flags, path in rows]
        for title, rows in CONFIG_OPTIONS.items()
    }
    made["Evaluation"].append(
        _Option(
            "Evaluation",
            ["--eval-ppl"],
            is_flag=True,
            help="Accepted and implied: perplexity is always measured.",
        )
    )
    made["Output"] += form_and_file()
    methods = [_method_option(name, kind, help) for name, (kind, help) in METHOD_OPTIONS.items()]
    return [
        *made.pop("Model"),
        *compared,
        *methods,
        *(option for section in made.values() for option in section),
    ]


@dataclass(frozen=True)
class _Setting:
    """One option of a method as it was given; `method` None means every method that has it."""

    method: str | None
    name: str
    value: Any
    written: str


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
    from qbench.cli.compare import show
    from qbench.cli.progress import listening
    from qbench.reports.comparison import compare

    with listening() as listener:
        results = runner.run(config, listener)
    echo_generations(results)
    # All rows are of this run; whatever sets them apart is printed, not refused after the work is done.
    show(compare(results, allow_mixed=True), given["format_"])


def echo_generations(results: Sequence[Result]) -> None:
    """Greedy continuations side by side, on stderr: full precision above, the row's below."""
    for row in results:
        for i, made in enumerate(row.generations, 1):
            place = f"first difference at token {made.differs_at}"
            click.echo(f"\n{row.method} {row.scheme}, prompt {i}: {place}", err=True)
            for label, text in (("prompt", made.prompt[-100:]), ("full", made.reference), ("row", made.text)):
                click.echo(f"  {label:7}{text!r}", err=True)


def resolve(given: dict[str, Any]) -> tuple[RunConfig, list[str]]:
    """Turn parsed options into a configuration, and remarks on how they were understood.

    Raises:
        ConfigError: For anything that is wrong with the request.
    """
    request = read_mapping(given["config"]) if given["config"] else {}
    parameters = None
    if given["resume"] is not None and _is_parameter_file(given["resume"]):
        parameters, given = given["resume"], given | {"resume": None}
    for _, path in (row for rows in CONFIG_OPTIONS.values() for row in rows):
        value = given[path.replace(".", "__")]
        if value is not None and value != ():
            _put(request, path, list(value) if isinstance(value, tuple) else value)
    if given["methods"]:
        request["methods"] = list(given["methods"])
    schemes = _schemes(given)
    if schemes:
        request["schemes"] = schemes
    if given["published_form"]:
        _put(request, "quantizer.zero_in_range", False)
        _put(request, "quantizer.attention_granularity", "published")
    config = validated(RunConfig, request, "the run's configuration")
    settings = [
        _Setting(None, name, given[f"method__{name}"], "--" + name.replace("_", "-"))
        for name in METHOD_OPTIONS
        if given[f"method__{name}"] is not None
    ]
    settings += [_parse_setting(text) for text in given["settings"]]
    if parameters is not None:
        settings.append(_Setting(None, "parameters", parameters, "--resume FILE"))
    requests, remarks = _apply(config.methods, settings, given["published_form"])
    return config.model_copy(update={"methods": requests}), remarks


def _is_parameter_file(path: str) -> bool:
    """Whether --resume names a file of learned parameters rather than a run's folder."""
    return Path(path).is_file() or (path.endswith((".pth", ".pt")) and not Path(path).is_dir())


def _put(request: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        inner = request.setdefault(section, {})
        if not isinstance(inner, dict):  # a malformed file: leave it to be refused with its own words
            return
        request = inner
    request[name] = value


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


def _parse_setting(text: str) -> _Setting:
    """Read `method.option=value`. The method's own model converts the value; lists and null are written as in YAML."""
    left, equals, value = text.partition("=")
    method, dot, name = left.strip().rpartition(".")
    if not equals or not name or (dot and not method):
        raise ConfigError(f"Cannot read --set {text!r}. Write OPTION=VALUE or METHOD.OPTION=VALUE.")
    parsed: Any = value.strip()
    if parsed[:1] in ("[", "{") or parsed.lower() in ("null", "none"):
        parsed = None if parsed.lower() == "none" else yaml.safe_load(parsed)
    return _Setting(method or None, name.replace("-", "_"), parsed, f"--set {left.strip()}")


def _apply(
    requests: list[MethodRequest], settings: list[_Setting], published: bool
) -> tuple[list[MethodRequest], list[str]]:
    """Give each setting to the methods that have it; values come back as the methods' models read them."""
    from qbench.methods import METHODS

    classes = {request.name: METHODS.load(request.name) for request in requests}
    options = [
        {_full_name(classes[request.name], option): value for option, value in request.options.items()}
        for request in requests
    ]
    remarks = []
    for setting in settings:
        holders = _holders(setting, classes)
        lacking = [name for name in classes if name not in holders]
        if setting.method is None and lacking:
            remarks.append(
                f"{setting.written} goes to {', '.join(holders)}; no such option: {', '.join(lacking)}"
            )
        for request, chosen in zip(requests, options, strict=True):
            if request.name in holders:
                chosen[holders[request.name]] = setting.value
    finished = []
    for request, chosen in zip(requests, options, strict=True):
        chosen = (_published_form(classes[request.name]) if published else {}) | chosen
        method = validated(classes[request.name], chosen, f"the options of method {request.name}")
        finished.append(
            MethodRequest(name=request.name, options=method.model_dump(mode="json", include=set(chosen)))
        )
    return finished, remarks


def _published_form(method: Any) -> dict[str, Any]:
    """Options that a method needs for the form that its authors published: a field `published`, or its own list."""
    return (
        {"published": True}
        if "published" in method.model_fields
        else dict(getattr(method, "published_form", {}))
    )


def _full_name(method: Any, option: str) -> str:
    """An option as a composition's model has it, which may also be written with its part's name in front."""
    full_name = getattr(method, "full_name", None)
    return option if full_name is None else full_name(option)


def _addressed(name: str, method: Any, owner: str | None) -> dict[str, str]:
    """Option to field of what `owner.option` may mean in a chosen method, which may be composed of several."""
    if owner in (None, name):
        return {field: field for field in method.model_fields}
    composed: dict[tuple[str, str], str] = getattr(method, "field_names", {})
    return {option: field for (part, option), field in composed.items() if part == owner}


def _holders(setting: _Setting, classes: dict[str, Any]) -> dict[str, str]:
    """Chosen methods that the setting is for, and the field that it means there.

    Raises:
        ConfigError: If there is none; names the methods that have the option, or the options that the method has.
    """
    from qbench.methods import METHODS

    addressed = {name: _addressed(name, method, setting.method) for name, method in classes.items()}
    holders = {name: options[setting.name] for name, options in addressed.items() if setting.name in options}
    if setting.method is not None and not holders:
        parts = dict.fromkeys(part for name in classes for part in (name, *name.split("+")))
        if setting.method not in parts:
            raise ConfigError(
                f"{setting.written}: {setting.method!r} is not among the chosen methods ({', '.join(classes)})."
                + suggest(setting.method, parts)
            )
        known = list(dict.fromkeys(option for options in addressed.values() for option in options))
        raise ConfigError(
            f"Method {setting.method} has no option {setting.name!r}.{suggest(setting.name, known)} "
            f"It has: {', '.join(known) or 'none'}."
        )
    if not holders:
        prefixed = {
            f"--set {part}.{option}=VALUE"
            for method in classes.values()
            for part, option in getattr(method, "field_names", {})
            if option == setting.name
        }
        if prefixed:
            raise ConfigError(
                f"{setting.written}: several parts of {', '.join(classes)} have this option. "
                f"Write {' or '.join(sorted(prefixed))}."
            )
        elsewhere, every = [], set()
        for name in METHODS.names():
            try:
                fields = METHODS.load(name).model_fields
            except ConfigError:  # somebody else's broken plugin is not what this request is about
                continue
            every.update(fields)
            elsewhere += [name] if setting.name in fields else []
        where = f"It is an option of {', '.join(elsewhere)}." if elsewhere else "No method has it."
        near = "" if elsewhere else suggest(setting.name, every)
        raise ConfigError(f"{setting.written} is no option of {', '.join(classes)}. {where}{near}")
    return holders


run = _Command(
    "run",
    callback=_run,
    params=_options(),
    help=_run.__doc__,
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)
