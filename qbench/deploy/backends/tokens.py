"""Quantization of a layer's input per token, as integers: what an int8 product is fed with.

`per_token` is the definition of `quant/uniform.py` (asymmetric, dynamic, the range contains 0), so that a layer
computes what the table's row was measured with. `per_token_symmetric` is what third-party int8 kernels do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.quant import uniform
from qbench.quant.grid import Grid


def per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes centred for an int8 product, x ≈ scale · (code − zero).

    Args:
        x: [tokens, n].
        bits: 2 to 8.

    Returns:
        (codes int8 [tokens, n], scale [tokens, 1], zero [tokens, 1]); scale and zero in float32.
    """
    grid = Grid(bits)
    x = x.float()
    scale, zero = uniform.qparams(*uniform.extremes(x, grid), grid)
    codes = ((x / scale).round_() + zero).clamp_(0, grid.qmax) - grid.mid
    return codes.to(torch.int8), scale, zero - grid.mid


def per_token_symmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of ±(2^(bits−1) − 1), x ≈ scale · code: (int8 [tokens, n], float32 [tokens, 1])."""
    qmax = 2 ** (bits - 1) - 1
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / qmax
    return (x / scale).round_().clamp_(-qmax, qmax).to(torch.int8), scale
