"""RTN: round to nearest, the floor that every other method must beat.

Weights go to the nearest code of their group's own range, activations are quantized as the scheme says; nothing
is calibrated, transformed or learned.
"""

from __future__ import annotations

from typing import ClassVar

from qbench.engine.plan import BlockPlan, BlockView
from qbench.methods.base import Method


class RTN(Method):
    """Round to nearest over each group's own range."""

    name: ClassVar[str] = "rtn"
    rounds: ClassVar[bool] = True

    def plan(self, view: BlockView) -> BlockPlan:
        """See `Method`."""
        return BlockPlan()
