"""Warm-started Newton–Schulz inverses agree with factorizations, and say so where they cannot follow."""

from __future__ import annotations

import pytest
import torch

from qbench.transforms.maps import WarmInverse, inverse


def walk(steps: int, size: float, groups: int = 3, width: int = 24) -> list[torch.Tensor]:
    """Matrices that move as training moves them; the diagonal spans three orders of magnitude."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(groups, width, width, generator=generator, dtype=torch.float64)

    root = torch.logspace(-1.5, 1.5, width, dtype=torch.float64).sqrt()
    scale = root[:, None] * root
    scale[3] *= -1  # a channel may change its sign
    matrix = torch.eye(width, dtype=torch.float64).expand(groups, -1, -1) + 0.02 * noise()
    matrices = [matrix * scale]
    for _ in range(steps):
        matrix = matrix + size * noise()
        matrices.append(matrix * scale)
    return matrices


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("iterations", "tolerance"), [(1, 3e-3), (2, 1e-5)], ids=["one", "two"])
def test_it_follows_a_moving_matrix(iterations: int, tolerance: float) -> None:
    first, *rest = walk(30, 2e-3)
    warm = WarmInverse(first, iterations)
    for matrix in rest:
        assert relative_error(inverse(matrix, warm), torch.linalg.inv(matrix)) < tolerance
    assert 0 < float(warm.residual) < WarmInverse.LIMIT


def test_its_residual_is_the_largest_row_sum_of_the_defect() -> None:
    before, after = walk(1, 2e-3)
    warm = WarmInverse(before, 1)
    inverse(after, warm)
    eye = torch.eye(24, dtype=torch.float64)

    def unit(matrix: torch.Tensor) -> torch.Tensor:
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        left = torch.diag_embed(diagonal.sign() / diagonal.abs().sqrt())
        return left @ matrix @ torch.diag_embed(1 / diagonal.abs().sqrt())

    expected = (eye - unit(after) @ torch.linalg.inv(unit(before))).abs().sum(-1).max()
    assert float(warm.residual) == pytest.approx(float(expected))


def test_a_jump_is_seen_and_restart_forgets_it() -> None:
    before, after = walk(1, 0.5)
    warm = WarmInverse(before, 2)
    inverse(after, warm)
    assert not float(warm.residual) <= WarmInverse.LIMIT
    warm.restart(after)
    assert float(warm.residual) == 0
    assert relative_error(inverse(after, warm), torch.linalg.inv(after)) < 1e-9


def test_the_gradient_is_that_of_the_inverse() -> None:
    before, after = walk(1, 1e-3)
    after.requires_grad_()
    upstream = torch.randn(after.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad((inverse(after, WarmInverse(before, 3)) * upstream).sum(), after)
    (expected,) = torch.autograd.grad((torch.linalg.inv(after) * upstream).sum(), after)
    assert relative_error(found, expected) < 1e-8
