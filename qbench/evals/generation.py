"""Greedy generation with a whole model, timed: the prompt at once, then token by token.

What `latency` times of a layer leaves out attention, norms and the program around them. This is the program as it is, a
forward pass of transformers per token, and on a GPU the same pass replayed as one CUDA graph, which shows what the
kernels take without Python between them. A graph that computes something else than the program has no time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qbench.errors import kind_and_first_line

GRAPH_LIMIT = 0.1  # of the logits' spread
WARM_STEPS = 2  # before a capture


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
            seconds, replayed, called = _graphed_step(model, prompt, torch.cat(fed, 1))
            deviation, agreeing = compare_logits(replayed, called)
            other, _ = compare_logits(called, torch.cat(given, 1))
            found = f"graphed steps, fed the same tokens: logits {100 * deviation:.2g}% off, {agreeing}"
            within = deviation <= GRAPH_LIMIT
            notes.append(
                ("" if within else "no graphed time, they compute something else: ")
                + f"{found} ({100 * other:.2g}% between a cache of fixed size and one that grows)"
            )
            graphed = seconds if within else None
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


def _graphed_step(
    model: Any, prompt: torch.Tensor, tokens: torch.Tensor
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Seconds of one replayed step, and the logits of steps fed the tokens [batch, steps], replayed and called.

    In 16 bits greedy tokens of two kernels part at the first near tie and never meet again; fed the same tokens, their
    logits can be compared. Both use the cache of fixed size: the attention kernel of another cache rounds differently,
    and where inputs are quantized the least difference becomes one of the size of the quantization error.
    """
    steps = CachedSteps(model, prompt, max(tokens.shape[1], WARM_STEPS + 1))
    called = steps.fed(tokens, steps.step)
    steps.rewind()
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
    seconds = 1e-3 * start.elapsed_time(end) / tokens.shape[1]
    return seconds, steps.fed(tokens, graph.replay), called


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
