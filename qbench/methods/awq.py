"""AWQ: scale up the weight channels that meet large activations, by a searched diagonal; then search clipping.

Paper: Lin et al. 2023, arXiv 2306.00978, §3.2; reference mit-han-lab/llm-awq@d6e797a, quantize/auto_scale.py and
auto_clip.py. We differ (docs/methods/awq.md has the reasons): ranges contain zero, as ours always do; a stored scale is
float16 already while searching; under grouped-query attention v → o gets one scale per key/value channel where theirs
skips it (`grouped_values`); statistics come from the run's calibration set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from qbench.engine.plan import BlockPlan, BlockView, Needs
from qbench.errors import NumericalError
from qbench.methods.base import Method
from qbench.models.base import BlockSpec, Site
from qbench.quant.clipping import Clipping, search_range
from qbench.quant.gptq import output_error
from qbench.quant.grid import Grid
from qbench.quant.uniform import extremes, round_to_nearest
from qbench.scheme import Scheme
from qbench.transforms.tensors import BlockTensors
from qbench.transforms.transform import DiagonalTransform

SiteName = Literal["attn_in", "value_out", "mlp_in", "mlp_out"]
SCALE_FLOOR = 1e-4  # the authors' clamp of a^r


class AWQ(Method):
    """Activation-aware scales and clipping, searched on full-precision inputs."""

    name: ClassVar[str] = "awq"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.00978"
    published_form: ClassVar[Mapping[str, Any]] = {"grouped_values": False}

    sites: tuple[SiteName, ...] = Field(
        ("attn_in", "value_out", "mlp_in", "mlp_out"), description="Where scales are searched."
    )
    grouped_values: bool = Field(
        True,
        description="Under grouped-query attention scale v to o too, by key/value channel; the authors do not.",
    )
    ratios: int = Field(20, ge=1, description="Exponents r = 0, 1/n, … (n − 1)/n tried at each site.")
    search_tokens: int = Field(
        65536, ge=1, description="Tokens on which scales are compared (the authors' 128 windows of 512)."
    )
    clip: bool = Field(True, description="Search clipping for every linear but q and k.")
    clip_tokens: int = Field(512, ge=1, description="Tokens on which clipping is compared.")

    @property
    def needs(self) -> Needs:
        """Mean absolute activations."""
        return Needs(activation_stats=True)

    def check(self, scheme: Scheme, spec: BlockSpec) -> None:
        """See `Method`; sites named by hand must exist, the default set drops what the model does not have."""
        super().check(scheme, spec)
        if "sites" in self.model_fields_set:
            for site in self.sites:
                spec.site(site)

    def notes(self, scheme: Scheme, spec: BlockSpec) -> list[str]:
        """See `Method`."""
        if scheme.wbits < 16 and scheme.attention_bits != (16, 16):
            return ["awq searched with full-precision activations: it is published for weights only"]
        return []

    def plan(self, view: BlockView) -> BlockPlan:
        """All sites on the block as it is, then clipping on the block with all scales."""
        if view.grid.bits >= 16:
            return BlockPlan()
        transforms = [self._scaled(view, view.spec.sites[name]) for name in self._sites(view.spec)]
        return BlockPlan(
            list(transforms), self._clipping(view.after(transforms, stats=False)) if self.clip else None
        )

    def _sites(self, spec: BlockSpec) -> list[str]:
        grouped = spec.shapes["v"][0] != spec.shapes["o"][1]
        return [
            name
            for name in self.sites
            if name in spec.sites and (name != "value_out" or self.grouped_values or not grouped)
        ]

    def _scaled(self, view: BlockView, site: Site) -> DiagonalTransform:
        """The diagonal a^r of one site with the least error in the output of what reads it."""
        assert view.probe is not None
        spec, own = view.spec, view.tensors.weight
        importance = view.stats[site.observed].absmean
        assert importance is not None
        repeats = spec.heads_per_group if site.kind == "value" else 1
        if repeats > 1:  # one scale per key/value channel: the mean over the query heads that read it
            importance = importance.reshape(spec.n_kv_heads, repeats, -1).mean(1).reshape(-1)
        error_of = self._errors(view, site)
        best, least = None, (math.inf, 0)
        # The best exponent is seldom near an end: from the middle on, those that cannot win are found out early.
        for i in sorted(range(self.ratios), key=lambda i: abs(2 * i - self.ratios)):
            scale = candidate_scale(importance, i / self.ratios)
            columns = scale
            if repeats > 1:
                columns = scale.reshape(spec.n_kv_heads, -1).repeat_interleave(repeats, 0).reshape(-1)
            tensors = view.tensors.copy()
            for role in site.consumers:
                tensors.weight[role] = _rounded(own[role] * columns, view.grid) / columns
            found = error_of(tensors, least[0]), i
            if found < least:  # of equal errors the smallest exponent
                best, least = scale, found
        if best is None:
            raise NumericalError(
                f"awq found no finite error at {site.name}: is a weight or an activation not finite? "
                "Try --autocast float32."
            )
        return DiagonalTransform(spec, site, best)

    def _errors(self, view: BlockView, site: Site) -> Callable[[BlockTensors, float], float]:
        """(tensors, limit) → mean squared error of what the authors compare, or infinity if it is above the limit.

        Compared are the outputs of a site's only consumer, else of the module that holds the consumers. The error of a
        single linear follows from its input's second moment: then a candidate costs the same for any number of tokens,
        and less where there are more of them than inputs.
        """
        assert view.probe is not None
        role, own = site.consumers[0], view.tensors.weight[site.consumers[0]]
        path, single = view.spec.linears[role], len(site.consumers) == 1
        if not single or view.probe.tokens(self.search_tokens) <= own.shape[1]:
            compared = path if single else path.rpartition(".")[0]
            return view.probe.part(compared, self.search_tokens).error
        moment = view.probe.second_moment(path, self.search_tokens)
        return lambda tensors, limit: output_error(own, moment, tensors.weight[role]) / len(own)

    def _clipping(self, view: BlockView) -> Clipping:
        """Searched ranges; q and k keep theirs, because their product is what counts."""
        assert view.probe is not None
        weights = view.tensors.weight
        clipping = Clipping(view.spec.shapes, view.grid, next(iter(weights.values())).device)
        for roles in view.spec.shared_inputs:
            clipped = [role for role in roles if role not in ("q", "k")]
            inputs = (
                view.probe.sample(view.spec.linears[clipped[0]], self.clip_tokens) if clipped else Tensor()
            )
            for role in roles:
                weight = weights[role]
                ranges = (
                    search_range(weight, inputs, view.grid)
                    if role in clipped
                    else extremes(weight, view.grid)
                )
                clipping.set_range(role, weight, *ranges, view.grid)
        return clipping.requires_grad_(False)


def candidate_scale(importance: Tensor, ratio: float) -> Tensor:
    """s = a^r, floored, and normalised so that its largest and smallest entry are each other's inverse."""
    scale = importance.pow(ratio).clamp(min=SCALE_FLOOR)
    return scale / (scale.max() * scale.min()).sqrt()


def _rounded(weight: Tensor, grid: Grid) -> Tensor:
    return round_to_nearest(weight, *extremes(weight, grid), grid).dequantize()
