"""Adapter of humming-kernels: weights of 2 to 8 bits, compiled for the GPU at hand at first use.

https://pypi.org/project/humming-kernels/ (Apache-2.0, maintained with vLLM), made for 0.1.19. Weights with 16-bit
inputs are dequantized inside the kernel; with quantized inputs they are unpacked to int8 for an int8 product. Inputs
are then quantized per token, symmetrically: at 8 bits by humming's own kernel, below by torch operations.

Left alone, humming compiles a layer's kernels for all numbers of tokens, up to 33 of them, at its first call. Here it
is asked only for the one that it chooses for the tokens at hand; `warm` lets several be compiled side by side.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.deploy.backends import tokens
from qbench.deploy.backends.layer import KernelLayer, Request, missing_cuda_package
from qbench.deploy.backends.native import integer_arithmetic
from qbench.quant.uniform import QuantizedWeight

LEAST_CAPABILITY = (8, 0)
INPUT_TILE = {16: 64, 8: 128}  # the kernels' blocks along the input, by bits of the product's operands
OUTPUT_TILE = 64


class HummingLayer(KernelLayer):
    """One humming layer; what it holds lies in its own layout."""

    def __init__(self, weight: QuantizedWeight, request: Request, bias: Tensor | None):
        """Hand over codes, scales and zero points, and let humming lay them out."""
        super().__init__(request, bias)
        package, ops = importlib.import_module("humming.layer"), importlib.import_module("humming.ops")
        bits = request.code_bits
        config = {
            "dtype": f"uint{bits}",
            "group_size": request.grid.group_size or 0,
            "has_zero_point": not request.grid.symmetric,
        }
        self.kernel = package.HummingLayer(
            shape_n=request.out_features,
            shape_k=request.in_features,
            weight_config=config,
            input_config={"dtype": "int8"} if request.abits < 16 else None,
            torch_dtype=request.dtype,
        ).cuda()
        tensors = {
            "weight": ops.pack_weight(weight.codes.int().contiguous(), bits),
            "weight_scale": weight.scale.to(request.dtype),
        }
        if not request.grid.symmetric:
            zero = ops.pack_weight(weight.zero_point.int().t().contiguous(), bits)  # packed along the outputs
            tensors["zero_point"] = zero.t().contiguous()
        self.kernel.load_from_tensors(tensors)
        self.kernel.transform()
        self.choices: dict[int, str] = {}
        self.arithmetic = (
            f"{str(request.dtype).removeprefix('torch.')} product, weights dequantized in the kernel"
            if request.abits >= 16
            else integer_arithmetic(request)
        )

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """Quantize per token where the input is quantized."""
        if self.request.abits >= 16:
            return (x,)
        if self.request.abits == 8:
            quantize: Any = importlib.import_module("humming.forward").may_quant_input
            return quantize(self.kernel.humming_config, x)
        return tokens.per_token_symmetric(x, self.request.abits)

    def product(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """See `KernelLayer`."""
        return self.kernel(x, input_scale=scale, tuning_config=self._choice(len(x)))

    def warm(self, tokens: int) -> None:
        """Compile the kernel for so many tokens; may run in several threads."""
        kernels: Any = importlib.import_module("humming.kernel.humming").HummingKernel
        kernels.prepare_kernels(self.kernel.humming_config.to_str(), None, self._choice(tokens))

    def _choice(self, tokens: int) -> str:
        """What humming's own heuristics choose for so many tokens, as it reads it."""
        if tokens not in self.choices:
            choose: Any = importlib.import_module("humming.tune").get_heuristics_config
            self.choices[tokens] = json.dumps(choose(self.kernel.humming_config, shape_m=tokens))
        return self.choices[tokens]

    def seen(self, x: Tensor) -> Tensor:
        """The codes that humming's own quantization is documented to give, not those it gave."""
        if self.request.abits >= 16:
            return x.double()
        codes, scale = tokens.per_token_symmetric(x, self.request.abits)
        return codes.double() * scale.double()


class Humming:
    """Backend `humming`."""

    name: ClassVar[str] = "humming"

    def unavailable(self, device: str) -> str | None:
        """Needs its package and a CUDA device."""
        if (reason := missing_cuda_package(device, "humming", "humming-kernels")) is not None:
            return reason
        if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
            return "its kernels need compute capability 8.0 or later"
        return None

    def dtypes(self, device: str) -> tuple[torch.dtype, ...]:
        """float16 first, in which scales lose nothing."""
        return (torch.float16, torch.bfloat16)

    def refusal(self, request: Request) -> str | None:
        """See `Backend`; from humming's own checks at 0.1.19."""
        grid, operand = request.grid, 16 if request.abits >= 16 else 8
        if operand == 8 and grid.group_size is not None:
            return "with quantized inputs it rounds group scales over the whole tensor; write the scheme without g…"
        if operand == 8 and request.code_bits == 8 and not grid.symmetric:
            return "8-bit weights with quantized inputs have no zero point there; write the scheme with -sym"
        if grid.group_size is not None and grid.group_size < 16:
            return f"groups of {grid.group_size} are smaller than its 16"
        tile = INPUT_TILE[operand]
        if request.in_features % tile or request.out_features % OUTPUT_TILE:
            return f"it takes multiples of {tile} inputs and {OUTPUT_TILE} outputs"
        return None

    def pack(self, weight: QuantizedWeight, request: Request, bias: Tensor | None) -> KernelLayer:
        """See `Backend`."""
        return HummingLayer(weight, request, bias)


def int8_probe() -> float:
    """Multiplications and additions per second of this GPU's int8 tensor cores, operands in registers."""
    return 1e12 * importlib.import_module("humming.ops").tops_bench("int8")
