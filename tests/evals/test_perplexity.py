"""Perplexity against a naive float64 loop over single windows and tokens."""

from __future__ import annotations

import math

import pytest
import torch

from qbench.errors import DataError, NumericalError
from qbench.evals import perplexity as module
from qbench.evals.perplexity import PerplexityResult, perplexity, protocol_name


def naive(model: torch.nn.Module, ids: torch.Tensor) -> list[float]:
    """Mean NLL of each window, one token at a time, each with its own forward pass over its own prefix."""
    model = model.double()
    result = []
    for window in ids.tolist():
        total = 0.0
        for t in range(1, len(window)):
            logits = model(input_ids=torch.tensor([window[:t]])).logits[0, -1].tolist()
            total += math.log(sum(math.exp(x) for x in logits)) - logits[window[t]]
        result.append(total / (len(window) - 1))
    model.float()
    return result


@pytest.fixture(params=["llama", "opt"])
def model(request, build_tiny) -> torch.nn.Module:
    return build_tiny(request.param)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 99], ids=["one", "not-dividing", "all", "larger"])
def test_agrees_with_the_naive_loop(model, tokens, batch_size: int) -> None:
    ids = tokens[:5, :12]
    result = perplexity(model, ids, batch_size=batch_size)
    expected = naive(model, ids)
    assert result.window_nll == pytest.approx(expected, rel=1e-5)
    assert result.value == pytest.approx(math.exp(sum(expected) / 5), rel=1e-5)
    assert result.n_predicted == 5 * 11


def test_a_float64_model_is_scored_in_float64(model, tokens) -> None:
    result = perplexity(model.double(), tokens[:2, :8], batch_size=2)
    assert result.window_nll == pytest.approx(naive(model, tokens[:2, :8]), rel=1e-12)


def test_chunks_of_the_vocabulary_change_nothing(model, tokens, monkeypatch) -> None:
    whole = perplexity(model, tokens, batch_size=3)
    monkeypatch.setattr(module, "VALUES_PER_CHUNK", 3 * 96 * 5)  # five positions at a time, of 23
    assert perplexity(model, tokens, batch_size=3).window_nll == pytest.approx(whole.window_nll, rel=1e-12)
    monkeypatch.setattr(module, "VALUES_PER_CHUNK", 1)
    assert perplexity(model, tokens, batch_size=3).window_nll == pytest.approx(whole.window_nll, rel=1e-12)


def test_a_limit_scores_exactly_the_first_windows(model, tokens) -> None:
    everything = perplexity(model, tokens, batch_size=4)
    some = perplexity(model, tokens[:3], batch_size=4)
    assert some.window_nll == pytest.approx(everything.window_nll[:3], rel=1e-6)
    assert some.value == pytest.approx(math.exp(sum(everything.window_nll[:3]) / 3), rel=1e-6)


def test_uniform_logits_give_the_vocabulary_size(tiny_llama, tokens) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
    result = perplexity(tiny_llama, tokens, batch_size=8)
    assert result.value == pytest.approx(96, rel=1e-6)
    assert result.stderr == pytest.approx(0, abs=1e-4)


def test_half_precision_logits_are_summed_in_float32(tiny_llama, tokens) -> None:
    """In bfloat16 a loss near 5 has steps of 0.03; only the model's own rounding may remain."""
    model = tiny_llama.bfloat16()
    result = perplexity(model, tokens, batch_size=2)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=part).logits for part in tokens.split(2)]).double()[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens[:, 1:], reduction="none"
    ).mean(1)
    assert result.window_nll == pytest.approx(expected.tolist(), abs=1e-6)


def test_leaves_mode_and_gradients_alone(tiny_llama, tokens) -> None:
    tiny_llama.train()
    perplexity(tiny_llama, tokens[:1], batch_size=1)
    assert tiny_llama.training
    tiny_llama.eval()
    perplexity(tiny_llama, tokens[:1], batch_size=1)
    assert not tiny_llama.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tiny_llama.parameters())


def test_dropout_is_off(build_tiny, tokens) -> None:
    model = build_tiny("opt", dropout=0.5).train()
    first, second = (perplexity(model, tokens, batch_size=8).value for _ in range(2))
    assert first == second


def test_progress_counts_windows(tiny_llama, tokens) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(tiny_llama, tokens[:7], batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_standard_error_is_the_delta_methods() -> None:
    result = PerplexityResult([1.0, 2.0, 4.0, 5.0], 12)
    deviation = math.sqrt((4 + 1 + 1 + 4) / 3)
    assert result.value == pytest.approx(math.exp(3))
    assert result.stderr == pytest.approx(math.exp(3) * deviation / 2)
    assert PerplexityResult([1.0], 3).stderr is None


def test_standard_error_matches_the_spread_of_resampled_perplexities() -> None:
    """Against something independent: the bootstrap."""
    generator = torch.Generator().manual_seed(0)
    nll = (3 + 0.3 * torch.randn(200, generator=generator)).double()
    picks = torch.randint(200, (4000, 200), generator=generator)
    bootstrap = nll[picks].mean(1).exp().std().item()
    assert PerplexityResult(nll.tolist(), 1).stderr == pytest.approx(bootstrap, rel=0.05)


def test_an_enormous_loss_is_infinite_not_an_overflow() -> None:
    assert PerplexityResult([800.0, 900.0], 2).value == math.inf


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (3, 0)])
def test_nothing_to_predict_is_a_data_error(tiny_llama, shape) -> None:
    with pytest.raises(DataError, match="at least one window"):
        perplexity(tiny_llama, torch.zeros(shape, dtype=torch.int64), batch_size=2)


def test_not_a_number_is_an_error_that_names_the_window(tiny_llama, tokens) -> None:
    ids = tokens.clone()
    ids[ids == 7] = 8
    ids[5, 3] = 7
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[7] = math.nan
    with pytest.raises(NumericalError, match="window 5"):
        perplexity(tiny_llama, ids, batch_size=4)
    assert not tiny_llama.training


def test_protocol_names() -> None:
    assert protocol_name("wikitext2", 2048, "test") == "wikitext2 (2048, non-overlapping, test)"
    assert protocol_name("stdlib", 512, "evaluation", 64) == (
        "stdlib (512, non-overlapping, evaluation, first 64 windows)"
    )
