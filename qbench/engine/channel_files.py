"""Channel statistics as files: `act_scales` and `act_shifts` of the SmoothQuant, OmniQuant and AffineQuant programs.

A file is a dictionary: module name of a linear → one value per input channel, saved by torch.save. Scales are the
largest |x_j|, shifts the running centre (`engine/activations.py`). Their programs read `act_scales/NAME.pt`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from qbench.engine.activations import ActivationStats
from qbench.engine.tensor_files import load_dictionary
from qbench.errors import DataError
from qbench.models.base import BlockSpec

Channels = list[dict[str, Tensor]]  # by block, by linear role, [in]


@dataclass
class ChannelFiles:
    """Statistics to use instead of those observed, and observed ones to write.

    Attributes:
        scales: Replace `ActivationStats.absmax`.
        shifts: Replace `ActivationStats.centre`.
        keep: Whether to keep what is observed, for `write`.
        observed: By block, once kept.
    """

    scales: Channels | None = None
    shifts: Channels | None = None
    keep: bool = False
    observed: list[dict[str, ActivationStats]] = field(default_factory=list)

    def apply(self, index: int, stats: Mapping[str, ActivationStats]) -> dict[str, ActivationStats]:
        """The statistics that methods are to see of a block."""
        if self.keep:
            self.observed.append(
                {r: ActivationStats(s.absmax.cpu(), s.centre.cpu()) for r, s in stats.items()}
            )
        used = {}
        for role, seen in stats.items():
            absmax = seen.absmax if self.scales is None else self.scales[index][role].to(seen.absmax)
            centre = seen.centre if self.shifts is None else self.shifts[index][role].to(seen.centre)
            used[role] = replace(seen, absmax=absmax, centre=centre)
        return used


def read_channels(path: str, spec: BlockSpec, blocks: str) -> Channels:
    """Values of every linear of every block.

    Args:
        path: An `act_scales` or `act_shifts` file.
        spec: Names and shapes inside a block.
        blocks: Path of the block list in the model: `model.layers`.

    Raises:
        ConfigError: If the file cannot be opened.
        DataError: If it holds something else, or is another model's.
    """
    what = f"Channel file {path!r}"
    data = load_dictionary(path, "Channel file")
    if not all(isinstance(values, Tensor) for values in data.values()):
        raise DataError(f"{what} is no dictionary of tensors by module name.")
    numbers = (re.match(rf"{re.escape(blocks)}\.(\d+)\.", str(name)) for name in data)
    beyond = max((int(match[1]) for match in numbers if match), default=-1)
    if beyond >= spec.n_blocks:
        raise DataError(f"{what} names block {beyond}, the model has {spec.n_blocks}: it is another model's.")
    channels: Channels = []
    for index in range(spec.n_blocks):
        channels.append({})
        for role, linear in spec.linears.items():
            name, width = f"{blocks}.{index}.{linear}", spec.shapes[role][1]
            if name not in data:
                raise DataError(f"{what} lacks {name}.")
            values = data[name].detach().float()
            if tuple(values.shape) != (width,):
                raise DataError(f"{what}: {name} has shape {list(values.shape)}, this model needs [{width}].")
            if not bool(values.isfinite().all()):
                raise DataError(f"{what}: {name} has values that are not finite.")
            channels[index][role] = values
    return channels


def write_channels(folder: Path, name: str, files: ChannelFiles, spec: BlockSpec, blocks: str) -> list[Path]:
    """Write what was observed to FOLDER/act_scales/NAME.pt and FOLDER/act_shifts/NAME.pt."""
    paths = []
    for kind, attribute in (("act_scales", "absmax"), ("act_shifts", "centre")):
        path = folder / kind / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                f"{blocks}.{index}.{spec.linears[role]}": getattr(stats, attribute)
                for index, roles in enumerate(files.observed)
                for role, stats in roles.items()
            },
            path,
        )
        paths.append(path)
    return paths
