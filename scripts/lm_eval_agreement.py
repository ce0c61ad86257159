"""Compare `qbench --tasks paper6=FOLDER` with lm-eval run by itself, item by item.

lm-eval's side has nothing of qbench's: its own model class on the model's folder, its own batching, and task
definitions of its own over copies of the files. Prints one JSON object per task, with lm-eval's log-likelihoods of
every item that differs (other rounding can turn near ties and nothing else); exits 1 if any item or score differs.

    python scripts/lm_eval_agreement.py MODEL_FOLDER TASK_FOLDER [--tasks TASK …] [--limit N] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from qbench.evals.tasks import PAPER6, load_tasks


def compare(
    model_folder: Path,
    task_folder: Path,
    names: Sequence[str],
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """Score each task both ways.

    Args:
        model_folder: A full-precision model.
        task_folder: Files NAME.jsonl, NAME_val.mc.jsonl and the like.
        names: Tasks.
        limit: Only the first items of each.
        device: Where to compute.
        dtype: Of the weights and of everything computed. lm-eval takes its log-softmax in it, qbench in no less than
            float32: with less they may differ.
        batch_size: lm-eval's.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = hf.AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).to(device).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(model_folder)
    for name in names:
        (path,) = [p for p in task_folder.glob("*.jsonl") if p.name.startswith((f"{name}_", f"{name}."))]
        with tempfile.TemporaryDirectory() as scratch:
            lm = HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
            started = time.perf_counter()
            theirs = simple_evaluate(
                lm,
                tasks=[_definition(name, path, Path(scratch))],
                limit=limit,
                task_manager=TaskManager(include_defaults=False),
                bootstrap_iters=1,
            )
        middle = time.perf_counter()
        tasks = load_tasks([f"{name}={path}"], limit)
        ours = tasks.score(model, tokenizer, torch.device(device))
        finished = time.perf_counter()
        assert theirs is not None
        wanted = {key: metric for key, metric in ours.items() if key.startswith(f"{name}/")}
        samples, results = theirs["samples"][name], theirs["results"][name]
        pairs = [(metric, key.partition("/")[2]) for key, metric in wanted.items()]
        yield {
            "task": name,
            "items": len(samples),
            "same_items": all(m.items == [s[label] for s in samples] for m, label in pairs),
            "differing": [
                (label, i, [logprob for logprob, _ in sample["filtered_resps"]])
                for m, label in pairs
                for i, (item, sample) in enumerate(zip(m.items or (), samples, strict=True))
                if item != sample[label]
            ],
            "same_scores": all(
                (m.value, m.stderr) == (results[f"{label},none"], results[f"{label}_stderr,none"])
                for m, label in pairs
            ),
            **{label: m.value for m, label in pairs},
            "lm_eval_s": round(middle - started, 1),
            "qbench_s": round(finished - middle, 1),
        }


def _definition(name: str, path: Path, scratch: Path) -> dict[str, Any]:
    """A task as its author would write it for lm-eval: choices hold no blank, the delimiter is one."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    partial = "context_options" in rows[0]
    if not partial and all(choice.startswith(" ") for row in rows for choice in row["choices"]):
        rows = [row | {"choices": [choice[1:] for choice in row["choices"]]} for row in rows]
    copy = scratch / "rows.jsonl"
    copy.write_text("\n".join(json.dumps(row) for row in rows))
    fields = ("{{gold}}", "{{continuation}}", "{{context_options}}") if partial else (
        "{{query}}", "{{gold}}", "{{choices}}",
    )  # fmt: skip
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(copy)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        **dict(zip(("doc_to_text", "doc_to_target", "doc_to_choice"), fields, strict=True)),
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def main() -> int:
    """Print one line per task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", metavar="TASK_FOLDER", type=Path)
    parser.add_argument("--tasks", nargs="+", default=PAPER6, metavar="TASK", help="default: all six")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--batch-size", type=int, default=8, help="lm-eval's")
    given = parser.parse_args()
    same = True
    for found in compare(
        given.model, given.folder, given.tasks, given.limit, given.device, given.dtype, given.batch_size
    ):
        print(json.dumps(found), flush=True)
        same &= found["same_items"] and found["same_scores"]
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
