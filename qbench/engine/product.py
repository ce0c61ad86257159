"""Products of a block: their type, and oneDNN for those of a training step on a CPU.

`functional.linear` takes the BLAS that torch was built with. In its wheels that is MKL, whose float32 products reach
half of what oneDNN's do on processors that are not Intel's (AMD EPYC of 2024, one core: 95 against 190 GFLOP/s); the
wheels have both. Only where gradients are recorded: a pass without them is the model's own, bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a product with x is computed: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`functional.linear`, faster where a CPU trains in float32."""
    if (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn()
    ):
        out: Tensor = _Linear.apply(x, weight, bias)
        return out
    return functional.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """y = x·Wᵀ + b for x [..., in]; only the gradients that are asked for are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _product(rows, weight.T).view(x.shape) if wants_x else None,
            _product(rows.T, x.reshape(-1, x.shape[-1]).T) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·bᵀ + bias, whatever the strides."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out


@cache
def _has_onednn() -> bool:
    """Whether this build of torch has oneDNN and the operation that TorchInductor calls it by."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
