"""The GPTQ layout, as AutoGPTQ, GPTQModel and transformers read it.

Version 1 stores each zero point minus one (AutoGPTQ 0.7.1, nn_modules/qlinear); a zero point of 0 would be stored
as −1, which GPTQModel's conversion carries into the next one and AutoGPTQ's 3-bit path reads as 8. Version 2
(GPTQModel) stores zero points as they are, and AutoGPTQ reads it as garbage without a word. So version 1 is written
wherever every zero point is at least 1, and version 2 where one is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qbench.deploy.formats import codes_fit, outside, stored_zero_points, weights_only
from qbench.models.base import BlockSpec
from qbench.models.packed import GPTQ_BITS
from qbench.quant import packing
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme

MULTIPLE = 32  # AutoGPTQ: "in_features and out_features must be divisible by 32"


@dataclass(frozen=True)
class GPTQFormat:
    """GPTQ checkpoints.

    Attributes:
        version: Of the checkpoint format, 1 or 2.
    """

    version: int = 1
    name: str = "gptq"
    dtype: str | None = "float16"
    quantizes_inputs: bool = False

    def rounding(self, scheme: Scheme) -> None:
        """See `Format`; inputs stay as they are."""
        return None

    def refuse(self, scheme: Scheme, spec: BlockSpec, zero_in_range: bool) -> str | None:
        """See `Format`."""
        if (reason := weights_only(scheme, "gptq")) is not None:
            return reason
        odd = [spec.linears[r] for r, shape in spec.shapes.items() if any(size % MULTIPLE for size in shape)]
        if odd:
            widths = f"gptq needs widths that are multiples of {MULTIPLE}"
            return f"{widths}, unlike those of {', '.join(odd)}; use --format fake"
        return outside(scheme, GPTQ_BITS, "gptq") or stored_zero_points(scheme, zero_in_range, "gptq")

    def settle(self, scheme: Scheme, weights: Iterable[QuantizedWeight]) -> GPTQFormat:
        """Version 1, or 2 if a zero point is 0."""
        return replace(self, version=2 if any(bool((w.zero_point == 0).any()) for w in weights) else 1)

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `Format`."""
        codes_fit(weight)
        bits, width = weight.grid.bits, weight.codes.shape[1]
        zero = weight.zero_point.T - (1 if self.version == 1 else 0)  # [groups, out]
        assert int(zero.min()) >= 0, "a zero point of 0 needs version 2"
        return {
            "qweight": packing.pack(weight.codes.T, bits, dim=0),
            "qzeros": packing.pack(zero, bits, dim=1),
            "scales": weight.scale.T.contiguous(),
            "g_idx": (torch.arange(width) // (weight.grid.group_size or width)).to(torch.int32),
        }

    def quantization_config(self, scheme: Scheme) -> dict[str, Any]:
        """See `Format`; also the content of AutoGPTQ's quantize_config.json."""
        return {
            "quant_method": "gptq",
            "bits": scheme.wbits,
            "group_size": scheme.group_size or -1,
            "sym": scheme.symmetric,
            "desc_act": False,
            "static_groups": False,
            "true_sequential": True,
            "damp_percent": 0.01,
            "lm_head": False,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            # GPTQModel loads an asymmetric version 1 only if the field names itself from 0.9.0 on: the release since
            # which its own files store zero points as ours do.
            "meta": {"quantizer": ["qbench", "gptqmodel:0.9.0"]},
        }

    def notes(self, scheme: Scheme) -> list[str]:
        """See `Format`."""
        if self.version == 1:
            return []
        return [
            "checkpoint format gptq_v2, since some zero points are 0, which gptq (v1) cannot hold: GPTQModel and "
            "transformers read it, AutoGPTQ 0.7.1 does not"
        ]


GPTQ = GPTQFormat()
