"""PreparedBlock: a block of the model whose weights can be substituted and whose operands can be quantized.

The model's own modules run; only their linears and norms are replaced, and their attention goes through the
registered function. A prepared block shares no weight with the model, so the model stays as it was.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qbench.engine import attention, product
from qbench.engine.product import product_dtype
from qbench.models.base import BlockSpec
from qbench.quant.fake import fake_quantize
from qbench.quant.grid import Grid
from qbench.scheme import Scheme
from qbench.transforms.tensors import BlockTensors


class PreparedLinear(nn.Module):
    """A linear whose weight and bias are plain tensors, with its input quantized per token if it has a grid."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        """Weights come with `PreparedBlock.load`."""
        super().__init__()
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)
        self.input_grid: Grid | None = None

    def operand(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with when x arrives."""
        if self.input_grid is None:
            return x
        return fake_quantize(x, self.input_grid, out_dtype=product_dtype(x))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return product.linear(self.operand(x), self.weight, self.bias)


class PreparedNorm(nn.Module):
    """The model's own norm, then an optional bias (RMSNorm has none), matrix, and quantization of the result.

    All consumers of a site's norm read the same tensor, so it is quantized once here instead of in each of them.
    """

    matrix: Tensor | None
    added_bias: Tensor | None

    def __init__(self, norm: nn.Module, has_bias: bool):
        """Take over a norm whose parameters become substitutable."""
        super().__init__()
        self.rms_epsilon = rms_epsilon(norm)
        self.norm = norm
        self.has_bias = has_bias
        for name in ("weight", "bias"):
            if name in norm._parameters:
                del norm._parameters[name]
                norm.register_buffer(name, None)
        self.register_buffer("added_bias", None)
        self.register_buffer("matrix", None)
        self.output_grid: Grid | None = None

    def load(self, weight: Tensor, bias: Tensor | None, matrix: Tensor | None) -> None:
        """Substitute the tensors."""
        self.norm.weight = weight
        if self.has_bias:
            self.norm.bias = bias  # type: ignore[assignment]
        else:
            self.added_bias = bias
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., hidden]."""
        y = self._normalized(x)
        if self.added_bias is not None:
            y = y + self.added_bias
        if self.matrix is not None:
            y = y @ self.matrix
        if self.output_grid is not None:
            return fake_quantize(y, self.output_grid, out_dtype=product_dtype(y))
        return y.to(product_dtype(y))  # once, instead of in each consumer

    def _normalized(self, x: Tensor) -> Tensor:
        """The model's norm; where a GPU trains, as torch's fused kernel if it computes the same."""
        fused = x.is_cuda and x.dtype == torch.float32 and torch.is_grad_enabled()
        weight: Tensor = self.norm.weight  # type: ignore[assignment]
        if fused and self.rms_epsilon is not None:
            return functional.rms_norm(x, x.shape[-1:], weight, self.rms_epsilon)
        out: Tensor = self.norm(x)
        return out


@torch.no_grad()
def rms_epsilon(norm: nn.Module) -> float | None:
    """Epsilon of a norm that computes what `functional.rms_norm` does, found by trying both; None for any other."""
    epsilon, weight = getattr(norm, "variance_epsilon", None), getattr(norm, "weight", None)
    if epsilon is None or weight is None:
        return None
    row = torch.linspace(
        -1, 3, weight.numel(), dtype=torch.float32, device=weight.device
    )  # its mean is not 0
    x = torch.stack((row, row * epsilon**0.5))  # and the second feels epsilon
    same = torch.allclose(
        norm(x).float(), functional.rms_norm(x, x.shape[-1:], weight.float(), epsilon), rtol=1e-5, atol=1e-6
    )
    return epsilon if same else None


class PreparedBlock(nn.Module):
    """One decoder layer, substitutable. Call `load`, then use it as the layer it stands for."""

    def __init__(self, block: nn.Module, spec: BlockSpec):
        """Clone the structure of `block`; its weights are neither copied nor kept."""
        super().__init__()
        shared = {id(p): p for p in block.parameters()}
        for module in block.modules():  # configurations are shared, not cloned
            config = getattr(module, "config", None)
            if config is not None:
                shared[id(config)] = config
        self.block = copy.deepcopy(block, shared)
        self.block.requires_grad_(False)
        self.spec = spec
        self.linears = {role: PreparedLinear() for role in spec.linears}
        self.norms = {
            name: PreparedNorm(self.block.get_submodule(path), spec.norm_bias)
            for name, path in spec.norms.items()
        }
        for role, path in spec.linears.items():
            self.block.set_submodule(path, self.linears[role])
        for name, path in spec.norms.items():
            self.block.set_submodule(path, self.norms[name])
        # parameters outside linears and norms (q/k norms) must not alias the model's
        for module in self.block.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)

    def load(self, tensors: BlockTensors) -> PreparedBlock:
        """Substitute all tensors; gradients flow into them."""
        for role, linear in self.linears.items():
            linear.weight, linear.bias = tensors.weight[role], tensors.bias[role]
        for name, norm in self.norms.items():
            norm.load(tensors.norm_weight[name], tensors.norm_bias[name], tensors.norm_matrix[name])
        return self

    def quantize_operands(
        self,
        scheme: Scheme | None,
        zero_in_range: bool = True,
        granularity: Literal["per_head", "per_token"] = "per_head",
    ) -> PreparedBlock:
        """Quantize linear inputs and attention operands as the scheme says; None quantizes nothing."""

        def grid(bits: int) -> Grid | None:
            return Grid(bits, zero_in_range=zero_in_range) if bits < 16 else None

        activation = grid(scheme.abits) if scheme else None
        at_norms = {
            role for site in self.spec.sites.values() if site.kind == "norm" for role in site.consumers
        }
        for role, linear in self.linears.items():
            linear.input_grid = None if role in at_norms else activation
        for norm in self.norms.values():
            norm.output_grid = activation
        operands = None
        if scheme is not None and scheme.attention_bits != (16, 16):
            query, key_value = (grid(bits) for bits in scheme.attention_bits)
            operands = attention.Operands(query, key_value, granularity)
        setattr(self.block.get_submodule(self.spec.attention), attention.ATTRIBUTE, operands)
        return self

    def record_attention(self, maps: attention.Maps | None) -> PreparedBlock:
        """Leave attention maps in `maps` at each forward pass; None stops that."""
        setattr(self.block.get_submodule(self.spec.attention), attention.MAPS, maps)
        return self

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Run the layer; families that return a tuple give their first element."""
        out = self.block(hidden_states, **kwargs)
        return out[0] if isinstance(out, tuple) else out


def block_tensors(
    block: nn.Module, spec: BlockSpec, device: torch.device | str, dtype: torch.dtype
) -> BlockTensors:
    """Copies of a block's tensors by role, on a device and in a dtype."""

    def take(tensor: Any) -> Any:
        return None if tensor is None else tensor.detach().to(device=device, dtype=dtype, copy=True)

    tensors = BlockTensors()
    for role, path in spec.linears.items():
        linear = block.get_submodule(path)
        tensors.weight[role], tensors.bias[role] = take(linear.weight), take(linear.bias)
    for name, path in spec.norms.items():
        norm = block.get_submodule(path)
        tensors.norm_weight[name] = take(norm.weight)
        tensors.norm_bias[name] = take(getattr(norm, "bias", None))
        tensors.norm_matrix[name] = None
    return tensors
