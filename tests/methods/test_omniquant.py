"""OmniQuant: the published recipes, where training starts, and what each switch switches."""

from __future__ import annotations

import pytest
import torch

from qbench.engine.losses import mse, mse_with_auxiliary
from qbench.errors import UnsupportedSchemeError
from qbench.methods import METHODS
from qbench.methods.omniquant import OmniQuant
from qbench.models.base import BlockSpec
from qbench.scheme import Scheme
from qbench.transforms.transform import DiagonalTransform
from tests.blocks import blocks_of
from tests.tiny_runs import differences, linear_inputs, make_lane, reconstruct_lanes, spec_of, view_of

SITES = ("attn_in", "mlp_in", "value_out", "query_key")
COMMON = {
    "lwc": True,
    "let_lr": 5e-3,
    "lwc_lr": 1e-2,
    "query_key": "legal",
    "sites": SITES,
    "parameters": None,
}
WEIGHT_LLAMA = {"let": False, "shift": False, "epochs": 20, "aug_loss": False, "alpha": 0.5}
TWO_BIT_LLAMA = WEIGHT_LLAMA | {"aug_loss": True, "epochs": 40}
WEIGHT_OPT = {"let": True, "shift": False, "epochs": 20, "aug_loss": False, "alpha": 0.5}
RECIPES = [
    ("llama", "W4A16", WEIGHT_LLAMA),
    ("llama", "W3A16", WEIGHT_LLAMA),
    ("llama", "W3A16g128", WEIGHT_LLAMA),
    ("llama", "W2A16", TWO_BIT_LLAMA),
    ("llama", "W2A16g64", TWO_BIT_LLAMA),
    ("mistral", "W2A16g128", TWO_BIT_LLAMA),
    ("llama", "W4A4", {"let": True, "shift": False, "epochs": 20, "aug_loss": True, "alpha": 0.5}),
    ("qwen2", "W4A4", {"let": True, "shift": False, "epochs": 20, "aug_loss": True, "alpha": 0.5}),
    ("llama", "W6A6", {"let": True, "shift": False, "epochs": 20, "aug_loss": False, "alpha": 0.5}),
    ("opt", "W4A16", WEIGHT_OPT),
    ("opt", "W3A16g128", WEIGHT_OPT),
    ("opt", "W2A16g64", WEIGHT_OPT | {"epochs": 40}),
    ("opt", "W4A4", {"let": True, "shift": True, "epochs": 20, "aug_loss": False, "alpha": 0.75}),
    ("opt", "W6A6", {"let": True, "shift": True, "epochs": 20, "aug_loss": False, "alpha": 0.5}),
]


def resolved(spec: BlockSpec, scheme: str, **options) -> OmniQuant:
    return OmniQuant(**options).resolve(Scheme.parse(scheme), spec)


@pytest.mark.parametrize(("family", "scheme", "recipe"), RECIPES, ids=[f"{f}-{s}" for f, s, _ in RECIPES])
def test_presets_are_the_published_recipes(build_tiny, family, scheme, recipe) -> None:
    options = resolved(spec_of(build_tiny(family)), scheme).model_dump()
    assert options == COMMON | recipe


def test_an_option_that_is_given_wins_over_the_preset(build_tiny) -> None:
    given = {
        "let": True,
        "shift": True,
        "epochs": 3,
        "let_lr": 1e-3,
        "alpha": 0.9,
        "aug_loss": False,
        "lwc": False,
    }
    options = resolved(spec_of(build_tiny("llama")), "W2A16", **given).model_dump()
    assert {name: options[name] for name in given} == given


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
@pytest.mark.parametrize("index", [0, 1], ids=["first block", "second block"])
def test_scales_and_shifts_start_at_the_formula(build_tiny, tokens, family, index) -> None:
    model, alpha = build_tiny(family), 0.3
    view = view_of(model, tokens, "W4A4", index)
    spec, inputs = view.spec, linear_inputs(model, tokens)[index]
    plan = resolved(spec, "W4A4", alpha=alpha, shift=True).plan(view)
    assert [t.site.name for t in plan.transforms] == [name for name in SITES if name in spec.sites]
    observed = {"attn_in": "q", "value_out": "o", "mlp_in": "up" if "up" in spec.linears else "fc1"}
    for transform in plan.transforms:
        name = transform.site.name
        assert isinstance(transform, DiagonalTransform)
        if name == "query_key":
            assert bool((transform.scale == 1).all()) and transform.shift is None
            assert transform.paired == spec.rope
            assert transform.scale.numel() == spec.n_kv_heads * spec.head_dim // (2 if spec.rope else 1)
            continue
        role = observed[name]
        x = inputs[role]
        weight = blocks_of(model)[index].get_submodule(spec.linears[role]).weight.detach()
        a, w = x.abs().amax((0, 1)), weight.abs().amax(0)
        centre = (x[0].amax(0) + x[0].amin(0)) / 2
        for window in x[1:]:
            centre = 0.99 * centre + 0.01 * (window.amax(0) + window.amin(0)) / 2
        if name == "value_out":  # shared by the query heads of a group
            a, w, centre = (
                v.reshape(spec.n_kv_heads, -1, spec.head_dim).amax(1).reshape(-1) for v in (a, w, centre)
            )
        assert torch.allclose(transform.scale.reshape(-1), a**alpha / w ** (1 - alpha), rtol=1e-4)
        if family == "opt":
            assert torch.allclose(transform.shift, centre, rtol=1e-4, atol=1e-6)
        else:  # nothing to start from where norms have no bias
            assert bool((transform.shift == 0).all())


def test_clipping_starts_at_sigmoid_of_4_with_a_logit_per_group(tiny_llama, tokens) -> None:
    view = view_of(tiny_llama, tokens, "W4A16g16")
    plan = resolved(view.spec, "W4A16g16").plan(view)
    for role, (rows, cols) in view.spec.shapes.items():
        upper, lower = plan.clipping.logits(role)
        assert upper.shape == lower.shape == (rows, cols // 16)
        assert bool((upper == 4).all()) and bool((lower == 4).all())


@pytest.mark.parametrize(
    ("aug_loss", "loss"), [(True, mse_with_auxiliary), (False, mse)], ids=["auxiliary", "plain"]
)
def test_the_auxiliary_loss_asks_for_its_target(tiny_llama, tokens, aug_loss, loss) -> None:
    view = view_of(tiny_llama, tokens, "W4A4")
    training = (
        resolved(view.spec, "W4A4", aug_loss=aug_loss, let_lr=0.25, lwc_lr=0.5, epochs=7).plan(view).training
    )
    assert training.loss is loss and training.same_input_target == aug_loss
    assert (training.epochs, training.transform_lr, training.clipping_lr) == (7, 0.25, 0.5)


SWITCHES = [
    pytest.param({"lwc": False}, True, False, id="no lwc"),
    pytest.param({"let": False}, False, True, id="no let"),
    pytest.param({"lwc": False, "let": False}, False, False, id="neither"),
    pytest.param({}, True, True, id="both"),
]


@pytest.mark.parametrize(("options", "transforms", "clipping"), SWITCHES)
def test_let_and_lwc_are_switchable(tiny_llama, tokens, options, transforms, clipping) -> None:
    method = resolved(spec_of(tiny_llama), "W4A4", **options)
    assert method.needs.activation_stats == transforms
    plan = method.plan(view_of(tiny_llama, tokens, "W4A4"))
    assert bool(plan.transforms) == transforms
    assert (plan.clipping is not None) == clipping
    assert (plan.training is not None) == (transforms or clipping)


def test_with_both_off_it_is_rtn(tiny_llama, tokens) -> None:
    off = make_lane(tiny_llama, "omniquant", "W3A4", lwc=False, let=False)
    one, other = reconstruct_lanes(tiny_llama, tokens[:2], [off, make_lane(tiny_llama, "rtn", "W3A4")])
    assert not differences(one, other)


@pytest.mark.parametrize("sites", [["attn_in"], ["query_key", "mlp_in"], ["value_out"]], ids=" ".join)
def test_only_the_chosen_sites_are_transformed(tiny_opt, tokens, sites) -> None:
    lane = make_lane(tiny_opt, "omniquant", "W4A4", sites=sites, epochs=1)
    (result,) = reconstruct_lanes(tiny_opt, tokens[:2], [lane])
    for records in result.transforms:
        assert [record.site for record in records] == sites
    norm = blocks_of(tiny_opt)[0].self_attn_layer_norm
    assert torch.equal(result.state(0).rest.norm_weight["attn_norm"], norm.weight) == ("attn_in" not in sites)


def test_shift_adds_biases_and_no_shift_adds_none(tiny_llama, tokens) -> None:
    lanes = [make_lane(tiny_llama, "omniquant", "W4A4", shift=shift, epochs=1) for shift in (True, False)]
    shifted, plain = reconstruct_lanes(tiny_llama, tokens[:2], lanes)
    assert {role for role, bias in shifted.state(0).rest.bias.items() if bias is not None} == {
        "q", "k", "v", "o", "gate", "up"
    }  # fmt: skip
    assert all(bias is not None for bias in shifted.state(0).rest.norm_bias.values())
    assert all(bias is None for bias in plain.state(0).rest.bias.values())
    assert all(bias is None for bias in plain.state(0).rest.norm_bias.values())


def test_a_site_named_by_hand_must_exist_and_the_default_set_adapts(build_tiny, tokens) -> None:
    model = build_tiny("qwen3")
    spec, scheme = spec_of(model), Scheme.parse("W4A4")
    with pytest.raises(UnsupportedSchemeError, match="a norm sits between the q, k projections"):
        resolved(spec, "W4A4", sites=["attn_in", "query_key"]).check(scheme, spec)
    method = resolved(spec, "W4A4")
    method.check(scheme, spec)
    sites = [t.site.name for t in method.plan(view_of(model, tokens, "W4A4")).transforms]
    assert sites == ["attn_in", "mlp_in", "value_out"]


def test_the_published_query_key_form_is_untied_and_noted(tiny_llama, tiny_opt, tokens) -> None:
    spec, scheme = spec_of(tiny_llama), Scheme.parse("W4A4")
    method = resolved(spec, "W4A4", query_key="published")
    transform = method.plan(view_of(tiny_llama, tokens, "W4A4")).transforms[-1]
    assert transform.scale.shape == (spec.n_kv_heads, spec.head_dim)
    assert not transform.function_preserving
    assert any("does not preserve the function under RoPE" in note for note in method.notes(scheme, spec))
    assert not resolved(spec, "W4A4").notes(scheme, spec)
    assert not resolved(spec, "W4A4", query_key="published", sites=["attn_in"]).notes(scheme, spec)
    without_rope = spec_of(tiny_opt)  # there both forms are the same and legal
    assert not resolved(without_rope, "W4A4", query_key="published").notes(scheme, without_rope)
    assert OmniQuant.published_form == {"query_key": "published"}


def test_a_published_form_that_the_model_has_no_site_for_is_not_noted(build_tiny) -> None:
    spec, scheme = spec_of(build_tiny("qwen3")), Scheme.parse("W4A4")
    assert not resolved(spec, "W4A4", query_key="published").notes(scheme, spec)
    affine = METHODS.load("affinequant")(query_key="published").resolve(scheme, spec)
    assert not any("query_key" in note for note in affine.notes(scheme, spec))


def test_one_epoch_works_and_trains(tiny_llama, tokens) -> None:
    (result,) = reconstruct_lanes(
        tiny_llama, tokens[:2], [make_lane(tiny_llama, "omniquant", "W4A4", epochs=1)]
    )
    for i, record in enumerate(result.records):
        assert len(record.losses) == 1 and record.losses[0] > 0
        logits = result.state(i).learned["clipping.upper.q"]
        assert 0 < float((logits - 4).abs().max()) <= 2 * 1.01e-2  # two steps of at most lwc_lr


@pytest.mark.parametrize(("scheme", "groups"), [("W4A16", 1), ("W4A16g16", 2), ("W4A16g8", 4)])
def test_weight_only_with_group_sizes(tiny_llama, tokens, scheme, groups) -> None:
    (result,) = reconstruct_lanes(tiny_llama, tokens, [make_lane(tiny_llama, "omniquant", scheme, epochs=4)])
    q = result.state(0).linears["q"]  # 32 inputs
    assert q.scale.shape == q.zero_point.shape == (32, groups)
    assert result.state(0).learned["clipping.upper.q"].shape == (32, groups)
    assert result.records[0].losses[-1] < result.records[0].losses[0]
    assert result.records[-1].accumulated_error < 0.1


def test_codes_are_rounded_over_the_learned_ranges(tiny_llama, tokens) -> None:
    lane = make_lane(tiny_llama, "omniquant", "W3A16", epochs=2, lwc_lr=0.5)
    (result,) = reconstruct_lanes(tiny_llama, tokens[:2], [lane])
    state, weight = result.state(0), blocks_of(tiny_llama)[0].mlp.up_proj.weight.detach()
    upper, lower = (state.learned[f"clipping.{end}.up"].sigmoid() for end in ("upper", "lower"))
    high, low = weight.amax(1, keepdim=True) * upper, weight.amin(1, keepdim=True) * lower
    scale = ((high - low) / 7).half().float()
    codes = ((weight / scale).round() + (-low / scale).round()).clamp(0, 7)
    assert torch.equal(state.linears["up"].codes.float(), codes)
    assert float(upper.max() - upper.min()) > 0.01  # the ranges have moved
