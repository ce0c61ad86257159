"""Five-level codes in 7 bits per three: how a bit-balanced two-bit grid (W2*) is stored.

Five levels carry log₂ 5 = 2.32 bits. Three codes are one number below 5³ = 125 < 2⁷, so eight such numbers fill seven
bytes: 24 codes in 56 bits, 2.333 bits per code, 0.5 % above the bound. The bit planes in which ABQ-LLM's kernels
compute take three bits; they can be made from this form when weights are loaded. A packed two-bit format cannot hold
these codes at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES, BYTES = 24, 7  # of one unit


def packed_bytes(count: int) -> int:
    """Bytes that `count` codes take; the last unit is filled up."""
    return -(-count // CODES) * BYTES


def pack(codes: Tensor) -> Tensor:
    """Codes 0 … 4 of any shape, in row-major order, as uint8 bytes."""
    flat = codes.reshape(-1).long()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % CODES)).reshape(-1, CODES // 3, 3)
    triples = (padded * padded.new_tensor([1, 5, 25])).sum(-1)  # [units, 8], below 125
    word = (triples << (7 * torch.arange(CODES // 3, device=flat.device))).sum(-1)  # 56 bits of each int64
    return (word[:, None] >> (8 * torch.arange(BYTES, device=flat.device)) & 255).to(torch.uint8).reshape(-1)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The uint8 codes that `pack` was given."""
    units = packed.reshape(-1, BYTES).long()
    word = (units << (8 * torch.arange(BYTES, device=packed.device))).sum(-1)
    triples = word[:, None] >> (7 * torch.arange(CODES // 3, device=packed.device)) & 127
    digits = triples[..., None] // triples.new_tensor([1, 5, 25]) % 5
    return digits.reshape(-1)[: torch.Size(shape).numel()].reshape(shape).to(torch.uint8)
