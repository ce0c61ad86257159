"""Cells: what a sweep consists of. A cell is one method at one scheme on one model with one calibration seed.

A sweep file is a grid (models × methods × schemes × seeds), a list of cells, or both, and may include others. Whatever
it says becomes a list of ordinary run configurations with one method and one scheme each, so that a cell in a sweep
asks for exactly what `qbench run` would. No torch here: expanding a file is instant.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qbench.config import (
    PLACES,
    CalibrationConfig,
    ComputeConfig,
    EvalConfig,
    MethodRequest,
    Name,
    QuantizerConfig,
    RunConfig,
    Schemes,
    read_mapping,
    validated,
)
from qbench.errors import ConfigError
from qbench.scheme import Scheme

SECTIONS = ("calibration", "evals", "compute", "quantizer")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRequest(_Frozen):
    """A model, by name alone or with what else it takes to load it."""

    name: Name = Field(description="A hub name, a local folder, or an embedded model.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


class CellRequest(_Frozen):
    """One cell of a list; what it leaves out is the sweep's."""

    method: Name = Field(description="A method, see `qbench methods`.")
    options: dict[str, Any] = Field({}, description="Option to value, see `qbench methods NAME`.")
    scheme: Name = Field(description="Bit widths such as W4A16g128 or W4A4.")
    model: ModelRequest | None = Field(None, description="Default: every model of the sweep.")
    seed: int | None = Field(None, ge=0, description="Calibration seed. Default: every seed of the sweep.")
    calibration: dict[str, Any] = Field({}, description="Settings that differ from the sweep's, as below.")
    evals: dict[str, Any] = {}
    compute: dict[str, Any] = {}
    quantizer: dict[str, Any] = {}


class Exclusion(_Frozen):
    """Cells of the grid to leave out: those that agree with everything that is said here."""

    method: str | None = None
    scheme: str | None = None
    model: str | None = None

    @field_validator("scheme")
    @classmethod
    def _canonical(cls, scheme: str | None) -> str | None:
        return None if scheme is None else str(Scheme.parse(scheme))


class ExecutorConfig(_Frozen):
    """Where the cells are computed."""

    kind: Literal["local", "ray"] = Field(
        "local", description="local: processes of this machine. ray: a cluster."
    )
    workers: int | None = Field(
        None, ge=1, description="Groups of cells computed at once. Default: one per GPU, else one."
    )
    address: str | None = Field(
        None, description="ray: a cluster's address, or auto. Default: RAY_ADDRESS, else one is started here."
    )
    cpus: float | None = Field(None, gt=0, description="ray: CPUs per worker. Default: this machine's share.")
    gpus: float | None = Field(
        None, ge=0, description="ray: GPUs per worker. Default: 1 where there are any."
    )
    memory_gib: float | None = Field(None, gt=0, description="ray: memory to reserve per worker.")
    retries: int = Field(2, ge=0, description="ray: how often a worker that died is replaced.")


class SweepConfig(_Frozen):
    """A grid, a list of cells, or both."""

    models: list[ModelRequest] = Field([ModelRequest(name="tiny-llama")], min_length=1)
    methods: list[MethodRequest] = Field([], description="Methods of the grid.")
    schemes: Schemes = Field([], description="Schemes of the grid.")
    seeds: list[int] = Field(
        [], description="Calibration seeds; a number N stands for seed, seed + 1, … N of them."
    )
    cells: list[CellRequest] = Field([], description="Cells by themselves, after those of the grid.")
    exclude: list[Exclusion] = Field([], description="Cells of the grid to leave out.")
    calibration: CalibrationConfig = CalibrationConfig()
    evals: EvalConfig = EvalConfig()
    compute: ComputeConfig = ComputeConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    executor: ExecutorConfig = ExecutorConfig()
    output: Name = "results"

    @model_validator(mode="before")
    @classmethod
    def _as_in_a_run(cls, data: Any) -> Any:
        """`model: X` and `seeds: 3` as in a run's file, so that every run's file is a sweep."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "model" in data:
            if "models" in data:
                raise ValueError("model and models say the same thing: use one of them")
            alone = {key: data.pop(key) for key in ("revision", "trust_remote_code") if key in data}
            data["models"] = [{"name": data.pop("model"), **alone}]
        if isinstance(data.get("seeds"), int) and not isinstance(data["seeds"], bool):
            section = data.get("calibration")
            first = section.get("seed") if isinstance(section, dict) else None
            first = CalibrationConfig().seed if first is None else int(first)
            if data["seeds"] < 1:
                raise ValueError(f"seeds={data['seeds']}: at least one is needed")
            data["seeds"] = list(range(first, first + data["seeds"]))
        return data

    @model_validator(mode="after")
    def _some_cell(self) -> SweepConfig:
        if bool(self.methods) != bool(self.schemes):
            have, lack = ("methods", "schemes") if self.methods else ("schemes", "methods")
            raise ValueError(f"{have} without {lack}: a grid needs both")
        if not self.methods and not self.cells:
            raise ValueError("nothing to compute: give methods and schemes, or cells")
        return self


@dataclass(frozen=True)
class Cell:
    """One row that is asked for: a run's configuration with one method and one scheme.

    Attributes:
        label: Unique within its sweep; what progress, failures and logs call it.
    """

    label: str
    config: RunConfig

    @property
    def request(self) -> MethodRequest:
        """The method and its options."""
        return self.config.methods[0]

    @property
    def scheme(self) -> Scheme:
        """The numbers."""
        return self.config.parsed_schemes[0]

    @property
    def key(self) -> str:
        """Hash of the request, wherever its files lie."""
        return self.config.hash()

    @property
    def pass_key(self) -> str:
        """Equal for cells that can share one pass through a model: all but method and scheme is the same."""
        data = self.config.model_dump(mode="json", exclude={"methods", "schemes", *PLACES})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_sweep(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> SweepConfig:
    """Read a sweep file with the files it includes, then lay overrides over it.

    Args:
        path: YAML file; None begins with nothing.
        overrides: Laid over the file: mappings are merged, anything else is replaced.

    Raises:
        ConfigError: Every problem of the resulting configuration in one sentence, or an unreadable file.
    """
    content = _read(Path(path), ()) if path is not None else {}
    if overrides:
        if "models" in overrides:
            for key in ("model", "revision", "trust_remote_code"):
                content.pop(key, None)
        content = _merged({k: v for k, v in content.items() if k != "cells" or k not in overrides}, overrides)
    return validated(SweepConfig, content, "the sweep" if path is None else f"sweep {str(path)!r}")


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise ConfigError(f"{str(path)!r} includes itself by way of {' -> '.join(p.name for p in above)}.")
    content = read_mapping(path)
    included = content.pop("include", [])
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"include in {str(path)!r} is {included!r:.60}; write a file name or a list of them."
        )
    whole: dict[str, Any] = {}
    for name in names:
        whole = _merged(whole, _read(path.parent / name, (*above, path.resolve())))
    return _merged(whole, content)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; cells add up; anything else of `above` replaces what is below."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and key != "options":
            result[key] = _merged(old, value)
        elif key == "cells" and isinstance(old, list) and isinstance(value, list):
            result[key] = old + value
        else:
            result[key] = value
    return result


def expand(sweep: SweepConfig, restart: bool = False) -> list[Cell]:
    """Every cell of a sweep once: the grid model by model, seed by seed, scheme by scheme; then the list.

    Raises:
        ConfigError: All cells that cannot be read, in one sentence.
    """
    configs: list[RunConfig] = []
    problems: list[str] = []
    seeds = sweep.seeds or [sweep.calibration.seed]
    grid = itertools.product(sweep.models, seeds, sweep.schemes, sweep.methods)
    for model, seed, scheme, method in grid:
        if not any(_excluded(entry, model, scheme, method) for entry in sweep.exclude):
            configs.append(_config(sweep, restart, model, seed, scheme, method, {}))
    for i, cell in enumerate(sweep.cells):
        models = sweep.models if cell.model is None else [cell.model]
        cell_seeds = seeds if cell.seed is None else [cell.seed]
        method = MethodRequest(name=cell.method, options=cell.options)
        changes = {name: getattr(cell, name) for name in SECTIONS}
        try:
            configs += [
                _config(sweep, restart, model, seed, cell.scheme, method, changes)
                for model, seed in itertools.product(models, cell_seeds)
            ]
        except ConfigError as error:
            problems.append(f"cells.{i} ({cell.method} {cell.scheme}): {error}")
    if problems:
        raise ConfigError(" ".join(problems))
    if not configs:
        raise ConfigError("Nothing is left to compute: exclude leaves out every cell of the grid.")
    distinct = list({config.hash(): config for config in configs}.values())
    return [Cell(label, config) for label, config in zip(labels(distinct), distinct, strict=True)]


def idle_exclusions(sweep: SweepConfig) -> list[dict[str, str]]:
    """Entries of `exclude` that no cell of the grid agrees with: most likely written otherwise than the grid."""
    grid = list(itertools.product(sweep.models, sweep.schemes, sweep.methods))
    return [
        entry.model_dump(exclude_none=True)
        for entry in sweep.exclude
        if not any(_excluded(entry, *combination) for combination in grid)
    ]


def _excluded(entry: Exclusion, model: ModelRequest, scheme: str, method: MethodRequest) -> bool:
    said = {"model": model.name, "scheme": scheme, "method": method.name}
    wanted = entry.model_dump(exclude_none=True)
    return bool(wanted) and all(said[key] == value for key, value in wanted.items())


def _config(
    sweep: SweepConfig,
    restart: bool,
    model: ModelRequest,
    seed: int,
    scheme: str,
    method: MethodRequest,
    changes: Mapping[str, Mapping[str, Any]],
) -> RunConfig:
    sections = {name: getattr(sweep, name).model_dump(mode="json") for name in SECTIONS}
    sections["calibration"]["seed"] = seed
    request = {
        "model": model.name,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "methods": [method.model_dump(mode="json")],
        "schemes": [scheme],
        "output": sweep.output,
        "restart": restart,
        **_merged(sections, changes),
    }
    return RunConfig.model_validate(request)


def passes(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that can share one pass through a model, together; in order of their first cell."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.pass_key, []).append(cell)
    return list(groups.values())


def labels(configs: Sequence[RunConfig]) -> list[str]:
    """`METHOD SCHEME`, with whatever else is needed to tell the cells of one sweep apart."""
    facts = [_facts(config) for config in configs]
    varying = [
        name
        for name in dict.fromkeys(name for fact in facts for name in fact)
        if len({json.dumps(fact.get(name), sort_keys=True) for fact in facts}) > 1
    ]
    made = [f"{config.methods[0].name} {config.schemes[0]}" for config in configs]
    for name in varying:  # only as many facts as it takes
        twins = {label for label in made if made.count(label) > 1}
        if not twins:
            break
        for label in twins:
            members = [i for i, other in enumerate(made) if other == label]
            if len({json.dumps(facts[i].get(name), sort_keys=True) for i in members}) > 1:
                for i in members:
                    made[i] = _with_fact(made[i], name, facts[i].get(name))
    return made


def _with_fact(label: str, name: str, value: Any) -> str:
    if value is None:
        return label
    if name == "model":
        return f"{str(value).rstrip('/').rpartition('/')[2]}: {label}"
    return f"{label} {name.rpartition('.')[2]}={value}"


def _facts(config: RunConfig) -> dict[str, Any]:
    """What can set two cells apart besides method and scheme, the most telling first."""
    data = config.model_dump(mode="json", exclude={"methods", "schemes", *PLACES})
    facts: dict[str, Any] = {"model": data.pop("model"), **config.methods[0].options}
    facts["calibration.seed"] = data["calibration"].pop("seed")
    for name, value in data.items():
        facts |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return facts
