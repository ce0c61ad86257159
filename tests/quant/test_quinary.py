"""Five-level codes survive packing, and take the bytes that effective bits count."""

from __future__ import annotations

import pytest
import torch

from qbench.quant import quinary


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 23), (7, 24), (16, 64), (0, 4)], ids=str)
def test_what_is_packed_comes_back(shape: tuple[int, int]) -> None:
    codes = torch.randint(5, shape, dtype=torch.uint8)
    packed = quinary.pack(codes)
    assert packed.dtype == torch.uint8 and packed.numel() == quinary.packed_bytes(codes.numel())
    assert torch.equal(quinary.unpack(packed, shape), codes)


def test_the_first_bytes_by_hand() -> None:
    """1 + 2·5 + 3·25 = 86, then 4 + 0·5 + 1·25 = 29, as 7-bit numbers from the lowest bit up."""
    packed = quinary.pack(torch.tensor([1, 2, 3, 4, 0, 1]))
    assert int.from_bytes(bytes(packed.tolist()), "little") == 86 + (29 << 7)


def test_the_largest_codes_fill_no_bit_beyond_the_unit() -> None:
    packed = quinary.pack(torch.full((24,), 4))
    assert int.from_bytes(bytes(packed.tolist()), "little") == sum(124 << (7 * i) for i in range(8)) < 2**56


@pytest.mark.parametrize(("count", "size"), [(0, 0), (1, 7), (24, 7), (25, 14), (4096 * 4096, 4893357)])
def test_seven_bytes_hold_twenty_four_codes(count: int, size: int) -> None:
    assert quinary.packed_bytes(count) == size
