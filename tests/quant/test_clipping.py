"""Learnable clipping starts almost open, has one pair of logits per scale, and training sees what rounding gives."""

from __future__ import annotations

import math

import pytest
import torch

from qbench.quant.clipping import INITIAL_LOGIT, Clipping
from qbench.quant.fake import fake_quantize
from qbench.quant.grid import Grid
from qbench.quant.uniform import dequantize, extremes, qparams, quantize

SHAPES = {"q": (6, 16), "down": (4, 32)}


def test_every_logit_starts_at_four() -> None:
    assert INITIAL_LOGIT == 4.0
    clipping = Clipping(SHAPES, Grid(4))
    assert len(list(clipping.parameters())) == 4
    assert all((p == 4.0).all() and p.requires_grad for p in clipping.parameters())


@pytest.mark.parametrize(
    ("grid", "groups"), [(Grid(4), (1, 1)), (Grid(4, group_size=8), (2, 4))], ids=["channel", "g8"]
)
def test_one_pair_of_logits_per_scale(grid: Grid, groups: tuple[int, int]) -> None:
    clipping = Clipping(SHAPES, grid)
    for (role, (rows, _)), count in zip(SHAPES.items(), groups, strict=True):
        assert [logit.shape for logit in clipping.logits(role)] == [(rows, count)] * 2


def test_at_the_start_ranges_are_the_extremes_times_sigmoid_of_four() -> None:
    grid, weight = Grid(4, group_size=8), torch.randn(6, 16, dtype=torch.float64)
    low, high = Clipping(SHAPES, grid).ranges("q", weight, grid)
    sigma = 1 / (1 + math.exp(-4))
    assert torch.allclose(high, sigma * weight.reshape(6, 2, 8).amax(-1), rtol=1e-12)
    assert torch.allclose(low, sigma * weight.reshape(6, 2, 8).amin(-1), rtol=1e-12)
    assert not low.requires_grad


def test_the_upper_logit_moves_the_upper_end_alone() -> None:
    grid, weight = Grid(4), torch.randn(6, 16)
    clipping = Clipping(SHAPES, grid)
    before = clipping.ranges("q", weight, grid)
    with torch.no_grad():
        clipping.logits("q")[0].fill_(0.0)
    low, high = clipping.ranges("q", weight, grid)
    assert torch.equal(low, before[0])
    assert torch.allclose(high, weight.amax(-1, keepdim=True) / 2)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("zero_in_range", [True, False], ids=["widened", "published"])
def test_rounding_over_the_ranges_gives_what_training_saw(symmetric: bool, zero_in_range: bool) -> None:
    grid = Grid(3, symmetric, 8, zero_in_range)
    weight = torch.randn(6, 16)
    weight[0] = weight[0].abs() + 1
    clipping = Clipping(SHAPES, grid)
    with torch.no_grad():
        for logit in clipping.parameters():
            logit.copy_(torch.randn_like(logit))
    seen = fake_quantize(weight, grid, *clipping.logits("q"))
    scale, zero = qparams(*clipping.ranges("q", weight, grid), grid)
    assert torch.equal(seen, dequantize(quantize(weight, scale, zero, grid), scale, zero, grid))
    assert not torch.equal(scale, qparams(*extremes(weight, grid), grid)[0])
