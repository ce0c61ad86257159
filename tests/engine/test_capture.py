"""What reaches the first block is kept exactly; no error of the model is taken for the capture's own stop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qbench.engine.capture import block_inputs, move
from qbench.errors import UnsupportedSchemeError
from qbench.models.loading import architecture_for
from tests.blocks import VARIANTS, blocks_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_inputs_replay_the_first_block(build_tiny, tokens, variant: str) -> None:
    family, changes = VARIANTS[variant]
    model = build_tiny(family, **changes)
    first, second = blocks_of(model)
    received = []
    handle = second.register_forward_pre_hook(
        lambda module, args, kwargs: received.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        for window in tokens:
            model(input_ids=window[None], use_cache=False)
    handle.remove()
    captured = list(block_inputs(model, first, tokens))
    assert len(captured) == len(tokens)
    with torch.no_grad():
        for (hidden, kwargs), expected in zip(captured, received, strict=True):
            assert hidden.shape == (1, tokens.shape[1], 32)
            out = first(hidden, **kwargs)
            assert torch.equal(out[0] if isinstance(out, tuple) else out, expected)


def test_keyword_arguments_are_the_same_for_every_window_and_hold_no_cache(tiny_llama, tokens) -> None:
    captured = [kwargs for _, kwargs in block_inputs(tiny_llama, blocks_of(tiny_llama)[0], tokens)]
    for kwargs in captured:
        assert not {"hidden_states", "past_key_values", "use_cache"} & set(kwargs)
        for found, first in zip(
            kwargs["position_embeddings"], captured[0]["position_embeddings"], strict=True
        ):
            assert torch.equal(found, first)


def test_later_blocks_do_not_run(tiny_llama, tokens) -> None:
    ran = []
    first, second = blocks_of(tiny_llama)
    for part in (first.self_attn, second, tiny_llama.lm_head):
        part.register_forward_pre_hook(lambda module, args: ran.append(module))
    list(block_inputs(tiny_llama, first, tokens))
    assert not ran


class Broken(nn.Module):
    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error

    def forward(self, *args: object, **kwargs: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [ValueError("inside the model"), StopIteration(), KeyboardInterrupt()], ids=repr
)
def test_errors_of_the_model_propagate(tiny_llama, tokens, error: BaseException) -> None:
    """The authors catch ValueError to stop their capture; an error of the same type must not look like success."""
    tiny_llama.model.embed_tokens = Broken(error)
    first = blocks_of(tiny_llama)[0]
    with pytest.raises(
        (type(error), RuntimeError)
    ) as raised:  # a generator turns StopIteration into RuntimeError
        list(block_inputs(tiny_llama, first, tokens))
    assert raised.value is error or raised.value.__cause__ is error
    assert not first._forward_pre_hooks


def test_no_hook_is_left_when_all_is_read_nor_when_reading_stops_early(tiny_llama, tokens) -> None:
    first = blocks_of(tiny_llama)[0]
    with torch.no_grad():
        before = tiny_llama(input_ids=tokens).logits
    list(block_inputs(tiny_llama, first, tokens))
    assert not first._forward_pre_hooks
    partial = block_inputs(tiny_llama, first, tokens)
    next(partial)
    assert not first._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(tiny_llama(input_ids=tokens).logits, before)


def test_move_casts_floats_and_keeps_integers_and_nesting() -> None:
    value = {"a": (torch.ones(2), [torch.arange(3)]), "b": None, "c": 4, "d": torch.ones(1, dtype=torch.bool)}
    moved = move(value, torch.device("cpu"), torch.float64)
    assert moved["a"][0].dtype == torch.float64
    assert isinstance(moved["a"], tuple) and isinstance(moved["a"][1], list)
    assert moved["a"][1][0].dtype == torch.int64 and moved["d"].dtype == torch.bool
    assert moved["b"] is None and moved["c"] == 4
    assert move(torch.ones(1), torch.device("cpu")).dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_one_capture_serves_every_block_or_the_model_is_refused(build_tiny, tokens, family: str) -> None:
    """Layers with a sliding window take another mask than the first block's."""
    model = build_tiny(family, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert len(set(model.config.layer_types)) == 2
    try:
        architecture_for(model.config)
    except UnsupportedSchemeError:
        return
    first, second = blocks_of(model)
    hidden, kwargs = next(block_inputs(model, first, tokens))
    received = []
    second.register_forward_hook(lambda module, args, out: received.append(out))
    with torch.no_grad():
        model(input_ids=tokens[:1], use_cache=False)
        assert torch.allclose(second(first(hidden, **kwargs), **kwargs), received[0], atol=1e-5)
