"""Grid: which integers one tensor may take, and which elements share a scale.

The grid is always unsigned, 0 … qmax. qmax is 2^bits − 1, or 2^bits on a bit-balanced grid, whose one more level
makes the number of levels odd (W2* of ABQ-LLM: five levels instead of four). A symmetric grid puts its zero at
2^(bits−1) instead of storing one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qbench.errors import UnsupportedSchemeError
from qbench.quant import quinary


@dataclass(frozen=True)
class Grid:
    """Integer grid of one tensor.

    Attributes:
        bits: 2 to 8; 16 means the tensor is left alone and no function here is called.
        symmetric: Scale from max(|low|, |high|), zero point fixed at 2^(bits−1).
        group_size: Consecutive elements of the last dimension sharing a scale; None = all of it.
        zero_in_range: Widen every range to contain 0. The published AffineQuant/OmniQuant form (False)
            uses the group's true extremes, whose zero point can leave the grid; GPTQ and every packed
            format need a zero inside. The two agree wherever a group has both signs.
        extra_level: Codes 0 … 2^bits instead of 0 … 2^bits − 1 ("bit balance" of ABQ-LLM); with a zero point only.
    """

    bits: int
    symmetric: bool = False
    group_size: int | None = None
    zero_in_range: bool = True
    extra_level: bool = False

    def __post_init__(self) -> None:
        assert not (self.extra_level and self.symmetric), "a bit-balanced grid has a zero point"

    @property
    def qmax(self) -> int:
        """Largest code; the smallest is 0."""
        return 2**self.bits - (0 if self.extra_level else 1)

    @property
    def mid(self) -> int:
        """Zero point of a symmetric grid."""
        return 2 ** (self.bits - 1)

    def split(self, x: Tensor) -> Tensor:
        """View [..., n] as [..., groups, group_size]."""
        size = self.group_size or x.shape[-1]
        return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)

    def n_groups(self, width: int) -> int:
        """Scales per row of a tensor whose last dimension is `width`."""
        return width // (self.group_size or width)

    def stored_bits(self, count: int) -> int:
        """Bits that `count` codes take when packed: `bits` each, and five-level codes as `quant.quinary` packs them."""
        if not self.extra_level:
            return count * self.bits
        assert self.bits == 2, "only five levels have a packed form"
        return 8 * quinary.packed_bytes(count)


def check_group_size(group_size: int | None, widths: Mapping[str, int]) -> None:
    """Refuse a group size that does not divide, naming every offending linear at once.

    Args:
        group_size: None passes: one scale per output channel.
        widths: Input width by linear name.

    Raises:
        UnsupportedSchemeError: Lists all linears whose input width is not a multiple.
    """
    if group_size is None:
        return
    bad = {name: width for name, width in widths.items() if width % group_size}
    if not bad:
        return
    divisors = [g for g in (16, 32, 64, 128, 256) if all(w % g == 0 for w in widths.values())]
    fits = (
        f"Group sizes that divide all of them: {', '.join(map(str, divisors))}"
        if divisors
        else "None of 16 to 256 fits"
    )
    raise UnsupportedSchemeError(
        f"group_size={group_size} does not divide the input width of "
        + ", ".join(f"{name} ({width})" for name, width in bad.items())
        + f". {fits}; without g… there is one scale per output channel."
    )
