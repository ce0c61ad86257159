"""The model card of an exported folder: what it is, what it recovers, what it was checked against, how it was made."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qbench.results import Certificate, Result

_LOADING = {
    "gptq": "`GPTQModel.load(folder)`, AutoGPTQ, or transformers with optimum and gptqmodel installed.",
    "awq": "transformers with gptqmodel installed, `GPTQModel.load(folder)`, or vLLM.",
    "compressed-tensors": "vLLM, or transformers with compressed-tensors installed.",
    "fake": "Plain transformers: the weights are dequantized float32 and save no memory.",
}


def model_card(row: Result, baseline: Result | None, label: str, certificate: Certificate, model: str) -> str:
    """README.md of an exported folder.

    Args:
        row: The record of the quantized model.
        baseline: That of the full-precision model on the same protocol, if there is one.
        label: The method as people write it.
        certificate: Of this folder.
        model: The base model as it was asked for.
    """
    base = model.rstrip("/").rpartition("/")[2]
    is_hub_name = not model.startswith((".", "/")) and model.count("/") == 1
    front = ["---", "library_name: transformers", "tags:", "- quantized", f"- {certificate.format}"]
    front += [f"base_model: {model}", "base_model_relation: quantized"] if is_hub_name else []
    lines = [
        *front,
        "---",
        "",
        f"# {certificate.folder}",
        "",
        f"{base} quantized by {label} to {row.scheme}, written as {certificate.format}: {_bits(row)}.",
        f"Load it with {_LOADING[certificate.format]}",
        "",
        "## Recovery",
        "",
        *_table(row, baseline),
        "",
        "Full precision ÷ quantized for a metric that is better low, quantized ÷ full precision otherwise. Both were "
        "measured by qbench on the same items.",
        "",
        "## Certificate",
        "",
        f"{certificate.sentence()}.",
        "",
        f"Compared with the fake-quantized model on {certificate.probe}; its perplexity there is "
        f"{certificate.reference_perplexity:.4f}.",
        "",
        *_checks(certificate),
        *[f"\n- {note}" for note in certificate.notes],
        *[f"\n- {check.runtime}: {check.note}" for check in certificate.checks if check.note],
        "",
        "## Files",
        "",
        *_sizes(certificate),
        "",
        "`recipe.yaml` repeats the run, `qbench.json` is its whole record, `certificate.json` the comparison.",
        "",
    ]
    return "\n".join(lines)


def _bits(row: Result) -> str:
    bits = row.bits_per_weight
    return (
        "no bits counted" if bits is None else f"{bits:.2f} bits per weight, scales and zero points included"
    )


def _table(row: Result, baseline: Result | None) -> Iterator[str]:
    yield "| metric | protocol | full precision | quantized | recovery |"
    yield "|---|---|---|---|---|"
    for key, metric in row.metrics.items():
        full = None if baseline is None else baseline.metrics.get(key)
        if full is None or full.protocol != metric.protocol:
            yield f"| {key} | {metric.protocol} | — | {_number(metric.value)} | — |"
            continue
        better, worse = (metric.value, full.value) if metric.higher_is_better else (full.value, metric.value)
        recovery = f"{better / worse:.2%}" if worse and math.isfinite(worse) else "—"
        yield f"| {key} | {metric.protocol} | {_number(full.value)} | {_number(metric.value)} | {recovery} |"


def _checks(certificate: Certificate) -> Iterator[str]:
    yield "| runtime | dtype | verdict | largest logit difference | KL, nats/token | top-1 agreement | perplexity |"
    yield "|---|---|---|---|---|---|---|"
    for check in certificate.checks:
        verdict = "verified" if check.verified else f"FAILED at {check.failed_at}"
        own = check.reference_perplexity
        numbers = (
            _number(check.largest_logit_difference, ".2e"),
            _number(check.kl_mean, ".2e"),
            _number(check.top1_agreement, ".3%"),
            _number(check.perplexity)
            + ("" if own is None else f" (with inputs rounded in its order: {_number(own)})"),
        )
        yield f"| {check.runtime} | {check.dtype or '—'} | {verdict} | {' | '.join(numbers)} |"
    for name, why in certificate.not_tried.items():
        yield f"| {name} | — | not tried: {why} | — | — | — | — |"


def _sizes(certificate: Certificate) -> Iterator[str]:
    yield "| part | bytes |"
    yield "|---|---|"
    for name, size in certificate.bytes.items():
        yield f"| {name.replace('_', ' ')} | {size:,} |"


def _number(value: float | None, style: str = ".4f") -> str:
    return "—" if value is None or not math.isfinite(value) else format(value, style)
