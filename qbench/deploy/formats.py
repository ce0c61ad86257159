"""What an export format is: which schemes it can hold, and the tensors and settings it writes.

A format is a small frozen value with no state of a run, one file each. Registration is one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol, Self

from torch import Tensor

from qbench.models.base import BlockSpec
from qbench.quant.uniform import QuantizedWeight
from qbench.registry import Registry
from qbench.scheme import Scheme

FORMATS = Registry(
    "export format",
    {
        "gptq": "qbench.deploy.gptq:GPTQ",
        "compressed-tensors": "qbench.deploy.compressed:COMPRESSED_TENSORS",
        "awq": "qbench.deploy.awq:AWQ",
        "fake": "qbench.deploy.fake:FAKE",
    },
)


class Format(Protocol):
    """One way to write quantized linears."""

    @property
    def name(self) -> str:
        """As `--format` takes it."""

    @property
    def dtype(self) -> str | None:
        """dtype that the configuration names; None keeps the checkpoint's."""

    @property
    def quantizes_inputs(self) -> bool:
        """Whether its runtimes quantize the inputs of linears as the scheme says."""

    def rounding(self, scheme: Scheme) -> Callable[[Tensor], Tensor] | None:
        """How its runtimes fake-quantize the input of a linear, [..., tokens, in]; None where they do not."""

    def refuse(self, scheme: Scheme, spec: BlockSpec, zero_in_range: bool) -> str | None:
        """One sentence why the format cannot hold this scheme on this model, with what to change; or None."""

    def settle(self, scheme: Scheme, weights: Iterable[QuantizedWeight]) -> Self:
        """The variant of the format that holds all these weights."""

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Tensors of one linear by name inside its module."""

    def quantization_config(self, scheme: Scheme) -> dict[str, Any] | None:
        """The configuration's `quantization_config`; None for a folder of ordinary weights."""

    def notes(self, scheme: Scheme) -> list[str]:
        """What a reader of the folder must know."""


def stored_zero_points(scheme: Scheme, zero_in_range: bool, name: str) -> str | None:
    """Refusal of ranges whose zero point may leave the grid, shared by the packed formats."""
    if zero_in_range or scheme.symmetric:
        return None
    return (
        f"{name} stores zero points on the grid, which the published form of the quantizer leaves; "
        "leave --published-form (zero_in_range: false) out, or use a -sym scheme"
    )


def weights_only(scheme: Scheme, name: str) -> str | None:
    """Refusal of activations that a format does not quantize."""
    if scheme.abits >= 16 and scheme.kvbits in (None, 16):
        return None
    return f"{name} has no quantized activations, {scheme} has; use --format compressed-tensors or fake"


def outside(scheme: Scheme, bits: tuple[int, ...], name: str) -> str | None:
    """Refusal of weight bits that a format does not have."""
    if scheme.wbits in bits:
        return None
    held = ", ".join(map(str, bits[:-1])) + (" or " if len(bits) > 1 else "") + str(bits[-1])
    return f"{name} holds weights of {held} bits, {scheme} has {scheme.wbits}; choose another --scheme or --format fake"


def attention_note(scheme: Scheme) -> str:
    """What runtimes of quantized inputs leave out of a row, and the scheme that leaves it out of the row as well."""
    return (
        f"the row also quantizes q, k and v to {scheme.attention_bits[0]} bits, which runtimes of this format do not: "
        f"they compute {replace(scheme, kvbits=16)}"
    )


def codes_fit(weight: QuantizedWeight) -> None:
    """Guard what `export.refusal` keeps away: a grid wider than its bits say, whose codes would run into each other."""
    top = int(weight.codes.max())
    assert top < 2**weight.grid.bits, f"code {top} does not fit {weight.grid.bits} bits"
