"""What a sweep shows while it works, on stderr: a live table of its cells in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import click

from qbench.cells import Cell
from qbench.errors import counted
from qbench.executors import Event, Job
from qbench.reports.columns import MISSING, format_seconds, format_value
from qbench.results import BlockRecord, Result, split_metric

MARKS = {"waiting": " ", "running": "▸", "done": "✓", "stored": "=", "failed": "✗"}
STYLES = {"waiting": "dim", "running": "", "done": "green", "stored": "dim green", "failed": "red"}
BAR = 12


@dataclass
class CellState:
    """What is known of one cell.

    Attributes:
        phase: `waiting`, `running`, `done`, `stored` or `failed`.
        share: Of its blocks, finished.
        text: What it is doing, or what came out.
    """

    label: str
    phase: str = "waiting"
    share: float = 0.0
    text: str = ""
    seconds: float = 0.0


class SweepView:
    """Plain lines: every stage, every block, every cell as it is settled, with how many are left."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock
        self.began = clock()
        self.cells: dict[str, CellState] = {}
        self.blocks: dict[Job, int] = {}
        self.doing = ""

    def __enter__(self) -> SweepView:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is open."""

    @property
    def settled_count(self) -> int:
        """Cells that are done with, one way or the other."""
        return sum(state.phase in ("done", "stored", "failed") for state in self.cells.values())

    def begin(self, cells: Sequence[Cell]) -> None:
        """See `sweep.Watcher`."""
        self.cells = {cell.label: CellState(cell.label) for cell in cells}
        self.line(counted(len(cells), "cell"))

    def said(self, job: Job, event: Event) -> None:
        """See `sweep.Watcher`."""
        kind, lane = event["event"], event.get("lane", "")
        if kind == "evaluating":  # LABEL, WHAT
            lane, _, what = lane.rpartition(", ")
        state = self.cells.get(lane)
        if kind == "stage":
            self.doing = f"{event['name']} {event['detail']}".strip()
            self.stage(job, self.doing)
        elif kind == "blocks":
            self.blocks[job] = event["total"]
        elif kind == "note":
            self.note(event["text"])
        elif state is None:
            return
        elif kind == "block_start":
            state.phase, state.text = "running", f"block {event['index'] + 1}/{self.blocks.get(job, 0)}"
        elif kind == "epoch":
            state.text = (
                f"block {event['index'] + 1}/{self.blocks.get(job, 0)}  epoch {event['epoch'] + 1}/{event['epochs']}"
                f"  loss {event['loss']:.3g}"
            )
        elif kind == "block_end":
            record = BlockRecord.model_validate(event["record"])
            state.share = (record.index + 1) / max(1, self.blocks.get(job, 1))
            state.seconds += record.seconds
            error = "" if record.accumulated_error is None else f"  error {record.accumulated_error:.3g}"
            state.text = f"block {record.index + 1}/{self.blocks.get(job, 0)}{error}"
            self.block(state)
        elif kind == "evaluating":
            state.phase, state.text = "running", f"evaluate {what} {event['done']}/{event['total']}"

    def settled(self, cell: Cell, outcome: str, detail: str, row: Result | None) -> None:
        """See `sweep.Watcher`."""
        state = self.cells[cell.label]
        state.phase, state.share = outcome, 1.0
        if row is not None:
            state.seconds = row.cost.seconds
            values = [f"{' '.join(split_metric(k))} {format_value(m.value)}" for k, m in row.metrics.items()]
            state.text = ", ".join(values[:3]) or MISSING
        else:
            state.text = detail
        words = {"done": "done", "stored": "stored earlier", "failed": "FAILED"}[outcome]
        self.line(f"({self.settled_count}/{len(self.cells)}) {words}: {cell.label}  {state.text}")

    def note(self, text: str) -> None:
        """See `sweep.Watcher`."""
        self.line(f"note: {text}")

    def tick(self) -> None:
        """See `sweep.Watcher`."""

    def stage(self, job: Job, text: str) -> None:
        """A worker begins something."""
        self.line(text)

    def block(self, state: CellState) -> None:
        """A cell has finished a block."""
        self.line(f"{state.label}  {state.text}")

    def line(self, text: str) -> None:
        """Print one line with the time since the beginning."""
        elapsed = self.clock() - self.began
        click.echo(f"[{format_seconds(elapsed) if elapsed > 0 else '0s':>6}] {text}", file=self.stream)


class LiveSweepView(SweepView):
    """A table of the cells that is drawn anew; what is waiting is counted where it does not fit the terminal."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic, **console: Any) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(stream, clock)
        self.console = Console(file=stream, **console)
        self.live = Live(
            console=self.console, get_renderable=self.table, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> LiveSweepView:
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()
        self.console.print(self.table(whole=True))

    def stage(self, job: Job, text: str) -> None:
        """The footer says it."""

    def block(self, state: CellState) -> None:
        """The table says it."""

    def line(self, text: str) -> None:
        """Notes and failures stay above the table; everything else is in it."""
        if text.startswith("note: ") or ") FAILED: " in text:
            style = "yellow" if text.startswith("note: ") else "red"
            self.console.print(text, style=style, markup=False, highlight=False)

    def table(self, whole: bool = False) -> Any:
        """The cells as they are now: all of them, or as many as the terminal is high, running ones first."""
        from rich.table import Table
        from rich.text import Text

        room = len(self.cells) if whole else max(4, self.console.size.height - 5)
        order = {"running": 0, "failed": 1, "done": 2, "waiting": 3, "stored": 4}
        states = list(self.cells.values())
        if len(states) > room:
            kept = sorted(states, key=lambda state: order[state.phase])[:room]
            states = [state for state in states if state in kept]
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
        for state in states:
            filled = round(state.share * BAR)
            table.add_row(
                Text(MARKS[state.phase], STYLES[state.phase]),
                Text(state.label, STYLES[state.phase]),
                Text("━" * filled, "green") + Text("━" * (BAR - filled), "dim"),
                Text(format_seconds(state.seconds) if state.seconds > 0 else "", "dim"),
                Text(state.text, overflow="ellipsis", no_wrap=not whole),
            )
        hidden = len(self.cells) - len(states)
        counts = f"{self.settled_count}/{len(self.cells)} cells" + (
            f" ({hidden} not shown)" if hidden else ""
        )
        elapsed = self.clock() - self.began
        table.caption = f"{counts}  {format_seconds(elapsed) if elapsed > 0 else '0s'}" + (
            "" if whole else f"  {self.doing}"
        )
        table.caption_justify = "left"
        return table


@contextmanager
def watching(stream: TextIO | None = None) -> Iterator[SweepView]:
    """A view of a sweep: live if the stream is a terminal; the terminal is left clean also after an error."""
    stream = sys.stderr if stream is None else stream
    with LiveSweepView(stream) if stream.isatty() else SweepView(stream) as view:
        yield view
