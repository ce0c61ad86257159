"""Learnable weight clipping (LWC): one pair of logits per scale, shrinking the range that the grid must cover.

OmniQuant (arXiv 2308.13137) §3.2: top = σ(u)·max, bottom = σ(l)·min, u and l start at 4 (σ = 0.982).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qbench.quant.grid import Grid
from qbench.quant.uniform import extremes

INITIAL_LOGIT = 4.0


class Clipping(nn.Module):
    """Clipping logits of every linear of one block.

    Attributes:
        upper: Logits by linear role, each [out, groups].
        lower: Likewise for the lower ends.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], grid: Grid, device: torch.device | str = "cpu"):
        super().__init__()

        def logits() -> nn.ParameterDict:
            return nn.ParameterDict(
                {
                    role: nn.Parameter(torch.full((rows, grid.n_groups(cols)), INITIAL_LOGIT, device=device))
                    for role, (rows, cols) in shapes.items()
                }
            )

        self.upper, self.lower = logits(), logits()

    def logits(self, role: str) -> tuple[Tensor, Tensor]:
        """(upper, lower) logits of one linear."""
        return self.upper[role], self.lower[role]

    def ranges(self, role: str, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Clipped (low, high) of a weight, each [out, groups]."""
        low, high = extremes(weight, grid)
        upper, lower = (logit.detach().to(weight.dtype).sigmoid() for logit in self.logits(role))
        return low * lower, high * upper
