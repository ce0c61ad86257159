"""The papers' recipes: what to run for a published cell, and what is not known about how it was made.

Read off the authors' scripts (bytedance/AffineQuant@0f3ba93, OpenGVLab/OmniQuant@95fae1b, bytedance/ABQ-LLM@de2e849).
The methods' own presets hold what depends on scheme and model family; here stands what depends on the single model, the
authors' form where ours differs, and the data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from qbench.reports.published import AVERAGE, FULL_PRECISION, HUB_NAMES, Published
from qbench.results import BASELINE

METHODS = {
    FULL_PRECISION: BASELINE,
    "RTN": "rtn",
    "SmoothQuant": "smoothquant",
    "GPTQ": "gptq",
    "AWQ": "awq",
    "OmniQuant": "omniquant",
    "AffineQuant": "affinequant",
    "ABQ-LLM": "abq",
}
# Options that give the authors' form where ours differs: each method's `published_form`, which a test compares.
PUBLISHED_FORM: dict[str, dict[str, Any]] = {
    "omniquant": {"query_key": "published"},
    "affinequant": {"query_key": "published", "truncate": "all"},
    "gptq": {"stale_ranges": True},
    "awq": {"grouped_values": False},
    "abq": {"query_key": "published", "attention_loss": "published", "compensation_lr": 1e-2},
}
QUANTIZER = {"zero_in_range": False, "attention_granularity": "published"}
CALIBRATION = {"dataset": "wikitext2", "n_samples": 128, "seq_len": 2048, "seed": 2}
TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")


@dataclass(frozen=True)
class Recipe:
    """What to run for a cell.

    Attributes:
        method: Registered name; None where qbench has no such method.
        options: Those that differ from the method's presets.
        calibration: As in a run's configuration.
        datasets: Perplexity texts: several where the table does not say which variant it means.
        remarks: What the source leaves open.
    """

    method: str | None
    scheme: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=lambda: dict(CALIBRATION))
    datasets: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def recipe(cell: Published) -> Recipe:
    """What to run for a published cell."""
    method = METHODS.get(cell.method)
    remarks = []
    calibration = dict(CALIBRATION)
    options = dict(PUBLISHED_FORM.get(method or "", {}))
    if method in ("omniquant", "affinequant"):
        options |= _by_model(cell, method)
    if method == "abq" and "*" in cell.scheme:
        options["bit_balance"] = True
    if method == "gptq":
        calibration |= {"dataset": "c4"}
        remarks.append("the table does not say what GPTQ was calibrated on; its own default, C4, is taken")
    if method == "awq":
        calibration |= {"dataset": "pile", "seq_len": 512}
        remarks.append(
            "the table does not say what AWQ was calibrated on; its own default, Pile in 512s, is taken"
        )
    if method == "smoothquant":
        remarks.append("the table does not say SmoothQuant's alpha; the preset is taken")
    if method is not None and cell.paper.lower() not in (method, cell.method.lower(), "abq-llm"):
        if method in ("omniquant", "affinequant"):
            remarks.append(f"{cell.method}'s row in a table of {cell.paper}")
    elif cell.paper == "ABQ-LLM" and method in ("omniquant", "affinequant"):
        remarks.append(f"run again by the authors of ABQ-LLM; {cell.method}'s own recipe is taken")
    if cell.metric == "ppl":
        # The tables say "C4"; the authors' programs know two variants, told apart by the full-precision row.
        datasets = ("c4", "c4_new") if cell.dataset == "c4" else (cell.dataset,)
        tasks: tuple[str, ...] = ()
    else:
        datasets, tasks = ("wikitext2",), TASKS if cell.dataset == AVERAGE else (cell.dataset,)
    scheme = "W16A16" if cell.method == FULL_PRECISION else cell.scheme.replace("*", "")
    return Recipe(
        method, scheme, HUB_NAMES[cell.model], options, calibration, datasets, tasks, tuple(remarks)
    )


def _by_model(cell: Published, method: str) -> dict[str, Any]:
    """Where the scripts of one model differ from those of its family."""
    family, size = re.fullmatch(r"(opt|llama-2|llama-3|llama)-(.*)", cell.model).groups()  # type: ignore[union-attr]
    weight_only = cell.scheme.partition("A")[2].startswith("16")
    options: dict[str, Any] = {}
    if cell.scheme == "W4A4" and family == "llama-2" and size in ("7b", "13b"):
        options |= {"aug_loss": False, "let_lr": 1e-3, "alpha": 0.75}
    if cell.scheme == "W4A4" and family == "llama" and size == "30b":
        options["alpha"] = 0.75
    without = {"7b": ("W4A16", "W4A16g128", "W3A16g128"), "13b": (cell.scheme,)}
    if (
        method == "affinequant"
        and weight_only
        and family == "llama-2"
        and cell.scheme in without.get(size, ())
    ):
        # These scripts set neither --use_ln_matrix nor --sf, whose default is 1.
        options |= {"use_ln_matrix": False, "sf": 1.0}
    return options
