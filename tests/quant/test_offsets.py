"""Learned rounding against rounding to nearest where both must agree, and against difference quotients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qbench.quant.grid import Grid
from qbench.quant.offsets import Offsets
from qbench.quant.uniform import extremes, round_to_nearest

GRIDS = [
    pytest.param(Grid(bits, symmetric, group, zero), id=f"{bits}bit-{sym}-{size}-{form}")
    for bits, (symmetric, sym), (group, size), (zero, form) in itertools.product(
        (2, 4, 8),
        ((False, "asym"), (True, "sym")),
        ((None, "channel"), (8, "g8")),
        ((True, "widened"), (False, "published")),
    )
] + [pytest.param(Grid(2, group_size=8, extra_level=True), id="balanced")]


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    """Both signs, one sign each, an outlier, zeros: [6, 16]."""
    w = torch.randn(6, 16, dtype=dtype, generator=torch.Generator().manual_seed(4))
    w[1], w[2] = w[1].abs() + 0.4, -w[2].abs() - 0.4
    w[3, 5], w[4] = 20.0, 0.0
    return w


def offsets_of(w: Tensor, grid: Grid, random: bool = False) -> Offsets:
    offsets = Offsets({"q": w}, {"q": extremes(w, grid)}, grid).to(w.dtype)
    if random:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            offsets.offset["q"].copy_(torch.rand(w.shape, generator=generator) - 0.5)
            for factor in (offsets.upper["q"], offsets.lower["q"]):
                factor.copy_(0.6 + 0.4 * torch.rand(factor.shape, generator=generator))
    return offsets


@pytest.mark.parametrize("grid", GRIDS)
def test_it_starts_at_rounding_to_nearest_bit_for_bit(grid: Grid) -> None:
    found = offsets_of(weight(), grid).quantize("q")
    nearest = round_to_nearest(weight(), *extremes(weight(), grid), grid)
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(found, part), getattr(nearest, part)), part
        assert getattr(found, part).dtype == getattr(nearest, part).dtype


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_trained_is_what_is_stored(grid: Grid) -> None:
    offsets = offsets_of(weight(), grid, random=True)
    stored = offsets.quantize("q")
    assert torch.equal(offsets.fake_quantize("q").detach(), stored.dequantize())
    assert int(stored.codes.max()) <= grid.qmax
    nearest = round_to_nearest(weight(), *extremes(weight(), grid), grid)
    assert not torch.equal(stored.codes, nearest.codes)
    assert offsets.fake_quantize("q", torch.bfloat16).dtype == torch.bfloat16


def test_an_offset_of_half_a_step_moves_a_code_by_one_at_most() -> None:
    grid = Grid(4)
    w = weight()[:1]
    offsets = offsets_of(w, grid)
    before = offsets.quantize("q").codes.int()
    with torch.no_grad():
        offsets.offset["q"].fill_(0.5)
    moved = offsets.quantize("q").codes.int() - before
    assert moved.min() >= 0 and moved.max() == 1


class Surrogate:
    """The forward pass in float64 with every rounding residue and every clamp frozen at a point."""

    def __init__(self, w: Tensor, grid: Grid, point: list[Tensor]):
        self.w, self.grid = w, grid
        self.residue: list[Tensor] = []
        self.frozen = False
        self(*point)
        self.frozen = True

    def rounded(self, value: Tensor, exact: Tensor) -> Tensor:
        if not self.frozen:
            self.residue.append(exact - value)
        self.at += 1
        return value + self.residue[self.at - 1]

    def __call__(self, v: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
        self.at = 0
        size = self.grid.group_size or self.w.shape[1]
        groups, offset = (t.reshape(t.shape[0], -1, size) for t in (self.w, v))
        high, low = groups.max(-1).values, groups.min(-1).values
        if self.grid.zero_in_range:
            high, low = high.clamp(min=0), low.clamp(max=0)
        high, low = high * upper, low * lower
        if self.grid.symmetric:
            free = torch.maximum(high.abs(), low.abs()) / (2 ** (self.grid.bits - 1) - 1)
        else:
            free = (high - low) / (4 if self.grid.extra_level else 2**self.grid.bits - 1)
        scale = self.rounded(free, free.half().double())
        if self.grid.symmetric:
            zero = torch.full_like(scale, 2 ** (self.grid.bits - 1))
        else:
            zero = self.rounded(-low / scale, (-low / scale).round())
        scale, zero = scale[..., None], zero[..., None]
        t = groups / scale + offset
        codes = self.rounded(t, t.round()) + zero
        top = 4 if self.grid.extra_level else 2**self.grid.bits - 1
        if not self.frozen:
            self.inside, self.cut = (codes > -0.5) & (codes < top + 0.5), codes.round().clamp(0, top)
        codes = torch.where(self.inside, codes, self.cut)
        return (scale * (codes - zero)).reshape(self.w.shape)


@pytest.mark.parametrize("grid", [p for p in GRIDS if "8bit" not in p.id])
def test_gradients_are_central_differences_of_the_surrogate(grid: Grid) -> None:
    """Through both straight-through roundings and the scale; rows of zeros, held by the clamp of the scale, aside."""
    w = weight(torch.float64)[[0, 3, 5]]
    if grid.zero_in_range:
        w = torch.cat((w, weight(torch.float64)[1:3]))
    offsets = offsets_of(w, grid, random=True)
    leaves = [offsets.offset["q"], offsets.upper["q"], offsets.lower["q"]]
    weights = torch.randn(w.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((weights * offsets.fake_quantize("q")).sum(), leaves)
    point = [leaf.detach().clone() for leaf in leaves]
    surrogate = Surrogate(w, grid, point)
    assert torch.allclose(surrogate(*point), offsets.fake_quantize("q").detach(), atol=1e-9)
    assert not surrogate.inside.all() or grid.bits > 2, "the point must exercise the clamp"
    for argument, found in zip(point, gradients, strict=True):
        for row in range(argument.shape[0]):
            for column in range(argument.shape[1]):
                kept, sides = argument[row, column].item(), []
                for sign in (1, -1):
                    argument[row, column] = kept + sign * 1e-6
                    sides.append(float((weights * surrogate(*point)).sum()))
                argument[row, column] = kept
                assert float(found[row, column]) == pytest.approx(
                    (sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-5
                )


def test_factors_stay_between_nothing_and_the_whole_range() -> None:
    offsets = offsets_of(weight(), Grid(4))
    with torch.no_grad():
        offsets.upper["q"].fill_(1.5)
        offsets.lower["q"].fill_(-0.5)
    offsets.clamp_factors_()
    assert bool((offsets.upper["q"] == 1).all()) and bool((offsets.lower["q"] == 0).all())
    offsets.reset_()
    assert bool((offsets.lower["q"] == 1).all()) and bool((offsets.offset["q"] == 0).all())
