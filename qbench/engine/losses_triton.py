"""The squared-error losses on a GPU: one pass over the output and its targets gives the loss and its gradient.

The same as `losses.py`, which stays the definition and the CPU path. Composed of torch's operations the two terms read
and write four times as much, which is felt beside a step of a few milliseconds. Sums have a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _squared_errors(
    output_ptr, target_ptr, second_ptr, difference_ptr, partial_ptr, count,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements: their differences from the targets, added up, and the sum of the squares."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    output = tl.load(output_ptr + at, mask=valid, other=0.0).to(tl.float32)
    difference = output - tl.load(target_ptr + at, mask=valid, other=0.0).to(tl.float32)
    squares = difference * difference
    if SECOND:
        other = output - tl.load(second_ptr + at, mask=valid, other=0.0).to(tl.float32)
        squares += other * other
        difference += other
    tl.store(difference_ptr + at, difference, mask=valid)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares, 0))


def squared_errors(output: Tensor, target: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Σ of all squared differences, their sum per element in float32)."""
    output, target = output.contiguous(), target.contiguous()
    second = None if second is None else second.contiguous()
    programs = triton.cdiv(output.numel(), BLOCK)
    difference = torch.empty(output.shape, dtype=torch.float32, device=output.device)
    partial = torch.empty(programs, dtype=torch.float32, device=output.device)
    _squared_errors[(programs,)](
        output,
        target,
        second,
        difference,
        partial,
        output.numel(),
        SECOND=second is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return partial.sum(), difference
