"""Shapes of a model's linears without its weights: of a published size by name, or of any supported model."""

from __future__ import annotations

from typing import Any

import torch

from qbench.errors import unknown_name
from qbench.latency import ShapeSet
from qbench.models.base import Architecture, BlockSpec
from qbench.models.loading import architecture_for, resolve_location

# Of the published LLaMA configurations, what decides shapes.
NAMED: dict[str, dict[str, int]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip


def named_config(name: str) -> Any:
    """Configuration of a published size.

    Raises:
        ConfigError: If the name is none of `NAMED`.
    """
    from transformers import LlamaConfig

    if name not in NAMED:
        raise unknown_name("set of shapes", name, NAMED)
    return LlamaConfig(
        vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False, **NAMED[name]
    )


def model_config(name: str, trust_remote_code: bool = False) -> Any:
    """Configuration of a hub model, folder or embedded model; its weights are not read."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(resolve_location(name), trust_remote_code=trust_remote_code)


def describe(config: Any) -> tuple[Architecture, BlockSpec, int]:
    """Architecture, description of a block, and number of blocks, from a model built without memory."""
    from transformers import AutoModelForCausalLM

    architecture = architecture_for(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = model.get_submodule(architecture.blocks)
    return architecture, architecture.block_spec(blocks[0], config), len(blocks)


def shape_set(name: str, config: Any) -> ShapeSet:
    """Linears of one block, as the kernel benchmark needs them."""
    _, spec, n_blocks = describe(config)
    groups = [site.consumers for site in spec.sites.values() if site.kind == "norm"]
    return ShapeSet(name=name, linears=dict(spec.shapes), norm_groups=groups, n_blocks=n_blocks)
