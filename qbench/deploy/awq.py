"""AWQ's `gemm` layout, as AutoAWQ wrote it and GPTQModel, transformers and vLLM read it: 4 bits, interleaved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qbench.deploy.formats import codes_fit, outside, stored_zero_points, weights_only
from qbench.models.base import BlockSpec
from qbench.quant import packing
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme


@dataclass(frozen=True)
class AWQFormat:
    """AWQ checkpoints of version `gemm`."""

    name: str = "awq"
    dtype: str | None = "float16"
    quantizes_inputs: bool = False

    def rounding(self, scheme: Scheme) -> None:
        """See `Format`; inputs stay as they are."""
        return None

    def refuse(self, scheme: Scheme, spec: BlockSpec, zero_in_range: bool) -> str | None:
        """See `Format`."""
        if (reason := weights_only(scheme, "awq")) is not None:
            return reason
        odd = [spec.linears[role] for role, (out, _) in spec.shapes.items() if out % 8]
        if odd:
            return (
                f"awq needs output widths that are multiples of 8, unlike {', '.join(odd)}; use --format fake"
            )
        return outside(scheme, (4,), "awq") or stored_zero_points(scheme, zero_in_range, "awq")

    def settle(self, scheme: Scheme, weights: Iterable[QuantizedWeight]) -> AWQFormat:
        """One variant holds all."""
        return self

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `Format`."""
        codes_fit(weight)
        return {
            "qweight": packing.pack_awq(weight.codes.T),
            "qzeros": packing.pack_awq(weight.zero_point.T),
            "scales": weight.scale.T.contiguous(),
        }

    def quantization_config(self, scheme: Scheme) -> dict[str, Any]:
        """See `Format`; a symmetric scheme's constant zero points are stored too."""
        return {
            "quant_method": "awq",
            "bits": scheme.wbits,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }

    def notes(self, scheme: Scheme) -> list[str]:
        """See `Format`."""
        return []


AWQ = AWQFormat()
