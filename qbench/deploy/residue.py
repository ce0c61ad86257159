"""What a method leaves in a block besides integers, and whether a transformers folder can hold it.

Folding may create biases that the model does not have, a bias behind an RMSNorm, or a matrix behind a norm. Some
architectures take the first through a switch of their configuration; nothing takes the other two. Which of them a
method leaves is the same in every block and for every size, so it is found out *before* calibration by rehearsing
the whole run on a one-block miniature of the architecture, without knowing any method.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from qbench.engine import attention
from qbench.engine.lane import Lane
from qbench.engine.reconstruct import reconstruct
from qbench.engine.settings import EngineSettings
from qbench.engine.state import BlockState
from qbench.models.loading import LoadedModel
from qbench.transforms.tensors import BlockTensors

HEAD_DIM, VOCABULARY, TOKENS = 8, 64, 16


def switches(loaded: LoadedModel, states: Sequence[BlockTensors]) -> list[str]:
    """Configuration switches needed for biases that folding created."""
    created = {role for tensors in states for role, bias in tensors.bias.items() if bias is not None}
    created -= set(loaded.spec.biased)
    return [switch for switch, roles in loaded.architecture.bias_options.items() if created & set(roles)]


def obstacle(loaded: LoadedModel, states: Sequence[BlockTensors]) -> str | None:
    """Everything that plain transformers cannot represent, with the options to change."""
    left, options = [], []
    if any(matrix is not None for t in states for matrix in t.norm_matrix.values()):
        left.append("full matrices remain after the norms at run time")
        options.append("--no-use-ln-matrix")
    if not loaded.spec.norm_bias and any(bias is not None for t in states for bias in t.norm_bias.values()):
        left.append("shifts leave a bias behind each RMSNorm")
        options.append("--no-shift")
    allowed = {
        role for roles in loaded.architecture.bias_options.values() for role in roles
    } | loaded.spec.biased
    extra = sorted({r for t in states for r, b in t.bias.items() if b is not None} - allowed)
    if extra:
        left.append(f"{loaded.architecture.name} has no bias on {', '.join(extra)}")
        options.append("--no-shift")
    if not left:
        return None
    options = list(dict.fromkeys(options))
    verb = "folds" if len(options) == 1 else "fold"
    return f"{', '.join(left)} ({' with '.join(options)} {verb} everything)"


def rehearse(loaded: LoadedModel, lane: Lane) -> BlockState | None:
    """What a lane that has not been computed will leave in each block, found by computing it on a miniature.

    Args:
        loaded: The full-precision model; only its configuration is used.
        lane: Its planner's options are resolved, so the miniature's size changes no choice.

    Returns:
        The miniature's finished block; None where the rehearsal breaks down, which says nothing about the model.
    """
    model = miniature(loaded.model.config, type(loaded.model))
    blocks = model.get_submodule(loaded.architecture.blocks)
    spec = loaded.architecture.block_spec(blocks[0], model.config)
    scheme = replace(lane.scheme, group_size=None if lane.scheme.group_size is None else HEAD_DIM)
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    settings = EngineSettings(device=torch.device("cpu"), placement="cpu")
    (result,) = reconstruct(model, list(blocks), spec, [Lane(lane.name, lane.planner, scheme)], ids, settings)
    return None if result.error is not None else result.state(0)


def miniature(config: Any, model_class: Any) -> Any:
    """One random block of the same architecture: heads of 8 channels in the model's ratio of groups."""
    small = copy.deepcopy(config)
    n_kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = 2 * (config.num_attention_heads // n_kv)
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "hidden_size": HEAD_DIM * heads,
        "word_embed_proj_dim": HEAD_DIM * heads,
        "intermediate_size": 4 * HEAD_DIM,
        "ffn_dim": 4 * HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": TOKENS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    for name, value in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(small, name, value)
    if getattr(config, "layer_types", None):
        small.layer_types = config.layer_types[:1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(small).float().eval().requires_grad_(False)
    model.set_attn_implementation(attention.register())
    return model
