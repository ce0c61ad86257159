"""Attention with quantized operands, through transformers' own registries.

The function quantizes q, k and v where a block asks for it and hands over to transformers' SDPA. Masks must be
registered under the same name: without that, transformers passes no mask and causality is silently lost.

Where a loss compares attention maps (ABQ-LLM), a block is asked to record them: then the probabilities are computed
explicitly, in float32, and the same probabilities give the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qbench.engine.product import product_dtype
from qbench.quant.fake import bound_by_operations, fake_quantize
from qbench.quant.grid import Grid

NAME = "qbench"
ATTRIBUTE = "qbench_operands"
MAPS = "qbench_maps"


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

    def quantize(
        self, query: Tensor, key: Tensor, value: Tensor, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fake-quantize operands [batch, heads, tokens, head_dim]; small ones on a CPU all three in one call.

        Args:
            query: After rotary embedding, which may have widened it.
            key: Likewise.
            value: Heads as many as those of `key`.
            out_dtype: Of the results; default those of the operands.
        """
        operands = (query, key, value)
        grids = (self.query, self.key_value, self.key_value)
        if not self._in_one_call(operands):
            query, key, value = (
                self._quantize(x, grid, out_dtype) for x, grid in zip(operands, grids, strict=True)
            )
            return query, key, value
        together = self._quantize(torch.cat(operands, 1), self.query, out_dtype)
        query, key, value = together.split([x.shape[1] for x in operands], 1)
        return query, key, value

    def _in_one_call(self, operands: tuple[Tensor, ...]) -> bool:
        return (
            self.query is not None
            and self.query == self.key_value
            and self.granularity == "per_head"
            and len({(x.dtype, x.shape[2:]) for x in operands}) == 1
            and all(bound_by_operations(x) for x in operands)
        )

    def _quantize(self, x: Tensor, grid: Grid | None, out_dtype: torch.dtype | None) -> Tensor:
        if grid is None:
            return x
        rows = x.transpose(1, 2)  # as projections leave it in memory: [batch, tokens, heads, head_dim]
        if self.granularity == "per_token":
            return fake_quantize(rows.flatten(2), grid, out_dtype=out_dtype).view(rows.shape).transpose(1, 2)
        if rows.is_contiguous():
            return fake_quantize(rows, grid, out_dtype=out_dtype).transpose(1, 2)
        return fake_quantize(x, grid, out_dtype=out_dtype)


@dataclass
class Maps:
    """Where a block's attention leaves the probabilities of its latest forward pass.

    Attributes:
        latest: Mean over heads, [batch, queries, keys], float32; differentiable where the pass was.
    """

    latest: Tensor | None = None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA over operands fake-quantized as the block's `Operands` say; records maps where the block has `Maps`."""
    operands: Operands | None = getattr(module, ATTRIBUTE, None)
    maps: Maps | None = getattr(module, MAPS, None)
    if operands is not None:
        # maps are computed in float32, the product in autocast's type
        dtype = product_dtype(query) if maps is None else None
        query, key, value = operands.quantize(query, key, value, dtype)
    if maps is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    per_head = probabilities(query, key, attention_mask, kwargs.get("scaling"))
    maps.latest = per_head.mean(1)
    out = per_head.to(value.dtype) @ repeat_kv(value, query.shape[1] // value.shape[1])
    return out.transpose(1, 2).contiguous(), None


def probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention probabilities [batch, heads, queries, keys] in float32 or wider; no mask means causal, as in SDPA.

    Outside autocast: half-precision logits would move the maps by more than quantization does.
    """
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        logits = query.to(wide) @ repeat_kv(key, query.shape[1] // key.shape[1]).to(wide).mT * scale
        if mask is None:
            mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(-1)


def register() -> str:
    """Make the implementation known to transformers; returns its name for `set_attn_implementation`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
