"""Learned rounding: an offset before each weight is rounded, and factors on both ends of each range.

SignRound / AutoRound (Cheng et al. 2023, arXiv 2309.05516) §3; reference intel/auto-round@b9f3d00. With M, m the ends
of a group's range, α, β in [0, 1] and V the offsets:

    s = (α·M − β·m) / qmax      z = round(−β·m / s)      q = clamp(round(w/s + V) + z, 0, qmax)      ŵ = s·(q − z)

straight-through at both roundings. V = 0 and α = β = 1 is rounding to nearest. What is trained is what is stored: the
scale takes its float16 value within the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qbench.quant.fake import round_ste
from qbench.quant.grid import Grid
from qbench.quant.uniform import SCALE_MAX, SCALE_MIN, STORED_SCALE, ZERO_POINT_LIMIT, QuantizedWeight


class Offsets(nn.Module):
    """Offsets and range factors of every linear of one block.

    Attributes:
        offset: V by linear role, [out, in], starting at 0.
        upper: α by linear role, [out, groups], starting at 1.
        lower: β likewise.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], ranges: Mapping[str, tuple[Tensor, Tensor]], grid: Grid
    ):
        """Keep weights [out, in] and their ranges (low, high), each [out, groups]; float32."""
        super().__init__()
        self.weights, self.ranges, self.grid = weights, ranges, grid

        def parameters(values: Mapping[str, Tensor]) -> nn.ParameterDict:
            return nn.ParameterDict({role: nn.Parameter(value) for role, value in values.items()})

        self.offset = parameters({role: torch.zeros_like(weight) for role, weight in weights.items()})
        self.upper, self.lower = (
            parameters({role: torch.ones_like(low) for role, (low, _) in ranges.items()}) for _ in range(2)
        )

    @torch.no_grad()
    def clamp_factors_(self) -> None:
        """Keep α and β in [0, 1], in place."""
        for factor in (*self.upper.values(), *self.lower.values()):
            factor.clamp_(0, 1)

    @torch.no_grad()
    def reset_(self) -> None:
        """Go back to rounding to nearest."""
        for role in self.weights:
            self.offset[role].zero_()
            self.upper[role].fill_(1)
            self.lower[role].fill_(1)

    def _parts(self, role: str) -> tuple[Tensor, Tensor, Tensor]:
        """Codes less zero points [out, groups, size], scales and zero points [out, groups, 1]; differentiable."""
        grid = self.grid
        low, high = self.ranges[role]
        bottom, top = low * self.lower[role], high * self.upper[role]
        if grid.symmetric:
            scale = torch.maximum(top.abs(), bottom.abs()) / (grid.mid - 1)
        else:
            scale = (top - bottom) / grid.qmax
        scale = scale.clamp(SCALE_MIN, SCALE_MAX)
        scale = scale + (scale.to(STORED_SCALE).to(scale.dtype) - scale).detach()
        if grid.symmetric:
            zero = torch.full_like(scale, grid.mid)
        else:
            zero = round_ste((-bottom / scale).clamp(-ZERO_POINT_LIMIT, ZERO_POINT_LIMIT))
            if grid.zero_in_range:  # a scale rounded down may push the zero point one past the grid
                zero = zero.clamp(0, grid.qmax)
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        shifted = grid.split(self.weights[role]) / scale + grid.split(self.offset[role])
        return (round_ste(shifted) + zero).clamp(0, grid.qmax) - zero, scale, zero

    def fake_quantize(self, role: str, dtype: torch.dtype | None = None) -> Tensor:
        """The quantized weight [out, in] as the parameters now make it, differentiable in them."""
        levels, scale, _ = self._parts(role)
        weight = self.weights[role]
        return (levels * scale).reshape(weight.shape).to(dtype or weight.dtype)

    @torch.no_grad()
    def quantize(self, role: str) -> QuantizedWeight:
        """The integers behind `fake_quantize`."""
        levels, scale, zero = self._parts(role)
        codes = (levels + zero).round().reshape(self.weights[role].shape).to(torch.uint8)
        stored = scale.squeeze(-1).to(STORED_SCALE), zero.squeeze(-1).round().to(torch.int16)
        return QuantizedWeight(codes, *stored, self.grid)
