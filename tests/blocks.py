"""One decoder layer of a tiny model with what it takes to run it: for tests of transforms and of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.engine import attention
from qbench.engine.capture import block_inputs
from qbench.engine.prepare import PreparedBlock, block_tensors
from qbench.models.base import BlockSpec
from qbench.models.loading import architecture_for
from qbench.transforms.tensors import BlockTensors

# name → (family of `build_tiny`, changes to its configuration)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),  # grouped-query attention, two query heads per key/value head
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-wide": ("llama", {"head_dim": 16}),  # heads · head_dim ≠ hidden
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "opt": ("opt", {}),
}
ROPE = [name for name in VARIANTS if name != "opt"]


@dataclass
class Case:
    """A block, its description, inputs for it, and the output that transformers' own layer gives."""

    model: nn.Module
    block: nn.Module
    spec: BlockSpec
    hidden: Tensor  # [windows, tokens, hidden]
    kwargs: dict[str, Any]
    expected: Tensor

    def tensors(self) -> BlockTensors:
        """Copies of the block's tensors, in their own dtype."""
        return block_tensors(self.block, self.spec, "cpu", self.hidden.dtype)

    def prepared(self) -> PreparedBlock:
        """The prepared block, still without tensors."""
        return PreparedBlock(self.block, self.spec)

    @torch.no_grad()
    def run(self, tensors: BlockTensors) -> Tensor:
        """The prepared block's output with these tensors."""
        return self.prepared().load(tensors)(self.hidden, **self.kwargs)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Decoder layers."""
    return model.get_submodule(architecture_for(model.config).blocks)


def build_case(
    build_tiny: Callable[..., nn.Module], variant: str, ids: Tensor, dtype: torch.dtype = torch.float64
) -> Case:
    """First block of a tiny model, fed what its embeddings make of `ids`; expected output from plain SDPA."""
    family, changes = VARIANTS[variant]
    model = build_tiny(family, **changes).to(dtype).requires_grad_(False)
    spec = architecture_for(model.config).block_spec(blocks_of(model)[0], model.config)
    block = blocks_of(model)[0]
    model.set_attn_implementation("sdpa")
    captured = list(block_inputs(model, block, ids))
    hidden, kwargs = torch.cat([h for h, _ in captured]), captured[0][1]
    with torch.no_grad():
        expected = block(hidden, **kwargs)
    model.set_attn_implementation(attention.register())
    return Case(model, block, spec, hidden, kwargs, expected[0] if isinstance(expected, tuple) else expected)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry."""
    return float((found - expected).abs().max() / expected.abs().max())
