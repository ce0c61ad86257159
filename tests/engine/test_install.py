"""Inside `quantized` the model computes what the integers say, after it the model is what it was.

The reference replaces the blocks of a copy by transformers' own layers with dequantized weights and quantizes operands
in hooks; float64, so that no rounding decision depends on the order of additions.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qbench.engine.install import on_device, quantized
from qbench.engine.lane import LaneResult
from qbench.engine.settings import EngineSettings
from tests.blocks import blocks_of, relative
from tests.tiny_runs import CPU, make_lane, naive_logits, reconstruct_lanes, spec_of

TRAINED = {"epochs": 1}
CASES = [
    pytest.param("llama", "rtn", "W4A4", {}, id="llama-rtn-W4A4"),
    pytest.param("llama", "rtn", "W3A16g16", {}, id="llama-rtn-W3A16g16"),
    pytest.param("llama", "rtn", "W4A8KV4-sym", {}, id="llama-rtn-W4A8KV4-sym"),
    pytest.param("llama", "rtn", "W16A16", {}, id="llama-rtn-W16A16"),
    pytest.param("llama", "smoothquant", "W4A4", {}, id="llama-smoothquant-W4A4"),
    pytest.param(
        "llama", "affinequant", "W3A16", TRAINED, id="llama-affinequant-W3A16"
    ),  # matrices after the norms
    pytest.param(
        "llama", "affinequant", "W4A4", TRAINED, id="llama-affinequant-W4A4"
    ),  # biases behind RMSNorms
    pytest.param("qwen2", "affinequant", "W4A4", TRAINED, id="qwen2-affinequant-W4A4"),
    pytest.param("qwen3", "omniquant", "W4A4", TRAINED, id="qwen3-omniquant-W4A4"),
    pytest.param("opt", "omniquant", "W4A4", TRAINED, id="opt-omniquant-W4A4"),
    pytest.param("opt", "affinequant", "W2A16g8", TRAINED, id="opt-affinequant-W2A16g8"),
]


def reconstructed(model: nn.Module, ids: Tensor, method: str, scheme: str, **options) -> LaneResult:
    (result,) = reconstruct_lanes(model, ids, [make_lane(model, method, scheme, **options)])
    return result


@torch.no_grad()
def logits_within(model: nn.Module, result: LaneResult, ids: Tensor, **settings) -> Tensor:
    arranged = EngineSettings(device=CPU, **settings)
    with quantized(model, blocks_of(model), spec_of(model), result, arranged):
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(("family", "method", "scheme", "options"), CASES)
def test_the_model_computes_with_the_lanes_integers(
    build_tiny, tokens, family, method, scheme, options
) -> None:
    model = build_tiny(family).double()
    result = reconstructed(model, tokens[:2], method, scheme, **options)
    found = logits_within(model, result, tokens)
    assert relative(found, naive_logits(model, result, tokens)) < 1e-9
    with torch.no_grad():
        plain = model(input_ids=tokens, use_cache=False).logits
    if scheme == "W16A16":
        assert torch.equal(found, plain)
    else:  # or the comparison would show nothing
        assert relative(found, plain) > 1e-2


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_operands_follow_the_granularity_of_the_settings(build_tiny, tokens, family) -> None:
    model = build_tiny(family).double()
    result = reconstructed(model, tokens[:2], "rtn", "W8A4")
    found = logits_within(model, result, tokens, attention_granularity="per_token")
    assert relative(found, naive_logits(model, result, tokens, per_token=True)) < 1e-9
    assert relative(found, logits_within(model, result, tokens)) > 1e-3


@pytest.mark.parametrize("fails", [False, True], ids=["normally", "by an exception"])
def test_the_model_is_what_it_was_after_leaving(tiny_llama, tokens, fails: bool) -> None:
    result = reconstructed(tiny_llama, tokens[:2], "rtn", "W2A16")
    blocks, modules = blocks_of(tiny_llama), list(blocks_of(tiny_llama))
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    with torch.no_grad():
        expected = tiny_llama(input_ids=tokens).logits
        try:
            with quantized(tiny_llama, blocks, spec_of(tiny_llama), result, EngineSettings(device=CPU)):
                assert not torch.equal(tiny_llama(input_ids=tokens).logits, expected)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert torch.equal(tiny_llama(input_ids=tokens).logits, expected)
    assert all(now is then for now, then in zip(blocks, modules, strict=True))
    after = tiny_llama.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_installed_blocks_have_the_models_dtype(build_tiny, tokens, dtype) -> None:
    model = build_tiny("llama")
    result = reconstructed(model, tokens[:2], "affinequant", "W4A4", epochs=1)
    model = model.to(dtype)
    logits = logits_within(model, result, tokens)
    assert logits.dtype == dtype and bool(logits.isfinite().all())


def test_on_a_cpu_the_model_stays_where_it_is(tiny_llama, tokens) -> None:
    with torch.no_grad(), on_device(tiny_llama, blocks_of(tiny_llama), CPU):
        assert {p.device.type for p in tiny_llama.parameters()} == {"cpu"}
        assert not any(block._forward_pre_hooks for block in blocks_of(tiny_llama))


@pytest.mark.gpu
def test_a_model_that_does_not_fit_is_run_block_by_block(tiny_llama, tokens, monkeypatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr("qbench.engine.install._fits", lambda *_: False)
    resident = []
    with torch.no_grad():
        expected = tiny_llama(input_ids=tokens).logits
        with on_device(tiny_llama, blocks_of(tiny_llama), gpu):
            for block in blocks_of(tiny_llama):  # each block arrives for its own turn, and alone
                block.register_forward_pre_hook(
                    lambda *_: resident.append([next(b.parameters()).is_cuda for b in blocks_of(tiny_llama)])
                )
            found = tiny_llama(input_ids=tokens.to(gpu)).logits.cpu()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert [sum(row) for row in resident] == [1] * len(blocks_of(tiny_llama))
    assert {p.device.type for p in tiny_llama.parameters()} == {"cpu"}
