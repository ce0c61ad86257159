"""Capture one optimizer step as a CUDA graph: one launch instead of hundreds, which bounds small blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

WARM_UP = 3  # side-stream runs before capture, as torch.cuda.graph asks for


def capture_step(
    step: Callable[[], None], parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[], None] | None:
    """Record `step` and return a function that replays it; parameters and optimizer state end as they began.

    Args:
        step: Reads and writes fixed buffers, never waits for the device, and ends with its gradients freed.
        parameters: What the step changes.
        optimizer: Its state is created by the warm-up and then reset.

    Returns:
        The replay, or None where an operation of the step cannot be captured.
    """
    initial = [p.detach().clone() for p in parameters]
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    captured = True
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        captured = False
    with torch.no_grad():
        for parameter, value in zip(parameters, initial, strict=True):
            parameter.copy_(value)
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
    return graph.replay if captured else None


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One stream for all warm-ups: products keep a workspace per stream for good, so new streams would add up."""
    return torch.cuda.Stream(device)
