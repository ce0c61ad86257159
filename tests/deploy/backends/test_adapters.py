"""What the adapters hand to packages that are not here: stand-ins unpack it by the packages' documented layout.

The stand-ins know no adapter code: they read codes, scales and zero points back from the tensors they are given, bit by
bit, and multiply in float64.
"""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from torch import nn

from qbench.deploy.backends import BACKENDS, gate
from qbench.deploy.backends.layer import Request
from qbench.scheme import Scheme
from tests.deploy.backends.test_layers import naive, weight


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Little-endian bit stream along the last dimension, 32 bits to a word: humming's `pack_weight`."""
    assert values.dtype == torch.int32 and values.is_contiguous() and values.shape[-1] % 32 == 0
    rows = []
    for row in values.reshape(-1, values.shape[-1]).tolist():
        stream = sum(value << (bits * i) for i, value in enumerate(row))
        words = [stream >> (32 * i) & 0xFFFFFFFF for i in range(len(row) * bits // 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32).reshape(*values.shape[:-1], -1)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    rows = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        rows.append([stream >> (bits * i) & (2**bits - 1) for i in range(len(row) * 32 // bits)])
    return torch.tensor(rows)


class HummingStandIn(nn.Module):
    """Offset-binary codes without zero points, (q − z)·s with them; z packed along the outputs."""

    def __init__(self, shape_n, shape_k, weight_config, input_config, torch_dtype):
        super().__init__()
        self.shape, self.config, self.dtype = (shape_n, shape_k), weight_config, torch_dtype
        self.humming_config = types.SimpleNamespace(to_str=lambda: "configuration")
        self.int8_input = input_config == {"dtype": "int8"}

    def cuda(self):
        return self

    def load_from_tensors(self, tensors):
        bits = int(self.config["dtype"].removeprefix("uint"))
        codes = unpack_words(tensors["weight"], bits)
        assert codes.shape == self.shape
        groups = self.shape[1] // (self.config["group_size"] or self.shape[1])
        scale = tensors["weight_scale"]
        assert scale.shape == (self.shape[0], groups) and scale.dtype == self.dtype
        zero = torch.full((self.shape[0], groups), 2 ** (bits - 1))
        if self.config["has_zero_point"]:
            packed = tensors["zero_point"]
            assert packed.shape == (self.shape[0] * bits // 32, groups) and packed.is_contiguous()
            zero = unpack_words(packed.t(), bits).t()
        else:
            assert "zero_point" not in tensors
        size = self.shape[1] // groups
        values = (codes - zero.repeat_interleave(size, 1)) * scale.double().repeat_interleave(size, 1)
        self.register_buffer("values", values)

    def transform(self):
        assert self.values is not None

    def forward(self, x, input_scale=None, tuning_config=None):
        assert json.loads(tuning_config) == {"block_shape": [len(x), 64]}
        assert (
            (x.dtype == torch.int8 and input_scale.shape == (len(x), 1))
            if self.int8_input
            else input_scale is None
        )
        y = x.double() @ self.values.t()
        return (y if input_scale is None else y * input_scale.double()).to(self.dtype)


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch) -> list:
    compiled: list = []

    class Kernel:
        @staticmethod
        def prepare_kernels(layer_config, compute_config, tuning_config):
            compiled.append((layer_config, compute_config, tuning_config))

    def choose(config, shape_m):
        assert config.to_str() == "configuration"
        return {"block_shape": (shape_m, 64)}

    def quantize(config, x):
        assert config.to_str() == "configuration"
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        return (x.float() / scale).round().to(torch.int8), scale

    modules = {
        "humming": {}, "humming.layer": {"HummingLayer": HummingStandIn}, "humming.ops": {"pack_weight": pack_words},
        "humming.forward": {"may_quant_input": quantize}, "humming.tune": {"get_heuristics_config": choose},
        "humming.kernel": {}, "humming.kernel.humming": {"HummingKernel": Kernel},
    }  # fmt: skip
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return compiled


@pytest.mark.parametrize(
    "text", ["W4A16g32", "W3A16g64", "W2A16g32-sym", "W8A16", "W8A8-sym", "W4A8", "W2A8", "W6A6", "W4A4-sym"]
)
def test_humming_is_given_what_it_reads(humming: list, text: str) -> None:
    scheme = Scheme.parse(text)
    w = weight(scheme, out=64)
    request = Request(64, 128, w.grid, scheme.abits, "cuda", torch.float16)
    backend = BACKENDS.load("humming")()
    assert backend.refusal(request) is None
    layer = backend.pack(w, request, None)
    x = torch.randn(5, 128).half()
    assert gate.check(layer, w, x).error < 1e-3
    exact = naive(layer.seen(x), w, 16)
    assert (layer(x).double() - exact).norm() / exact.norm() < 1e-3
    if scheme.abits < 16:
        assert "int8" in layer.arithmetic
    if text == "W4A4-sym":
        assert "no INT4 tensor core" in layer.arithmetic


def test_humming_compiles_the_kernel_of_the_tokens_at_hand(humming: list) -> None:
    w = weight(Scheme.parse("W4A16g32"), out=64)
    layer = BACKENDS.load("humming")().pack(w, Request(64, 128, w.grid, 16, "cuda", torch.float16), None)
    layer.warm(5)
    assert humming == [("configuration", None, '{"block_shape": [5, 64]}')]
    layer(torch.randn(3, 128).half())  # the stand-in refuses another number of tokens than its kernel's


def test_gemlite_is_given_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class StandIn:
        def __init__(self, device, dtype):
            self.dtype = dtype

        def from_weights(self, codes, scales, zeros, bits, group_size):
            assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
            size = group_size
            values = (
                codes.double() - zeros.double().repeat_interleave(size, 1)
            ) * scales.double().repeat_interleave(size, 1)
            linear = nn.Linear(1, 1)
            linear.forward = lambda x: (x.double() @ values.t()).to(self.dtype)
            return linear

    for name in ("gemlite", "gemlite.helper"):
        module = types.ModuleType(name)
        module.A16Wn = StandIn
        monkeypatch.setitem(sys.modules, name, module)
    for text in ("W4A16g32", "W2A16g64", "W8A16-sym"):
        scheme = Scheme.parse(text)
        w = weight(scheme)
        layer = BACKENDS.load("gemlite")().pack(w, Request.of(w, 16, torch.float16), None)
        assert gate.check(layer, w, torch.randn(4, 128).half()).error < 1e-3
