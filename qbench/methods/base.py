"""Method: the interface of a plugin. The class *is* its options, a frozen model that refuses unknown keys.

A method decides what to do with a block (`plan`) and never does it: loading, calibration, training, rounding,
checkpointing and evaluation belong to the engine and the runner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from qbench.engine.plan import BlockPlan, BlockView, Needs
from qbench.models.base import BlockSpec
from qbench.quant.grid import check_group_size
from qbench.scheme import Scheme


class Method(BaseModel):
    """Base of all methods. Override `plan`; the rest has defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    published_form: ClassVar[Mapping[str, Any]] = {}
    """Options that give the authors' form where ours differs; `--published-form` sets them."""
    rounds: ClassVar[bool] = False
    """Whether it is a rounding rule, to stand last in a composition such as `smoothquant+gptq`."""
    learns: ClassVar[bool] = False
    """Whether its plan has training: in a composition nothing can be planned behind it but the rounding."""

    @property
    def needs(self) -> Needs:
        """Statistics the engine gathers before `plan`."""
        return Needs()

    def resolve(self, scheme: Scheme, spec: BlockSpec) -> Self:
        """Fill options left at None from the published recipe for this scheme and model."""
        return self

    def check(self, scheme: Scheme, spec: BlockSpec) -> None:
        """Refuse a scheme or a model before anything is computed.

        Raises:
            UnsupportedSchemeError: Says what does not fit and what would.
        """
        if scheme.wbits < 16:
            check_group_size(
                scheme.group_size, {spec.linears[r]: cols for r, (_, cols) in spec.shapes.items()}
            )

    def notes(self, scheme: Scheme, spec: BlockSpec) -> list[str]:
        """Sentences that belong beside the row's numbers."""
        return []

    def plan(self, view: BlockView) -> BlockPlan:
        """Say what to do with one block."""
        raise NotImplementedError

    @classmethod
    def presets(cls) -> dict[str, str]:
        """Recipe by scheme, one line each, for `qbench methods NAME`."""
        return {}


def query_key_notes(published: bool, spec: BlockSpec, sites: Iterable[str] = ("query_key",)) -> list[str]:
    """What a row says of a query–key transform that is left untied or dense under rotary embedding."""
    if not (published and spec.rope and "query_key" in {*sites} & {*spec.sites}):
        return []
    return ["query_key transform in its published form, which does not preserve the function under RoPE"]
