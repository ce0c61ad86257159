"""The `fake` format: dequantized float32 weights in an ordinary folder, for programs that know no quantization."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbench.models.base import BlockSpec
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme


@dataclass(frozen=True)
class FakeFormat:
    """Ordinary transformers folders."""

    name: str = "fake"
    dtype: str | None = "float32"
    quantizes_inputs: bool = False

    def rounding(self, scheme: Scheme) -> None:
        """See `Format`; inputs stay as they are."""
        return None

    def refuse(self, scheme: Scheme, spec: BlockSpec, zero_in_range: bool) -> str | None:
        """Any weight can be written."""
        return None

    def settle(self, scheme: Scheme, weights: Iterable[QuantizedWeight]) -> FakeFormat:
        """One variant holds all."""
        return self

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `Format`."""
        return {"weight": weight.dequantize(torch.float32)}

    def quantization_config(self, scheme: Scheme) -> dict[str, Any] | None:
        """None: these are ordinary weights."""
        return None

    def notes(self, scheme: Scheme) -> list[str]:
        """See `Format`."""
        if scheme.attention_bits == (16, 16):
            return []
        return ["plain transformers does not quantize its activations"]


FAKE = FakeFormat()
