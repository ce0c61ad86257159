"""What a run shows while it works, on stderr: live bars in a terminal, plain lines in a log.

Remaining time is estimated per lane (one method at one scheme), because a block of one method can take a thousand times
as long as a block of another.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import click
from typing_extensions import override

from qbench.engine.progress import Listener
from qbench.reports.columns import MISSING, format_seconds, format_value
from qbench.results import BlockRecord, Result, split_metric

EVALUATION_EVERY_S = 10.0  # plain lines of a long evaluation, at most one in this time


@contextmanager
def listening(stream: TextIO | None = None) -> Iterator[Listener]:
    """A listener for a run: live if the stream is a terminal; the terminal is left clean also after an error."""
    stream = sys.stderr if stream is None else stream
    without_loading_bars()
    if stream.isatty():
        with LiveProgress(stream) as live:
            yield live
    else:
        yield PlainProgress(stream)


def without_loading_bars() -> None:
    """Keep transformers' bars for reading weights out of logs and of our own display; downloads keep theirs."""
    from transformers.utils import logging

    logging._tqdm_active = False  # the public switch would also hide downloads


@dataclass
class Estimate:
    """Remaining seconds of a stream of blocks, from the blocks that were computed so far.

    Attributes:
        total: Blocks of each lane.
        done: Finished blocks by lane, resumed ones included.
        seconds: Durations of the blocks that were really computed, by lane.
    """

    total: int = 0
    done: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    running: str | None = None
    since: float = 0.0
    share: float = 0.0

    def begin(self, total: int, lanes: Sequence[str]) -> None:
        """A stream over `total` blocks begins."""
        self.total, self.running = total, None
        self.seconds = {lane: [] for lane in lanes}
        self.done = {lane: 0 for lane in lanes}

    def start(self, lane: str, now: float) -> None:
        """A block begins."""
        self.running, self.since, self.share = lane, now, 0.0

    def end(self, lane: str, seconds: float, resumed: bool) -> None:
        """A block ended."""
        self.running = None
        self.done[lane] = self.done.get(lane, 0) + 1
        if not resumed:
            self.seconds.setdefault(lane, []).append(seconds)

    def remaining(self, now: float) -> float | None:
        """Seconds that are left; None until every lane has something to go by."""
        left = 0.0
        for lane, done in list(self.done.items()):  # a display may read while the run writes
            if done >= self.total:
                continue
            elapsed = now - self.since if lane == self.running else 0.0
            seconds = self.seconds.get(lane)
            if seconds:
                block = sum(seconds) / len(seconds)
            elif lane == self.running and self.share > 0:
                block = elapsed / self.share
            else:
                return None
            # A block that takes longer than those before it is about to end: no time of the others is used up.
            left += max(block - elapsed, 0.0) + (self.total - done - 1) * block
        return left

    @property
    def finished(self) -> float:
        """Blocks done over all lanes, the running one in part."""
        return sum(self.done.values()) + (self.share if self.running is not None else 0.0)


def memory_text() -> str:
    """Memory of this process, and of the GPU if torch is using one."""
    text = f"{_resident_bytes() / (1 << 30):.1f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", GPU {torch.cuda.memory_reserved() / (1 << 30):.1f} GiB"
    return text


def _resident_bytes() -> int:
    try:
        import psutil
    except ImportError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the peak, for want of the present
    return psutil.Process().memory_info().rss


def describe_block(record: BlockRecord) -> str:
    """What a block's record says in a few words: training loss first to last, error, time."""
    parts = []
    if record.losses:
        parts.append(f"loss {record.losses[0]:.3g} -> {record.losses[-1]:.3g}")
    if record.accumulated_error is not None:
        parts.append(f"error {record.accumulated_error:.3g}")
    elif record.local_error is not None:
        parts.append(f"error {record.local_error:.3g}")
    return "  ".join([*parts, format_seconds(record.seconds) if record.seconds > 0 else "0s"])


def describe_outcome(label: str, outcome: str) -> str | None:
    """What became of a row, in one line; None where its own line says it."""
    return {"stored": f"stored earlier: {label}", "failed": f"failed: {label}"}.get(outcome)


def describe_row(result: Result) -> str:
    """A finished row in one line."""
    values = [f"{' '.join(split_metric(key))} {format_value(m.value)}" for key, m in result.metrics.items()]
    return f"done: {result.method} {result.scheme}  {', '.join(values) or MISSING}"


class _Watching(Listener):
    """What both forms keep track of. Overrides of `Listener` are documented there."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self.clock = clock
        self.began = clock()
        self.estimate = Estimate()
        self.resumed: set[tuple[str, int]] = set()

    @override
    def blocks(self, total: int, lanes: Sequence[str]) -> None:
        self.estimate.begin(total, lanes)
        self.resumed.clear()

    @override
    def block_start(self, lane: str, index: int, resumed: bool) -> None:
        self.estimate.start(lane, self.clock())
        if resumed:
            self.resumed.add((lane, index))

    @override
    def epoch(self, lane: str, index: int, epoch: int, epochs: int, loss: float) -> None:
        self.estimate.share = min((epoch + 1) / max(epochs, 1), 1.0)

    @override
    def block_end(self, lane: str, record: BlockRecord) -> None:
        self.estimate.end(lane, record.seconds, (lane, record.index) in self.resumed)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self.clock() - self.began

    @property
    def remaining(self) -> str:
        """Seconds that are left, in words."""
        left = self.estimate.remaining(self.clock())
        return MISSING if left is None else "0s" if left <= 0 else format_seconds(left)


class PlainProgress(_Watching):
    """One line per event, for logs: `[  12s] block 3/12  affinequant W4A4  loss 0.21 -> 0.08  …`."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock)
        self.last_evaluation = -EVALUATION_EVERY_S

    def _line(self, text: str) -> None:
        elapsed = format_seconds(self.elapsed) if self.elapsed > 0 else "0s"
        click.echo(f"[{elapsed:>6}] {text}", file=self.stream)

    @override
    def stage(self, name: str, detail: str = "") -> None:
        self._line(f"{name}  {detail}".rstrip())

    @override
    def block_end(self, lane: str, record: BlockRecord) -> None:
        super().block_end(lane, record)
        where = f"block {record.index + 1}/{self.estimate.total}  {lane}"
        if (lane, record.index) in self.resumed:
            self._line(f"{where}  resumed")
            return
        self._line(f"{where}  {describe_block(record)}  left {self.remaining}  {memory_text()}")
        for note in record.notes:
            self._line(f"  note: {note}")

    @override
    def evaluating(self, label: str, done: int, total: int) -> None:
        if done >= total or self.elapsed - self.last_evaluation >= EVALUATION_EVERY_S:
            self.last_evaluation = self.elapsed
            self._line(f"evaluate {label}  {done}/{total}")

    @override
    def note(self, text: str) -> None:
        self._line(f"note: {text}")

    @override
    def row(self, result: Result) -> None:
        self._line(describe_row(result))

    @override
    def cell(self, label: str, outcome: str, detail: str = "") -> None:
        if text := describe_outcome(label, outcome):
            self._line(text)


class _Now:
    """A text that is made anew whenever the display is drawn, so that time passes between events too."""

    def __init__(self, text: Callable[[], str]) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text()


class LiveProgress(_Watching):
    """A bar for the blocks of all lanes, one for the block at hand or the evaluation, and finished rows above."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic, **console: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        super().__init__(stream, clock)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", markup=False),
            console=Console(file=stream, **console),
            get_time=clock,
        )
        self.overall: Any = None
        self.current: Any = None
        self.loss = ""

    def __enter__(self) -> LiveProgress:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hide_current()
        self.progress.stop()

    def _say(self, text: str, style: str = "") -> None:
        self.progress.console.print(text, style=style, markup=False, highlight=False)

    def _show_current(self, description: str, done: float, total: float | None, text: str | _Now) -> None:
        if self.current is None:
            # Without a total the bar pulses.
            self.current = self.progress.add_task(description, total=total, text=text)
        self.progress.update(self.current, description=description, completed=done, total=total, text=text)

    def _hide_current(self) -> None:
        if self.current is not None:
            self.progress.remove_task(self.current)
            self.current = None

    def _refresh_overall(self) -> None:
        if self.overall is not None:
            self.progress.update(self.overall, completed=self.estimate.finished)

    def _overall_text(self) -> str:
        left = (
            "" if self.estimate.finished >= self.estimate.total * len(self.estimate.done) else self.remaining
        )
        return f"{format_seconds(self.elapsed)}  {left and f'left {left}  '}{memory_text()}"

    @override
    def stage(self, name: str, detail: str = "") -> None:
        self._hide_current()
        self._show_current(
            f"{name} {detail}".rstrip(), 0, None, _Now(memory_text) if self.overall is None else ""
        )

    @override
    def blocks(self, total: int, lanes: Sequence[str]) -> None:
        super().blocks(total, lanes)
        self._hide_current()
        if self.overall is not None:
            self.progress.remove_task(self.overall)
        self.overall = self.progress.add_task(
            "blocks", total=total * len(lanes), text=_Now(self._overall_text)
        )

    @override
    def block_start(self, lane: str, index: int, resumed: bool) -> None:
        super().block_start(lane, index, resumed)
        self._show_current(f"{index + 1}/{self.estimate.total} {lane}", 0, 1, "resumed" if resumed else "")
        self._refresh_overall()

    @override
    def epoch(self, lane: str, index: int, epoch: int, epochs: int, loss: float) -> None:
        super().epoch(lane, index, epoch, epochs, loss)
        where = f"{index + 1}/{self.estimate.total} {lane}"
        self._show_current(where, epoch + 1, epochs, f"epoch {epoch + 1}/{epochs}  loss {loss:.3g}")
        self._refresh_overall()

    @override
    def block_end(self, lane: str, record: BlockRecord) -> None:
        super().block_end(lane, record)
        where = f"{record.index + 1}/{self.estimate.total} {lane}"
        self._show_current(where, 1, 1, describe_block(record))
        self._refresh_overall()
        for note in record.notes:
            self._say(f"block {record.index + 1} {lane}: {note}", "yellow")

    @override
    def evaluating(self, label: str, done: int, total: int) -> None:
        self._show_current(f"evaluate {label}", done, total, f"{done}/{total}")

    @override
    def note(self, text: str) -> None:
        self._say(f"note: {text}", "yellow")

    @override
    def row(self, result: Result) -> None:
        self._say(describe_row(result), "green")

    @override
    def cell(self, label: str, outcome: str, detail: str = "") -> None:
        if text := describe_outcome(label, outcome):
            self._say(text, "red" if outcome == "failed" else "")
