"""Transform: learnable parameters at one site, and what it costs to keep them.

A transform builds a map (`maps.py`) and a shift from its parameters and hands them to `sites.rewrite`. The same
`apply` trains (float32, with gradients) and folds (float64, on a copy).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qbench.models.base import BlockSpec, Site
from qbench.transforms.maps import Blocks, Diagonal, Map, Rotations, WarmInverse
from qbench.transforms.mask import bandwidth, gradual_mask
from qbench.transforms.sites import rewrite
from qbench.transforms.tensors import BlockTensors

Guard = Literal["diagonal", "all"]
SMALL_STEPS = (
    0.05  # stability factors up to here keep ‖I − BY‖ near 0.01 per step: one Newton–Schulz iteration
)
GUARD_MIN = 1e-2  # truncate_number of both authors' codes


@dataclass(frozen=True)
class TransformCost:
    """What remains of a transform after folding.

    Attributes:
        foldable: Nothing of it is computed at run time. Biases that it adds to linears count as folded; their bits are
            in `BlockState.weight_bits`, once however many transforms share them.
        stored_bits: Bits per block of what stays at run time.
        flops_per_token: Per block, multiply and add counted separately.
    """

    foldable: bool
    stored_bits: int
    flops_per_token: int


class Transform(nn.Module):
    """A map and a shift at one site. Subclasses hold the map's parameters."""

    kind = "shift"
    learning_rate: float | None = None  # where it differs from that of the plan's other transforms

    def __init__(self, spec: BlockSpec, site: Site, shift: Tensor | None = None):
        """Keep the site and, if given, a learnable shift that starts at `shift` [channels]."""
        super().__init__()
        self.spec, self.site = spec, site
        self.shift = None if shift is None else nn.Parameter(shift.clone())

    @property
    def function_preserving(self) -> bool:
        """False only for published forms that do not commute with rotary embedding."""
        return True

    @property
    def note(self) -> str | None:
        """What the row says of a transform that does not preserve the function."""
        return None if self.function_preserving else f"{self.site.name} transform does not commute with RoPE"

    def build_map(self) -> Map | None:
        """A, differentiable in the parameters."""
        return None

    def apply_to(self, tensors: BlockTensors) -> None:
        """Rewrite the block's tensors in place."""
        rewrite(tensors, self.spec, self.site, self.build_map(), self.shift)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch; matrices widen their band."""

    def guard_(self) -> None:
        """Keep the map away from singularity, in place, before each optimizer step."""

    def warm_up(self) -> None:
        """Begin inverting by warm-started products, where the map has a large inverse; called before each epoch."""

    def cool_down(self) -> None:
        """Go back to direct inverses."""

    def residual(self) -> float | None:
        """Largest ‖I − AX‖ that warm-started inverses met since `warm_up`, or None."""
        return None

    def condition(self) -> float | None:
        """Largest 2-norm condition number over the map's groups, or None for a diagonal."""
        return None

    def folded_copy(self) -> Transform:
        """A float64 copy without gradients, for the fold."""
        shared: dict[int, object] = {id(self.spec): self.spec, id(self.site): self.site}
        warm = getattr(self, "warm", None)
        if warm is not None:  # the fold inverts directly
            shared[id(warm)] = None
        folded = copy.deepcopy(self, shared)
        folded.cool_down()
        return folded.double().requires_grad_(False)

    def cost(self) -> TransformCost:
        """Cost after folding, for one block."""
        if not self.shift_stays:
            return TransformCost(True, 0, 0)
        return TransformCost(False, 16 * self.spec.hidden_size, self.spec.hidden_size)

    @property
    def shift_stays(self) -> bool:
        """Whether the shift leaves a bias behind an RMSNorm, which has none to absorb it."""
        return self.shift is not None and self.site.kind == "norm" and not self.spec.norm_bias


class DiagonalTransform(Transform):
    """A positive or negative scale per channel, optionally tied within rotary pairs."""

    kind = "diagonal"

    def __init__(
        self,
        spec: BlockSpec,
        site: Site,
        scale: Tensor,
        shift: Tensor | None = None,
        *,
        paired: bool = False,
    ):
        """Start at `scale` [channels]; `paired` ties channels i and i + width/2 (starts at their mean)."""
        super().__init__(spec, site, shift)
        groups = spec.n_kv_heads if site.kind in ("value", "query_key") else 1
        grouped = scale.reshape(groups, -1)
        if paired:
            grouped = grouped.reshape(groups, 2, -1).mean(1)
        self.paired = paired
        self.scale = nn.Parameter(grouped.clone())

    @property
    def function_preserving(self) -> bool:
        """An unpaired scale does not commute with rotary embedding."""
        return self.site.kind != "query_key" or self.paired or not self.spec.rope

    def build_map(self) -> Map:
        """See `Transform`."""
        return Diagonal(torch.cat((self.scale, self.scale), -1) if self.paired else self.scale)

    @torch.no_grad()
    def guard_(self) -> None:
        """See `Transform`."""
        _push_from_zero(self.scale)


class MatrixTransform(Transform):
    """A matrix per head, or one full matrix, under the gradual mask."""

    kind = "matrix"

    def __init__(
        self,
        spec: BlockSpec,
        site: Site,
        diagonal: Tensor,
        shift: Tensor | None = None,
        *,
        stability_factor: float,
        guard: Guard = "diagonal",
        gradual: bool = True,
    ):
        """Start at diag(`diagonal`) [channels]; heads are blocks, a norm site is one block."""
        super().__init__(spec, site, shift)
        groups = spec.n_kv_heads if site.kind in ("value", "query_key") else 1
        self.matrix = nn.Parameter(torch.diag_embed(diagonal.reshape(groups, -1)))
        self.stability_factor, self.guard, self.gradual = stability_factor, guard, gradual
        self.warm: WarmInverse | None = None  # kept once made: a captured step works in its buffers
        self.warm_now = False
        self.mask: Tensor
        self.register_buffer("mask", torch.empty_like(self.matrix[0]))
        self.set_epoch(0, 1)

    @property
    def function_preserving(self) -> bool:
        """A dense matrix does not commute with rotary embedding."""
        return self.site.kind != "query_key" or not self.spec.rope

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Fill the mask in place, so that a captured step sees the new band."""
        size = self.mask.shape[0]
        band = bandwidth(size, epoch, epochs) if self.gradual else size
        self.mask.copy_(gradual_mask(size, band, self.stability_factor, self.mask))

    def effective(self) -> Tensor:
        """P ∘ Γ, [groups, width, width]."""
        return self.matrix * self.mask

    def build_map(self) -> Map:
        """See `Transform`."""
        return Blocks.of(self.effective(), self.warm if self.warm_now else None)

    def warm_up(self) -> None:
        """See `Transform`; begins, or begins again, from the direct inverse of now."""
        current = self.effective().detach()
        if self.warm is None:
            self.warm = WarmInverse(current, 1 if self.stability_factor <= SMALL_STEPS else 2)
        else:
            self.warm.restart(current)
        self.warm_now = True

    def cool_down(self) -> None:
        """See `Transform`."""
        self.warm_now = False

    def residual(self) -> float | None:
        """See `Transform`."""
        return float(self.warm.residual) if self.warm is not None and self.warm_now else None

    @torch.no_grad()
    def guard_(self) -> None:
        """The diagonal, or in the published form every entry that has left zero."""
        _push_from_zero(self.matrix if self.guard == "all" else self.matrix.diagonal(dim1=-2, dim2=-1))

    @torch.no_grad()
    def condition(self) -> float:
        """See `Transform`; of the map that acts, scaled by its diagonal (which is folded exactly)."""
        effective = self.effective().double().cpu()
        scaled = effective / effective.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        return float(torch.linalg.cond(scaled).max())

    def cost(self) -> TransformCost:
        """A matrix after a norm stays at run time; per-head matrices fold."""
        shift = super().cost()
        if self.site.kind != "norm":
            return shift
        size = self.matrix.shape[-1]
        return TransformCost(False, shift.stored_bits + 16 * size**2, shift.flops_per_token + 2 * size**2)


class RotationTransform(Transform):
    """A scaled rotation per rotary pair: all that a matrix at `query_key` may be under rotary embedding."""

    kind = "rotation"

    def __init__(self, spec: BlockSpec, site: Site):
        """Start at the identity."""
        super().__init__(spec, site)
        shape = (spec.n_kv_heads, spec.head_dim // 2)
        self.a, self.b = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def build_map(self) -> Map:
        """See `Transform`."""
        return Rotations(self.a, self.b)

    @torch.no_grad()
    def guard_(self) -> None:
        """See `Transform`."""
        _push_from_zero(self.a)


class Compensation(Transform):
    """A learned rank-one term of one linear's weight: W + a·bᵀ, merged into the weight before it is rounded.

    Of ABQ-LLM (arXiv 2408.08554). It gives the rounded weight freedom, not the function another form: so it is the last
    transform and preserves nothing by itself. a starts at 0 and b at 1.
    """

    kind = "compensation"

    def __init__(self, spec: BlockSpec, role: str, learning_rate: float):
        """Sit at the weight of the linear `role`."""
        super().__init__(spec, Site(f"compensation_{role}", "hidden", role, (role,), role))
        self.learning_rate = learning_rate
        rows, columns = spec.shapes[role]
        self.a, self.b = nn.Parameter(torch.zeros(rows, 1)), nn.Parameter(torch.ones(1, columns))

    @property
    def function_preserving(self) -> bool:
        """See the class."""
        return False

    @property
    def note(self) -> str:
        """See `Transform`."""
        return f"a learned rank-one term was added to {self.site.producer} before rounding"

    def apply_to(self, tensors: BlockTensors) -> None:
        """See `Transform`."""
        role = self.site.producer
        tensors.settle_rows(role)
        tensors.settle_columns(role)
        tensors.weight[role] = tensors.weight[role] + self.a @ self.b


def _push_from_zero(x: Tensor) -> None:
    """Move entries with 0 < |x| < 1e-2 out to ±1e-2, in place (x may be a view)."""
    x.copy_(torch.where(x.abs() < GUARD_MIN, x.sign() * GUARD_MIN, x))


def apply_all(base: BlockTensors, transforms: Sequence[Transform], *, settle: bool = True) -> BlockTensors:
    """Tensors of the block after all transforms, in order; `base` is left as it was.

    Without `settle` diagonal factors of weights may be left pending (`BlockTensors.row_scale`).
    """
    tensors = base.copy()
    for transform in transforms:
        transform.apply_to(tensors)
    return tensors.settle() if settle else tensors


def fold(base: BlockTensors, transforms: Sequence[Transform]) -> BlockTensors:
    """The same in float64 and without gradients, for good; returned in the dtype of `base`."""
    with torch.no_grad():
        dtype = next(iter(base.weight.values())).dtype
        folded = apply_all(base.map(lambda t: t.double()), [t.folded_copy() for t in transforms])
        return folded.map(lambda t: t.to(dtype))
