"""Differentiable fake quantization with a closed-form backward.

Straight-through estimation as OmniQuant and AffineQuant use it: round() has gradient 1, the clamp has gradient 0
outside the grid, gradients flow through the scale into the range's ends (and the clipping logits), and none flow
through the zero point's rounding. Written as one autograd function, because the composition of a dozen recorded
elementwise operations is what makes the authors' step slow; `reference()` is that composition, for tests.

With s the scale, z the zero point, t = x/s, r = round(t), q = clamp(r + z, 0, qmax), y = s·(q − z):
    ∂y/∂x = inside          ∂y/∂s = q − z − inside·t        (r − t inside, −z below, qmax − z above)
With factors of rows and columns, x = R·B·C: ∂L/∂r_i = Σ_j g_ij·b_ij·c_j, ∂L/∂c_j = Σ_i g_ij·b_ij·r_i for g = ∂L/∂x.
    asymmetric  s = (σ(u)·max − σ(l)·min)/qmax;  symmetric  s = max(|σ(u)·max|, |σ(l)·min|)/(2^(b−1) − 1)
The extremes receive the scale's gradient; ties share it equally.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.quant import uniform
from qbench.quant.grid import Grid

SMALL = 1 << 18  # elements: 1 MiB of float32, which a core's cache holds


class _ClosedForm(torch.autograd.Function):
    """The CPU path. What backward needs is kept rather than computed again: small blocks are bound by operations.

    For the same reason temporaries are written over, and a range that is widened to zero replaces the true extreme: no
    element equals it (or it is zero), so the search for the elements that take the range's gradient finds none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_scale: Tensor | None,
        column_scale: Tensor | None,
        upper: Tensor | None,
        lower: Tensor | None,
        grid: Grid,
        out_dtype: torch.dtype,
    ) -> Tensor:
        scaled = _times_scales(_wide(x), row_scale, column_scale)
        grouped = grid.split(scaled)
        # two reductions: torch.aminmax is 15 times slower on a CPU
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        if grid.zero_in_range:
            low.clamp_(max=0)
            high.clamp_(min=0)
        bottom, top, su, sl = low, high, None, None
        if upper is not None and lower is not None:
            su, sl = upper.unsqueeze(-1).sigmoid(), lower.unsqueeze(-1).sigmoid()
            bottom, top = low * sl, high * su
        free_scale = uniform.free_scale(bottom, top, grid)
        scale, zero = uniform.qparams_of(free_scale, bottom, grid)
        t = grouped / scale
        rounded = t.round()
        least = -zero
        levels = torch.maximum(rounded, least)  # q − z; a clamp between two tensors is three times slower
        torch.minimum(levels, least.add_(grid.qmax), out=levels)
        if any(ctx.needs_input_grad):
            inside = torch.eq(rounded, levels, out=rounded)
            by_scale = torch.addcmul(levels, inside, t, value=-1, out=t)  # q − z − inside·t
            ctx.save_for_backward(
                x, row_scale, column_scale, scaled, low, high, bottom, top, su, sl, free_scale, scale, inside, by_scale
            )  # fmt: skip
            ctx.grid = grid
        return levels.mul_(scale).view(x.shape).to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, row_scale, column_scale, scaled, low, high, bottom, top, su, sl, free_scale, scale, inside, by_scale
        ) = ctx.saved_tensors  # fmt: skip
        grid: Grid = ctx.grid
        g = grid.split(_wide(grad))
        grad_scale = by_scale.mul_(g).sum(-1, keepdim=True)
        grad_scale.mul_(_equal(free_scale, scale))  # a scale held by its clamp passes nothing on
        if grid.symmetric:
            grad_scale /= grid.mid - 1
            share = torch.where(top.abs() == bottom.abs(), 0.5, (top.abs() > bottom.abs()).to(top.dtype))
            grad_top, grad_bottom = grad_scale * share * top.sign(), grad_scale * (1 - share) * bottom.sign()
        else:
            grad_top = grad_scale.div_(grid.qmax)
            grad_bottom = -grad_top

        grad_upper = grad_lower = None
        if su is not None:  # top = σ(u)·high, so ∂top/∂u = top·(1 − σ(u))
            grad_upper = torch.addcmul(top, top, su, value=-1).mul_(grad_top).squeeze(-1)
            grad_lower = torch.addcmul(bottom, bottom, sl, value=-1).mul_(grad_bottom).squeeze(-1)
            if any(ctx.needs_input_grad[:3]):
                grad_top, grad_bottom = grad_top.mul_(su), grad_bottom.mul_(sl)
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, grad_upper, grad_lower, None, None

        grouped = grid.split(scaled)
        grad_scaled = inside.mul_(g)
        for extreme, incoming in ((high, grad_top), (low, grad_bottom)):
            at = torch.eq(grouped, extreme, out=by_scale)
            share = at.sum(-1, keepdim=True).clamp_(min=1)
            grad_scaled.addcmul_(at, incoming.div_(share))  # ties share it
        grad_scaled = grad_scaled.view(x.shape)

        grad_row = grad_column = grad_x = None
        wants_x = ctx.needs_input_grad[0]
        if row_scale is not None or column_scale is not None:
            product = grad_scaled * _wide(x) if wants_x else grad_scaled.mul_(_wide(x))
            if row_scale is not None:
                grad_row = product @ column_scale if column_scale is not None else product.sum(1)
            if column_scale is not None:
                grad_column = row_scale @ product if row_scale is not None else product.sum(0)
        if wants_x:
            if row_scale is not None:
                grad_scaled.mul_(row_scale.unsqueeze(-1))
            if column_scale is not None:
                grad_scaled.mul_(column_scale)
            grad_x = grad_scaled.to(x.dtype)
        return grad_x, grad_row, grad_column, grad_upper, grad_lower, None, None


class _Fused(torch.autograd.Function):
    """The GPU path: one kernel each way, nothing kept but the inputs and the groups' extremes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_scale: Tensor | None,
        column_scale: Tensor | None,
        upper: Tensor | None,
        lower: Tensor | None,
        grid: Grid,
        out_dtype: torch.dtype,
    ) -> Tensor:
        from qbench.quant import fake_triton

        x = x.contiguous()
        row_scale = None if row_scale is None else row_scale.contiguous()
        column_scale = None if column_scale is None else column_scale.contiguous()
        keep = any(ctx.needs_input_grad)
        y, low, high = fake_triton.forward(x, row_scale, column_scale, upper, lower, grid, out_dtype, keep)
        ctx.save_for_backward(x, row_scale, column_scale, low, high, upper, lower)
        ctx.grid = grid
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from qbench.quant import fake_triton

        x, row_scale, column_scale, low, high, upper, lower = ctx.saved_tensors
        gradients = fake_triton.backward(
            x,
            row_scale,
            column_scale,
            grad.contiguous(),
            low,
            high,
            upper,
            lower,
            ctx.grid,
            ctx.needs_input_grad[0],
        )
        return (*gradients, None, None)


def _path(x: Tensor, grid: Grid) -> type[torch.autograd.Function]:
    """Fused kernels where they apply: on a GPU with Triton, not in float64, and for groups that fit its registers."""
    if not x.is_cuda or x.dtype == torch.float64 or not has_triton():
        return _ClosedForm
    from qbench.quant import fake_triton

    return _Fused if (grid.group_size or x.shape[-1]) <= fake_triton.MAX_GROUP else _ClosedForm


def bound_by_operations(x: Tensor) -> bool:
    """Whether calls cost more than the bytes they touch, so that joining tensors for one call pays: small, on a CPU."""
    return not x.is_cuda and x.numel() <= SMALL


@cache
def has_triton() -> bool:
    """Whether fused kernels can be compiled."""
    return importlib.util.find_spec("triton") is not None


def _times_scales(x: Tensor, row_scale: Tensor | None, column_scale: Tensor | None) -> Tensor:
    """x [rows, columns] times a factor per row and per column."""
    if row_scale is not None:
        x = x * row_scale.unsqueeze(-1)
    return x if column_scale is None else x * column_scale


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """1 where equal, else 0, in the dtype of a: products with a boolean tensor are several times slower on a CPU."""
    return torch.eq(a, b, out=torch.empty_like(a))


def _wide(x: Tensor) -> Tensor:
    """Contiguous, and float32 for half precision: an 8-bit grid does not survive bfloat16 arithmetic."""
    return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).contiguous()


def fake_quantize(
    x: Tensor,
    grid: Grid,
    upper: Tensor | None = None,
    lower: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize, differentiable by straight-through estimation.

    Serves weights (rows are output channels, with or without learned clipping) and activations (rows are
    tokens, never clipped) alike. A weight's diagonal factors are taken here rather than multiplied in before: the
    scaled weight and its gradient then never reach memory.

    Args:
        x: [..., n]; half precision is computed in float32 and returned in its own dtype.
        grid: Bits, symmetry, group size; not called for 16 bits.
        upper: Clipping logits of the upper ends, [..., groups], or None for no clipping.
        lower: Clipping logits of the lower ends.
        out_dtype: Of the result; default that of x. Half precision saves a cast where the next product wants it.
        row_scale: Factor of each row [out] of a weight x [out, in], or None.
        column_scale: Factor of each column [in].

    Returns:
        Values on the grid, in the shape of x.
    """
    return _path(x, grid).apply(x, row_scale, column_scale, upper, lower, grid, out_dtype or x.dtype)


def round_ste(x: Tensor) -> Tensor:
    """Round with gradient 1."""
    return x + (x.round() - x).detach()


def reference(x: Tensor, grid: Grid, upper: Tensor | None = None, lower: Tensor | None = None) -> Tensor:
    """The same function recorded operation by operation: slow, and what `fake_quantize` is tested against."""
    grouped = grid.split(x)
    low, high = uniform.extremes(x, grid)
    if upper is not None and lower is not None:
        high, low = high * upper.sigmoid(), low * lower.sigmoid()
    scale, zero = uniform.qparams(low, high, grid)
    scale, zero = scale.unsqueeze(-1), zero.detach().unsqueeze(-1)
    codes = (round_ste(grouped / scale) + zero).clamp(0, grid.qmax)
    return ((codes - zero) * scale).reshape(x.shape)
