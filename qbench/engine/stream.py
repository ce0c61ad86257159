"""The stream of hidden states through the model: what every block gets on the full-precision path, and running a block.

Holds the arithmetic of the pass as well: where float16 overflows and that is allowed, it goes on in bfloat16.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qbench.engine import attention
from qbench.engine.capture import block_inputs, move, reaching
from qbench.engine.hidden import HiddenStates, RelativeError, choose_placement
from qbench.engine.prepare import PreparedBlock
from qbench.engine.settings import EngineSettings
from qbench.errors import NumericalError


class Stream:
    """Full-precision path and shared facts of the pass through the model."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        ids: Tensor,
        settings: EngineSettings,
        n_lanes: int = 1,
    ):
        self.settings = settings
        self.notes: list[str] = []
        self.kwargs: dict[str, Any] = {}
        self.inputs: HiddenStates
        for i, (hidden, kwargs) in enumerate(block_inputs(model, blocks[0], ids)):
            if i == 0:
                shape = (len(ids), *hidden.shape[1:])
                # float32: the full-precision path's inputs and outputs, each lane's inputs, and one lane's outputs
                # and second target
                n_bytes = (4 + n_lanes) * settings.dtype.itemsize * hidden.numel() * len(ids)
                placement = settings.placement or choose_placement(n_bytes, settings.device, settings.scratch)
                self.inputs = HiddenStates(
                    shape, settings.device, placement, settings.dtype, settings.scratch
                )
                self.kwargs = move(kwargs, settings.device, settings.dtype)
            self.inputs.write(i, hidden.to(settings.dtype))

    def fall_back(self, what: str) -> None:
        """Go from float16 to bfloat16 for the rest of the pass, if that is allowed; otherwise raise."""
        if self.settings.autocast != torch.float16:
            raise NumericalError(
                f"{what}: is the checkpoint damaged? Try --dtype float32 --autocast float32."
            )
        if not self.settings.allow_fallback:
            raise NumericalError(
                f"{what} in float16, whose largest value is 65504. Use --autocast bfloat16 or float32, or "
                "--allow-fallback to go on in bfloat16 with a note in the row."
            )
        self.settings = replace(self.settings, autocast=torch.bfloat16)
        self.notes.append(f"{what} in float16: the run went on in bfloat16")

    @property
    def may_fall_back(self) -> bool:
        """Whether a lane that fails in float16 may be computed in bfloat16."""
        return self.settings.autocast == torch.float16 and self.settings.allow_fallback

    def in_bfloat16(self) -> Stream:
        """The same stream with bfloat16 products."""
        other = copy.copy(self)
        other.settings = replace(self.settings, autocast=torch.bfloat16)
        return other

    def forward(self, block: PreparedBlock, inputs: HiddenStates) -> HiddenStates:
        """Outputs of a loaded block for all windows."""
        outputs = inputs.empty_like()
        self.each(block, inputs, lambda start, out: outputs.write(start, out))
        return outputs

    @torch.no_grad()
    def each(self, block: PreparedBlock, inputs: HiddenStates, use: Callable[[int, Tensor], None]) -> None:
        """Call use(first window, outputs) for batches of windows."""
        size = self.settings.forward_batch(inputs.shape[1])
        for start in range(0, len(inputs), size):
            with self.settings.autocast_context():
                out = block(inputs.read(start, min(start + size, len(inputs))), **self.kwargs)
            use(start, out.to(self.settings.dtype))

    @torch.no_grad()
    def attention_maps(self, block: PreparedBlock, inputs: HiddenStates) -> HiddenStates:
        """Attention maps of a loaded block for all windows, one at a time: every head's map is in memory at once."""
        n, tokens, _ = inputs.shape
        placement = self.settings.placement or choose_placement(
            4 * n * tokens**2, self.settings.device, self.settings.scratch
        )
        found = HiddenStates(
            (n, tokens, tokens), self.settings.device, placement, folder=self.settings.scratch
        )
        maps = attention.Maps()
        block.record_attention(maps)
        for i in range(n):
            with self.settings.autocast_context():
                block(inputs.read(i, i + 1), **self.kwargs)
            assert maps.latest is not None
            found.write(i, maps.latest)
        block.record_attention(None)
        return found

    @torch.no_grad()
    def second_moments(
        self, block: PreparedBlock, roles: Sequence[str], inputs: HiddenStates
    ) -> dict[str, Tensor]:
        """E[xᵀx] over all tokens, [in, in], of what linears of a loaded block multiply their weights with.

        Args:
            block: With its weights and grids.
            roles: Linears in the order in which they run: the pass through the block ends at the last.
            inputs: Of the block.
        """
        totals: dict[str, Tensor] = {}

        def add(role: str, x: Tensor) -> None:
            x = block.linears[role].operand(x)
            with torch.autocast(x.device.type, enabled=False):
                x = x.to(self.settings.dtype).reshape(-1, x.shape[-1])
                totals[role] = totals[role].addmm_(x.T, x) if role in totals else x.T @ x

        def hook(role: str) -> Any:
            return block.linears[role].register_forward_pre_hook(lambda module, args: add(role, args[0]))

        handles = [hook(role) for role in roles[:-1]]
        size, last = self.settings.forward_batch(inputs.shape[1]), roles[-1]
        try:
            for start in range(0, len(inputs), size):
                windows = inputs.read(start, min(start + size, len(inputs)))
                with self.settings.autocast_context():
                    x, _ = reaching(block.linears[last], functools.partial(block, windows, **self.kwargs))
                    add(last, x)
        finally:
            for handle in handles:
                handle.remove()
        return {role: total.div_(len(inputs) * inputs.shape[1]) for role, total in totals.items()}

    def relative_error(self, block: PreparedBlock, inputs: HiddenStates, target: HiddenStates) -> float:
        """MSE(block(inputs), target) / mean(target²)."""
        error = RelativeError(target)
        self.each(block, inputs, error.add)
        return error.value
