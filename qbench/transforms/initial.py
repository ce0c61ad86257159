"""Where a learnable scale starts: balancing activation ranges against weight ranges.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) eq. 4: s_j = a_j^α / w_j^(1−α). OmniQuant and AffineQuant start
from the same values. We differ from AffineQuant's code, which takes the signed maximum of the weight (a slip that
OmniQuant corrected in its pull request 42): w_j = max |W_ij|.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 1e-5  # the authors' clamp of both a_j and s_j


def smooth_scale(act_absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Per-channel scale [in].

    Args:
        act_absmax: Largest |x_j| over the calibration set, [in].
        weights: Consumers [out, in] whose column maxima are taken together.
        alpha: Share of the difficulty moved from activations to weights, 0 to 1.
    """
    column_max = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp(min=FLOOR)
    scale = act_absmax.clamp(min=FLOOR).pow(alpha) / column_max.pow(1 - alpha)
    return scale.clamp(min=FLOOR)


def reduce_to_groups(per_channel: Tensor, n_groups: int, repeats: int) -> Tensor:
    """Largest value over the query heads that share a key/value head: [heads·width] → [groups·width]."""
    if repeats == 1:
        return per_channel
    return per_channel.reshape(n_groups, repeats, -1).amax(1).reshape(-1)
