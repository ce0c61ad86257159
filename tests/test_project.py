"""The project's own files agree with each other: floors, pins, documentation and what a wheel holds."""

from __future__ import annotations

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
    low, high = extremes(weight, grid)
    rounded = leastsquares.LeastSquares().plan(None).rounding(weight, low, high, grid)
    error = (rounded.dequantize() - weight).square().mean()
    assert error < 0.95 * (round_to_nearest(weight, low, high, grid).dequantize() - weight).square().mean()
