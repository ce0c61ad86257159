"""Reconstruction losses over a block's output."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from qbench.engine.plan import LossInputs


def mse(inputs: LossInputs) -> Tensor:
    """Mean squared error to the full-precision path."""
    return functional.mse_loss(inputs.output.float(), inputs.target)


def mse_with_auxiliary(inputs: LossInputs) -> Tensor:
    """The same plus the error to the full-precision block on the quantized path's input (`aug_loss` of both codes)."""
    assert inputs.same_input_target is not None
    return mse(inputs) + functional.mse_loss(inputs.output.float(), inputs.same_input_target)
