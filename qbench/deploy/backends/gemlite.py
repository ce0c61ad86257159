"""Adapter of gemlite: weights of 2, 4 and 8 bits with 16-bit inputs, in pure Triton, tuned at first use.

https://pypi.org/project/gemlite/ (Apache-2.0), made for 0.6. It does not import without a CUDA device. The first call
of a new shape tries its configurations and can take half a minute: warm up before timing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import ClassVar

import torch
from torch import Tensor

from qbench.deploy.backends.layer import KernelLayer, Request, dtype_name, missing_cuda_package
from qbench.quant.uniform import QuantizedWeight

BITS = (2, 4, 8)


class GemliteLayer(KernelLayer):
    """One gemlite layer."""

    def __init__(self, weight: QuantizedWeight, request: Request, bias: Tensor | None):
        """Hand over codes, scales and zero points: w = scale · (code − zero)."""
        super().__init__(request, bias)
        helper = importlib.import_module("gemlite.helper")
        self.kernel = helper.A16Wn(device=str(weight.codes.device), dtype=request.dtype).from_weights(
            weight.codes.contiguous(),
            weight.scale.to(request.dtype),
            weight.zero_point.to(request.dtype),
            request.code_bits,
            request.group_size,
        )
        product = dtype_name(request.dtype)
        self.arithmetic = f"{product} product, weights dequantized in the kernel"

    def product(self, x: Tensor) -> Tensor:
        """See `KernelLayer`."""
        return self.kernel(x)


class Gemlite:
    """Backend `gemlite`."""

    name: ClassVar[str] = "gemlite"

    def unavailable(self, device: str) -> str | None:
        """Needs its package and a CUDA device."""
        return missing_cuda_package(device, "gemlite", "gemlite")

    def dtypes(self, device: str) -> tuple[torch.dtype, ...]:
        """float16 first, in which scales lose nothing."""
        return (torch.float16, torch.bfloat16)

    def refusal(self, request: Request) -> str | None:
        """See `Backend`; from gemlite's own checks."""
        if request.abits < 16:
            return "used here for 16-bit inputs only; take humming or torch for quantized ones"
        if request.code_bits not in BITS:
            return f"it packs 2, 4 or 8 bits, not {request.code_bits}"
        if request.in_features % 32 or request.group_size < 16:
            return "it takes multiples of 32 inputs and groups of at least 16"
        return None

    def pack(self, weight: QuantizedWeight, request: Request, bias: Tensor | None) -> KernelLayer:
        """See `Backend`."""
        return GemliteLayer(weight, request, bias)
