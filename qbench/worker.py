"""The process that computes one group of cells: `python -m qbench.worker`, a job on its stdin, events on its stdout.

A sweep's own process never touches a model: whatever happens here, an out-of-memory kill included, takes this group
and nothing else. Jobs and events are JSON, one a line. The worker ends when its stdin ends: none outlives its sweep.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qbench.config import MethodRequest, RunConfig
from qbench.engine.progress import Listener
from qbench.errors import QbenchError
from qbench.results import BlockRecord, Result

Send = Callable[[dict[str, Any]], None]
ORPHANED = 3  # exit status of a worker whose sweep has gone


class Telling(Listener):
    """Sends everything it is told as an event. Overrides of `Listener` are documented there."""

    def __init__(self, send: Send) -> None:
        """Send events through `send`."""
        self.send = send

    def stage(self, name: str, detail: str = "") -> None:  # noqa: D102
        self.send({"event": "stage", "name": name, "detail": detail})

    def blocks(self, total: int, lanes: Sequence[str]) -> None:  # noqa: D102
        self.send({"event": "blocks", "total": total, "lanes": list(lanes)})

    def block_start(self, lane: str, index: int, resumed: bool) -> None:  # noqa: D102
        self.send({"event": "block_start", "lane": lane, "index": index, "resumed": resumed})

    def epoch(self, lane: str, index: int, epoch: int, epochs: int, loss: float) -> None:  # noqa: D102
        self.send(
            {"event": "epoch", "lane": lane, "index": index, "epoch": epoch, "epochs": epochs, "loss": loss}
        )

    def block_end(self, lane: str, record: BlockRecord) -> None:  # noqa: D102
        self.send({"event": "block_end", "lane": lane, "record": record.model_dump(mode="json")})

    def evaluating(self, label: str, done: int, total: int) -> None:  # noqa: D102
        self.send({"event": "evaluating", "lane": label, "done": done, "total": total})

    def note(self, text: str) -> None:  # noqa: D102
        self.send({"event": "note", "text": text})

    def row(self, result: Result) -> None:  # noqa: D102
        self.send({"event": "row", "record": json.loads(result.model_dump_json())})

    def cell(self, label: str, outcome: str, detail: str = "") -> None:  # noqa: D102
        self.send({"event": "cell", "lane": label, "outcome": outcome, "detail": detail})


def work(job: Mapping[str, Any], send: Send) -> None:
    """Do one job; an error that a user can act on is an event, anything else ends the process with its traceback.

    Args:
        job: `{"kind": "pass" | "plan", "config": …, "wanted": [{"label", "request", "scheme"}, …]}`.
        send: Takes the events.
    """
    try:
        config = RunConfig.model_validate(job["config"])
        from qbench.rows import Wanted
        from qbench.runner import run_pass

        wanted = [
            Wanted(w["label"], MethodRequest.model_validate(w["request"]), w["scheme"]) for w in job["wanted"]
        ]
        if job["kind"] == "plan":
            from qbench.planning import plan_pass

            send({"event": "plan", **plan_pass(config, wanted, Telling(send)).as_json()})
        else:
            run_pass(config, wanted, Telling(send))
    except QbenchError as error:
        send({"event": "refused", "kind": type(error).__name__, "error": str(error)})


def main() -> None:
    """Get ready, read the job, then work until it is done or nobody listens any more."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints to stdout goes to the log instead of between the events
    import qbench.runner  # noqa: F401 (it takes seconds, and the job may not be there yet)

    line = _first_line()
    if not line:  # the sweep ended before it had a job for this worker
        return
    job = json.loads(line)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def send(event: dict[str, Any]) -> None:
        with lock:
            events.write(json.dumps(event) + "\n")
            events.flush()

    work(job, send)


def _first_line() -> bytes:
    with os.fdopen(os.dup(0), "rb") as stdin:
        return stdin.readline()


def _end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when this process ends by itself
        pass
    os._exit(ORPHANED)


if __name__ == "__main__":
    main()
