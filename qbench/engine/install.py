"""Put a lane's quantized blocks into the model for evaluation, and take them out again.

Evaluators see an ordinary model: they know nothing of lanes, methods or quantizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qbench.engine.lane import LaneResult
from qbench.engine.prepare import PreparedBlock
from qbench.engine.settings import EngineSettings
from qbench.models.base import BlockSpec


@contextmanager
def quantized(
    model: nn.Module, blocks: nn.ModuleList, spec: BlockSpec, result: LaneResult, settings: EngineSettings
) -> Iterator[None]:
    """Within the context the model computes with the lane's integers; afterwards it is what it was.

    Args:
        model: The full-precision model.
        blocks: Its block list; entries are replaced for the duration.
        spec: Description of a block.
        result: The lane's finished blocks.
        settings: For the operands' grids.
    """
    originals = list(blocks)
    dtype = next(model.parameters()).dtype
    try:
        for index, original in enumerate(originals):
            prepared = PreparedBlock(original, spec).to(dtype=dtype)
            prepared.load(result.state(index).tensors("cpu", dtype))
            blocks[index] = prepared.quantize_operands(
                result.lane.scheme, settings.zero_in_range, settings.attention_granularity
            )
        yield
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


@contextmanager
def on_device(model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> Iterator[None]:
    """Within the context the model runs on `device`: whole if it fits, else one block at a time."""
    if device.type == "cpu":
        yield
        return
    handles: list[Any] = []
    try:
        if _fits(model, device):
            model.to(device)
        else:
            inside = {id(module) for module in blocks.modules()}
            for child in model.modules():  # embeddings, rotary tables, last norm and head stay on the device
                if id(child) not in inside and not list(child.children()):
                    child.to(device)
            for block in blocks:
                handles.append(block.register_forward_pre_hook(lambda module, args: _move(module, device)))
                handles.append(block.register_forward_hook(lambda module, args, out: _move(module, "cpu")))
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.to("cpu")


def _move(module: nn.Module, device: torch.device | str) -> None:
    module.to(device)


def _fits(model: nn.Module, device: torch.device) -> bool:
    needed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return needed < 0.7 * torch.cuda.mem_get_info(device)[0]
