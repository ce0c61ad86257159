"""Run a module up to one of its parts and keep what reaches that: a model up to its first block, a block to a linear.

The forward pass is stopped by an exception of its own, so that no error of the model is mistaken for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_NOT_KEPT = ("hidden_states", "past_key_values", "use_cache")


class _Reached(Exception):
    def __init__(self, hidden: Tensor, kwargs: dict[str, Any]):
        super().__init__()
        self.hidden, self.kwargs = hidden, kwargs


@torch.no_grad()
def reaching(part: nn.Module, forward: Callable[[], Any]) -> tuple[Tensor, dict[str, Any]]:
    """What reaches `part` while `forward` runs: hidden states and keyword arguments. What comes behind is not run."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        raise _Reached(hidden, {k: v for k, v in kwargs.items() if k not in _NOT_KEPT})

    handle = part.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        forward()
    except _Reached as reached:
        return reached.hidden, reached.kwargs
    finally:
        handle.remove()
    raise AssertionError("the forward pass did not come by the part that it should stop at")


def block_inputs(
    model: nn.Module, first_block: nn.Module, ids: Tensor
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield (hidden states [1, seq, hidden], keyword arguments) of the first block for each window.

    Args:
        model: Causal language model; runs where its embeddings are.
        first_block: The module to stop at.
        ids: Token windows [n, seq], no padding, so the keyword arguments of all windows are equal.
    """
    for window in ids:
        yield reaching(first_block, functools.partial(model, input_ids=window[None], use_cache=False))


def move(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move tensors inside nested tuples, lists and dicts; floating ones are also cast."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, (tuple, list)):
        return type(value)(move(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: move(item, device, dtype) for key, item in value.items()}
    return value
