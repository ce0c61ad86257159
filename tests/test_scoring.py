"""`qbench eval`: folders as they are, beside full precision and beside the rows of runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from qbench.cli import main
from qbench.config import RunConfig, ScoreConfig
from qbench.errors import ConfigError, DataError
from qbench.evals.perplexity import perplexity
from qbench.reports.comparison import compare
from qbench.results import ResultStore
from qbench.runner import run
from qbench.scoring import score_model, stated_bits
from tests import model_folders

SEQ_LEN, WINDOWS = 32, 5


@pytest.fixture
def place(tmp_path, build_tiny) -> Path:
    """Folders `base` and `coarse`, the second with its linears rounded; a text to score."""
    model = build_tiny("llama")
    model_folders.save(model, tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                step = parameter.abs().max() / 3
                parameter.copy_((parameter / step).round() * step)
    model_folders.save(model, tmp_path / "coarse")
    (tmp_path / "text.txt").write_text(model_folders.text(SEQ_LEN * WINDOWS + 3, seed=2))
    (tmp_path / "calibration.txt").write_text(model_folders.text(300, seed=1))
    return tmp_path


def request_of(place: Path, model: str, **changes: object) -> ScoreConfig:
    evals = {"datasets": [f"text={place / 'text.txt'}"], "seq_len": SEQ_LEN} | changes.pop("evals", {})
    request = {"model": str(place / model), "evals": evals, "output": str(place / "results")}
    return ScoreConfig.model_validate(request | changes)


def run_rows(place: Path, **changes: object):
    request = {
        "model": str(place / "base"),
        "methods": ["rtn"],
        "schemes": ["W3A16"],
        "calibration": {"dataset": str(place / "calibration.txt"), "n_samples": 2, "seq_len": SEQ_LEN},
        "evals": {"datasets": [f"text={place / 'text.txt'}"]},
        "output": str(place / "results"),
    }
    return run(RunConfig.model_validate(request | changes))


def test_a_folder_is_scored_as_plain_transformers_scores_it(place) -> None:
    (row,) = score_model(request_of(place, "coarse"))
    ids = torch.tensor(model_folders.tokenizer().encode((place / "text.txt").read_text()))
    windows = ids[: SEQ_LEN * WINDOWS].view(WINDOWS, SEQ_LEN)
    expected = perplexity(model_folders.plain_model(place / "coarse"), windows, batch_size=2)
    assert row.metrics["text/perplexity"].value == pytest.approx(expected.value, rel=1e-6)
    assert (row.method, row.scheme, row.options["folder"]) == ("as-is", "W16A16", "coarse")
    assert row.bits_per_weight == 32 and row.recovery == {}  # saved in float32
    assert row.memory.cache_bytes and not row.memory.simulated
    assert ResultStore(place / "results").load_all() == [row]


def test_beside_its_base_it_has_recovery_and_a_divergence(place) -> None:
    config = request_of(
        place, "coarse", fidelity_to=str(place / "base"), evals={"fidelity": True, "generate": 4}
    )
    base, row = score_model(config)
    assert base.is_baseline and base.recovery == {"text/perplexity": 100.0}
    quotient = base.metrics["text/perplexity"].value / row.metrics["text/perplexity"].value
    assert row.recovery["text/perplexity"] == pytest.approx(100 * quotient)
    assert row.metrics["text/kl_mean"].value > 0.001 and len(row.generations) == WINDOWS
    assert row.contract == base.contract and row.model == base.model
    table = compare(place / "results")  # one contract: nothing to allow
    assert {result.method for result in table.results} == {"full-precision", "as-is"}
    _, itself = score_model(
        request_of(place, "base", fidelity_to=str(place / "base"), evals={"fidelity": True})
    )
    assert itself.metrics["text/kl_max"].value == 0.0 and itself.recovery["text/perplexity"] == 100.0
    assert itself.id != row.id


def test_it_agrees_with_the_row_of_a_run_on_the_same_weights(place) -> None:
    baseline = run_rows(place)[0]
    (row,) = score_model(request_of(place, "base"))
    assert row.metrics["text/perplexity"].items == pytest.approx(
        baseline.metrics["text/perplexity"].items, rel=1e-5
    )
    assert row.metrics["text/perplexity"].protocol == baseline.metrics["text/perplexity"].protocol
    assert row.contract_fields["evaluation"] == baseline.contract_fields["evaluation"]
    with pytest.raises(ConfigError, match="calibration"):
        compare(place / "results")
    compare(place / "results", allow_mixed=True)


def test_an_export_of_ours_keeps_its_method_and_its_contract(place) -> None:
    baseline, made = run_rows(place)
    (place / "coarse" / "qbench.json").write_text(made.to_json())
    config = request_of(place, "coarse", fidelity_to=str(place / "base"), evals={"seq_len": SEQ_LEN})
    base, row = score_model(config)
    assert (row.method, row.scheme, row.contract) == ("rtn", "W3A16", made.contract)
    assert row.id != made.id and "exported folder" in row.notes[0]
    assert base.contract == baseline.contract
    compare(place / "results")
    (place / "coarse" / "qbench.json").write_text("{}")
    with pytest.raises(DataError, match=r"qbench\.json"):
        score_model(config)


def test_an_export_of_an_embedded_model_is_scored_on_its_text_by_default(place, monkeypatch) -> None:
    _, made = run_rows(place)
    (place / "coarse" / "qbench.json").write_text(made.model_copy(update={"model": "tiny-llama"}).to_json())
    asked = []
    monkeypatch.setattr("qbench.scoring.make_suite", lambda *arguments: asked.append(arguments) or 1 / 0)
    for model, source in (("coarse", "stdlib"), ("base", "wikitext2")):
        with pytest.raises(ZeroDivisionError):
            score_model(request_of(place, model, evals={"datasets": ["auto"]}))
        assert asked.pop()[-1] == source


def test_another_base_is_refused(place, build_tiny) -> None:
    _, made = run_rows(place)
    (place / "coarse" / "qbench.json").write_text(made.to_json())
    model_folders.save(build_tiny("llama", seed=5), place / "other")
    with pytest.raises(ConfigError, match=r"not the model that .* was made from"):
        score_model(request_of(place, "coarse", fidelity_to=str(place / "other")))


def test_bad_requests_are_one_sentence(place) -> None:
    with pytest.raises(ConfigError, match="--fidelity-to MODEL"):
        score_model(request_of(place, "coarse", evals={"fidelity": True}))
    with pytest.raises(ConfigError, match="longer than the 64 tokens"):
        score_model(request_of(place, "coarse", evals={"seq_len": 65}))
    with pytest.raises(ConfigError, match="--generate 40 after prompts of 32"):
        score_model(request_of(place, "coarse", fidelity_to=str(place / "base"), evals={"generate": 40}))
    weights = place / "coarse" / "model.safetensors"
    tensors = load_file(weights)
    first = next(name for name in tensors if "down_proj" in name)
    save_file(tensors | {first: tensors[first] * torch.nan}, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"not finite \(first: {first}\)"):
        score_model(request_of(place, "coarse"))
    weights.unlink()
    with pytest.raises(DataError, match="Cannot load model"):
        score_model(request_of(place, "coarse"))
    assert not (place / "results").exists()


def test_an_architecture_without_a_description_is_scored_too(place) -> None:
    import transformers as hf

    config = hf.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    model_folders.save(hf.GPT2LMHeadModel(config), place / "gpt2")
    (row,) = score_model(request_of(place, "gpt2"))
    assert math.isfinite(row.metrics["text/perplexity"].value) and row.bits_per_weight == 32


STATED = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, "W4A16g128-sym"),
    "gptq-channel": ({"quant_method": "gptq", "bits": 3, "group_size": -1, "sym": False}, "W3A16"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "W4A16g64"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "W8A16-sym"),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "weights": {"num_bits": 4, "group_size": None, "symmetric": True},
                    "input_activations": {"num_bits": 8},
                }
            },
        },
        "W4A8-sym",
    ),
    "unknown": ({"quant_method": "fp8"}, "None"),
}


@pytest.mark.parametrize("settings,scheme", STATED.values(), ids=list(STATED))
def test_the_bits_that_a_folder_states(settings: dict, scheme: str) -> None:
    assert str(stated_bits(settings)) == scheme


def test_the_command_prints_a_table_and_generations(place) -> None:
    text = f"text={place / 'text.txt'}"
    arguments = ["eval", str(place / "coarse"), "--fidelity-to", str(place / "base"), "--eval", text]
    arguments += ["--seqlen", str(SEQ_LEN), "--generate", "3", "--fidelity", "-o", str(place / "out")]
    done = CliRunner().invoke(main, [*arguments, "--format", "json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    found = json.dumps(printed)
    assert "text/kl_mean" in found and "recovery" in found and "as-is" in found
    assert "first difference at token" in done.stderr
    refused = CliRunner().invoke(main, ["eval"])
    assert refused.exit_code == 2 and "No model to measure" in refused.stderr
