"""Probe: run parts of one block on the full-precision path's inputs, with weights of the caller's choice.

For methods that search instead of learn: what reaches a submodule is kept once, then the submodule alone runs on each
candidate. Nothing is quantized here but what the caller puts in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qbench.engine.activations import ActivationStats, Observer
from qbench.engine.capture import reaching
from qbench.engine.hidden import HiddenStates
from qbench.engine.prepare import PreparedBlock
from qbench.engine.settings import EngineSettings
from qbench.transforms.tensors import BlockTensors


class Probe:
    """Access to a block and its calibration inputs."""

    def __init__(
        self,
        prepared: PreparedBlock,
        tensors: BlockTensors,
        inputs: HiddenStates,
        kwargs: dict[str, Any],
        settings: EngineSettings,
    ):
        """Keep what it takes to run the block.

        Args:
            prepared: The block; loaded anew for each use, so it may serve others in between.
            tensors: Its tensors.
            inputs: Its inputs on the full-precision path; only read.
            kwargs: Its keyword arguments.
            settings: Device, arithmetic, batch size.
        """
        self._prepared, self._tensors, self._inputs = prepared, tensors, inputs
        self._kwargs, self._settings = kwargs, settings

    def of(self, tensors: BlockTensors) -> Probe:
        """The same for other tensors of the block."""
        return Probe(self._prepared, tensors, self._inputs, self._kwargs, self._settings)

    def load(self, tensors: BlockTensors | None = None) -> PreparedBlock:
        """The block with unquantized operands and these tensors; by default its own."""
        return self._prepared.load(self._tensors if tensors is None else tensors).quantize_operands(None)

    def observe(self) -> dict[str, ActivationStats]:
        """Input statistics of every linear over all windows."""
        prepared = self.load()
        with Observer(prepared, self._inputs.shape[1]) as observer, torch.no_grad():
            for batch in self._batches(len(self._inputs)):
                with self._settings.autocast_context():
                    prepared(self._inputs.read(batch.start, batch.stop), **self._kwargs)
        return observer.stats

    def part(self, path: str, tokens: int) -> Part:
        """A submodule and what reaches it, from the first windows that hold `tokens` tokens (or all there are)."""
        return Part(self, path, self._windows(tokens))

    def second_moment(self, path: str, tokens: int) -> Tensor:
        """E[xᵀx], [in, in], of what reaches a linear in the first windows that hold `tokens` tokens."""
        n_windows = self._windows(tokens)
        total: Tensor | None = None
        for _, x, _ in self._reaching(path, n_windows):
            x = x.reshape(-1, x.shape[-1])
            total = x.T @ x if total is None else total.addmm_(x.T, x)
        assert total is not None
        return total.div_(n_windows * self._inputs.shape[1])

    def sample(self, path: str, tokens: int) -> Tensor:
        """About `tokens` rows [tokens, in] of what reaches a submodule, evenly spaced over all windows."""
        n_windows, seq_len, _ = self._inputs.shape
        stride = max(1, n_windows * seq_len // tokens)
        rows = []
        for start, x, _ in self._reaching(path, n_windows):
            first = -start * seq_len % stride  # every stride-th token of the whole set, whatever the batches
            rows.append(x.reshape(-1, x.shape[-1])[first::stride])
        return torch.cat(rows)

    def tokens(self, most: int) -> int:
        """Tokens of the first windows that hold `most` tokens (or all there are)."""
        return self._windows(most) * self._inputs.shape[1]

    def _windows(self, tokens: int) -> int:
        return min(len(self._inputs), math.ceil(tokens / self._inputs.shape[1]))

    def _batches(self, n_windows: int) -> Iterator[range]:
        size = self._settings.forward_batch(self._inputs.shape[1])
        for start in range(0, n_windows, size):
            yield range(start, min(start + size, n_windows))

    @torch.no_grad()
    def _reaching(self, path: str, n_windows: int) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """(first window, input [windows, tokens, in], keyword arguments) of a submodule, batch by batch."""
        prepared = self.load()
        part = prepared.block.get_submodule(path)
        for batch in self._batches(n_windows):
            windows = self._inputs.read(batch.start, batch.stop)
            with self._settings.autocast_context():
                x, kwargs = reaching(part, functools.partial(prepared, windows, **self._kwargs))
            yield batch.start, x.float().reshape(len(batch), -1, x.shape[-1]), kwargs


class Part:
    """One submodule of a block with its inputs, and its outputs as they should be."""

    def __init__(self, probe: Probe, path: str, n_windows: int):
        """Run the block once to keep the submodule's inputs, and the submodule once to keep its outputs."""
        self._probe, self._module = probe, probe._prepared.block.get_submodule(path)
        self._kwargs: dict[str, Any] = {}
        self._inputs = self._store(n_windows, self._captured(path, n_windows))
        self._targets = self._store(n_windows, self._outputs())

    def error(self, tensors: BlockTensors, limit: float = math.inf) -> float:
        """Mean squared error of the submodule's output when the block has these tensors.

        Args:
            tensors: Of the block.
            limit: As soon as the error is known to be above this, infinity is returned: the rest need not be run.
        """
        total, count = 0.0, math.prod(self._targets.shape)
        for start, y in self._outputs(tensors):
            target = self._targets.read(start, start + len(y))
            total += float((y - target).square().sum(dtype=torch.float64))
            if total > limit * count:
                return math.inf
        return total / count

    def _captured(self, path: str, n_windows: int) -> Iterator[tuple[int, Tensor]]:
        for start, x, kwargs in self._probe._reaching(path, n_windows):
            self._kwargs = kwargs  # the same for all windows
            yield start, x

    @torch.no_grad()
    def _outputs(self, tensors: BlockTensors | None = None) -> Iterator[tuple[int, Tensor]]:
        self._probe.load(tensors)
        for batch in self._probe._batches(len(self._inputs)):
            with self._probe._settings.autocast_context():
                y = self._module(self._inputs.read(batch.start, batch.stop), **self._kwargs)
            yield batch.start, (y[0] if isinstance(y, tuple) else y).float()

    def _store(self, n_windows: int, batches: Iterator[tuple[int, Tensor]]) -> HiddenStates:
        """Batches of windows, kept where the block's own inputs are: on the device, in memory or on disk."""
        settings, placement = self._probe._settings, self._probe._inputs.placement
        kept: HiddenStates | None = None
        for start, x in batches:
            if kept is None:
                shape = (n_windows, x.shape[1], x.shape[2])
                kept = HiddenStates(shape, settings.device, placement, folder=settings.scratch)
            kept.write(start, x)
        assert kept is not None
        return kept
