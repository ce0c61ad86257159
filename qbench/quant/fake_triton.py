"""Fake quantization on a GPU: one fused kernel each way.

The same closed form as `fake.py`, which stays the definition and the CPU path. A program holds whole groups in
registers, so x is read once forward and once backward (wide groups twice, the second time out of the cache). Diagonal
factors of a weight's rows and columns are multiplied in on the way, and their gradients are sums that never leave the
chip but for one partial row per program: with a bfloat16 result and gradient that is 6 bytes per weight each way, and
4 more where x itself needs a gradient. Division is IEEE, rounding is to even: the codes are those of the CPU path.
Sums have a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.quant.grid import Grid
from qbench.quant.uniform import SCALE_MAX, SCALE_MIN, ZERO_POINT_LIMIT

ELEMENTS_PER_TILE = 4096
CHUNK = 2048  # of a group wider than a tile
TILES_PER_PROGRAM = 16  # of the backward pass where it sums over rows: fewer partial rows to write and add
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
def _factors(pointer, index, count, GIVEN: tl.constexpr):
    """Factors of some rows or columns, or ones that nobody multiplies by."""
    if GIVEN:
        return tl.load(pointer + index, mask=index < count, other=0.0).to(tl.float32)
    else:
        return tl.full(index.shape, 1.0, tl.float32)


@triton.jit
def _factor(x, row_factor, column_factor, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr):
    """x times the factors of its rows and columns."""
    if SCALE_ROWS:
        x = x * row_factor[:, None]
    if SCALE_COLUMNS:
        x = x * column_factor[None, :]
    return x


@triton.jit
def _clip(upper_ptr, lower_ptr, at_group, valid, like, CLIP: tl.constexpr):
    """Shares of the range's ends that are kept."""
    upper = tl.zeros_like(like) + 1.0
    lower = upper
    if CLIP:
        upper = tl.sigmoid(tl.load(upper_ptr + at_group, mask=valid, other=0.0))
        lower = tl.sigmoid(tl.load(lower_ptr + at_group, mask=valid, other=0.0))
    return upper, lower


@triton.jit
def _ranges(
    low, high, upper, lower, QMAX: tl.constexpr, MID: tl.constexpr, SYM: tl.constexpr, ZERO: tl.constexpr
):  # fmt: skip
    """Clipped ends, scale and zero point of each group; low and high are its true extremes."""
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
def _levels(x, scale, zero, QMAX: tl.constexpr):
    """(x/scale, q − z, 1 where the clamp leaves x alone) for groups in rows."""
    t = tl.div_rn(x, scale[:, None])
    free = _round(t) + zero[:, None]
    code = tl.minimum(tl.maximum(free, 0.0), QMAX * 1.0)
    return t, code - zero[:, None], tl.where(free == code, 1.0, 0.0)


@triton.jit
def _grad_extremes(
    grad_scale, scale, low, high, bottom, top, upper, lower, grad_upper_ptr, grad_lower_ptr, at_group, valid,
    QMAX: tl.constexpr, MID: tl.constexpr, SYM: tl.constexpr, ZERO: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """Gradients of each group's lowest and highest value from that of its scale; stores those of the logits."""
    grad_scale = tl.where((scale > _SCALE_MIN) & (scale < _SCALE_MAX), grad_scale, 0.0)
    if SYM:
        grad_scale = grad_scale / (MID - 1.0)
        size_top, size_bottom = tl.abs(top), tl.abs(bottom)
        share = tl.where(size_top == size_bottom, 0.5, tl.where(size_top > size_bottom, 1.0, 0.0))
        grad_top = grad_scale * share * tl.where(top > 0, 1.0, tl.where(top < 0, -1.0, 0.0))
        sign_bottom = tl.where(bottom > 0, 1.0, tl.where(bottom < 0, -1.0, 0.0))
        grad_bottom = grad_scale * (1.0 - share) * sign_bottom
    else:
        grad_top = grad_scale / QMAX
        grad_bottom = -grad_top
    if CLIP:
        tl.store(grad_upper_ptr + at_group, grad_top * top * (1.0 - upper), mask=valid)
        tl.store(grad_lower_ptr + at_group, grad_bottom * bottom * (1.0 - lower), mask=valid)
        grad_top, grad_bottom = grad_top * upper, grad_bottom * lower
    if ZERO:
        grad_top, grad_bottom = tl.where(high >= 0, grad_top, 0.0), tl.where(low <= 0, grad_bottom, 0.0)
    return grad_bottom, grad_top


@triton.jit
def _forward(
    x_ptr, row_ptr, column_ptr, upper_ptr, lower_ptr, y_ptr, low_ptr, high_ptr, n_rows, width, n_groups,
    QMAX: tl.constexpr, MID: tl.constexpr, SYM: tl.constexpr, ZERO: tl.constexpr, CLIP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of ROWS rows, held whole."""
    group = tl.program_id(1)
    columns = n_groups * width
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < n_rows
    within = tl.arange(0, BLOCK)
    inside = valid[:, None] & (within[None, :] < width)
    at = row[:, None].to(tl.int64) * columns + group * width + within[None, :]
    r = _factors(row_ptr, row, n_rows, SCALE_ROWS)
    c = _factors(column_ptr, group * width + within, columns, SCALE_COLUMNS)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = _factor(x, r, c, SCALE_ROWS, SCALE_COLUMNS)
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    high = tl.max(tl.where(inside, x, -float("inf")), 1)
    at_group = row * n_groups + group
    upper, lower = _clip(upper_ptr, lower_ptr, at_group, valid, low, CLIP)
    _, _, scale, zero = _ranges(low, high, upper, lower, QMAX, MID, SYM, ZERO)
    _, level, _ = _levels(x, scale, zero, QMAX)
    tl.store(y_ptr + at, (level * scale[:, None]).to(y_ptr.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(low_ptr + at_group, low, mask=valid)
        tl.store(high_ptr + at_group, high, mask=valid)


@triton.jit
def _forward_wide(
    x_ptr, row_ptr, column_ptr, upper_ptr, lower_ptr, y_ptr, low_ptr, high_ptr, n_rows, width,
    QMAX: tl.constexpr, MID: tl.constexpr, SYM: tl.constexpr, ZERO: tl.constexpr, CLIP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, KEEP: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One row that is one group, too wide to be held: gone over twice, the second time out of the cache."""
    row = tl.program_id(0) + tl.arange(0, 1)
    valid = row < n_rows
    start = row[:, None].to(tl.int64) * width
    r = _factors(row_ptr, row, n_rows, SCALE_ROWS)
    lowest = tl.full([1, BLOCK], float("inf"), tl.float32)
    highest = tl.full([1, BLOCK], -float("inf"), tl.float32)
    for chunk in range(CHUNKS):
        within = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = (within < width)[None, :]
        x = tl.load(x_ptr + start + within[None, :], mask=inside, other=0.0).to(tl.float32)
        x = _factor(x, r, _factors(column_ptr, within, width, SCALE_COLUMNS), SCALE_ROWS, SCALE_COLUMNS)
        lowest = tl.minimum(lowest, tl.where(inside, x, float("inf")))
        highest = tl.maximum(highest, tl.where(inside, x, -float("inf")))
    low, high = tl.min(lowest, 1), tl.max(highest, 1)
    upper, lower = _clip(upper_ptr, lower_ptr, row, valid, low, CLIP)
    _, _, scale, zero = _ranges(low, high, upper, lower, QMAX, MID, SYM, ZERO)
    for chunk in range(CHUNKS):
        within = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = (within < width)[None, :]
        x = tl.load(x_ptr + start + within[None, :], mask=inside, other=0.0).to(tl.float32)
        x = _factor(x, r, _factors(column_ptr, within, width, SCALE_COLUMNS), SCALE_ROWS, SCALE_COLUMNS)
        _t, level, _inside = _levels(x, scale, zero, QMAX)
        y = (level * scale[:, None]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + start + within[None, :], y, mask=inside)
    if KEEP:
        tl.store(low_ptr + row, low)
        tl.store(high_ptr + row, high)


@triton.jit
def _backward(
    x_ptr, row_ptr, column_ptr, grad_ptr, low_ptr, high_ptr, upper_ptr, lower_ptr,
    grad_x_ptr, grad_row_ptr, grad_column_ptr, grad_upper_ptr, grad_lower_ptr, n_rows, width, n_groups,
    QMAX: tl.constexpr, MID: tl.constexpr, SYM: tl.constexpr, ZERO: tl.constexpr, CLIP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, WANT_X: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of TILES · ROWS rows, held whole, whose column sums stay in registers."""
    group = tl.program_id(1)
    columns = n_groups * width
    within = tl.arange(0, BLOCK)
    c = _factors(column_ptr, group * width + within, columns, SCALE_COLUMNS)
    column_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        valid = row < n_rows
        inside = valid[:, None] & (within[None, :] < width)
        at = row[:, None].to(tl.int64) * columns + group * width + within[None, :]
        base = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # first: these take the longest
        g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at_group = row * n_groups + group
        low = tl.load(low_ptr + at_group, mask=valid, other=0.0)
        high = tl.load(high_ptr + at_group, mask=valid, other=1.0)
        upper, lower = _clip(upper_ptr, lower_ptr, at_group, valid, low, CLIP)
        bottom, top, scale, zero = _ranges(low, high, upper, lower, QMAX, MID, SYM, ZERO)
        r = _factors(row_ptr, row, n_rows, SCALE_ROWS)
        x = _factor(base, r, c, SCALE_ROWS, SCALE_COLUMNS)
        t, level, on_grid = _levels(x, scale, zero, QMAX)
        grad_scale = tl.sum(g * (level - on_grid * t), 1)
        grad_low, grad_high = _grad_extremes(
            grad_scale, scale, low, high, bottom, top, upper, lower, grad_upper_ptr, grad_lower_ptr, at_group,
            valid, QMAX, MID, SYM, ZERO, CLIP,
        )  # fmt: skip
        if WANT_X or SCALE_ROWS or SCALE_COLUMNS:
            at_high = tl.where(inside & (x == high[:, None]), 1.0, 0.0)
            at_low = tl.where(inside & (x == low[:, None]), 1.0, 0.0)
            grad_x = g * on_grid + at_high * (grad_high / tl.maximum(tl.sum(at_high, 1), 1.0))[:, None]
            grad_x += at_low * (grad_low / tl.maximum(tl.sum(at_low, 1), 1.0))[:, None]  # ties share it
            if SCALE_ROWS:
                row_sum = tl.sum(_factor(grad_x * base, r, c, False, SCALE_COLUMNS), 1)
                tl.store(grad_row_ptr + group * n_rows + row, row_sum, mask=valid)
            if SCALE_COLUMNS:
                column_sum += _factor(grad_x * base, r, c, SCALE_ROWS, False)
            if WANT_X:
                grad_x = _factor(grad_x, r, c, SCALE_ROWS, SCALE_COLUMNS)
                tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if SCALE_COLUMNS:
        partial = tl.program_id(0).to(tl.int64) * columns + group * width + within
        tl.store(grad_column_ptr + partial, tl.sum(column_sum, 0), mask=within < width)


@triton.jit
def _backward_wide(
    x_ptr, row_ptr, grad_ptr, low_ptr, high_ptr, upper_ptr, lower_ptr,
    grad_x_ptr, grad_row_ptr, grad_upper_ptr, grad_lower_ptr, n_rows, width,
    QMAX: tl.constexpr, MID: tl.constexpr, SYM: tl.constexpr, ZERO: tl.constexpr, CLIP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, WANT_X: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One row that is one group, too wide to be held: in chunks, and twice where x or its row has a gradient."""
    row = tl.program_id(0) + tl.arange(0, 1)
    valid = row < n_rows
    start = row[:, None].to(tl.int64) * width
    low, high = tl.load(low_ptr + row), tl.load(high_ptr + row)
    upper, lower = _clip(upper_ptr, lower_ptr, row, valid, low, CLIP)
    bottom, top, scale, zero = _ranges(low, high, upper, lower, QMAX, MID, SYM, ZERO)
    r = _factors(row_ptr, row, n_rows, SCALE_ROWS)
    by_scale = tl.zeros([1, BLOCK], tl.float32)
    n_high = tl.zeros([1, BLOCK], tl.float32)
    n_low = tl.zeros([1, BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        within = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = (within < width)[None, :]
        x = tl.load(x_ptr + start + within[None, :], mask=inside, other=0.0).to(tl.float32)
        x = _factor(x, r, r, SCALE_ROWS, False)
        g = tl.load(grad_ptr + start + within[None, :], mask=inside, other=0.0).to(tl.float32)
        t, level, on_grid = _levels(x, scale, zero, QMAX)
        by_scale += g * (level - on_grid * t)
        if WANT_X or SCALE_ROWS:
            n_high += tl.where(inside & (x == high[:, None]), 1.0, 0.0)
            n_low += tl.where(inside & (x == low[:, None]), 1.0, 0.0)
    grad_low, grad_high = _grad_extremes(
        tl.sum(by_scale, 1), scale, low, high, bottom, top, upper, lower, grad_upper_ptr, grad_lower_ptr, row,
        valid, QMAX, MID, SYM, ZERO, CLIP,
    )  # fmt: skip
    if WANT_X or SCALE_ROWS:
        grad_high = grad_high / tl.maximum(tl.sum(n_high, 1), 1.0)
        grad_low = grad_low / tl.maximum(tl.sum(n_low, 1), 1.0)
        row_sum = tl.zeros([1, BLOCK], tl.float32)
        for chunk in range(CHUNKS):
            within = chunk * BLOCK + tl.arange(0, BLOCK)
            inside = (within < width)[None, :]
            base = tl.load(x_ptr + start + within[None, :], mask=inside, other=0.0).to(tl.float32)
            x = _factor(base, r, r, SCALE_ROWS, False)
            g = tl.load(grad_ptr + start + within[None, :], mask=inside, other=0.0).to(tl.float32)
            t, level, on_grid = _levels(x, scale, zero, QMAX)
            grad_x = g * on_grid + tl.where(inside & (x == high[:, None]), grad_high[:, None], 0.0)
            grad_x += tl.where(inside & (x == low[:, None]), grad_low[:, None], 0.0)
            if SCALE_ROWS:
                row_sum += grad_x * base
            if WANT_X:
                grad_x = _factor(grad_x, r, r, SCALE_ROWS, False).to(grad_x_ptr.dtype.element_ty)
                tl.store(grad_x_ptr + start + within[None, :], grad_x, mask=inside)
        if SCALE_ROWS:
            tl.store(grad_row_ptr + row, tl.sum(row_sum, 1))


class _Launch:
    """How a tensor is cut into programs."""

    def __init__(self, x: Tensor, grid: Grid, whole_groups: bool = False):
        """Wide groups go in chunks, unless `whole_groups` must be held at once (sums over rows)."""
        self.width = grid.group_size or x.shape[-1]
        self.n_groups = x.shape[-1] // self.width
        self.n_rows = x.numel() // x.shape[-1]
        self.block = triton.next_power_of_2(self.width)
        self.wide = self.block > ELEMENTS_PER_TILE and not whole_groups and self.n_groups == 1
        if self.wide:
            self.block = CHUNK
        self.rows = 1 if self.wide else max(1, ELEMENTS_PER_TILE // self.block)
        self.chunks = triton.cdiv(self.width, self.block)
        fits = self.block <= ELEMENTS_PER_TILE and not self.wide
        self.warps = 4 if fits else 8 if self.block <= 8192 else 16
        self.constants = {
            "QMAX": grid.qmax,
            "MID": grid.mid,
            "SYM": grid.symmetric,
            "ZERO": grid.zero_in_range,
        }

    def programs(self, tiles: int = 1) -> tuple[int, int]:
        """Grid of programs that take `tiles` tiles of rows each."""
        return triton.cdiv(self.n_rows, self.rows * tiles), self.n_groups


def forward(
    x: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    upper: Tensor | None,
    lower: Tensor | None,
    grid: Grid,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fake-quantized values of a contiguous x, in `out_dtype`; and, if kept, every group's lowest and highest value."""
    launch = _Launch(x, grid)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    ranges = [
        torch.empty(launch.n_rows, launch.n_groups, device=x.device) if keep else None for _ in range(2)
    ]
    tensors = (x, row_scale, column_scale, upper, lower, y, *ranges)
    flags = {
        "CLIP": upper is not None,
        "SCALE_ROWS": row_scale is not None,
        "SCALE_COLUMNS": column_scale is not None,
    }
    flags |= launch.constants | {"KEEP": keep, "BLOCK": launch.block, "num_warps": launch.warps}
    if launch.wide:
        _forward_wide[launch.programs()](*tensors, launch.n_rows, launch.width, CHUNKS=launch.chunks, **flags)
    else:
        _forward[launch.programs()](
            *tensors, launch.n_rows, launch.width, launch.n_groups, ROWS=launch.rows, **flags
        )
    return y, ranges[0], ranges[1]


def backward(
    x: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    grad: Tensor,
    low: Tensor,
    high: Tensor,
    upper: Tensor | None,
    lower: Tensor | None,
    grid: Grid,
    want_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, row_scale, column_scale, upper, lower); x and grad contiguous."""
    launch = _Launch(x, grid, whole_groups=column_scale is not None)
    tiles = TILES_PER_PROGRAM if column_scale is not None else 1
    programs = launch.programs(tiles)
    grad_x = torch.empty_like(x) if want_x else None
    # one partial sum per group, or per program: each is written by one program, so the sum's order is fixed
    by_row = (
        x.new_empty(launch.n_groups, launch.n_rows, dtype=torch.float32) if row_scale is not None else None
    )
    by_column = (
        x.new_empty(programs[0], x.shape[-1], dtype=torch.float32) if column_scale is not None else None
    )
    grad_upper = torch.empty_like(upper) if upper is not None else None
    grad_lower = torch.empty_like(lower) if lower is not None else None
    ends = (low, high, upper, lower)
    flags = {"CLIP": upper is not None, "SCALE_ROWS": row_scale is not None, "WANT_X": want_x}
    flags |= launch.constants | {"BLOCK": launch.block, "num_warps": launch.warps}
    if launch.wide:
        _backward_wide[programs](
            x, row_scale, grad, *ends, grad_x, by_row, grad_upper, grad_lower, launch.n_rows, launch.width,
            CHUNKS=launch.chunks, **flags,
        )  # fmt: skip
    else:
        _backward[programs](
            x, row_scale, column_scale, grad, *ends, grad_x, by_row, by_column, grad_upper, grad_lower,
            launch.n_rows, launch.width, launch.n_groups,
            SCALE_COLUMNS=column_scale is not None, TILES=tiles, ROWS=launch.rows, **flags,
        )  # fmt: skip
    grad_row = by_row.sum(0) if by_row is not None else None
    grad_column = by_column.sum(0) if by_column is not None else None
    return grad_x, grad_row, grad_column, grad_upper, grad_lower
