"""Loading from a folder, by an embedded name, and every way in which it can be refused; no network anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast

from qbench.errors import ConfigError, DataError, QbenchError, UnsupportedSchemeError
from qbench.models.loading import ASSETS, EMBEDDED, choose_dtype, load_model, resolve_location


def save(model: nn.Module, folder: Path) -> Path:
    vocabulary = {"<unk>": 0} | {f"w{i}": i for i in range(1, model.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(build_tiny, tmp_path: Path) -> Path:
    return save(build_tiny("llama"), tmp_path / "model")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_a_saved_folder_loads_as_it_was(build_tiny, tokens, tmp_path: Path, family: str) -> None:
    original = build_tiny(family)
    loaded = load_model(str(save(original, tmp_path / "model")))
    assert loaded.architecture.name == family
    assert loaded.max_seq_len == 64 and len(loaded.blocks) == 2
    assert loaded.location == str(tmp_path / "model") and loaded.name == loaded.location
    assert loaded.n_parameters == sum(p.numel() for p in original.parameters())
    assert not loaded.model.training
    assert all(p.device.type == "cpu" and not p.requires_grad for p in loaded.model.parameters())
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=tokens).logits, original(input_ids=tokens).logits)


def test_the_tokenizer_is_that_of_the_folder(saved: Path) -> None:
    assert load_model(str(saved)).tokenizer("w7 w9")["input_ids"] == [7, 9]


def test_half_precision_checkpoints_are_evaluated_in_float32_on_a_cpu(build_tiny, tmp_path: Path) -> None:
    model = build_tiny("llama").bfloat16()
    folder = str(save(model, tmp_path / "model"))
    loaded = load_model(folder)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight.float())
    assert {p.dtype for p in load_model(folder, dtype="bfloat16").model.parameters()} == {torch.bfloat16}


def test_dtype_is_float32_unless_a_gpu_holds_a_large_model() -> None:
    assert choose_dtype("auto", 7 * 10**9, on_gpu=False) == torch.float32
    assert choose_dtype("auto", 10**8, on_gpu=True) == torch.float32
    assert choose_dtype("auto", 7 * 10**9, on_gpu=True) == torch.bfloat16
    assert choose_dtype("float16", 10, on_gpu=False) == torch.float16


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_names_load_without_a_network(name: str) -> None:
    assert resolve_location(name) == str(ASSETS / name)
    loaded = load_model(name)
    assert (loaded.name, loaded.location) == (name, str(ASSETS / name))
    assert loaded.architecture.recipes == name.removeprefix("tiny-")


def test_a_near_miss_of_an_embedded_name_is_corrected() -> None:
    with pytest.raises(ConfigError, match=r"No model 'tiny-lama'.*Did you mean 'tiny-llama'") as refusal:
        load_model("tiny-lama")
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize("name", ["./not-here", "/not/here", "some/deep/path"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(ConfigError, match="not a folder here and not an embedded model"):
        load_model(name)


def test_a_hub_name_out_of_reach_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot load model 'nobody/nothing'") as refusal:
        load_model("nobody/nothing")
    assert "\n" not in str(refusal.value) and "save_pretrained" in str(refusal.value)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no config\.json"):
        load_model(str(tmp_path))


def test_not_finite_weights_are_refused_by_name(build_tiny, tmp_path: Path) -> None:
    model = build_tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(DataError, match=r"not finite \(first: model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load_model(str(save(model, tmp_path / "model")))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("-inf")
    with pytest.raises(DataError, match="not finite"):
        load_model(str(save(model, tmp_path / "other")))


def test_an_unsupported_model_type_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path)  # a folder without any weights
    with pytest.raises(UnsupportedSchemeError, match=r"'gpt2' is not supported\. Supported: .*llama"):
        load_model(str(tmp_path))


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{ not json")


def damage_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_a_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


DAMAGES = [damage_config, damage_weights, remove_weights, remove_a_tensor, change_a_shape, remove_tokenizer]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_one_message_and_never_random_weights(saved: Path, damage) -> None:
    damage(saved)
    with pytest.raises(QbenchError) as refusal:
        load_model(str(saved))
    assert isinstance(refusal.value, DataError)
    assert "\n" not in str(refusal.value)


def test_a_home_relative_path_is_expanded(saved: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert resolve_location("~/model") == str(saved)
    shutil.rmtree(saved)
    with pytest.raises(ConfigError, match="No model '~/model'"):
        resolve_location("~/model")
