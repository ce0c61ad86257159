"""Plausible rows without a model: what the tests of results, reports and the command line put side by side."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from qbench import provenance
from qbench.results import BASELINE, Cost, Metric, Result

CONTRACT = "3f9a1c77" + "0" * 56
# Mean extra loss in nats over full precision, seconds, run-time transforms.
METHODS = {
    "rtn": (0.55, 0.4),
    "smoothquant": (0.34, 1.1),
    "omniquant": (0.121, 31.0),
    "affinequant": (0.118, 64.0),
}


def window_losses(seed: int = 0, n: int = 64, extra: float = 0.0, rho: float = 0.4) -> list[float]:
    """Losses of neighbouring windows of one text, alike where they are close, plus a method's own noise."""
    text = np.random.default_rng(0).normal(size=n)
    for t in range(1, n):
        text[t] = rho * text[t - 1] + math.sqrt(1 - rho**2) * text[t]
    own = np.random.default_rng(seed).normal(size=n)
    return (3.2 + 0.25 * text + extra * (1 + 0.15 * own)).tolist()


def perplexity(
    losses: list[float], protocol: str = "wikitext2 (1024, non-overlapping, test)", **changes: Any
) -> Metric:
    value = math.exp(math.fsum(losses) / len(losses))
    stderr = value * float(np.std(losses, ddof=1)) / math.sqrt(len(losses))
    fields = {"value": value, "stderr": stderr, "n": len(losses), "unit": "perplexity", "protocol": protocol}
    return Metric(**(fields | {"items": losses} | changes))


def make_result(
    method: str = "rtn", scheme: str = "W4A4", *, extra: float = 0.1, seed: int = 1, **changes: Any
) -> Result:
    """One row; any field can be given."""
    key = f"{method} {scheme} {changes.get('options')} {changes.get('model')} {changes.get('contract')}"
    fields: dict[str, Any] = {
        "id": hashlib.sha256(key.encode()).hexdigest(),
        "model": "ref-llama-14m",
        "model_fingerprint": "feed" * 16,
        "method": method,
        "scheme": scheme,
        "metrics": {"wikitext2/perplexity": perplexity(window_losses(seed, extra=extra))},
        "bits_per_weight": 4.13,
        "cost": Cost(seconds=12.5, peak_gpu_bytes=3 << 30, peak_cpu_bytes=5 << 29),
        "contract": CONTRACT,
        "contract_fields": {"calibration": {"n_samples": 64, "seq_len": 1024}, "wikitext2": "abcd"},
    }
    return Result(**(fields | changes))


def contracted(row: Result, evaluation: dict | None = None, seed: int = 2, **fields: Any) -> Result:
    """The row with a contract of today's form, its hash being that of its fields; `fields` change the draw."""
    calibration = {
        "dataset": "wikitext2",
        "text": "t",
        "n_samples": 64,
        "seed": seed,
        "tokens": f"tokens {seed}",
    }
    parts = {
        "model": row.model_fingerprint,
        "calibration": calibration | fields,
        "evaluation": evaluation
        if evaluation is not None
        else {"wikitext2": {"protocol": "p", "tokens": "w"}},
    }
    contract, stored = provenance.contract(parts)
    identity = [contract, row.method, row.scheme, row.options, row.model]
    if not row.is_baseline:
        identity.append(provenance.calibration_fingerprint(stored))
    return row.model_copy(
        update={
            "id": provenance.sha256_json(identity),
            "contract": contract,
            "contract_fields": stored,
            "calibration": stored["calibration"],
        }
    )


def seeds(method: str, extras: list[float], **changes: Any) -> list[Result]:
    """One row per calibration seed 0, 1, ..., each with its own extra loss."""
    return [
        make_result(method, extra=extra, seed=10 + i, **changes).model_copy(
            update={
                "id": hashlib.sha256(f"{method} {changes} {i}".encode()).hexdigest(),
                "contract_fields": {"calibration": {"text": "t", "seed": i, "tokens": f"tokens {i}"}},
                "calibration": {"seed": i},
            }
        )
        for i, extra in enumerate(extras)
    ]


def baseline(**changes: Any) -> Result:
    """The full-precision row."""
    fields = {"extra": 0.0, "bits_per_weight": 16.0, "cost": Cost(seconds=0.0)}
    return make_result(BASELINE, "W16A16", **(fields | changes))


def accuracy(seed: int, chance: float, protocol: str) -> Metric:
    """A task with 400 questions."""
    right = (np.random.default_rng(seed).random(400) < chance).astype(float).tolist()
    fields = {"items": right, "items_name": "correct", "higher_is_better": True, "protocol": protocol}
    return Metric(value=sum(right) / 400, stderr=0.025, n=400, **fields)


def make_run(schemes: tuple[str, ...] = ("W4A4", "W3A16"), tasks: int = 1) -> list[Result]:
    """What `qbench run` with four methods gives; `tasks` metrics, the first a perplexity."""
    names = [
        "c4/perplexity",
        "ptb/perplexity",
        "piqa/acc",
        "arc_easy/acc",
        "hellaswag/acc_norm",
        "winogrande/acc",
    ]

    def metrics(seed: int, extra: float) -> dict[str, Metric]:
        found = {"wikitext2/perplexity": perplexity(window_losses(seed, extra=extra))}
        for i, name in enumerate(names[: tasks - 1]):
            if name.endswith("perplexity"):
                losses = window_losses(seed + 10 * i, extra=extra + 1.5)
                found[name] = perplexity(losses, f"{name[:-11]} (1024, non-overlapping, validation)")
            else:
                found[name] = accuracy(seed * 7 + i, 0.5 - extra / 3, f"{name} (0-shot)")
        return found

    rows = [baseline(metrics=metrics(1, 0.0))]
    for i, scheme in enumerate(schemes):
        for j, (method, (extra, seconds)) in enumerate(METHODS.items()):
            notes = ["attention logits overflow float16: fitted in bfloat16"] if j >= 2 else []
            if method == "affinequant" and scheme.endswith("A16"):
                notes.append("full matrices after the norms stay at run time: 1.6 MFLOP per token")
            row = make_result(
                method,
                scheme,
                metrics=metrics(2 + j, extra / (1 + i)),
                bits_per_weight=float(scheme[1]) + 0.13,
                cost=Cost(seconds=seconds * 3, peak_gpu_bytes=(j + 1) * 750_000_000, peak_cpu_bytes=2 << 30),
                notes=notes,
                options={"alpha": 0.5} if j else {},
            )
            rows.append(row)
    return rows
