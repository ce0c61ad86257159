"""Write experiments/papers/*.yaml: the papers' tables as sweep files, from the recipes that `qbench parity` uses.

    python scripts/paper_sweeps.py

A test holds the files against the recipes, so that the two cannot drift apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qbench.reports.published import HUB_NAMES, Published, cells, tables
from qbench.reports.recipes import CALIBRATION, QUANTIZER, TASKS, Recipe, recipe
from qbench.results import BASELINE

FOLDER = Path(__file__).resolve().parents[1] / "experiments/papers"


def sweeps() -> dict[str, str]:
    """File name to content, one per table whose methods qbench has."""
    found = {}
    for name, members in tables(cells()).items():
        pairs = [(cell, recipe(cell)) for cell in members]
        kept = [(cell, of) for cell, of in pairs if of.method not in (None, BASELINE)]
        if kept:
            file = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".yaml"
            found[file] = _sweep(name, kept, sorted({cell.method for cell, of in pairs if of.method is None}))
    return found


def _sweep(name: str, members: Sequence[tuple[Published, Recipe]], lacking: Sequence[str]) -> str:
    models = list(dict.fromkeys(cell.model for cell, _ in members))
    datasets = list(dict.fromkeys(d for _, of in members for d in of.datasets))
    tasks = sorted({task for _, of in members for task in of.tasks}, key=TASKS.index)
    head: dict[str, Any] = {
        "models": [HUB_NAMES[model] for model in models],
        "calibration": CALIBRATION,
        "evals": {"datasets": datasets, "seq_len": CALIBRATION["seq_len"]}
        | ({"tasks": tasks} if tasks else {}),
        "quantizer": QUANTIZER,
        "output": "results/" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
    }
    lines = [
        f"# {name}: {members[0][0].source}.",
        "# Written by scripts/paper_sweeps.py from the recipes of `qbench parity`; full precision is always a row.",
        *([f"# Not in qbench, hence not here: {', '.join(lacking)}."] if lacking else []),
        f"#   qbench sweep experiments/papers/{Path(str(head['output'])).name}.yaml",
        f'#   qbench parity run "{name}"   the same rows, judged; --model ONE of them',
    ]
    text = yaml.safe_dump(head, sort_keys=False, default_flow_style=None, width=110)
    rows = [yaml.safe_dump(cell, default_flow_style=True, sort_keys=False, width=10_000).strip()
            for cell in _cells(members, models)]  # fmt: skip
    return "\n".join([*lines, text.rstrip("\n"), "cells:", *(f"  - {row}" for row in rows)]) + "\n"


def _cells(members: Sequence[tuple[Published, Recipe]], models: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for all models whose recipe is the same, where these are all models; else one for each model."""
    wanted: dict[str, list[str]] = {}
    for cell, of in members:
        request: dict[str, Any] = {"method": of.method, "scheme": of.scheme}
        request |= {"options": of.options} if of.options else {}
        calibration = {key: value for key, value in of.calibration.items() if value != CALIBRATION[key]}
        request |= {"calibration": calibration} if calibration else {}
        having = wanted.setdefault(json.dumps(request), [])
        having += [cell.model] if cell.model not in having else []
    found: list[dict[str, Any]] = []
    for request_, having in wanted.items():
        request = json.loads(request_)
        same = set(having) == set(models)
        found += [request] if same else [request | {"model": HUB_NAMES[model]} for model in having]
    return found


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in sweeps().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{FOLDER / name}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
