"""Everything a row can be measured on, through a run: against full precision, on tasks, in bytes, in words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qbench.config import RunConfig
from qbench.results import Metric, Result, ResultStore, recovery
from qbench.runner import run
from tests import model_folders

SEQ_LEN, WINDOWS = 32, 5
EVERYTHING = {"fidelity": True, "generate": 6, "word_perplexity": True}


@pytest.fixture
def request_of(tmp_path, build_tiny):
    model = model_folders.save(build_tiny("llama"), tmp_path / "tiny")
    (tmp_path / "calibration.txt").write_text(model_folders.text(300, seed=1))
    (tmp_path / "evaluation.txt").write_text(model_folders.text(SEQ_LEN * WINDOWS + 7, seed=2))
    rows = [
        {
            "query": model_folders.text(4, s),
            "choices": [" " + model_folders.text(2, 9 + s), " old"],
            "gold": s % 2,
        }
        for s in range(12)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def build(**changes: object) -> RunConfig:
        evals = {"datasets": [f"text={tmp_path / 'evaluation.txt'}"], "batch_size": 2}
        evals |= changes.pop("evals", {})
        request = {
            "model": str(model),
            "methods": ["rtn"],
            "schemes": ["W16A16", "W3A4"],
            "calibration": {"dataset": str(tmp_path / "calibration.txt"), "n_samples": 2, "seq_len": SEQ_LEN},
            "evals": evals,
            "output": str(tmp_path / "results"),
        }
        return RunConfig.model_validate(request | changes)

    return build


def test_sixteen_bits_lose_exactly_nothing_and_three_lose_something(request_of, tmp_path) -> None:
    evals = EVERYTHING | {"tasks": [str(tmp_path / "own.jsonl")], "limit_items": 10}
    baseline, same, coarse = run(request_of(evals=evals))
    assert same.metrics["text/perplexity"].value == baseline.metrics["text/perplexity"].value
    assert same.metrics["text/kl_mean"].value == same.metrics["text/kl_max"].value == 0.0
    assert same.metrics["text/top1_agreement"].value == 1.0
    assert same.metrics["text/loss_change"].value == 0.0
    assert same.metrics["text/first_difference"].value == 6
    assert set(same.recovery) == {
        "text/perplexity", "text/word_perplexity", "own/acc", "own/acc_norm",
    } == set(baseline.recovery)  # fmt: skip
    assert set(same.recovery.values()) == {100.0} == set(baseline.recovery.values())

    assert coarse.metrics["text/kl_mean"].value > 0 and coarse.metrics["text/top1_agreement"].value < 1
    change = [
        worse - base
        for worse, base in zip(
            coarse.metrics["text/perplexity"].items, baseline.metrics["text/perplexity"].items, strict=True
        )
    ]
    assert coarse.metrics["text/loss_change"].items == pytest.approx(change, abs=1e-5)
    quotient = baseline.metrics["text/perplexity"].value / coarse.metrics["text/perplexity"].value
    assert coarse.recovery["text/perplexity"] == pytest.approx(100 * quotient)
    first = coarse.generations[0]
    assert len(coarse.generations) == WINDOWS and first.prompt and first.reference
    assert same.generations[0].text == same.generations[0].reference == first.reference
    assert (first.differs_at == 6) == (first.text == first.reference)
    assert coarse.metrics["own/acc"].n == 10 and coarse.metrics["own/acc"].n_total == 12
    assert "text/kl_mean" not in baseline.metrics

    fields = coarse.contract_fields["evaluation"]
    assert {"text", "text/word_perplexity", "text/kl_mean", "text/first_difference", "own"} == set(fields)
    for key in ("text/kl_mean", "own/acc", "text/word_perplexity"):
        assert coarse.metrics[key].protocol == fields.get(key, fields.get(key.partition("/")[0]))["protocol"]
    stored = {row.id: row for row in ResultStore(tmp_path / "results").load_all()}
    assert stored[coarse.id] == coarse


def test_a_row_knows_its_bytes(request_of) -> None:
    baseline, same, coarse = run(request_of())
    linear = baseline.memory.n_linear_weights
    assert baseline.memory.linear_bytes == 2 * linear == same.memory.linear_bytes
    assert coarse.memory.bits_per_linear_weight == pytest.approx(coarse.bits_per_weight, rel=1e-3)
    assert coarse.memory.embedding_bytes == baseline.memory.embedding_bytes > 0
    assert coarse.memory.kv_cache_bits == 4 and baseline.memory.kv_cache_bits == 16
    assert coarse.memory.kv_cache_bytes < baseline.memory.kv_cache_bytes
    assert coarse.memory.simulated and not baseline.memory.simulated
    assert coarse.memory.peak_of == "process" and coarse.memory.cache_bytes == baseline.memory.cache_bytes
    printed = json.loads(json.dumps(coarse.row()))
    assert printed["memory"]["model_bytes"] == coarse.memory.model_bytes
    assert printed["recovery"] == coarse.recovery
    assert coarse.cost.evaluation_peak_gpu_bytes is None


@pytest.mark.gpu
def test_a_gpus_peak_is_that_of_the_scored_windows(request_of) -> None:
    """Not of the few tokens that are decoded afterwards, whose own peak is counted anew."""
    *_, coarse = run(request_of(compute={"device": "cuda"}))
    assert coarse.memory.peak_of == "GPU allocations"
    assert coarse.cost.evaluation_peak_gpu_bytes > coarse.memory.peak_decode_bytes


def test_the_reference_is_computed_once(request_of, tmp_path, monkeypatch) -> None:
    from qbench.evals import fidelity

    first = run(request_of(evals={"fidelity": True, "generate": 3}))[-1]
    monkeypatch.setattr(fidelity, "write_reference", None)
    again = run(request_of(evals={"fidelity": True, "generate": 3}, restart=False))[-1]
    assert again.metrics == first.metrics
    (folder,) = (tmp_path / "results" / "cache").glob("reference-*")
    assert {path.name for path in folder.iterdir()} == {"text", "text-greedy-3.npy"}


def test_measuring_more_keeps_the_windows_contract(request_of) -> None:
    plain = run(request_of(schemes=["W3A16"]))[-1]
    more = run(request_of(schemes=["W3A16"], evals={"fidelity": True}))[-1]
    assert more.contract_fields["evaluation"]["text"] == plain.contract_fields["evaluation"]["text"]
    assert more.metrics["text/perplexity"] == plain.metrics["text/perplexity"]


def metric(value: float, n: int = 4, protocol: str = "p", higher: bool = False) -> Metric:
    return Metric(value=value, n=n, protocol=protocol, higher_is_better=higher)


def test_recovery_is_of_the_same_measurement_only() -> None:
    base = {"t/perplexity": metric(10), "q/acc": metric(0.6, higher=True), "z/acc": metric(0.0, higher=True)}
    found = recovery({"t/perplexity": metric(12.5), "q/acc": metric(0.3, higher=True)}, base)
    assert found == pytest.approx({"t/perplexity": 80, "q/acc": 50})
    assert recovery({"t/perplexity": metric(math.inf)}, base) == {"t/perplexity": 0}
    for other in (metric(12.5, n=3), metric(12.5, protocol="other")):
        assert recovery({"t/perplexity": other, "x/acc": metric(1)}, base) == {}
    assert recovery({"z/acc": metric(0.5, higher=True)}, base) == {}


def test_records_without_the_new_fields_still_load(request_of, tmp_path) -> None:
    row = run(request_of(schemes=["W3A16"]))[-1]
    record = json.loads(row.to_json())
    for name in ("recovery", "memory", "generations"):
        del record["qbench"][name]
    for stored in record["qbench"]["metrics"].values():
        del stored["chance"]
    read = Result.from_json(json.dumps(record))
    assert read.memory is None and read.metrics == row.metrics and Path(tmp_path).exists()
