"""The timing protocol: many calls, rotated weights, interleaved candidates; and the rates that bound them.

On a GPU a candidate's calls are captured as one CUDA graph over copies of its weights that together exceed the L2
cache several times, because a loop in Python measures launches and a single hot copy measures the cache. On a CPU a
candidate is called in a loop of at least a second over such copies. Candidates are measured in the order A B C C B
A, so that slow drifts of the machine cancel, and the two passes of one candidate tell how far the same code lies
from itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qbench.errors import kind_and_first_line
from qbench.latency import Ceilings, Timing

Call = Callable[[], Any]

GRAPH_LIMIT = (
    0.1  # of the logits' spread: what rounding in other attention kernels may cost behind quantized inputs
)
WARM_STEPS = 2  # before a capture


@dataclass(frozen=True)
class Protocol:
    """How long and how often.

    Attributes:
        calls: Calls captured in one graph, at least; each copy of the weights is used equally often.
        replays: Timed replays of the graph over both passes, at least.
        loop_s: Seconds that one measurement of a loop lasts on a CPU, at least (two measurements per candidate).
        limit_s: A candidate that would take longer than this in all is not measured but called too slow.
        cache_factor: Copies of the weights exceed the last cache this many times.
        max_copies: But there are no more than so many of them.
    """

    calls: int = 20
    replays: int = 30
    loop_s: float = 1.0
    limit_s: float = 10.0
    cache_factor: float = 5.0
    max_copies: int = 256

    def copies(self, weight_bytes: int, cache_bytes: int) -> int:
        """Copies of a weight that are rotated through."""
        needed = -(-self.cache_factor * cache_bytes // max(weight_bytes, 1))
        return int(min(max(needed, 1), self.max_copies))


class TooSlowError(Exception):
    """A candidate whose measurement would not end in time; carries the time of one call."""

    def __init__(self, call_us: float):
        super().__init__(f"one call takes about {call_us:.0f} µs")
        self.call_us = call_us


class GraphedCalls:
    """Calls captured as one CUDA graph; calling it gives one pass of samples, seconds per call."""

    def __init__(self, calls: Sequence[Call], protocol: Protocol):
        """Warm up (compilation included), capture, replay once.

        A graph reads its operands by address and does not keep them: the calls, which do, must live as long as it. Of
        tensors that only they hold, the memory would otherwise be given back to the driver by the next capture, which
        empties the allocator's cache, and the next replay would break the context.
        """
        self.calls = tuple(calls)
        self.per_sample = -(-protocol.calls // len(calls)) * len(calls)
        self.n_samples = -(-protocol.replays // 2)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
            calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(self.per_sample):
                calls[i % len(calls)]()
        self.graph.replay()
        torch.cuda.synchronize()
        seconds = self._replays(1)[0]
        if seconds * self.per_sample * 2 * self.n_samples > protocol.limit_s:
            raise TooSlowError(1e6 * seconds)

    def _replays(self, count: int) -> list[float]:
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)
        ]
        for start, end in events:
            start.record()
            self.graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) / self.per_sample for start, end in events]

    def __call__(self) -> list[float]:
        """One pass."""
        return self._replays(self.n_samples)


class LoopedCalls:
    """Calls in a plain loop; calling it gives one pass of samples, seconds per call."""

    def __init__(
        self, calls: Sequence[Call], protocol: Protocol, clock: Callable[[], float] = time.perf_counter
    ):
        """Warm up with one turn through the copies, then see how long a turn takes.

        Args:
            calls: One per copy of the weights.
            protocol: Durations.
            clock: Seconds; replaced in tests.
        """
        self.calls, self.protocol, self.clock = calls, protocol, clock
        started = clock()
        calls[0]()
        if (clock() - started) * len(calls) > protocol.limit_s:
            raise TooSlowError(1e6 * (clock() - started))
        for call in calls:
            call()
        turn = self._turns(1)
        if 2 * turn > protocol.limit_s:
            raise TooSlowError(1e6 * turn / len(calls))
        # A millisecond: long beside the clock, short beside a time slice, so that on a shared machine most samples are
        # undisturbed and the median is one of them.
        self.turns = max(1, round(0.001 / turn)) if turn > 0 else 1
        self.per_sample = self.turns * len(calls)

    def _turns(self, count: int) -> float:
        started = self.clock()
        for _ in range(count):
            for call in self.calls:
                call()
        return self.clock() - started

    def __call__(self) -> list[float]:
        """One pass of at least `loop_s`."""
        samples, total = [], 0.0
        while total < self.protocol.loop_s:
            seconds = self._turns(self.turns)
            total += seconds
            samples.append(seconds / self.per_sample)
        return samples


Passes = GraphedCalls | LoopedCalls


def repeatable(calls: Sequence[Call], device: str, protocol: Protocol) -> Passes:
    """Make a candidate measurable on its device.

    Args:
        calls: One per copy of its weights; each returns something that may be dropped.
        device: `cpu` or `cuda`.
        protocol: Durations.

    Raises:
        TooSlowError: If measuring it would take longer than the protocol allows.
    """
    return GraphedCalls(calls, protocol) if device == "cuda" else LoopedCalls(calls, protocol)


def interleaved(candidates: Mapping[str, Callable[[], list[float]]]) -> dict[str, Timing]:
    """Measure every candidate twice, in order and in reversed order.

    Args:
        candidates: By name: what gives one pass of samples in seconds per call, and may have `per_sample`.
    """
    order = list(candidates)
    passes: dict[str, list[list[float]]] = {name: [] for name in order}
    for name in (*order, *reversed(order)):
        passes[name].append(candidates[name]())
    return {
        name: summarize(*passes[name], calls_per_sample=getattr(candidates[name], "per_sample", 1))
        for name in order
    }


def summarize(first: Sequence[float], last: Sequence[float], calls_per_sample: int = 1) -> Timing:
    """Medians and quartiles of two passes, given in seconds per call."""
    samples = sorted(1e6 * seconds for seconds in (*first, *last))
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return Timing(
        median_us=statistics.median(samples),
        iqr_us=quartiles[2] - quartiles[0],
        first_us=1e6 * statistics.median(first),
        last_us=1e6 * statistics.median(last),
        n_samples=len(samples),
        calls_per_sample=calls_per_sample,
    )


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes, default=32 * 2**20)


def measure_ceilings(device: str, protocol: Protocol) -> Ceilings:
    """Read rate and peak rates of the device as torch reaches them, by the same protocol as the layers."""
    on_gpu = device == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    read_rate, note = _read_rate(device, protocol)
    notes = [note]
    side = 8192 if on_gpu else 1024
    flops = {}
    for dtype in (torch.bfloat16, torch.float16) if on_gpu else (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
        seconds = _median_s([lambda a=a, b=b: torch.mm(a, b)], device, protocol)
        flops[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
    a, b = (
        torch.randint(-128, 128, (side, side), generator=generator, device=device, dtype=torch.int8)
        for _ in range(2)
    )
    right = b.t() if on_gpu else b
    flops["int8"] = 2 * side**3 / _median_s([lambda: torch._int_mm(a, right)], device, protocol)
    notes.append(f"peaks: products of {side}×{side}")
    return Ceilings(read_bytes_per_s=read_rate, flops=flops, notes=notes)


def _read_rate(device: str, protocol: Protocol) -> tuple[float, str]:
    """Bytes per second, and how they were read."""
    n_bytes = 2**32 if device == "cuda" else 2**28
    source = torch.zeros(n_bytes // 4, dtype=torch.float32, device=device)
    summed = n_bytes / _median_s([source.sum], device, protocol)
    if device != "cuda":
        return summed, "read rate: sum of float32 values that are in no cache"
    target = torch.empty_like(source)  # on some GPUs a copy comes closer to the memory's rate than a sum
    copied = 2 * n_bytes / _median_s([lambda: target.copy_(source)], device, protocol)
    if copied > summed:
        return copied, "read rate: copy of float32 values that are in no cache, bytes read and written"
    return summed, "read rate: sum of float32 values that are in no cache"


def _median_s(calls: Sequence[Call], device: str, protocol: Protocol) -> float:
    return interleaved({"": repeatable(calls, device, protocol)})[""].median_us / 1e6


@dataclass(frozen=True)
class Generation:
    """What `generate` found; seconds, and bytes of the device's memory at its highest (None on a CPU)."""

    prefill_s: float
    step_s: float
    graphed_step_s: float | None
    peak_bytes: int | None
    notes: tuple[str, ...] = ()


@torch.no_grad()
def generate(
    model: Any,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Generation:
    """Time greedy generation from random prompts: one forward pass over the prompts, then token by token.

    On a fast GPU a step in Python is bound by launching kernels, whatever the weights weigh; there the steps are timed
    again, each as one CUDA graph over a cache of fixed size.

    Args:
        model: A causal language model of transformers, ready on its device.
        batch: Sequences.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Steps after it.
        repeats: Of the prefill; its median counts.
        clock: Seconds; replaced in tests.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, model.config.vocab_size, (batch, prompt_tokens), generator=generator).to(device)
    _tokens(model, prompt, 2)  # compiles, allocates
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    prefills = []
    for _ in range(repeats):
        started = clock()
        logits, cache = _step(model, prompt, None)
        _wait(on_gpu)
        prefills.append(clock() - started)
    token, fed, given, steps = logits.argmax(-1), [], [], []
    for _ in range(new_tokens):
        fed.append(token)
        started = clock()
        logits, cache = _step(model, token, cache)
        token = logits.argmax(-1)
        _wait(on_gpu)  # as a program does that looks at each token
        steps.append(clock() - started)
        given.append(logits)
    step = statistics.median(steps)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    graphed, notes = None, []
    if on_gpu:
        try:
            seconds, same = _graphed_step(model, prompt, torch.cat(fed, 1))
            deviation, agreeing = compare_logits(same, torch.cat(given, 1))
            found = f"graphed steps, fed the same tokens: logits {100 * deviation:.2g}% off, {agreeing}"
            notes.append(
                found
                if deviation <= GRAPH_LIMIT
                else f"no graphed time, they compute something else: {found}"
            )
            graphed = seconds if deviation <= GRAPH_LIMIT else None
        except Exception as error:  # not every cache of every model can be captured
            notes.append(f"no graphed steps: {kind_and_first_line(error)}")
    return Generation(statistics.median(prefills), step, graphed, peak, tuple(notes))


def _step(model: Any, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """Logits of the last position [batch, 1, vocabulary], and the cache."""
    out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:], out.past_key_values


def _tokens(model: Any, prompt: torch.Tensor, count: int, cache: Any = None) -> torch.Tensor:
    """Greedy continuation, [batch, count]."""
    logits, cache = _step(model, prompt, cache)
    found = [logits.argmax(-1)]
    for _ in range(count - 1):
        logits, cache = _step(model, found[-1], cache)
        found.append(logits.argmax(-1))
    return torch.cat(found, 1)


def compare_logits(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, str]:
    """Distance of logits [batch, steps, vocabulary] over the expected ones' spread, and how many highest ones agree."""
    found, expected = found.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    agree = found.argmax(-1) == expected.argmax(-1)
    return float((found - expected).norm() / spread), f"{int(agree.sum())} of {agree.numel()} tokens the same"


class CachedSteps:
    """Single steps over a cache of fixed size: from one to the next only the contents of tensors change."""

    def __init__(self, model: Any, prompt: torch.Tensor, steps: int):
        """Make room for the prompt and so many steps, and read the prompt."""
        from transformers import StaticCache

        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + steps)
        logits, _ = _step(model, prompt, self.cache)
        self.first = logits.argmax(-1)
        self.token, self.logits = self.first.clone(), torch.empty_like(logits)

    def rewind(self) -> None:
        """Forget all but the prompt; a cache that was captured stays where it is."""
        self.cache.reset()
        _step(self.model, self.prompt, self.cache)
        self.token.copy_(self.first)

    def step(self) -> None:
        """Read `token`, write its `logits`, put the most likely next one into its place."""
        logits, _ = _step(self.model, self.token, self.cache)
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1))

    def fed(self, tokens: torch.Tensor, step: Callable[[], Any]) -> torch.Tensor:
        """Logits [batch, steps, vocabulary] of steps that read the tokens given [batch, steps], not their own."""
        self.rewind()
        found = []
        for i in range(tokens.shape[1]):
            self.token.copy_(tokens[:, i : i + 1])
            step()
            found.append(self.logits.clone())
        held, due = int(self.cache.get_seq_length()), self.prompt.shape[1] + tokens.shape[1]
        if held != due:  # random weights hardly look at the past: their logits would not tell
            raise RuntimeError(
                f"the cache holds {held} tokens after steps to {due}: a step does not move its place"
            )
        return torch.cat(found, 1)


def _graphed_step(model: Any, prompt: torch.Tensor, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds of one replayed step, and the logits of replays that are fed the tokens [batch, steps].

    In 16 bits greedy tokens of two kernels part at the first near tie and never meet again; fed the same tokens, their
    logits can be compared.
    """
    steps = CachedSteps(model, prompt, max(tokens.shape[1], WARM_STEPS + 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_STEPS):
            steps.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps.step()
    steps.rewind()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(tokens.shape[1]):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end) / tokens.shape[1], steps.fed(tokens, graph.replay)


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
