"""How a map and a shift rewrite the tensors around one site, leaving the block's function as it was.

Paper: OmniQuant §3.3 (diagonal and shift), AffineQuant §3.2 (matrices). Reference: bytedance/AffineQuant@0f3ba93,
models/transformation.py. Algebra in the row convention of `maps.py`; GQA repeats one map over a key/value head's
query heads.
"""

from __future__ import annotations

from torch import Tensor

from qbench.models.base import BlockSpec, Site
from qbench.transforms.maps import Blocks, Diagonal, Map
from qbench.transforms.tensors import BlockTensors


def rewrite(tensors: BlockTensors, spec: BlockSpec, site: Site, a: Map | None, shift: Tensor | None) -> None:
    """Replace the tensors around `site` so that its activation becomes (x − shift)·A⁻¹.

    Args:
        tensors: Changed in place (its dictionaries, never the tensors themselves).
        spec: Heads and shapes.
        site: Where.
        a: The map; None is the identity.
        shift: δ, [channels of the site]; None is zero. Not defined for `query_key` and `mlp_out`.
    """
    if shift is not None:
        assert site.kind in ("norm", "value"), f"a shift at {site.name} would not preserve the function"
        _shift(tensors, spec, site, shift)
    if a is None:
        return
    if site.kind == "norm":
        _norm(tensors, site, a)
    elif site.kind == "query_key":
        (second,) = site.consumers
        _outputs(tensors, site.producer, a.repeat(spec.heads_per_group), undo=True)
        _outputs(tensors, second, a, undo=False)
    else:  # a value head or a hidden channel: producer's outputs, consumer's inputs
        _outputs(tensors, site.producer, a, undo=True)
        (consumer,) = site.consumers
        repeats = spec.heads_per_group if site.kind == "value" else 1
        _inputs(tensors, consumer, a.repeat(repeats))


def _shift(tensors: BlockTensors, spec: BlockSpec, site: Site, shift: Tensor) -> None:
    for role in site.consumers:
        seen = shift
        if site.kind == "value" and spec.heads_per_group > 1:
            heads = shift.reshape(spec.n_kv_heads, spec.head_dim)
            seen = heads.repeat_interleave(spec.heads_per_group, 0).reshape(-1)
        tensors.add_bias(role, tensors.times(role, seen))
    if site.kind == "norm":
        assert tensors.norm_matrix[site.producer] is None, (
            "a shift must come before a full matrix at the same norm"
        )
        tensors.add_norm_bias(site.producer, -shift)
    else:
        tensors.add_bias(site.producer, -shift)


def _norm(tensors: BlockTensors, site: Site, a: Map) -> None:
    norm = site.producer
    matrix = tensors.norm_matrix[norm]
    if not isinstance(a, Diagonal):  # does not commute with the norm's weight: stays behind it, at run time
        assert isinstance(a, Blocks) and a.inverse.shape[0] == 1, (
            "norm sites take a diagonal or one full matrix"
        )
        tensors.norm_matrix[norm] = a.inverse[0] if matrix is None else matrix @ a.inverse[0]
    elif matrix is not None:
        tensors.norm_matrix[norm] = a.undo_rows(matrix)
    else:  # folds into the norm's own weight and bias
        tensors.norm_weight[norm] = a.undo_rows(tensors.norm_weight[norm])
        bias = tensors.norm_bias[norm]
        if bias is not None:
            tensors.norm_bias[norm] = a.undo_rows(bias)
    for role in site.consumers:
        _inputs(tensors, role, a)


def _inputs(tensors: BlockTensors, role: str, a: Map) -> None:
    """W ← W·Aᵀ; a diagonal is left pending."""
    if isinstance(a, Diagonal):
        tensors.scale_columns(role, a.factors)
    else:
        tensors.settle_columns(role)
        tensors.weight[role] = a.apply_rows(tensors.weight[role])


def _outputs(tensors: BlockTensors, role: str, a: Map, *, undo: bool) -> None:
    """W ← A⁻ᵀ·W or A·W, and the bias; a diagonal is left pending."""
    if isinstance(a, Diagonal):
        tensors.scale_rows(role, 1 / a.factors if undo else a.factors)
    else:
        tensors.settle_rows(role)
        weight = tensors.weight[role]
        tensors.weight[role] = a.undo_outputs(weight) if undo else a.apply_outputs(weight)
    bias = tensors.bias[role]
    if bias is not None:
        tensors.bias[role] = a.undo_rows(bias) if undo else a.apply_rows(bias)
