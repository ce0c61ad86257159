"""Fake quantization on a GPU: one fused kernel each way.

The same closed form as `fake.py`, which stays the definition and the CPU path. A program holds whole groups in
registers, so x is read once forward and once backward: with a bfloat16 result and gradient that is 6 + 10 bytes per
element, the floor of this operation. Division is IEEE, rounding is to even: the codes are those of the CPU path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.quant.grid import Grid
from qbench.quant.uniform import SCALE_MAX, SCALE_MIN, ZERO_POINT_LIMIT

ELEMENTS_PER_PROGRAM = 4096
MAX_GROUP = 32768  # registers of one program
_SCALE_MIN, _SCALE_MAX = tl.constexpr(SCALE_MIN), tl.constexpr(SCALE_MAX)
_ZERO_LIMIT = tl.constexpr(ZERO_POINT_LIMIT)
_ROUND = tl.constexpr(
    12582912.0
)  # 1.5·2²³: adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit
def _round(x):
    return (x + _ROUND) - _ROUND


@triton.jit
def _ranges(
    x,
    inside,
    low,
    high,
    upper,
    lower,
    QMAX: tl.constexpr,
    MID: tl.constexpr,
    SYM: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Clipped ends, scale and zero point of each row; low and high are the row's true extremes."""
    bottom, top = low, high
    if ZERO:
        bottom, top = tl.minimum(bottom, 0.0), tl.maximum(top, 0.0)
    bottom, top = bottom * lower, top * upper
    if SYM:
        raw = tl.div_rn(tl.maximum(tl.abs(bottom), tl.abs(top)), MID - 1.0)
    else:
        raw = tl.div_rn(top - bottom, QMAX * 1.0)
    scale = tl.minimum(tl.maximum(raw, _SCALE_MIN), _SCALE_MAX)
    if SYM:
        zero = tl.zeros_like(scale) + MID
    else:
        zero = _round(tl.minimum(tl.maximum(tl.div_rn(-bottom, scale), -_ZERO_LIMIT), _ZERO_LIMIT))
    return bottom, top, scale, zero


@triton.jit
def _forward(
    x_ptr, upper_ptr, lower_ptr, y_ptr, n_rows, width,
    QMAX: tl.constexpr, MID: tl.constexpr, SYM: tl.constexpr, ZERO: tl.constexpr, CLIP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < n_rows) & (column[None, :] < width)
    at = row[:, None].to(tl.int64) * width + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    high = tl.max(tl.where(inside, x, -float("inf")), 1)
    upper = tl.zeros_like(high) + 1.0
    lower = upper
    if CLIP:
        upper = tl.sigmoid(tl.load(upper_ptr + row, mask=row < n_rows, other=0.0))
        lower = tl.sigmoid(tl.load(lower_ptr + row, mask=row < n_rows, other=0.0))
    _, _, scale, zero = _ranges(x, inside, low, high, upper, lower, QMAX, MID, SYM, ZERO)
    scale, zero = scale[:, None], zero[:, None]
    code = tl.minimum(tl.maximum(_round(tl.div_rn(x, scale)) + zero, 0.0), QMAX * 1.0)
    tl.store(y_ptr + at, ((code - zero) * scale).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x_ptr, grad_ptr, upper_ptr, lower_ptr, grad_x_ptr, grad_upper_ptr, grad_lower_ptr, n_rows, width,
    QMAX: tl.constexpr, MID: tl.constexpr, SYM: tl.constexpr, ZERO: tl.constexpr, CLIP: tl.constexpr,
    WANT_X: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < n_rows) & (column[None, :] < width)
    at = row[:, None].to(tl.int64) * width + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    high = tl.max(tl.where(inside, x, -float("inf")), 1)
    upper = tl.zeros_like(high) + 1.0
    lower = upper
    if CLIP:
        upper = tl.sigmoid(tl.load(upper_ptr + row, mask=row < n_rows, other=0.0))
        lower = tl.sigmoid(tl.load(lower_ptr + row, mask=row < n_rows, other=0.0))
    bottom, top, scale, zero = _ranges(x, inside, low, high, upper, lower, QMAX, MID, SYM, ZERO)

    t = tl.div_rn(x, scale[:, None])
    free = _round(t) + zero[:, None]
    code = tl.minimum(tl.maximum(free, 0.0), QMAX * 1.0)
    on_grid = tl.where(free == code, 1.0, 0.0)
    grad_scale = tl.sum(g * (code - zero[:, None] - on_grid * t), 1)
    grad_scale = tl.where((scale > _SCALE_MIN) & (scale < _SCALE_MAX), grad_scale, 0.0)
    if SYM:
        grad_scale = grad_scale / (MID - 1.0)
        size_top, size_bottom = tl.abs(top), tl.abs(bottom)
        share = tl.where(size_top == size_bottom, 0.5, tl.where(size_top > size_bottom, 1.0, 0.0))
        grad_top = grad_scale * share * tl.where(top > 0, 1.0, tl.where(top < 0, -1.0, 0.0))
        grad_bottom = grad_scale * (1.0 - share) * tl.where(bottom > 0, 1.0, tl.where(bottom < 0, -1.0, 0.0))
    else:
        grad_top = grad_scale / QMAX
        grad_bottom = -grad_top
    if CLIP:
        tl.store(grad_upper_ptr + row, grad_top * top * (1.0 - upper), mask=row < n_rows)
        tl.store(grad_lower_ptr + row, grad_bottom * bottom * (1.0 - lower), mask=row < n_rows)
        grad_top, grad_bottom = grad_top * upper, grad_bottom * lower
    if WANT_X:
        if ZERO:
            grad_top, grad_bottom = tl.where(high >= 0, grad_top, 0.0), tl.where(low <= 0, grad_bottom, 0.0)
        at_high = tl.where(inside & (x == high[:, None]), 1.0, 0.0)
        at_low = tl.where(inside & (x == low[:, None]), 1.0, 0.0)
        grad_x = g * on_grid + at_high * (grad_top / tl.sum(at_high, 1))[:, None]
        grad_x += at_low * (grad_bottom / tl.sum(at_low, 1))[:, None]
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


def _launch(width: int) -> tuple[int, int, int]:
    """(rows per program, padded width, warps)."""
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS_PER_PROGRAM // block)
    return rows, block, 4 if rows * block <= ELEMENTS_PER_PROGRAM else 8 if block <= 8192 else 16


def _constants(grid: Grid) -> dict[str, object]:
    return {"QMAX": grid.qmax, "MID": grid.mid, "SYM": grid.symmetric, "ZERO": grid.zero_in_range}


def forward(
    x: Tensor, upper: Tensor | None, lower: Tensor | None, grid: Grid, out_dtype: torch.dtype
) -> Tensor:
    """Fake-quantized values of a contiguous x, in `out_dtype`."""
    width = grid.group_size or x.shape[-1]
    n_rows = x.numel() // width
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rows, block, warps = _launch(width)
    _forward[(triton.cdiv(n_rows, rows),)](
        x, upper, lower, y, n_rows, width,
        **_constants(grid), CLIP=upper is not None, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y


def backward(
    x: Tensor, grad: Tensor, upper: Tensor | None, lower: Tensor | None, grid: Grid, want_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, upper, lower); x and grad contiguous."""
    width = grid.group_size or x.shape[-1]
    n_rows = x.numel() // width
    grad_x = torch.empty_like(x) if want_x else None
    grad_upper = torch.empty_like(upper) if upper is not None else None
    grad_lower = torch.empty_like(lower) if lower is not None else None
    rows, block, warps = _launch(width)
    _backward[(triton.cdiv(n_rows, rows),)](
        x, grad, upper, lower, grad_x, grad_upper, grad_lower, n_rows, width,
        **_constants(grid), CLIP=upper is not None, WANT_X=want_x, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return grad_x, grad_upper, grad_lower
