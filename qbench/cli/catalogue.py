"""`qbench methods`, `qbench models`, `qbench check`: what is there, read from the classes themselves."""

from __future__ import annotations

import shutil
import textwrap
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic_core import PydanticUndefined

from qbench.errors import QbenchError

ASSETS = Path(__file__).parent.parent / "assets"


def _paragraph(text: str, indent: int = 0) -> None:
    width = min(shutil.get_terminal_size().columns, 110)
    wrapped = textwrap.wrap(text, max(width - indent, 30), break_long_words=False, break_on_hyphens=False)
    click.echo(textwrap.indent("\n".join(wrapped), " " * indent))


def _summary(thing: Any) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]


@click.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the methods, or the options of one."""
    from qbench.methods import METHODS

    if name is not None:
        _show_method(name, METHODS.load(name), METHODS.origin(name))
        return
    for known in METHODS.names():
        click.secho(known, bold=True)
        try:
            method = METHODS.load(known)
        except QbenchError as error:  # one broken plugin does not hide the others
            _paragraph(str(error), 2)
            continue
        _paragraph(_summary(method), 2)
        if METHODS.origin(known) != "built in":
            _paragraph(f"from {METHODS.origin(known)}", 2)
        if getattr(method, "paper", ""):
            _paragraph(method.paper, 2)
    click.echo("\nOptions of one method: qbench methods NAME")


def _show_method(name: str, method: Any, origin: str) -> None:
    click.secho(name, bold=True)
    _paragraph(_summary(method), 2)
    for line in filter(
        None, (getattr(method, "paper", ""), "" if origin == "built in" else f"from {origin}")
    ):
        _paragraph(line, 2)
    click.echo("\nOptions" if method.model_fields else "\nNo options.")
    for option, field in method.model_fields.items():
        default = "required" if field.default is PydanticUndefined else f"default {_default(field)}"
        click.echo(f"  {click.style(option, bold=True)}  {type_name(field.annotation)}, {default}")
        _paragraph(field.description or "", 6)
    presets = method.presets() if hasattr(method, "presets") else {}
    if presets:
        click.echo("\nPresets")
        for scheme, recipe in presets.items():
            _paragraph(f"{scheme}: {recipe}", 2)
    if method.model_fields:
        click.echo(f"\nSet one: qbench run --method {name} --set {next(iter(method.model_fields))}=VALUE")


def _default(field: Any) -> str:
    if field.default is None:
        return "by preset" if "Preset" in (field.description or "") else "none"
    if isinstance(field.default, tuple):
        return f"[{', '.join(map(str, field.default))}]"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def type_name(annotation: Any) -> str:
    """A type as a user writes its values: `float`, `legal | published`; None, which stands for a preset, left out."""
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(type_name(kind) for kind in get_args(annotation) if kind is not type(None))
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"[{type_name(get_args(annotation)[0])}, …]"
    if get_origin(annotation) is None and isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


@click.command()
def models() -> None:
    """List the supported architectures and the embedded models."""
    from qbench.models import ARCHITECTURES

    click.echo("Architectures (a hub name or a folder with one of these model types)")
    for name in ARCHITECTURES.names():
        architecture = ARCHITECTURES.load(name)
        click.echo(f"  {click.style(name, bold=True)}  model type {', '.join(architecture.model_types)}")
        _paragraph(architecture.summary, 6)
    click.echo("\nEmbedded models (need no network)")
    for config in sorted(ASSETS.glob("*/config.json")):
        size = sum(file.stat().st_size for file in config.parent.iterdir() if file.is_file())
        click.echo(f"  {click.style(config.parent.name, bold=True)}  {size / 1e6:.1f} MB  {config.parent}")


@click.command()
@click.argument("method")
def check(method: str) -> None:
    """Test that a method keeps the rules every method must keep.

    Works for any registered method, those of installed packages included. Exit status 1 if a rule is broken.
    """
    from qbench.methods import METHODS

    METHODS.load(method)  # an unknown name is refused before anything is imported or built
    from qbench.methods.conformance import check as conformance

    facts = conformance(method)
    for fact, passed, detail in facts:
        verdict = click.style("pass", fg="green") if passed else click.style("FAIL", fg="red", bold=True)
        click.echo(f"{verdict}  {fact}" + (f": {detail}" if detail else ""))
    failed = sum(not passed for _, passed, _ in facts)
    click.echo(f"{len(facts) - failed} of {len(facts)} hold for {method}.")
    if failed:
        raise SystemExit(1)
