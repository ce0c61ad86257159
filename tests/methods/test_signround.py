"""SignRound: its presets, and what it leaves behind in a lane."""

from __future__ import annotations

import pytest
import torch

from qbench.engine.plan import LearnedRounding
from qbench.methods.signround import SignRound
from qbench.scheme import Scheme
from tests.tiny_runs import make_lane, reconstruct_lanes, spec_of, view_of

RATES = [
    ("W4A16", {}, 1 / 200, 1 / 200),
    ("W2A16", {}, 1 / 200, 1 / 200),
    ("W2A16", {"iterations": 1000}, 2 / 1000, 2 / 1000),
    ("W3A16g16", {"iterations": 1000}, 2 / 1000, 2 / 1000),
    ("W4A16", {"iterations": 1000}, 1 / 1000, 1 / 1000),
    ("W4A16", {"iterations": 50, "lr": 5e-3}, 5e-3, 5e-3),
    ("W4A16", {"range_lr": 0}, 1 / 200, 0),
]


@pytest.mark.parametrize(("scheme", "options", "lr", "range_lr"), RATES)
def test_rates_are_those_of_the_authors_code(tiny_llama, scheme, options, lr, range_lr) -> None:
    method = SignRound(**options).resolve(Scheme.parse(scheme), spec_of(tiny_llama))
    assert (method.lr, method.range_lr) == pytest.approx((lr, range_lr))


def test_the_plan_is_a_learned_rounding_and_nothing_else(tiny_opt, tokens) -> None:
    view = view_of(tiny_opt, tokens, "W4A4")
    plan = SignRound().resolve(view.scheme, view.spec).plan(view)
    assert plan.rounding == LearnedRounding(200, 1 / 200, 1 / 200, 8)
    assert not plan.transforms and plan.clipping is None and plan.training is None


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("scheme", ["W3A16g16", "W4A4", "W4A16-sym"])
def test_blocks_are_closer_to_full_precision_than_rounded_ones(build_tiny, tokens, family, scheme) -> None:
    model = build_tiny(family)
    lanes = [make_lane(model, "signround", scheme, iterations=30), make_lane(model, "rtn", scheme)]
    learned, nearest = reconstruct_lanes(model, tokens, lanes)
    first = learned.records[0]
    assert first.accumulated_error < nearest.records[0].accumulated_error
    assert first.extras["rounding_gain"] == pytest.approx(
        1 - first.accumulated_error / nearest.records[0].accumulated_error, rel=1e-2
    )
    assert learned.records[-1].accumulated_error < nearest.records[-1].accumulated_error
    assert len(first.losses) == 10


def test_the_seed_decides_the_draw(tiny_llama, tokens) -> None:
    def codes(seed: int) -> torch.Tensor:
        lane = make_lane(tiny_llama, "signround", "W3A16", iterations=30, window_batch=2)
        (result,) = reconstruct_lanes(tiny_llama, tokens, [lane], seed=seed)
        return result.state(0).linears["q"].codes

    assert torch.equal(codes(1), codes(1))
    assert not torch.equal(codes(1), codes(2))


@pytest.mark.parametrize("name", ["smoothquant+signround", "omniquant+signround"])
def test_it_rounds_behind_transforms_and_over_learned_ranges(tiny_llama, tokens, name) -> None:
    """The same transforms without it: what is left is the error that learned rounding takes away."""
    first, _, _ = name.partition("+")
    options = {"epochs": 2} if first == "omniquant" else {}
    lanes = [
        make_lane(tiny_llama, name, "W3A8", iterations=40, **options),
        make_lane(tiny_llama, first, "W3A8", **options),
    ]
    composed, alone = reconstruct_lanes(tiny_llama, tokens, lanes)
    assert composed.records[0].extras["rounding_gain"] > 0
    assert composed.records[0].accumulated_error < alone.records[0].accumulated_error
    assert [t.site for t in composed.transforms[0]] == [t.site for t in alone.transforms[0]]
    for key, value in alone.state(0).learned.items():  # learned before, untouched by the rounding
        assert torch.equal(value, composed.state(0).learned[key]), key
    norm = composed.state(0).rest.norm_weight["attn_norm"]
    assert torch.equal(norm, alone.state(0).rest.norm_weight["attn_norm"])
