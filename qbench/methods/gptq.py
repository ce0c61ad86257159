"""GPTQ: round each linear's weight column by column, spreading each column's error over the columns still to come.

Paper: Frantar et al. 2022, arXiv 2210.17323; reference IST-DASLab/gptq@2d65066. The algorithm and how it differs from
the authors' code are in `quant/gptq.py`; docs/methods/gptq.md has the reasons. As a rounding rule it can stand under
any transform: `smoothquant+gptq`, `affinequant+gptq`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field
from torch import Tensor

from qbench.engine.plan import BlockPlan, BlockView, CalibratedRounding, Rounded
from qbench.errors import UnsupportedSchemeError
from qbench.methods.base import Method
from qbench.models.base import BlockSpec
from qbench.quant.gptq import output_error, quantize_columns
from qbench.quant.grid import Grid
from qbench.quant.uniform import extremes, round_to_nearest
from qbench.scheme import Scheme


class GPTQ(Method):
    """Second-order rounding, each column's error compensated in the columns still to come."""

    name: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.17323"
    rounds: ClassVar[bool] = True
    published_form: ClassVar[Mapping[str, Any]] = {"stale_ranges": True}

    damping_fraction: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Share of the Hessian's mean diagonal added to its diagonal; raised, and noted, where it fails.",
    )
    act_order: bool = Field(False, description="Round columns by decreasing mean square of their input.")
    static_groups: bool | None = Field(
        None,
        description="Fix the ranges of all groups before rounding. Preset: on with act_order, which needs it.",
    )
    true_sequential: bool = Field(
        False, description="Within a block, calibrate each linear behind the already rounded ones."
    )
    range_search: bool = Field(
        False, description="Shrink each range to the least error (the authors' mse option)."
    )
    stale_ranges: bool = Field(
        False,
        description="Read a group's range without the updates of its own chunk, as the authors' code does.",
    )
    column_chunk: int = Field(
        128, ge=1, description="Columns between two updates of the whole weight: speed, not results."
    )

    def resolve(self, scheme: Scheme, spec: BlockSpec) -> Self:
        """See `Method`."""
        if self.static_groups is not None:
            return self
        return self.model_copy(update={"static_groups": self.act_order})

    def check(self, scheme: Scheme, spec: BlockSpec) -> None:
        """See `Method`."""
        super().check(scheme, spec)
        if self.act_order and self.static_groups is False and scheme.group_size is not None:
            raise UnsupportedSchemeError(
                f"act_order with static_groups=false at {scheme} groups permuted columns, which needs a group "
                "index for every column; qbench stores groups of consecutive columns. Leave static_groups out, or "
                "use a scheme without groups."
            )

    def plan(self, view: BlockView) -> BlockPlan:
        """See `Method`."""
        return BlockPlan(rounding=CalibratedRounding(self._round, sequential=self.true_sequential))

    def _round(
        self, weight: Tensor, second_moment: Tensor, ranges: tuple[Tensor, Tensor] | None, grid: Grid
    ) -> Rounded:
        """One linear, with its output error beside that of rounding to nearest over its initial ranges."""
        options = self.model_dump(exclude={"true_sequential"})
        options["static_groups"] = bool(self.static_groups)
        found = quantize_columns(weight, second_moment, grid, ranges, **options)
        nearest = round_to_nearest(weight, *(ranges or extremes(weight, grid)), grid)
        energy = output_error(weight, second_moment)
        error, floor = (
            output_error(weight, second_moment, w.dequantize()) / energy if energy else 0.0
            for w in (found.weight, nearest)
        )
        notes = []
        if found.damping_fraction > self.damping_fraction:
            notes.append(
                f"gptq raised its damping to {found.damping_fraction:g}, the Hessian was not positive definite"
            )
        if error > floor:
            notes.append(f"gptq's output error {error:.3g} is above that of rounding to nearest, {floor:.3g}")
        return Rounded(found.weight, notes, {"output_error": error, "output_error_nearest": floor})
