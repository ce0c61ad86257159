"""Folders of packed integers are read back to the integers that were written, and score as what was measured."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.errors import DataError, UnsupportedSchemeError
from qbench.models.loading import load_model
from qbench.models.packed import PackedFolder, load_packed
from qbench.quant.uniform import QuantizedWeight
from tests.blocks import relative
from tests.deploy.exports import quantize, reference_logits, write

HELD = [
    pytest.param(f"{format_}", scheme, id=f"{format_} {scheme}")
    for format_, schemes in {
        "gptq": ("W2A16g8", "W3A16g32", "W4A16g16-sym", "W4A16", "W8A16g32", "W8A16-sym"),
        "awq": ("W4A16g16", "W4A16-sym"),
        "compressed-tensors": (
            "W2A16g8",
            "W3A16g16",
            "W4A16g16",
            "W4A16-sym",
            "W5A16",
            "W8A16g32",
            "W8A16-sym",
        ),
    }.items()
    for scheme in schemes
]


@pytest.mark.parametrize(("format_", "scheme"), HELD)
def test_integers_come_back_and_the_model_computes_the_same(
    build_tiny, tokens, tmp_path, format_, scheme
) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", scheme)
    folder = tmp_path / "packed"
    write(loaded, result, format_, folder)
    packed = PackedFolder(folder)
    assert len(packed.linears) == 14
    for i in range(2):
        for role, path in loaded.spec.linears.items():
            expected, found = result.state(i).linears[role], packed.linear(f"model.layers.{i}.{path}")
            assert isinstance(expected, QuantizedWeight)
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scale, expected.scale)
            assert torch.equal(found.zero_point, expected.zero_point)
            assert torch.equal(found.dequantize(), expected.dequantize())
    with torch.no_grad():
        found = load_packed(folder)(input_ids=tokens).logits
    assert relative(found, reference_logits(loaded, result, tokens)) < 1e-6


@pytest.mark.parametrize("family", ["opt", "qwen2", "mistral"])
def test_other_families_and_their_biases(build_tiny, tokens, tmp_path, family) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, family, "rtn", "W4A16g16")
    write(loaded, result, "gptq", tmp_path / "packed")
    with torch.no_grad():
        found = load_packed(tmp_path / "packed")(input_ids=tokens).logits
    assert relative(found, reference_logits(loaded, result, tokens)) < 1e-6


def test_a_packed_folder_is_loaded_by_name_as_any_model(build_tiny, tokens, tmp_path) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g16-sym")
    write(loaded, result, "gptq", tmp_path / "packed")
    again = load_model(str(tmp_path / "packed"))
    assert again.packed == "gptq v1, weights 4 bits"
    assert loaded.packed is None
    assert again.spec.shapes == loaded.spec.shapes
    with torch.no_grad():
        found = again.model(input_ids=tokens).logits
    assert relative(found, reference_logits(loaded, result, tokens)) < 1e-6


def test_autogptqs_own_settings_file_is_enough(build_tiny, tokens, tmp_path) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g16-sym")
    folder = tmp_path / "packed"
    write(loaded, result, "gptq", folder)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    known = ("bits", "group_size", "desc_act", "sym")  # AutoGPTQ writes no quant_method
    (folder / "quantize_config.json").write_text(json.dumps({key: settings[key] for key in known}))
    assert load_model(str(folder)).packed == "gptq v1, weights 4 bits"


def test_reordered_columns_follow_g_idx(build_tiny, tokens, tmp_path) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g8-sym")
    folder = tmp_path / "packed"
    write(loaded, result, "gptq", folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][order]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weight = PackedFolder(folder).linear(name)
    expected = torch.empty(32, 64)
    for column in range(64):
        group = int(order[column]) // 8
        expected[:, column] = (weight.codes[:, column].float() - 8) * weight.scale[:, group].float()
    assert torch.equal(weight.dequantize(), expected)


def test_inputs_are_quantized_where_the_folder_says_so(build_tiny, tokens, tmp_path) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W8A8")
    write(loaded, result, "compressed-tensors", tmp_path / "packed")
    model = load_model(str(tmp_path / "packed"))
    assert model.packed == "compressed-tensors, weights 8 bits, inputs 8"
    seen = []
    down = model.model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        model.model(input_ids=tokens)
    rows = seen[0].flatten(0, 1)
    assert max(len(row.unique()) for row in rows) <= 64
    steps = rows.diff(dim=-1).abs()  # multiples of the row's own step
    step = (rows.amax(-1).clamp(min=0) - rows.amin(-1).clamp(max=0)) / 255
    ratio = steps / step[:, None]
    assert (ratio - ratio.round()).abs().max() < 1e-2


def test_damage_is_named(build_tiny, tokens, tmp_path) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g16-sym")
    folder = tmp_path / "packed"
    write(loaded, result, "gptq", folder)
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for part, change in {
        "scales": lambda t: t[:1],
        "qzeros": lambda t: t[:, :-1].contiguous(),
        "qweight": lambda t: t[:-1].contiguous(),
    }.items():
        save_file(whole | {f"{name}.{part}": change(whole[f"{name}.{part}"])}, folder / "model.safetensors")
        with pytest.raises(DataError, match=rf"{name} in .* is damaged"):
            load_packed(folder)
    save_file({k: v for k, v in whole.items() if k != f"{name}.scales"}, folder / "model.safetensors")
    with pytest.raises(DataError, match=rf"lacks the tensor '{name}.scales'"):
        load_packed(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(DataError, match="is no index of weights, or damaged"):
        load_packed(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"quant_method": "bitsandbytes"}, "is quantized by 'bitsandbytes'", id="method"),
        pytest.param({"bits": 5}, "bits=5", id="bits"),
        pytest.param({"checkpoint_format": "marlin"}, "checkpoint_format='marlin'", id="checkpoint format"),
        pytest.param({"dynamic": {"-:.*down.*": {}}}, "'dynamic'", id="per module"),
    ],
)  # fmt: skip
def test_settings_that_are_not_read_are_refused(build_tiny, tokens, tmp_path, changes, words) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g16-sym")
    folder = tmp_path / "packed"
    write(loaded, result, "gptq", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedSchemeError, match=words):
        load_model(str(folder))
