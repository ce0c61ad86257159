"""CUDA backends against the exact product, on a GPU and with their packages; skipped elsewhere, with the reason."""

from __future__ import annotations

import pytest
import torch

from qbench.bench import random_weight
from qbench.deploy.backends import BACKENDS, gate
from qbench.deploy.backends.layer import build
from qbench.evals.latency import Protocol, interleaved, repeatable
from qbench.scheme import Scheme

SHAPE = (1024, 512)
SERVED = {
    "reference": ["W3A16g64", "W4A4"],
    "torch": ["W4A16g128", "W3A16g32", "W2A16g64", "W4A16g64-sym", "W8A8", "W4A8", "W6A6", "W4A4-sym"],
    "humming": [
        "W4A16g128", "W3A16g128", "W2A16g64", "W4A16", "W4A16g128-sym", "W8A8-sym", "W4A8", "W3A8-sym", "W2A8",
        "W6A6", "W4A4",
    ],
    "gemlite": ["W4A16g128", "W2A16g64", "W8A16"],
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 256])
@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, schemes in SERVED.items() for text in schemes]
)
def test_kernel_computes_the_exact_product(name: str, text: str, tokens: int) -> None:
    backend, scheme = BACKENDS.load(name)(), Scheme.parse(text)
    if (reason := backend.unavailable("cuda")) is not None:
        pytest.skip(reason)
    weight = random_weight(SHAPE, scheme, "cuda", torch.Generator("cuda").manual_seed(0))
    layer = build(backend, weight, scheme.abits)
    layer.warm(tokens)
    x = torch.randn(tokens, SHAPE[1], device="cuda").to(layer.request.dtype)
    result = gate.check(layer, weight, x)
    assert result.passed, str(result)


@pytest.mark.gpu
def test_a_layer_is_timed_by_graphs() -> None:
    scheme = Scheme.parse("W4A16g128")
    weight = random_weight(SHAPE, scheme, "cuda", torch.Generator("cuda").manual_seed(0))
    layers = [build(BACKENDS.load("torch")(), weight) for _ in range(3)]
    x = torch.randn(4, SHAPE[1], device="cuda").bfloat16()
    passes = repeatable([lambda layer=layer: layer(x) for layer in layers], "cuda", Protocol())
    timing = interleaved({"": passes})[""]
    assert (timing.n_samples, timing.calls_per_sample) == (30, 21)
    assert timing.median_us > 0
