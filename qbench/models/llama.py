"""The LLaMA family: RMSNorm, rotary positions, gated MLP; LLaMA 1/2/3, Mistral, Qwen2 and Qwen3 differ in details.

Grouped-query attention, q/k/v biases (Qwen2) and q/k norms (Qwen3) are read off the model, not listed here.
"""

from __future__ import annotations

from dataclasses import replace

from qbench.models.base import Architecture

LLAMA = Architecture(
    name="llama",
    recipes="llama",
    published_granularity="per_head",  # the authors quantize q, k, v after the split into heads
    model_types=("llama",),
    summary="LLaMA 1, 2 and 3, with or without grouped-query attention",
    blocks="model.layers",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    norms={"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    attention="self_attn",
    norm_bias=False,
    rope=True,
    # the gate's activation multiplies up's output, so any scale on up passes straight to down
    hidden_site=("up", "down", lambda config: True),
    bias_options={"attention_bias": ("q", "k", "v", "o"), "mlp_bias": ("gate", "up", "down")},
)

MISTRAL = replace(
    LLAMA,
    name="mistral",
    model_types=("mistral",),
    summary="Mistral, sliding window included",
    bias_options={},
)
QWEN2 = replace(
    LLAMA,
    name="qwen2",
    model_types=("qwen2",),
    summary="Qwen2 and Qwen2.5 (biases on q, k, v)",
    bias_options={},
)
QWEN3 = replace(
    LLAMA,
    name="qwen3",
    model_types=("qwen3",),
    summary="Qwen3 (norms on queries and keys: no query_key site)",
    qk_norm="self_attn.q_norm",
    bias_options={"attention_bias": ("q", "k", "v", "o")},
)
