"""SmoothQuant's equation 4 and its fold, from activations observed by hooks of the test's own."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn

from qbench.errors import UnsupportedSchemeError
from qbench.methods.smoothquant import SmoothQuant
from qbench.quant.grid import Grid
from qbench.quant.uniform import extremes, round_to_nearest
from qbench.scheme import Scheme
from tests.blocks import blocks_of
from tests.tiny_runs import linear_inputs, make_lane, reconstruct_lanes, spec_of

EVERYWHERE = ["attn_in", "mlp_in", "value_out", "mlp_out"]


def quantized(model: nn.Module, ids: Tensor, scheme: str = "W4A4", **options):
    return reconstruct_lanes(model, ids, [make_lane(model, "smoothquant", scheme, **options)])[0]


def with_outliers(model: nn.Module) -> nn.Module:
    """One channel after each norm 30 times as large, as large models have it."""
    for block in blocks_of(model):
        for path in spec_of(model).norms.values():
            block.get_submodule(path).weight.data[3] *= 30
    return model


def equation_4(inputs: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """max |x_j|^α / max |W_ij|^(1 − α) over all consumers, channel by channel."""
    scale = []
    for j in range(inputs.shape[-1]):
        activation = float(inputs[..., j].abs().max())
        weight = max(float(w[:, j].abs().max()) for w in weights)
        scale.append(activation**alpha / weight ** (1 - alpha))
    return torch.tensor(scale)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_fold_is_the_formula_in_every_block(build_tiny, tokens, family, alpha) -> None:
    model = with_outliers(build_tiny(family))
    result = quantized(model, tokens, "W8A8", alpha=alpha)
    spec, inputs = spec_of(model), linear_inputs(model, tokens)
    for i, block in enumerate(blocks_of(model)):
        state = result.state(i)
        for name, norm_name, consumers in (
            ("attn_in", "attn_norm", ("q", "k", "v")),
            ("mlp_in", "mlp_norm", ("gate", "up") if family == "llama" else ("fc1",)),
        ):
            weights = [block.get_submodule(spec.linears[role]).weight.detach() for role in consumers]
            scale = equation_4(
                inputs[i][consumers[0]], weights, alpha
            )  # the full-precision path's activations
            norm = block.get_submodule(spec.norms[norm_name])
            assert torch.allclose(state.rest.norm_weight[norm_name], norm.weight / scale, rtol=1e-4)
            assert torch.allclose(state.learned[f"{name}.scale"].reshape(-1), scale, rtol=1e-4)
            if family == "opt":
                assert torch.allclose(
                    state.rest.norm_bias[norm_name], norm.bias / scale, rtol=1e-4, atol=1e-7
                )
            for role, weight in zip(consumers, weights, strict=True):
                step = state.linears[role].scale.float()
                assert bool(((state.linears[role].dequantize() - weight * scale).abs() < 0.6 * step).all())
        untouched = {"o", "down", "fc2"} & set(spec.linears)
        for role in untouched:
            weight = block.get_submodule(spec.linears[role]).weight.detach()
            rounded = round_to_nearest(weight, *extremes(weight, Grid(8)), Grid(8))
            assert torch.equal(state.linears[role].codes, rounded.codes)


def test_value_and_mlp_sites_scale_producer_and_consumer(tiny_llama, tokens) -> None:
    result = quantized(tiny_llama, tokens, "W8A16", alpha=0.5, sites=["value_out", "mlp_out"])
    block, state = blocks_of(tiny_llama)[0], result.state(0)
    inputs = linear_inputs(tiny_llama, tokens)[0]
    heads, kv_heads, width = 4, 2, 8
    o, down = block.self_attn.o_proj.weight.detach(), block.mlp.down_proj.weight.detach()
    per_query_head = equation_4(inputs["o"], [o], 0.5).reshape(kv_heads, heads // kv_heads, width)
    value_scale = per_query_head.amax(1)  # one scale per key/value head: the largest of its query heads'
    expected = {
        "v": block.self_attn.v_proj.weight.detach() / value_scale.reshape(-1, 1),
        "o": o * value_scale.repeat_interleave(heads // kv_heads, 0).reshape(-1),
        "up": block.mlp.up_proj.weight.detach() / equation_4(inputs["down"], [down], 0.5)[:, None],
        "down": down * equation_4(inputs["down"], [down], 0.5),
    }
    for role, weight in expected.items():
        step = state.linears[role].scale.float()
        assert bool(((state.linears[role].dequantize() - weight).abs() < 0.6 * step).all()), role
    for name, norm in (("attn_norm", block.input_layernorm), ("mlp_norm", block.post_attention_layernorm)):
        assert torch.equal(state.rest.norm_weight[name], norm.weight)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_everything_folds_and_nothing_is_learned(build_tiny, tokens, family) -> None:
    model = build_tiny(family)
    result = quantized(model, tokens, sites=EVERYWHERE)
    biased = spec_of(model).biased
    for i in range(len(result)):
        state = result.state(i)
        assert not state.record.losses
        assert all(matrix is None for matrix in state.rest.norm_matrix.values())
        assert {role for role, bias in state.rest.bias.items() if bias is not None} == biased
        assert [t.site for t in state.transforms] == EVERYWHERE
        assert all(t.foldable and t.function_preserving and t.stored_bits == 0 for t in state.transforms)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_with_outliers_the_error_is_well_below_rtns(build_tiny, tokens, family) -> None:
    """The claim of the paper: activations with outliers are quantizable after smoothing."""
    model = with_outliers(build_tiny(family))
    lanes = [make_lane(model, method, "W8A4") for method in ("rtn", "smoothquant")]
    rtn, smooth = (r.records[-1].accumulated_error for r in reconstruct_lanes(model, tokens, lanes))
    assert smooth < 0.7 * rtn


@pytest.mark.parametrize(
    ("family", "alpha"), [("llama", 0.8), ("mistral", 0.8), ("qwen2", 0.8), ("opt", 0.5)]
)
def test_alpha_is_preset_by_family_unless_given(build_tiny, family, alpha) -> None:
    spec, scheme = spec_of(build_tiny(family)), Scheme.parse("W4A4")
    assert SmoothQuant().resolve(scheme, spec).alpha == alpha
    assert SmoothQuant(alpha=0.25).resolve(scheme, spec).alpha == 0.25
    assert SmoothQuant().sites == ("attn_in", "mlp_in")


def test_a_site_that_does_not_preserve_the_function_is_refused(build_tiny) -> None:
    model = build_tiny("opt", activation_function="gelu")
    with pytest.raises(
        UnsupportedSchemeError, match=re.escape("between fc1 and fc2 does not commute with a scale")
    ):
        SmoothQuant(sites=["mlp_out"]).check(Scheme.parse("W4A4"), spec_of(model))


def test_a_dead_channel_keeps_a_finite_scale(build_tiny, tokens) -> None:
    model = build_tiny("llama")
    block = blocks_of(model)[0]
    block.input_layernorm.weight.data[5] = 0  # activation 0
    for projection in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
        projection.weight.data[:, 6] = 0  # weight 0
    result = quantized(model, tokens)
    scale = result.state(0).learned["attn_in.scale"].reshape(-1)
    assert bool(scale.isfinite().all()) and float(scale.min()) >= 1e-5
    assert dataclasses.asdict(result.state(0).linears["q"])["scale"].isfinite().all()
