"""Milliseconds per sample and optimizer step on LLaMA-shaped blocks, beside the floor of the same run.

    python benchmarks/engine.py                    # one GPU: LLaMA-7B shapes, windows of 2048 tokens
    python benchmarks/engine.py --device cpu --hidden 256 --mlp 640 --heads 4 --seq-len 256 --blocks 4 --samples 16
    python benchmarks/engine.py --profile          # where the time goes, by category and by kernel

The floor is a plain forward and backward pass of the same block, in bfloat16 on a GPU, captured as a graph where the
engine's step is. Weights and windows are random: the time does not depend on them. What is timed is
`engine.optimize.fit` itself, between the ends of its first and its last epoch, so that compilation and capture stay out
of it. Projected is the fitting time of a whole model at the published 20 epochs and `--samples` windows.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
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
from qbench.quant.fake import _ClosedForm
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
        model.to(self.autocast or torch.float32)  # half precision, as checkpoints hold it
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


Kernels = list[tuple[str, float]]  # (kernel, milliseconds) in the order in which they ran
CATEGORIES = {
    "GEMM": r"gemm|nvjet|cutlass|xmma|splitk|gemv|::(mm|addmm|bmm|baddbmm|mv|addmv|dot)\b|linear_pointwise",
    "attention": r"flash|fmha|attention|sdpa|softmax",
    "fake-quant weights": r"^weight_",
    "fake-quant activations": r"^_(forward|backward)(_wide)?(_|$)",
    "optimizer": r"adam|multi_tensor",
    "copies": r"memcpy|memset",
}
BETWEEN = "transforms and inverses"  # whatever runs before and after the block itself, but for the above
REST = "elementwise and norms"


def whole_steps(kernels: Kernels) -> list[Kernels]:
    """Steps, each up to its optimizer; the first, which carries what an epoch begins with, only where it is alone."""
    steps: list[Kernels] = [[]]
    for i, kernel in enumerate(kernels):
        steps[-1].append(kernel)
        following = kernels[i + 1][0] if i + 1 < len(kernels) else ""
        if _category(kernel[0]) == "optimizer" != _category(following):
            steps.append([])
    return steps[1:-1] or steps[:-1]


def breakdown(steps: list[Kernels], weights: int | None) -> dict[str, float]:
    """Milliseconds by category.

    A step runs the transforms, quantizes the weights, passes the block forward and backward, and goes back through the
    weights and the transforms to the optimizer. So of a step's fake-quantization kernels the first and the last are the
    weights', and products before and after those of the block are the transforms'.

    Args:
        steps: Kernels of each, in order.
        weights: Weights quantized in a step; None where their kernels already go by `weight_…`.
    """
    spent = dict.fromkeys((*CATEGORIES, BETWEEN, REST), 0.0)
    for step in steps:
        _add_step(spent, step if weights is None else _marked(step, weights))
    return spent


def _marked(step: Kernels, weights: int) -> Kernels:
    """The step with the weights' fake quantization named as such."""
    quantized = [i for i, (name, _) in enumerate(step) if _category(name) == "fake-quant activations"]
    forward = [i for i in quantized if step[i][0].startswith("_forward")]
    backward = [i for i in quantized if step[i][0].startswith("_backward")]
    own = {*forward[:weights], *backward[-weights:]}
    return [("weight" + name if i in own else name, ms) for i, (name, ms) in enumerate(step)]


def _add_step(spent: dict[str, float], step: Kernels) -> None:
    at_weights = [i for i, (name, _) in enumerate(step) if name.startswith("weight_")]
    forward = [i for i in at_weights if step[i][0].startswith("weight_forward")]
    backward = [i for i in at_weights if step[i][0].startswith("weight_backward")]
    first, last = (forward[-1] if forward else -1), (backward[0] if backward else len(step))
    for i, (name, ms) in enumerate(step):
        category = _category(name)
        if not first < i < last and category in ("GEMM", REST):
            category = BETWEEN
        spent[category] += ms


def _category(kernel: str) -> str:
    for category, pattern in CATEGORIES.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return category
    return REST


class Operations(TorchDispatchMode):
    """Records (operation, milliseconds) in order on a CPU; a call of fake quantization counts as one.

    torch has dispatch modes under a private module only; nothing of the package needs them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Kernels = []
        self.recording = False

    def start(self) -> None:
        """As a profiler's."""
        self.recording = True
        self.__enter__()

    def stop(self) -> None:
        """As a profiler's."""
        self.__exit__(None, None, None)
        self.recording = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self.seen.append((str(func).replace("aten.", "aten::"), 1e3 * (time.perf_counter() - started)))
        return out

    @contextmanager
    def whole_calls(self) -> Iterator[None]:
        """Within, fake quantization is seen as calls, those of matrices as the weights'."""

        def seen_as(name: str, call: Any) -> Any:
            def run(ctx: Any, first: Tensor, *args: Any) -> Any:
                if not self.recording:
                    return call(ctx, first, *args)
                with _disable_current_modes():
                    started = time.perf_counter()
                    out = call(ctx, first, *args)
                    ms = 1e3 * (time.perf_counter() - started)
                self.seen.append((("weight" if first.dim() == 2 else "") + name, ms))
                return out

            return staticmethod(run)

        kept = {name: vars(_ClosedForm)[name] for name in ("forward", "backward")}
        for name in kept:
            setattr(_ClosedForm, name, seen_as(f"_{name}", getattr(_ClosedForm, name)))
        try:
            yield
        finally:
            for name, original in kept.items():
                setattr(_ClosedForm, name, original)


def profile(bench: Bench, method: str, scheme: str, batch: int) -> dict[str, Any]:
    """Where a step's time goes: milliseconds per sample by category and by kernel (on a CPU: by operation)."""
    if bench.device.type == "cuda":
        recorder = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        bench.step_ms(method, scheme, batch, recorder)
        events = [e for e in recorder.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        events = [e for e in events if not getattr(e, "is_user_annotation", False)]
        events.sort(key=lambda e: e.time_range.start)
        run = [(e.name, e.time_range.elapsed_us() / 1e3) for e in events]
        weights = len(bench.spec.linears)
    else:
        operations = Operations()
        with operations.whole_calls():
            bench.step_ms(method, scheme, batch, operations)
        run, weights = operations.seen, None
    steps = whole_steps(run)
    n = len(steps) * batch
    by_kernel: dict[str, tuple[float, int]] = {}
    for name, ms in (kernel for step in steps for kernel in step):
        total, count = by_kernel.get(name, (0.0, 0))
        by_kernel[name] = total + ms / n, count + 1
    return {
        "method": method, "scheme": scheme, "batch": batch,
        "ms": {category: ms / n for category, ms in breakdown(steps, weights).items()},
        "kernels": [
            {"name": name[:160], "ms": ms, "count": count / n}
            for name, (ms, count) in sorted(by_kernel.items(), key=lambda item: -item[1][0])[:40]
        ],
    }  # fmt: skip


def profile_table(profiles: list[dict[str, Any]]) -> str:
    """Markdown: a row per category, milliseconds per sample and share, a column per job."""
    heads = [f"{p['method']} {p['scheme']}, batch {p['batch']}" for p in profiles]
    lines = [f"| ms per sample | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    totals = [sum(p["ms"].values()) for p in profiles]
    for category in profiles[0]["ms"]:
        cells = [
            f"{p['ms'][category]:.2f} ({p['ms'][category] / total:.0%})"
            for p, total in zip(profiles, totals, strict=True)
        ]
        lines.append(f"| {category} | {' | '.join(cells)} |")
    lines.append(f"| all | {' | '.join(f'{total:.2f}' for total in totals)} |")
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
    parser.add_argument(
        "--windows", type=int, help="windows that are timed per epoch; default 128, with --profile 16"
    )
    parser.add_argument("--blocks", type=int, default=32, help="for the projection")
    parser.add_argument("--samples", type=int, default=128, help="for the projection")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="print where each job's time goes instead")
    arguments = parser.parse_args()
    arguments.windows = arguments.windows or (16 if arguments.profile else 128)
    bench = Bench(arguments)
    name = (
        torch.cuda.get_device_name()
        if bench.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    reference = (arguments.hidden, arguments.mlp, arguments.seq_len) == (4096, 11008, 2048)
    if arguments.profile:
        profiles = []
        for method, scheme, batch, _, _ in JOBS:
            profiles.append(profile(bench, method, scheme, batch))
            for kernel in profiles[-1]["kernels"][:12]:
                print(f"{kernel['ms']:8.3f} ms {kernel['count']:6.1f} × {kernel['name'][:100]}")
            print(f"{method} {scheme}, batch {batch}: the largest of its kernels\n", flush=True)
        print(f"{name}, torch {torch.__version__}\n\n{profile_table(profiles)}")
        if arguments.json:
            arguments.json.write_text(json.dumps({"device": name, "profiles": profiles}, indent=1))
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
