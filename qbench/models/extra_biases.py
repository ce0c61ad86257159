"""Biases that a checkpoint holds and its architecture has no place for: fake-quantized folders of AffineQuant.

Folding a learned shift gives q, k, v, o, gate and up of a LLaMA a bias, and its RMSNorms one behind the norm. Plain
transformers drops them with a warning, and the model computes something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qbench.errors import DataError
from qbench.models.base import Architecture


def apply_extra_biases(
    model: nn.Module,
    architecture: Architecture,
    unexpected: Sequence[str],
    location: str,
    revision: str | None,
) -> list[str]:
    """Give linears and norms of the blocks the biases that loading left over.

    Args:
        model: As loaded; changed in place.
        architecture: Names the linears and norms of a block.
        unexpected: Names of the checkpoint's tensors without a place in the model.
        location: Folder or hub name of the checkpoint.
        revision: Of a hub model.

    Returns:
        The names of what was applied.

    Raises:
        DataError: For a bias of anything else, of a wrong shape, or of some blocks only.
    """
    names = sorted(name for name in unexpected if name.endswith(".bias"))
    if not names:
        return []
    paths = {*architecture.linears.values(), *architecture.norms.values()}
    blocks: Any = model.get_submodule(architecture.blocks)
    seen: dict[str, set[int]] = {}
    for name in names:
        match = re.fullmatch(rf"{re.escape(architecture.blocks)}\.(\d+)\.(.+)\.bias", name)
        if match is None or match[2] not in paths or int(match[1]) >= len(blocks):
            raise DataError(
                f"Model {location!r} holds {name}, which a {architecture.name} model has no place for."
            )
        seen.setdefault(match[2], set()).add(int(match[1]))
    for path, indices in seen.items():
        if len(indices) < len(blocks):
            absent = min(set(range(len(blocks))) - indices)
            raise DataError(
                f"Model {location!r} has a bias at {path} in some blocks and none in block {absent}."
            )
    tensors = _read(names, location, revision)
    for name in names:
        module = model.get_submodule(name.removesuffix(".bias"))
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias = tensors[name]
        if tuple(bias.shape) != (weight.shape[0],):
            raise DataError(
                f"Model {location!r}: {name} has shape {list(bias.shape)}, not [{weight.shape[0]}]."
            )
        module.register_parameter("bias", nn.Parameter(bias.to(weight.dtype), requires_grad=False))
        if not isinstance(module, nn.Linear):  # an RMSNorm's forward knows no bias
            module.register_forward_hook(_add_bias)
    return names


def _add_bias(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    bias = module.bias
    return output if bias is None else output + bias  # the engine takes the bias over, and leaves None here


def _read(names: Sequence[str], location: str, revision: str | None) -> dict[str, Tensor]:
    """The named tensors of a checkpoint's safetensors files."""
    from transformers.utils import cached_file

    def path(name: str) -> str | None:
        found = cached_file(location, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else str(found)

    index = path("model.safetensors.index.json")
    files = {name: "model.safetensors" for name in names}
    if index is not None:
        files = {name: json.loads(Path(index).read_text())["weight_map"][name] for name in names}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(files.values())):
        found = path(file)
        if found is None:
            raise DataError(
                f"Model {location!r} has biases that plain transformers drops, and no {file} to read "
                "them from. Save it as safetensors."
            )
        with safe_open(found, framework="pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in names if files[name] == file}
    return tensors
