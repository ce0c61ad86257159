"""Each map against its explicit dense matrix, and the inverse's gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qbench.transforms.maps import Blocks, Diagonal, Map, Rotations, _NearDiagonalProduct, inverse

GROUPS, WIDTH = 3, 4
CHANNELS = GROUPS * WIDTH
DOUBLE = {"dtype": torch.float64}


def conditioned(*shape: int) -> Tensor:
    """Matrices near the identity, none symmetric: a missing transpose shows."""
    return torch.eye(shape[-1], **DOUBLE) + 0.3 * torch.randn(*shape, **DOUBLE)


def diagonal() -> tuple[Map, Tensor]:
    scale = torch.randn(GROUPS, WIDTH, **DOUBLE).exp() * torch.tensor([1.0, -1.0, 1.0, 1.0], **DOUBLE)
    return Diagonal(scale), torch.diag(scale.reshape(-1))


def blocks() -> tuple[Map, Tensor]:
    matrices = conditioned(GROUPS, WIDTH, WIDTH)
    return Blocks.of(matrices), torch.block_diag(*matrices)


def full() -> tuple[Map, Tensor]:
    matrix = conditioned(1, CHANNELS, CHANNELS)
    return Blocks.of(matrix), matrix[0]


def rotations() -> tuple[Map, Tensor]:
    a, b = torch.randn(GROUPS, WIDTH // 2, **DOUBLE), torch.randn(GROUPS, WIDTH // 2, **DOUBLE)
    parts = [
        torch.cat((torch.cat((p.diag(), -q.diag()), 1), torch.cat((q.diag(), p.diag()), 1)))
        for p, q in zip(a, b, strict=True)
    ]
    return Rotations(a, b), torch.block_diag(*parts)


MAPS = pytest.mark.parametrize("build", [diagonal, blocks, full, rotations], ids=lambda build: build.__name__)
Build = Callable[[], tuple[Map, Tensor]]


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


@MAPS
def test_rows_and_outputs_match_the_dense_matrix(build: Build) -> None:
    a, dense = build()
    x, weight = torch.randn(2, 5, CHANNELS, **DOUBLE), torch.randn(CHANNELS, 6, **DOUBLE)
    assert close(a.undo_rows(x), x @ torch.linalg.inv(dense))
    assert close(a.apply_rows(x), x @ dense.T)
    assert close(a.undo_outputs(weight), torch.linalg.inv(dense).T @ weight)
    assert close(a.apply_outputs(weight), dense @ weight)
    assert close(a.undo_rows(x[0, 0]), x[0, 0] @ torch.linalg.inv(dense))  # a bias


@MAPS
def test_repeat_gives_each_group_to_consecutive_heads(build: Build) -> None:
    a, dense = build()
    if build is full:
        return
    heads = [dense[i : i + WIDTH, i : i + WIDTH] for i in range(0, CHANNELS, WIDTH)]
    repeated = torch.block_diag(*(head for head in heads for _ in range(2)))
    x = torch.randn(5, 2 * CHANNELS, **DOUBLE)
    weight = torch.randn(2 * CHANNELS, 6, **DOUBLE)
    assert close(a.repeat(2).apply_rows(x), x @ repeated.T)
    assert close(a.repeat(2).undo_rows(x), x @ torch.linalg.inv(repeated))
    assert close(a.repeat(2).undo_outputs(weight), torch.linalg.inv(repeated).T @ weight)
    assert close(a.repeat(1).apply_rows(x[:, :CHANNELS]), x[:, :CHANNELS] @ dense.T)


@MAPS
def test_activation_and_consumer_cancel(build: Build) -> None:
    a, _ = build()
    x, consumer = torch.randn(5, CHANNELS, **DOUBLE), torch.randn(7, CHANNELS, **DOUBLE)
    assert close(a.undo_rows(x) @ a.apply_rows(consumer).T, x @ consumer.T)
    producer = torch.randn(CHANNELS, 6, **DOUBLE)
    z = torch.randn(5, 6, **DOUBLE)
    assert close(z @ a.undo_outputs(producer).T, a.undo_rows(z @ producer.T))


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 3)], ids=["one", "heads"])
def test_inverse_agrees_with_finite_differences(shape: tuple[int, ...]) -> None:
    matrix = conditioned(*shape).requires_grad_()
    assert torch.autograd.gradcheck(inverse, matrix, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_inverse_gradient_matches_a_difference_quotient_in_a_random_direction() -> None:
    matrix = conditioned(2, 8, 8).requires_grad_()
    direction, weights = torch.randn(2, 2, 8, 8, **DOUBLE)
    (found,) = torch.autograd.grad((weights * inverse(matrix)).sum(), matrix)
    with torch.no_grad():
        up, down = ((weights * torch.linalg.inv(matrix + h * direction)).sum() for h in (1e-6, -1e-6))
    assert torch.isclose((found * direction).sum(), (up - down) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("make", [
    lambda p: Diagonal(p[:2]),
    lambda p: Blocks.of(torch.eye(4, **DOUBLE) + 0.2 * p.reshape(2, 4, 4)),
    lambda p: Rotations(1 + p[:2, :2], p[2:4, :2]),
], ids=["diagonal", "blocks", "rotations"])  # fmt: skip
@pytest.mark.parametrize("use", ["undo_rows", "apply_rows", "undo_outputs", "apply_outputs"])
def test_every_use_is_differentiable_in_the_parameters(make: Callable[[Tensor], Map], use: str) -> None:
    parameters = (1 + 0.2 * torch.randn(8, 4, **DOUBLE)).requires_grad_()
    operand = torch.randn(8, 8, **DOUBLE)
    assert torch.autograd.gradcheck(
        lambda p: getattr(make(p), use)(operand), parameters, atol=1e-7, rtol=1e-5
    )


def test_a_singular_matrix_gives_non_finite_entries_and_no_exception() -> None:
    assert not inverse(torch.zeros(1, 3, 3)).isfinite().all()


def test_scaled_rotations_commute_with_rotary_embedding_and_reflections_do_not() -> None:
    """The half-split layout turns channel pairs (i, i + width/2) by the same angle."""
    _, dense = rotations()
    head = dense[:WIDTH, :WIDTH]
    angle = torch.tensor([0.7, 2.1], **DOUBLE)
    cos, sin = angle.cos().diag(), angle.sin().diag()
    rope = torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))
    assert close(head @ rope, rope @ head)
    reflected = head @ torch.diag(torch.tensor([1.0, 1.0, -1.0, -1.0], **DOUBLE))
    assert not close(reflected @ rope, rope @ reflected)


def test_near_diagonal_product_is_the_product_to_the_digits_it_promises() -> None:
    """The diagonal exactly in float32, the rest in bfloat16; gradients in bfloat16."""
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(40, 64, generator=generator)
    scale = torch.randn(64, generator=generator).mul(2).exp()  # a diagonal over orders of magnitude
    b = 0.01 * torch.randn(64, 64, generator=generator) * scale
    b.diagonal().copy_(scale)
    upstream = torch.randn(40, 64, generator=generator) / scale
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    found = _NearDiagonalProduct.apply(*leaves)
    gradients = torch.autograd.grad((found * upstream).sum(), leaves)
    exact = a.double() @ b.double()
    off_diagonal = (exact - a.double() * scale.double()).abs().amax(0)
    assert bool(((found - exact).abs() < 2**-7 * off_diagonal + 1e-6 * scale).all())
    for got, wanted in zip(gradients, (upstream @ b.T, a.T @ upstream), strict=True):
        assert (got - wanted).norm() < 5e-3 * wanted.norm()
