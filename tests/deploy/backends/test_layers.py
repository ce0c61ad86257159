"""Every backend layer that runs on a CPU against a naive float64 product, over the schemes it declares."""

from __future__ import annotations

import math

import pytest
import torch

from qbench.deploy.backends import BACKENDS, gate
from qbench.deploy.backends.layer import Request, build
from qbench.errors import UnsupportedSchemeError
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme

OUT, IN, TOKENS = 48, 128, 6
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float64: 1e-12}


def weight(scheme: Scheme, out: int = OUT, width: int = IN) -> QuantizedWeight:
    """Random codes, scales and zero points: nothing is at a convenient value."""
    generator = torch.Generator().manual_seed(scheme.wbits)
    groups = width // (scheme.group_size or width)
    codes = torch.randint(0, 2**scheme.wbits, (out, width), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(out, groups, generator=generator) + 0.5).half() / 2**scheme.wbits
    zero = torch.randint(0, 2**scheme.wbits, (out, groups), generator=generator, dtype=torch.int16)
    if scheme.symmetric:
        zero.fill_(2 ** (scheme.wbits - 1))
    return QuantizedWeight(codes, scale, zero, Grid(scheme.wbits, scheme.symmetric, scheme.group_size))


def naive(x: torch.Tensor, w: QuantizedWeight, abits: int) -> torch.Tensor:
    """Element by element, from the definition: quantize each token over its own range that contains 0, sum."""
    rows = x.double().tolist()
    if abits < 16:
        rows = [quantize_token(row, abits) for row in rows]
    size = w.codes.shape[1] // w.scale.shape[1]
    codes, scale, zero = w.codes.tolist(), w.scale.double().tolist(), w.zero_point.tolist()
    return torch.tensor(
        [
            [
                math.fsum(
                    value * scale[j][i // size] * (codes[j][i] - zero[j][i // size])
                    for i, value in enumerate(row)
                )
                for j in range(len(codes))
            ]
            for row in rows
        ],
        dtype=torch.float64,
    )


def quantize_token(row: list[float], bits: int) -> list[float]:
    low, high = min(*row, 0.0), max(*row, 0.0)
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    return [scale * (min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) for v in row]


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


SERVED = {
    "reference": [
        "W4A16g32", "W3A16g64", "W2A16", "W8A8-sym", "W6A6", "W4A4g32", "W5A16g32-sym", "W2A8",
    ],
    "torch": [
        "W4A16g32", "W4A16g64-sym", "W4A16g128", "W4A16", "W3A16g32", "W2A16g64", "W2A16-sym",
        "W8A16", "W8A16-sym", "W5A16", "W6A16", "W7A16-sym",
        "W8A8", "W8A8-sym", "W4A8", "W3A8", "W2A8", "W6A6", "W4A4", "W4A4-sym", "W7A5",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "text"), [(name, text) for name, schemes in SERVED.items() for text in schemes]
)
def test_layer_computes_the_naive_product(backend: str, text: str) -> None:
    scheme = Scheme.parse(text)
    w = weight(scheme)
    # not centred: the zero point of the input matters
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1)) + 0.7
    exact = naive(x, w, scheme.abits)
    layer = build(BACKENDS.load(backend)(), w, scheme.abits, torch.float32)
    assert relative(layer(x), exact) < ROUNDING[torch.float32]


@pytest.mark.parametrize("text", ["W4A16g32", "W3A16g32", "W2A16g64", "W8A16", "W8A8", "W4A4"])
def test_layer_in_bfloat16_passes_its_gate(text: str) -> None:
    scheme = Scheme.parse(text)
    w = weight(scheme)
    layer = build(BACKENDS.load("torch")(), w, scheme.abits)
    assert layer.request.dtype == torch.bfloat16
    x = torch.randn(TOKENS, IN).bfloat16()
    result = gate.check(layer, w, x)
    assert result.passed, str(result)
    assert result.error < ROUNDING[torch.bfloat16]


def test_reference_is_exact_in_float64() -> None:
    w = weight(Scheme.parse("W3A16g32"))
    x = torch.randn(TOKENS, IN, dtype=torch.float64)
    layer = build(BACKENDS.load("reference")(), w, 16, torch.float64)
    assert relative(layer(x), naive(x, w, 16)) < ROUNDING[torch.float64]


@pytest.mark.parametrize("text", ["W4A16g32", "W8A16", "W4A4"])
def test_bias_and_leading_dimensions(text: str) -> None:
    scheme = Scheme.parse(text)
    w, bias = weight(scheme), torch.randn(OUT)
    x = torch.randn(2, 3, IN)
    layer = build(BACKENDS.load("torch")(), w, scheme.abits, torch.float32, bias)
    y = layer(x)
    assert y.shape == (2, 3, OUT)
    exact = naive(x.reshape(6, IN), w, scheme.abits) + bias.double()
    assert relative(y.reshape(6, OUT), exact) < ROUNDING[torch.float32]
    assert gate.check(layer, w, x.reshape(6, IN)).passed


REFUSED = [
    ("torch", "W4A16g16", "groups of 32, 64, 128 or 256, not 16"),
    ("torch", "W8A16g32", "one scale per output channel, not groups of 32"),
    ("torch", "W4A8g32", "groups of 32 would need a sum apart"),
    ("humming", "W4A16g32", "CUDA devices only"),
    ("gemlite", "W4A16g32", "CUDA devices only"),
]


@pytest.mark.parametrize(("backend", "text", "words"), REFUSED, ids=[f"{b} {t}" for b, t, _ in REFUSED])
def test_what_a_backend_cannot_do_is_refused_in_words(backend: str, text: str, words: str) -> None:
    scheme = Scheme.parse(text)
    with pytest.raises(UnsupportedSchemeError, match=words):
        build(BACKENDS.load(backend)(), weight(scheme), scheme.abits)


def test_output_width_of_int4_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedSchemeError, match="multiples of 16 outputs"):
        build(BACKENDS.load("torch")(), weight(Scheme.parse("W4A16g32"), out=40))


def test_zero_points_outside_the_grid_are_refused() -> None:
    w = weight(Scheme.parse("W4A16g32"))
    w.zero_point[3, 1] = -2
    with pytest.raises(UnsupportedSchemeError, match="zero points reach -2…15"):
        build(BACKENDS.load("torch")(), w)


def _request(text: str, out: int = 4096, width: int = 4096, dtype: torch.dtype = torch.float16) -> Request:
    scheme = Scheme.parse(text)
    grid = Grid(scheme.wbits, scheme.symmetric, scheme.group_size)
    return Request(out, width, grid, scheme.abits, "cuda", dtype)


CUDA_CAPABILITIES = [
    ("humming", "W3A16g128", None),
    ("humming", "W8A8-sym", None),
    ("humming", "W2A8", None),
    ("humming", "W6A6", None),
    ("humming", "W4A8g128", "rounds group scales"),
    ("humming", "W8A8", "no zero point"),
    ("gemlite", "W4A16g128", None),
    ("gemlite", "W3A16g128", "2, 4 or 8 bits, not 3"),
    ("gemlite", "W4A8", "16-bit inputs only"),
    ("torch", "W8A8-sym", None),
    ("torch", "W8A16", "no W8A16 kernel for CUDA"),
    ("torch", "W4A16g128", "bfloat16 only"),
]


@pytest.mark.parametrize(
    ("backend", "text", "words"), CUDA_CAPABILITIES, ids=[f"{b} {t}" for b, t, _ in CUDA_CAPABILITIES]
)
def test_declared_cuda_capabilities(backend: str, text: str, words: str | None) -> None:
    refusal = BACKENDS.load(backend)().refusal(_request(text))
    assert refusal is None if words is None else words in (refusal or "")


def test_tiles_of_humming_are_checked() -> None:
    assert "multiples of 64 inputs and 64 outputs" in (
        BACKENDS.load("humming")().refusal(_request("W4A16", 4096, 96)) or ""
    )


def test_arithmetic_names_what_runs() -> None:
    native = BACKENDS.load("torch")()
    assert "3-bit codes stored in 4 bits" in build(native, weight(Scheme.parse("W3A16g32"))).arithmetic
    text = build(native, weight(Scheme.parse("W4A4")), 4).arithmetic
    assert text.startswith("int8 arithmetic: 4-bit weights and 4-bit inputs")


def test_packed_bytes_counts_every_buffer() -> None:
    scheme = Scheme.parse("W4A16g32")
    layer = build(BACKENDS.load("torch")(), weight(scheme), bias=torch.zeros(OUT))
    codes, pairs = OUT * IN // 2, IN // 32 * OUT * 2 * 2  # half a byte per code; scale and offset in bfloat16
    assert layer.packed_bytes == codes + pairs


@pytest.mark.parametrize("fault", ["zero point", "group order", "one channel", "transposed", "not finite"])
def test_the_gate_catches_wrong_kernels(fault: str) -> None:
    w = weight(Scheme.parse("W4A16g32"))
    layer = build(BACKENDS.load("torch")(), w, 16, torch.float32)
    x = torch.randn(32, IN)
    assert gate.check(layer, w, x).passed
    zero, scale = w.zero_point.clone(), w.scale.clone()
    codes = w.codes.clone()
    if fault == "zero point":
        zero += 1
    elif fault == "group order":
        scale = scale.flip(1)
    elif fault == "one channel":
        codes[7] = codes[7].flip(0)
    elif fault == "transposed":
        codes = codes.flip(0)
    elif fault == "not finite":
        scale[0, 0] = float("nan")
    wrong = build(
        BACKENDS.load("torch")(), QuantizedWeight(codes, scale, zero.clamp(0, 15), w.grid), 16, torch.float32
    )
    assert not gate.check(wrong, w, x).passed


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("humming", "gemlite"):
        assert 'install "qbench[kernels]"' in (BACKENDS.load(name)().unavailable("cuda") or "")


@pytest.mark.parametrize("abits", [16, 8])
def test_a_bit_balanced_grid_keeps_its_fifth_level(abits: int) -> None:
    """ABQ-LLM's W2*: codes 0 … 4 do not fit 2 bits, and no container may cut the last one off."""
    codes = torch.arange(OUT * IN).reshape(OUT, IN).remainder(5).to(torch.uint8)
    scale, zero = torch.full((OUT, 1), 0.25).half(), torch.full((OUT, 1), 2, dtype=torch.int16)
    w = QuantizedWeight(codes, scale, zero, Grid(2, extra_level=True))
    x = torch.randn(TOKENS, IN)
    layer = build(BACKENDS.load("torch")(), w, abits, torch.float32)
    assert relative(layer(x), naive(x, w, abits)) < ROUNDING[torch.float32]
    assert layer.request.code_bits == 3


def test_one_wrong_channel_of_thousands_is_caught() -> None:
    """Its share of the overall norm, 0.3/64, is within the limit."""
    exact = torch.randn(32, 4096, dtype=torch.float64)
    y = exact.clone()
    y[:, 99] *= 1.3
    result = gate.compare(y, exact)
    assert result.error < gate.LIMIT < result.worst_channel
    assert not result.passed
