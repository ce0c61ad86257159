"""Scheme: which numbers a model is quantized to, written `W4A16g128`.

Nothing here says *how* the integers are found (that is a method's business) or where the work runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qbench.errors import ConfigError

_PATTERN = re.compile(
    r"^w(?P<wbits>\d+)-?a(?P<abits>\d+)(?:-?kv(?P<kvbits>\d+))?(?:-?g(?P<group>\d+))?(?P<sym>-?sym)?$",
    re.IGNORECASE,
)
ALLOWED_BITS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True, order=True)
class Scheme:
    """Bit widths and granularity of one quantized model.

    Attributes:
        wbits: Bits of every linear weight inside the blocks; 16 leaves weights untouched.
        abits: Bits of the input of every such linear and of the attention operands q, k, v,
            quantized per token at run time; 16 leaves them untouched.
        kvbits: Bits of k and v where they differ from `abits` (`W4A8KV4`); None follows `abits`; 16 leaves q alone too.
        group_size: Consecutive input channels that share a scale; None means one per output channel.
        symmetric: Weight grid centred on zero, without a stored zero point.
    """

    wbits: int
    abits: int = 16
    kvbits: int | None = None
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        for field in ("wbits", "abits", "kvbits"):
            bits = getattr(self, field)
            if bits is None and field == "kvbits":
                continue
            if bits not in ALLOWED_BITS:
                raise ConfigError(
                    f"{field}={bits} is not supported. Choose 2 to 8, or 16 to leave the tensor untouched."
                )
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(
                f"group_size={self.group_size} is not positive. Leave it out for one scale per output channel."
            )

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read `W4A16g128`, `w4a16-g128`, `W4A4KV4` or `W8A8-sym`.

        Raises:
            ConfigError: If the text is not a scheme or a bit width is not supported.
        """
        match = _PATTERN.match(text.strip())
        if match is None:
            raise ConfigError(
                f"Cannot read scheme {text!r}. Write W<bits>A<bits>[KV<bits>][g<size>][-sym], "
                "for example W4A16g128, W4A4 or W8A8-sym."
            )
        group = int(match["group"]) if match["group"] else None
        return cls(
            wbits=int(match["wbits"]),
            abits=int(match["abits"]),
            kvbits=int(match["kvbits"]) if match["kvbits"] else None,
            group_size=group or None,
            symmetric=match["sym"] is not None,
        )

    def __str__(self) -> str:
        text = f"W{self.wbits}A{self.abits}"
        if self.kvbits is not None:
            text += f"KV{self.kvbits}"
        if self.group_size is not None:
            text += f"g{self.group_size}"
        return text + ("-sym" if self.symmetric else "")

    @property
    def attention_bits(self) -> tuple[int, int]:
        """Bits of (q, k-and-v) as the attention product sees them; with KV16 it is a 16-bit product, q included."""
        if self.kvbits == 16:
            return 16, 16
        return self.abits, self.abits if self.kvbits is None else self.kvbits

    @property
    def is_identity(self) -> bool:
        """True when nothing at all is quantized."""
        return self.wbits == 16 and self.abits == 16 and self.kvbits in (None, 16)
