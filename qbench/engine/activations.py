"""Statistics of what reaches each linear, gathered once per block on the full-precision path for all lanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.engine.prepare import PreparedBlock

CENTRE_MOMENTUM = 0.99  # OmniQuant's generate_act_shifts: 0.99·old + 0.01·new, per window


@dataclass
class ActivationStats:
    """Per-channel statistics of one linear's input.

    Attributes:
        absmax: Largest |x_j| over all tokens, [in].
        centre: (max_j + min_j)/2 per window, as a running average over windows, [in].
        absmean: Mean of |x_j| over all tokens, [in]; None in statistics that were made without it.
        windows: How many windows `absmean` is of.
    """

    absmax: Tensor
    centre: Tensor
    absmean: Tensor | None = None
    windows: int = 1


class Observer:
    """Records the input of every linear of a prepared block while it is entered as a context."""

    def __init__(self, prepared: PreparedBlock, seq_len: int):
        """Observe each linear of `prepared`, fed with windows of `seq_len` tokens."""
        self.stats: dict[str, ActivationStats] = {}
        self._seq_len = seq_len
        self._prepared = prepared
        self._handles: list[Any] = []

    def __enter__(self) -> Observer:
        for role, linear in self._prepared.linears.items():
            self._handles.append(linear.register_forward_pre_hook(self._hook(role)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, role: str) -> Any:
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = (
                args[0].detach().float()
            )  # [windows, tokens, in], or OPT's [windows·tokens, in] before its fc1
            for window in x.reshape(-1, self._seq_len, x.shape[-1]):
                self._update(role, window)

        return observe

    def _update(self, role: str, window: Tensor) -> None:
        low, high = torch.aminmax(window, dim=0)
        absmax, centre = torch.maximum(low.abs(), high.abs()), (high + low) / 2
        absmean = window.abs().mean(0)
        old = self.stats.get(role)
        if old is None:
            self.stats[role] = ActivationStats(absmax, centre, absmean)
        else:
            assert old.absmean is not None
            old.windows += 1
            old.absmean = old.absmean + (absmean - old.absmean) / old.windows
            old.absmax = torch.maximum(old.absmax, absmax)
            old.centre = CENTRE_MOMENTUM * old.centre + (1 - CENTRE_MOMENTUM) * centre
