"""The bookkeeping of benchmarks/kernels.py with made-up reports: what is repeated alone, and how parts are joined."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import kernels
from qbench.cli.bench import read
from qbench.latency import Ceilings, Cell, Report

BROKEN = "in this round: AcceleratorError: CUDA error: an illegal memory access was encountered"


def cell(scheme: str, status: str = "timed", message: str | None = None, tokens: int = 1) -> Cell:
    return Cell.model_validate(
        {
            "out_features": 64, "in_features": 64, "tokens": tokens, "backend": "torch", "scheme": scheme,
            "dtype": "bfloat16", "status": status, "message": message,
        }
    )  # fmt: skip


def written(path: Path, *cells: Cell, **changes: Any) -> Path:
    usual = {"commands": [path.name], "device": "GPU", "cache_bytes": 1, "environment": {}, "protocol": {}}
    path.write_text(Report.model_validate(usual | changes | {"cells": list(cells)}).model_dump_json())
    return path


def test_cells_of_a_broken_round_get_a_process_each_and_known_good_ones_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [
        cell("W8A8", "failed", BROKEN, 16), cell("W4A16", "failed", BROKEN, 16), cell("W4A16"),
        cell("W3A16", "failed", "RuntimeError: its own fault"),
    ]  # fmt: skip
    output, asked = written(tmp_path / "r.json", *cells), []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(int(command[-1].removeprefix("--index=")))
        if asked[-1] == 1:  # this one works alone; the other one takes its process with it
            kernels._replace(output, cell("W4A16", tokens=16))
        return SimpleNamespace(returncode=0 if asked[-1] == 1 else -6)

    monkeypatch.setattr(subprocess, "run", run)
    assert kernels._apart(output, {}, time.monotonic() + 60) == 0
    assert asked == [1, 0]
    assert [(c.status, c.message) for c in read(output).cells] == [
        ("failed", "alone in its process: the process ended with -6"),
        ("timed", None),
        ("timed", None),
        ("failed", "RuntimeError: its own fault"),
    ]
    assert kernels._apart(output, {}, time.monotonic() + 60) == 0
    assert asked == [1, 0]  # nothing is repeated twice


def test_parts_are_joined_and_a_time_replaces_a_failure(tmp_path: Path) -> None:
    rates = [Ceilings(read_bytes_per_s=read, flops={"int8": 100.0}) for read in (1000.0, 990.0)]
    one = written(tmp_path / "a.json", cell("W8A8"), cell("W4A16", "failed", BROKEN), ceilings=rates[0])
    two = written(tmp_path / "b.json", cell("W4A16"), cell("W8A8", "failed", BROKEN), ceilings=rates[1])
    assert kernels.merge([one, two], tmp_path / "c.json") == 0
    joined = read(tmp_path / "c.json")
    assert {(c.scheme, c.status) for c in joined.cells} == {("W8A8", "timed"), ("W4A16", "timed")}
    assert joined.commands == ["a.json", "b.json"]
    assert joined.ceilings == rates[0]
    assert "2 measurements, each on a GPU of its own; their own rates lie within 1.0%" in joined.notes[0]


def test_rates_found_by_different_probes_are_not_compared(tmp_path: Path) -> None:
    one, two = (
        written(
            tmp_path / f"{rate:.0f}.json",
            ceilings=Ceilings(read_bytes_per_s=1000.0, flops={"int8": rate, "float16": 50.0}, notes=notes),
        )
        for rate, notes in ((100.0, ["int8 by another probe"]), (40.0, []))
    )
    assert kernels.merge([one, two], tmp_path / "c.json") == 0
    assert "within 0.0%" in read(tmp_path / "c.json").notes[0]


def test_parts_of_different_machines_are_not_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = written(tmp_path / "a.json"), written(tmp_path / "b.json", device="another")
    assert kernels.merge([one, two], tmp_path / "c.json") == 2
    assert "another device" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()
