"""Weight clipping: factors that shrink the range which the grid must cover, learned or searched.

Learned (LWC): OmniQuant (arXiv 2308.13137) §3.2: top = σ(u)·max, bottom = σ(l)·min, u and l start at 4 (σ = 0.982).
Searched: AWQ (arXiv 2306.00978), reference mit-han-lab/llm-awq@d6e797a, quantize/auto_clip.py:12-60.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qbench.quant.grid import Grid
from qbench.quant.uniform import extremes, round_to_nearest

INITIAL_LOGIT = 4.0
CLIP_STEPS, CLIP_UNIT = 10, 20  # the authors' max_shrink · n_grid and n_grid: 1.00, 0.95, … 0.55
PRODUCTS = 1 << 26  # partial products held at once, 256 MB


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

    @torch.no_grad()
    def set_range(self, role: str, weight: Tensor, low: Tensor, high: Tensor, grid: Grid) -> None:
        """Make `ranges` of this weight give (low, high), each [out, groups] and inside the weight's own range."""
        for logits, end, own in zip(
            (self.lower, self.upper), (low, high), extremes(weight, grid), strict=True
        ):
            factor = torch.where(own == 0, torch.ones_like(own), end / own)
            logits[role].copy_(factor.logit())  # infinite where nothing is clipped: σ gives exactly 1

    def logits(self, role: str) -> tuple[Tensor, Tensor]:
        """(upper, lower) logits of one linear."""
        return self.upper[role], self.lower[role]

    def ranges(self, role: str, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Clipped (low, high) of a weight, each [out, groups]."""
        low, high = extremes(weight, grid)
        upper, lower = (logit.detach().to(weight.dtype).sigmoid() for logit in self.logits(role))
        return low * lower, high * upper


@torch.no_grad()
def search_range(weight: Tensor, inputs: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Symmetrically clipped ranges that leave the least error in each group's part of the linear's output.

    Every group's weights are cut to ±c·max|w| for c = 1, 0.95, … 0.55 and rounded; the error is that of the partial
    product Σ_j x_j·w_j over the group, mean square over tokens. Of equal errors the least clipped is kept.

    Args:
        weight: [out, in].
        inputs: Rows of the linear's input, [tokens, in].
        grid: Bits, symmetry, group size.

    Returns:
        (low, high), each [out, groups].
    """
    low, high = extremes(weight, grid)
    limit = torch.maximum(low.abs(), high.abs())
    x = grid.split(inputs).transpose(0, 1)  # [groups, tokens, group size]
    rows = max(1, PRODUCTS // (x.shape[0] * x.shape[1]))
    best_low, best_high = low.clone(), high.clone()
    for part in (slice(start, start + rows) for start in range(0, len(weight), rows)):
        w = weight[part]
        best = torch.full_like(low[part], torch.inf)
        for step in range(CLIP_STEPS):
            bound = limit[part] * (1 - step / CLIP_UNIT)
            bottom, top = low[part].clamp(-bound, bound), high[part].clamp(-bound, bound)
            change = round_to_nearest(w, bottom, top, grid).dequantize() - w
            products = x @ grid.split(change).permute(1, 2, 0)  # [groups, tokens, rows]
            error = products.square().mean(1).T
            better = error < best
            best = torch.where(better, error, best)
            best_low[part] = torch.where(better, bottom, best_low[part])
            best_high[part] = torch.where(better, top, best_high[part])
    return best_low, best_high
