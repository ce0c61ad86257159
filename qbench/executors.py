"""Executors: where the groups of a sweep are computed. Processes of this machine here, a cluster in `ray_executor`.

An executor starts jobs and hands back what they say. What a crash means, what is retried and what is recorded is
decided in `sweep`, equally for all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from qbench.cells import Cell

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
LOG_TAIL = 4000  # bytes of a crashed worker's log that are looked at


@dataclass(frozen=True, eq=False)
class Job:
    """Cells that are computed together, as lanes of one pass.

    Attributes:
        kind: `pass` computes, `plan` predicts.
        alone: Whether the cell is by itself because its group crashed.
    """

    cells: tuple[Cell, ...]
    kind: str = "pass"
    alone: bool = False

    def as_json(self) -> dict[str, Any]:
        """What a worker is told."""
        wanted = [
            {"label": c.label, "request": c.request.model_dump(mode="json"), "scheme": str(c.scheme)}
            for c in self.cells
        ]
        return {"kind": self.kind, "config": self.cells[0].config.model_dump(mode="json"), "wanted": wanted}


Event = Mapping[str, Any]


class Executor(Protocol):
    """Runs up to `slots` jobs at a time."""

    slots: int

    def start(self, job: Job) -> None:
        """Begin a job; never more than `slots` are running."""

    def events(self, timeout: float) -> Iterator[tuple[Job, Event]]:
        """What has been said since, waiting at most `timeout` seconds for the first.

        The last event of a job is `{"event": "exit", "crash": None or a sentence}`.
        """

    def close(self) -> None:
        """End what is running, at once."""


@dataclass
class _Process:
    """A worker; its job and the thread that reads what it says come when it is given one."""

    process: subprocess.Popen[str]
    log: IO[bytes]
    device: str | None
    job: Job = field(init=False)
    reader: threading.Thread | None = None


class LocalExecutor:
    """Processes of this machine, each pinned to a device if there are several."""

    def __init__(self, slots: int = 1, devices: Sequence[str] = (), threads: int | None = None) -> None:
        """Start nothing yet.

        Args:
            slots: Processes at a time.
            devices: CUDA device numbers to share out; none: processes see what this one sees.
            threads: CPU threads of each process; None: all cores, shared by `slots`.
        """
        self.slots = slots
        self._free: list[str | None] = [*devices] or [None] * slots
        self._threads = threads
        self._said: queue.Queue[tuple[Job, Event]] = queue.Queue()
        self._running: list[_Process] = []
        self._idle: list[_Process] = []

    def warm(self, jobs: int) -> None:
        """Start workers for jobs to come: they import their code while the caller is still busy with other things."""
        while len(self._idle) < min(jobs, self.slots):
            self._idle.append(self._spawn())

    def _spawn(self) -> _Process:
        device = self._free.pop(0)
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed when its process has ended)
        process = subprocess.Popen(
            [sys.executable, "-m", "qbench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=self._environment(device),
            text=True,
            start_new_session=True,  # Ctrl-C reaches the sweep, which ends its workers itself
        )
        return _Process(process, log, device)

    def start(self, job: Job) -> None:
        """See `Executor`."""
        running = self._idle.pop(0) if self._idle else self._spawn()
        running.job = job
        self._running.append(running)
        pipe = running.process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: its exit says so
            pipe.write(json.dumps(job.as_json()) + "\n")
            pipe.flush()
        running.reader = threading.Thread(target=self._read, args=(running,), daemon=True)
        running.reader.start()

    def _environment(self, device: str | None) -> dict[str, str]:
        env = dict(os.environ)
        paths = [str(PACKAGE_ROOT), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
        if device is not None:
            env["CUDA_VISIBLE_DEVICES"] = device
        threads = self._threads or (max(1, (os.cpu_count() or 1) // self.slots) if self.slots > 1 else None)
        if threads is not None and "OMP_NUM_THREADS" not in env:
            env["OMP_NUM_THREADS"] = str(threads)
        return env

    def _read(self, running: _Process) -> None:
        assert running.process.stdout is not None
        for line in running.process.stdout:
            try:
                self._said.put((running.job, json.loads(line)))
            except ValueError:  # the last line of a process that was killed while it wrote
                break
        code = running.process.wait()
        self._said.put((running.job, {"event": "exit", "crash": _crash(code, running.log)}))

    def events(self, timeout: float) -> Iterator[tuple[Job, Event]]:
        """See `Executor`."""
        while True:
            try:
                job, event = self._said.get(timeout=timeout)
            except queue.Empty:
                return
            timeout = 0.0
            if event["event"] == "exit":
                ended = next(running for running in self._running if running.job is job)
                self._running.remove(ended)
                self._free.append(ended.device)
                _close(ended)
            yield job, event
            if self._said.empty():
                return

    def close(self) -> None:
        """See `Executor`."""
        every = [*self._running, *self._idle]
        for worker in every:
            worker.process.kill()
        for worker in every:
            worker.process.wait()
            _close(worker)
        self._running.clear()
        self._idle.clear()


def _close(running: _Process) -> None:
    """Let go of everything that an ended process had."""
    if running.reader is not None:
        running.reader.join()
    running.log.close()
    for pipe in (running.process.stdin, running.process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # a job that was never read
            pipe.close()


def _crash(code: int, log: IO[bytes]) -> str | None:
    """What ended a worker, in one sentence; None if it ended as it should."""
    if code == 0:
        return None
    if code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
        reason = ": out of memory?" if name == "SIGKILL" else ""
        return f"its process was killed by {name}{reason}"
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - LOG_TAIL))
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return f"its process ended with status {code}" + (f": {lines[-1]}" if lines else "")
