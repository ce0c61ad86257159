"""The timing protocol with a clock and calls that are made up: no test asserts how long anything takes."""

from __future__ import annotations

import itertools
import weakref
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch

from qbench.evals import latency
from qbench.evals.latency import LoopedCalls, Protocol, TooSlowError, interleaved, summarize


class Clock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_a_loop_gives_the_time_of_one_call_and_lasts_as_long_as_asked() -> None:
    clock, used = Clock(), []

    def call(which: int) -> None:
        used.append(which)
        clock.work(0.0002)

    calls = [lambda i=i: call(i) for i in range(3)]
    passes = LoopedCalls(calls, Protocol(loop_s=1.0), clock)
    before = clock.now
    samples = passes()
    assert clock.now - before >= 1.0
    assert samples == pytest.approx([0.0002] * len(samples))
    assert passes.per_sample == 6  # two turns of three calls: about a millisecond
    counts = [used.count(i) for i in range(3)]
    assert max(counts) - min(counts) <= 1  # the copies are used in turn


def test_a_call_that_takes_too_long_is_not_measured() -> None:
    clock = Clock()
    with pytest.raises(TooSlowError, match="one call takes about 4000000 µs"):
        LoopedCalls([lambda: clock.work(4.0)] * 5, Protocol(limit_s=10.0), clock)


def test_candidates_are_measured_there_and_back() -> None:
    order: list[str] = []
    times = {"a": iter([1e-6, 3e-6]), "b": iter([5e-6, 5e-6]), "c": iter([2e-6, 2e-6])}

    def one_pass(name: str) -> list[float]:
        order.append(name)
        return [next(times[name])] * 4

    found = interleaved({name: lambda name=name: one_pass(name) for name in times})
    assert order == ["a", "b", "c", "c", "b", "a"]
    assert (found["a"].first_us, found["a"].last_us) == pytest.approx((1, 3))
    assert found["a"].spread == pytest.approx(2 / 2)
    assert found["b"].median_us == pytest.approx(5)
    assert found["b"].spread == 0


def test_summary_of_samples() -> None:
    timing = summarize([1e-6, 2e-6, 3e-6], [4e-6, 5e-6, 6e-6, 7e-6], calls_per_sample=20)
    assert (timing.median_us, timing.n_samples, timing.calls_per_sample) == (pytest.approx(4), 7, 20)
    assert timing.iqr_us == pytest.approx(4)  # quartiles of 1…7 are 2 and 6


@pytest.mark.parametrize(
    ("weight", "cache", "copies"),
    [(33_554_432, 62_914_560, 10), (10, 10**9, 256), (10**9, 62_914_560, 1)],
    ids=["16-bit 4096×4096 on 60 MB", "capped", "one is enough"],
)
def test_copies_exceed_the_cache_five_times(weight: int, cache: int, copies: int) -> None:
    assert Protocol().copies(weight, cache) == copies


def test_ceilings_of_a_cpu_have_every_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(1)
    monkeypatch.setattr(latency, "_median_s", lambda calls, device, protocol: next(ticks) * 0.5)
    found = latency.measure_ceilings("cpu", Protocol())
    assert found.read_bytes_per_s == 2**28 / 0.5
    assert found.flops == {
        "bfloat16": 2 * 1024**3 / 1.0, "float32": 2 * 1024**3 / 1.5, "int8": 2 * 1024**3 / 2.0
    }  # fmt: skip


def test_cache_of_this_machine_is_plausible() -> None:
    assert 2**18 <= latency.cache_bytes("cpu") <= 2**31


def test_graphed_calls_keep_what_their_graph_reads_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", MagicMock())
    monkeypatch.setattr(latency.GraphedCalls, "_replays", lambda self, count: [1e-6] * count)
    operand = torch.zeros(3)
    held = weakref.ref(operand)
    passes = latency.GraphedCalls([partial(torch.sum, operand)], Protocol())
    del operand
    assert held() is not None
    del passes
    assert held() is None


@pytest.mark.gpu
def test_graphed_calls_use_every_copy_equally() -> None:
    counters = [torch.zeros(1, device="cuda") for _ in range(7)]
    passes = latency.GraphedCalls([lambda c=c: c.add_(1) for c in counters], Protocol())
    assert passes.per_sample == 21
    before = [c.item() for c in counters]
    samples = passes()
    assert len(samples) == 15
    assert [c.item() - b for c, b in zip(counters, before, strict=True)] == [15 * 3] * 7


@pytest.mark.gpu
def test_a_graph_outlives_a_capture_after_it() -> None:
    before, after = (torch.full((4096, 4096), value, device="cuda") for value in (1.0, 0.0))
    sources = [before.clone() for _ in range(4)]
    passes = latency.GraphedCalls([lambda s=s: torch.add(s, 1, out=after) for s in sources], Protocol())
    del sources
    held = torch.cuda.memory_allocated()
    latency.GraphedCalls([lambda: before.sum()], Protocol())  # empties the allocator's cache
    passes()
    torch.cuda.synchronize()
    assert after.eq(2).all()
    del passes
    assert torch.cuda.memory_allocated() <= held - 4 * before.nbytes
