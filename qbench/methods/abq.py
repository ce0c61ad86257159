"""ABQ-LLM: OmniQuant's parameters under other losses, rank-one compensation, and a bit-balanced two-bit grid.

Paper: Zeng et al. 2024, arXiv 2408.08554; reference bytedance/ABQ-LLM@de2e849, algorithm/. We differ
(docs/methods/abq.md has the reasons): the query–key scale is tied within rotary pairs (`query_key="published"`
unties it); the attention term compares the maps themselves (`attention_loss="published"` gives theirs); bit balance
is off unless asked for, and concerns weights only; a key/value head starts from the largest of its query heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from qbench.engine.initial import initial_scale, initial_shift
from qbench.engine.losses import (
    attention_divergence,
    distribution_correction,
    mse_with_auxiliary,
    published_attention_divergence,
    total,
)
from qbench.engine.plan import BlockPlan, BlockView, Needs, Training
from qbench.errors import UnsupportedSchemeError
from qbench.methods.base import Method, query_key_notes
from qbench.models.base import BlockSpec
from qbench.quant.clipping import Clipping
from qbench.scheme import Scheme
from qbench.transforms.transform import Compensation, DiagonalTransform, Transform

SiteName = Literal["attn_in", "mlp_in", "value_out", "query_key", "mlp_out"]
LONG_RECIPES = ("W2A16", "W2A6", "W2A8", "W8A8")  # 40 epochs instead of 20
FIRST_COMPENSATED, LAST_COMPENSATED = 3, 4  # blocks from either end


class ABQ(Method):
    """Learned clipping and diagonal transformation under distribution-correcting and attention-aware losses."""

    name: ClassVar[str] = "abq"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.08554"
    learns: ClassVar[bool] = True
    published_form: ClassVar[Mapping[str, Any]] = {
        "query_key": "published",
        "attention_loss": "published",
        "compensation_lr": 1e-2,
    }

    lwc: bool = Field(True, description="Learn weight clipping.")
    let: bool = Field(True, description="Learn the transformation, and with it the compensation.")
    sites: tuple[SiteName, ...] = Field(
        ("attn_in", "mlp_in", "value_out", "query_key", "mlp_out"),
        description="Where the transformation sits; mlp_out on LLaMA only.",
    )
    shift: bool | None = Field(
        None, description="Learn a shift as well. Preset: on OPT with quantized activations only."
    )
    query_key: Literal["legal", "published"] = Field(
        "legal",
        description="Under rotary embedding: tie the scale within each pair, or the published untied form.",
    )
    compensation: bool = Field(
        True,
        description="Learn a rank-one term of down or fc2 in the first three and the last four blocks.",
    )
    bit_balance: bool = Field(
        False, description="Five levels instead of four for 2-bit weights (W2*), stored in 2.33 bits."
    )
    correction_loss: bool = Field(
        True, description="Add −log of the cosine similarity to both targets; off: the two squared errors."
    )
    attention_loss: Literal["maps", "published", "off"] = Field(
        "maps",
        description="Divergence of the attention maps per row, the form of the authors' code, or none.",
    )
    epochs: int | None = Field(
        None, ge=1, description="Passes over the windows. Preset: 20; 40 for W2A16, W2A8, W2A6 and W8A8."
    )
    let_lr: float = Field(5e-3, gt=0, description="Learning rate of the transformation.")
    lwc_lr: float = Field(1e-2, gt=0, description="Learning rate of the clipping logits.")
    compensation_lr: float = Field(
        1e-3, gt=0, description="Learning rate of the compensation. Authors' code: 1e-2."
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Initial balance of activations and weights.")

    @property
    def needs(self) -> Needs:
        """Ranges of the activations, for the initial scales."""
        return Needs(activation_stats=self.let)

    def resolve(self, scheme: Scheme, spec: BlockSpec) -> Self:
        """The recipes of the authors' scripts."""
        long = f"W{scheme.wbits}A{scheme.abits}" in LONG_RECIPES
        recipe = {"shift": spec.norm_bias and scheme.abits < 16, "epochs": 40 if long else 20}
        return self.model_copy(update={k: v for k, v in recipe.items() if getattr(self, k) is None})

    def check(self, scheme: Scheme, spec: BlockSpec) -> None:
        """See `Method`; bit balance is for two bits with zero points, and named sites must exist."""
        super().check(scheme, spec)
        if self.bit_balance and scheme.wbits != 2:
            raise UnsupportedSchemeError(
                f"bit_balance is a five-level grid for 2-bit weights, {scheme} has {scheme.wbits}. Leave it out, or "
                "choose W2A16, W2A8 or another W2 scheme."
            )
        if self.bit_balance and scheme.symmetric:
            raise UnsupportedSchemeError(
                f"bit_balance needs zero points, {scheme} stores none. Leave out -sym: five levels over a range of "
                "equal ends are symmetric by themselves."
            )
        if "sites" in self.model_fields_set:
            for site in map(spec.site, self.sites):
                if site.positive:
                    raise UnsupportedSchemeError(
                        f"A learned scale at {site.name} may turn negative, which the ReLU between {site.producer} "
                        f"and {site.observed} does not pass on. Leave {site.name} out for this model."
                    )

    def notes(self, scheme: Scheme, spec: BlockSpec) -> list[str]:
        """See `Method`."""
        notes = query_key_notes(self.let and self.query_key == "published", spec, self.sites)
        if self.bit_balance:
            notes.append("W2*: five levels, stored as three codes in 7 bits and counted so")
        return notes

    def plan(self, view: BlockView) -> BlockPlan:
        """See `Method`."""
        assert self.epochs is not None
        grid = view.grid
        if self.bit_balance:
            grid = replace(grid, extra_level=True)
        transforms = [*self._transforms(view), *self._compensations(view)] if self.let else []
        clipping = Clipping(view.spec.shapes, grid) if self.lwc and grid.bits < 16 else None
        training = None
        if transforms or clipping is not None:
            terms = [distribution_correction if self.correction_loss else mse_with_auxiliary]
            if self.attention_loss != "off":
                maps = self.attention_loss == "maps"
                terms.append(attention_divergence if maps else published_attention_divergence)
            training = Training(
                self.epochs,
                self.let_lr,
                self.lwc_lr,
                total(*terms),
                same_input_target=True,
                attention_maps=self.attention_loss != "off",
            )
        return BlockPlan(transforms, clipping, training=training, grid=grid)

    def _transforms(self, view: BlockView) -> list[Transform]:
        transforms: list[Transform] = []
        for name in self.sites:
            site = view.spec.sites.get(name)
            if site is None or site.positive:  # a learned scale may turn negative
                continue
            scale = initial_scale(view, site, self.alpha)
            shift = initial_shift(view, site) if self.shift and site.kind in ("norm", "value") else None
            paired = site.kind == "query_key" and view.spec.rope and self.query_key == "legal"
            transforms.append(DiagonalTransform(view.spec, site, scale, shift, paired=paired))
        return transforms

    def _compensations(self, view: BlockView) -> list[Transform]:
        outer = view.index < FIRST_COMPENSATED or view.index >= view.n_blocks - LAST_COMPENSATED
        if not (self.compensation and outer and view.grid.bits < 16):
            return []
        return [
            Compensation(view.spec, role, self.compensation_lr)
            for role in ("down", "fc2")
            if role in view.spec.shapes
        ]

    @classmethod
    def presets(cls) -> dict[str, str]:
        """See `Method`."""
        return {
            "every scheme": "lwc, let, compensation, both losses, alpha 0.5, 20 epochs",
            "W2A16, W2A8, W2A6, W8A8": "the same, 40 epochs",
            "OPT with quantized activations": "the same, with shift",
        }
