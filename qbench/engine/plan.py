"""The plan: what a method asks the engine to do with one block. The engine never learns which method asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from qbench.engine.activations import ActivationStats
from qbench.engine.probe import Probe
from qbench.models.base import BlockSpec
from qbench.quant import uniform
from qbench.quant.clipping import Clipping
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme
from qbench.transforms.tensors import BlockTensors
from qbench.transforms.transform import Transform, fold


@dataclass(frozen=True)
class BlockView:
    """What a method sees of a block when it plans.

    Attributes:
        index: Position of the block, from 0.
        n_blocks: Blocks of the model.
        spec: Shapes and sites.
        scheme: The numbers asked for.
        grid: Grid of the weights.
        tensors: float32 tensors of the block, on the compute device; not to be changed.
        stats: Input statistics by linear role, on the full-precision path; empty unless the method needs them.
        probe: Runs parts of the block on the full-precision path, for searches.
    """

    index: int
    n_blocks: int
    spec: BlockSpec
    scheme: Scheme
    grid: Grid
    tensors: BlockTensors
    stats: Mapping[str, ActivationStats]
    probe: Probe | None = None

    def after(self, transforms: Sequence[Transform], stats: bool) -> BlockView:
        """The view of the transformed block, for what is planned behind these transforms.

        Args:
            transforms: Folded into the tensors, in order.
            stats: Whether to gather the input statistics again.
        """
        assert self.probe is not None
        tensors = fold(self.tensors, transforms)
        probe = self.probe.of(tensors)
        return replace(self, tensors=tensors, probe=probe, stats=probe.observe() if stats else {})


class Rounding(Protocol):
    """A rounding rule: how a weight becomes codes once its ranges are fixed."""

    def __call__(self, weight: Tensor, low: Tensor, high: Tensor, grid: Grid) -> QuantizedWeight:
        """Weight [out, in] and ranges [out, groups] → integers."""


@dataclass(frozen=True)
class LearnedRounding:
    """A rounding rule that is learned on the folded block (`engine/signed.py`): offsets, and factors on the ranges.

    Attributes:
        iterations: Optimizer steps.
        lr: First learning rate of the offsets; it decays linearly to 0.
        clipping_lr: That of the factors on both ends of each range; 0 leaves the ranges as they are.
        batch_size: Windows drawn for each step.
    """

    iterations: int
    lr: float
    clipping_lr: float
    batch_size: int


@dataclass(frozen=True)
class Rounded:
    """A rounded weight and what is to be told of it.

    Attributes:
        weight: The integers.
        notes: For the row; the engine says which linear of which block.
        extras: Figures for the block's record, by name.
    """

    weight: QuantizedWeight
    notes: Sequence[str] = ()
    extras: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CalibratedRounding:
    """A rounding rule that looks at the input of each linear: its second moment E[xᵀx] on the quantized path.

    The engine runs the folded block, operands quantized as the scheme says, on what the lane's earlier blocks really
    give, and calls the rule for each linear.

    Attributes:
        rule: (weight [out, in], second moment [in, in], ranges, grid) → `Rounded`. The ranges are (low, high), each
            [out, groups], where the plan has clipping; None leaves them to the rule.
        sequential: Gather a linear's moments behind the already rounded linears before it; otherwise behind
            unrounded ones.
    """

    rule: Callable[[Tensor, Tensor, tuple[Tensor, Tensor] | None, Grid], Rounded]
    sequential: bool = False


@dataclass(frozen=True)
class LossInputs:
    """Tensors a reconstruction loss may use, [batch, tokens, hidden] but for the maps.

    Attributes:
        output: The quantized block on the quantized path.
        target: The full-precision block on the full-precision path.
        same_input_target: The full-precision block on the quantized path's input; None unless asked for.
        attention: Attention map of the quantized block on the quantized path, mean over heads, [batch, queries,
            keys]; None unless asked for.
        attention_target: That of the full-precision block on the full-precision path.
    """

    output: Tensor
    target: Tensor
    same_input_target: Tensor | None
    attention: Tensor | None = None
    attention_target: Tensor | None = None


@dataclass(frozen=True)
class Training:
    """How the parameters of a plan are learned: AdamW, weight decay 0, constant rates.

    Attributes:
        epochs: Passes over the calibration windows.
        transform_lr: Learning rate of maps and shifts, but for transforms with a rate of their own.
        clipping_lr: Learning rate of clipping logits.
        loss: Scalar loss of `LossInputs`.
        same_input_target: Whether the loss needs that target.
        attention_maps: Whether the loss needs attention maps.
    """

    epochs: int
    transform_lr: float
    clipping_lr: float
    loss: Callable[[LossInputs], Tensor]
    same_input_target: bool = False
    attention_maps: bool = False


@dataclass
class BlockPlan:
    """Transforms in order, then clipping, then exactly one rounding rule; learned if `training` is given.

    `grid` replaces the scheme's weight grid where a method asks for another one of the same bits (bit balance).
    """

    transforms: list[Transform] = field(default_factory=list)
    clipping: Clipping | None = None
    rounding: Rounding | CalibratedRounding | LearnedRounding = uniform.round_to_nearest
    training: Training | None = None
    notes: list[str] = field(default_factory=list)
    grid: Grid | None = None


@dataclass(frozen=True)
class Needs:
    """What a method needs gathered before it can plan."""

    activation_stats: bool = False
