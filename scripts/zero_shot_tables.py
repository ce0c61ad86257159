"""Print the zero-shot tables of docs/results.md from result folders, so that no figure there is typed by hand.

    python scripts/zero_shot_tables.py RESULTS

RESULTS holds tasks-MODEL, a run of experiments/zero-shot.yaml, for each model, and agree-….jsonl, what
scripts/lm_eval_agreement.py printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qbench.reports.columns import COST, GUESSED, columns, legend
from qbench.reports.comparison import compare
from qbench.reports.export import escape_markdown, markdown_table
from qbench.results import BASELINE, Result, ResultStore, split_metric

METHODS = (
    BASELINE,
    "rtn",
    "smoothquant",
    "omniquant",
    "affinequant",
)  # as published: each below the one before
FIRST = 800  # questions, of the second statement: a task's files are not shuffled
NORMED = ("arc_challenge", "hellaswag")  # tasks that the papers report acc_norm of


def zero_shot(rows: Sequence[Result]) -> list[str]:
    """A table of accuracies, one of text and fidelity, and what they say of the full-precision model."""
    keys = list(rows[0].metrics)
    tasks = [key for key in keys if key.endswith("/acc") or key in {f"{name}/acc_norm" for name in NORMED}]
    text = [f"wikitext2/{name}" for name in ("perplexity", "kl_mean", "top1_agreement")]
    (full,) = [row for row in rows if row.is_baseline]
    plain = [key for key in tasks if key.endswith("/acc")]
    seconds = [row.cost.stages["evaluate"] for row in rows]
    return [
        narrow_table(rows, tasks),
        narrow_table(rows, text),
        f"{sum(full.metrics[key].n for key in plain):,} questions; measuring a row took {min(seconds):.0f} to "
        f"{max(seconds):.0f} s. Full precision on the first {FIRST} of each: {', '.join(first(full, plain))}.",
    ]


def first(row: Result, keys: Sequence[str]) -> list[str]:
    """Accuracies with their intervals over the first questions of each task."""
    metrics = {}
    for key in keys:
        items = (row.metrics[key].items or [])[:FIRST]
        metrics[key] = row.metrics[key].model_copy(
            update={"items": items, "n": len(items), "value": sum(items) / len(items), "stderr": None}
        )
    scores = compare(row.model_copy(update={"metrics": metrics})).tables[0].blocks[0].rows[0].scores
    return [
        f"{split_metric(key)[0]} {scores[key].value:.3f} ±{scores[key].half_width or 0:.3f}"
        + ("°" if scores[key].above_chance is False else "")
        for key in keys
    ]


def narrow_table(rows: Sequence[Result], keys: Sequence[str]) -> str:
    """Some metrics of some rows as Markdown, without costs and without notes, and the marks' meaning."""
    kept = [
        row.model_copy(
            update={
                "metrics": {key: row.metrics[key] for key in keys if key in row.metrics},
                "notes": [],
                "transforms": [],
            }
        )
        for row in rows
    ]
    comparison = compare(kept)
    (table,) = comparison.tables
    shown = columns(table, comparison, table.metrics, {*COST, "recovery"})
    marks = [line for line in legend(comparison, best="bold:") if line.startswith(("bold", "±", GUESSED))]
    return markdown_table(shown) + "\n\n" + "  \n".join(escape_markdown(line) for line in marks) + "\n"


def agreement(path: Path) -> str:
    """One line of what scripts/lm_eval_agreement.py found."""
    tasks = [json.loads(line) for line in path.read_text().splitlines()]
    differing = [item for task in tasks for item in task["differing"]]
    same = all(task["same_items"] and task["same_scores"] for task in tasks)
    return (
        f"* {path.stem.removeprefix('agree-')}: {', '.join(task['task'] for task in tasks)}, "
        f"{sum(task['items'] for task in tasks):,} questions, "
        + ("every outcome, score and standard error equal" if same else f"different: {json.dumps(differing)}")
        + f" (lm-eval {sum(task['lm_eval_s'] for task in tasks):.0f} s, "
        f"qbench {sum(task['qbench_s'] for task in tasks):.0f} s)"
    )


def main() -> None:
    """Print everything."""
    folder = Path(sys.argv[1])
    for path in sorted(folder.glob("tasks-*")):
        rows = ResultStore(path).load_all()
        rows.sort(key=lambda row: (row.scheme != "W4A4", METHODS.index(row.method)))
        print(f"### {path.name.removeprefix('tasks-')}\n")
        print("\n".join(zero_shot(rows)), "\n")
    if agreements := sorted(folder.glob("agree-*.jsonl")):
        print("### Agreement with lm-eval\n")
        print("\n".join(map(agreement, agreements)))


if __name__ == "__main__":
    main()
