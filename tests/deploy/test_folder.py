"""A saved folder is an ordinary model: plain transformers loads it and computes what qbench measured."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from qbench.deploy.export import refusal
from qbench.deploy.fake import FAKE
from qbench.engine.install import quantized
from qbench.engine.lane import LaneResult
from qbench.engine.settings import EngineSettings
from qbench.models.loading import LoadedModel, load_model
from tests import model_folders
from tests.blocks import relative
from tests.deploy.exports import write
from tests.tiny_runs import CPU, make_lane, naive_logits, reconstruct_lanes

FOLDED = {"use_ln_matrix": False, "shift": False, "epochs": 1}
VALUE_SHIFT = {"let": True, "shift": True, "sites": ["value_out"], "epochs": 1}
SAVED = [
    pytest.param("llama", "rtn", "W3A16", {}, id="llama-rtn"),
    pytest.param("llama", "rtn", "W2A16g8", {}, id="llama-rtn-groups"),
    pytest.param("llama", "smoothquant", "W4A16", {}, id="llama-smoothquant"),
    pytest.param("llama", "affinequant", "W3A16", FOLDED, id="llama-affinequant-folded"),
    pytest.param(
        "llama", "omniquant", "W3A16", VALUE_SHIFT, id="llama-value-shift"
    ),  # through attention_bias
    pytest.param("qwen3", "omniquant", "W3A16", VALUE_SHIFT, id="qwen3-value-shift"),
    pytest.param("qwen2", "affinequant", "W3A16", FOLDED, id="qwen2-affinequant-folded"),
    pytest.param("mistral", "omniquant", "W3A16", {"epochs": 1}, id="mistral-omniquant"),
    pytest.param("opt", "omniquant", "W3A16", {"let": True, "shift": True, "epochs": 1}, id="opt-shift"),
    pytest.param(
        "opt", "affinequant", "W4A16", {"use_ln_matrix": False, "epochs": 1}, id="opt-affinequant-shift"
    ),
]


@pytest.fixture
def prepare(build_tiny, tokens, tmp_path):
    """A model loaded from a folder, and one lane's result on it."""

    def build(
        family: str, method: str, scheme: str, options: dict, **changes
    ) -> tuple[LoadedModel, LaneResult]:
        folder = model_folders.save(build_tiny(family, **changes), tmp_path / f"my-{family}")
        loaded = load_model(str(folder))
        lane = make_lane(loaded.model, method, scheme, **options)
        (result,) = reconstruct_lanes(loaded.model, tokens[:3], [lane])
        return loaded, result

    return build


@torch.no_grad()
def within(loaded: LoadedModel, result: LaneResult, ids: torch.Tensor) -> torch.Tensor:
    with quantized(loaded.model, loaded.blocks, loaded.spec, result, EngineSettings(device=CPU)):
        return loaded.model(input_ids=ids).logits


@pytest.mark.parametrize(("family", "method", "scheme", "options"), SAVED)
def test_plain_transformers_computes_the_same_logits(
    prepare, tokens, tmp_path, family, method, scheme, options
) -> None:
    loaded, result = prepare(family, method, scheme, options)
    expected = within(loaded, result, tokens)
    folder = tmp_path / "saved"
    write(loaded, result, "fake", folder)
    reloaded = model_folders.plain_model(folder)
    with torch.no_grad():
        found = reloaded(input_ids=tokens).logits
        original = loaded.model(input_ids=tokens).logits
    assert relative(found, expected) < 1e-5
    assert relative(found, original) > 1e-2
    assert type(reloaded) is type(loaded.model)
    assert reloaded.config._attn_implementation == "sdpa"


def test_a_shift_on_llama_switches_attention_biases_on(prepare, tmp_path) -> None:
    loaded, result = prepare("llama", "omniquant", "W3A16", VALUE_SHIFT)
    assert not loaded.model.config.attention_bias
    folder = tmp_path / "saved"
    write(loaded, result, "fake", folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_bias"] and not config.get("mlp_bias")
    assert config["dtype"] == "float32"
    attention = model_folders.plain_model(folder).model.layers[0].self_attn
    assert attention.v_proj.bias.any() and attention.o_proj.bias.any()
    assert not attention.q_proj.bias.any() and not attention.k_proj.bias.any()
    assert not loaded.model.config.attention_bias  # of the model in memory nothing changes


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_folder_is_self_contained_and_says_nothing_of_qbench(prepare, tokens, tmp_path, family) -> None:
    loaded, result = prepare(family, "rtn", "W4A16", {})
    folder = tmp_path / "saved"
    write(loaded, result, "fake", folder)
    assert all("qbench" not in file.read_text() for file in folder.glob("*.json"))
    words = model_folders.text(20)
    assert AutoTokenizer.from_pretrained(folder)(words)["input_ids"] == loaded.tokenizer(words)["input_ids"]
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float32}  # noqa: SIM118


def test_every_group_of_a_saved_weight_has_at_most_2_to_the_bits_values(prepare, tmp_path) -> None:
    loaded, result = prepare("llama", "rtn", "W2A16g8", {})
    write(loaded, result, "fake", tmp_path / "saved")
    model = model_folders.plain_model(tmp_path / "saved")
    groups = model.model.layers[1].mlp.down_proj.weight.reshape(-1, 8)
    assert max(len(group.unique()) for group in groups) <= 4


def test_quantized_activations_are_left_out_and_the_notes_say_so(prepare, tokens, tmp_path) -> None:
    loaded, result = prepare("llama", "smoothquant", "W4A4", {})
    format_ = write(loaded, result, "fake", tmp_path / "saved")
    assert format_.notes(result.lane.scheme) == ["plain transformers does not quantize its activations"]
    model = model_folders.plain_model(tmp_path / "saved")
    with torch.no_grad():
        found = model(input_ids=tokens).logits
    assert relative(found, naive_logits(loaded.model, result, tokens, operands=False)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tied_embeddings_stay_tied(prepare, tokens, tmp_path, family) -> None:
    loaded, result = prepare(family, "rtn", "W4A16", {}, tie_word_embeddings=True)
    write(loaded, result, "fake", tmp_path / "saved")
    model = model_folders.plain_model(tmp_path / "saved")
    assert model.get_input_embeddings().weight is model.lm_head.weight
    with torch.no_grad():
        assert relative(model(input_ids=tokens).logits, within(loaded, result, tokens)) < 1e-5


REFUSED = [
    pytest.param(
        "llama", "affinequant", "W3A16", {"epochs": 1, "shift": False},
        "full matrices remain after the norms at run time (--no-use-ln-matrix folds everything)", id="norm matrices",
    ),
    pytest.param(
        "llama", "affinequant", "W3A16", {"epochs": 1},
        "full matrices remain after the norms at run time, shifts leave a bias behind each RMSNorm "
        "(--no-use-ln-matrix with --no-shift fold everything)", id="norm matrices and RMSNorm biases",
    ),
    pytest.param(
        "opt", "affinequant", "W3A16", {"epochs": 1},
        "full matrices remain after the norms at run time (--no-use-ln-matrix folds everything)",
        id="opt-norm matrices",
    ),
    pytest.param(
        "llama", "affinequant", "W4A4", {"epochs": 1},
        "shifts leave a bias behind each RMSNorm (--no-shift folds everything)", id="RMSNorm biases",
    ),
    pytest.param(
        "qwen2", "omniquant", "W3A16", VALUE_SHIFT,
        "qwen2 has no bias on o (--no-shift folds everything)", id="no bias in the architecture",
    ),
    pytest.param(
        "mistral", "omniquant", "W3A16", VALUE_SHIFT,
        "mistral has no bias on o, v (--no-shift folds everything)", id="no switch for biases",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "method", "scheme", "options", "why"), REFUSED)
def test_what_cannot_be_folded_is_said_in_one_sentence(prepare, family, method, scheme, options, why) -> None:
    loaded, result = prepare(family, method, scheme, options)
    states = [result.state(i) for i in range(len(result))]
    assert refusal(loaded, FAKE, result.lane.scheme, True, states) == why
