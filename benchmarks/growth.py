"""Does cost grow linearly in blocks and in samples, and does memory not grow with blocks? Measured at three sizes each.

    python benchmarks/growth.py [--device cuda] [--plot docs/growth.svg]

AffineQuant W4A4 on LLaMA-shaped random weights through `engine.reconstruct`. Seconds are the lanes' own (their blocks),
memory is the largest that tensors held on a GPU (not shown on a CPU, where a process's peak never falls).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qbench.engine import attention
from qbench.engine.lane import Lane
from qbench.engine.reconstruct import reconstruct
from qbench.engine.settings import EngineSettings
from qbench.methods import METHODS
from qbench.models.llama import LLAMA
from qbench.scheme import Scheme


def measure(blocks: int, samples: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak bytes of one run."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=arguments.hidden, intermediate_size=arguments.hidden * 5 // 2,
        num_hidden_layers=blocks, num_attention_heads=arguments.hidden // 64, max_position_embeddings=arguments.seq_len,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.set_attn_implementation(attention.register())
    layers = list(model.model.layers)
    spec = LLAMA.block_spec(layers[0], config)
    ids = torch.randint(1024, (samples, arguments.seq_len))
    scheme = Scheme.parse("W4A4")
    method = METHODS.load("affinequant")(epochs=arguments.epochs).resolve(scheme, spec)
    settings = EngineSettings(device=device, autocast=torch.bfloat16 if device.type == "cuda" else None)
    (result,) = reconstruct(model, layers, spec, [Lane("growth", method, scheme)], ids, settings)
    if result.error is not None:
        raise result.error
    return {
        "blocks": blocks,
        "samples": samples,
        "seconds": result.seconds,
        "peak_bytes": result.peak_gpu_bytes,
    }


def main() -> None:
    """Measure, print a Markdown table, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs=3, default=[2, 4, 8])
    parser.add_argument("--samples", type=int, nargs=3, default=[16, 32, 64])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    measure(1, arguments.samples[0], arguments)  # compilation, caches
    middle = arguments.blocks[1], arguments.samples[1]
    by_blocks = [measure(n, middle[1], arguments) for n in arguments.blocks]
    by_samples = [measure(middle[0], n, arguments) for n in arguments.samples]
    print("| blocks | samples | seconds | seconds per block and sample | peak GiB |\n|--:|--:|--:|--:|--:|")
    for row in by_blocks + by_samples:
        each = row["seconds"] / row["blocks"] / row["samples"]
        peak = "—" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        print(f"| {row['blocks']} | {row['samples']} | {row['seconds']:.2f} | {each:.4f} | {peak} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"by_blocks": by_blocks, "by_samples": by_samples}, indent=1))
    if arguments.plot:
        draw(by_blocks, by_samples, arguments.plot)


def draw(by_blocks: list[dict[str, Any]], by_samples: list[dict[str, Any]], path: Path) -> None:
    """Both series with the straight line through zero and the largest size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for panel, rows, over in zip(panels, (by_blocks, by_samples), ("blocks", "samples"), strict=True):
        x, y = [row[over] for row in rows], [row["seconds"] for row in rows]
        panel.plot([0, x[-1]], [0, y[-1]], color="0.7", linewidth=1)
        panel.plot(x, y, "o")
        panel.set_xlabel(f"{over} ({_fixed(rows, over)})")
        panel.set_ylabel("seconds")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _fixed(rows: list[dict[str, Any]], over: str) -> str:
    other = "samples" if over == "blocks" else "blocks"
    return f"{rows[0][other]} {other}"


if __name__ == "__main__":
    main()
