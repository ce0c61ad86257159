"""An export is written whole, certified against what was measured, and refused before any work where it cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.deploy import certificate as certificate_module
from qbench.deploy.certificate import check_dequantized, choose_probe, reference, scheme_in
from qbench.deploy.export import account, foresee, half_precision_note
from qbench.deploy.folder import RECORD, appearing, folder_name, require_replaceable, write_model
from qbench.deploy.formats import FORMATS
from qbench.engine.settings import EngineSettings
from qbench.errors import ConfigError, UnsupportedSchemeError
from qbench.quant import packing
from qbench.results import RuntimeCheck
from qbench.scheme import Scheme
from tests.deploy.exports import quantize, weights_of, write
from tests.tiny_runs import CPU, make_lane

SETTINGS = EngineSettings(device=CPU)
FOLDED = {"use_ln_matrix": False, "shift": False, "epochs": 1}


def certify(loaded, result, format_, folder: Path, tokens: torch.Tensor) -> RuntimeCheck:
    """What qbench's own reader finds in a folder."""
    probe = choose_probe(tokens, "tokens", 96)
    expected = reference(loaded, result, SETTINGS, probe, scheme_in(format_, result.lane.scheme))
    return check_dequantized(loaded, result, format_, folder, probe, expected)


SHIFTED = {"let": True, "shift": True, "epochs": 1}

WHOLE = [
    pytest.param("gptq", "llama", "affinequant", "W4A16g16", FOLDED, id="gptq llama affinequant"),
    pytest.param("gptq", "opt", "omniquant", "W3A16g32", SHIFTED, id="gptq opt shift"),
    pytest.param("gptq", "llama", "rtn", "W2A16g16", {}, id="gptq 2 bits"),
    pytest.param("awq", "llama", "rtn", "W4A16g16", {}, id="awq"),
    pytest.param("compressed-tensors", "qwen3", "rtn", "W3A16g16", {}, id="compressed-tensors 3 bits"),
    pytest.param("compressed-tensors", "llama", "rtn", "W8A8", {}, id="compressed-tensors W8A8"),
    pytest.param("compressed-tensors", "opt", "smoothquant", "W8A8-sym", {}, id="compressed-tensors W8A8-sym"),
    pytest.param("compressed-tensors", "llama", "rtn", "W4A8", {}, id="compressed-tensors W4A8"),
    pytest.param("fake", "llama", "rtn", "W4A4", {}, id="fake"),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "family", "method", "scheme", "options"), WHOLE)
def test_a_folder_computes_exactly_what_was_measured(
    build_tiny, tokens, tmp_path, format_, family, method, scheme, options
) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, family, method, scheme, options)
    settled = write(loaded, result, format_, tmp_path / "out")
    check = certify(loaded, result, settled, tmp_path / "out", tokens)
    assert check.verified, check.failed_at
    assert check.top1_agreement == 1
    assert check.kl_mean < 1e-9
    assert check.largest_logit_difference < 1e-4


def _zero_point_off_by_one(tensors: dict, name: str) -> None:
    words = tensors[f"{name}.qzeros"]
    zeros = packing.unpack(words, 4, 32)
    zeros[2, 5] += 1
    tensors[f"{name}.qzeros"] = packing.pack(zeros, 4)


def _scale_swapped(tensors: dict, name: str) -> None:
    scales = tensors[f"{name}.scales"]
    scales[[1, 2], 7] = scales[[2, 1], 7]


def _code_off_by_one(tensors: dict, name: str) -> None:
    tensors[f"{name}.qweight"][0, 3] ^= 1


FAULTS = [
    pytest.param(_zero_point_off_by_one, "output channel 5, group 2", id="a zero point"),
    pytest.param(_scale_swapped, "output channel 7, group 1", id="a group's scale"),
    pytest.param(_code_off_by_one, "output channel 3, group 0", id="one code"),
]


@pytest.mark.parametrize(("break_", "where"), FAULTS)
def test_a_broken_export_is_caught_and_named(build_tiny, tokens, tmp_path, break_, where) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g16-sym")
    settled = write(loaded, result, "gptq", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    break_(tensors, "model.layers.1.mlp.down_proj")
    save_file(tensors, file, {"format": "pt"})
    check = certify(loaded, result, settled, tmp_path / "out", tokens)
    assert not check.verified
    assert check.failed_at == f"layers.1.down_proj ({where})"
    assert check.largest_logit_difference > 0


@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_what_is_not_a_linear_is_compared_too(build_tiny, tokens, tmp_path, name) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g16-sym")
    settled = write(loaded, result, "gptq", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors[name].view(-1)[3] += 0.01
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    check = certify(loaded, result, settled, tmp_path / "out", tokens)
    assert not check.verified and check.failed_at == name


@pytest.mark.parametrize("scheme", ["W4A16g16", "W2A16g16", "W3A16g32", "W8A16", "W4A16-sym"])
@pytest.mark.parametrize("format_", ["gptq", "compressed-tensors"])
def test_weights_take_the_bytes_that_the_table_states(build_tiny, tokens, tmp_path, format_, scheme) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", scheme, intermediate_size=256)
    write(loaded, result, format_, tmp_path / "out")
    bits = result.weight_bits / (loaded.spec.n_weights * len(result))
    sizes = account(tmp_path / "out", loaded, bits)
    stored_zeros = format_ == "gptq" and scheme.endswith("-sym")  # the format has them, the table counts none
    allowed = 0.04 if stored_zeros else 0.001
    assert abs(sizes["weights"] / sizes["expected"] - 1) < allowed
    parts = ("weights", "bookkeeping", "norms_and_biases", "embeddings_and_head")
    assert 0 < sizes["files"] - sum(sizes[part] for part in parts) < 8000  # headers


def test_shards_hold_every_tensor_once(build_tiny, tokens, tmp_path) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g16-sym")
    settled = FORMATS.load("gptq").settle(result.lane.scheme, weights_of(result))
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    write_model(loaded, result, settled, tmp_path / "one")
    write_model(loaded, result, settled, tmp_path / "many", max_shard_bytes=8000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    found: dict = {}
    for file in files:
        part = load_file(file)
        assert not found.keys() & part.keys()
        found |= part
        size = sum(t.numel() * t.element_size() for t in part.values())
        assert size <= 8000 or len(part) == 1
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert certify(loaded, result, settled, tmp_path / "many", tokens).verified


def test_an_interrupted_export_leaves_the_old_one(tmp_path) -> None:
    target = tmp_path / "Model-RTN-W4A16"
    with appearing(target) as draft:
        (draft / RECORD).write_text(json.dumps({"qbench": {"id": "first"}}))
    with pytest.raises(KeyboardInterrupt), appearing(target) as draft:
        (draft / RECORD).write_text(json.dumps({"qbench": {"id": "second"}}))
        raise KeyboardInterrupt
    assert json.loads((target / RECORD).read_text()) == {"qbench": {"id": "first"}}
    with appearing(target) as draft:
        (draft / RECORD).write_text(json.dumps({"qbench": {"id": "third"}}))
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    require_replaceable(target, "third")
    with pytest.raises(ConfigError, match="holds the export of another row"):
        require_replaceable(target, "first")


def test_a_folder_of_something_else_is_not_written_over(tmp_path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no export of qbench"), appearing(tmp_path / "taken"):
        pass
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("model", ["meta/Llama-2-7b", "/some/where/Llama-2-7b", "Llama-2-7b/"])
def test_folders_are_named_as_on_hubs(model) -> None:
    assert folder_name(model, "AffineQuant", Scheme.parse("W4A16g128")) == "Llama-2-7b-AffineQuant-W4A16-g128"
    assert folder_name(model, "RTN", Scheme.parse("W8A8-sym")) == "Llama-2-7b-RTN-W8A8-sym"


REFUSED = [
    pytest.param("llama", "affinequant", "W3A16g16", {}, "gptq",
                 "run time, shifts leave a bias behind each RMSNorm (--no-use-ln-matrix with", id="norm matrices"),
    pytest.param("llama", "affinequant", "W3A16g16", {"use_ln_matrix": False}, "gptq",
                 "shifts leave a bias behind each RMSNorm (--no-shift", id="RMSNorm shift"),
    pytest.param("mistral", "omniquant", "W3A16g16", {"let": True, "shift": True, "sites": ["value_out"]}, "awq",
                 "awq holds weights of 4 bits, W3A16g16 has 3", id="bits of awq"),
    pytest.param("mistral", "omniquant", "W4A16g16", {"let": True, "shift": True, "sites": ["value_out"]}, "awq",
                 "mistral has no bias on o, v (--no-shift", id="no bias in the architecture"),
    pytest.param("llama", "rtn", "W4A4", {}, "gptq", "gptq has no quantized activations", id="activations"),
    pytest.param("llama", "rtn", "W4A4", {}, "compressed-tensors", "8 or 16 bits, W4A4 has 4", id="4-bit activations"),
    pytest.param("llama", "rtn", "W5A16", {}, "gptq", "2, 3, 4 or 8 bits, W5A16 has 5", id="bits of gptq"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "method", "scheme", "options", "format_", "words"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_before_calibration(
    build_tiny, tokens, tmp_path, family, method, scheme, options, format_, words
) -> None:
    loaded, _ = quantize(build_tiny, tokens, tmp_path, family, "rtn", "W4A16")
    lane = make_lane(loaded.model, method, scheme, **options)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with pytest.raises(UnsupportedSchemeError) as caught:
        foresee(loaded, [lane], [format_], zero_in_range=True)
    assert words in str(caught.value)
    assert f"cannot be exported as {format_}" in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_what_a_format_can_hold_is_not_refused(build_tiny, tokens, tmp_path) -> None:
    loaded, _ = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16")
    lanes = [
        make_lane(loaded.model, "affinequant", "W4A16g16", use_ln_matrix=False, shift=False),
        make_lane(loaded.model, "omniquant", "W4A16g16", let=True, shift=True, sites=["value_out"]),
        make_lane(loaded.model, "rtn", "W4A16"),
    ]
    assert not foresee(loaded, lanes, ["gptq", "awq", "compressed-tensors", "fake"], zero_in_range=True)


def test_what_runtimes_leave_out_is_said_before_calibration(build_tiny, tokens, tmp_path) -> None:
    loaded, _ = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16")
    lanes = [make_lane(loaded.model, "rtn", scheme) for scheme in ("W8A8", "W8A8KV16")]
    (note,) = foresee(loaded, lanes, ["compressed-tensors"], zero_in_range=True)
    assert note.startswith("rtn W8A8 as compressed-tensors: the row also quantizes q, k and v to 8 bits")
    assert "they compute W8A8KV16; choose that scheme" in note


@pytest.mark.parametrize("size", [1.0, 3e4], ids=["bears it", "does not"])
def test_a_model_that_float16_cannot_hold_is_told_from_one_that_it_can(
    build_tiny, tokens, tmp_path, size
) -> None:
    """Attention logits that float32 holds and float16 does not: both factors of the product grow alike."""
    loaded, result = quantize(
        build_tiny, tokens, tmp_path, "llama", "rtn", "W8A16g16", weight_scale={"q": size, "k": size}
    )
    settled = write(loaded, result, "gptq", tmp_path / "out")
    probe = choose_probe(tokens, "tokens", 96)
    expected = reference(loaded, result, SETTINGS, probe, scheme_in(settled, result.lane.scheme))
    assert certify(loaded, result, settled, tmp_path / "out", tokens).verified
    departure = certificate_module.departure_in_half(tmp_path / "out", probe, expected)
    sentence = half_precision_note(tmp_path / "out", probe, expected, settled)
    if size == 1:
        assert departure < 1e-3 and sentence is None
    else:
        assert departure > 1e-3
        assert "torch.nn.Module.float(model)" in sentence


def test_the_published_quantizer_form_is_refused(build_tiny, tokens, tmp_path) -> None:
    loaded, _ = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16")
    with pytest.raises(UnsupportedSchemeError, match="leave --published-form"):
        foresee(loaded, [make_lane(loaded.model, "rtn", "W4A16")], ["gptq"], zero_in_range=False)
    foresee(loaded, [make_lane(loaded.model, "rtn", "W4A16-sym")], ["gptq"], zero_in_range=False)


def test_figures_are_those_of_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    goal, found = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    ids = torch.randint(7, (2, 5), generator=generator)
    measured = certificate_module.figures(found, goal, ids)
    kl, same, loss = 0.0, 0, 0.0
    for w in range(2):
        for t in range(5):
            p, q = goal[w, t].softmax(0).tolist(), found[w, t].softmax(0).tolist()
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 10
            same += p.index(max(p)) == q.index(max(q))
            if t + 1 < 5:
                loss -= math.log(q[ids[w, t + 1]]) / 8
    assert measured["kl_mean"] == pytest.approx(kl, rel=1e-5)
    assert measured["top1_agreement"] == same / 10
    assert measured["largest_logit_difference"] == float((goal - found).abs().max())
    assert math.log(measured["perplexity"]) == pytest.approx(loss, rel=1e-5)
