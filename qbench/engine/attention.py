"""Attention with quantized operands, through transformers' own registries.

The function quantizes q, k and v where a block asks for it and hands over to transformers' SDPA. Masks must be
registered under the same name: without that, transformers passes no mask and causality is silently lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qbench.quant.fake import fake_quantize
from qbench.quant.grid import Grid

NAME = "qbench"
ATTRIBUTE = "qbench_operands"


@dataclass(frozen=True)
class Operands:
    """Grids of the attention operands after rotary embedding; None leaves one untouched.

    Attributes:
        query: Grid of q.
        key_value: Grid of k and v.
        granularity: `per_head`: one range per token and head; `per_token`: one per token over all heads.
    """

    query: Grid | None
    key_value: Grid | None
    granularity: Literal["per_head", "per_token"] = "per_head"

    def quantize(self, x: Tensor, grid: Grid | None) -> Tensor:
        """Fake-quantize [batch, heads, tokens, head_dim]."""
        if grid is None:
            return x
        if self.granularity == "per_head":
            return fake_quantize(x, grid)
        batch, heads, tokens, width = x.shape
        rows = x.transpose(1, 2).reshape(batch, tokens, heads * width)
        return fake_quantize(rows, grid).reshape(batch, tokens, heads, width).transpose(1, 2)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA over operands fake-quantized as the block's `Operands` say, if it has any."""
    operands: Operands | None = getattr(module, ATTRIBUTE, None)
    if operands is not None:
        query = operands.quantize(query, operands.query)
        key = operands.quantize(key, operands.key_value)
        value = operands.quantize(value, operands.key_value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def register() -> str:
    """Make the implementation known to transformers; returns its name for `set_attn_implementation`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
