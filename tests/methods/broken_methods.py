"""Plugins that each break one rule: what the contract must catch."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field, PrivateAttr
from torch import Tensor

from qbench.engine.plan import BlockPlan, BlockView
from qbench.methods.base import Method
from qbench.models.base import BlockSpec
from qbench.quant import uniform
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme
from qbench.transforms.tensors import BlockTensors
from qbench.transforms.transform import DiagonalTransform


class Broken(Method):
    """Rounds to nearest; what is broken is added below."""

    name: ClassVar[str] = "broken"

    def plan(self, view: BlockView) -> BlockPlan:
        return BlockPlan()


class _HalfTransform(DiagonalTransform):
    """Divides the norm and forgets the weights, but says that it preserves the function."""

    def apply_to(self, tensors: BlockTensors) -> None:
        norm = self.site.producer
        tensors.norm_weight[norm] = self.build_map().undo_rows(tensors.norm_weight[norm])


class ForgetsInverse(Broken):
    def plan(self, view: BlockView) -> BlockPlan:
        scale = torch.full((view.spec.hidden_size,), 1.001)
        return BlockPlan([_HalfTransform(view.spec, view.spec.site("attn_in"), scale)])


class ChangesGroups(Broken):
    """Quantizes in groups of 8, whatever was asked: finer scales than the row says."""

    def plan(self, view: BlockView) -> BlockPlan:
        def rounding(weight: Tensor, low: Tensor, high: Tensor, grid: Grid) -> QuantizedWeight:
            finer = replace(grid, group_size=8)
            return uniform.round_to_nearest(weight, *uniform.extremes(weight, finer), finer)

        return BlockPlan(rounding=rounding)


class ExtraBit(Broken):
    """Uses one bit more than the scheme has."""

    def plan(self, view: BlockView) -> BlockPlan:
        def rounding(weight: Tensor, low: Tensor, high: Tensor, grid: Grid) -> QuantizedWeight:
            return uniform.round_to_nearest(weight, low, high, replace(grid, bits=grid.bits + 1))

        return BlockPlan(rounding=rounding)


class KeepsFloats(Broken):
    """Returns the weight instead of integers."""

    def plan(self, view: BlockView) -> BlockPlan:
        return BlockPlan(rounding=lambda weight, low, high, grid: uniform.fake_quantize(weight, grid))  # type: ignore


class Dice(Broken):
    """Stochastic rounding from the global generator."""

    def plan(self, view: BlockView) -> BlockPlan:
        def rounding(weight: Tensor, low: Tensor, high: Tensor, grid: Grid) -> QuantizedWeight:
            return uniform.round_to_nearest(weight + 1e-2 * torch.rand_like(weight), low, high, grid)

        return BlockPlan(rounding=rounding)


class Scribbles(Broken):
    """Changes the block's tensors, which all lanes share, while planning."""

    def plan(self, view: BlockView) -> BlockPlan:
        view.tensors.weight["q"].mul_(0.999)
        return BlockPlan()


class Remembers(Broken):
    """Rounds a block in another way if this object planned the one before: a resumed run has another object."""

    _planned: list[int] = PrivateAttr(default_factory=list)

    def plan(self, view: BlockView) -> BlockPlan:
        self._planned.append(view.index)
        shrink = 0.99 if len(self._planned) > 1 else 1.0
        return BlockPlan(
            rounding=lambda w, low, high, grid: uniform.round_to_nearest(w, low * shrink, high * shrink, grid)
        )


class Floors(Broken):
    """Rounds down instead of to nearest."""

    def plan(self, view: BlockView) -> BlockPlan:
        def rounding(weight: Tensor, low: Tensor, high: Tensor, grid: Grid) -> QuantizedWeight:
            half = grid.split(weight) - ((high - low) / grid.qmax).unsqueeze(-1) / 2
            return uniform.round_to_nearest(half.reshape(weight.shape), low, high, grid)

        return BlockPlan(rounding=rounding)


class Undocumented(Broken):
    strength: float = 1.0


class Thawed(Broken):
    """Its options can change while a run uses them."""

    model_config = ConfigDict(frozen=False)
    strength: float = Field(1.0, description="Of nothing.")


class Lenient(Broken):
    """Accepts any group size."""

    def check(self, scheme: Scheme, spec: BlockSpec) -> None:
        pass


class Crashes(Broken):
    def plan(self, view: BlockView) -> BlockPlan:
        raise ZeroDivisionError("a bug of the plugin")
