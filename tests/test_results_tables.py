"""The script behind docs/results.md: what it says of GPTQ beside rounding to nearest, and of zero-shot tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qbench.results import BlockRecord, Cost
from scripts.results_tables import agreement, rounding_table, weight_errors, zero_shot
from tests.fake_results import accuracy, baseline, make_result, perplexity, window_losses

ERRORS = {"q": (0.02, 0.04), "down": (0.09, 0.1)}  # GPTQ, nearest


def row(method: str, extra: float, errors: dict | None = None, **changes):
    """A row of two blocks, the second with twice as large errors; `errors` are of the second."""
    extras = [
        {f"output_error.{role}": k * gptq, f"output_error_nearest.{role}": k * nearest}
        for k, per_block in ((1, ERRORS), (2, errors or ERRORS))
        for role, (gptq, nearest) in per_block.items()
    ]
    blocks = [
        BlockRecord(index=i, seconds=1, extras={"rounding_gain": 1.0} | extras[2 * i] | extras[2 * i + 1])
        for i in range(2)
    ]
    plain = {"blocks": blocks} if method.endswith("gptq") else {}
    metrics = {"wikitext2/perplexity": perplexity(window_losses(1, extra=extra, rho=0.0))}
    return make_result(method, "W3A16", metrics=metrics, **(plain | changes))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_errors_are_of_each_linear_over_those_of_nearest() -> None:
    found = weight_errors(row("gptq", 0.1, {"q": (0.03, 0.04), "down": (0.12, 0.1)}))
    assert found == pytest.approx({"0.q": 0.5, "0.down": 0.9, "1.q": 0.75, "1.down": 1.2})
    assert weight_errors(row("rtn", 0.1)) == {}


def test_the_table_has_median_worst_and_the_transforms_own_row_beside_it() -> None:
    rows = [row("rtn", 0.4), row("gptq", 0.2), row("omniquant", 0.1), row("omniquant+gptq", 0.3)]
    _, _, alone, under, _, weight, perplexity_line = rounding_table(rows)
    assert cells(alone)[:7] == ["none", "W3A16", "4", "0", "0.700", "0.900", "0.down"]
    assert cells(under)[0] == "omniquant"
    ratio, half = (float(x) for x in cells(alone)[-1].split(" ±"))
    assert ratio == pytest.approx(math.exp(-0.2), abs=0.02) and 0 < half < 0.05
    assert cells(alone)[7:9] == [f"{r.metrics['wikitext2/perplexity'].value:.2f}" for r in rows[:2]]
    assert cells(under)[7:9] == [f"{r.metrics['wikitext2/perplexity'].value:.2f}" for r in rows[2:]]
    assert weight == "Weight error: GPTQ is below rounding to nearest in 8 of 8 linears."
    assert perplexity_line.startswith("Perplexity: GPTQ is below in 1 of 2 rows; not at omniquant W3A16 (1.2")


def test_lost_linears_are_named_and_what_is_missing_is_missing() -> None:
    lost = row("awq+gptq", 0.2, {"q": (0.04, 0.04), "down": (0.12, 0.1)})
    other = row("awq", 0.3, contract="another")
    for beside in ([], [other]):  # no such row, or one of another contract
        *_, line, _, weight, verdict = rounding_table([lost, *beside])
        assert cells(line)[3:6] == ["2", "0.950", "1.200"] and cells(line)[-1] == "—"
        assert (
            weight == "Weight error: GPTQ is below rounding to nearest in 2 of 4 linears; "
            "not in awq+gptq W3A16 1.q (1.000), awq+gptq W3A16 1.down (1.200)."
        )
        assert verdict == "Perplexity: GPTQ is below in 0 of 0 rows."
    assert rounding_table([row("rtn", 0.1)]) == []


def test_zero_shot_says_what_is_above_guessing_and_leaves_out_costs_and_notes() -> None:
    def metrics(skill: float) -> dict:
        chances = {"hellaswag": 0.25, "boolq": 0.5}  # boolq: far below guessing
        found = {
            f"{task}/{name}": accuracy(3, skill if task == "hellaswag" else 0.2, task)
            for task, name in (("boolq", "acc"), ("boolq", "acc_norm"), ("hellaswag", "acc"), ("hellaswag", "acc_norm"))
        }  # fmt: skip
        known = {k: m.model_copy(update={"chance": chances[k.partition("/")[0]]}) for k, m in found.items()}
        return {"wikitext2/perplexity": perplexity(window_losses(1)), **known}

    cost = {"cost": Cost(seconds=1.0, stages={"evaluate": 41.0})}
    rows = [
        baseline(metrics=metrics(0.6), **cost),
        make_result("rtn", metrics=metrics(0.4), notes=["so"], **cost),
    ]
    tasks, text, verdict = zero_shot(rows)
    header, _, full, rtn = tasks.splitlines()[:4]
    assert cells(header)[2:5] == ["boolq acc ↑", "hellaswag acc ↑", "hellaswag acc\\_norm ↑"]
    assert cells(full)[2].endswith("°") and not cells(full)[3].endswith("°") and cells(rtn)[0] == "rtn"
    assert "so" not in tasks.split() and "contract" not in tasks and "bits" not in tasks
    assert cells(text.splitlines()[0])[2:] == ["wikitext2 ppl ↓", "÷ FP"]
    assert verdict.startswith("800 questions. Full precision is above guessing at hellaswag; not at boolq.")
    assert "41 to 41 s" in verdict


def test_agreement_is_one_line_and_shows_what_differs(tmp_path: Path) -> None:
    task = {"task": "piqa", "items": 40, "same_items": True, "same_scores": True, "differing": [],
            "lm_eval_s": 3.0, "qbench_s": 2.0}  # fmt: skip
    path = tmp_path / "agree-model-float32.jsonl"
    path.write_text("\n".join(json.dumps(t) for t in (task, task)))
    assert agreement(path).startswith("* model-float32: 80 questions of 2 tasks, every outcome, score")
    near = task | {"same_items": False, "differing": [["acc", 3, [-1.0, -1.0000001]]]}
    path.write_text("\n".join(json.dumps(t) for t in (task, near)))
    assert '["acc", 3, [-1.0, -1.0000001]]' in agreement(path)
