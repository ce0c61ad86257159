"""Hidden states of all calibration windows: on the device, in pinned CPU memory, or in a memory-mapped file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qbench.errors import ConfigError

Placement = Literal["device", "cpu", "disk"]


class HiddenStates:
    """A [n, seq, hidden] array read and written window by window on the compute device."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        placement: Placement,
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
    ):
        """Allocate.

        Args:
            shape: (windows, tokens, channels).
            device: Where windows are needed.
            placement: Where the array lives.
            dtype: Element type.
            folder: For `disk`: where the (deleted on close) file goes; default is the system's temporary folder.
        """
        self.shape, self.device, self.placement = shape, device, placement
        self._file = None
        if placement == "disk":
            self._file = tempfile.NamedTemporaryFile(prefix="qbench-hidden-", dir=folder)  # noqa: SIM115 (closed with the array)
            size = shape[0] * shape[1] * shape[2]
            self._file.truncate(size * dtype.itemsize)
            self._data = torch.from_file(self._file.name, shared=True, size=size, dtype=dtype).view(shape)
        elif placement == "cpu" and device.type == "cuda":
            self._data = torch.empty(shape, dtype=dtype, pin_memory=True)
        else:
            self._data = torch.empty(shape, dtype=dtype, device=device)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Windows [start, stop) on the device; a view if they live there, so do not write to it."""
        return self._data[start:stop].to(self.device, non_blocking=True)

    def write(self, start: int, values: Tensor) -> None:
        """Store windows beginning at `start`."""
        self._data[start : start + values.shape[0]].copy_(values)

    def all_finite(self) -> bool:
        """Whether every value is finite."""
        return all(bool(window.isfinite().all()) for window in self._data)

    def empty_like(self) -> HiddenStates:
        """Another array of the same shape and placement."""
        folder = Path(self._file.name).parent if self._file is not None else None
        return HiddenStates(self.shape, self.device, self.placement, self._data.dtype, folder)


class RelativeError:
    """mean((found − target)²) / mean(target²) over all windows, gathered batch by batch in float64."""

    def __init__(self, target: HiddenStates):
        """Begin with no window."""
        self.target = target
        self._sums = torch.zeros(2, dtype=torch.float64, device=target.device)

    def add(self, start: int, found: Tensor) -> None:
        """Take windows beginning at `start`."""
        goal = self.target.read(start, start + found.shape[0])
        self._sums[0] += (found - goal).square().sum(dtype=torch.float64)
        self._sums[1] += goal.square().sum(dtype=torch.float64)

    @property
    def value(self) -> float:
        """0 where the target is."""
        error, energy = self._sums.tolist()
        return error / energy if energy else 0.0


def choose_placement(n_bytes: int, device: torch.device, folder: Path | None = None) -> Placement:
    """Where `n_bytes` of hidden states fit, leaving half of each memory free; decided before anything is allocated.

    Raises:
        ConfigError: If they fit nowhere.
    """
    import shutil

    import psutil

    if device.type == "cuda" and n_bytes < torch.cuda.mem_get_info(device)[0] // 2:
        return "device"
    if n_bytes < psutil.virtual_memory().available // 2:
        return "cpu"
    if n_bytes < shutil.disk_usage(folder or tempfile.gettempdir()).free // 2:
        return "disk"
    raise ConfigError(
        f"The hidden states of the calibration windows need {n_bytes / 2**30:.1f} GiB, more than half of what is "
        "free on the device, in memory and on disk. Use fewer or shorter windows (--nsamples, --seqlen)."
    )
