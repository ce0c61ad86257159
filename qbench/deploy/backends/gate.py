"""The correctness gate: a layer's output beside the exact product of the same integers, in float64.

Limits. Rounding scales, zero terms and outputs to bfloat16 costs up to 0.4%; to float16, 0.05%. A fault costs more: a
zero point off by one step moves every weight by one step, 3% of their spread at 8 bits and 40% at 4; a wrong group or
order leaves nothing of the product. So 1% overall separates them. A fault in one output channel vanishes in the overall
norm, therefore no channel may be off by more than 5% of the typical one. The input's own quantization is part of the
layer (`KernelLayer.seen`) and no error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.deploy.backends.layer import KernelLayer
from qbench.quant.uniform import QuantizedWeight

LIMIT = 0.01
CHANNEL_LIMIT = 0.05
ROWS = 64  # tokens that are compared: the kernel runs on all of them, the float64 product need not


@dataclass(frozen=True)
class Gate:
    """What the comparison found.

    Attributes:
        error: ‖y − y*‖ / ‖y*‖ over the compared tokens.
        worst_channel: The largest norm of a channel's error over the channels' typical norm.
    """

    error: float
    worst_channel: float

    @property
    def passed(self) -> bool:
        """Whether the kernel may have a time."""
        return self.error <= LIMIT and self.worst_channel <= CHANNEL_LIMIT

    def __str__(self) -> str:
        return (
            f"relative error {self.error:.2g} (limit {LIMIT:g}), worst output channel {self.worst_channel:.2g} "
            f"(limit {CHANNEL_LIMIT:g})"
        )


@torch.no_grad()
def check(layer: KernelLayer, weight: QuantizedWeight, x: Tensor) -> Gate:
    """Run a layer on x [tokens, in] and compare up to `ROWS` of its tokens with the exact product."""
    rows = torch.linspace(0, len(x) - 1, min(ROWS, len(x)), device=x.device).round().long()
    y = layer(x)[rows].double()
    exact = layer.seen(x[rows].to(layer.request.dtype)) @ weight.dequantize(torch.float64).t()
    if layer.bias is not None:
        exact += layer.bias.double()
    return compare(y, exact)


def compare(y: Tensor, exact: Tensor) -> Gate:
    """Errors of y [tokens, out] beside the exact product; infinite where y is not finite or of another shape."""
    if y.shape != exact.shape or not bool(y.isfinite().all()):
        return Gate(math.inf, math.inf)
    difference, size = (y - exact).norm(dim=0), exact.norm(dim=0)
    typical = size.square().mean().sqrt()
    return Gate(float((y - exact).norm() / exact.norm()), float(difference.max() / typical))
