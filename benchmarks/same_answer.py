"""Does the fast path give the answer of the slow one? Block losses and perplexity, beside a float64 reference.

    python benchmarks/same_answer.py --model MODEL --calib-dataset TRAIN.txt --eval TEST.txt [--device cuda]

The same engine runs each lane twice. Fast: as `qbench run` does it on this device (on a GPU fused fake quantization, a
captured step, warm-started inverses). Reference: float64, eager, direct inverses, no fused kernel. Printed per block:
the last epoch's training loss of both and their ratio; at the end the perplexities and the largest Newton–Schulz
residual that occurred. Two more runs show what of a difference is chance, since rounding to a few bits turns last
digits into other codes: the fast path once more (on a GPU sums have no fixed order; on a CPU it is 1), and the
reference once more with every weight changed by 1e-7 of itself, about what float32 cannot hold. No path can be nearer
to the reference than the reference is to itself.

A second table takes that chance away: both paths are given the parameters that the reference ended with, and compute
from there on their own (transforms, inverses, rounding, products, the blocks before), so that a difference is one of
arithmetic. Printed are the losses, the perplexities and the share of codes that differ.
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
from qbench.engine.lane import Lane, LaneResult, Planner
from qbench.engine.plan import BlockPlan, BlockView
from qbench.engine.reconstruct import reconstruct
from qbench.engine.settings import EngineSettings
from qbench.evals.perplexity import perplexity
from qbench.methods import METHODS
from qbench.models.loading import LoadedModel, load_model
from qbench.scheme import Scheme

LANES = [("omniquant", "W3A16"), ("omniquant", "W4A4"), ("affinequant", "W3A16"), ("affinequant", "W4A4")]


class AtParameters:
    """A method at the parameters a finished lane of it ended with; its one epoch, at rate 0, measures their loss."""

    def __init__(self, method: Planner, found: LaneResult):
        self.method, self.found, self.needs = method, found, method.needs

    def plan(self, view: BlockView) -> BlockPlan:
        """The method's plan, with what was learned in it."""
        plan, learned = self.method.plan(view), self.found.state(view.index).learned
        parts = [(transform.site.name, transform) for transform in plan.transforms]
        if plan.clipping is not None:
            parts.append(("clipping", plan.clipping))
        with torch.no_grad():
            for site, part in parts:
                for name, parameter in part.named_parameters():
                    parameter.copy_(learned[f"{site}.{name}"])
        assert plan.training is not None
        return replace(plan, training=replace(plan.training, epochs=1, transform_lr=0.0, clipping_lr=0.0))


def lanes(loaded: LoadedModel, epochs: int) -> list[Lane]:
    """Fresh lanes of every method and scheme."""
    made = []
    for name, text in LANES:
        scheme = Scheme.parse(text)
        method = METHODS.load(name)(epochs=epochs).resolve(scheme, loaded.spec)
        made.append(Lane(f"{name} {text}", method, scheme))
    return made


def run(
    loaded: LoadedModel, ids: torch.Tensor, test: torch.Tensor, settings: EngineSettings, made: list[Lane]
) -> list[tuple[LaneResult, float]]:
    """Finished lanes with their perplexities, which are measured in float32 either way."""
    results = reconstruct(loaded.model, list(loaded.blocks), loaded.spec, made, ids, settings)
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

    def lane_runs(settings: EngineSettings) -> list[tuple[LaneResult, float]]:
        return run(loaded, ids, test, settings, lanes(loaded, arguments.epochs))

    found, reference, again = lane_runs(fast), lane_runs(slow), lane_runs(fast)
    fixed = [replace(lane, planner=AtParameters(lane.planner, result)) for lane, (result, _) in zip(
        lanes(loaded, arguments.epochs), reference, strict=True
    )]  # fmt: skip
    there, exactly = (run(loaded, ids, test, settings, fixed) for settings in (fast, slow))
    nudge(loaded)
    nudged = lane_runs(slow)
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
    print("\nAt the parameters that the reference ended with:\n")
    print("| lane | losses ÷ reference, by block | worst | perplexity | reference | ÷ | codes that differ |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for row, (one, ppl), (other, exact) in zip(rows, there, exactly, strict=True):
        ratios = _ratios(one, other)
        row["fixed"] = {
            "ratios": ratios,
            "perplexity": ppl,
            "reference": exact,
            "codes": _differing(one, other),
        }
        print(
            f"| {row['lane']} | {' '.join(f'{r:.5f}' for r in ratios)} | {max(ratios, key=lambda r: abs(r - 1)):.5f} "
            f"| {ppl:.3f} | {exact:.3f} | {ppl / exact:.5f} | {row['fixed']['codes']:.1e} |"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"device": name, "model": arguments.model, "rows": rows}, indent=1)
        )


def _ratios(one: LaneResult, other: LaneResult) -> list[float]:
    return [a.losses[-1] / b.losses[-1] for a, b in zip(one.records, other.records, strict=True)]


def _differing(one: LaneResult, other: LaneResult) -> float:
    """Share of the codes of all blocks that are not the same."""
    differing = total = 0
    for i in range(len(one)):
        mine, theirs = one.state(i).linears, other.state(i).linears
        for role, weight in mine.items():
            differing += int((weight.codes != theirs[role].codes).sum())
            total += weight.codes.numel()
    return differing / total


if __name__ == "__main__":
    main()
