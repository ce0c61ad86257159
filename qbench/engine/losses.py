"""Reconstruction losses over a block's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qbench.engine.plan import LossInputs
from qbench.quant.fake import has_triton

PROBABILITY_FLOOR = (
    1e-10  # of attention maps inside a logarithm: large logits leave exact zeros beside the diagonal
)


def mse(inputs: LossInputs) -> Tensor:
    """Mean squared error to the full-precision path."""
    return _squared_errors(inputs.output, inputs.target)


def mse_with_auxiliary(inputs: LossInputs) -> Tensor:
    """The same plus the error to the full-precision block on the quantized path's input (`aug_loss` of both codes)."""
    assert inputs.same_input_target is not None
    return _squared_errors(inputs.output, inputs.target, inputs.same_input_target)


def _squared_errors(output: Tensor, *targets: Tensor) -> Tensor:
    loss: Tensor = _SquaredErrors.apply(output, *targets)
    return loss


class _SquaredErrors(torch.autograd.Function):
    """Σ over one or two targets of mean (output − target)²: the differences' sum is kept, which is the gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, second: Tensor | None = None) -> Tensor:
        if output.is_cuda and output.dtype != torch.float64 and has_triton():
            from qbench.engine.losses_triton import squared_errors

            total, difference = squared_errors(output, target, second)
        else:
            total, difference = _squared(output.to(target.dtype) - target)
            if second is not None:
                more, other = _squared(output.to(target.dtype) - second)
                total, difference = total + more, difference.add_(other)
        ctx.save_for_backward(difference)
        ctx.dtype = output.dtype
        return total / output.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (grad * (2 / difference.numel()))).to(ctx.dtype), None, None


def _squared(difference: Tensor) -> tuple[Tensor, Tensor]:
    return difference.square().sum(), difference


def distribution_correction(inputs: LossInputs) -> Tensor:
    """ABQ-LLM's double-log loss: both squared errors, and −log of the mean cosine similarity to both targets.

    Reference: bytedance/ABQ-LLM@de2e849. The cosine is over the hidden dimension, its mean over the tokens of a window.
    We differ: the logarithm is taken per window (theirs: per batch, which is the same at their batch size of 1), so
    that micro-batches give the loss of the whole batch.
    """
    assert inputs.same_input_target is not None
    loss = mse_with_auxiliary(inputs)
    for target in (inputs.target, inputs.same_input_target):
        cosine = functional.cosine_similarity(
            inputs.output.to(inputs.target.dtype), target, dim=-1
        )  # [windows, tokens]
        loss = loss - cosine.mean(-1).abs().log().mean()
    return loss


def attention_divergence(inputs: LossInputs) -> Tensor:
    """KL(p ‖ p̂) + KL(p̂ ‖ p) of attention maps (mean over heads), summed over keys, mean over queries."""
    found, wanted = _maps(inputs)
    logs = found.clamp(min=PROBABILITY_FLOOR).log() - wanted.clamp(min=PROBABILITY_FLOOR).log()
    return ((found - wanted) * logs).sum(-1).mean()


def published_attention_divergence(inputs: LossInputs) -> Tensor:
    """The authors' code: both maps go through softmax once more, and the mean is over queries and keys.

    A second softmax of probabilities is nearly uniform, and masked positions count: the term is some orders smaller
    than the divergence of the maps themselves.
    """
    found, wanted = (m.log_softmax(-1) for m in _maps(inputs))
    there, back = (
        functional.kl_div(one, other, reduction="sum", log_target=True) / one.numel()
        for one, other in ((found, wanted), (wanted, found))
    )
    return there.abs() + back.abs()


def _maps(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    assert inputs.attention is not None and inputs.attention_target is not None
    return inputs.attention, inputs.attention_target


def total(*terms: Callable[[LossInputs], Tensor]) -> Callable[[LossInputs], Tensor]:
    """The sum of several losses."""

    def loss(inputs: LossInputs) -> Tensor:
        value = terms[0](inputs)
        for term in terms[1:]:
            value = value + term(inputs)
        return value

    return loss
