"""Packed words against a loop that sets one bit at a time, and against what the formats' own packages make of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.quant import packing


def naive_stream(codes: list[int], bits: int) -> list[int]:
    """Bit by bit: code i, lowest bit first, then code i + 1."""
    words = [0] * -(-len(codes) * bits // 32)
    position = 0
    for code in codes:
        for bit in range(bits):
            words[position // 32] |= ((code >> bit) & 1) << (position % 32)
            position += 1
    return [word - 2**32 if word >= 2**31 else word for word in words]


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits = draw(st.integers(1, 8))
    rows, n_codes = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    values = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * n_codes, max_size=rows * n_codes))
    return bits, torch.tensor(values, dtype=torch.uint8).reshape(rows, n_codes)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(streams())
def test_words_are_those_of_a_bit_loop_and_unpack_to_the_codes(stream) -> None:
    bits, codes = stream
    words = packing.pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [naive_stream(row, bits) for row in codes.tolist()]
    assert torch.equal(packing.unpack(words, bits, codes.shape[1]), codes)
    down = packing.pack(codes.T, bits, dim=0)
    assert torch.equal(down, words.T)
    assert torch.equal(packing.unpack(down, bits, codes.shape[1], dim=0), codes.T)


def test_three_bits_are_packed_as_the_gptq_reference_packs_them() -> None:
    """IST-DASLab/gptq, quant.py, `Quant3Linear.pack`: 32 values in three words, two of them split."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(8, (64,), generator=generator).tolist()
    words = []
    for start in range(0, len(values), 32):
        v = values[start : start + 32]
        one = sum(v[j] << (3 * j) for j in range(10)) | (v[10] & 0x3) << 30
        two = (v[10] >> 2 & 1) | sum(v[11 + j] << (3 * j + 1) for j in range(10)) | (v[21] & 0x1) << 31
        three = (v[21] >> 1 & 0x3) | sum(v[22 + j] << (3 * j + 2) for j in range(10))
        words += [one, two, three]
    found = packing.pack(torch.tensor(values, dtype=torch.uint8), 3)
    assert [word & 0xFFFFFFFF for word in found.tolist()] == words


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_survives_in_every_place(bits) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(32)[: 32 * 2**bits].roll(7)
    assert torch.equal(packing.unpack(packing.pack(codes, bits), bits, len(codes)), codes)


def test_awq_words_hold_eight_codes_in_their_interleaved_order() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    words = packing.pack_awq(codes)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in words[0].tolist()] == ["75316420", "fdb9eca8"]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**20))
def test_awq_round_trip(rows, eights, seed) -> None:
    codes = torch.randint(
        16, (rows, 8 * eights), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(packing.unpack_awq(packing.pack_awq(codes)), codes)
    assert torch.equal(packing.unpack_awq(packing.pack_awq(codes.T, 0), 0), codes.T)


@pytest.mark.parametrize("bits", range(1, 9))
def test_compressed_tensors_packs_the_same_words(bits) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (5, 45), dtype=torch.uint8, generator=generator)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packing.pack(codes, bits), helpers.pack_to_int32(signed, bits))
    assert torch.equal(packing.pack(codes, bits, 0), helpers.pack_to_int32(signed, bits, packed_dim=0))
