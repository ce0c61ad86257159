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

from qbench.latency import Ceilings, Timing

Call = Callable[[], Any]


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
