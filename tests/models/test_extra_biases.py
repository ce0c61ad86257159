"""Folders whose linears and RMSNorms carry biases that a plain LLaMA has not, as AffineQuant publishes them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qbench.cli import main
from qbench.data.text import load_text
from qbench.data.windows import evaluation_windows
from qbench.engine import attention
from qbench.errors import DataError
from qbench.evals.perplexity import perplexity
from qbench.models.loading import load_model
from qbench.results import ResultStore
from tests import model_folders
from tests.blocks import blocks_of
from tests.tiny_runs import make_lane, reconstruct_lanes, spec_of

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")


class Shifted(nn.Module):
    """A norm and what is added behind it."""

    def __init__(self, norm: nn.Module, bias: Tensor):
        super().__init__()
        self.norm, self.added = norm, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.added


@pytest.fixture
def biases(tiny_llama) -> dict[str, Tensor]:
    sizes = {
        path: tiny_llama.model.layers[0].get_submodule(path).weight.shape[0] for path in (*LINEARS, *NORMS)
    }
    return {
        f"model.layers.{i}.{path}.bias": 0.3 * torch.randn(size)
        for i in range(2)
        for path, size in sizes.items()
    }


def folder(model: nn.Module, extra: dict[str, Tensor], path: Path, shard: str | None = None) -> str:
    model_folders.save(model, path)
    weights = path / "model.safetensors"
    if shard is None:
        save_file(load_file(weights) | extra, weights, {"format": "pt"})
    else:  # in two files with an index
        model.save_pretrained(path, max_shard_size=shard)
        weights.unlink()
        index = path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        save_file(extra, path / "extra.safetensors", {"format": "pt"})
        content["weight_map"] |= {name: "extra.safetensors" for name in extra}
        index.write_text(json.dumps(content))
    return str(path)


def by_hand(model: nn.Module, biases: dict[str, Tensor]) -> nn.Module:
    for name, bias in biases.items():
        path = name.removesuffix(".bias")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(bias)
        else:
            model.set_submodule(path, Shifted(module, bias))
    return model


@pytest.mark.parametrize("shard", [None, "50KB"], ids=["one file", "index"])
def test_every_bias_of_the_folder_acts(tiny_llama, biases, tokens, tmp_path, shard) -> None:
    loaded = load_model(folder(tiny_llama, biases, tmp_path / "model", shard))
    with torch.no_grad():
        plain = tiny_llama(input_ids=tokens).logits
        expected = by_hand(tiny_llama, biases)(input_ids=tokens).logits
        found = loaded.model(input_ids=tokens).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-1)
    assert loaded.spec.biased == {"q", "k", "v", "o", "gate", "up"}


def test_what_is_applied_is_not_reported_as_left_out(tiny_llama, biases, tmp_path, caplog) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    try:
        load_model(folder(tiny_llama, biases, tmp_path / "model"))
        assert records == [] and caplog.records == []
        load_model(folder(tiny_llama, {"model.layers.0.other.weight": torch.ones(2)}, tmp_path / "other"))
    finally:
        logger.removeHandler(handler)
    assert records == [] and "first: model.layers.0.other.weight" in caplog.text


def test_the_engine_takes_them_over(tiny_llama, biases, tokens, tmp_path) -> None:
    """Quantized again: at 16 bits the prepared blocks are the loaded ones, at 4 the naive ones."""
    model = load_model(folder(tiny_llama, biases, tmp_path / "model")).model
    model.set_attn_implementation(attention.register())
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    lanes = [make_lane(model, "rtn", "W16A16"), make_lane(model, "omniquant", "W8A8", epochs=1, let=True)]
    identity, quantized = reconstruct_lanes(model, tokens, lanes)
    assert identity.records[-1].accumulated_error < 1e-10
    assert torch.equal(
        identity.state(1).rest.norm_bias["mlp_norm"], biases["model.layers.1.post_attention_layernorm.bias"]
    )
    assert quantized.records[-1].accumulated_error < 0.01
    assert spec_of(model).biased == {"q", "k", "v", "o", "gate", "up"} and len(blocks_of(model)) == 2
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, expected)  # left as it was


def without(name: str):
    return lambda biases: biases.pop(name)


BAD = [
    pytest.param(without("model.layers.1.mlp.up_proj.bias"), "none in block 1", id="some blocks"),
    pytest.param(
        lambda b: b.update({"model.layers.0.mlp.act.bias": torch.ones(3)}), "no place for", id="nowhere"
    ),
    pytest.param(lambda b: b.update({"model.norm.bias": torch.ones(32)}), "model.norm.bias", id="final norm"),
    pytest.param(
        lambda b: b.update({"model.layers.0.mlp.up_proj.bias": torch.ones(3)}), r"shape \[3\]", id="shape"
    ),
    pytest.param(
        lambda b: b.update({"model.layers.0.mlp.up_proj.bias": torch.full((64,), torch.nan)}),
        "not finite",
        id="nan",
    ),
]


@pytest.mark.parametrize(("change", "word"), BAD)
def test_a_bias_without_a_place_is_refused(tiny_llama, biases, tmp_path, change, word) -> None:
    change(biases)
    with pytest.raises(DataError, match=word):
        load_model(folder(tiny_llama, biases, tmp_path / "model"))


def test_qbench_eval_scores_the_folder_as_it_is_meant(tiny_llama, biases, tmp_path) -> None:
    path = folder(tiny_llama, biases, tmp_path / "model")
    (tmp_path / "text.txt").write_text(model_folders.text(200, seed=3))
    arguments = [
        "eval",
        path,
        "--eval",
        f"own={tmp_path / 'text.txt'}",
        "--seqlen",
        "32",
        "--output",
        str(tmp_path / "r"),
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    (row,) = ResultStore(tmp_path / "r").load_all()
    text = load_text(str(tmp_path / "text.txt"), "evaluation")
    ids = evaluation_windows(text, model_folders.tokenizer(), 32).ids
    expected = perplexity(by_hand(tiny_llama, biases), ids, batch_size=4).value
    assert row.metrics["own/perplexity"].value == pytest.approx(expected, rel=1e-5)
    assert row.metrics["own/perplexity"].value != pytest.approx(
        perplexity(model_folders.plain_model(Path(path)), ids, batch_size=4).value, rel=1e-2
    )
