"""A sweep: many cells, grouped into passes, computed by an executor, and settled one way or the other.

Everything is checked before anything is computed. Then cells that can share a pass through a model go to a worker
together; what a worker's crash leaves unsettled is retried, each cell by itself, so that the one that is to blame is
found and the others finish. The store and its checkpoints hold all state: a sweep that is killed goes on when the same
command is given again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from qbench import provenance
from qbench.cells import Cell, ExecutorConfig, passes
from qbench.config import PLACES
from qbench.errors import ConfigError, QbenchError
from qbench.executors import Event, Executor, Job, LocalExecutor
from qbench.failures import Failure, FailureStore
from qbench.results import Result, ResultStore, require_writable

if TYPE_CHECKING:
    from qbench.planning import PassPlan

POLL_S = 0.2


class Watcher(Protocol):
    """What a sweep tells whoever watches."""

    def begin(self, cells: Sequence[Cell]) -> None:
        """The sweep begins; these are its cells."""

    def said(self, job: Job, event: Event) -> None:
        """A worker says something: see `worker.Telling`."""

    def settled(self, cell: Cell, outcome: str, detail: str, row: Result | None) -> None:
        """A cell is `done`, `stored` by an earlier sweep, or `failed`."""

    def note(self, text: str) -> None:
        """Something the user should know now."""

    def tick(self) -> None:
        """Time has passed."""


@dataclass
class Outcome:
    """What became of a sweep; every cell is a row or a failure, by label.

    Attributes:
        baselines: Rows of the full-precision models, by id.
    """

    baselines: dict[str, Result] = field(default_factory=dict)
    rows: dict[str, Result] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)

    @property
    def results(self) -> list[Result]:
        """All rows, full precision first."""
        return [*self.baselines.values(), *self.rows.values()]


def check(cells: Sequence[Cell]) -> None:
    """Refuse a sweep that cannot run, before the first second of compute; reads no weights.

    Methods and their options, models, schemes, devices, texts and folders are looked at for every cell.

    Raises:
        ConfigError: Every problem once, with the cells that have it.
    """
    from qbench import runner
    from qbench.circumstances import read_texts
    from qbench.rows import Wanted

    problems: dict[str, list[str]] = {}
    descriptions: dict[tuple[Any, ...], Any] = {}
    texts_seen: set[str] = set()
    for cell in cells:
        config = cell.config
        try:
            (method,) = runner.check_request(config, [Wanted(cell.label, cell.request, str(cell.scheme))])
        except QbenchError as error:
            problems.setdefault(str(error), []).append(cell.label)
            continue
        model = (config.model, config.revision, config.trust_remote_code)
        try:
            if model not in descriptions:
                try:
                    descriptions[model] = runner.describe(config)
                except QbenchError as error:
                    descriptions[model] = error
            described = descriptions[model]
            if isinstance(described, QbenchError):
                raise described
            method.resolve(cell.scheme, described.spec).check(cell.scheme, described.spec)
            seedless = cell.config.at_seed(0)
            texts = Cell(cell.label, seedless).pass_key
            if texts not in texts_seen:
                texts_seen.add(texts)
                read_texts(config, described)
        except QbenchError as error:
            problems.setdefault(str(error), []).append(cell.label)
    if problems:
        said = [f"{_some(names)}: {message}" for message, names in problems.items()]
        raise ConfigError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)}, nothing was computed. {' '.join(said)}"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def make_executor(config: ExecutorConfig, cells: Sequence[Cell]) -> Executor:
    """The executor that a sweep asks for.

    Args:
        config: Which, and how many workers.
        cells: What it will compute: cells that are all for the CPU get one worker, however many GPUs there are.

    Raises:
        ConfigError: If Ray is asked for and not installed.
    """
    if config.kind == "ray":
        from qbench.ray_executor import RayExecutor

        return RayExecutor(config)
    devices, slots = places(config, cells)
    pinned = [devices[i % len(devices)] for i in range(slots)] if len(devices) > 1 else []
    return LocalExecutor(slots, pinned)


def places(config: ExecutorConfig, cells: Sequence[Cell]) -> tuple[list[str], int]:
    """GPUs that a sweep on this machine uses, and how many workers at once."""
    devices = [] if all(cell.config.compute.device == "cpu" for cell in cells) else visible_gpus()
    return devices, config.workers or max(1, len(devices))


def workers(config: ExecutorConfig, cells: Sequence[Cell]) -> tuple[int, str | None]:
    """Groups of cells that a sweep computes at once; and, if a cluster was to be counted, what was.

    Raises:
        ConfigError: If there is no cluster at the address that was given.
    """
    if config.kind == "ray" and config.workers is None:
        from qbench.ray_executor import count_workers

        return count_workers(config, {"GPU": len(visible_gpus()), "CPU": os.cpu_count() or 1})
    return places(config, cells)[1], None


def checked(config: ExecutorConfig, cells: Sequence[Cell]) -> Executor:
    """The executor of a sweep that has passed `check`; this machine's workers import their code meanwhile.

    Raises:
        ConfigError: See `check` and `make_executor`.
    """
    if config.kind == "ray":
        check(cells)  # before anybody asks a cluster for anything
        return make_executor(config, cells)
    executor = make_executor(config, cells)
    try:
        if isinstance(executor, LocalExecutor):
            executor.warm(len(jobs(cells, executor.slots)))
        check(cells)
    except BaseException:
        executor.close()
        raise
    return executor


def visible_gpus() -> list[str]:
    """Numbers of the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in named.split(",")][:count] if named else [str(i) for i in range(count)]


def jobs(cells: Sequence[Cell], slots: int, kind: str = "pass") -> list[Job]:
    """Groups of cells that share a pass; where there are fewer groups than slots, groups are split.

    A group is dealt out method by method, so that its parts take about equally long.
    """
    groups = passes(cells)
    parts: list[Job] = []
    for i, group in enumerate(groups):
        share = slots // len(groups) + (i < slots % len(groups))
        n = max(1, min(share, len(group)))
        order = sorted(group, key=lambda cell: cell.request.name)
        chosen = [{cell.label for cell in order[k::n]} for k in range(n)]
        parts += [Job(tuple(cell for cell in group if cell.label in part), kind) for part in chosen]
    return parts


def plan(cells: Sequence[Cell], watcher: Watcher, slots: int = 1) -> list[PassPlan]:
    """Predict every pass of a sweep, one after the other, each in a process of its own as it will be computed.

    Args:
        cells: From `expand`, checked by `check`.
        watcher: Told of progress.
        slots: Workers that the sweep will have: passes are split for them as they will be.

    Raises:
        ConfigError: If a probe fails, with its reason.
    """
    from qbench.planning import PassPlan

    executor = LocalExecutor()
    plans: list[PassPlan] = []
    try:
        for job in jobs(cells, slots, "plan"):
            executor.start(job)
            ended = False
            while not ended:
                for _, event in executor.events(POLL_S):
                    watcher.said(job, event)
                    if event["event"] == "plan":
                        plans.append(PassPlan.from_json(dict(event)))
                    elif event["event"] == "refused":
                        raise ConfigError(f"{_some([c.label for c in job.cells])}: {event['error']}")
                    elif event["event"] == "exit":
                        ended = True
                        if event["crash"]:
                            raise ConfigError(
                                f"{_some([c.label for c in job.cells])}: the probe of one block did not survive: "
                                f"{event['crash']}. Use fewer or shorter windows, or a smaller model."
                            )
                watcher.tick()
    finally:
        executor.close()
    return plans


def sweep(cells: Sequence[Cell], executor: Executor, watcher: Watcher, retry_failed: bool = False) -> Outcome:
    """Compute cells; returns when every one is settled.

    Args:
        cells: From `expand`, checked by `check`; all have one output folder.
        executor: Where; closed at the end, whatever happens.
        watcher: Told of progress.
        retry_failed: Also compute cells whose failure is on record.
    """
    folder = cells[0].config.output
    require_writable(folder)
    failures, store = FailureStore(folder), ResultStore(folder)
    outcome = Outcome()
    code = provenance.code_fingerprint()
    watcher.begin(cells)
    open_cells: dict[str, Cell] = {}
    for cell in cells:
        known = failures.find(cell.key)
        if known is not None and known.code == code and not retry_failed:
            outcome.failures[cell.label] = known
            watcher.settled(
                cell, "failed", f"{known.error} (recorded {known.created[:16]}; --retry-failed)", None
            )
        else:
            open_cells[cell.label] = cell
    waiting = deque(jobs(list(open_cells.values()), executor.slots))
    running: list[Job] = []
    rows: dict[Job, Result] = {}

    def fail(cell: Cell, kind: str, error: str) -> None:
        config = cell.config
        failure = Failure(
            key=cell.key, label=cell.label, model=config.model, method=cell.request.name, scheme=str(cell.scheme),
            error=error, kind=kind, code=code, config=config.model_dump(mode="json", exclude=PLACES),
        )  # fmt: skip
        failures.save(failure)
        settle(cell, failure)

    def settle(cell: Cell, result: Result | Failure, outcome_name: str = "failed") -> None:
        del open_cells[cell.label]
        if isinstance(result, Failure):
            outcome.failures[cell.label] = result
            watcher.settled(cell, "failed", result.error, None)
        else:
            outcome.rows[cell.label] = result
            watcher.settled(cell, outcome_name, "", result)

    try:
        while waiting or running:
            while waiting and len(running) < executor.slots:
                running.append(waiting.popleft())
                executor.start(running[-1])
            for job, event in executor.events(POLL_S):
                watcher.said(job, event)
                left = {cell.label: cell for cell in job.cells if cell.label in open_cells}
                if event["event"] == "row":
                    rows[job] = Result.model_validate(event["record"])
                    if rows[job].is_baseline:
                        outcome.baselines.setdefault(rows[job].id, rows[job])
                    if (
                        store.find(rows[job].id) is None
                    ):  # a worker on another machine may write to its own disk
                        store.save(rows[job])
                elif event["event"] == "cell" and event["lane"] in left:
                    cell = left[event["lane"]]
                    if event["outcome"] == "failed":
                        known = failures.find(cell.key)
                        settle(cell, known) if known else fail(cell, "NumericalError", event["detail"])
                    else:
                        settle(cell, rows[job], event["outcome"])
                elif event["event"] == "refused":
                    for cell in left.values():
                        fail(cell, event["kind"], event["error"])
                elif event["event"] == "exit":
                    running.remove(job)
                    crash = event["crash"] or ("it ended without a word" if left else None)
                    if crash and left and job.alone:
                        for cell in left.values():
                            fail(cell, "killed", f"{cell.label}: {crash}.")
                    elif crash and left:
                        watcher.note(f"{_some(list(left))}: {crash}; retried one by one")
                        waiting.extend(Job((cell,), job.kind, alone=True) for cell in left.values())
            watcher.tick()
    finally:
        executor.close()
    outcome.rows = {cell.label: outcome.rows[cell.label] for cell in cells if cell.label in outcome.rows}
    return outcome
