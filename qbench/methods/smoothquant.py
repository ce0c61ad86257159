"""SmoothQuant: move the difficulty of quantizing activations into the weights by a diagonal.

Paper: Xiao et al. 2022, arXiv 2211.10438, eq. 4; reference mit-han-lab/smoothquant@c61476d, smoothquant/smooth.py.
We differ: the scheme's own bits instead of W8A8 per tensor; activations quantized per token; the sites after v
and after up/fc1 are available (not in the paper; off by default); statistics come from the run's calibration set.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from qbench.engine.plan import BlockPlan, BlockView, Needs
from qbench.methods.base import Method
from qbench.models.base import BlockSpec
from qbench.scheme import Scheme
from qbench.transforms.initial import reduce_to_groups, smooth_scale
from qbench.transforms.transform import DiagonalTransform

SiteName = Literal["attn_in", "mlp_in", "value_out", "mlp_out"]


class SmoothQuant(Method):
    """Fold a per-channel scale between activations and weights into the norms."""

    name: ClassVar[str] = "smoothquant"
    paper: ClassVar[str] = "https://arxiv.org/abs/2211.10438"

    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the difficulty moved to the weights. Preset: 0.5 on OPT, 0.8 on LLaMA.",
    )
    sites: tuple[SiteName, ...] = Field(
        ("attn_in", "mlp_in"),
        description="Where scales are put; value_out (v→o) and mlp_out (up→down) where legal.",
    )

    @property
    def needs(self) -> Needs:
        """Largest absolute activations."""
        return Needs(activation_stats=True)

    def resolve(self, scheme: Scheme, spec: BlockSpec) -> Self:
        """See `Method`."""
        if self.alpha is not None:
            return self
        return self.model_copy(update={"alpha": 0.5 if spec.recipes == "opt" else 0.8})

    def check(self, scheme: Scheme, spec: BlockSpec) -> None:
        """See `Method`."""
        super().check(scheme, spec)
        for site in self.sites:
            spec.site(site)

    def plan(self, view: BlockView) -> BlockPlan:
        """See `Method`."""
        transforms = []
        assert self.alpha is not None
        for name in self.sites:
            site = view.spec.site(name)
            weights = [view.tensors.weight[role] for role in site.consumers]
            scale = smooth_scale(view.stats[site.observed].absmax, weights, self.alpha)
            if site.kind == "value":
                scale = reduce_to_groups(scale, view.spec.n_kv_heads, view.spec.heads_per_group)
            transforms.append(DiagonalTransform(view.spec, site, scale))
        return BlockPlan(transforms)

    @classmethod
    def presets(cls) -> dict[str, str]:
        """See `Method`."""
        return {
            "OPT": "alpha 0.5 (the paper's)",
            "LLaMA": "alpha 0.8 (the authors' range for LLaMA is 0.75–0.85)",
        }
