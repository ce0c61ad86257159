"""Milliseconds per sample and optimizer step on LLaMA-shaped blocks, beside the floor of the same run.

    python benchmarks/engine.py                    # one GPU: LLaMA-7B shapes, windows of 2048 tokens
    python benchmarks/engine.py --device cpu --hidden 256 --mlp 640 --heads 4 --seq-len 256 --blocks 4 --samples 16

The floor is a plain forward and backward pass of the same block, in bfloat16 on a GPU, captured as a graph where the
engine's step is. Weights and windows are random: the time does not depend on them. What is timed is
`engine.optimize.fit` itself, between the ends of its first and its last epoch, so that compilation and capture stay out
of it. Projected is the fitting time of a whole model at the published 20 epochs and `--samples` windows.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qbench.engine import attention
from qbench.engine.activations import Observer
from qbench.engine.capture import block_inputs, move
from qbench.engine.hidden import HiddenStates
from qbench.engine.optimize import fit
from qbench.engine.plan import BlockView
from qbench.engine.prepare import PreparedBlock, block_tensors
from qbench.engine.settings import EngineSettings
from qbench.methods import METHODS
from qbench.models.llama import LLAMA
from qbench.quant.grid import Grid
from qbench.scheme import Scheme

PUBLISHED_EPOCHS = 20
# (method, scheme, windows per optimizer step, the authors' ms, the goal's ms), the last two on one H200 at 7B shapes
JOBS: list[tuple[str, str, int, float | None, float | None]] = [
    ("affinequant", "W4A4", 1, 144.8, 9.0),
    ("affinequant", "W3A16", 1, 136.8, 18.0),
    ("affinequant", "W3A16", 4, None, 10.0),
    ("omniquant", "W4A4", 1, 43.5, 7.0),
    ("omniquant", "W3A16", 1, 34.6, 6.0),
]


class Bench:
    """One random block with its inputs."""

    def __init__(self, arguments: argparse.Namespace):
        """Build the block and capture what reaches it."""
        torch.manual_seed(0)
        self.device = torch.device(arguments.device)
        self.autocast = torch.bfloat16 if self.device.type == "cuda" else None
        config = LlamaConfig(
            vocab_size=1024, hidden_size=arguments.hidden, intermediate_size=arguments.mlp, num_hidden_layers=1,
            num_attention_heads=arguments.heads, num_key_value_heads=arguments.kv_heads or arguments.heads,
            max_position_embeddings=arguments.seq_len,
        )  # fmt: skip
        with self.device:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
        model.set_attn_implementation(attention.register())
        self.block = model.model.layers[0]
        self.spec = LLAMA.block_spec(self.block, config)
        ids = torch.randint(1024, (arguments.windows, arguments.seq_len), device=self.device)
        shape = (arguments.windows, arguments.seq_len, arguments.hidden)
        self.inputs = HiddenStates(shape, self.device, "device")
        for i, (hidden, kwargs) in enumerate(block_inputs(model, self.block, ids)):
            self.inputs.write(i, hidden.float())
            self.kwargs = move(kwargs, self.device, torch.float32)
        self.target = self.inputs.empty_like()
        self.target.write(0, self.inputs.read(0, len(self.inputs)))

    def step_ms(
        self, method: str, scheme_text: str, batch: int, profiler: Any | None = None
    ) -> dict[str, Any]:
        """Time `fit` per sample; peak memory of the steps, inputs and targets not counted.

        A profiler is started for the last of the epochs, which is then slower than those that are timed.
        """
        scheme = Scheme.parse(scheme_text)
        settings = EngineSettings(device=self.device, autocast=self.autocast, batch_size=batch)
        prepared = PreparedBlock(self.block, self.spec).to(self.device)
        base = block_tensors(self.block, self.spec, self.device, torch.float32)
        observer = Observer(prepared, self.inputs.shape[1])
        with observer, torch.no_grad():
            prepared.load(base)(self.inputs.read(0, 1), **self.kwargs)
        grid = Grid(scheme.wbits, scheme.symmetric, scheme.group_size)
        chosen = METHODS.load(method)(epochs=3).resolve(scheme, self.spec)
        plan = chosen.plan(BlockView(0, 1, self.spec, scheme, grid, base, observer.stats))
        for part in (*plan.transforms, plan.clipping):
            part.to(self.device)
        prepared.quantize_operands(scheme)
        ends: list[float] = []

        def on_epoch(epoch: int, epochs: int, loss: float) -> None:
            ends.append(time.perf_counter())
            if profiler is not None and epoch + 2 == epochs:
                profiler.start()

        resident = self._memory()
        report = fit(
            prepared, plan, base, grid, self.inputs, self.target, self.target, self.kwargs, settings,
            on_epoch,
        )  # fmt: skip
        if profiler is not None:
            profiler.stop()
        per_sample = (ends[-1] - ends[0]) / (len(ends) - 1) / len(self.inputs)
        peak = torch.cuda.max_memory_allocated() - resident if self.device.type == "cuda" else None
        return {"ms": 1e3 * per_sample, "peak_gib": peak and peak / 2**30, **report.extras}

    def floor_ms(self) -> float:
        """Plain forward and backward pass of the block, gradients of weights included, per sample."""
        dtype = self.autocast or torch.float32
        weights = [p.detach().to(dtype).requires_grad_() for p in self.block.parameters()]
        names = [name for name, _ in self.block.named_parameters()]
        x = self.inputs.read(0, 1).to(dtype).requires_grad_()
        kwargs = move(self.kwargs, self.device, dtype)

        def step() -> None:
            out = torch.func.functional_call(
                self.block, dict(zip(names, weights, strict=True)), (x,), kwargs, strict=True
            )
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.grad(out, [x, *weights], torch.ones_like(out))

        return 1e3 * self._time(step)

    def _time(self, step: Any, repeats: int = 20) -> float:
        if self.device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for _ in range(3):
            step()
        self._wait()
        started = time.perf_counter()
        for _ in range(repeats):
            step()
        self._wait()
        return (time.perf_counter() - started) / repeats

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _memory(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return sum(_bytes(t._data) for t in (self.inputs, self.target))


def kernels(bench: Bench, method: str, scheme: str, batch: int, rows: int = 25) -> str:
    """Where a step's time goes: milliseconds per sample of each GPU kernel, largest first."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    bench.step_ms(method, scheme, batch, profiler)
    spent = {e.key: (e.self_device_time_total / 1e3, e.count) for e in profiler.key_averages()}
    n = len(bench.inputs)
    lines = [
        f"{method} {scheme}, batch {batch}: {sum(ms for ms, _ in spent.values()) / n:.2f} ms of kernels per sample"
    ]
    for name, (ms, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:rows]:
        lines.append(f"{ms / n:8.3f} ms {count / n:6.1f} × {name[:110]}")
    return "\n".join(lines)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def main() -> None:
    """Measure, print a Markdown table, and write the figures as JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in (
        ("hidden", 4096),
        ("mlp", 11008),
        ("heads", 32),
        ("kv-heads", 0),
        ("seq-len", 2048),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--windows", type=int, default=128, help="windows that are timed per epoch")
    parser.add_argument("--blocks", type=int, default=32, help="for the projection")
    parser.add_argument("--samples", type=int, default=128, help="for the projection")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="print the GPU kernels of each job instead")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    name = (
        torch.cuda.get_device_name()
        if bench.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    reference = (arguments.hidden, arguments.mlp, arguments.seq_len) == (4096, 11008, 2048)
    if arguments.profile:
        for method, scheme, batch, _, _ in JOBS:
            print(kernels(bench, method, scheme, batch), flush=True)
        return
    floor = bench.floor_ms()
    print(
        f"{name}, torch {torch.__version__}; hidden {arguments.hidden}, mlp {arguments.mlp}, {arguments.seq_len} tokens"
    )
    print(f"floor: {floor:.2f} ms (plain forward and backward)\n")
    print(
        "| method | scheme | batch | ms per sample | × floor | authors' ms | goal ms | peak GiB | projected |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    rows = []
    for method, scheme, batch, authors, goal in JOBS:
        row = {"method": method, "scheme": scheme, "batch": batch} | bench.step_ms(method, scheme, batch)
        rows.append(row)
        projected = row["ms"] * arguments.samples * PUBLISHED_EPOCHS * arguments.blocks / 1e3
        beside = [f"{v:g}" if v is not None and reference else "—" for v in (authors, goal)]
        peak = f"{row['peak_gib']:.2f}" if row["peak_gib"] is not None else "—"
        shown = f"{projected / 60:.1f} min" if projected >= 60 else f"{projected:.0f} s"
        print(
            f"| {method} | {scheme} | {batch} | {row['ms']:.2f} | {row['ms'] / floor:.1f} | {' | '.join(beside)} "
            f"| {peak} | {shown} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": name, "floor_ms": floor, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
