"""GPTQ: round a weight column by column, each column's error spread over the columns still to come.

Paper: Frantar et al. 2022, arXiv 2210.17323, Algorithm 1; reference IST-DASLab/gptq@2d65066, gptq.py:63-148. We differ
(docs/methods/gptq.md has the reasons): the Hessian is normalised by tokens; the factor of its inverse is taken in
float64, from one Cholesky factorization of the reversed matrix; dead inputs get the mean diagonal instead of 1; a
group's range is read from the weights as updated by *all* earlier columns (`stale_ranges` for theirs); the scale used
while rounding is the float16 one that is stored; damping is raised where the Hessian is not positive definite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qbench.errors import NumericalError
from qbench.quant import uniform
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight

MAX_DAMPING = 1.0
SEARCH_STEPS, SEARCH_UNIT, SEARCH_NORM = 80, 100, 2.4  # the authors' maxshrink · grid, grid and norm


@dataclass(frozen=True)
class ColumnRounding:
    """A rounded weight and how it came about.

    Attributes:
        weight: Integers, scales, zero points.
        loss: Σ e², the squared error of the linear's output under the damped Hessian, summed over output channels.
        damping_fraction: What was added to the diagonal, larger than asked where that did not suffice.
    """

    weight: QuantizedWeight
    loss: float
    damping_fraction: float


@torch.no_grad()
def quantize_columns(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    ranges: tuple[Tensor, Tensor] | None = None,
    *,
    damping_fraction: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    column_chunk: int = 128,
    stale_ranges: bool = False,
    range_search: bool = False,
) -> ColumnRounding:
    """Quantize a weight by Algorithm 1 of the paper.

    Args:
        weight: [out, in]; computed in float32, or float64 where it is that.
        hessian: Second moment of the input, E[xᵀx], [in, in]; a constant factor changes nothing but the loss.
        grid: Bits, symmetry, group size.
        ranges: (low, high), each [out, groups], to keep to, as learned clipping gives them; None: the weight's own.
        damping_fraction: Share of the diagonal's mean added to the diagonal. Paper: 0.01.
        act_order: Take columns by decreasing diagonal instead of from left to right.
        static_groups: Read all groups' ranges before the first column is rounded.
        column_chunk: Columns between two updates of everything to their right. Changes speed, not the result.
        stale_ranges: Read a group's range as the authors' code does: without the updates of its own chunk.
        range_search: Shrink each range to the least Σ|error|^2.4, the authors' `mse` option.

    Returns:
        The rounded weight, its loss, and the damping that was used.

    Raises:
        NumericalError: If the Hessian is not finite, or is indefinite even with a damping of 1.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    n_out, n_in = weight.shape
    size = grid.group_size or n_in
    fixed = ranges is not None or static_groups or size == n_in
    assert fixed or not act_order, "groups of permuted columns cannot be stored: use static groups"

    hessian = hessian.double()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))  # nothing ever arrives here: any order will do
    hessian = hessian + torch.diag(dead * mean)
    columns = (
        weight.to(dtype).T.contiguous().masked_fill(dead[:, None], 0)
    )  # [in, out]: columns are contiguous

    scale = torch.empty(n_in // size, n_out, dtype=uniform.STORED_SCALE, device=weight.device)
    zero = torch.empty_like(scale, dtype=torch.int16)
    wide_scale, wide_zero = (torch.empty_like(scale, dtype=dtype) for _ in range(2))

    def read(group: slice, values: Tensor, part: Grid, given: tuple[Tensor, Tensor] | None = None) -> None:
        """Fix the scales of some groups from the weights [out, in of the groups]."""
        low, high = given if given is not None else uniform.extremes(values, part)
        if range_search and given is None:
            low, high = search_ranges(values, low, high, part)
        stored = uniform.stored_qparams(low, high, part)
        for rows, wide, found in zip((scale, zero), (wide_scale, wide_zero), stored, strict=True):
            rows[group] = found.T
            wide[group] = found.T.to(dtype)

    def read_group(index: int) -> None:
        one = columns[index * size : (index + 1) * size].T
        read(slice(index, index + 1), one, replace(grid, group_size=None))

    if fixed:
        read(slice(None), columns.T, grid, ranges)
    order = torch.arange(n_in, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        columns, hessian = columns[order], hessian[order][:, order]
    group_of = (order // size).tolist()
    upper, damping = _inverse_factor(hessian, mean, damping_fraction)
    upper = upper.to(dtype)
    del hessian

    codes = torch.empty(n_in, n_out, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    chunk = column_chunk if fixed or stale_ranges else _aligned(column_chunk, size)
    for start in range(0, n_in, chunk):
        stop = min(start + chunk, n_in)
        if not fixed and stale_ranges:
            for index in range(-(-start // size), -(-stop // size)):  # the groups that begin in this chunk
                read_group(index)
        block, factor = columns[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            if not fixed and not stale_ranges and (start + i) % size == 0:
                read_group((start + i) // size)
            group = group_of[start + i]
            s, z = wide_scale[group], wide_zero[group]
            code = (block[i] / s).round_().add_(z).clamp_(0, grid.qmax)
            codes[start + i] = code
            errors[i] = (block[i] - (code - z) * s) / factor[i, i]
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        loss += errors.square().sum(dtype=torch.float64)
    total = float(loss)
    if not total < float("inf"):
        raise NumericalError("GPTQ's updates are not finite. Try a larger damping_fraction.")
    in_place = torch.empty_like(codes)
    in_place[order] = codes
    rows = [
        t.T.clone(memory_format=torch.contiguous_format) for t in (in_place, scale, zero)
    ]  # also of one group
    stored = QuantizedWeight(rows[0], rows[1], rows[2], grid)
    return ColumnRounding(stored, total, damping)


def _inverse_factor(hessian: Tensor, mean: Tensor, damping_fraction: float) -> tuple[Tensor, float]:
    """Upper triangular U with (H + λ·mean·I)⁻¹ = UᵀU, and λ, doubled until the factorization succeeds.

    H = RRᵀ with R upper is the Cholesky factorization of H read backwards, and U = R⁻¹: one factorization and one
    triangular inverse, where the authors factorize, invert and factorize again.
    """
    if not bool(hessian.isfinite().all()):
        raise NumericalError(
            "The second moment of a linear's input is not finite. Try --autocast bfloat16 or float32."
        )
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while True:
        lower, failed = torch.linalg.cholesky_ex((hessian + damping_fraction * mean * identity).flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if bool(upper.isfinite().all()):
                return upper, damping_fraction
        if damping_fraction >= MAX_DAMPING:
            raise NumericalError(
                f"The second moment of a linear's input is not positive definite even with damping_fraction "
                f"{MAX_DAMPING:g}. Use more calibration windows, or another method."
            )
        damping_fraction = min(2 * max(damping_fraction, 0.005), MAX_DAMPING)


def _aligned(column_chunk: int, size: int) -> int:
    """The width up to `column_chunk` with which every group lies inside a chunk or begins one."""
    if size <= column_chunk:
        return column_chunk // size * size
    return next(width for width in range(column_chunk, 0, -1) if size % width == 0)


def search_ranges(weight: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Ranges shrunk by the factor 1 − i/100, i < 80, that minimises Σ|error|^2.4 of each group.

    Args:
        weight: [out, in].
        low: Lower ends [out, groups].
        high: Upper ends [out, groups].
        grid: Bits, symmetry, group size.

    Returns:
        (low, high), each [out, groups]; of equal errors the least shrunk.
    """
    best_low, best_high = low.clone(), high.clone()
    best = torch.full_like(low, torch.inf)
    for i in range(SEARCH_STEPS):
        factor = 1 - i / SEARCH_UNIT
        scale, zero = uniform.qparams(low * factor, high * factor, grid)
        rounded = uniform.dequantize(
            uniform.quantize(weight, scale, zero, grid), scale, zero, grid, weight.dtype
        )
        error = grid.split((rounded - weight).abs().pow(SEARCH_NORM)).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, low * factor, best_low)
        best_high = torch.where(better, high * factor, best_high)
    return best_low, best_high


def output_error(weight: Tensor, second_moment: Tensor, rounded: Tensor | None = None) -> float:
    """Mean squared output of a linear over its input's second moment, summed over output channels.

    Args:
        weight: [out, in].
        second_moment: E[xᵀx], [in, in].
        rounded: If given, the output's error with this weight instead.
    """
    change = weight if rounded is None else weight - rounded
    return float(((change @ second_moment.to(change.dtype)) * change).sum(dtype=torch.float64))
