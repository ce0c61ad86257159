"""Gradual mask: which entries of a matrix may act in an epoch, and how strongly.

AffineQuant (arXiv 2403.12544) §3.3; reference bytedance/AffineQuant@0f3ba93, quantize/affinequant.py:226-260.
Γ_ij = 1 on the diagonal, the stability factor where 0 < |i − j| < k_e, 0 elsewhere, with
k_e = int((n − 1)/(E − 1)·e) + 1 in epoch e of E. The effective matrix is P ∘ Γ. We differ: exact integers
(theirs, in floating point, ends one band short for n = 4096, E = 20), and E = 1 gives the full band (theirs
divides by zero).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bandwidth(size: int, epoch: int, epochs: int) -> int:
    """Width k_e of the active band: 1 is the diagonal alone, `size` everything."""
    if epochs <= 1:
        return size
    return (size - 1) * min(epoch, epochs - 1) // (epochs - 1) + 1


def gradual_mask(size: int, band: int, stability_factor: float, like: Tensor) -> Tensor:
    """Γ, [size, size], on the device and in the dtype of `like`."""
    index = torch.arange(size, device=like.device)
    distance = (index[:, None] - index[None, :]).abs()
    mask = (distance < band).to(like.dtype).mul_(stability_factor)
    return mask.fill_diagonal_(1.0)
