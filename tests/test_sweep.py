"""Sweeps: what is refused beforehand, what a crash takes with it, and that the store ends up the same whatever happens.

Most of it runs the worker's own function in this process; two tests start and kill real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner

from qbench import ray_executor
from qbench import sweep as sweeps
from qbench.cells import Cell, ExecutorConfig, expand, read_sweep
from qbench.cli import main
from qbench.errors import ConfigError
from qbench.executors import PACKAGE_ROOT, Event, Job, LocalExecutor
from qbench.failures import FailureStore
from qbench.results import Result, ResultStore
from qbench.sweep import Outcome, check, jobs, sweep
from qbench.verification import without_times
from qbench.worker import work
from tests.test_runner import SEQ_LEN, TRAINED, Setting

GRID = {"methods": TRAINED[:3], "schemes": ["W4A4", "W3A16"]}


@pytest.fixture
def here(tmp_path, build_tiny) -> Setting:
    return Setting(tmp_path, build_tiny)


def cells_of(here: Setting, output: Path | None = None, **changes: object) -> list[Cell]:
    request = here.request(**(GRID | {"output": str(output or here.output)} | changes))
    if "models" in changes:
        del request["model"]
    return expand(read_sweep(None, request))


class Watching:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.notes: list[str] = []
        self.events: list[tuple[Job, Event]] = []

    def begin(self, cells: list[Cell]) -> None:
        self.cells = cells

    def said(self, job: Job, event: Event) -> None:
        self.events.append((job, event))

    def settled(self, cell: Cell, outcome: str, detail: str, row: Result | None) -> None:
        assert cell.label not in self.outcomes and (row is None) == (outcome == "failed")
        self.outcomes[cell.label] = outcome

    def note(self, text: str) -> None:
        self.notes.append(text)

    def tick(self) -> None:
        pass


class Crash(BaseException):
    """Ends a job like a kill: nothing catches it."""


class Here:
    """Runs jobs in this process; `crash(event)` says whether the worker dies right after saying this."""

    def __init__(
        self, crash: Callable[[Job, Event], bool] = lambda job, event: False, slots: int = 1
    ) -> None:
        self.slots, self.crash = slots, crash
        self.started: list[Job] = []
        self.waiting: list[Job] = []
        self.closed = False

    def start(self, job: Job) -> None:
        assert len(self.waiting) < self.slots
        self.started.append(job)
        self.waiting.append(job)

    def events(self, timeout: float) -> Iterator[tuple[Job, Event]]:
        job = self.waiting.pop(0)
        said: list[Event] = []

        def send(event: Event) -> None:
            said.append(json.loads(json.dumps(event)))
            if self.crash(job, said[-1]):
                raise Crash

        died = None
        try:
            work(job.as_json(), send)
        except Crash:
            died = "its process was killed by SIGKILL: out of memory?"
        yield from ((job, event) for event in said)
        yield job, {"event": "exit", "crash": died}

    def close(self) -> None:
        self.closed = True


def stored(folder: Path) -> dict[str, dict]:
    """Every record's fields but times, peaks and the moment."""
    return {row.id: without_times(row) for row in ResultStore(folder).load_all()}


def test_a_sweep_gives_the_rows_of_single_runs(here) -> None:
    executor, watching = Here(), Watching()
    outcome = sweep(cells_of(here), executor, watching)
    assert len(executor.started) == 1 and executor.closed
    assert set(watching.outcomes.values()) == {"done"} and len(outcome.rows) == 6
    assert len(outcome.baselines) == 1 and len(outcome.results) == 7
    alone = here.folder / "alone"
    for scheme in GRID["schemes"]:
        for method in GRID["methods"]:
            here.run(methods=[method], schemes=[scheme], output=str(alone))
    assert stored(here.output) == stored(alone)


def test_a_finished_sweep_computes_nothing_again(here) -> None:
    first = sweep(cells_of(here), Here(), Watching())
    watching = Watching()
    second = sweep(cells_of(here), Here(), watching)
    assert second == first and set(watching.outcomes.values()) == {"stored"}
    assert not [event for _, event in watching.events if event["event"] == "block_start"]


def test_two_cells_that_come_to_the_same_are_both_settled(here) -> None:
    methods = ["smoothquant", {"name": "smoothquant", "options": {"alpha": 0.8}}]  # the preset for LLaMA
    watching = Watching()
    outcome = sweep(cells_of(here, methods=methods, schemes=["W4A4"]), Here(), watching)
    assert watching.outcomes == {"smoothquant W4A4": "done", "smoothquant W4A4 alpha=0.8": "stored"}
    assert len(outcome.rows) == 2 and len(ResultStore(here.output).load_all()) == 2


def test_a_crash_takes_one_cell_and_the_others_finish(here) -> None:
    """The second of six kills whatever process it runs in."""

    def crash(job: Job, event: Event) -> bool:
        return event["event"] == "block_end" and event["lane"] == "smoothquant W4A4"

    executor, watching = Here(crash), Watching()
    outcome = sweep(cells_of(here), executor, watching)
    assert [len(job.cells) for job in executor.started] == [6, 1, 1, 1, 1, 1, 1]
    assert list(outcome.failures) == ["smoothquant W4A4"] and len(outcome.rows) == 5
    (failure,) = FailureStore(here.output).load_all()
    assert failure.kind == "killed" and "SIGKILL" in failure.error
    assert any("retried one by one" in note for note in watching.notes)
    assert len(watching.outcomes) == 6


def test_a_recorded_failure_is_retried_on_request_only(here) -> None:
    broken = {"name": "omniquant", "options": {"epochs": 2, "let_lr": 1e30}}
    cells = cells_of(here, methods=["rtn", broken], schemes=["W4A4"])
    first = sweep(cells, Here(), Watching())
    assert "The loss became" in first.failures["omniquant W4A4"].error and len(first.rows) == 1
    executor = Here()
    again = sweep(cells, executor, Watching())
    assert [cell.label for job in executor.started for cell in job.cells] == ["rtn W4A4"]
    assert again.failures == first.failures
    executor, watching = Here(), Watching()
    sweep(cells, executor, watching, retry_failed=True)
    assert len(executor.started[0].cells) == 2 and watching.outcomes["omniquant W4A4"] == "failed"


def test_a_failure_of_other_code_is_forgotten(here, monkeypatch) -> None:
    cells = cells_of(here, methods=["rtn"], schemes=["W4A4"])
    crashing = Here(lambda job, event: event["event"] == "stage")
    assert sweep(cells, crashing, Watching()).failures
    store = FailureStore(here.output)
    store.save(store.load_all()[0].model_copy(update={"code": "older"}))
    assert sweep(cells, Here(), Watching()).rows and store.load_all() == []


def test_a_group_that_cannot_be_loaded_fails_as_a_whole(here) -> None:
    cells = cells_of(here)
    check(cells)
    (here.model / "model.safetensors").write_bytes(b"\xff" * 100)  # after the check
    outcome = sweep(cells, Here(), Watching())
    assert len(outcome.failures) == 6 and {f.kind for f in outcome.failures.values()} == {"DataError"}


def test_groups_are_split_over_idle_slots_method_by_method(here) -> None:
    cells = cells_of(here, seeds=[1, 2])
    assert [len(job.cells) for job in jobs(cells, 1)] == [6, 6] == [len(job.cells) for job in jobs(cells, 2)]
    split = jobs(cells_of(here), 2)
    assert [[cell.label for cell in job.cells] for job in split] == [
        ["rtn W4A4", "smoothquant W4A4", "omniquant W4A4"],
        ["rtn W3A16", "smoothquant W3A16", "omniquant W3A16"],
    ]
    assert sorted(len(job.cells) for job in jobs(cells, 5)) == [2, 2, 2, 3, 3]
    assert len(jobs(cells, 100)) == 12


def test_every_problem_of_a_sweep_is_said_before_anything_is_read(here, monkeypatch) -> None:
    monkeypatch.setattr("qbench.runner.load_model", lambda *a, **k: pytest.fail("a weight was read"))
    cells = cells_of(
        here,
        methods=["rtn", "afinequant", {"name": "smoothquant", "options": {"alpha": 2}}],
        schemes=["W4A16g20", "W4A4"],
        models=[str(here.model), str(here.folder / "nowhere")],
        cells=[
            {"method": "rtn", "scheme": "W4A4", "calibration": {"dataset": str(here.folder / "no.txt")}},
            {"method": "rtn", "scheme": "W4A4", "calibration": {"seq_len": 4096}},
            {"method": "rtn", "scheme": "W4A4", "compute": {"device": "cuda:77"}},
        ],
    )
    with pytest.raises(ConfigError) as caught:
        check(cells)
    message = str(caught.value)
    assert message.startswith("7 problems, nothing was computed.")
    for part in (
        "Did you mean 'affinequant'",
        "alpha=2",
        "group_size=20 does not divide",
        "nowhere",
        "no.txt",
        "seq_len=4096 is longer than",
        "device=cuda:77",
    ):
        assert part in message, part
    assert not here.output.exists()


def test_a_correct_sweep_passes_the_check_without_reading_a_weight(here, monkeypatch) -> None:
    monkeypatch.setattr("qbench.runner.load_model", lambda *a, **k: pytest.fail("a weight was read"))
    check(cells_of(here, seeds=3))
    assert not here.output.exists()


def test_ray_is_asked_for_and_not_there(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Install qbench\[ray\], or use --executor local"):
        sweeps.make_executor(ExecutorConfig(kind="ray"), [])


class FakeRay(ModuleType):
    """What a plan and the executor ask of Ray, with clusters at some addresses."""

    def __init__(self, running: Mapping[str, dict[str, float]]) -> None:
        super().__init__("ray")
        self.running = dict(running)  # resources by address
        self.connected: str | None = None
        self.calls: list[dict[str, object]] = []

    def is_initialized(self) -> bool:
        return self.connected is not None

    def init(self, address: str, num_cpus: int | None = None, **options: object) -> None:
        self.calls.append({"address": address, "num_cpus": num_cpus})
        if address == "local":
            self.running["local"] = {"CPU": float(num_cpus or 12)}
        elif address not in self.running:
            raise ConnectionError("Could not find any running Ray instance.\nMore.")
        elif num_cpus is not None:
            raise ValueError("When connecting to an existing cluster, num_cpus must not be provided.")
        self.connected = address

    def cluster_resources(self) -> dict[str, float]:
        assert self.connected is not None
        return self.running[self.connected]

    def shutdown(self) -> None:
        self.connected = None


@pytest.fixture
def fake_ray(monkeypatch) -> Callable[..., FakeRay]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def install(**running: dict[str, float]) -> FakeRay:
        monkeypatch.setitem(sys.modules, "ray", made := FakeRay(running))
        return made

    return install


@pytest.mark.parametrize(
    ("settings", "resources", "share"),
    [
        ({}, {"CPU": 64.0, "GPU": 8.0}, (8, 8.0, 1.0)),
        ({"gpus": 2}, {"CPU": 64.0, "GPU": 8.0}, (4, 16.0, 2)),
        ({"cpus": 4}, {"CPU": 64.0}, (16, 4.0, 0.0)),
        ({}, {"CPU": 64.0}, (1, 64.0, 0.0)),
        ({"workers": 3}, {"CPU": 64.0, "GPU": 8.0}, (3, 21.0, 1.0)),
        ({"workers": 3}, {"CPU": 2.0}, (3, 1.0, 0.0)),
    ],
    ids=[
        "a GPU each",
        "two GPUs each",
        "four CPUs each",
        "CPUs only",
        "asked for",
        "fewer CPUs than workers",
    ],
)
def test_what_a_worker_of_a_cluster_gets(settings, resources, share) -> None:
    assert ray_executor.share(ExecutorConfig(kind="ray", **settings), resources) == share


def test_an_address_where_nothing_listens_is_refused_before_ray_tries_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        asked: list[str] = []
        ray = SimpleNamespace(init=lambda **settings: asked.append(settings["address"]))
        ray_executor.connect(ray, ExecutorConfig(kind="ray", address=f"127.0.0.1:{port}"))
        ray_executor.connect(ray, ExecutorConfig(kind="ray", address=f"ray://127.0.0.1:{port}"))
        ray_executor.connect(ray, ExecutorConfig(kind="ray", address="auto"))
    assert asked == [f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto"]
    with pytest.raises(ConfigError, match=f"no cluster at 127.0.0.1:{port}: .*refused.*ray start --head"):
        ray_executor.connect(ray, ExecutorConfig(kind="ray", address=f"127.0.0.1:{port}"))
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("address", "variable", "workers", "sentence"),
    [
        ("auto", "", 4, "the Ray cluster at auto (GPU 4, CPU 32)"),
        ("head:1", "auto", 6, "the Ray cluster at head:1 (GPU 6, CPU 24)"),
        (None, "head:1", 6, "the Ray cluster at head:1 (GPU 6, CPU 24)"),
        (None, "", 2, "this machine, on which a sweep would start Ray (GPU 2, CPU 3)"),
        ("local", "head:1", 2, "this machine, on which a sweep would start Ray (GPU 2, CPU 3)"),
    ],
    ids=["a cluster here", "a cluster elsewhere", "RAY_ADDRESS", "one to be started", "explicitly so"],
)
def test_a_plan_for_ray_counts_the_workers_of_the_cluster_that_a_sweep_would_have(
    here, fake_ray, monkeypatch, address, variable, workers, sentence
) -> None:
    clusters = {"auto": {"GPU": 4.0, "CPU": 32.0}, "head:1": {"GPU": 6.0, "CPU": 24.0}}
    ray = fake_ray(**clusters)
    monkeypatch.setattr(ray_executor, "_require_listener", lambda address: None)
    monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setattr(sweeps, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(sweeps.os, "cpu_count", lambda: 3)
    config = ExecutorConfig(kind="ray", address=address)
    said = f"{workers} at a time by the resources of {sentence}"
    assert sweeps.workers(config, cells_of(here)) == (workers, said)
    assert not ray.is_initialized() and "local" not in ray.running  # a plan starts none, and leaves none
    if "the Ray cluster" in sentence:
        assert sweeps.make_executor(config, []).slots == workers
        monkeypatch.setitem(sys.modules, "ray", None)
        counted, said = sweeps.workers(config, cells_of(here))
        assert counted == 2 and "of this machine, not of" in said and "ray is not installed here" in said


def test_a_plan_for_ray_asks_nobody_where_workers_are_given(here, fake_ray) -> None:
    ray = fake_ray(auto={"GPU": 4.0})
    assert sweeps.workers(ExecutorConfig(kind="ray", workers=5), cells_of(here)) == (5, None)
    assert ray.calls == []


def test_a_cluster_out_of_reach_is_refused_by_plan_and_sweep_alike(here, fake_ray, monkeypatch) -> None:
    fake_ray()
    monkeypatch.setattr(ray_executor, "_require_listener", lambda address: None)
    config = ExecutorConfig(kind="ray", address="head:1")
    message = "no cluster at head:1: Could not find any running Ray instance. Start one"
    for ask_for in (sweeps.workers, sweeps.make_executor):
        with pytest.raises(ConfigError, match=message):
            ask_for(config, cells_of(here))


def test_a_cluster_is_started_unless_one_is_asked_for(fake_ray) -> None:
    """Ray refuses a number of CPUs for a cluster that it did not start; a new one gets as many as are needed."""
    ray = fake_ray(auto={"CPU": 8.0})
    executor = sweeps.make_executor(ExecutorConfig(kind="ray", workers=2, address="auto"), [])
    assert executor.slots == 2 and ray.calls == [{"address": "auto", "num_cpus": None}]
    ray = fake_ray(auto={"CPU": 8.0})
    executor = sweeps.make_executor(ExecutorConfig(kind="ray", workers=2, cpus=3), [])
    assert executor.slots == 2 and ray.calls == [{"address": "local", "num_cpus": 6}]
    executor.close()
    assert not ray.is_initialized()


@pytest.mark.parametrize(("device", "slots"), [("cpu", 1), ("auto", 3)])
def test_there_is_a_worker_per_gpu_unless_all_cells_are_for_the_cpu(here, monkeypatch, device, slots) -> None:
    monkeypatch.setattr(sweeps, "visible_gpus", lambda: ["0", "2", "5"])
    cells = cells_of(here, compute={"device": device})
    executor = sweeps.make_executor(ExecutorConfig(), cells)
    assert executor.slots == slots
    executor.close()


# ---------------------------------------------------------------------------------- real processes


def test_a_killed_worker_leaves_the_same_store_as_none(here) -> None:
    """SIGKILL while the second block is trained: the cell is retried and goes on with that block."""
    aim = [("epoch", 1)]

    class Killing(Watching):
        def said(self, job: Job, event: Event) -> None:
            super().said(job, event)
            if aim and (event["event"], event.get("index")) == aim[0]:
                aim.clear()
                (running,) = executor._running
                os.kill(running.process.pid, signal.SIGKILL)

    def cells(output: Path) -> list[Cell]:
        return cells_of(
            here, output, methods=[{"name": "omniquant", "options": {"epochs": 4}}], schemes=["W4A4"]
        )

    executor, watching = LocalExecutor(), Killing()
    outcome = sweep(cells(here.output), executor, watching)
    assert not aim and executor._running == [] and outcome.failures == {}
    assert watching.notes == [
        "omniquant W4A4: its process was killed by SIGKILL: out of memory?; retried one by one"
    ]
    started = [(e["index"], e["resumed"]) for _, e in watching.events if e["event"] == "block_start"]
    assert started == [(0, False), (1, False), (0, True), (1, False)]
    sweep(cells(here.folder / "whole"), Here(), Watching())
    assert stored(here.output) == stored(here.folder / "whole")
    assert FailureStore(here.output).load_all() == [] and len(stored(here.output)) == 2


def test_workers_start_while_the_sweep_is_checked(here, monkeypatch) -> None:
    """The worker that is there before the check takes the job, and goes when the check refuses."""
    seen: list[psutil.Process] = []

    def looking(cells) -> None:
        seen.extend(psutil.Process().children())
        if refuse:
            raise ConfigError("refused")

    monkeypatch.setattr(sweeps, "check", looking)
    cells = cells_of(here, methods=["rtn"], schemes=["W4A4"])
    refuse = True
    with pytest.raises(ConfigError, match="refused"):
        sweeps.checked(ExecutorConfig(), cells)
    (gone,) = seen
    assert not gone.is_running()
    refuse = False
    executor = sweeps.checked(ExecutorConfig(), cells)
    outcome = sweep(cells, executor, Watching())
    assert list(outcome.rows) == ["rtn W4A4"] and not outcome.failures
    assert len(seen) == 2 and not seen[1].is_running() and not psutil.Process().children()


def test_a_worker_that_gets_no_job_ends_with_its_sweep() -> None:
    worker = subprocess.run(
        [sys.executable, "-m", "qbench.worker"], stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)},
    )  # fmt: skip
    assert worker.returncode == 0 and worker.stdout == b""


def test_a_worker_does_not_outlive_its_sweep(here) -> None:
    (job,) = jobs(cells_of(here), 1)
    worker = subprocess.Popen(
        [sys.executable, "-m", "qbench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)},
        text=True,
    )
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps(job.as_json()) + "\n")
    worker.stdin.flush()
    assert json.loads(worker.stdout.readline())["event"] == "stage"  # it is at work
    worker.stdin.close()  # what happens when the sweep is killed
    worker.stdout.read()
    worker.stdout.close()
    assert worker.wait(30) == 3


@pytest.mark.skipif(
    find_spec("ray") is None, reason="RAY ABSENT: the Ray executor is not tested; install qbench[ray]"
)
def test_the_same_sweep_under_ray(here) -> None:
    from qbench.ray_executor import RayExecutor

    killed: list[int] = []

    def computes(process: psutil.Process, lane: str) -> bool:
        """Whether it holds the lock of the lane's checkpoint."""
        with contextlib.suppress(psutil.Error):
            held = [Path(file.path) for file in process.open_files()]
            return any(path.name == "lock" and path.parent.name.startswith(lane) for path in held)
        return False

    class Killing(Watching):
        """One worker is killed in the middle of a cell: Ray replaces it."""

        def said(self, job: Job, event: Event) -> None:
            super().said(job, event)
            if event["event"] == "block_end" and event["lane"] == "omniquant W4A4" and not killed:
                everyone = psutil.Process().children(recursive=True)
                (worker,) = [p for p in everyone if computes(p, "omniquant-W4A4-")]
                killed.append(worker.pid)
                worker.kill()

    watching = Killing()
    outcome = sweep(cells_of(here), RayExecutor(ExecutorConfig(kind="ray", workers=2)), watching)
    assert killed and outcome.failures == {} and len(outcome.rows) == 6
    started = [
        (event["index"], event["resumed"])
        for _, event in watching.events
        if event["event"] == "block_start" and event["lane"] == "omniquant W4A4"
    ]
    assert (
        started[0] == (0, False) and (0, True) in started and started[-1][0] == 1
    )  # taken up, not begun anew
    sweep(cells_of(here, here.folder / "local"), Here(), Watching())
    assert stored(here.output) == stored(here.folder / "local")


# ------------------------------------------------------------------------------- the command line


@pytest.fixture
def in_process(monkeypatch) -> list[Here]:
    """`qbench sweep` computes in this process."""
    made: list[Here] = []
    monkeypatch.setattr(sweeps, "make_executor", lambda config, cells: made.append(Here()) or made[-1])
    return made


def ask(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["sweep", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.stdout, result.stderr


def options(here: Setting) -> list[object]:
    texts = ["--calib-dataset", here.calibration, "--eval", f"own={here.evaluation}"]
    return [*texts, "--nsamples", 3, "--seqlen", SEQ_LEN, "--output", here.output]


def test_the_command_line_makes_a_grid(here, in_process) -> None:
    grid = [
        "--model",
        here.model,
        "--method",
        "rtn",
        "--method",
        "smoothquant",
        "--scheme",
        "W4A4",
        "--seeds",
        "3,5",
    ]
    code, stdout, stderr = ask(*grid, *options(here), "--format", "json")
    assert code == 0, stderr
    rows = [row for row in json.loads(stdout) if row["method"] != "full-precision"]
    assert len(rows) == 4 and "(4/4) done: smoothquant W4A4 seed=5" in stderr
    assert [r.calibration["seed"] for r in ResultStore(here.output).load_all() if r.method == "rtn"] == [3, 5]


def test_a_file_and_options_over_it(here, in_process) -> None:
    file = here.folder / "sweep.yaml"
    file.write_text(
        f"model: {here.model}\nmethods: [rtn, omniquant]\nschemes: [W4A4, W3A16]\n"
        "cells: [{method: rtn, scheme: W8A8}]\n"
    )
    code, stdout, stderr = ask(file, *options(here), "--scheme", "W6A6", "--epochs", 1, "--format", "json")
    assert code == 0, stderr
    assert {(r["method"], r["scheme"]) for r in json.loads(stdout)[1:]} == {
        ("rtn", "W6A6"),
        ("omniquant", "W6A6"),
    }
    assert "note: --epochs goes to omniquant; no such option: rtn" in stderr


def test_failed_cells_give_exit_status_3_and_the_others_are_printed(here, in_process) -> None:
    arguments = [
        "--model",
        here.model,
        "--method",
        "rtn",
        "--method",
        "omniquant",
        "--scheme",
        "W4A4",
        "--epochs",
        2,
    ]
    code, stdout, stderr = ask(*arguments, "--let-lr", "1e30", *options(here))
    assert code == 3 and "rtn" in stdout
    error = stderr.rstrip().splitlines()[-1]
    assert error.startswith("Error: 1 of 2 cells failed. omniquant W4A4, block 0: The loss became")
    assert "The others are in " in error and "--retry-failed" in error and error.count("omniquant W4A4") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "rtn"], "methods without schemes"),
        ([], "nothing to compute"),
        (["--method", "rtn", "--scheme", "W4A4", "--seeds", "x"], "--seeds 'x'"),
        (["--method", "rtn", "--scheme", "W4A4", "--set", "alpha=1"], "no option of rtn"),
        (["absent.yaml"], "absent.yaml"),
    ],
    ids=["no scheme", "nothing", "seeds", "option", "file"],
)
def test_a_request_that_cannot_be_met_is_refused(here, in_process, arguments, message) -> None:
    code, stdout, stderr = ask(*arguments)
    assert code == 2 and message in stderr and stdout == "" and in_process == []


def test_an_outcome_lists_full_precision_first() -> None:
    from tests.fake_results import baseline, make_result

    rows = {"rtn W4A4": make_result("rtn")}
    assert [r.method for r in Outcome({"x": baseline()}, rows).results] == ["full-precision", "rtn"]
