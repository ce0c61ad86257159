"""Run the model up to its first block once and keep what reaches it.

The forward pass is stopped by an exception of its own, so that no error of the model is mistaken for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_NOT_KEPT = ("hidden_states", "past_key_values", "use_cache")


class _ReachedFirstBlock(Exception):
    def __init__(self, hidden: Tensor, kwargs: dict[str, Any]):
        super().__init__()
        self.hidden, self.kwargs = hidden, kwargs


def block_inputs(
    model: nn.Module, first_block: nn.Module, ids: Tensor
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield (hidden states [1, seq, hidden], keyword arguments) of the first block for each window.

    Args:
        model: Causal language model; runs where its embeddings are.
        first_block: The module to stop at.
        ids: Token windows [n, seq], no padding, so the keyword arguments of all windows are equal.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        raise _ReachedFirstBlock(hidden, {k: v for k, v in kwargs.items() if k not in _NOT_KEPT})

    handle = first_block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for window in ids:
            try:
                with torch.no_grad():
                    model(input_ids=window[None], use_cache=False)
            except _ReachedFirstBlock as reached:
                yield reached.hidden, reached.kwargs
    finally:
        handle.remove()


def move(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move tensors inside nested tuples, lists and dicts; floating ones are also cast."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, (tuple, list)):
        return type(value)(move(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: move(item, device, dtype) for key, item in value.items()}
    return value
