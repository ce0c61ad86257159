"""One method at one scheme on its way through the model, and what it leaves behind, block by block."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

from qbench.engine.checkpoint import Checkpoint
from qbench.engine.plan import BlockPlan, BlockView, Needs
from qbench.engine.state import BlockState
from qbench.errors import QbenchError
from qbench.results import BlockRecord, TransformRecord
from qbench.scheme import Scheme


class Planner(Protocol):
    """What the engine needs of a method."""

    @property
    def needs(self) -> Needs:
        """Statistics to gather before planning."""

    def plan(self, view: BlockView) -> BlockPlan:
        """Decide what to do with one block."""


@dataclass
class Lane:
    """One (method, scheme) on its way through the model.

    Attributes:
        name: For progress and errors.
        planner: The method.
        scheme: The numbers.
        checkpoint: Where finished blocks go, or None to keep them in memory.
    """

    name: str
    planner: Planner
    scheme: Scheme
    checkpoint: Checkpoint | None = None

    def has_block(self, index: int) -> bool:
        """Whether this block is in the checkpoint."""
        return self.checkpoint is not None and index < len(self.checkpoint)


class LaneResult:
    """Finished blocks of one lane, read from the checkpoint or from memory."""

    def __init__(self, lane: Lane):
        """Begin with no block."""
        self.lane = lane
        self.seconds = 0.0
        self.peak_gpu_bytes: int | None = None
        self._kept: list[BlockState] = []
        self.records: list[BlockRecord] = []
        self.transforms: list[list[TransformRecord]] = []
        self.weight_bits = 0
        self.error: QbenchError | None = None
        self._digest = hashlib.sha256()

    @property
    def notes(self) -> list[str]:
        """Notes of all blocks, each once."""
        return list(dict.fromkeys(note for record in self.records for note in record.notes))

    def add(self, index: int, state: BlockState, fresh: bool) -> None:
        """Take a finished block."""
        assert state.record is not None
        self.records.append(state.record)
        self.transforms.append(state.transforms)
        self.weight_bits += state.weight_bits
        self.seconds += state.record.seconds
        state.update_digest(self._digest)
        if self.lane.checkpoint is None:
            self._kept.append(state.cpu())
        elif fresh:
            self.lane.checkpoint.save(index, state)

    @property
    def codes(self) -> str:
        """Hash of the integers of all blocks so far."""
        return self._digest.hexdigest()

    def state(self, index: int) -> BlockState:
        """Block `index`."""
        return self._kept[index] if self.lane.checkpoint is None else self.lane.checkpoint.load(index)

    def __len__(self) -> int:
        return len(self.records)
