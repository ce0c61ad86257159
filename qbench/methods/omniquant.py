"""OmniQuant: learn weight clipping and a diagonal equivalent transformation block by block.

Paper: Shao et al. 2023, arXiv 2308.13137, §3; reference OpenGVLab/OmniQuant@95fae1b, quantize/omniquant.py.
We differ (docs/methods/omniquant.md has the reasons): under rotary embedding the query–key scale is tied within
each pair of channels, so that it preserves the function (`query_key="published"` unties it); what is trained is
what is folded (theirs trains another `value_out` on OPT); grouped-query attention is supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from qbench.engine.initial import initial_scale, initial_shift
from qbench.engine.losses import mse, mse_with_auxiliary
from qbench.engine.plan import BlockPlan, BlockView, Needs, Training
from qbench.methods import authors
from qbench.methods.base import Method, query_key_notes
from qbench.models.base import BlockSpec
from qbench.quant.clipping import Clipping
from qbench.scheme import Scheme
from qbench.transforms.transform import DiagonalTransform, Transform

SiteName = Literal["attn_in", "mlp_in", "value_out", "query_key"]


class OmniQuant(Method):
    """Learned weight clipping (LWC) and learned diagonal transformation (LET)."""

    name: ClassVar[str] = "omniquant"
    paper: ClassVar[str] = "https://arxiv.org/abs/2308.13137"
    learns: ClassVar[bool] = True
    published_form: ClassVar[Mapping[str, Any]] = {"query_key": "published"}

    lwc: bool = Field(True, description="Learn weight clipping.")
    let: bool | None = Field(None, description="Learn the transformation. Preset: off for weight-only LLaMA.")
    sites: tuple[SiteName, ...] = Field(
        ("attn_in", "mlp_in", "value_out", "query_key"), description="Where the transformation sits."
    )
    shift: bool | None = Field(
        None, description="Learn a shift as well. Preset: on OPT with quantized activations only."
    )
    query_key: Literal["legal", "published"] = Field(
        "legal",
        description="Under rotary embedding: tie the scale within each pair, or the published untied form.",
    )
    epochs: int | None = Field(
        None, ge=1, description="Passes over the windows. Preset: 20; 40 for 2-bit weights."
    )
    let_lr: float | None = Field(None, gt=0, description="Learning rate of the transformation. Preset: 5e-3.")
    lwc_lr: float = Field(1e-2, gt=0, description="Learning rate of the clipping logits.")
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Initial balance of activations and weights. Preset: 0.5; OPT W4A4 0.75.",
    )
    aug_loss: bool | None = Field(
        None,
        description="Add the error to the full-precision block on the same input. Preset: LLaMA, W4A4 and 2-bit.",
    )
    parameters: str | None = Field(
        None, description="File of learned parameters (.pth) to use instead of training, as --resume FILE."
    )

    @property
    def needs(self) -> Needs:
        """Ranges of the activations, for the initial scales."""
        return Needs(activation_stats=self.let is not False and self.parameters is None)

    def resolve(self, scheme: Scheme, spec: BlockSpec) -> Self:
        """The recipes of the paper's scripts: specs by scheme and model."""
        weight_only = scheme.abits >= 16
        llama = spec.recipes == "llama"
        two_bits = weight_only and scheme.wbits <= 2
        recipe = {
            "let": not (llama and weight_only),
            "shift": spec.norm_bias and not weight_only,
            "epochs": 40 if two_bits else 20,
            "let_lr": 5e-3,
            "alpha": 0.5 if llama or weight_only or scheme.wbits > 4 else 0.75,
            "aug_loss": llama and (two_bits or (not weight_only and scheme.wbits <= 4)),
        }
        if self.parameters is not None:
            authors.refuse_training({name: getattr(self, name) for name in self.model_fields_set})
            recipe["parameters"] = authors.pinned(self.parameters)
        update = {k: v for k, v in recipe.items() if getattr(self, k) is None or k == "parameters"}
        return self.model_copy(update=update)

    def check(self, scheme: Scheme, spec: BlockSpec) -> None:
        """See `Method`; sites named by hand must exist, the default set drops what the model does not have."""
        super().check(scheme, spec)
        if "sites" in self.model_fields_set:
            for site in self.sites:
                spec.site(site)
        if self.parameters is not None:
            authors.check_parameters(self.parameters, spec, scheme, matrices=False)

    def notes(self, scheme: Scheme, spec: BlockSpec) -> list[str]:
        """See `Method`."""
        if self.parameters is not None:
            return [f"parameters read from {self.parameters}, not trained"]
        return query_key_notes(bool(self.let) and self.query_key == "published", spec, self.sites)

    def plan(self, view: BlockView) -> BlockPlan:
        """See `Method`."""
        if self.parameters is not None:
            return authors.plan_of(authors.read_parameters(self.parameters)[view.index], view, None)
        transforms: list[Transform] = []
        assert self.alpha is not None and self.epochs is not None and self.let_lr is not None
        for name in self.sites if self.let else ():
            if name not in view.spec.sites:
                continue
            site = view.spec.site(name)
            scale = initial_scale(view, site, self.alpha)
            shift = initial_shift(view, site) if self.shift and site.kind != "query_key" else None
            paired = site.kind == "query_key" and view.spec.rope and self.query_key == "legal"
            transforms.append(DiagonalTransform(view.spec, site, scale, shift, paired=paired))
        clipping = Clipping(view.spec.shapes, view.grid) if self.lwc and view.grid.bits < 16 else None
        training = None
        if transforms or clipping is not None:
            loss = mse_with_auxiliary if self.aug_loss else mse
            training = Training(self.epochs, self.let_lr, self.lwc_lr, loss, bool(self.aug_loss))
        return BlockPlan(transforms, clipping, training=training)

    @classmethod
    def presets(cls) -> dict[str, str]:
        """See `Method`."""
        return {
            "LLaMA, weight-only": "lwc, 20 epochs; 2 bits: lwc, aug_loss, 40 epochs",
            "LLaMA, W4A4": "lwc, let, aug_loss, alpha 0.5, 20 epochs",
            "LLaMA, W6A6 and other activations": "lwc, let, 20 epochs",
            "OPT, weight-only": "lwc, let, 20 epochs; 2 bits: 40 epochs",
            "OPT, W4A4": "lwc, let, shift, alpha 0.75, 20 epochs",
            "OPT, W6A6 and other activations": "lwc, let, shift, 20 epochs",
        }
