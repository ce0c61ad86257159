"""ABQ-LLM: its recipes, where its transforms start, which blocks are compensated, and what W2* is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qbench.errors import UnsupportedSchemeError
from qbench.methods.abq import ABQ
from qbench.models.base import BlockSpec
from qbench.scheme import Scheme
from qbench.transforms.transform import Compensation, DiagonalTransform
from tests.blocks import blocks_of
from tests.tiny_runs import linear_inputs, make_lane, reconstruct_lanes, spec_of, view_of

SITES = ("attn_in", "mlp_in", "value_out", "query_key", "mlp_out")


def resolved(spec: BlockSpec, scheme: str, **options) -> ABQ:
    return ABQ(**options).resolve(Scheme.parse(scheme), spec)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    ("scheme", "epochs"),
    [("W2A16", 40), ("W2A16g64", 40), ("W2A8", 40), ("W2A6", 40), ("W8A8", 40), ("W4A4", 20), ("W3A8", 20),
     ("W4A8", 20), ("W6A6", 20), ("W4A16g128", 20), ("W3A16", 20)],
)  # fmt: skip
def test_presets_are_the_published_recipes(build_tiny, family, scheme, epochs) -> None:
    method = resolved(spec_of(build_tiny(family)), scheme)
    assert method.epochs == epochs
    assert method.shift == (family == "opt" and Scheme.parse(scheme).abits < 16)
    assert (method.let_lr, method.lwc_lr, method.alpha) == (5e-3, 1e-2, 0.5)
    assert method.bit_balance is False


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_scales_start_at_the_root_of_ranges_and_sites_are_those_of_the_model(
    build_tiny, tokens, family
) -> None:
    model = build_tiny(family)
    view = view_of(model, tokens, "W4A4")
    plan = resolved(view.spec, "W4A4").plan(view)
    diagonals = {t.site.name: t for t in plan.transforms if isinstance(t, DiagonalTransform)}
    absent = {"opt": {"mlp_out"}, "qwen3": {"query_key"}}.get(family, set())
    assert set(diagonals) == set(SITES) - absent
    if "mlp_out" in diagonals:
        a = linear_inputs(model, tokens)[0]["down"].abs().amax((0, 1))
        w = blocks_of(model)[0].get_submodule(view.spec.linears["down"]).weight.detach().abs().amax(0)
        assert torch.allclose(diagonals["mlp_out"].scale.reshape(-1), (a / w).sqrt(), rtol=1e-4)
        assert diagonals["mlp_out"].shift is None
    if "query_key" in diagonals:
        assert bool((diagonals["query_key"].scale == 1).all())
        assert diagonals["query_key"].function_preserving


def test_the_published_query_key_scale_is_untied_and_said_so(tiny_llama, tokens) -> None:
    view = view_of(tiny_llama, tokens, "W4A4")
    method = resolved(view.spec, "W4A4", query_key="published")
    (transform,) = (t for t in method.plan(view).transforms if t.site.name == "query_key")
    assert not transform.function_preserving and "RoPE" in transform.note
    assert "RoPE" in method.notes(view.scheme, view.spec)[0]
    assert not resolved(view.spec, "W4A4").notes(view.scheme, view.spec)


@pytest.mark.parametrize(("family", "role"), [("llama", "down"), ("opt", "fc2")])
def test_outer_blocks_are_compensated(build_tiny, tokens, family, role) -> None:
    view = view_of(build_tiny(family), tokens, "W4A4")
    method = resolved(view.spec, "W4A4")
    compensated = []
    for index in range(12):
        transforms = method.plan(replace(view, index=index, n_blocks=12)).transforms
        if any(isinstance(t, Compensation) for t in transforms):
            assert isinstance(transforms[-1], Compensation)  # after everything that rewrites the weight
            assert transforms[-1].site.producer == role
            compensated.append(index)
    assert compensated == [0, 1, 2, 8, 9, 10, 11]


def test_compensation_is_merged_into_the_weight_and_kept(tiny_llama, tokens) -> None:
    """The codes are those of the transformed weight plus a·bᵀ: rounded again from what was saved."""
    lane = make_lane(tiny_llama, "abq", "W4A16", epochs=2, lwc=False, sites=(), compensation_lr=0.01)
    (result,) = reconstruct_lanes(tiny_llama, tokens, [lane])
    for index, block in enumerate(blocks_of(tiny_llama)):
        state = result.state(index)
        a, b = (state.learned[f"compensation_down.{name}"] for name in "ab")
        assert a.shape == (32, 1) and b.shape == (1, 64) and a.abs().max() > 1e-3
        weight = block.mlp.down_proj.weight.detach() + a @ b
        step = state.linears["down"].scale.float()
        assert ((state.linears["down"].dequantize() - weight).abs() <= 0.51 * step).all()
        assert not torch.allclose(weight, block.mlp.down_proj.weight, atol=1e-3)
    assert [t.kind for t in result.transforms[0]] == ["compensation"]
    assert result.transforms[0][0].foldable and not result.transforms[0][0].function_preserving


def test_without_let_there_is_no_compensation_and_without_either_no_training(tiny_llama, tokens) -> None:
    view = view_of(tiny_llama, tokens, "W4A4")
    assert not resolved(view.spec, "W4A4", let=False).plan(view).transforms
    assert resolved(view.spec, "W4A4", let=False, lwc=False).plan(view).training is None


LOSSES = [
    pytest.param({}, True, id="maps"),
    pytest.param({"attention_loss": "published"}, True, id="published"),
    pytest.param({"attention_loss": "off"}, False, id="off"),
]


@pytest.mark.parametrize(("options", "maps"), LOSSES)
def test_the_plan_asks_for_what_its_losses_need(tiny_llama, tokens, options, maps) -> None:
    view = view_of(tiny_llama, tokens, "W4A4")
    training = resolved(view.spec, "W4A4", **options).plan(view).training
    assert training.same_input_target and training.attention_maps == maps


@pytest.mark.parametrize(
    ("scheme", "options", "word"),
    [
        ("W3A16", {"bit_balance": True}, "2-bit weights"),
        ("W2A16-sym", {"bit_balance": True}, "zero points"),
        ("W4A4", {"sites": ("mlp_out",)}, "ReLU"),
    ],
    ids=["three bits", "symmetric", "mlp_out on OPT"],
)
def test_what_makes_no_sense_is_refused(tiny_opt, scheme, options, word) -> None:
    spec = spec_of(tiny_opt)
    with pytest.raises(UnsupportedSchemeError, match=word):
        resolved(spec, scheme, **options).check(Scheme.parse(scheme), spec)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bit_balance_gives_five_levels_a_smaller_error_and_its_cost(build_tiny, tokens, family) -> None:
    model = build_tiny(family)
    lanes = [make_lane(model, "abq", "W2A8", epochs=3, bit_balance=on) for on in (False, True)]
    plain, balanced = reconstruct_lanes(model, tokens, lanes)
    codes = torch.cat([linear.codes.flatten() for linear in balanced.state(0).linears.values()])
    assert codes.unique().tolist() == [0, 1, 2, 3, 4]
    assert all(linear.grid.extra_level for linear in balanced.state(1).linears.values())
    assert balanced.records[-1].accumulated_error < plain.records[-1].accumulated_error
    assert 1.1 < balanced.weight_bits / plain.weight_bits < 7 / 6 + 0.02


def test_the_levels_survive_a_checkpoint(tiny_llama, tokens, tmp_path) -> None:
    lane = make_lane(tiny_llama, "abq", "W2A16g16", epochs=1, bit_balance=True)
    (result,) = reconstruct_lanes(tiny_llama, tokens, [lane])
    result.state(0).save(tmp_path / "block.safetensors")
    again = type(result.state(0)).load(tmp_path / "block.safetensors")
    assert again.linears["q"].grid == result.state(0).linears["q"].grid
    assert again.weight_bits == result.state(0).weight_bits


def test_five_levels_under_another_rounding_rule(tiny_llama, tokens) -> None:
    """The plan's grid reaches the last part of a composition."""
    lane = make_lane(tiny_llama, "abq+gptq", "W2A16g16", epochs=1, bit_balance=True)
    (result,) = reconstruct_lanes(tiny_llama, tokens, [lane])
    codes = torch.cat([linear.codes.flatten() for linear in result.state(1).linears.values()])
    assert codes.unique().tolist() == [0, 1, 2, 3, 4]
    assert result.state(1).linears["down"].grid.extra_level


def test_compensation_has_a_rate_of_its_own(tiny_llama, tokens) -> None:
    """The first step of Adam moves every entry by its learning rate."""
    lane = make_lane(tiny_llama, "abq", "W4A16", epochs=1, lwc=False, sites=("mlp_in",), compensation_lr=0.02)
    (result,) = reconstruct_lanes(tiny_llama, tokens[:1], [lane])
    assert float(result.state(0).learned["compensation_down.a"].abs().max()) == pytest.approx(0.02, rel=1e-2)
