"""Parity: run the recipes of published cells and judge them.

Cells that can share a pass through a model do: one load, one full-precision pass, one calibration. A cell that cannot
be run, because there is no such method here or because it broke down, gets its verdict like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qbench.config import MethodRequest, RunConfig, validated
from qbench.errors import ConfigError
from qbench.reports.parity import Verdict, judge
from qbench.reports.published import Published
from qbench.reports.recipes import CALIBRATION, QUANTIZER, Recipe, recipe
from qbench.results import BASELINE, Result


@dataclass(frozen=True)
class Changes:
    """What is done differently than the recipe says, and whether that can still be compared.

    Attributes:
        models: Hub name to the folder that stands in its place; full precision decides whether it is the model.
        texts: Dataset or task to a file of it; full precision decides likewise.
        calibration: A text instead of every recipe's.
        n_samples: Fewer windows; like all below, a result made so is not comparable.
        limit: Evaluation windows and task items.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    calibration: str | None = None
    n_samples: int | None = None
    seq_len: int | None = None
    limit: int | None = None
    epochs: int | None = None

    def blockers(self, of: Recipe) -> list[str]:
        """Why what was run is not what was published."""
        asked = {
            "n_samples": (self.n_samples, of.calibration["n_samples"]),
            "seq_len": (self.seq_len, CALIBRATION["seq_len"]),
        }
        cut = [
            f"{name} {ours} instead of {theirs}"
            for name, (ours, theirs) in asked.items()
            if ours not in (None, theirs)
        ]
        cut += [f"the first {self.limit} items only"] if self.limit else []
        cut += [f"{self.epochs} epochs"] if self.epochs else []
        return [f"cut short: {', '.join(cut)}"] if cut else []

    def remarks(self, of: Recipe) -> list[str]:
        """What else is different."""
        found = [f"weights from {self.models[of.model]}"] if of.model in self.models else []
        found += [f"calibrated on {self.calibration}"] if self.calibration else []
        return found + [
            f"{name} from {path}" for name, path in self.texts.items() if name in (*of.datasets, *of.tasks)
        ]


@dataclass
class Pass:
    """Cells that share one pass through a model, and the request for it.

    Attributes:
        rows: Label to the recipe's method request and scheme.
        cells: Each with its recipe and its row's label; none for full precision.
    """

    config: RunConfig
    rows: dict[str, tuple[MethodRequest, str]] = field(default_factory=dict)
    cells: list[tuple[Published, Recipe, str | None]] = field(default_factory=list)


def plan(
    cells: Sequence[Published], changes: Changes, settings: Mapping[str, Any], known: Sequence[str]
) -> tuple[list[Pass], list[Verdict]]:
    """Turn cells into passes; those that cannot be run are judged at once.

    Args:
        cells: What to run.
        changes: What to do differently than the recipes say.
        settings: Of the run: `output`, `seeds`, `compute`.
        known: Methods that there are.

    Raises:
        ConfigError: If the settings or a model's name are wrong.
    """
    named = {cell.hub_name for cell in cells}
    for name in changes.models:
        if name not in named:
            raise ConfigError(
                f"--model-path {name}: none of these cells is of it. They are of {', '.join(sorted(named))}."
            )
    groups: dict[str, list[tuple[Published, Recipe]]] = {}
    impossible = []
    for cell in cells:
        of = recipe(cell)
        if of.method is None or (of.method != BASELINE and of.method not in known):
            impossible.append(judge(cell, [], None, [f"qbench has no method {cell.method}"], of.remarks))
            continue
        groups.setdefault(_share(of, changes), []).append((cell, of))
    return [_pass(group, changes, settings) for group in groups.values()], impossible


def _share(of: Recipe, changes: Changes) -> str:
    """Equal for recipes that can share a pass; full precision joins any of its model."""
    calibration = CALIBRATION if of.method == BASELINE else of.calibration
    if changes.calibration:
        calibration = {**calibration, "dataset": changes.calibration}
    return json.dumps([of.model, calibration], sort_keys=True)


def _pass(group: Sequence[tuple[Published, Recipe]], changes: Changes, settings: Mapping[str, Any]) -> Pass:
    first = next((of for _, of in group if of.method != BASELINE), group[0][1])
    datasets = dict.fromkeys(name for _, of in group for name in of.datasets)
    tasks = dict.fromkeys(name for _, of in group for name in of.tasks)
    rows: dict[str, tuple[MethodRequest, str]] = {}
    members: list[tuple[Published, Recipe, str | None]] = []
    for cell, of in group:
        if of.method is None or of.method == BASELINE:
            members.append((cell, of, None))
            continue
        options = dict(of.options)
        if changes.epochs is not None and of.method in ("omniquant", "affinequant", "abq"):
            options["epochs"] = changes.epochs
        request = (MethodRequest(name=of.method, options=options), of.scheme)
        label = next((name for name, other in rows.items() if other == request), None)
        if label is None:
            label = f"{of.method} {cell.scheme}"
            label += f" {len(rows)}" if label in rows else ""
            rows[label] = request
        members.append((cell, of, label))
    seq_len = changes.seq_len or CALIBRATION["seq_len"]
    calibration = {
        **first.calibration,
        "n_samples": changes.n_samples or first.calibration["n_samples"],
        "seq_len": min(first.calibration["seq_len"], seq_len),
    }
    if changes.calibration:
        calibration["dataset"] = changes.calibration
    evals: dict[str, Any] = {"datasets": _placed(datasets, changes), "seq_len": seq_len}
    if tasks:
        evals["tasks"] = _placed(tasks, changes)
    if changes.limit:
        evals |= {"limit": changes.limit} | ({"limit_items": changes.limit} if tasks else {})
    request_ = {
        "model": changes.models.get(first.model, first.model),
        "methods": list({json.dumps(r.model_dump()): r.model_dump() for r, _ in rows.values()}.values())
        or ["rtn"],
        "schemes": list(dict.fromkeys(scheme for _, scheme in rows.values())) or ["W16A16"],
        "calibration": calibration,
        "evals": evals,
        "quantizer": QUANTIZER,
        **settings,
    }
    return Pass(validated(RunConfig, request_, "the recipe's run"), rows, members)


def _placed(names: Sequence[str] | Mapping[str, None], changes: Changes) -> list[str]:
    return [f"{name}={changes.texts[name]}" if name in changes.texts else name for name in names]


def run(passes: Sequence[Pass], changes: Changes, listener: Any = None) -> list[Verdict]:
    """Compute the passes and judge their cells. Rows that the output folder has are not computed again.

    Raises:
        ConfigError: Anything wrong with the request.
        DataError: Missing or damaged files.
    """
    from qbench import runner
    from qbench.rows import Wanted

    verdicts = []
    for each in passes:
        wanted = [Wanted(label, *row) for label, row in each.rows.items()]
        found: dict[str, list[Result]] = {label: [] for label in each.rows}
        errors: dict[str, str] = {}
        baseline = None
        loaded = runner.load(each.config, listener)
        first = each.config.calibration.seed
        for seed in range(first, first + each.config.seeds if wanted else first + 1):
            done = runner.run_pass(each.config.at_seed(seed), wanted, listener, loaded)
            baseline = baseline or done.baseline
            for label, row in done.rows.items():
                found[label].append(row)
            errors |= {label: str(error) for label, error in done.errors.items()}
        verdicts += [
            _judged(cell, of, label, found, errors, baseline, changes) for cell, of, label in each.cells
        ]
    return verdicts


def _judged(
    cell: Published,
    of: Recipe,
    label: str | None,
    found: Mapping[str, Sequence[Result]],
    errors: Mapping[str, str],
    baseline: Result | None,
    changes: Changes,
) -> Verdict:
    rows = found[label] if label is not None else [baseline] if baseline is not None else []
    blockers = changes.blockers(of)
    if label in errors:
        blockers.append(f"broke down: {errors[label or '']}")
    remarks = [*of.remarks, *changes.remarks(of)]
    return judge(cell, rows, baseline, blockers, remarks, changes.models.get(of.model))
