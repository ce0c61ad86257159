"""AffineQuant: learn affine equivalent transformations (matrices, not only diagonals) and weight clipping.

Paper: Ma et al. 2024, arXiv 2403.12544, §3; reference bytedance/AffineQuant@0f3ba93, quantize/affinequant.py.
We differ (docs/methods/affinequant.md has the reasons): under rotary embedding the query–key transform is a scaled
rotation or a tied scale per channel pair (`query_key="published"` for the dense or untied form); only diagonals
are kept away from zero (`truncate="all"` for every entry); initial scales use |W|; the mask uses exact integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from qbench.engine.initial import initial_scale, initial_shift
from qbench.engine.losses import mse, mse_with_auxiliary
from qbench.engine.plan import BlockPlan, BlockView, Needs, Training
from qbench.errors import ConfigError
from qbench.methods import authors
from qbench.methods.base import Method, query_key_notes
from qbench.models.base import BlockSpec, Site
from qbench.quant.clipping import Clipping
from qbench.scheme import Scheme
from qbench.transforms.transform import DiagonalTransform, MatrixTransform, RotationTransform, Transform

# without `let` these have nothing to do: an ablation turns it on beside them, a command line says that they are idle
WITH_LET: dict[str, Any] = {"acts_with": "let", "idle_without": "let"}


class AffineQuant(Method):
    """Learned affine transformations under a gradual mask, with learned weight clipping."""

    name: ClassVar[str] = "affinequant"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.12544"
    learns: ClassVar[bool] = True
    published_form: ClassVar[Mapping[str, Any]] = {"query_key": "published", "truncate": "all"}

    lwc: bool = Field(True, description="Learn weight clipping.")
    let: bool = Field(True, description="Learn the affine transformation.")
    use_ln_matrix: bool | None = Field(
        None,
        json_schema_extra=WITH_LET,
        description="Full matrices after the norms (kept at run time). Preset: on for weight-only schemes.",
    )
    use_matrix: bool | None = Field(
        None,
        json_schema_extra=WITH_LET,
        description="Per-head matrices at query_key. Preset: on where activations are quantized.",
    )
    use_value_matrix: bool = Field(
        True, json_schema_extra=WITH_LET, description="Per-head matrices at value_out; off: a diagonal."
    )
    shift: bool = Field(
        True,
        json_schema_extra=WITH_LET,
        description="Learn a shift as well; on LLaMA it leaves a bias behind each RMSNorm.",
    )
    sf: float | None = Field(
        None,
        gt=0,
        le=1,
        json_schema_extra={"alternatives": [0.01, 1.0]},
        description="Stability factor of off-diagonal entries. Preset: 0.01 weight-only (OPT: by size), else 0.1.",
    )
    gradual: bool = Field(
        True,
        json_schema_extra={"acts_with": "use_value_matrix"},
        description="Widen the mask from the diagonal epoch by epoch; off: full band at once.",
    )
    query_key: Literal["legal", "published"] = Field(
        "legal",
        description="Under rotary embedding: what commutes with it, or the published form, which does not.",
    )
    truncate: Literal["diagonal", "all"] = Field(
        "diagonal",
        description="Entries kept at least 0.01 from zero; all: the published form, off-diagonals too.",
    )
    epochs: int | None = Field(
        None,
        ge=1,
        json_schema_extra={"alternatives": [10]},
        description="Passes over the windows. Preset: 20; 40 for 2-bit weights.",
    )
    let_lr: float = Field(5e-3, gt=0, description="Learning rate of matrices, scales and shifts.")
    lwc_lr: float = Field(1e-2, gt=0, description="Learning rate of the clipping logits.")
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        json_schema_extra={"alternatives": [0.25, 0.75]},
        description="Initial balance of activations and weights.",
    )
    aug_loss: bool | None = Field(
        None,
        json_schema_extra={"acts_with": "let"},
        description="Add the error to the full-precision block on the same input. Preset: LLaMA, W4A4 and 2-bit.",
    )
    parameters: str | None = Field(
        None, description="File of learned parameters (.pth) to use instead of training, as --resume FILE."
    )

    @property
    def needs(self) -> Needs:
        """Ranges of the activations, for the initial scales and shifts."""
        return Needs(activation_stats=self.let and self.parameters is None)

    def resolve(self, scheme: Scheme, spec: BlockSpec) -> Self:
        """The recipes of the authors' scripts by scheme and model."""
        weight_only = scheme.abits >= 16
        two_bits = weight_only and scheme.wbits <= 2
        llama = spec.recipes == "llama"
        recipe = {
            "use_ln_matrix": weight_only,
            "use_matrix": not weight_only,
            "sf": 0.1
            if not weight_only
            else 1e-2
            if llama
            else _opt_stability_factor(scheme, spec.hidden_size),
            "epochs": 40 if two_bits else 20,
            "aug_loss": llama and (two_bits or (not weight_only and scheme.wbits <= 4)),
        }
        if self.parameters is not None:
            authors.refuse_training({name: getattr(self, name) for name in self.model_fields_set})
            recipe["parameters"] = pinned = authors.pinned(self.parameters)
            if self.sf is None and authors.has_matrices(pinned):
                raise ConfigError(
                    f"Parameter file {self.parameters!r} holds matrices but not the stability factor that their "
                    "off-diagonal entries are multiplied by. Give --sf, the one that they were learned with."
                )
        update = {k: v for k, v in recipe.items() if getattr(self, k) is None or k == "parameters"}
        return self.model_copy(update=update)

    def check(self, scheme: Scheme, spec: BlockSpec) -> None:
        """See `Method`; parameters that are read must be of this model."""
        super().check(scheme, spec)
        if self.parameters is not None:
            authors.check_parameters(self.parameters, spec, scheme)

    def notes(self, scheme: Scheme, spec: BlockSpec) -> list[str]:
        """See `Method`."""
        if self.parameters is not None:
            matrices = authors.has_matrices(self.parameters)
            factor = f" (stability factor {self.sf})" if matrices else ""
            return [f"parameters read from {self.parameters}{factor}, not trained"]
        notes = query_key_notes(self.let and self.query_key == "published", spec)
        if self.let and self.use_ln_matrix:
            notes.append("needs a hidden×hidden product after each norm at run time, counted in bits/weight")
        return notes

    def plan(self, view: BlockView) -> BlockPlan:
        """See `Method`."""
        if self.parameters is not None:
            return authors.plan_of(authors.read_parameters(self.parameters)[view.index], view, self.sf)
        transforms = (
            [t for site in view.spec.sites.values() if (t := self._at(view, site))] if self.let else []
        )
        clipping = Clipping(view.spec.shapes, view.grid) if self.lwc and view.grid.bits < 16 else None
        training = None
        if transforms or clipping is not None:
            assert self.epochs is not None
            loss = mse_with_auxiliary if self.aug_loss else mse
            training = Training(self.epochs, self.let_lr, self.lwc_lr, loss, bool(self.aug_loss))
        return BlockPlan(transforms, clipping, training=training)

    def _at(self, view: BlockView, site: Site) -> Transform | None:
        """The transform of one site, or None where AffineQuant has none (mlp_out)."""
        spec = view.spec
        if site.kind == "hidden":
            return None
        scale = initial_scale(view, site, self.alpha)
        shift = initial_shift(view, site) if self.shift and site.kind != "query_key" else None
        legal_rope = spec.rope and self.query_key == "legal"
        if site.kind == "query_key" and not self.use_matrix:
            return DiagonalTransform(spec, site, scale, paired=legal_rope)
        if site.kind == "query_key" and legal_rope:
            return RotationTransform(spec, site)
        if (site.kind == "norm" and not self.use_ln_matrix) or (
            site.kind == "value" and not self.use_value_matrix
        ):
            return DiagonalTransform(spec, site, scale, shift)
        assert self.sf is not None
        return MatrixTransform(
            spec, site, scale, shift, stability_factor=self.sf, guard=self.truncate, gradual=self.gradual
        )

    @classmethod
    def presets(cls) -> dict[str, str]:
        """See `Method`."""
        return {
            "LLaMA, weight-only": "lwc, let, use_ln_matrix, sf 0.01, 20 epochs; 2 bits: aug_loss, 40 epochs",
            "LLaMA, W4A4": "lwc, let, use_matrix, aug_loss, sf 0.1, 20 epochs",
            "OPT, weight-only": "lwc, let, use_ln_matrix, 20 epochs (2 bits: 40); sf by size: 125m 1.0; 1.3b 0.1; "
            "2.7b, 6.7b 0.1 at W3A16 (2.7b also at W2A16g128), else 1.0; 13b and larger 0.01",
            "other quantized activations": "lwc, let, use_matrix, sf 0.1, 20 epochs",
        }


def _opt_stability_factor(scheme: Scheme, hidden_size: int) -> float:
    """The authors' weight-only OPT scripts, by model: 125m, 1.3b (2048), 2.7b (2560), 6.7b (4096), 13b and larger."""
    if hidden_size >= 5120:
        return 1e-2
    if hidden_size == 2048:
        return 0.1
    if hidden_size in (2560, 4096):
        ungrouped_three = scheme.wbits == 3 and scheme.group_size is None
        grouped_two = hidden_size == 2560 and scheme.wbits == 2 and scheme.group_size == 128
        return 0.1 if ungrouped_three or grouped_two else 1.0
    return 1.0
