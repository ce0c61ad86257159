"""The Ray executor: groups of cells as tasks of a cluster, an existing one or one that is started on this machine.

Ray schedules, restarts what dies and moves what is said; qbench writes no scheduler. Rows arrive in the store of the
machine that the sweep was started on; where the nodes share that folder, checkpoints survive a node as well.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from qbench.cells import ExecutorConfig
from qbench.errors import ConfigError, first_line
from qbench.executors import PACKAGE_ROOT, Event, Job

LOOK_S = 0.1  # between looks at what Ray has
KNOCK_S = 10.0  # for an answer at an address
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def cluster_address(config: ExecutorConfig) -> str | None:
    """Of the cluster that is asked for, here or in RAY_ADDRESS; None where one is to be started on this machine."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def connect(ray: Any, config: ExecutorConfig) -> None:
    """Connect to the cluster that is asked for, or start one on this machine.

    Raises:
        ConfigError: If there is none at the address that was given, or none can be started.
    """
    address = cluster_address(config)
    try:
        if address is not None:
            _require_listener(address)
            ray.init(address=address, **QUIET)
        else:  # "local": without it Ray would take any cluster that was last started here, and refuse a number of CPUs
            count = int((config.cpus or 1) * config.workers) if config.workers else None
            ray.init(address="local", num_cpus=count, include_dashboard=False, **QUIET)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"executor ray: no cluster at {address or 'this machine'}: {first_line(error)}. "
            "Start one with `ray start --head`, or leave the address out."
        ) from None


def _require_listener(address: str) -> None:
    """Knock at HOST:PORT: Ray itself tries for many minutes where nobody answers.

    Raises:
        OSError: If nothing listens there.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def share(config: ExecutorConfig, resources: Mapping[str, float]) -> tuple[int, float, float]:
    """Workers at once, and the CPUs and GPUs of each, for a cluster that has these resources."""
    gpus = config.gpus if config.gpus is not None else min(1.0, resources.get("GPU", 0.0))
    total = max(1.0, resources.get("CPU", 1.0))
    by_gpu = int(resources.get("GPU", 0.0) / gpus) if gpus else 0
    by_cpu = int(total / config.cpus) if config.cpus else 0
    workers = config.workers or by_gpu or by_cpu or 1
    return workers, config.cpus or max(1.0, total // workers), gpus


def count_workers(config: ExecutorConfig, here: Mapping[str, float]) -> tuple[int, str]:
    """Workers that a sweep would have at once, and a sentence on whose resources that was counted by.

    Args:
        config: Without a number of workers.
        here: Resources of this machine, which count where there is no cluster to ask.

    Raises:
        ConfigError: If there is no cluster at the address that was given.
    """
    resources, owner = here, "this machine, on which a sweep would start Ray"
    if (address := cluster_address(config)) is not None:
        try:
            import ray
        except ImportError:
            owner = f"this machine, not of {address}: the package ray is not installed here"
        else:
            connect(ray, config)
            resources, owner = ray.cluster_resources(), f"the Ray cluster at {address}"
            ray.shutdown()  # of our connection: the cluster goes on
    workers = share(config, resources)[0]
    found = ", ".join(f"{name} {resources.get(name, 0.0):g}" for name in ("GPU", "CPU"))
    return workers, f"{workers} at a time by the resources of {owner} ({found})"


def _work(job: Mapping[str, Any], events: Any) -> None:
    """The task: what `worker.work` does, its events sent to the sweep."""
    from qbench.worker import work

    work(job, lambda event: events.put(event))


class RayExecutor:
    """Jobs as Ray tasks."""

    def __init__(self, config: ExecutorConfig) -> None:
        """Connect to the cluster, or start one here.

        Raises:
            ConfigError: If Ray is not installed, or the cluster cannot be reached.
        """
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "executor ray: the package ray is not installed. Install qbench[ray], or use --executor local."
            ) from None
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            connect(ray, config)
        self.slots, cpus, gpus = share(config, ray.cluster_resources())
        self._options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": config.retries}
        if config.memory_gib is not None:
            self._options["memory"] = int(config.memory_gib * 2**30)
        paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"PYTHONPATH": os.pathsep.join(paths)}
        # Ray sets OMP_NUM_THREADS to the task's CPUs unless told otherwise; codes depend on it in their last bits.
        if "OMP_NUM_THREADS" in os.environ:
            variables["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
        self._options["runtime_env"] = {"env_vars": variables}
        self._running: dict[Job, tuple[Any, Any]] = {}

    def start(self, job: Job) -> None:
        """See `Executor`."""
        from ray.util.queue import Queue

        events = Queue(actor_options={"num_cpus": 0})
        task = self._ray.remote(_work).options(**self._options).remote(job.as_json(), events)
        self._running[job] = (task, events)

    def events(self, timeout: float) -> Iterator[tuple[Job, Event]]:
        """See `Executor`."""
        until = time.monotonic() + timeout
        said = False
        while not said and self._running:
            for job, (task, events) in list(self._running.items()):
                ended = bool(
                    self._ray.wait([task], timeout=0)[0]
                )  # looked at first: then nothing is said after
                while not events.empty():
                    said = True
                    yield job, events.get()
                if ended:
                    said = True
                    del self._running[job]
                    events.shutdown(force=True)
                    yield job, {"event": "exit", "crash": self._crash(task)}
            if time.monotonic() >= until:
                return
            if not said:
                time.sleep(LOOK_S)

    def _crash(self, task: Any) -> str | None:
        try:
            self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:  # a bug: the exception as it was raised there
            return f"its task raised {str(error.cause or error).strip().splitlines()[-1]}"
        except self._ray.exceptions.RayError as error:  # a worker that died more often than it is replaced
            return f"its worker died: {first_line(error)}"
        return None

    def close(self) -> None:
        """See `Executor`."""
        for task, _ in self._running.values():
            self._ray.cancel(task, force=True)
        self._running.clear()
        if self._started:
            self._ray.shutdown()
