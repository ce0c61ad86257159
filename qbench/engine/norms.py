"""RMSNorm in a training step: as few operations as the device allows, for norms that compute nothing else.

A norm written out in a model's code is a dozen recorded operations each way. A GPU has them fused in torch; on a CPU
torch composes them as well, and here they are a closed form. Which norms these may stand for is found by trying.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


@torch.no_grad()
def rms_epsilon(norm: nn.Module) -> float | None:
    """Epsilon of a norm that computes what `functional.rms_norm` does, found by trying both; None for any other."""
    epsilon, weight = getattr(norm, "variance_epsilon", None), getattr(norm, "weight", None)
    if epsilon is None or weight is None:
        return None
    row = torch.linspace(
        -1, 3, weight.numel(), dtype=torch.float32, device=weight.device
    )  # its mean is not 0
    x = torch.stack((row, row * epsilon**0.5))  # and the second feels epsilon
    same = torch.allclose(
        norm(x).float(), functional.rms_norm(x, x.shape[-1:], weight.float(), epsilon), rtol=1e-5, atol=1e-6
    )
    return epsilon if same else None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x/√(mean x² + ε) · w over the last dimension, differentiable once in x and w."""
    if x.is_cuda:
        return functional.rms_norm(x, x.shape[-1:], weight, epsilon)
    out: Tensor = _RmsNorm.apply(x, weight, epsilon)
    return out


class _RmsNorm(torch.autograd.Function):
    """With n = x·r and r = 1/√(mean x² + ε): ∂L/∂w = Σ g·n, ∂L/∂x = r·(g·w − n·mean(g·w·n))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normalized = x * inverse
        ctx.save_for_backward(normalized, inverse, weight)
        return normalized * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        normalized, inverse, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalized).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            weighted = grad * weight
            along = (weighted * normalized).mean(-1, keepdim=True)
            grad_x = weighted.addcmul_(normalized, along, value=-1).mul_(inverse)
        return grad_x, grad_weight, None
