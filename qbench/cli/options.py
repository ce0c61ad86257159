"""Options of commands, made from the configuration: type and help of each come from the field that it sets.

What several commands take stands here once: `run`, `eval` and the commands that work on a grid of cells.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qbench.config import RunConfig

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
        ("--eval-seqlen --eval-seq-len", "evals.seq_len"),
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


class Option(click.Option):
    """An option that knows under which heading of --help it stands."""

    def __init__(self, section: str, flags: Iterable[str], **attributes: Any) -> None:
        super().__init__(list(flags), **attributes)
        self.section = section


class Command(click.Command):
    """A command whose --help is in sections and whose options may be written with - or _."""

    def __init__(self, name: str, callback: Callable[..., None], params: list[click.Parameter]) -> None:
        super().__init__(
            name,
            callback=callback,
            params=params,
            help=callback.__doc__,
            context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each section under its heading, in the order in which their first options come."""
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


def field_help(path: str, model: type[BaseModel] = RunConfig) -> str:
    """A field's description, with its default if that says something the description does not."""
    field = _field(path, model)
    default = field.get_default(call_default_factory=True)
    if default is None or default is False or default == [] or "Default:" in (field.description or ""):
        return field.description or ""
    shown = [getattr(item, "name", item) for item in default] if isinstance(default, list) else [default]
    return f"{field.description} Default: {', '.join(map(str, shown))}."


def config_option(section: str, flags: str, path: str, model: type[BaseModel] = RunConfig) -> Option:
    """An option for a configuration's field: its type from the annotation, its help from the description."""
    field = _field(path, model)
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    attributes: dict[str, Any] = {"help": field_help(path, model), "default": None}
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
    return Option(section, [*flags.split(), path.replace(".", "__")], **attributes)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def format_option(
    section: str = "Output", forms: Sequence[str] = ("table", "json", "csv", "markdown", "latex")
) -> Option:
    """Form of a command's result; the first is the default."""
    return Option(
        section,
        ["--format", "format_"],
        type=click.Choice(forms),
        default=forms[0],
        help=f"Form of the result on stdout. Default: {forms[0]}.",
    )


def file_option() -> Option:
    """A file with the rest of a request."""
    return Option(
        "Output", ["--config"], metavar="FILE.yaml", help="Read all this from a file; options override it."
    )


def fill(request: dict[str, Any], given: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Lay what was given on the command line for these fields over a request."""
    for path in paths:
        value = given[path.replace(".", "__")]
        if value is not None and value != ():
            put(request, path, list(value) if isinstance(value, tuple) else value)


def put(request: dict[str, Any], path: str, value: Any) -> None:
    """Set one field of a request, by its path."""
    *sections, name = path.split(".")
    for section in sections:
        inner = request.setdefault(section, {})
        if not isinstance(inner, dict):  # a malformed file: leave it to be refused with its own words
            return
        request = inner
    request[name] = value
