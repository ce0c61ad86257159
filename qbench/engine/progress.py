"""Listener: what the engine and the runner tell whoever watches. Every method is a no-op by default."""

from __future__ import annotations

from collections.abc import Sequence

from qbench.results import BlockRecord, Result


class Listener:
    """Base class; override what you want to show."""

    def stage(self, name: str, detail: str = "") -> None:
        """A stage of the run begins: load, calibration, capture, quantize, evaluate."""

    def blocks(self, total: int, lanes: Sequence[str]) -> None:
        """The stream over `total` blocks begins for these lanes."""

    def block_start(self, lane: str, index: int, resumed: bool) -> None:
        """A lane begins a block; `resumed`: it is replayed from its checkpoint."""

    def epoch(self, lane: str, index: int, epoch: int, epochs: int, loss: float) -> None:
        """An epoch of a block's training ended with this mean loss."""

    def block_end(self, lane: str, record: BlockRecord) -> None:
        """A lane finished a block."""

    def evaluating(self, label: str, done: int, total: int) -> None:
        """Evaluation progress in windows or items."""

    def note(self, text: str) -> None:
        """Something the user should know now."""

    def row(self, result: Result) -> None:
        """A finished row."""

    def cell(self, label: str, outcome: str, detail: str = "") -> None:
        """A row that was asked for is settled: `done`, `stored` (by an earlier run) or `failed` with its error."""
