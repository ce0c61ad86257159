"""Real models and real text: the numbers are a naive loop's, and the methods keep their published order."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qbench.config import RunConfig
from qbench.results import Result
from qbench.runner import run

SEQ_LEN, WINDOWS = 1024, 8


def request(shared: Path, output: Path, model: str, **changes: object) -> RunConfig:
    base = {
        "model": str(shared / "models" / model),
        "methods": ["rtn"],
        "schemes": ["W3A16"],
        "calibration": {
            "dataset": str(shared / "data/wikitext2/wiki.train.raw.first1MB.txt"),
            "n_samples": 8,
            "seq_len": 128,
        },
        "evals": {
            "datasets": [f"wikitext2={shared / 'data/wikitext2/wiki.test.raw'}"],
            "seq_len": SEQ_LEN,
            "limit": WINDOWS,
        },
        "output": str(output),
    }
    return RunConfig.model_validate(base | changes)


def perplexities(rows: list[Result]) -> dict[str, float]:
    return {row.method: row.metrics["wikitext2/perplexity"].value for row in rows}


def naive_perplexity(folder: Path, text: Path) -> float:
    """The protocol by hand: one stream of tokens, consecutive windows, one prediction at a time summed in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), verbose=False)["input_ids"]
    total, count = 0.0, 0
    for window in range(WINDOWS):
        tokens = torch.tensor(ids[window * SEQ_LEN : (window + 1) * SEQ_LEN])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0].double()
        for position in range(SEQ_LEN - 1):
            row = logits[position]
            highest = row.max()
            total += float(highest + (row - highest).exp().sum().log() - row[tokens[position + 1]])
            count += 1
    return math.exp(total / count)


def test_three_bits_on_llama(shared, tmp_path) -> None:
    """One run, since the models take seconds: the baseline is the naive loop's, AffineQuant is better than rounding."""
    methods = ["rtn", {"name": "affinequant", "options": {"epochs": 3}}]
    rows = run(request(shared, tmp_path, "ref-llama-14m", methods=methods))
    metric = rows[0].metrics["wikitext2/perplexity"]
    expected = naive_perplexity(shared / "models/ref-llama-14m", shared / "data/wikitext2/wiki.test.raw")
    assert metric.value == pytest.approx(expected, rel=1e-6)
    assert metric.protocol == "wikitext2 (1024, non-overlapping, evaluation, first 8 windows)"
    assert metric.n == WINDOWS and metric.n_total > 300
    values = perplexities(rows)
    assert values["full-precision"] < values["affinequant"] < values["rtn"]
    assert rows[1].bits_per_weight < 3.1  # a scale and a zero point for each output channel


def test_four_bit_activations_on_opt(shared, tmp_path) -> None:
    evals = {"datasets": [f"wikitext2={shared / 'data/wikitext2/wiki.test.raw'}"], "seq_len": 512, "limit": 4}
    changes = {"methods": ["rtn", "smoothquant"], "schemes": ["W4A4"], "evals": evals}
    values = perplexities(run(request(shared, tmp_path, "ref-opt-14m", **changes)))
    assert values["full-precision"] < values["smoothquant"] < values["rtn"]
