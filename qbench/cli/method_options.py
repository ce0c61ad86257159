"""Options that belong to methods: how they are written on a command line, and which of the methods each goes to.

The authors' options have flags of their own, any other is `--set [METHOD.]OPTION=VALUE`. Without a method's name, an
option goes to all chosen methods that have a field of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from qbench.cli.options import Option
from qbench.config import MethodRequest, validated
from qbench.errors import ConfigError, suggest

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


@dataclass(frozen=True)
class Setting:
    """One option of a method as it was given; `method` None means every method that has it."""

    method: str | None
    name: str
    value: Any
    written: str


def method_options() -> list[Option]:
    """The authors' options as flags."""
    return [_method_option(name, kind, help) for name, (kind, help) in METHOD_OPTIONS.items()]


def _method_option(name: str, kind: type, help: str) -> Option:
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    return Option(METHOD_SECTION, [flag, f"method__{name}"], type=kind, default=None, help=help)


def settings_of(given: Mapping[str, Any]) -> list[Setting]:
    """The methods' options among what was given on a command line.

    Raises:
        ConfigError: If a --set cannot be read.
    """
    flags = [
        Setting(None, name, given[f"method__{name}"], "--" + name.replace("_", "-"))
        for name in METHOD_OPTIONS
        if given[f"method__{name}"] is not None
    ]
    return flags + [_parsed(text) for text in given["settings"]]


def _parsed(text: str) -> Setting:
    """Read `method.option=value`. The method's own model converts the value; lists and null are written as in YAML."""
    left, equals, value = text.partition("=")
    method, dot, name = left.strip().rpartition(".")
    if not equals or not name or (dot and not method):
        raise ConfigError(f"Cannot read --set {text!r}. Write OPTION=VALUE or METHOD.OPTION=VALUE.")
    parsed: Any = value.strip()
    if parsed[:1] in ("[", "{") or parsed.lower() in ("null", "none"):
        parsed = None if parsed.lower() == "none" else yaml.safe_load(parsed)
    return Setting(method or None, name.replace("-", "_"), parsed, f"--set {left.strip()}")


def apply_settings(
    requests: list[MethodRequest], settings: list[Setting], published: bool
) -> tuple[list[MethodRequest], list[str]]:
    """Give each setting to the methods that have it; values come back as the methods' models read them.

    Returns:
        The methods with their options, and remarks on settings that only some of the methods have, or that have
        nothing to do beside another.

    Raises:
        ConfigError: If no chosen method has a setting, or its value is not allowed.
    """
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
        remarks += [f"{request.name}: {remark}" for remark in _idle(method, chosen)]
        finished.append(
            MethodRequest(name=request.name, options=method.model_dump(mode="json", include=set(chosen)))
        )
    return finished, remarks


def _idle(method: Any, chosen: Mapping[str, Any]) -> list[str]:
    """Options turned on by hand that do nothing, since the one they belong to is off."""
    remarks = []
    for name in chosen:
        owner = (type(method).model_fields[name].json_schema_extra or {}).get("idle_without")
        if owner is not None and getattr(method, name) is True and not getattr(method, owner):
            remarks.append(f"{name} has nothing to do while {owner} is off")
    return remarks


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


def _holders(setting: Setting, classes: dict[str, Any]) -> dict[str, str]:
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
