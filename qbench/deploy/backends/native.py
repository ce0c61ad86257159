"""Kernels that come with torch: int4 and int8 weights with 16-bit inputs, and int8 by int8 for quantized inputs.

Weights of 2 and 3 bits lie in int4 kernels as 4-bit codes, those of 5 to 7 bits in int8 ones as bytes: the result is
that of their scheme, the memory that of the container, and both are reported. Signatures of these operations are
torch's own, underscored and undocumented; `gate.py` stands between them and every number.

    CPU   `_weight_int4pack_mm_for_cpu`, `_weight_int8pack_mm`, `_int_mm`. Fast in bfloat16 only.
    CUDA  `_weight_int4pack_mm` (tinygemm, bfloat16 only), `_int_mm`, whose epilogue here is ordinary torch operations.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qbench.deploy.backends import tokens
from qbench.deploy.backends.layer import KernelLayer, Request, dtype_name
from qbench.quant.uniform import QuantizedWeight

INT4_GROUPS = (32, 64, 128, 256)  # group sizes that both int4 kernels know
INT4_MID = 8  # the code that the int4 kernels take for 0
MIN_ROWS_CUDA = 17  # `_int_mm` on CUDA refuses 16 rows or fewer
INNER_K_TILES = 8  # of tinygemm's packed layout; 8 is the widest and the fastest at one token


class Int4Layer(KernelLayer):
    """Weights of up to 4 bits, dequantized inside torch's int4 kernel; inputs of 16 bits."""

    def __init__(self, weight: QuantizedWeight, request: Request, bias: Tensor | None):
        """Pack codes and (scale, offset) pairs: w = scale · (code − 8) + offset.

        Narrower codes are moved to the middle of the 16, so that no offset is large beside the weights it is added to.
        """
        super().__init__(request, bias)
        self.on_cpu = request.device == "cpu"
        groups = request.in_features // request.group_size
        self.group_size = request.group_size if request.grid.group_size else _divisor(request.in_features)
        scale = weight.scale.float()
        offset = (request.grid.mid - weight.zero_point.float()) * scale
        codes = weight.codes + (INT4_MID - request.grid.mid)
        pairs = torch.stack([scale.t(), offset.t()], -1)  # [groups, out, 2]
        pairs = pairs.repeat_interleave(request.in_features // self.group_size // groups, 0)
        self.register_buffer("pairs", pairs.to(request.dtype).contiguous())
        if self.on_cpu:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        else:
            pairwise = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
            packed = torch.ops.aten._convert_weight_to_int4pack(pairwise, INNER_K_TILES)
        self.register_buffer("packed", packed)
        bits = request.code_bits
        stored = "" if bits == 4 else f", {bits}-bit codes stored in 4 bits"
        self.arithmetic = f"{dtype_name(request.dtype)} product, int4 codes dequantized in the kernel{stored}"

    def product(self, x: Tensor) -> Tensor:
        """See `KernelLayer`."""
        kernel = (
            torch.ops.aten._weight_int4pack_mm_for_cpu if self.on_cpu else torch.ops.aten._weight_int4pack_mm
        )
        return kernel(x, self.packed, self.group_size, self.pairs)


class Int8Layer(KernelLayer):
    """Weights of 5 to 8 bits, one scale per output channel, dequantized in torch's int8 kernel; inputs of 16 bits."""

    def __init__(self, weight: QuantizedWeight, request: Request, bias: Tensor | None):
        """Codes minus a fixed middle fit int8; what the zero point differs from it by is a rank-one term."""
        super().__init__(request, bias)
        middle = request.grid.mid
        self.register_buffer("packed", (weight.codes.to(torch.int16) - middle).to(torch.int8))
        scale = weight.scale[:, 0].float()
        self.register_buffer("scale", scale.to(request.dtype))
        offset = (middle - weight.zero_point[:, 0].float()) * scale
        self.register_buffer("offset", None if request.grid.symmetric else offset)
        bits = request.code_bits
        stored = "" if bits == 8 else f", {bits}-bit codes stored in 8 bits"
        self.arithmetic = f"{dtype_name(request.dtype)} product, int8 codes dequantized in the kernel{stored}"

    def product(self, x: Tensor) -> Tensor:
        """See `KernelLayer`."""
        y = torch.ops.aten._weight_int8pack_mm(x, self.packed, self.scale)
        if self.offset is None:
            return y
        return torch.addr(y.float(), x.float().sum(-1), self.offset).to(y.dtype)


class IntegerProductLayer(KernelLayer):
    """An int8 by int8 product with int32 sums, for weights and inputs of any 2 to 8 bits (in the spirit of ABQ-LLM).

    With codes q and a shifted into int8 by fixed middles, and zero points z and u shifted alike,
    Σ (q − z)(a − u) = Σ q·a − z · Σ a − u · Σ (q − z): the product plus two rank-one terms, all exact integers.
    """

    def __init__(self, weight: QuantizedWeight, request: Request, bias: Tensor | None):
        """Keep int8 codes in the order that the device's kernel is fast in."""
        super().__init__(request, bias)
        middle = request.grid.mid
        codes = (weight.codes.to(torch.int16) - middle).to(torch.int8)  # [out, in]
        # CPU: fast only where [in, out] is contiguous; CUDA: a transposed view of [out, in] is what cuBLASLt takes
        packed = codes.t().contiguous() if request.device == "cpu" else codes.contiguous()
        self.register_buffer("packed", packed)
        zero = weight.zero_point[:, 0].float() - middle
        sums = codes.sum(1, dtype=torch.int32).float() - request.in_features * zero
        self.register_buffer("scale", weight.scale[:, 0].float())
        self.register_buffer("zero", None if request.grid.symmetric else zero)
        self.register_buffer("sums", sums)
        self.arithmetic = integer_arithmetic(request)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """Quantize per token; asymmetric, as the scheme defines it."""
        return tokens.per_token(x, self.request.abits)

    def product(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Integer product, then the zero points' terms and the scales in float32."""
        y = self._int_mm(codes).float()
        y = y.addmm_(zero, self.sums[None], alpha=-1)
        if self.zero is not None:
            y = y.addmm_(codes.sum(1, keepdim=True, dtype=torch.int32).float(), self.zero[None], alpha=-1)
        return (y * scale).mul_(self.scale).to(self.request.dtype)

    def _int_mm(self, codes: Tensor) -> Tensor:
        if self.request.device == "cpu":
            return torch._int_mm(codes, self.packed)
        rows = codes.shape[0]
        if rows < MIN_ROWS_CUDA:
            padded = codes.new_zeros((2 * MIN_ROWS_CUDA - 2, codes.shape[1]))
            padded[:rows] = codes
            codes = padded
        return torch._int_mm(codes, self.packed.t())[:rows]

    def seen(self, x: Tensor) -> Tensor:
        """See `KernelLayer`."""
        codes, scale, zero = self.prepare(x)
        return (codes.double() - zero.double()) * scale.double()


class Native:
    """Backend `torch`."""

    name: ClassVar[str] = "torch"

    def unavailable(self, device: str) -> str | None:
        """Comes with torch; a CUDA device must be there if one is asked for."""
        if device == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device here"
        return None

    def dtypes(self, device: str) -> tuple[torch.dtype, ...]:
        """bfloat16 first: tinygemm knows nothing else, and on a CPU the int4 kernel is fast in no other type."""
        wide = (torch.float16, torch.float32)
        return (torch.bfloat16, *wide) if device == "cpu" else (torch.bfloat16, torch.float16)

    def refusal(self, request: Request) -> str | None:
        """See `Backend`; constraints are those of the operations, as their own error messages give them."""
        if request.abits < 16:
            return self._no_integer_product(request)
        if request.code_bits <= 4:
            return self._no_int4(request)
        if request.device != "cpu":
            return f"torch has no W{request.grid.bits}A16 kernel for CUDA"
        if request.grid.group_size is not None:
            return f"W{request.grid.bits}A16 takes one scale per output channel, not groups of {request.group_size}"
        return None

    @staticmethod
    def _no_int4(request: Request) -> str | None:
        size = request.grid.group_size or _divisor(request.in_features)
        if size not in INT4_GROUPS:
            return f"int4 kernels take groups of 32, 64, 128 or 256, not {request.group_size}"
        if request.device == "cpu":
            return (
                None
                if request.out_features % 16 == 0
                else "int4 kernels on a CPU take multiples of 16 outputs"
            )
        if request.dtype != torch.bfloat16:
            return "tinygemm's int4 kernel takes bfloat16 only"
        if request.out_features % 8 or request.in_features % (16 * INNER_K_TILES):
            return "tinygemm takes multiples of 8 outputs and 128 inputs"
        return None

    @staticmethod
    def _no_integer_product(request: Request) -> str | None:
        if request.grid.group_size is not None:
            return (
                f"an int8 product takes one scale per output channel: groups of {request.group_size} would need a sum "
                "apart for each; write the scheme without g…"
            )
        if request.device == "cuda" and (request.out_features % 8 or request.in_features % 8):
            return "the int8 product on CUDA takes multiples of 8 inputs and outputs"
        return None

    def pack(self, weight: QuantizedWeight, request: Request, bias: Tensor | None) -> KernelLayer:
        """See `Backend`."""
        if request.abits < 16:
            return IntegerProductLayer(weight, request, bias)
        return (Int4Layer if request.code_bits <= 4 else Int8Layer)(weight, request, bias)


def integer_arithmetic(request: Request) -> str:
    """What runs when both operands are integers: always int8 here, whatever the scheme is called."""
    wbits, abits = request.grid.bits, request.abits
    text = "int8 product, int32 sums"
    if (wbits, abits) == (8, 8):
        return text
    text = f"int8 arithmetic: {wbits}-bit weights and {abits}-bit inputs in an int8 product, int32 sums"
    if wbits == abits == 4 and request.device == "cuda" and torch.cuda.get_device_capability()[0] >= 9:
        text += "; this GPU has no INT4 tensor core"
    return text


def _divisor(width: int) -> int:
    """The largest group the int4 kernels know that divides a row: one scale per channel, repeated; 0 if none does."""
    return next((size for size in reversed(INT4_GROUPS) if width % size == 0), 0)
