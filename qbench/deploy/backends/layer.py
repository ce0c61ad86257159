"""The interface of every kernel backend: what is asked of a layer, and what a layer is.

A backend is given the truth about a linear (`QuantizedWeight`: codes, scales, zero points, grid) and the bits of its
input, and returns a module that maps [..., in] to [..., out]. What it cannot do it refuses with a sentence, before
anything is packed: no backend computes another scheme than the one that was asked for.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from qbench.errors import UnsupportedSchemeError
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight


@dataclass(frozen=True)
class Request:
    """What a layer is asked to compute.

    Attributes:
        out_features: Rows of the weight.
        in_features: Its columns.
        grid: Bits, symmetry and group size of the weight.
        abits: Bits of the layer's input, quantized per token at run time; 16 leaves it untouched.
        device: `cpu` or `cuda`.
        dtype: Of input and output.
    """

    out_features: int
    in_features: int
    grid: Grid
    abits: int
    device: str
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: QuantizedWeight, abits: int, dtype: torch.dtype) -> Request:
        """The request that a concrete weight stands for."""
        rows, columns = weight.codes.shape
        size = weight.grid.group_size
        grid = weight.grid if size != columns else replace(weight.grid, group_size=None)
        return cls(rows, columns, grid, abits, weight.codes.device.type, dtype)

    @property
    def code_bits(self) -> int:
        """Bits that hold every code: one more than the grid's where it is bit-balanced."""
        return self.grid.qmax.bit_length()

    @property
    def group_size(self) -> int:
        """Input channels per scale; the whole width where there is one scale per output channel."""
        return self.grid.group_size or self.in_features


def dtype_name(dtype: torch.dtype) -> str:
    """As reports have it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def missing_cuda_package(device: str, module: str, distribution: str) -> str | None:
    """Why kernels of a CUDA package cannot work here, or None."""
    if device != "cuda":
        return "its kernels run on CUDA devices only"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    if importlib.util.find_spec(module) is None:
        return f'the package {distribution} is not installed; install "qbench[kernels]"'
    return None


class KernelLayer(nn.Module):
    """A quantized linear ready to be called; subclasses hold packed buffers and say how they multiply.

    Attributes:
        arithmetic: What really runs, in words: the type of the product and where codes become numbers.
    """

    arithmetic: str = ""

    def __init__(self, request: Request, bias: Tensor | None = None):
        """Keep what is common: shape, type and bias."""
        super().__init__()
        self.request = request
        self.register_buffer("bias", None if bias is None else bias.to(request.dtype))

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """Work on the input [tokens, in] that precedes the product: its quantization, where there is any."""
        return (x,)

    def product(self, *prepared: Tensor) -> Tensor:
        """The matrix product with its epilogue, from what `prepare` gave to [tokens, out]."""
        raise NotImplementedError

    def seen(self, x: Tensor) -> Tensor:
        """The input's values as the product sees them, in float64: what the gate multiplies exactly."""
        return x.double()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out] in the type of x."""
        rows = x.reshape(-1, x.shape[-1]).to(self.request.dtype)
        y = self.product(*self.prepare(rows))
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    def warm(self, tokens: int) -> None:
        """Compile what a call with so many tokens needs; nothing where kernels come compiled. May run in a thread."""

    @property
    def packed_bytes(self) -> int:
        """Bytes of every buffer and parameter after packing, the bias apart; views of one storage count once."""
        tensors = [t for name, t in (*self.named_buffers(), *self.named_parameters()) if name != "bias"]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()
        }
        return sum(storages.values())


class Backend(Protocol):
    """Makes layers of one family of kernels."""

    name: ClassVar[str]

    def unavailable(self, device: str) -> str | None:
        """Why nothing can be built on this device (a package that is missing, no GPU), or None."""

    def dtypes(self, device: str) -> tuple[torch.dtype, ...]:
        """Types of input and output that its kernels take there, the preferred one first."""

    def refusal(self, request: Request) -> str | None:
        """Why this request cannot be served, or None."""

    def pack(self, weight: QuantizedWeight, request: Request, bias: Tensor | None) -> KernelLayer:
        """Build the layer of a request that was not refused."""


def build(
    backend: Backend,
    weight: QuantizedWeight,
    abits: int = 16,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> KernelLayer:
    """Build a layer, or refuse.

    Args:
        backend: Whose kernels.
        weight: Integers on the device where the layer will run.
        abits: Bits of the input; 16 leaves it untouched.
        dtype: Of input and output; default: what the backend prefers there.
        bias: [out], or None.

    Raises:
        UnsupportedSchemeError: If the backend is missing here or cannot do this; says why.
    """
    device = weight.codes.device.type
    reason = backend.unavailable(device)
    if reason is None:
        request = Request.of(weight, abits, dtype or backend.dtypes(device)[0])
        reason = backend.refusal(request) or _outside(weight)
    if reason is not None:
        raise UnsupportedSchemeError(f"Backend {backend.name}: {reason}.")
    return backend.pack(weight, request, bias).eval().requires_grad_(False)


def _outside(weight: QuantizedWeight) -> str | None:
    """Packed zero points have the codes' bits; the published quantizer's may leave the grid."""
    zero = weight.zero_point
    if bool(((zero >= 0) & (zero <= weight.grid.qmax)).all()):
        return None
    return (
        f"zero points reach {int(zero.min())}…{int(zero.max())}, outside the grid 0…{weight.grid.qmax}, which no "
        "packed format can hold; quantize without --published-form"
    )
