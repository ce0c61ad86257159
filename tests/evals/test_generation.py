"""Single steps over a fixed cache against whole passes, and the distance that decides whether a graph has a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qbench.evals import generation


@pytest.fixture(scope="module")
def generating() -> tuple[Any, torch.Tensor]:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), torch.randint(3, 200, (2, 17))


@torch.no_grad()
def test_steps_over_a_cache_of_fixed_size_give_the_logits_of_whole_passes(generating: Any) -> None:
    model, prompt = generating
    steps = generation.CachedSteps(model, prompt, 6)
    for _ in range(3):  # what a capture leaves behind must not matter
        steps.step()
    tokens = torch.randint(3, 200, (2, 6))
    found = steps.fed(tokens, steps.step)
    whole = model(input_ids=torch.cat([prompt, tokens], 1)).logits[:, prompt.shape[1] :]
    deviation, agreeing = generation.compare_logits(found, whole)
    assert deviation < 1e-5
    assert agreeing == "12 of 12 tokens the same"


@torch.no_grad()
def test_steps_that_stay_in_their_place_are_no_generation(generating: Any) -> None:
    model, prompt = generating
    steps = generation.CachedSteps(model, prompt, 6)
    with pytest.raises(
        RuntimeError, match="holds 17 tokens after steps to 20: a step does not move its place"
    ):
        steps.fed(prompt[:, :3], lambda: None)  # a replayed graph that does nothing


def test_distance_of_logits() -> None:
    expected = torch.tensor([[[0.0, 2.0], [3.0, 1.0]]])
    assert generation.compare_logits(expected, expected) == (0, "2 of 2 tokens the same")
    found = torch.tensor([[[0.0, 2.0], [1.0, 3.0]]])
    deviation, agreeing = generation.compare_logits(found, expected)
    assert deviation == pytest.approx((8 / 4) ** 0.5)  # off by −2 and 2, spread of ±1 around each mean
    assert agreeing == "1 of 2 tokens the same"


@torch.no_grad()
def test_behind_quantized_inputs_the_least_difference_is_one_of_the_quantization_errors_size() -> None:
    """Why called and replayed steps share a cache: attention kernels differ by less than this, in every row."""
    config = LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=16, num_attention_heads=4, vocab_size=500,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokens = LlamaForCausalLM(config).eval(), torch.randint(500, (1, 64))
    bits: int | None = None
    noise = 0.0

    def change(_: Any, given: tuple[torch.Tensor]) -> torch.Tensor:
        x = given[0] * (1 + noise * torch.randn_like(given[0]))
        if bits is None:
            return x
        step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (x / step).round() * step

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(change)

    def logits(of_bits: int | None, of_noise: float) -> torch.Tensor:
        nonlocal bits, noise
        bits, noise = of_bits, of_noise
        return model(input_ids=tokens).logits

    exact, rounded = logits(None, 0.0), logits(8, 0.0)
    error, _ = generation.compare_logits(rounded, exact)
    moved, _ = generation.compare_logits(logits(None, 1e-4), exact)
    moved_rounded, _ = generation.compare_logits(logits(8, 1e-4), rounded)
    assert moved < 1e-3 < 0.5 * error < moved_rounded
