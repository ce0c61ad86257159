"""A model whose linears are backend layers, in memory: what generation speed and peak memory are measured on.

Blocks come from a finished lane's checkpoint, with its biases, folded norms and the matrices that stay behind norms, or
are rounded to nearest on the spot. Attention keeps its operands in 16 bits: no backend here quantizes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbench.deploy.backends.layer import Backend, build
from qbench.engine.checkpoint import Checkpoint
from qbench.engine.prepare import PreparedBlock, block_tensors
from qbench.engine.state import BlockState
from qbench.errors import ConfigError, DataError
from qbench.models.base import BlockSpec
from qbench.quant import uniform
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme


def rounded(block: nn.Module, spec: BlockSpec, scheme: Scheme) -> BlockState:
    """One block's state by rounding to nearest, on the device where the block is."""
    device = next(block.parameters()).device
    rest = block_tensors(block, spec, device, next(block.parameters()).dtype)
    grid = Grid(scheme.wbits, scheme.symmetric, scheme.group_size)
    linears: dict[str, Any] = {}
    for role, weight in rest.weight.items():
        wide = weight.float()
        linears[role] = uniform.round_to_nearest(wide, *uniform.extremes(wide, grid), grid)
    rest.weight = {}
    return BlockState(linears, rest)


def finished(folder: str | Path, n_blocks: int, scheme: Scheme) -> Callable[[int], BlockState]:
    """Blocks of a finished lane.

    Args:
        folder: Checkpoint folder of the lane, `…/checkpoints/METHOD-SCHEME-…`.
        n_blocks: Of the model that it belongs to.
        scheme: That it was made with.

    Raises:
        ConfigError: If the folder is no checkpoint, is unfinished, or holds another scheme.
        DataError: If it is damaged.
    """
    folder = Path(folder)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise ConfigError(
            f"{folder} is no checkpoint folder: it has no manifest.json. Give one of "
            "OUTPUT/checkpoints/METHOD-SCHEME-…, as `qbench run` writes them."
        )
    try:
        key = json.loads(manifest.read_text())["key"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"Checkpoint manifest {manifest} is damaged ({error}).") from error
    checkpoint = Checkpoint(folder, key)
    if len(checkpoint) != n_blocks:
        raise ConfigError(
            f"{folder} holds {len(checkpoint)} blocks and the model has {n_blocks}: give the model it was made from, "
            "or let the run finish."
        )
    for role, linear in checkpoint.load(0).linears.items():
        if not isinstance(linear, QuantizedWeight):
            raise ConfigError(f"{folder} leaves weights at 16 bits: there is nothing to pack.")
        width = linear.codes.shape[1]
        found = linear.grid.bits, linear.grid.group_size or width, linear.grid.symmetric
        if found != (scheme.wbits, scheme.group_size or width, scheme.symmetric):
            raise ConfigError(
                f"{folder} was not made with {scheme}: its {role} has {found[0]} bits in groups of {found[1]}"
                f"{', symmetric' if found[2] else ''}. Give the run's own --scheme."
            )
    return checkpoint.load


def pack(
    block: nn.Module, spec: BlockSpec, state: BlockState, backend: Backend, scheme: Scheme
) -> PreparedBlock:
    """The block with backend layers for its linears and the state's norms, on the device and in the type of `block`.

    Raises:
        UnsupportedSchemeError: If the backend cannot do one of the linears.
    """
    like = next(block.parameters())
    tensors = state.rest.map(lambda t: t.to(like.device, like.dtype))
    tensors.weight = {role: torch.empty(0) for role in state.linears}  # dense weights are never made
    prepared = PreparedBlock(block, spec)
    prepared.load(tensors)
    for role, linear in state.linears.items():
        assert isinstance(linear, QuantizedWeight)
        layer = build(backend, linear.to(like.device), scheme.abits, like.dtype, tensors.bias[role])
        prepared.block.set_submodule(spec.linears[role], layer)
    return prepared.eval()
