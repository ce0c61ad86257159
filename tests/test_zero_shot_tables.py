"""The script behind the zero-shot tables of docs/results.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

from qbench.results import Cost
from scripts.zero_shot_tables import agreement, zero_shot
from tests.fake_results import accuracy, baseline, make_result, perplexity, window_losses


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


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
    assert verdict.startswith("800 questions; measuring a row took 41 to 41 s.")
    value = rows[0].metrics["hellaswag/acc"].value  # 400 questions: all are among the first 800
    assert re.search(rf"boolq 0\.\d+ ±0\.0\d+°, hellaswag {value:.3f} ±0\.0\d+\.$", verdict)


def test_agreement_is_one_line_and_shows_what_differs(tmp_path: Path) -> None:
    task = {"task": "piqa", "items": 40, "same_items": True, "same_scores": True, "differing": [],
            "lm_eval_s": 3.0, "qbench_s": 2.0}  # fmt: skip
    path = tmp_path / "agree-model-float32.jsonl"
    path.write_text("\n".join(json.dumps(t) for t in (task, task)))
    assert agreement(path).startswith("* model-float32: piqa, piqa, 80 questions, every outcome, score")
    near = task | {"same_items": False, "differing": [["acc", 3, [-1.0, -1.0000001]]]}
    path.write_text("\n".join(json.dumps(t) for t in (task, near)))
    assert '["acc", 3, [-1.0, -1.0000001]]' in agreement(path)
