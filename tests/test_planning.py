"""Plans: the extrapolation against sums written out, and a whole plan against what the pass then really takes."""

from __future__ import annotations

import random
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from click.testing import CliRunner

from qbench import planning
from qbench import sweep as sweeps
from qbench.cli import main
from qbench.engine.progress import Listener
from qbench.engine.settings import EngineSettings
from qbench.planning import PassPlan, extrapolate, peak_memory, plan_pass
from qbench.runner import every_row, run_pass
from tests.test_runner import SEQ_LEN, Setting


@pytest.fixture
def here(tmp_path, build_tiny) -> Setting:
    return Setting(tmp_path, build_tiny)


def test_a_time_that_is_a_sum_of_shares_is_found_exactly() -> None:
    def seconds(windows: int, steps: int, iterations: int) -> float:
        return 0.3 + 0.02 * windows + 0.15 * steps + 0.004 * iterations

    probes = [(2, 2, 16), (4, 4, 16), (2, 4, 16), (2, 2, 32)]
    facts = [[1.0, *map(float, probe)] for probe in probes]
    known = extrapolate(facts, [seconds(*probe) for probe in probes], [1.0, 128.0, 2560.0, 200.0])
    assert known == pytest.approx(seconds(128, 2560, 200), rel=1e-9)


def test_noise_never_gives_a_negative_share() -> None:
    """The longer probe was faster: what it says is that more windows cost nothing, not that they pay."""
    assert 0.8 <= extrapolate([[1.0, 2.0], [1.0, 4.0]], [1.0, 0.8], [1.0, 1000.0]) <= 1.0


def test_peak_memory_is_of_the_context_alone() -> None:
    size = 64 << 20
    block = torch.zeros(size // 4)
    del block
    before = psutil.Process().memory_info().rss
    with peak_memory() as peak:
        torch.ones(size // 4).sum()
    assert size * 0.9 < peak[0] - before < size * 1.5
    with peak_memory() as later:
        pass
    assert later[0] < peak[0]


def test_peak_memory_where_the_system_keeps_none(monkeypatch) -> None:
    def refuse(self, *arguments: object) -> None:
        raise OSError

    monkeypatch.setattr(planning.Path, "write_text", refuse)
    before = psutil.Process().memory_info().rss
    with peak_memory() as peak:
        block = torch.ones(16 << 20)
        time.sleep(0.05)
    assert peak[0] - before > 0.9 * block.numel() * 4


@pytest.mark.parametrize(
    ("windows", "batch_size"), [(64, 1), (64, 4), (3, 1)], ids=["one", "batches", "few windows"]
)
def test_a_blocks_time_is_extrapolated_over_windows_epochs_and_iterations(
    monkeypatch, windows: int, batch_size: int
) -> None:
    """Probes whose time is a known formula: the plan must give that formula at full size."""

    def seconds(k: int, epochs: int, iterations: int) -> float:
        return 0.2 + 0.01 * k + 0.05 * -(-k // batch_size) * epochs + 0.003 * iterations

    def run(self, method, scheme, k, epochs, iterations, full):
        full.append((20, 200))
        lane_s = seconds(k, min(epochs, 20), min(iterations, 200))
        return planning._Run(k, epochs, iterations, lane_s, 0.1 + 0.02 * k, 5, 7, None, 9)

    monkeypatch.setattr(planning._Prober, "_run", run)
    settings = EngineSettings(torch.device("cpu"), batch_size=batch_size)
    prober = planning._Prober(None, settings, torch.zeros(windows, 512, dtype=torch.int64), Path("unused"))
    probe, shared = prober.block(None, None)
    assert probe.seconds == pytest.approx(seconds(windows, 20, 200), rel=1e-6)
    assert shared == pytest.approx(0.1 + 0.02 * windows, rel=1e-6)
    assert (probe.work_bytes, probe.gpu_work_bytes, probe.file_bytes) == (5, 7, 9)


@pytest.mark.parametrize(
    ("fixed", "step", "least"), [(0.01, 0.05, 3), (1.0, 0.002, 20)], ids=["a CPU's", "a GPU's"]
)
def test_probes_grow_until_they_can_be_told_apart(monkeypatch, fixed: float, step: float, least: int) -> None:
    """Times that are 3% off at random: where a step is a five-hundredth of what is fixed, two of them say nothing."""
    noise = random.Random(0)
    longest = []

    def run(self, method, scheme, k, epochs, iterations, full):
        full.append((20, 0))
        longest.append(epochs)
        seconds = (fixed + step * k * min(epochs, 20)) * noise.uniform(0.97, 1.03)
        return planning._Run(k, epochs, iterations, seconds, 0.1, 5, 7, None, 9)

    monkeypatch.setattr(planning._Prober, "_run", run)
    prober = planning._Prober(
        None, EngineSettings(torch.device("cpu")), torch.zeros(64, 512, dtype=torch.int64), Path("unused")
    )
    probe, _ = prober.block(None, None)
    assert probe.seconds == pytest.approx(fixed + step * 64 * 20, rel=0.2)
    assert max(longest) <= least


METHODS = ["rtn", {"name": "omniquant", "options": {"epochs": 3}}]


def test_a_plan_of_a_pass_beside_the_pass(here) -> None:
    """Bytes are exact; times of two blocks that take a hundredth of a second are only of the right kind."""
    from qbench.config import RunConfig

    config = RunConfig.model_validate(here.request(methods=METHODS, schemes=["W4A4", "W4A16g16"]))
    stages: list[str] = []
    listener = Listener()
    listener.stage = lambda name, detail="": stages.append(name)  # type: ignore[method-assign]
    plan = plan_pass(config, every_row(config), listener)
    assert stages.count("probe") == 4 and not here.output.exists()
    assert plan == PassPlan.from_json(plan.as_json()) and plan.problems == [] and plan.parts == 1
    run_pass(config, every_row(config))
    for cell in plan.cells:
        method, scheme = cell.label.split()
        (folder,) = (here.output / "checkpoints").glob(f"{method}-{scheme}-*")
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert cell.disk_bytes == pytest.approx(written, rel=0.02)  # headers hold losses in decimals
        assert cell.blocks == 2 and 0 < cell.quantize_s < 60 and 0 < cell.evaluate_s < 60
    seconds = {cell.label: cell.quantize_s for cell in plan.cells}
    assert seconds["omniquant W4A4"] > seconds["rtn W4A4"]
    assert plan.baseline_s > 0 and plan.cpu_bytes > 10**8
    again = plan_pass(config, every_row(config), Listener())
    assert all(cell.stored and cell.seconds == 0 for cell in again.cells) and again.baseline_s == 0


def test_what_does_not_fit_is_refused_with_what_would(here, monkeypatch) -> None:
    from qbench.config import RunConfig

    config = RunConfig.model_validate(here.request())
    base = dict(
        model="m", cells=[], start_s=0, shared_s=0, baseline_s=0, parts=1, cpu_bytes=10 << 30, gpu_bytes=None
    )
    room = SimpleNamespace(available=8 << 30)
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: room)
    monkeypatch.setattr(
        planning.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    )
    cpu = torch.device("cpu")
    (problem,) = planning._problems(PassPlan(**base), config, cpu, 1 << 30, 4, "cpu")
    assert "needs 10.0 GiB of memory, 8.0 GiB are free. Use 2 calibration windows (--nsamples 2)" in problem
    (problem,) = planning._problems(PassPlan(**base), config, cpu, 1 << 20, 4, "cpu")
    assert "Even without the windows' hidden states it takes 10.0 GiB" in problem
    room.available = 20 << 30
    assert planning._problems(PassPlan(**base), config, cpu, 1 << 30, 4, "cpu") == []
    big = planning.CellPlan("c", 1, False, 0.0, 0.0, 1 << 60)
    (problem,) = planning._problems(PassPlan(**base | {"cells": [big]}), config, cpu, 1 << 30, 4, "cpu")
    assert "of checkpoints" in problem and "Choose another --output" in problem


def test_the_command_line_prints_and_refuses(here, monkeypatch) -> None:
    def planned(cells, view, slots) -> list[PassPlan]:
        cell = planning.CellPlan(cells[0].label, 6, False, 90.0, 12.0, 3 << 20)
        return [PassPlan("tiny", [cell], 17.0, 1.0, 0.0, 1, 2 << 30, None, 5.0, problems)]

    problems: list[str] = []
    monkeypatch.setattr(sweeps, "plan", planned)
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["plan", "--model", here.model, "--method", "rtn", "--scheme", "W4A4", "--nsamples", 3]
    arguments += [
        "--seqlen",
        SEQ_LEN,
        "--calib-dataset",
        here.calibration,
        "--eval",
        f"own={here.evaluation}",
    ]
    monkeypatch.setattr(planning, "process_age", lambda: 7.0)  # of which 5 s are a worker's too
    result = CliRunner().invoke(main, [*map(str, arguments), "--output", str(here.output)])
    assert result.exit_code == 0, result.output
    assert (
        "rtn W4A4" in result.stdout and "1m30s" in result.stdout.replace(" ", "") and "3 MiB" in result.stdout
    )
    assert "1 pass, 1 at a time: 2m02s, peak memory 2.00 GiB, disk 3 MiB" in result.stdout
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = CliRunner().invoke(main, [*map(str, arguments), "--executor", "ray"])
    assert "at a time by the resources of this machine, on which a sweep would start Ray" in result.stdout
    problems.append("needs 2.0 GiB of memory, 1.0 GiB are free. Use fewer.")
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 2 and "Error: tiny: needs 2.0 GiB of memory" in result.stderr
