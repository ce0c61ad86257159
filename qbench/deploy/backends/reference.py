"""The dequantizing reference: codes become numbers, then an ordinary product; any scheme, exact in float64."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from qbench.deploy.backends.layer import KernelLayer, Request, dtype_name
from qbench.quant import uniform
from qbench.quant.fake import fake_quantize
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight


class ReferenceLayer(KernelLayer):
    """Dequantizes its weight in every call; stores one byte per code, whatever the bits."""

    def __init__(self, weight: QuantizedWeight, request: Request, bias: Tensor | None):
        """Keep the integers as they are."""
        super().__init__(request, bias)
        for name in ("codes", "scale", "zero_point"):
            self.register_buffer(name, getattr(weight, name))
        product = dtype_name(request.dtype)
        self.arithmetic = f"{product} product, weights dequantized before it"
        if request.abits < 16:
            self.arithmetic += f", inputs rounded to {request.abits} bits before it"

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """Round the input to its grid, in the type of the product."""
        return (x if self.request.abits >= 16 else fake_quantize(x, Grid(self.request.abits)),)

    def product(self, x: Tensor) -> Tensor:
        """Dequantize and multiply."""
        weight = uniform.dequantize(self.codes, self.scale, self.zero_point, self.request.grid, x.dtype)
        return functional.linear(x, weight)

    def seen(self, x: Tensor) -> Tensor:
        """See `KernelLayer`."""
        return self.prepare(x)[0].double()


class Reference:
    """Backend `reference`."""

    name: ClassVar[str] = "reference"

    def unavailable(self, device: str) -> str | None:
        """Runs everywhere."""
        return None

    def dtypes(self, device: str) -> tuple[torch.dtype, ...]:
        """Any floating type; float16 is no gain on a CPU."""
        wide = (torch.float32, torch.float64)
        return (torch.bfloat16, *wide) if device == "cpu" else (torch.float16, torch.bfloat16, *wide)

    def refusal(self, request: Request) -> str | None:
        """Nothing is refused."""
        return None

    def pack(self, weight: QuantizedWeight, request: Request, bias: Tensor | None) -> KernelLayer:
        """See `Backend`."""
        return ReferenceLayer(weight, request, bias)
