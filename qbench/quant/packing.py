"""Codes of a few bits ↔ packed int32 words, in the layouts of the formats that other programs read.

All three formats (GPTQ, AWQ, compressed-tensors) store one dense little-endian bit stream along some dimension: code i
occupies bits i·b … i·b + b − 1, counted from the lowest bit of the first word, and a code of 3, 5, 6 or 7 bits may
straddle two words. GPTQ's 3-bit layout, written in its reference as three special cases per 32 codes, is this stream.
AWQ interleaves each eight 4-bit codes first. Nothing here knows what the codes mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

WORD = 32
# Position of each of eight neighbouring codes in an AWQ word, lowest bits first (casper-hansen/AutoAWQ, gemm.py).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def n_words(n_codes: int, bits: int) -> int:
    """Words that a stream of codes fills, the last one perhaps in part."""
    return -(-n_codes * bits // WORD)


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack codes into a dense bit stream along one dimension.

    Args:
        codes: Integers 0 … 2^bits − 1 of any dtype and shape.
        bits: 1 to 8.
        dim: Dimension along which the stream runs; its size becomes `n_words`.

    Returns:
        int32, contiguous; unused bits of a last word are 0.
    """
    rows = codes.movedim(dim, -1)
    n_codes = rows.shape[-1]
    per_block, words_per_block = _block(bits)
    padded = functional.pad(rows.to(torch.int64), (0, -n_codes % per_block))
    blocks = padded.unflatten(-1, (-1, per_block))  # [..., blocks, codes of a block]
    words = torch.zeros((*blocks.shape[:-1], words_per_block), dtype=torch.int64, device=codes.device)
    for i in range(per_block):
        word, offset = divmod(i * bits, WORD)
        words[..., word] |= blocks[..., i] << offset
        if offset + bits > WORD:
            words[..., word + 1] |= blocks[..., i] >> (WORD - offset)
    stream = (words & 0xFFFFFFFF).flatten(-2)[..., : n_words(n_codes, bits)]
    return _as_int32(stream).movedim(-1, dim).contiguous()


def unpack(words: Tensor, bits: int, n_codes: int, dim: int = -1) -> Tensor:
    """The inverse of `pack`.

    Args:
        words: int32, as packed along `dim`.
        bits: 1 to 8.
        n_codes: Codes along that dimension.
        dim: As for `pack`.

    Returns:
        uint8, contiguous.

    Raises:
        ValueError: If so many codes do not fill so many words.
    """
    rows = words.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    if rows.shape[-1] != n_words(n_codes, bits):
        raise ValueError(
            f"{n_codes} codes of {bits} bits fill {n_words(n_codes, bits)} words, not {rows.shape[-1]}"
        )
    per_block, words_per_block = _block(bits)
    blocks = functional.pad(rows, (0, -rows.shape[-1] % words_per_block)).unflatten(-1, (-1, words_per_block))
    codes = torch.empty((*blocks.shape[:-1], per_block), dtype=torch.uint8, device=words.device)
    for i in range(per_block):
        word, offset = divmod(i * bits, WORD)
        value = blocks[..., word] >> offset
        if offset + bits > WORD:
            value = value | blocks[..., word + 1] << (WORD - offset)
        codes[..., i] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :n_codes].movedim(-1, dim).contiguous()


def pack_awq(codes: Tensor, dim: int = -1) -> Tensor:
    """Pack 4-bit codes in AWQ's interleaved order; the size of `dim` must be a multiple of 8."""
    return pack(_reordered(codes, dim, AWQ_ORDER), 4, dim)


def unpack_awq(words: Tensor, dim: int = -1) -> Tensor:
    """The inverse of `pack_awq`: uint8, eight codes per word."""
    inverse = tuple(AWQ_ORDER.index(i) for i in range(len(AWQ_ORDER)))
    return _reordered(unpack(words, 4, 8 * words.shape[dim], dim), dim, inverse)


def _block(bits: int) -> tuple[int, int]:
    """Fewest codes that fill whole words, and how many words those are."""
    shared = math.gcd(bits, WORD)
    return WORD // shared, bits // shared


def _as_int32(words: Tensor) -> Tensor:
    """Words 0 … 2^32 − 1 as the int32 of the same bits."""
    return (words - ((words >> 31) << 32)).to(torch.int32)


def _reordered(codes: Tensor, dim: int, order: tuple[int, ...]) -> Tensor:
    """Rearrange each eight neighbours: place i gets the one at order[i]."""
    eights = codes.movedim(dim, -1).unflatten(-1, (-1, len(order)))
    return eights[..., list(order)].flatten(-2).movedim(-1, dim).contiguous()
