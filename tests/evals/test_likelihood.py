"""Log-likelihoods of continuations against one forward pass per pair, in float64."""

from __future__ import annotations

import random

import pytest
import torch

from qbench.evals import likelihood as module
from qbench.evals.likelihood import continuation_logprobs

MAX_LENGTH = 24


def naive(model: torch.nn.Module, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Token after token, each from its own prefix."""
    model = model.double()
    total, greedy = 0.0, True
    whole = (context + continuation)[-(MAX_LENGTH + 1) :]
    for t in range(len(whole) - len(continuation), len(whole)):
        logprobs = model(input_ids=torch.tensor([whole[:t]])).logits[0, -1].log_softmax(-1)
        total += float(logprobs[whole[t]])
        greedy &= int(logprobs.argmax()) == whole[t]
    model.float()
    return total, greedy


@pytest.fixture
def pairs() -> list[tuple[list[int], list[int]]]:
    """Lengths from 1 to beyond the model's limit, shared contexts, one pair twice."""
    draw = random.Random(0)
    made = []
    for length in (1, 3, 9, 20, 30):
        context = [draw.randrange(3, 96) for _ in range(length)]
        for more in (1, 1, 4):
            made.append((context, [draw.randrange(3, 96) for _ in range(more)]))
    return [*made, made[4]]


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("tokens_per_pass", [1, 50, 10**6], ids=["one-row", "some-rows", "all-rows"])
def test_agrees_with_the_naive_loop(build_tiny, pairs, family: str, tokens_per_pass: int) -> None:
    model = build_tiny(family)
    with torch.no_grad():
        expected = [naive(model, *pair) for pair in pairs]
    found = continuation_logprobs(
        model, pairs, max_length=MAX_LENGTH, device="cpu", tokens_per_pass=tokens_per_pass
    )
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[4] == found[-1]


def test_the_greedy_continuation_is_recognised(tiny_llama) -> None:
    context = [5, 6, 7]
    with torch.no_grad():
        token = int(tiny_llama(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    pairs = [(context, [token]), (context, [token - 1])]
    found = continuation_logprobs(tiny_llama, pairs, max_length=9, device="cpu")
    assert [greedy for _, greedy in found] == [True, False]


def test_pairs_with_equal_input_take_one_row(tiny_llama, monkeypatch) -> None:
    rows = []
    original = module._logits
    monkeypatch.setattr(
        module, "_logits", lambda m, ids, first: rows.append(len(ids)) or original(m, ids, first)
    )
    continuation_logprobs(
        tiny_llama, [([5, 6], [7]), ([5, 6], [8]), ([5], [6, 9])], max_length=9, device="cpu"
    )
    assert rows == [1]


def test_a_model_without_logits_to_keep_and_small_chunks(tiny_llama, pairs, monkeypatch) -> None:
    whole = continuation_logprobs(tiny_llama, pairs, max_length=MAX_LENGTH, device="cpu")
    monkeypatch.setattr(module, "VALUES_PER_CHUNK", 1)

    class Plain(torch.nn.Module):
        config = tiny_llama.config

        def forward(self, input_ids, use_cache):
            return tiny_llama(input_ids=input_ids, use_cache=use_cache)

    found = continuation_logprobs(Plain(), pairs, max_length=MAX_LENGTH, device="cpu")
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in whole], rel=1e-5)


def test_when_memory_runs_out_the_batch_is_halved(tiny_llama, pairs, monkeypatch) -> None:
    whole = continuation_logprobs(tiny_llama, pairs, max_length=MAX_LENGTH, device="cpu")
    original, sizes = module._logits, []

    def small(model, ids, first):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return original(model, ids, first)

    monkeypatch.setattr(module, "_logits", small)
    found = continuation_logprobs(tiny_llama, pairs, max_length=MAX_LENGTH, device="cpu")
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in whole], rel=1e-5)
    assert sizes[0] > 2 >= sizes[-1]


def test_progress_reaches_the_end(tiny_llama, pairs) -> None:
    seen: list[tuple[int, int]] = []
    continuation_logprobs(
        tiny_llama,
        pairs,
        max_length=MAX_LENGTH,
        device="cpu",
        tokens_per_pass=60,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (len(pairs), len(pairs)) and len(seen) > 2
    assert continuation_logprobs(tiny_llama, [], max_length=9, device="cpu") == []
