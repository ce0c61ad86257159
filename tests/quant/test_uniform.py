"""Uniform quantization against a loop over Python floats that follows the formulas one element at a time.

Python's floats are IEEE doubles and its round() ties to even, as torch's: the comparison is exact.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from qbench.quant.grid import Grid
from qbench.quant.uniform import (
    QuantizedWeight,
    dequantize,
    extremes,
    fake_quantize,
    qparams,
    quantize,
    round_to_nearest,
    stored_qparams,
)

GRIDS = [
    pytest.param(Grid(bits, symmetric, group, zero), id=f"{bits}bit-{sym}-{size}-{form}")
    for bits, (symmetric, sym), (group, size), (zero, form) in itertools.product(
        (2, 3, 4, 8),
        ((False, "asym"), (True, "sym")),
        ((None, "channel"), (8, "g8")),
        ((True, "widened"), (False, "published")),
    )
] + [
    pytest.param(Grid(2, False, group, zero, True), id=f"2bit-balanced-{size}-{form}")
    for (group, size), (zero, form) in itertools.product(
        ((None, "channel"), (8, "g8")), ((True, "widened"), (False, "published"))
    )
]


def steps(grid: Grid) -> int:
    """Steps between the lowest and the highest level."""
    return 4 if grid.extra_level else 2**grid.bits - 1


def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def naive_qparams(low: float, high: float, grid: Grid) -> tuple[float, int]:
    if grid.symmetric:
        scale = max(abs(low), abs(high)) / (2 ** (grid.bits - 1) - 1)
        return clamp(scale, 1e-5, 1e4), 2 ** (grid.bits - 1)
    scale = clamp((high - low) / steps(grid), 1e-5, 1e4)
    return scale, round(clamp(-low / scale, -1e4, 1e4))


def naive(x: Tensor, grid: Grid) -> tuple[list[list[int]], list[list[float]], list[tuple[float, int]]]:
    """Codes, values, and (scale, zero point) of every group of a float64 matrix."""
    all_codes, all_values, params = [], [], []
    for row in x.tolist():
        codes, values = [], []
        size = grid.group_size or len(row)
        for start in range(0, len(row), size):
            group = row[start : start + size]
            low, high = min(group), max(group)
            if grid.zero_in_range:
                low, high = min(low, 0.0), max(high, 0.0)
            scale, zero = naive_qparams(low, high, grid)
            params.append((scale, zero))
            for value in group:
                code = int(clamp(round(value / scale) + zero, 0, steps(grid)))
                codes.append(code)
                values.append((code - zero) * scale)
        all_codes.append(codes)
        all_values.append(values)
    return all_codes, all_values, params


def assorted() -> Tensor:
    """Rows of both signs, one sign, outliers, ties of round(), constants and zeros: [9, 32], float64."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(4, 32, generator=generator, dtype=torch.float64)
    outlier = normal[0].clone()
    outlier[5] = 60.0
    return torch.stack(
        [
            *normal[:2],
            outlier,
            normal[2].abs() + 0.5,  # all positive, away from zero
            -normal[3].abs() - 0.5,
            torch.arange(32, dtype=torch.float64) / 2 - 8,  # halves: ties
            torch.full((32,), 0.7, dtype=torch.float64),
            torch.full((32,), -0.7, dtype=torch.float64),
            torch.zeros(32, dtype=torch.float64),
        ]
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_values_and_parameters_match_the_loop(grid: Grid) -> None:
    x = assorted()
    codes, values, params = naive(x, grid)
    scale, zero = qparams(*extremes(x, grid), grid)
    found = quantize(x, scale, zero, grid)
    assert found.dtype == torch.uint8
    assert found.tolist() == codes
    assert list(zip(scale.flatten().tolist(), zero.flatten().tolist(), strict=True)) == params
    assert dequantize(found, scale, zero, grid, torch.float64).tolist() == values
    assert fake_quantize(x, grid).tolist() == values


@pytest.mark.parametrize("grid", GRIDS)
def test_every_group_has_at_most_two_to_the_bits_values_and_sits_on_its_grid(grid: Grid) -> None:
    quantized = round_to_nearest(assorted().float(), *extremes(assorted().float(), grid), grid)
    groups = grid.split(quantized.dequantize(torch.float64))
    for group, scale, zero in zip(
        groups.flatten(0, 1), quantized.scale.flatten(), quantized.zero_point.flatten(), strict=True
    ):
        assert len(group.unique()) <= steps(grid) + 1
        codes = group / scale.double() + zero
        assert (codes - codes.round()).abs().max() < 1e-6
        assert codes.min() > -1e-6 and codes.max() < steps(grid) + 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_zero_maps_to_exact_zero(bits: int, symmetric: bool) -> None:
    x = assorted().float()
    x[:, ::4] = 0.0
    grid = Grid(bits, symmetric, group_size=8)
    assert (fake_quantize(x, grid)[:, ::4] == 0).all()
    assert (round_to_nearest(x, *extremes(x, grid), grid).dequantize()[:, ::4] == 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("value", [0.7, -0.7, 3e-3, 1234.5, 0.0])
def test_constant_groups_are_exact_up_to_the_float16_scale(bits: int, symmetric: bool, value: float) -> None:
    grid = Grid(bits, symmetric, group_size=4)
    x = torch.full((2, 8), value)
    assert torch.allclose(fake_quantize(x, grid), x, rtol=1e-6, atol=0)
    stored = round_to_nearest(x, *extremes(x, grid), grid).dequantize()
    half = 2**-11 if abs(value) > 1 or value == 0 else 2e-3  # small scales are float16 subnormals
    assert torch.allclose(stored, x, rtol=half, atol=0)


def test_widened_range_keeps_the_zero_point_on_the_grid() -> None:
    x = torch.tensor([[1.0, 1.5, 2.0, 2.5], [-4.0, -3.0, -2.0, -1.0]])
    low, high = extremes(x, Grid(4))
    assert low.tolist() == [[0.0], [-4.0]] and high.tolist() == [[2.5], [0.0]]
    assert qparams(low, high, Grid(4))[1].tolist() == [[0.0], [15.0]]


def test_published_range_is_the_groups_own_and_its_zero_point_may_leave_the_grid() -> None:
    x = torch.tensor([[1.0, 1.5, 2.0, 2.5], [-4.0, -3.0, -2.0, -1.0]])
    grid = Grid(4, zero_in_range=False)
    low, high = extremes(x, grid)
    assert low.tolist() == [[1.0], [-4.0]] and high.tolist() == [[2.5], [-1.0]]
    assert qparams(low, high, grid)[1].tolist() == [[-10.0], [20.0]]
    assert fake_quantize(x, grid).sub(x).abs().max() < 1e-6  # 15 steps of 0.1 and of 0.2 hit every element


def test_both_forms_agree_wherever_a_group_has_both_signs() -> None:
    x = torch.randn(16, 32, dtype=torch.float64)
    assert torch.equal(fake_quantize(x, Grid(4, group_size=16)), fake_quantize(x, Grid(4, False, 16, False)))


@pytest.mark.parametrize(
    "grid", [Grid(3), Grid(4, group_size=8), Grid(5, symmetric=True)], ids=["3bit", "4bit-g8", "5bit-sym"]
)
def test_error_is_at_most_half_a_step_and_one_at_the_ends(grid: Grid) -> None:
    x = assorted()[:5]
    scale, zero = qparams(*extremes(x, grid), grid)
    codes = grid.split(quantize(x, scale, zero, grid))
    steps = grid.split(fake_quantize(x, grid) - x).abs() / scale.unsqueeze(-1)
    at_ends = (codes == 0) | (codes == grid.qmax)  # a rounded zero point may cut one end short
    assert steps[~at_ends].max() <= 0.5 + 1e-9
    assert steps.max() <= 1 + 1e-9


def test_scale_is_clamped_at_both_ends_and_nothing_becomes_nan() -> None:
    x = torch.stack([torch.full((4,), 1e-9), torch.tensor([-1e7, 0.0, 1.0, 1e7])]).double()
    for grid in (Grid(4), Grid(4, symmetric=True), Grid(4, zero_in_range=False)):
        scale, zero = qparams(*extremes(x, grid), grid)
        assert scale.flatten().tolist() == [1e-5, 1e4]
        assert zero.isfinite().all() and fake_quantize(x, grid).isfinite().all()


def test_published_zero_point_is_limited_to_ten_thousand() -> None:
    grid = Grid(4, zero_in_range=False)
    x = torch.tensor([[0.5, 0.5], [-0.5, -0.5]])  # a zero range: the scale falls to its floor
    scale, zero = qparams(*extremes(x, grid), grid)
    assert zero.flatten().tolist() == [-10000.0, 10000.0]
    assert round_to_nearest(x, *extremes(x, grid), grid).zero_point.flatten().tolist() == [-10000, 10000]
    assert scale.isfinite().all()


@pytest.mark.parametrize("grid", GRIDS)
def test_stored_integers_match_a_loop_with_the_float16_scale(grid: Grid) -> None:
    weight = assorted().float()
    quantized = round_to_nearest(weight, *extremes(weight, grid), grid)
    assert (quantized.codes.dtype, quantized.scale.dtype, quantized.zero_point.dtype) == (
        torch.uint8,
        torch.float16,
        torch.int16,
    )
    size = grid.group_size or 32
    for row, scales, zeros, codes in zip(
        weight, quantized.scale, quantized.zero_point, quantized.codes, strict=True
    ):
        for g in range(32 // size):
            group = row[g * size : (g + 1) * size]
            low, high = group.min(), group.max()
            if grid.zero_in_range:
                low, high = torch.minimum(low, torch.zeros(())), torch.maximum(high, torch.zeros(()))
            wide, _ = naive_qparams(low.item(), high.item(), grid)
            scale = torch.tensor(wide, dtype=torch.float32).half()  # the range's scale, as it is stored
            assert scales[g].item() == pytest.approx(scale.item(), rel=2**-10, abs=2**-24)
            stored = scales[g].float()
            zero = grid.mid if grid.symmetric else round(clamp((-low / stored).item(), -1e4, 1e4))
            if grid.zero_in_range:
                zero = int(clamp(zero, 0, grid.qmax))
            assert zeros[g].item() == zero
            expected = [int(clamp(round((v / stored).item()) + zero, 0, grid.qmax)) for v in group]
            assert codes[g * size : (g + 1) * size].tolist() == expected


def test_zero_point_belongs_to_the_rounded_scale() -> None:
    """With 8 bits the float16 scale moves the zero point: taken from the unrounded scale it would be off by one."""
    grid, moved = Grid(8), 0
    for high in torch.linspace(0.5, 1.5, 400):
        low = -0.97 * torch.ones(())
        scale, zero = stored_qparams(low[None], high[None], grid)
        assert zero.item() == round((0.97 / scale.double()).item())
        moved += zero.item() != qparams(low[None], high[None], grid)[1].item()
    assert moved > 0


def test_zero_point_never_leaves_the_grid_when_the_stored_scale_is_rounded_down() -> None:
    lows = -torch.cat((torch.linspace(0.1, 10, 2000), torch.linspace(2.5e-3, 1.5e-2, 2000)))[:, None]
    for bits in (2, 4, 8):
        grid = Grid(bits)
        scale, zero = stored_qparams(lows, torch.zeros_like(lows), grid)
        assert zero.min() >= 0 and zero.max() <= grid.qmax
    unclamped = (-lows / scale.float()).round()
    assert (
        unclamped.max() > grid.qmax
    )  # small scales are float16 subnormals: without the clamp it would leave


def test_nearest_code_is_chosen_for_the_stored_scale() -> None:
    """No other code of the grid is closer to the weight than the one that was stored."""
    grid = Grid(3, group_size=8)
    weight = assorted().float()[:5]
    quantized = round_to_nearest(weight, *extremes(weight, grid), grid)
    scale, zero = quantized.scale.double().unsqueeze(-1), quantized.zero_point.double().unsqueeze(-1)
    every = torch.stack([(code - zero) * scale.expand(-1, -1, 8) for code in range(8)])
    best = (every - grid.split(weight.double())).abs().amin(0)
    found = (grid.split(quantized.dequantize(torch.float64) - weight.double())).abs()
    assert torch.allclose(found, best, rtol=0, atol=1e-6)


def test_half_precision_weights_give_the_codes_of_their_float32_values() -> None:
    weight = torch.randn(8, 16).bfloat16()
    grid = Grid(4, group_size=8)
    half = round_to_nearest(weight, *extremes(weight, grid), grid)
    single = round_to_nearest(weight.float(), *extremes(weight.float(), grid), grid)
    assert torch.equal(half.codes, single.codes) and torch.equal(half.scale, single.scale)


def test_same_weight_gives_the_same_codes() -> None:
    weight = torch.randn(32, 64)
    grid = Grid(3, group_size=16)
    first, second = (round_to_nearest(weight.clone(), *extremes(weight, grid), grid) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)


@pytest.mark.parametrize(
    ("grid", "zero_points", "expected"),
    [
        (Grid(4, group_size=8), [0, 15], 64 * 4 + 8 * 16 + 8 * 4),
        (Grid(3), [0, 7], 64 * 3 + 2 * 16 + 2 * 3),
        (Grid(4, symmetric=True, group_size=8), [8, 8], 64 * 4 + 8 * 16),
        (Grid(4, group_size=8, zero_in_range=False), [-3, 4], 64 * 4 + 8 * 16 + 8 * 16),
        (Grid(4, group_size=8, zero_in_range=False), [4, 16], 64 * 4 + 8 * 16 + 8 * 16),
        # 64 codes are three units of 24, eight zero points are one; a unit is seven bytes
        (Grid(2, group_size=8, extra_level=True), [0, 4], 3 * 56 + 8 * 16 + 56),
        (Grid(2, group_size=8, zero_in_range=False, extra_level=True), [0, 5], 3 * 56 + 8 * 16 + 8 * 16),
    ],
    ids=[
        "asym-g8",
        "asym-channel",
        "sym-stores-no-zero",
        "zero-below-the-grid",
        "zero-above-the-grid",
        "balanced",
        "balanced-zero-above-the-grid",
    ],
)
def test_stored_bits(grid: Grid, zero_points: list[int], expected: int) -> None:
    groups = grid.n_groups(32)
    zero = torch.tensor(zero_points, dtype=torch.int16)[:, None].expand(2, groups)
    quantized = QuantizedWeight(
        torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, groups).half(), zero, grid
    )
    assert quantized.stored_bits == expected


def test_bits_per_weight_of_a_group_of_128_at_4_bits() -> None:
    weight = torch.randn(16, 512)
    grid = Grid(4, group_size=128)
    quantized = round_to_nearest(weight, *extremes(weight, grid), grid)
    assert math.isclose(quantized.stored_bits / weight.numel(), 4 + (16 + 4) / 128)


def test_a_bit_balanced_grid_has_five_levels_and_counts_what_they_cost() -> None:
    weight = torch.randn(48, 512)
    balanced, plain = Grid(2, group_size=64, extra_level=True), Grid(2, group_size=64)
    found = round_to_nearest(weight, *extremes(weight, balanced), balanced)
    groups = balanced.split(found.dequantize())
    counts = [len(group.unique()) for group in groups.flatten(0, 1)]
    assert set(counts) <= {4, 5} and counts.count(5) > 0.8 * len(
        counts
    )  # a rounded zero point may cut one end
    assert found.codes.unique().tolist() == [0, 1, 2, 3, 4]
    bits = found.stored_bits / weight.numel()
    assert bits == pytest.approx(7 / 3 + (16 + 7 / 3) / 64)
    assert math.log2(5) < bits - 16 / 64  # never below what five levels can be told apart with
    four = round_to_nearest(weight, *extremes(weight, plain), plain)
    assert (found.dequantize() - weight).square().mean() < (four.dequantize() - weight).square().mean()


def test_a_balanced_grid_over_a_range_of_equal_ends_is_symmetric() -> None:
    grid = Grid(2, extra_level=True)
    weight = torch.tensor([[-2.0, -1.1, 0.1, 0.9, 2.0]])
    found = round_to_nearest(weight, *extremes(weight, grid), grid)
    assert (found.codes.int() - found.zero_point.int()).tolist() == [[-2, -1, 0, 1, 2]]


def test_a_symmetric_grid_has_no_extra_level() -> None:
    with pytest.raises(AssertionError, match="zero point"):
        Grid(2, symmetric=True, extra_level=True)
