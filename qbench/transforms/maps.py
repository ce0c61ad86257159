"""Linear maps that a transform applies: a diagonal, or a matrix per head.

Row convention throughout: an activation row x becomes x' = (x − δ)·A⁻¹ and its consumer W' = W·Aᵀ, so that
x'W'ᵀ + (b + Wδ) = xWᵀ + b. A diagonal A is a vector. Channels are split into `groups` of `width` (heads of
head_dim, or one group of everything).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TENSOR_CORE_ELEMENTS = 1 << 20
COARSE_DTYPE = torch.bfloat16  # of `_coarse_product`


class _Inverse(torch.autograd.Function):
    """Matrix inverse whose backward reuses the inverse: ∂L/∂A = −Xᵀ (∂L/∂X) Xᵀ with X = A⁻¹."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, warm: WarmInverse | None) -> Tensor:
        if warm is None:
            inverse, _ = torch.linalg.inv_ex(matrix)  # no error check: that would wait for the device
        else:
            inverse = warm.step(matrix)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        if _large(inverse):
            half = inverse.to(COARSE_DTYPE)
            left = half.mT @ grad.to(COARSE_DTYPE)
            return torch.baddbmm(left, left, half.mT, beta=0, alpha=-1).to(grad.dtype), None
        return -(inverse.mT @ grad @ inverse.mT), None


class WarmInverse:
    """Inverse of a matrix that changes little from step to step: Newton–Schulz from the last step's inverse.

    Y ← Y(2I − BY) for B = |D|^−½ A |D|^−½ sign(D) with D = diag(A), so that the diagonal, which varies by orders
    between channels, stays out of the arithmetic. Only products, so it runs on tensor cores, in a captured step and
    without waiting for the device. Whoever uses it looks at `residual` now and then (the engine: after each epoch) and
    falls back to the direct inverse above `LIMIT`.
    """

    LIMIT = 0.5  # ‖I − BY‖∞ before the last iteration; after it at most 0.25, and mostly far less

    def __init__(self, matrix: Tensor, iterations: int):
        """Begin at the direct inverse of [groups, n, n]."""
        self.iterations = iterations
        self.residual = torch.zeros((), device=matrix.device)
        self.scaled_inverse = torch.empty_like(matrix)
        self.identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(
            matrix
        )
        self.restart(matrix)

    @staticmethod
    def _scales(matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column factors that give the matrix a unit diagonal."""
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        root = diagonal.abs().rsqrt()
        return (root * diagonal.sign()).unsqueeze(-1), root.unsqueeze(-2)

    @torch.no_grad()
    def restart(self, matrix: Tensor) -> None:
        """Set to the direct inverse, in place."""
        rows, columns = self._scales(matrix)
        self.scaled_inverse.copy_(torch.linalg.inv(matrix * rows * columns))
        self.residual.zero_()

    def step(self, matrix: Tensor) -> Tensor:
        """Inverse of the matrix as it is now; remembers it and the largest residual met."""
        rows, columns = self._scales(matrix)
        scaled, y = matrix * rows * columns, self.scaled_inverse
        for _ in range(self.iterations):
            with tensor_cores(matrix):
                defect = torch.baddbmm(self.identity, scaled, y, alpha=-1)
            # the defect is small, so its product needs few digits
            y = y + _coarse_product(y, defect, y)
        self.residual.copy_(torch.maximum(self.residual, torch.linalg.vector_norm(defect, 1, -1).amax()))
        self.scaled_inverse.copy_(y)
        return y * columns.mT * rows.mT


@contextmanager
def tensor_cores(operand: Tensor) -> Iterator[None]:
    """TF32 products for large operands on a GPU: 7 times faster at 4096, relative error 3e-4; folds use float64."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed or _large(operand)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _large(operand: Tensor) -> bool:
    """Whether products with it are bound by arithmetic: on a GPU, from a million elements on."""
    return operand.is_cuda and operand.numel() >= TENSOR_CORE_ELEMENTS and operand.dtype == torch.float32


def _coarse_product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a @ b where three digits are enough: in a backward pass, whose gradient comes out of half-precision products."""
    if _large(_larger(a, b)):
        return (a.to(COARSE_DTYPE) @ b.to(COARSE_DTYPE)).to(like.dtype)
    return a @ b


class _Product(torch.autograd.Function):
    """a @ b for matrices or batches of them, under `tensor_cores`; its backward in half precision where that pays."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with tensor_cores(_larger(a, b)):
            return a @ b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad_a = _coarse_product(grad, b.mT, a) if ctx.needs_input_grad[0] else None
        grad_b = _coarse_product(a.mT, grad, b) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return a if a.numel() >= b.numel() else b


def inverse(matrix: Tensor, warm: WarmInverse | None = None) -> Tensor:
    """Inverse of [..., n, n]; one call per optimizer step serves weights and biases.

    A singular matrix gives non-finite entries, which the engine reports through the loss. With `warm` it is one
    warm-started Newton–Schulz step instead of a factorization.
    """
    return _Inverse.apply(matrix, warm)


class Map(Protocol):
    """A, acting on channels split into [groups, width]."""

    def undo_rows(self, x: Tensor) -> Tensor:
        """x·A⁻¹ for rows x [..., groups·width]: an activation, or the bias that produces it."""

    def apply_rows(self, x: Tensor) -> Tensor:
        """x·Aᵀ for rows x [..., groups·width]: a consumer's weight, or the second operand's bias."""

    def undo_outputs(self, weight: Tensor) -> Tensor:
        """A⁻ᵀ·W for a producer's weight [groups·width, in]."""

    def apply_outputs(self, weight: Tensor) -> Tensor:
        """A·W for the second operand's weight [groups·width, in]."""

    def repeat(self, times: int) -> Map:
        """The same map for `times` consecutive copies of each group (query heads of one key/value head)."""


@dataclass(frozen=True)
class Diagonal:
    """A = diag(scale), scale [groups, width]."""

    scale: Tensor

    @cached_property
    def factors(self) -> Tensor:
        """The diagonal over all channels, [groups·width]; the same tensor at each call."""
        return self.scale.reshape(-1)

    def undo_rows(self, x: Tensor) -> Tensor:
        """x / scale."""
        return x / self.factors

    def apply_rows(self, x: Tensor) -> Tensor:
        """x · scale."""
        return x * self.factors

    def undo_outputs(self, weight: Tensor) -> Tensor:
        """Rows divided by scale."""
        return weight / self.scale.reshape(-1, 1)

    def apply_outputs(self, weight: Tensor) -> Tensor:
        """Rows multiplied by scale."""
        return weight * self.scale.reshape(-1, 1)

    def repeat(self, times: int) -> Diagonal:
        """See `Map`."""
        return self if times == 1 else Diagonal(self.scale.repeat_interleave(times, 0))


@dataclass(frozen=True)
class Blocks:
    """A block-diagonal of matrices [groups, width, width] with its inverse (one group: a full matrix)."""

    matrix: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, matrix: Tensor, warm: WarmInverse | None = None) -> Blocks:
        """Invert once for all uses."""
        return cls(matrix, inverse(matrix, warm))

    def undo_rows(self, x: Tensor) -> Tensor:
        """x·A⁻¹ within each group."""
        return _rows_times(x, self.inverse)

    def apply_rows(self, x: Tensor) -> Tensor:
        """x·Aᵀ within each group."""
        if self.matrix.shape[0] == 1 and _large(self.matrix) and x.dim() > 1:
            return _NearDiagonalProduct.apply(x, self.matrix[0].mT)
        return _rows_times(x, self.matrix.mT)

    def undo_outputs(self, weight: Tensor) -> Tensor:
        """A⁻ᵀ·W within each group."""
        return _times_columns(self.inverse.mT, weight)

    def apply_outputs(self, weight: Tensor) -> Tensor:
        """A·W within each group."""
        return _times_columns(self.matrix, weight)

    def repeat(self, times: int) -> Blocks:
        """See `Map`."""
        if times == 1:
            return self
        return Blocks(self.matrix.repeat_interleave(times, 0), self.inverse.repeat_interleave(times, 0))


@dataclass(frozen=True)
class Rotations:
    """A = [[a, −b], [b, a]] on each pair of channels (i, i + width/2) of each group; a, b [groups, width/2].

    These scaled rotations are exactly the matrices that commute with rotary position embedding in the half-split
    layout of transformers. A⁻¹ = Aᵀ/(a² + b²). Applied as matrices: one product instead of six passes over a weight.
    """

    a: Tensor
    b: Tensor

    @cached_property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A and A⁻ᵀ, [groups, width, width] each."""
        first, second = _RotationMatrices.apply(self.a, self.b)
        return first, second

    def undo_rows(self, x: Tensor) -> Tensor:
        """x·A⁻¹."""
        return _rows_times(x, self._matrices[1].mT)

    def apply_rows(self, x: Tensor) -> Tensor:
        """x·Aᵀ."""
        return _rows_times(x, self._matrices[0].mT)

    def undo_outputs(self, weight: Tensor) -> Tensor:
        """A⁻ᵀ·W."""
        return _times_columns(self._matrices[1], weight)

    def apply_outputs(self, weight: Tensor) -> Tensor:
        """A·W."""
        return _times_columns(self._matrices[0], weight)

    def repeat(self, times: int) -> Rotations:
        """See `Map`."""
        if times == 1:
            return self
        return Rotations(self.a.repeat_interleave(times, 0), self.b.repeat_interleave(times, 0))


class _RotationMatrices(torch.autograd.Function):
    """A and A⁻ᵀ of rotations, [groups, width, width] each.

    With n = a² + b², u = a/n and w = b/n the second adds (∂L/∂u − 2a·s)/n to ∂L/∂a and (∂L/∂w − 2b·s)/n to ∂L/∂b, where
    s = u·∂L/∂u + w·∂L/∂w.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        groups, half = a.shape
        both = torch.stack((a, b))
        norm = both.square().sum(0)
        inverse = both / norm
        ctx.save_for_backward(both, norm, inverse)
        first, second = torch.cat((both, inverse), 1)  # a and b of both matrices, [2·groups, half] each
        entries = torch.cat((first, first, second, -second), -1)
        flat = a.new_zeros(2 * groups, 4 * half**2).index_copy_(1, _entries(half, a.device), entries)
        matrix, transposed = flat.view(2, groups, 2 * half, 2 * half).unbind()
        return matrix, transposed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_matrix: Tensor, grad_inverse: Tensor) -> tuple[Tensor, Tensor]:
        both, norm, inverse = ctx.saved_tensors
        _, groups, half = both.shape
        flat = torch.stack((grad_matrix, grad_inverse)).view(2, groups, -1)
        by_entry = flat.index_select(2, _entries(half, flat.device)).view(2, groups, 4, half).unbind(2)
        (direct_a, grad_u), (direct_b, grad_w) = by_entry[0] + by_entry[1], by_entry[2] - by_entry[3]
        grad = torch.stack((grad_u, grad_w))
        along = (inverse * grad).sum(0)
        grad.addcmul_(both, along, value=-2).div_(norm)
        return grad[0].add_(direct_a), grad[1].add_(direct_b)


@cache
def _entries(half: int, device: torch.device) -> Tensor:
    """Where a, a, b and −b of [[a, −b], [b, a]] are in the flat matrix, [4·half]."""
    first = torch.arange(half, device=device)
    second, width = first + half, 2 * half
    rows, columns = torch.cat((first, second, second, first)), torch.cat((first, second, first, second))
    return rows * width + columns


class _NearDiagonalProduct(torch.autograd.Function):
    """a @ b for a large b that is a diagonal and little else: the diagonal exactly, the rest as a coarse product.

    A transform's off-diagonal part is held down by the stability factor, so three digits of it are worth as much as
    TF32's three and a half of the whole, at half the time; the backward pass uses the same half-precision copies.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        coarse_a, coarse_b = a.to(COARSE_DTYPE), b.to(COARSE_DTYPE)
        ctx.needs = ctx.needs_input_grad
        ctx.save_for_backward(coarse_a, coarse_b)
        rest = coarse_a @ coarse_b.clone().fill_diagonal_(0)
        return torch.addcmul(rest, a, b.diagonal())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        coarse_a, coarse_b = ctx.saved_tensors
        coarse = grad.to(COARSE_DTYPE)
        grad_a = (coarse @ coarse_b.mT).to(grad.dtype) if ctx.needs[0] else None
        grad_b = (coarse_a.mT @ coarse).to(grad.dtype) if ctx.needs[1] else None
        return grad_a, grad_b


def _rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    groups, width, _ = matrix.shape
    if groups == 1:
        return _Product.apply(x.reshape(-1, width), matrix[0]).reshape(x.shape)
    rows = x.reshape(-1, groups, width).transpose(0, 1)  # [groups, rows, width]
    return _Product.apply(rows, matrix).transpose(0, 1).reshape(x.shape)


def _times_columns(matrix: Tensor, weight: Tensor) -> Tensor:
    groups, width, _ = matrix.shape
    return _Product.apply(matrix, weight.reshape(groups, width, -1)).reshape(weight.shape)
