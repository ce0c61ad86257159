"""EngineSettings: where and in which arithmetic the engine works. Nothing here says what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qbench.engine.hidden import Placement


@dataclass(frozen=True)
class EngineSettings:
    """Resolved by the runner; plain values.

    Attributes:
        device: Where one block at a time is computed.
        autocast: Half-precision type of the block's products, or None for float32. Targets, training and
            propagation all use it.
        batch_size: Windows per optimizer step.
        micro_batch: Windows per forward pass within a step; transforms and weight quantization are shared.
        placement: Where hidden states live; None chooses by free memory.
        zero_in_range: See `Grid`.
        attention_granularity: See `engine.attention.Operands`.
        cuda_graph: Capture the optimizer step (one GPU launch per step); eager where capture fails.
        warm_inverse: Invert matrices by warm-started Newton–Schulz steps instead of factorizations; None: on a GPU.
        allow_fallback: Where float16 overflows, go on in bfloat16 and say so in the row, instead of stopping.
        scratch: Folder for memory-mapped hidden states.
        dtype: Arithmetic and hidden states outside autocast. float64 is the reference that the fast path is held
            against (`benchmarks/same_answer.py`); no run asks for it.
        seed: Of whatever is drawn while blocks are computed.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    batch_size: int = 1
    micro_batch: int | None = None
    placement: Placement | None = None
    zero_in_range: bool = True
    attention_granularity: Literal["per_head", "per_token"] = "per_head"
    cuda_graph: bool = True
    warm_inverse: bool | None = None
    allow_fallback: bool = False
    scratch: Path | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def arithmetic(self) -> str:
        """Type of the products in a block, in words."""
        return str(self.autocast or torch.float32).removeprefix("torch.")

    def forward_batch(self, seq_len: int) -> int:
        """Windows per forward pass where no gradient is kept: about 2k tokens on a CPU, 16k on a GPU."""
        tokens = 16384 if self.device.type == "cuda" else 2048
        return max(1, tokens // seq_len)

    def autocast_context(self) -> Any:
        """Context of a block's forward pass."""
        return torch.autocast(
            self.device.type,
            dtype=self.autocast or torch.bfloat16,
            enabled=self.autocast is not None,
            cache_enabled=False,  # substituted weights change every step
        )
