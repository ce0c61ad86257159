"""Runtimes are tried through the worker; what one computes wrongly is named: a linear, a block, or why it did not load.

The worker runs in this process here, but for one test: starting Python and transformers anew takes seconds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.deploy import certificate, runtime_worker
from qbench.deploy.certificate import check_runtime, choose_probe, reference, runtimes_at_hand, scheme_in
from qbench.deploy.compressed import round_inputs
from qbench.deploy.formats import FORMATS
from qbench.engine.settings import EngineSettings
from qbench.errors import ConfigError
from qbench.quant.fake import fake_quantize
from qbench.quant.grid import Grid
from qbench.results import RuntimeCheck
from tests.deploy.exports import quantize, write
from tests.tiny_runs import CPU

SETTINGS = EngineSettings(device=CPU)


@pytest.fixture
def in_process(monkeypatch, capsys) -> None:
    def ask(python: str, request: Path) -> tuple[dict, str | None]:
        capsys.readouterr()
        runtime_worker.main(str(request))
        reply = json.loads(capsys.readouterr().out.splitlines()[-1])
        return reply, reply.get("error")

    monkeypatch.setattr(certificate, "_ask", ask)


def check(loaded, result, format_, folder: Path, tokens: torch.Tensor, python: str = "") -> RuntimeCheck:
    probe = choose_probe(tokens, "tokens", 96)
    scheme = scheme_in(format_, result.lane.scheme)
    rounding = format_.rounding(result.lane.scheme)
    expected = reference(loaded, result, SETTINGS, probe, scheme, rounding)
    return check_runtime("transformers", python, loaded, result, folder, probe, expected, rounding, "float32")


@pytest.fixture
def plain(build_tiny, tokens, tmp_path):
    """A lane and its fake-quantized folder."""
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g16")
    format_ = write(loaded, result, "fake", tmp_path / "out")
    return loaded, result, format_, tmp_path / "out"


def change(folder: Path, name: str, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_another_python_verifies_a_folder(plain, tokens) -> None:
    import sys

    found = check(*plain, tokens, sys.executable)
    assert found.verified, found.failed_at
    assert found.dtype == "float32"
    assert found.versions["torch"] and found.versions["transformers"]
    assert found.kl_mean < 1e-9 and found.top1_agreement == 1


def test_a_wrong_linear_is_named(plain, tokens, in_process) -> None:
    loaded, result, format_, folder = plain
    scale = float(result.state(1).linears["up"].scale[3, 1])

    def off_by_one(weight: torch.Tensor) -> None:
        weight[3, 16:32] += scale  # what a zero point too small by one does to its group

    change(folder, "model.layers.1.mlp.up_proj.weight", off_by_one)
    found = check(loaded, result, format_, folder, tokens)
    assert not found.verified
    assert found.failed_at.startswith("layers.1.up_proj (response differs by 0.")
    assert found.kl_mean > 0


def test_one_zero_point_stands_out_of_half_precision_too(
    build_tiny, tokens, tmp_path, in_process, monkeypatch
) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g16")
    format_ = write(loaded, result, "fake", tmp_path / "out")
    half = replace(format_, name="awq")  # tolerances follow what the runtime reports

    def load_half(runtime: str, folder: str, dtype: str):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)

    monkeypatch.setattr(runtime_worker, "load", load_half)
    assert check(loaded, result, half, tmp_path / "out", tokens).verified
    scale = float(result.state(0).linears["q"].scale[0, 0])

    def off_by_one(weight: torch.Tensor) -> None:
        weight[0, :16] += scale

    change(tmp_path / "out", "model.layers.0.self_attn.q_proj.weight", off_by_one)
    found = check(loaded, result, half, tmp_path / "out", tokens)
    assert found.dtype == "float16"
    assert found.failed_at.startswith("layers.0.q_proj")


def test_what_is_wrong_between_linears_is_named_by_its_block(plain, tokens, in_process) -> None:
    change(plain[3], "model.layers.1.post_attention_layernorm.weight", lambda weight: weight[4].add_(0.5))
    found = check(*plain, tokens)
    assert found.failed_at.startswith("layers.1 (outputs differ by")


def test_what_is_wrong_behind_the_blocks_is_seen_in_the_logits(plain, tokens, in_process) -> None:
    change(plain[3], "model.norm.weight", lambda weight: weight[4].add_(0.5))
    found = check(*plain, tokens)
    assert found.failed_at.startswith("logits (")


def test_a_folder_that_does_not_load_is_a_failure_with_the_reason(plain, tokens, in_process) -> None:
    (plain[3] / "model.safetensors").write_bytes(b"not a safetensors file")
    found = check(*plain, tokens)
    assert not found.verified
    assert found.failed_at.startswith("loading: ")
    assert found.perplexity is None


@pytest.mark.parametrize("scheme", ["W4A16g16", "W3A16g16-sym", "W8A16-sym", "W8A8", "W8A8-sym", "W4A8-sym"])
def test_compressed_tensors_itself_computes_the_same(
    build_tiny, tokens, tmp_path, in_process, scheme
) -> None:
    pytest.importorskip("compressed_tensors", reason="the extra `export` is not installed")
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", scheme)
    format_ = write(loaded, result, "compressed-tensors", tmp_path / "out")
    found = check(loaded, result, format_, tmp_path / "out", tokens)
    assert found.verified, found.failed_at
    if found.dtype == "float32":  # quantized inputs included: the reference rounds them in the same order
        assert found.kl_mean < 1e-9
    if scheme.startswith(("W8A8", "W4A8")):
        assert found.reference_perplexity == pytest.approx(found.perplexity, rel=1e-6)


def test_a_linear_is_tried_with_an_input_of_the_shape_that_it_gets(
    build_tiny, tokens, tmp_path, in_process
) -> None:
    """OPT flattens the input of its MLP, for which compressed-tensors 0.20.0 takes one range for all tokens."""
    pytest.importorskip("compressed_tensors", reason="the extra `export` is not installed")
    loaded, result = quantize(build_tiny, tokens, tmp_path, "opt", "rtn", "W8A8-sym")
    format_ = write(loaded, result, "compressed-tensors", tmp_path / "out")
    found = check(loaded, result, format_, tmp_path / "out", tokens)
    assert found.failed_at.startswith("layers.0.fc1 (response differs by")


def test_inputs_are_rounded_as_compressed_tensors_rounds_them() -> None:
    quantization = pytest.importorskip(
        "compressed_tensors.quantization", reason="the extra `export` is not installed"
    )
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    x = torch.randn(2, 300, 128, generator=torch.Generator().manual_seed(0)) * 3 + 0.7
    x[0, 0] = 0
    x[0, 1] = x[0, 1].abs()
    x[1, 0, :2] = torch.tensor([-20.0, 235.0])  # a step of 1, and values just below the middle of two codes
    x[1, 0, 2:] = torch.nextafter(torch.arange(1.5, 253, 2), torch.tensor(0.0))
    args = quantization.QuantizationArgs(num_bits=8, symmetric=False, strategy="token", dynamic=True)
    scale, zero = helpers.compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    assert torch.equal(round_inputs(x, 8), forward.fake_quantize(x, scale, zero, args))


def test_the_order_of_rounding_decides_between_two_codes() -> None:
    """At a step of 1 and a zero point of −108: 1.4999999 rounds to 1, and 1.4999999 − 108 is −106.5 in float32."""
    below = torch.nextafter(torch.arange(1.5, 20, 2), torch.tensor(0.0))
    x = torch.cat([torch.tensor([-20.0, 235.0]), below])[None]
    assert fake_quantize(x, Grid(8))[0, 2:].tolist() == list(range(1, 20, 2))
    assert round_inputs(x, 8)[0, 2:].tolist() == list(range(2, 21, 2))


def test_runtimes_that_cannot_read_a_folder_are_not_tried() -> None:
    import sys

    gptq = FORMATS.load("gptq")
    tried, left = runtimes_at_hand(gptq, {"auto-gptq": sys.executable})
    assert tried["auto-gptq"] == sys.executable
    tried, left = runtimes_at_hand(replace(gptq, version=2), {"auto-gptq": sys.executable})
    assert "auto-gptq" not in tried and left["auto-gptq"] == "reads gptq_v2 as garbage"
    _, left = runtimes_at_hand(FORMATS.load("compressed-tensors"), {"gptqmodel": sys.executable})
    assert left["gptqmodel"] == "does not read compressed-tensors"
    with pytest.raises(ConfigError, match="Unknown runtime 'vllm'"):
        runtimes_at_hand(gptq, {"vllm": sys.executable})
    with pytest.raises(ConfigError, match="there is no such file"):
        runtimes_at_hand(gptq, {"gptqmodel": "/nowhere/python"})


def test_a_folder_with_a_runtimes_name_is_no_runtime(tmp_path, monkeypatch) -> None:
    (tmp_path / "auto_gptq").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    _, left = runtimes_at_hand(FORMATS.load("gptq"), {})
    assert left["auto-gptq"].startswith("not installed here: auto_gptq")
