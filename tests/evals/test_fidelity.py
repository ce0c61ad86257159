"""KL divergence, agreement and loss change against a direct computation in float64 over the whole vocabulary."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from qbench.errors import DataError, NumericalError
from qbench.evals import fidelity as module
from qbench.evals.fidelity import (
    choose_top_k,
    divergence,
    first_difference,
    greedy,
    open_reference,
    write_reference,
)

VOCAB = 96
CPU = {"device": "cpu"}


@pytest.fixture
def ids(tokens) -> torch.Tensor:
    return tokens[:5, :12]


@pytest.fixture
def other(tiny_llama) -> torch.nn.Module:
    """The model with its weights rounded coarsely."""
    model = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                step = parameter.abs().max() / 3
                parameter.copy_((parameter / step).round() * step)
    return model


def direct(model: torch.nn.Module, other: torch.nn.Module, ids: torch.Tensor):
    """KL, agreement and loss change of each position, every model in float64."""
    with torch.no_grad():
        p = copy.deepcopy(model).double()(input_ids=ids).logits[:, :-1].log_softmax(-1)
        q = copy.deepcopy(other).double()(input_ids=ids).logits[:, :-1].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    change = (p - q).gather(-1, ids[:, 1:, None])[..., 0]
    return kl, p.argmax(-1) == q.argmax(-1), change


@pytest.mark.parametrize("batch_size", [1, 2, 5], ids=["one", "not-dividing", "all"])
def test_with_the_whole_vocabulary_it_is_the_exact_divergence(
    tmp_path, tiny_llama, other, ids, batch_size
) -> None:
    reference = write_reference(tmp_path / "r", tiny_llama, ids, batch_size=batch_size, **CPU)
    found = divergence(reference, other, ids, batch_size=batch_size, **CPU)
    kl, agrees, change = direct(tiny_llama, other, ids)
    assert reference.top_k == VOCAB
    torch.testing.assert_close(found.kl, kl, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.agrees, agrees) and not bool(agrees.all())
    torch.testing.assert_close(found.loss_change, change.mean(1), rtol=1e-4, atol=1e-6)
    assert not found.kl_missing.any()


@pytest.mark.parametrize("top_k", [1, 5, 30, 90])
def test_a_cut_reference_is_below_the_truth_and_within_its_bound(
    tmp_path, tiny_llama, other, ids, top_k
) -> None:
    reference = write_reference(tmp_path / "r", tiny_llama, ids, top_k=top_k, **CPU)
    found = divergence(reference, other, ids, **CPU)
    kl, agrees, _ = direct(tiny_llama, other, ids)
    assert reference.top_k == top_k
    assert bool((found.kl <= kl + 1e-6).all()) and bool((found.kl < kl - 1e-6).any())
    assert bool((kl <= found.kl + found.kl_missing + 1e-6).all())
    assert torch.equal(found.agrees, agrees)


def test_the_bound_holds_for_every_tail_that_the_reference_allows() -> None:
    """Any distribution with the same head and tail entropy: 2,000 random tails of two random models."""
    generator = torch.Generator().manual_seed(3)
    for scale in (0.3, 1.0, 3.0):
        p = (scale * torch.randn(1000, 40, generator=generator)).log_softmax(-1)
        q = (p + scale * torch.randn(1000, 40, generator=generator)).log_softmax(-1)
        top = p.topk(7, dim=-1)
        tail = torch.special.entr(p.double().scatter(-1, top.indices, -torch.inf).exp()).sum(-1).neg()
        kl, missing = module._lumped_kl(top.values, top.indices, tail, q)
        truth = (p.double().exp() * (p.double() - q.double())).sum(-1)
        assert bool((kl <= truth + 1e-6).all()) and bool((truth <= kl + missing + 1e-6).all())


@pytest.mark.parametrize("top_k", [9, VOCAB], ids=["cut", "whole"])
def test_a_model_differs_from_its_own_reference_by_exactly_nothing(tmp_path, tiny_llama, ids, top_k) -> None:
    reference = write_reference(tmp_path / "r", tiny_llama, ids, top_k=top_k, batch_size=2, **CPU)
    found = divergence(reference, tiny_llama, ids, batch_size=2, **CPU)
    assert not found.kl.any() and bool(found.agrees.all()) and not found.loss_change.any()
    metrics = found.metrics("own", "named")
    assert metrics["own/kl_mean"].value == metrics["own/kl_max"].value == 0.0
    assert metrics["own/top1_agreement"].value == 1.0


def test_metrics_are_means_and_quantiles_of_positions(tmp_path, tiny_llama, other, ids) -> None:
    reference = write_reference(tmp_path / "r", tiny_llama, ids, **CPU)
    found = divergence(reference, other, ids, **CPU)
    metrics = found.metrics("own", "named")
    kl = found.kl.numpy()
    assert list(metrics) == [
        f"own/{name}"
        for name in (
            "kl_mean", "kl_missing", "top1_agreement", "loss_change", "kl_median", "kl_p95", "kl_p99", "kl_max"
        )
    ]  # fmt: skip
    assert metrics["own/kl_mean"].value == pytest.approx(kl.mean())
    assert metrics["own/kl_mean"].items == pytest.approx(kl.mean(1).tolist())
    assert metrics["own/kl_mean"].stderr == pytest.approx(kl.mean(1).std(ddof=1) / 5**0.5)
    assert metrics["own/kl_p95"].value == pytest.approx(np.percentile(kl, 95))
    assert metrics["own/kl_max"].value == kl.max() and metrics["own/kl_max"].n == kl.size
    assert metrics["own/kl_median"].value == pytest.approx(np.median(kl))
    agreement = metrics["own/top1_agreement"]
    assert (
        agreement.value == pytest.approx(found.agrees.double().mean().item()) and agreement.higher_is_better
    )
    assert {metric.protocol for metric in metrics.values()} == {"named"}


def test_a_reference_is_read_back_and_a_damaged_one_is_not(tmp_path, tiny_llama, other, ids) -> None:
    folder = tmp_path / "deep" / "r"
    written = write_reference(folder, tiny_llama, ids, top_k=9, **CPU)
    read = open_reference(folder)
    assert read is not None and read.tokens.dtype == np.uint16
    for name in ("tokens", "logprobs", "target", "tail"):
        assert np.array_equal(getattr(read, name), getattr(written, name))
    assert [path.name for path in folder.parent.iterdir()] == ["r"]
    (folder / "logprobs.npy").write_bytes(b"x")
    assert open_reference(folder) is None and open_reference(tmp_path / "absent") is None
    write_reference(folder, tiny_llama, ids, top_k=9, **CPU)
    (folder / "reference.json").write_text(json.dumps({}))
    assert open_reference(folder) is None
    first = write_reference(folder, tiny_llama, ids, top_k=9, **CPU).logprobs.copy()
    kept = write_reference(folder, other, ids, top_k=9, **CPU)  # another process was faster
    assert np.array_equal(kept.logprobs, first) and len(list(folder.parent.iterdir())) == 1


def test_nothing_half_written_stays_where_the_model_breaks_down(tmp_path, tiny_llama, ids) -> None:
    def broken(*args, **options):
        raise RuntimeError("no")

    tiny_llama.forward = broken
    with pytest.raises(RuntimeError):
        write_reference(tmp_path / "r", tiny_llama, ids, **CPU)
    assert not list(tmp_path.iterdir())


def test_chunks_of_positions_change_nothing(tmp_path, tiny_llama, other, ids, monkeypatch) -> None:
    whole = divergence(
        write_reference(tmp_path / "a", tiny_llama, ids, **CPU), other, ids, batch_size=5, **CPU
    )
    monkeypatch.setattr(module, "VALUES_PER_CHUNK", 4 * 5 * VOCAB * 4)  # four positions of eleven
    cut = divergence(write_reference(tmp_path / "b", tiny_llama, ids, **CPU), other, ids, batch_size=5, **CPU)
    torch.testing.assert_close(cut.kl, whole.kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(cut.loss_change, whole.loss_change, rtol=1e-5, atol=1e-7)


def test_top_k_fills_the_cache_and_no_more() -> None:
    assert choose_top_k(1000, 8192) == 8192
    assert choose_top_k(module.POSITIONS, 32000) == module.CACHE_BYTES // (6 * module.POSITIONS) == 5461
    assert choose_top_k(module.POSITIONS, 128256) == module.CACHE_BYTES // (8 * module.POSITIONS)


def test_wrong_models_are_refused(tmp_path, build_tiny, tiny_llama, ids) -> None:
    reference = write_reference(tmp_path / "r", tiny_llama, ids, **CPU)
    with pytest.raises(DataError, match="quantized from"):
        divergence(reference, build_tiny("llama", vocab_size=100), ids, **CPU)
    with torch.no_grad():
        tiny_llama.lm_head.weight[3] = torch.nan
    with pytest.raises(NumericalError, match="not numbers"):
        divergence(reference, tiny_llama, ids, **CPU)
    with pytest.raises(DataError, match="at least one window"):
        write_reference(tmp_path / "e", tiny_llama, ids[:0], **CPU)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_greedy_continuations_are_those_of_whole_passes(build_tiny, tokens, family) -> None:
    model, prompts = build_tiny(family), tokens[:3, :6]
    whole = prompts
    with torch.no_grad():
        for _ in range(7):
            whole = torch.cat([whole, model(input_ids=whole).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(model, prompts, 7, "cpu"), whole[:, 6:])


def test_the_first_difference() -> None:
    one = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    other = torch.tensor([[1, 2, 3], [0, 2, 0], [1, 2, 4]])
    assert first_difference(one, other) == [3, 0, 2]
