"""The closed-form backward against two independent definitions of the same derivative.

Rounding has no useful derivative, so a straight-through gradient is the derivative of a surrogate: round(t) becomes
t + (round(t₀) − t₀) with the bracket frozen at the point of evaluation, and so are the zero point and which elements
the clamp cuts off. `Surrogate` writes it down in float64 without autograd; central differences of it are one
reference, autograd through `fake.reference` is the other.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qbench.quant import uniform
from qbench.quant.clipping import INITIAL_LOGIT
from qbench.quant.fake import fake_quantize, reference, round_ste
from qbench.quant.grid import Grid

GRIDS = [
    pytest.param(Grid(bits, symmetric, group, zero), id=f"{bits}bit-{sym}-{size}-{form}")
    for bits, (symmetric, sym), (group, size), (zero, form) in itertools.product(
        (2, 4),
        ((False, "asym"), (True, "sym")),
        ((None, "channel"), (4, "g4")),
        ((True, "widened"), (False, "published")),
    )
] + [pytest.param(Grid(2, False, 4, zero, True), id=f"2bit-balanced-g4-{zero}") for zero in (True, False)]
CLIPPED = pytest.mark.parametrize("clipped", [False, True], ids=["unclipped", "clipped"])


def rows() -> Tensor:
    """Both signs, one sign, an outlier, and largest elements that tie in pairs: [6, 8], float64."""
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x[1] = x[1].abs() + 0.3
    x[2] = -x[2].abs() - 0.3
    x[3, 2] = 9.0
    x[4, 1] = x[4, 3] = 2.7  # a tie within the first group of four, and of eight
    x[4, 6] = x[4, 7] = -2.9
    x[5, 0], x[5, 4] = 3.1, -3.1  # |low| = |high|: a tie of the symmetric scale
    return x


def logits(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Clipping strong enough that elements fall outside the grid; one row at the same strength on both sides.

    Where a one-sided range is not widened, its inner end is made the larger one: only a symmetric scale can bear it.
    """
    shape = (x.shape[0], grid.n_groups(x.shape[-1]))
    generator = torch.Generator().manual_seed(6)
    upper, lower = (
        0.5 * torch.randn(shape, dtype=torch.float64, generator=generator) + 0.8 for _ in range(2)
    )
    lower[5] = upper[5]
    if grid.symmetric and not grid.zero_in_range:
        upper[1], lower[1] = -4.0, 3.0
        upper[2], lower[2] = 3.0, -4.0
    return upper, lower


class Surrogate:
    """y(x, u, l) with the rounding residue, the zero point and the clamp's choice frozen at a point."""

    def __init__(self, x: Tensor, grid: Grid, upper: Tensor | None, lower: Tensor | None):
        self.grid = grid
        self.steps = 4 if grid.extra_level else 2**grid.bits - 1
        t, self.zero = self.scaled(x, upper, lower)[1:]
        codes = t.round() + self.zero
        self.residue = t.round() - t
        self.cut = codes.clamp(0, self.steps)
        self.inside = (codes >= 0) & (codes <= self.steps)

    def scaled(self, x: Tensor, upper: Tensor | None, lower: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        size = self.grid.group_size or x.shape[-1]
        groups = x.reshape(x.shape[0], -1, size)
        high, low = groups.max(-1, keepdim=True).values, groups.min(-1, keepdim=True).values
        if self.grid.zero_in_range:
            high, low = high.clamp(min=0), low.clamp(max=0)
        if upper is not None and lower is not None:
            high, low = high / (1 + torch.exp(-upper[..., None])), low / (1 + torch.exp(-lower[..., None]))
        if self.grid.symmetric:
            scale = torch.maximum(high.abs(), low.abs()) / (2 ** (self.grid.bits - 1) - 1)
            zero = torch.full_like(scale, 2 ** (self.grid.bits - 1))
        else:
            scale = (high - low) / self.steps
            zero = (-low / scale).round()
        return scale, groups / scale, zero

    def __call__(self, x: Tensor, upper: Tensor | None, lower: Tensor | None) -> Tensor:
        scale, t, _ = self.scaled(x, upper, lower)
        codes = torch.where(self.inside, t + self.residue + self.zero, self.cut)
        return (scale * (codes - self.zero)).reshape(x.shape)


def differences(function, arguments: list[Tensor], weights: Tensor, step: float = 1e-6) -> list[Tensor]:
    """Central differences of Σ weights·function(*arguments) in every entry [row, column] of every argument.

    Rows share nothing, so one evaluation moves a column of all of them.
    """
    gradients = []
    for argument in arguments:
        gradient = torch.zeros_like(argument)
        for column in range(argument.shape[1]):
            kept, sides = argument[:, column].clone(), []
            for sign in (1, -1):
                argument[:, column] = kept + sign * step
                sides.append((weights * function(*arguments)).sum(-1))
            argument[:, column] = kept
            gradient[:, column] = (sides[0] - sides[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


def gradients_of(function, arguments: list[Tensor], weights: Tensor) -> list[Tensor]:
    leaves = [a.clone().requires_grad_() for a in arguments]
    return list(torch.autograd.grad((weights * function(*leaves)).sum(), leaves))


def point(grid: Grid, clipped: bool) -> tuple[list[Tensor], Tensor]:
    """Arguments (x, and the logits if clipped) and the weights of the output's sum."""
    x = rows()
    weights = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return [x, *(logits(x, grid) if clipped else ())], weights


def called(function, grid: Grid):
    return lambda x, upper=None, lower=None: function(x, grid, upper, lower)


@CLIPPED
@pytest.mark.parametrize("grid", GRIDS)
def test_backward_matches_central_differences_of_the_surrogate(grid: Grid, clipped: bool) -> None:
    arguments, weights = point(grid, clipped)
    surrogate = Surrogate(arguments[0], grid, *(arguments[1:] or (None, None)))
    if clipped:
        assert not surrogate.inside.all(), "the point must exercise the clamp"

    def frozen(x: Tensor, upper: Tensor | None = None, lower: Tensor | None = None) -> Tensor:
        return surrogate(x, upper, lower)

    expected = differences(frozen, arguments, weights)
    for found, wanted in zip(
        gradients_of(called(fake_quantize, grid), arguments, weights), expected, strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-7, atol=1e-7)


@CLIPPED
@pytest.mark.parametrize("grid", GRIDS)
def test_backward_matches_autograd_through_the_recorded_composition(grid: Grid, clipped: bool) -> None:
    arguments, weights = point(grid, clipped)
    recorded = gradients_of(called(reference, grid), arguments, weights)
    for found, wanted in zip(
        gradients_of(called(fake_quantize, grid), arguments, weights), recorded, strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


@CLIPPED
@pytest.mark.parametrize("grid", GRIDS)
def test_forward_matches_the_composition_and_the_surrogate_at_its_own_point(
    grid: Grid, clipped: bool
) -> None:
    arguments, _ = point(grid, clipped)
    found = called(fake_quantize, grid)(*arguments)
    assert torch.equal(found, called(reference, grid)(*arguments))
    surrogate = Surrogate(arguments[0], grid, *(arguments[1:] or (None, None)))
    assert torch.allclose(
        found, surrogate(*arguments, *([] if clipped else [None, None])), rtol=1e-12, atol=1e-12
    )
    if not clipped:
        assert torch.equal(found, uniform.fake_quantize(arguments[0], grid))


def test_three_way_ties_share_the_gradient_equally() -> None:
    """A difference quotient cannot see this (one of three maxima moving down changes nothing); autograd can."""
    x = torch.tensor([[2.0, 2.0, 2.0, -1.3, 0.4]], dtype=torch.float64)
    weights = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    (found,) = gradients_of(called(fake_quantize, Grid(2)), [x], weights)
    assert found[0, 0] != 0
    assert found[0, 0] == found[0, 1] == found[0, 2]
    (recorded,) = gradients_of(called(reference, Grid(2)), [x], weights)
    assert torch.allclose(found, recorded, rtol=1e-12)


def test_a_scale_held_by_its_clamp_passes_nothing_to_the_extremes() -> None:
    for x in (torch.tensor([[1e-7, -1e-7, 3e-8]]), torch.tensor([[4e5, -4e5, 1e5]])):
        x = x.double()
        weights = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
        grid = Grid(4)
        (found,), (recorded,) = (
            gradients_of(called(f, grid), [x], weights) for f in (fake_quantize, reference)
        )
        assert torch.allclose(found, recorded, rtol=1e-12, atol=1e-12)


def test_elements_outside_the_grid_get_no_gradient_of_their_own() -> None:
    x = torch.tensor([[-1.0, -0.4, 0.2, 0.9, 1.0, 0.5]], dtype=torch.float64)
    half = torch.zeros(1, 1, dtype=torch.float64)  # σ(0) = 1/2 on both sides: grid from −0.5 to 0.5
    weights = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    (found, *_) = gradients_of(called(fake_quantize, Grid(4)), [x, half, half.clone()], weights)
    assert found[0, 3] == 0  # 0.9 is cut off; only the ends of the range move its value
    assert found[0, 4] > 0 and found[0, [1, 2, 5]].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@CLIPPED
def test_half_precision_is_computed_in_float32_and_returned_in_its_own_dtype(
    dtype: torch.dtype, clipped
) -> None:
    x = rows().to(dtype)
    grid = Grid(8, group_size=4)
    clip = [c.float() for c in logits(rows(), grid)] if clipped else []
    weights = torch.randn(x.shape).to(dtype)
    wide = [x.float(), *clip]
    found = called(fake_quantize, grid)(x, *clip)
    assert found.dtype == dtype
    assert torch.equal(found, called(fake_quantize, grid)(*wide).to(dtype))
    gradients = gradients_of(called(fake_quantize, grid), [x, *clip], weights)
    expected = gradients_of(called(reference, grid), wide, weights.float())
    assert gradients[0].dtype == dtype
    assert torch.allclose(gradients[0].float(), expected[0], rtol=2**-7, atol=1e-2)
    for one, other in zip(gradients[1:], expected[1:], strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@CLIPPED
def test_another_type_of_the_result_is_a_cast_of_it_in_both_directions(
    dtype: torch.dtype, clipped: bool
) -> None:
    grid = Grid(3, group_size=4)
    arguments = [a.float() for a in point(grid, clipped)[0]]
    weights = torch.randn(arguments[0].shape).to(dtype)
    optional = [*arguments[1:], None, None][:2]
    assert fake_quantize(arguments[0], grid, *optional, out_dtype=dtype).dtype == dtype

    def direct(x: Tensor, upper: Tensor | None = None, lower: Tensor | None = None) -> Tensor:
        return fake_quantize(x, grid, upper, lower, out_dtype=dtype)

    def cast(x: Tensor, upper: Tensor | None = None, lower: Tensor | None = None) -> Tensor:
        return fake_quantize(x, grid, upper, lower).to(dtype)

    assert torch.equal(direct(*arguments), cast(*arguments))
    for one, other in zip(*(gradients_of(f, arguments, weights) for f in (direct, cast)), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float32


@pytest.mark.gpu
@CLIPPED
@pytest.mark.parametrize("grid", GRIDS)
def test_a_gpu_gives_the_values_and_gradients_of_the_cpu(grid: Grid, clipped: bool) -> None:
    """Whatever kernel runs there, fused ones included; ties and one-sided rows are part of the point."""
    arguments, weights = point(grid, clipped)
    arguments, weights = [a.float() for a in arguments], weights.float()
    there = [a.cuda() for a in arguments]
    function = called(fake_quantize, grid)
    assert torch.allclose(function(*there).cpu(), function(*arguments), rtol=1e-5, atol=1e-6)
    found = gradients_of(function, there, weights.cuda())
    for one, other in zip(found, gradients_of(function, arguments, weights), strict=True):
        assert torch.allclose(one.cpu(), other, rtol=1e-4, atol=1e-4)


def test_activations_of_any_rank_are_quantized_per_token() -> None:
    x = torch.randn(2, 3, 5, 16)
    found = fake_quantize(x, Grid(4))
    for token, value in zip(x.reshape(-1, 16), found.reshape(-1, 16), strict=True):
        assert torch.equal(value, uniform.fake_quantize(token, Grid(4)))


def test_memory_layout_does_not_matter() -> None:
    """Attention operands arrive transposed."""
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    weights = torch.randn(6, 4, 8, dtype=torch.float64)
    grid = Grid(3, group_size=4)
    (strided,) = gradients_of(lambda x: fake_quantize(x.transpose(0, 1), grid), [x], weights)
    (packed,) = gradients_of(called(fake_quantize, grid), [x.transpose(0, 1).contiguous()], weights)
    assert torch.equal(strided.transpose(0, 1), packed)
    assert torch.equal(fake_quantize(x.transpose(0, 1), grid), fake_quantize(x, grid).transpose(0, 1))


def test_weight_without_gradient_still_trains_its_logits() -> None:
    x, grid = rows().float(), Grid(3)
    upper, lower = (c.float().requires_grad_() for c in logits(rows(), grid))
    fake_quantize(x, grid, upper, lower).square().sum().backward()
    assert upper.grad[:2].abs().min() > 0 and lower.grad[2:].abs().min() > 0
    frozen = upper.grad.clone()
    upper.grad = None
    y = x.clone().requires_grad_()
    fake_quantize(y, grid, upper, lower).square().sum().backward()
    assert torch.equal(upper.grad, frozen)


def test_logits_at_their_start_barely_clip() -> None:
    x = torch.randn(4, 64, dtype=torch.float64)
    start = torch.full((4, 1), INITIAL_LOGIT, dtype=torch.float64)
    assert 0.98 < start.sigmoid()[0].item() < 0.99
    clipped, plain = fake_quantize(x, Grid(4), start, start), fake_quantize(x, Grid(4))
    ratio = (clipped.amax(-1) - clipped.amin(-1)) / (plain.amax(-1) - plain.amin(-1))
    assert torch.allclose(ratio, start.sigmoid()[:, 0], rtol=1e-9)


def test_round_ste_rounds_with_gradient_one() -> None:
    x = torch.tensor([0.4, 0.5, 1.5, -2.6], requires_grad=True)
    y = round_ste(x)
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert y.tolist() == [0, 0, 2, -3] and x.grad.tolist() == [1, 2, 3, 4]


def test_the_graph_cannot_be_differentiated_twice() -> None:
    x = rows().requires_grad_()
    (first,) = torch.autograd.grad(fake_quantize(x, Grid(4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


SCALES = pytest.mark.parametrize("scaled", ["rows", "columns", "both"])


def scales_of(scaled: str, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Factors of rows (both signs) and columns; equal within a row's tied elements, so that they stay tied."""
    generator = torch.Generator().manual_seed(11)
    row = torch.randn(x.shape[0], dtype=x.dtype, generator=generator) + 1.5
    column = torch.rand(x.shape[1], dtype=x.dtype, generator=generator) + 0.5
    column[3], column[7], column[4] = column[1], column[6], column[0]
    return (None if scaled == "columns" else row), (None if scaled == "rows" else column)


def scaled_gradients(
    x: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    clipping: tuple[Tensor, Tensor],
    grid: Grid,
    fused: bool,
) -> list[Tensor]:
    """Value and gradients in (x, scales, logits), the factors taken by the function or multiplied in before."""
    row, column = (None if s is None else s.clone().requires_grad_() for s in scales)
    x, upper, lower = (t.clone().requires_grad_() for t in (x, *clipping))
    if fused:
        value = fake_quantize(x, grid, upper, lower, row_scale=row, column_scale=column)
    else:
        w = x if row is None else x * row[:, None]
        value = reference(w if column is None else w * column, grid, upper, lower)
    weights = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(
        value
    )
    leaves = [t for t in (x, row, column, upper, lower) if t is not None]
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)]


@SCALES
@pytest.mark.parametrize("grid", GRIDS)
def test_factors_taken_on_the_way_are_factors_multiplied_in_before(grid: Grid, scaled: str) -> None:
    x = rows()
    arguments = (x, scales_of(scaled, x), logits(x, grid), grid)
    for one, other in zip(
        scaled_gradients(*arguments, True), scaled_gradients(*arguments, False), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@SCALES
@pytest.mark.parametrize("grid", GRIDS)
def test_a_gpu_takes_factors_as_the_cpu_does(grid: Grid, scaled: str) -> None:
    x = torch.cat([rows().float()] * 9)  # several tiles, the last one ragged
    arguments = (x, scales_of(scaled, x), tuple(c.float() for c in logits(x, grid)))
    there = tuple(
        tuple(None if t is None else t.cuda() for t in a) if isinstance(a, tuple) else a.cuda()
        for a in arguments
    )
    for one, other in zip(
        scaled_gradients(*there, grid, True), scaled_gradients(*arguments, grid, True), strict=True
    ):
        assert torch.allclose(one.cpu(), other, rtol=1e-4, atol=1e-4)


def test_a_weight_without_gradient_trains_its_factors() -> None:
    x, grid = rows(), Grid(3)
    row, column = (s.requires_grad_() for s in scales_of("both", x))
    fake_quantize(x, grid, row_scale=row, column_scale=column).square().sum().backward()
    assert row.grad.abs().min() > 0 and column.grad.abs().min() > 0
