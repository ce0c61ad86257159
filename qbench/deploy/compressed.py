"""compressed-tensors, the format of vLLM and llm-compressor, which transformers reads with a package of 3 MB.

Weights alone are `pack-quantized` (one dense bit stream along the input channels; zero points packed along the output
channels); with quantized inputs 8-bit weights are `int-quantized`, plain int8. Codes are signed there: ours minus
2^(bits−1). Layout: compressed-tensors 0.20.0, compressors/pack_quantized; before 0.10 a 3-bit stream was padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qbench.deploy.formats import attention_note, codes_fit, outside, stored_zero_points
from qbench.models.base import BlockSpec
from qbench.quant import packing
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme


def round_inputs(x: Tensor, bits: int) -> Tensor:
    """Per-token asymmetric fake quantization in the order of operations of compressed-tensors 0.20.0.

    It adds the zero point and then rounds, round(x/s + z), where the table's quantizer rounds and then adds,
    round(x/s) + z. Apart from that the two agree; in float32 the sum moves one to four values in a million across the
    middle between two codes. Later blocks make that one code into differences as large as those of the rounding itself.
    """
    half = 2 ** (bits - 1)
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2 * half - 1)
    zero = (-half - low / scale).clamp(-half, half - 1)
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    zero = zero.nan_to_num().round()
    return (((wide / scale + zero).clamp(-half, half - 1).round() - zero) * scale).to(x.dtype)


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """compressed-tensors checkpoints.

    Attributes:
        packed: Codes in int32 words; False: 8-bit codes as int8.
    """

    packed: bool = True
    name: str = "compressed-tensors"
    dtype: str | None = None
    quantizes_inputs: bool = True

    def rounding(self, scheme: Scheme) -> Callable[[Tensor], Tensor] | None:
        """See `Format`."""
        return partial(round_inputs, bits=scheme.abits) if scheme.abits < 16 else None

    def refuse(self, scheme: Scheme, spec: BlockSpec, zero_in_range: bool) -> str | None:
        """See `Format`."""
        if scheme.abits not in (8, 16):
            return (
                f"compressed-tensors runs activations of 8 or 16 bits, {scheme} has {scheme.abits}; "
                "choose W8A8, W4A8 or A16, or --format fake"
            )
        if scheme.kvbits not in (None, scheme.abits, 16):
            cache = f"a key-value cache of {scheme.kvbits} bits is not written"
            return f"{cache}; leave KV{scheme.kvbits} out, or use --format fake"
        if scheme.abits < 16 and not zero_in_range:
            return (
                "compressed-tensors widens ranges of activations to contain 0, which the published form does not; "
                "leave --published-form (zero_in_range: false) out"
            )
        bits = outside(scheme, (2, 3, 4, 5, 6, 7, 8), "compressed-tensors")
        return bits or stored_zero_points(scheme, zero_in_range, "compressed-tensors")

    def settle(self, scheme: Scheme, weights: Iterable[QuantizedWeight]) -> CompressedTensorsFormat:
        """Plain int8 where inputs are quantized and weights have 8 bits: what int8 kernels multiply."""
        return replace(self, packed=scheme.abits >= 16 or scheme.wbits < 8)

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `Format`."""
        codes_fit(weight)
        bits, offset = weight.grid.bits, weight.grid.mid
        if not self.packed:
            tensors = {"weight": (weight.codes.to(torch.int16) - offset).to(torch.int8)}
        else:
            tensors = {
                "weight_packed": packing.pack(weight.codes, bits),
                "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
            }
        tensors["weight_scale"] = weight.scale.contiguous()
        if not weight.grid.symmetric:
            signed = (weight.zero_point - offset).to(torch.int8)
            packed = packing.pack(weight.zero_point, bits, dim=0)
            tensors["weight_zero_point"] = packed if self.packed else signed
        return tensors

    def quantization_config(self, scheme: Scheme) -> dict[str, Any]:
        """See `Format`."""
        weights = {
            "num_bits": scheme.wbits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group" if scheme.group_size else "channel",
            "group_size": scheme.group_size,
            "dynamic": False,
        }
        inputs = None
        if scheme.abits < 16:
            inputs = {
                "num_bits": scheme.abits,
                "type": "int",
                "symmetric": False,
                "strategy": "token",
                "dynamic": True,
            }
        form = "pack-quantized" if self.packed else "int-quantized"
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "format": form,
                    "weights": weights,
                    "input_activations": inputs,
                    "output_activations": None,
                }
            },
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }

    def notes(self, scheme: Scheme) -> list[str]:
        """See `Format`."""
        notes = []
        if scheme.attention_bits != (16, 16):
            notes.append(attention_note(scheme))
        if scheme.abits < 16 and not scheme.symmetric:
            notes.append("vLLM's int8 kernels want symmetric weights: quantize with a -sym scheme for it")
        return notes


COMPRESSED_TENSORS = CompressedTensorsFormat()
