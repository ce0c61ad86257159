"""Uniform integer quantization: range → scale and zero point → codes → values.

Formulas: OmniQuant (Shao et al. 2023, arXiv 2308.13137) §3.1 and AffineQuant (Ma et al. 2024,
arXiv 2403.12544) §3; reference OpenGVLab/OmniQuant@95fae1b and bytedance/AffineQuant@0f3ba93, quantize/quantizer.py.
We differ: ranges contain zero unless `zero_in_range=False`; the clamp of the scale to [1e-5, 1e4] is kept in the
asymmetric case (theirs is overwritten, so a zero range gives NaN); a stored scale is float16, because that is what
packed formats hold, and codes are computed with the stored one.

These functions are the definition. `fake.py` holds the differentiable, closed-form version of the same composition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.quant.grid import Grid

SCALE_MIN, SCALE_MAX = 1e-5, 1e4
ZERO_POINT_LIMIT = 1e4  # the authors' CLIPMAX for −low/scale
STORED_SCALE = torch.float16


def extremes(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of every group.

    Args:
        x: [..., n].
        grid: Group size and whether the range must contain zero.

    Returns:
        (low, high), each [..., groups].
    """
    grouped = grid.split(x)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if grid.zero_in_range:
        low, high = low.clamp(max=0), high.clamp(min=0)
    return low, high


def qparams(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges, x ≈ scale · (q − zero_point).

    Args:
        low: Lower ends, [..., groups].
        high: Upper ends, [..., groups].
        grid: Bits and symmetry.

    Returns:
        (scale, zero_point), float tensors of the same shape; zero_point holds integers.
    """
    return qparams_of(free_scale(low, high, grid), low, grid)


def free_scale(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """Scale of ranges before it is clamped."""
    if grid.symmetric:
        return torch.maximum(low.abs(), high.abs()) / (grid.mid - 1)
    return (high - low) / grid.qmax


def qparams_of(free: Tensor, low: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point from `free_scale` and the lower ends."""
    scale = free.clamp(SCALE_MIN, SCALE_MAX)
    return scale, torch.full_like(scale, grid.mid) if grid.symmetric else zero_point(low, scale)


def zero_point(low: Tensor, scale: Tensor) -> Tensor:
    """Integer (as float) that stands for the value 0 when `low` stands for code 0."""
    return (-low / scale).clamp(-ZERO_POINT_LIMIT, ZERO_POINT_LIMIT).round()


def quantize(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Codes of x in 0 … qmax, uint8, in the shape of x.

    Args:
        x: [..., n].
        scale: [..., groups], float.
        zero: [..., groups], integers in any dtype.
        grid: Bits and group size.
    """
    codes = (grid.split(x) / scale.unsqueeze(-1)).round() + zero.to(x.dtype).unsqueeze(-1)
    return codes.clamp(0, grid.qmax).reshape(x.shape).to(torch.uint8)


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of codes: scale · (code − zero_point), in the shape of codes."""
    grouped = grid.split(codes).to(dtype) - zero.to(dtype).unsqueeze(-1)
    return (grouped * scale.to(dtype).unsqueeze(-1)).reshape(codes.shape)


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Quantize and dequantize over the tensor's own ranges (no gradient intended; see `fake.py`)."""
    scale, zero = qparams(*extremes(x, grid), grid)
    return dequantize(quantize(x, scale, zero, grid), scale, zero, grid, x.dtype)


@dataclass(frozen=True)
class QuantizedWeight:
    """The truth about one quantized linear: integers, their scales and zero points.

    Attributes:
        codes: uint8 [out, in], 0 … qmax.
        scale: float16 [out, groups].
        zero_point: int16 [out, groups]; equal to 2^(bits−1) everywhere on a symmetric grid.
        grid: What the three mean.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fake-quantized weight [out, in], derived from the integers."""
        return dequantize(self.codes, self.scale, self.zero_point, self.grid, dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        return QuantizedWeight(
            self.codes.to(device), self.scale.to(device), self.zero_point.to(device), self.grid
        )

    @property
    def stored_bits(self) -> int:
        """Codes as packed, scales at 16, zero points like codes (16 where one leaves the grid; 0 if symmetric)."""
        bits = self.grid.stored_bits(self.codes.numel()) + self.scale.numel() * 16
        if self.grid.symmetric:
            return bits
        inside = bool(((self.zero_point >= 0) & (self.zero_point <= self.grid.qmax)).all())
        zeros = self.zero_point.numel()
        return bits + (self.grid.stored_bits(zeros) if inside else 16 * zeros)


def stored_qparams(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point as they are stored (float16, int16); the zero point belongs to the rounded scale."""
    scale, zero = qparams(low.float(), high.float(), grid)
    scale = scale.to(STORED_SCALE)
    if not grid.symmetric:
        zero = zero_point(low.float(), scale.float())
        if grid.zero_in_range:  # a scale rounded down may push the zero point one past the grid
            zero = zero.clamp(0, grid.qmax)
    return scale, zero.to(torch.int16)


def round_to_nearest(weight: Tensor, low: Tensor, high: Tensor, grid: Grid) -> QuantizedWeight:
    """Quantize a weight over given ranges, every element to its nearest code.

    Args:
        weight: [out, in], any float dtype; computed in float32.
        low: Lower ends [out, groups].
        high: Upper ends [out, groups].
        grid: Bits, symmetry and group size.
    """
    scale, zero = stored_qparams(low, high, grid)
    codes = quantize(weight.float(), scale.float(), zero, grid)
    return QuantizedWeight(codes, scale, zero, grid)
