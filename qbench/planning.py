"""What a pass will cost, from a short probe of one block on this machine, before anything is computed.

A block of every method at every scheme is really quantized, on few windows and for few epochs, and the time is
extrapolated: with k windows and e epochs a block takes

    T(k, e) = fixed + forward · k + step · k · e,

and a rounding rule that is learned adds a fourth term, its iterations. Windows, epochs and iterations are doubled,
each by itself, until a probe takes half as long again as the shortest one or is at full size: on a GPU, where a block's
fixed costs are a second and a step a millisecond, one doubling would be lost in the noise. The full-precision pass
is measured beside it, evaluation by scoring a few windows with the probed block in the place of every block, and memory
as the peaks of exactly these, plus the hidden states of all windows, whose size is known. Tasks and comparisons with
full precision (fidelity) are not probed: a plan of a suite that has them says so.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from qbench.config import RunConfig
from qbench.engine.checkpoint import Checkpoint
from qbench.engine.hidden import choose_placement
from qbench.engine.install import on_device, quantized
from qbench.engine.lane import Lane, LaneResult, Planner
from qbench.engine.plan import BlockPlan, BlockView, LearnedRounding, Needs
from qbench.engine.progress import Listener
from qbench.engine.reconstruct import reconstruct
from qbench.engine.settings import EngineSettings
from qbench.engine.state import BlockState
from qbench.evals.memory import peak_cpu_bytes
from qbench.evals.perplexity import perplexity
from qbench.evaluate import Suite
from qbench.models.loading import LoadedModel
from qbench.rows import Wanted, baseline_is_known, stored_row
from qbench.runner import parts, prepare
from qbench.scheme import Scheme

ARRAYS = 3  # of hidden states besides one per lane: full-precision inputs and outputs, one lane's outputs
NOT_PROBED = ("tasks", "word_perplexity", "fidelity", "generate")  # of EvalConfig
ITERATIONS = 16  # of a learned rounding rule, in the shorter probe
GROWTH = 1.5  # how much longer a longer probe must take to say something
SAMPLE_S = 0.002  # between looks at memory where the system keeps no peak of its own


@dataclass(frozen=True)
class CellPlan:
    """What one cell will take.

    Attributes:
        stored: Whether an earlier run made it: then it takes nothing.
        quantize_s: All blocks.
        evaluate_s: Every text of the run.
        disk_bytes: Checkpoints.
    """

    label: str
    blocks: int
    stored: bool
    quantize_s: float
    evaluate_s: float
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.quantize_s + self.evaluate_s


@dataclass(frozen=True)
class PassPlan:
    """What the cells of one pass will take together, and whether they can.

    Attributes:
        start_s: Starting a process, loading the model, reading the texts.
        import_s: The process alone, a part of `start_s`: the first one starts while the sweep is checked.
        shared_s: The full-precision pass through the blocks, once per part.
        baseline_s: Evaluating the full-precision model, 0 if that is known.
        parts: Passes that memory splits the cells into.
        cpu_bytes: Peak memory of the process.
        gpu_bytes: Peak memory on the GPU.
        problems: What does not fit, each with what would.
        notes: What the prediction leaves out.
    """

    model: str
    cells: list[CellPlan]
    start_s: float
    shared_s: float
    baseline_s: float
    parts: int
    cpu_bytes: int
    gpu_bytes: int | None
    import_s: float = 0.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Wall time of the pass."""
        return self.start_s + self.shared_s + self.baseline_s + sum(cell.seconds for cell in self.cells)

    @property
    def disk_bytes(self) -> int:
        """What it will write."""
        return sum(cell.disk_bytes for cell in self.cells)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"plan": asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PassPlan:
        """What `as_json` gave."""
        plan = dict(data["plan"])
        return cls(**plan | {"cells": [CellPlan(**cell) for cell in plan["cells"]]})


@dataclass(frozen=True)
class _Short:
    """A method whose training is cut short; notes the epochs and iterations that there would be."""

    planner: Planner
    epochs: int
    iterations: int
    full: list[tuple[int, int]]

    @property
    def needs(self) -> Needs:
        return self.planner.needs

    def plan(self, view: BlockView) -> BlockPlan:
        plan = self.planner.plan(view)
        epochs = iterations = 0
        if plan.training is not None:
            epochs = plan.training.epochs
            plan.training = replace(plan.training, epochs=min(self.epochs, epochs))
        if isinstance(plan.rounding, LearnedRounding):
            iterations = plan.rounding.iterations
            plan.rounding = replace(plan.rounding, iterations=min(self.iterations, iterations))
        self.full.append((epochs, iterations))
        return plan


@dataclass
class _Probe:
    """One cell's block, measured.

    Attributes:
        seconds: Of one block with all windows and epochs.
        work_bytes: Peak of the process beside model and hidden states.
        gpu_work_bytes: The same of the GPU.
    """

    seconds: float
    work_bytes: int
    gpu_work_bytes: int
    state: BlockState
    file_bytes: int


def plan_pass(config: RunConfig, wanted: Sequence[Wanted], listener: Listener) -> PassPlan:
    """Predict one pass.

    Args:
        config: As for `runner.run_pass`.
        wanted: The cells.
        listener: Told of progress.

    Raises:
        ConfigError: Anything wrong with the request.
        NumericalError: A method breaks down on the first block already.
    """
    with tempfile.TemporaryDirectory(prefix="qbench-plan-") as scratch:
        imported = process_age()
        common, cells = prepare(config, wanted, listener)
        started = process_age()  # imports, model and texts: a worker does the same
        load_peak = peak_cpu_bytes()
        loaded, settings, ids = common.loaded, common.settings, common.calibration.ids
        resident = psutil.Process().memory_info().rss
        missing = [cell for cell in cells if stored_row(common, cell) is None]
        n, seq_len = ids.shape
        array = 4 * n * seq_len * loaded.spec.hidden_size  # float32 hidden states of all windows
        lanes_at_once = max((len(part) for part in parts(common, missing)), default=0)
        placement = settings.placement or choose_placement(
            (ARRAYS + 1 + lanes_at_once) * array, settings.device
        )
        prober = _Prober(common.loaded, settings, ids, Path(scratch))
        plans, peaks, gpu_peaks = [], [load_peak], [0]
        shared = 0.0
        for cell in cells:
            if cell not in missing:
                plans.append(CellPlan(cell.label, len(loaded.blocks), True, 0.0, 0.0, 0))
                continue
            listener.stage("probe", cell.label)
            probe, shared = prober.block(cell.method, cell.scheme)
            evaluate_s, eval_peak, eval_gpu = prober.evaluation(common.suite, cell.scheme, probe.state)
            hidden = (ARRAYS + lanes_at_once) * array
            on_gpu = settings.device.type == "cuda" and placement == "device"
            peaks += [resident + probe.work_bytes + (hidden if placement == "cpu" else 0), eval_peak]
            gpu_peaks += [probe.gpu_work_bytes + (hidden if on_gpu else 0), eval_gpu]
            disk = probe.file_bytes * len(loaded.blocks)
            plans.append(
                CellPlan(
                    cell.label,
                    len(loaded.blocks),
                    False,
                    probe.seconds * len(loaded.blocks),
                    evaluate_s,
                    disk,
                )
            )
        baseline_s = 0.0 if baseline_is_known(common) else prober.scoring(common.suite)[0]
        n_parts = len(parts(common, missing))
        evals = config.evals
        left_out = [name for name in NOT_PROBED if getattr(evals, name)]
        plan = PassPlan(
            model=config.model,
            cells=plans,
            start_s=started,
            import_s=imported,
            shared_s=shared * len(loaded.blocks) * n_parts,
            baseline_s=baseline_s,
            parts=n_parts,
            cpu_bytes=max(peaks),
            gpu_bytes=max(gpu_peaks) if settings.device.type == "cuda" else None,
            notes=[f"evaluation leaves out {', '.join(left_out)}"] if left_out else [],
        )
        per_window = (ARRAYS + lanes_at_once) * array // n
        return replace(plan, problems=_problems(plan, config, settings.device, per_window, n, placement))


def process_age() -> float:
    """Seconds since this process began."""
    return time.time() - psutil.Process().create_time()


class _Prober:
    """Measures single blocks of one model."""

    def __init__(self, loaded: LoadedModel, settings: EngineSettings, ids: Tensor, scratch: Path) -> None:
        self.loaded, self.settings, self.ids, self.scratch = loaded, settings, ids, scratch
        self.count = 0
        batch = settings.forward_batch(ids.shape[1])
        few = min(max(2, batch), max(2, len(ids) // 8))
        few = -(-few // settings.batch_size) * settings.batch_size  # whole optimizer steps
        self.few = min(few, len(ids))
        self.shared_s: float | None = None
        self.seen: set[type] = set()

    def block(self, method: Planner, scheme: Scheme) -> tuple[_Probe, float]:
        """One block of a cell; and the seconds of a block of the full-precision pass, which all cells share."""
        full: list[tuple[int, int]] = []
        on_gpu = self.settings.device.type == "cuda"
        if not self.seen or (on_gpu and type(method) not in self.seen):
            # the first run of anything is slow, on a GPU of any method: not what a whole pass is like
            self._run(method, scheme, self.few, 1, ITERATIONS, full)
        self.seen.add(type(method))
        first = self._run(method, scheme, self.few, 1, ITERATIONS, full)
        epochs, iterations = full[-1] if full else (0, 0)  # none: nothing is quantized

        def longer(start: int, end: int, run: Callable[[int], _Run]) -> Iterator[_Run]:
            size = start
            while size < end:
                size = min(2 * size, end)
                yield (found := run(size))
                if found.lane_s >= GROWTH * first.lane_s:
                    return

        runs = [
            first,
            *longer(self.few, len(self.ids), lambda k: self._run(method, scheme, k, 1, ITERATIONS, full)),
            *longer(1, epochs, lambda e: self._run(method, scheme, self.few, e, ITERATIONS, full)),
            *longer(ITERATIONS, iterations, lambda i: self._run(method, scheme, self.few, 1, i, full)),
        ]
        known = [
            self._facts(run.windows, min(run.epochs, epochs), min(run.iterations, iterations)) for run in runs
        ]
        wanted = self._facts(len(self.ids), epochs, iterations)
        seconds = extrapolate(known, [run.lane_s for run in runs], wanted)
        if self.shared_s is None:
            self.shared_s = extrapolate(
                [[1.0, run.windows] for run in runs], [run.shared_s for run in runs], [1.0, len(self.ids)]
            )
        probe = _Probe(
            seconds=seconds,
            work_bytes=max(run.work_bytes for run in runs),
            gpu_work_bytes=max(run.gpu_bytes for run in runs),
            state=first.state,
            file_bytes=first.file_bytes,
        )
        return probe, self.shared_s

    def _facts(self, windows: int, epochs: int, iterations: int) -> list[float]:
        steps = -(-windows // self.settings.batch_size) * epochs
        return [1.0, float(windows), float(steps), float(iterations)]

    def _run(
        self,
        method: Planner,
        scheme: Scheme,
        windows: int,
        epochs: int,
        iterations: int,
        full: list[tuple[int, int]],
    ) -> _Run:
        """Quantize the first block alone."""
        self.count += 1
        folder = self.scratch / str(self.count)
        lane = Lane("probe", _Short(method, epochs, iterations, full), scheme, Checkpoint(folder, "probe"))
        model, spec = self.loaded.model, self.loaded.spec
        before = psutil.Process().memory_info().rss
        started = time.perf_counter()
        with peak_memory() as peak:
            (result,) = reconstruct(
                model, [self.loaded.blocks[0]], spec, [lane], self.ids[:windows], self.settings
            )
        total = time.perf_counter() - started
        if result.error is not None:
            raise result.error
        arrays = ARRAYS * 4 * windows * self.ids.shape[1] * spec.hidden_size
        in_memory = arrays if self.settings.device.type == "cpu" and self.settings.placement != "disk" else 0
        file = next(folder.glob("block-*.safetensors"))
        return _Run(
            windows, epochs, iterations, result.seconds, total - result.seconds,
            max(0, peak[0] - before - in_memory), max(0, (result.peak_gpu_bytes or 0) - arrays),
            result.state(0), file.stat().st_size,
        )  # fmt: skip

    def evaluation(self, suite: Suite, scheme: Scheme, state: BlockState) -> tuple[float, int, int]:
        """Seconds, peak memory and peak GPU memory of scoring a cell, the probed block standing for every block."""
        lane = Lane("probe", _Nothing(), scheme)
        result = _EveryBlock(lane, state)
        loaded = self.loaded
        started = time.perf_counter()
        with (
            peak_memory() as peak,
            quantized(loaded.model, loaded.blocks, loaded.spec, result, self.settings),
        ):
            installed = time.perf_counter() - started
            seconds, gpu = self.scoring(suite)
        return installed + seconds, peak[0], gpu

    def scoring(self, suite: Suite) -> tuple[float, int]:
        """Seconds that the model as it is now takes for the texts of a suite, from one batch of each; GPU peak."""
        loaded, device = self.loaded, self.settings.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        total = 0.0
        with on_device(loaded.model, loaded.blocks, device):
            for text in suite.texts:
                ids = text.windows.ids
                size = suite.batch_size or self.settings.forward_batch(ids.shape[1])
                some = ids[: min(size, len(ids))]
                if total == 0.0:
                    perplexity(loaded.model, some[:1], batch_size=1, device=device)  # warm
                started = time.perf_counter()
                perplexity(loaded.model, some, batch_size=size, device=device)
                total += (time.perf_counter() - started) * len(ids) / len(some)
        gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return total, gpu


@dataclass(frozen=True)
class _Run:
    windows: int
    epochs: int
    iterations: int
    lane_s: float
    shared_s: float
    work_bytes: int
    gpu_bytes: int
    state: BlockState
    file_bytes: int


class _EveryBlock(LaneResult):
    """A lane whose blocks are all the same."""

    def __init__(self, lane: Lane, block: BlockState) -> None:
        super().__init__(lane)
        self._block = block

    def state(self, index: int) -> BlockState:
        return self._block


class _Nothing:
    """A planner that is never asked."""

    needs = Needs()

    def plan(self, view: BlockView) -> BlockPlan:
        raise AssertionError


def extrapolate(known: Sequence[Sequence[float]], seconds: Sequence[float], wanted: Sequence[float]) -> float:
    """Non-negative least squares: seconds as a sum of shares of known facts, for other facts.

    Each measurement weighs by the inverse of its time: what counts is its relative error.
    """
    import numpy as np
    from scipy.optimize import nnls

    times = np.maximum(np.asarray(seconds, dtype=float), 1e-9)
    shares, _ = nnls(np.asarray(known, dtype=float) / times[:, None], np.ones(len(times)))
    return float(np.dot(wanted, shares))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Within the context, the peak of this process's resident memory; the list holds it afterwards."""
    found = [0]
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        reset = True
    except OSError:
        reset = False
    if reset:
        yield found
        status = Path("/proc/self/status").read_text()
        found[0] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return
    stop = threading.Event()
    process = psutil.Process()

    def watch() -> None:
        while not stop.wait(SAMPLE_S):
            found[0] = max(found[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()


def _problems(
    plan: PassPlan, config: RunConfig, device: torch.device, per_window: int, windows: int, placement: str
) -> list[str]:
    """What does not fit, and what would."""
    problems = []
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss  # this process makes room
    if plan.cpu_bytes > free:
        hidden = per_window * windows if placement == "cpu" else 0
        rest = plan.cpu_bytes - hidden
        fits = (free - rest) // per_window if per_window else 0
        way = (
            f"Use {fits} calibration windows (--nsamples {fits}), or --hidden-states disk."
            if 1 <= fits < windows
            else f"Even without the windows' hidden states it takes {_gib(rest)}: use a smaller model or a machine "
            "with more memory."
        )
        problems.append(f"needs {_gib(plan.cpu_bytes)} of memory, {_gib(free)} are free. {way}")
    if plan.gpu_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        if plan.gpu_bytes > total:
            problems.append(
                f"needs {_gib(plan.gpu_bytes)} on the GPU, which has {_gib(total)}. Use --hidden-states cpu, a smaller "
                "--batch-size or --micro-batch 1."
            )
    folder = next(
        part for part in [Path(config.output), *Path(config.output).absolute().parents] if part.exists()
    )
    room = psutil.disk_usage(str(folder)).free
    if plan.disk_bytes > room:
        problems.append(
            f"writes {_gib(plan.disk_bytes)} of checkpoints, {_gib(room)} are free in {str(folder)!r}. Choose another "
            "--output, or fewer cells."
        )
    return problems


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
