"""Does the fast path give the answer of the slow one? Block losses and perplexity, beside a float64 reference.

    python benchmarks/same_answer.py --model MODEL --calib-dataset TRAIN.txt --eval TEST.txt [--device cuda]

The same engine runs each lane twice. Fast: as `qbench run` does it on this device (on a GPU fused fake quantization, a
captured step, warm-started inverses). Reference: float64, eager, direct inverses, no fused kernel. Printed per block:
the last epoch's training loss of both and their ratio; at the end the perplexities and the largest Newton–Schulz
residual that occurred. Two more runs show what of a difference is chance, since rounding to a few bits turns last
digits into other codes: the fast path once more (on a GPU sums have no fixed order; on a CPU it is 1), and the
reference once more with every weight changed by 1e-7 of itself, about what float32 cannot hold. No path can be nearer
to the reference than the reference is to itself.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qbench.data.text import load_text
from qbench.data.windows import draw_calibration, evaluation_windows
from qbench.engine import attention
from qbench.engine.install import on_device, quantized
from qbench.engine.lane import Lane, LaneResult
from qbench.engine.reconstruct import reconstruct
from qbench.engine.settings import EngineSettings
from qbench.evals.perplexity import perplexity
from qbench.methods import METHODS
from qbench.models.loading import LoadedModel, load_model
from qbench.scheme import Scheme

LANES = [("omniquant", "W3A16"), ("omniquant", "W4A4"), ("affinequant", "W3A16"), ("affinequant", "W4A4")]


def lanes(loaded: LoadedModel, epochs: int) -> list[Lane]:
    """Fresh lanes of every method and scheme."""
    made = []
    for name, text in LANES:
        scheme = Scheme.parse(text)
        method = METHODS.load(name)(epochs=epochs).resolve(scheme, loaded.spec)
        made.append(Lane(f"{name} {text}", method, scheme))
    return made


def run(
    loaded: LoadedModel, ids: torch.Tensor, test: torch.Tensor, settings: EngineSettings, epochs: int
) -> list[tuple[LaneResult, float]]:
    """Finished lanes with their perplexities, which are measured in float32 either way."""
    results = reconstruct(
        loaded.model, list(loaded.blocks), loaded.spec, lanes(loaded, epochs), ids, settings
    )
    scored = []
    for result in results:
        if result.error is not None:
            raise result.error
        with (
            quantized(loaded.model, loaded.blocks, loaded.spec, result, settings),
            on_device(loaded.model, loaded.blocks, settings.device),
        ):
            found = perplexity(loaded.model, test, batch_size=8, device=settings.device)
        scored.append((result, found.value))
    return scored


@torch.no_grad()
def nudge(loaded: LoadedModel) -> None:
    """Change every weight of the model by 1e-7 of itself, at random."""
    generator = torch.Generator().manual_seed(0)
    for parameter in loaded.model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.mul_(1 + 1e-7 * noise.to(parameter))


def main() -> None:
    """Run all, print a Markdown table, write the figures as JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--calib-dataset", default="stdlib")
    parser.add_argument("--eval", default="stdlib")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--windows", type=int, default=64, help="of the evaluation text")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, dtype="float32")
    loaded.model.set_attn_implementation(attention.register())
    text = load_text(arguments.calib_dataset, "calibration")
    ids = draw_calibration(text, loaded.tokenizer, arguments.samples, arguments.seq_len, 2).ids
    test = evaluation_windows(
        load_text(arguments.eval, "evaluation"), loaded.tokenizer, arguments.seq_len, arguments.windows
    ).ids
    fast = EngineSettings(device=torch.device(arguments.device))
    slow = replace(fast, dtype=torch.float64, cuda_graph=False, warm_inverse=False)
    found = run(loaded, ids, test, fast, arguments.epochs)
    reference = run(loaded, ids, test, slow, arguments.epochs)
    again = run(loaded, ids, test, fast, arguments.epochs)
    nudge(loaded)
    nudged = run(loaded, ids, test, slow, arguments.epochs)
    name = torch.cuda.get_device_name() if fast.device.type == "cuda" else "CPU"
    print(f"{arguments.model} on {name}: {len(ids)} windows of {ids.shape[1]}, {arguments.epochs} epochs\n")
    print(
        "| lane | last losses ÷ reference, by block | worst | fast again | reference nudged | perplexity | reference "
        "| ÷ | nudged ÷ | residual |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    rows: list[dict[str, Any]] = []
    for (one, ppl), (other, exact), (repeat, _), (moved, moved_ppl) in zip(
        found, reference, again, nudged, strict=True
    ):
        ratios = _ratios(one, other)
        residuals = [record.extras.get("inverse_residual") for record in one.records]
        residual = max((r for r in residuals if r is not None), default=None)
        rows.append({
            "lane": one.lane.name, "ratios": ratios, "again": _ratios(repeat, one), "perplexity": ppl,
            "reference": exact, "residual": residual, "nudged": _ratios(moved, other), "nudged_perplexity": moved_ppl,
        })  # fmt: skip
        worst, chance, least = (
            max(found, key=lambda r: abs(r - 1)) for found in (ratios, rows[-1]["again"], rows[-1]["nudged"])
        )
        print(
            f"| {one.lane.name} | {' '.join(f'{r:.4f}' for r in ratios)} | {worst:.4f} | {chance:.4f} | {least:.4f} "
            f"| {ppl:.3f} | {exact:.3f} | {ppl / exact:.4f} | {moved_ppl / exact:.4f} "
            f"| {'—' if residual is None else f'{residual:.1e}'} |"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"device": name, "model": arguments.model, "rows": rows}, indent=1)
        )


def _ratios(one: LaneResult, other: LaneResult) -> list[float]:
    return [a.losses[-1] / b.losses[-1] for a, b in zip(one.records, other.records, strict=True)]


if __name__ == "__main__":
    main()
