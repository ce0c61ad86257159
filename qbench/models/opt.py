"""OPT: LayerNorm with bias, learned positions, ReLU MLP; every linear has a bias, so every shift folds."""

from __future__ import annotations

from typing import Any

from qbench.models.base import Architecture


def _refuse(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return (
            "OPT with post-norm blocks (OPT-350m) is not supported: its norms feed the residual stream, "
            "so no transform before a linear preserves the function; every other OPT size works"
        )
    if not config.enable_bias or not config.layer_norm_elementwise_affine:
        return "OPT variants without biases (Galactica) are not supported"
    return None


OPT = Architecture(
    name="opt",
    recipes="opt",
    published_granularity="per_token",  # the authors quantize q, k, v before the split into heads
    model_types=("opt",),
    summary="OPT 125m to 66b, but for the post-norm 350m",
    blocks="model.decoder.layers",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "fc1": "fc1",
        "fc2": "fc2",
    },
    norms={"attn_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"},
    attention="self_attn",
    norm_bias=True,
    rope=False,
    # ReLU(s·x) = s·ReLU(x) for s > 0
    hidden_site=("fc1", "fc2", lambda config: config.activation_function == "relu"),
    hidden_relu=True,
    refuse=_refuse,
)
