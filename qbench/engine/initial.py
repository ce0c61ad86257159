"""Initial values of learnable transforms, from a block's weights and its input statistics.

Shared by every method that learns a scale or a shift. OmniQuant §3.3; AffineQuant starts its matrices' diagonals there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.engine.plan import BlockView
from qbench.models.base import Site
from qbench.transforms.initial import reduce_to_groups, smooth_scale


def initial_scale(view: BlockView, site: Site, alpha: float) -> Tensor:
    """Scale per channel of the site: a^α / w^(1−α) of the linear observed there; 1 at `query_key`.

    As in both authors' codes the weight maxima are those of one consumer (q, up or fc1, o), not of all.
    """
    if site.kind == "query_key":
        return torch.ones(view.spec.n_kv_heads * view.spec.head_dim, device=view.tensors.weight["k"].device)
    weight, absmax = view.tensors.weight[site.observed], view.stats[site.observed].absmax
    if site.kind == "value" and view.spec.heads_per_group > 1:
        weight = _per_group(view, weight.abs().amax(0))[None]
        absmax = _per_group(view, absmax)
    return smooth_scale(absmax, [weight], alpha)


def initial_shift(view: BlockView, site: Site) -> Tensor:
    """The observed centre where norms have a bias (OPT); zero elsewhere."""
    stats = view.stats[site.observed]
    centre = stats.centre if view.spec.norm_bias else torch.zeros_like(stats.centre)
    return _per_group(view, centre) if site.kind == "value" else centre


def _per_group(view: BlockView, per_channel: Tensor) -> Tensor:
    return reduce_to_groups(per_channel, view.spec.n_kv_heads, view.spec.heads_per_group)
