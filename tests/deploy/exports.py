"""Tiny models quantized and written as folders, for the tests of every format."""

from __future__ import annotations

from pathlib import Path

import torch

from qbench.deploy.folder import write_model
from qbench.deploy.formats import FORMATS, Format
from qbench.engine.install import quantized
from qbench.engine.lane import LaneResult
from qbench.engine.settings import EngineSettings
from qbench.models.loading import LoadedModel, load_model
from qbench.quant.uniform import QuantizedWeight
from tests import model_folders
from tests.tiny_runs import CPU, make_lane, reconstruct_lanes

WIDE = {"num_key_value_heads": 4}  # every width a multiple of 32, as GPTQ needs


def quantize(
    build_tiny, tokens: torch.Tensor, folder: Path, family: str, method: str, scheme: str, options: dict | None = None,
    weight_scale: dict[str, float] | None = None, **changes,
) -> tuple[LoadedModel, LaneResult]:  # fmt: skip
    """A tiny model loaded from a folder of its own, and one lane's result on it.

    Args:
        weight_scale: Role in attention ("q", "k") to the factor that its weights are multiplied by.
    """
    if family != "opt":
        changes = WIDE | changes
    model = build_tiny(family, **changes)
    for name, parameter in model.named_parameters():
        for role, factor in (weight_scale or {}).items():
            if name.endswith(f"{role}_proj.weight"):
                parameter.data.mul_(factor)
    saved = model_folders.save(model.half(), folder / f"my-{family}")
    loaded = load_model(str(saved))
    (result,) = reconstruct_lanes(
        loaded.model, tokens[:3], [make_lane(loaded.model, method, scheme, **(options or {}))]
    )
    return loaded, result


def weights_of(result: LaneResult) -> list[QuantizedWeight]:
    """The quantized linears of all blocks."""
    return [
        w
        for i in range(len(result))
        for w in result.state(i).linears.values()
        if isinstance(w, QuantizedWeight)
    ]


def write(loaded: LoadedModel, result: LaneResult, format_name: str, folder: Path) -> Format:
    """Write a lane in a format, without a certificate."""
    format_ = FORMATS.load(format_name).settle(result.lane.scheme, weights_of(result))
    folder.mkdir(parents=True)
    write_model(loaded, result, format_, folder)
    return format_


@torch.no_grad()
def reference_logits(loaded: LoadedModel, result: LaneResult, ids: torch.Tensor) -> torch.Tensor:
    """What the table's row computes."""
    with quantized(loaded.model, loaded.blocks, loaded.spec, result, EngineSettings(device=CPU)):
        return loaded.model(input_ids=ids).logits
