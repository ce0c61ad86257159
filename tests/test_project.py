"""The project's own files agree with each other: floors, pins, documentation and what a wheel holds."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from qbench.methods import METHODS
from qbench.methods.conformance import check as conformance
from qbench.quant.grid import Grid
from qbench.quant.uniform import extremes, round_to_nearest

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
DEV = PROJECT["optional-dependencies"]["dev"]


def pins() -> dict[str, Version]:
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    split = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in split}


@pytest.mark.parametrize("text", PROJECT["dependencies"] + DEV, ids=lambda text: re.split(r"[<>=;]", text)[0])
def test_every_requirement_is_pinned_within_its_bounds_and_explained(text: str) -> None:
    requirement = Requirement(text)
    pin = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin)
    assert any(op.operator == ">=" for op in requirement.specifier), "give a lower bound"
    assert requirement.name in (REPO / "docs/dependencies.md").read_text()


def test_pins_carry_no_local_version() -> None:
    local = {name: str(version) for name, version in pins().items() if version.local}
    assert local == {}, "a build such as +cpu exists on some machines only"


def test_makefile_installs_the_pinned_torch() -> None:
    assert f"torch=={pins()['torch']}" in (REPO / "Makefile").read_text()


def test_changelog_has_a_section_for_the_version() -> None:
    assert f"## Version {PROJECT['version']}" in (REPO / "CHANGELOG.md").read_text()


@pytest.fixture
def leastsquares(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The worked example of CONTRIBUTING.md, as a module."""
    block = re.search(
        r"```python\n(\"{3}LeastSquares.*?)```", (REPO / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    assert block is not None
    module = ModuleType("leastsquares")
    monkeypatch.setitem(sys.modules, "leastsquares", module)
    exec(compile(block[1], "CONTRIBUTING.md", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("group_size", [None, 16], ids=["per_channel", "per_group"])
def test_the_worked_example_beats_rtn(leastsquares: ModuleType, group_size: int | None) -> None:
    weight, grid = torch.randn(8, 64), Grid(3, group_size=group_size)
    x = torch.randn(200, 64) * torch.linspace(0.1, 3, 64)
    moment = x.T @ x / 200
    rounded = leastsquares.shrink_and_round(weight, moment, None, grid, steps=20).weight
    nearest = round_to_nearest(weight, *extremes(weight, grid), grid)
    error, floor = ((x @ (w.dequantize() - weight).T).square().mean() for w in (rounded, nearest))
    assert error < 0.98 * floor


def test_the_worked_example_needs_one_file_and_one_line(
    leastsquares: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its line in the registry it is a method: everything that must hold of one holds, compositions included."""
    line = re.search(r'^ +"leastsquares": "(.*)",$', (REPO / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert line is not None and line[1] == "qbench.methods.leastsquares:LeastSquares"
    monkeypatch.setitem(sys.modules, "qbench.methods.leastsquares", leastsquares)
    monkeypatch.setitem(METHODS.builtin, "leastsquares", line[1])
    failed = [f"{fact.fact}: {fact.detail}" for fact in conformance("leastsquares") if not fact.passed]
    assert failed == []
    assert METHODS.load("smoothquant+leastsquares").part_classes[1] is leastsquares.LeastSquares


# Everything that a method is handed to, and none of what knows the papers' tables or file formats of the same name.
BLIND = [
    "engine",
    "transforms",
    "quant",
    "data",
    "evals",
    "models/base.py",
    "models/llama.py",
    "models/opt.py",
    "runner.py",
    "rows.py",
    "scoring.py",
    "sweep.py",
    "cells.py",
    "worker.py",
    "executors.py",
    "ablation.py",
    "planning.py",
    "verification.py",
    "evaluate.py",
    "results.py",
]


def test_each_method_is_one_file_and_one_line() -> None:
    assert METHODS.builtin == {
        name: f"qbench.methods.{name}:{target.partition(':')[2]}" for name, target in METHODS.builtin.items()
    }
    paths = [REPO / "qbench" / part for part in BLIND]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    assert len(files) > 40
    for file in files:
        constants = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant))
        named = {node.value for node in constants if isinstance(node.value, str)} & set(METHODS.builtin)
        assert named == set(), f"{file.relative_to(REPO)} knows a method by name"
