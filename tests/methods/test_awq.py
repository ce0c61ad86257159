"""AWQ against searches by brute force on the model's own modules, without the engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.engine.probe import Probe
from qbench.engine.state import BlockState
from qbench.errors import UnsupportedSchemeError
from qbench.methods.awq import AWQ, candidate_scale
from qbench.quant.grid import Grid
from qbench.quant.uniform import extremes, round_to_nearest
from qbench.scheme import Scheme
from tests.blocks import blocks_of
from tests.tiny_runs import differences, linear_inputs, make_lane, naive_logits, reconstruct_lanes, spec_of

# site → (linears it scales, module whose output counts)
SITES = {
    "llama": {
        "attn_in": (("q", "k", "v"), "self_attn"),
        "value_out": (("o",), "self_attn.o_proj"),
        "mlp_in": (("gate", "up"), "mlp"),
        "mlp_out": (("down",), "mlp.down_proj"),
    },
    "opt": {
        "attn_in": (("q", "k", "v"), "self_attn"),
        "value_out": (("o",), "self_attn.out_proj"),
        "mlp_in": (("fc1",), "fc1"),
        "mlp_out": (("fc2",), "fc2"),
    },
}
VARIANTS = {"llama": {"num_key_value_heads": 4}, "llama-gqa": {}, "opt": {}}
GQA = (2, 2, 8)  # key/value heads, query heads of each, width


def build(build_tiny, variant: str) -> tuple[nn.Module, str]:
    """A tiny model with two loud channels at each norm, and its family."""
    family = variant.partition("-")[0]
    model = build_tiny(family, **VARIANTS[variant])
    for block in blocks_of(model):
        for path in spec_of(model).norms.values():
            block.get_submodule(path).weight.data[3:5] *= 10
    return model, family


def quantized(model, ids, scheme="W3A16g16", method="awq", **options):
    return reconstruct_lanes(model, ids, [make_lane(model, method, scheme, **options)])[0]


@torch.no_grad()
def calls_of(model: nn.Module, ids: Tensor, path: str) -> list[tuple[tuple, dict[str, Any], Tensor]]:
    """(positional, keyword arguments, output) of a submodule of block 0, window by window."""
    seen = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        seen.append((args, kwargs, out[0] if isinstance(out, tuple) else out))

    handle = blocks_of(model)[0].get_submodule(path).register_forward_hook(keep, with_kwargs=True)
    for window in ids:
        model(input_ids=window[None], use_cache=False)
    handle.remove()
    return seen


def naive_round(weight: Tensor, grid: Grid) -> Tensor:
    out = torch.empty_like(weight)
    size = grid.group_size or weight.shape[1]
    for start in range(0, weight.shape[1], size):
        part = weight[:, start : start + size]
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**grid.bits - 1)).half().float()
        zero = (-low / scale).round()
        codes = ((part / scale).round() + zero).clamp(0, 2**grid.bits - 1)
        out[:, start : start + size] = (codes - zero) * scale
    return out


@torch.no_grad()
def brute_force(
    model: nn.Module, family: str, ids: Tensor, site: str, grid: Grid, grouped: bool
) -> tuple[Tensor, list[float]]:
    """The best scale of a site in block 0 and the error of every ratio."""
    roles, path = SITES[family][site]
    inputs = linear_inputs(model, ids)[0]
    importance = inputs[roles[0]].abs().mean((0, 1))
    if grouped:
        importance = importance.reshape(GQA).mean(1).reshape(-1)
    calls = calls_of(model, ids, path)
    linears = spec_of(model).linears
    errors, scales = [], []
    for step in range(20):
        scale = importance.pow(step / 20).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        seen = scale.reshape(GQA[0], 1, GQA[2]).expand(GQA).reshape(-1) if grouped else scale
        block = copy.deepcopy(blocks_of(model)[0], {id(model.config): model.config})
        for role in roles:
            weight = block.get_submodule(linears[role]).weight
            weight.data.copy_(naive_round(weight * seen, grid) / seen)
        module, total = block.get_submodule(path), []
        for args, kwargs, expected in calls:
            out = module(*args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            total.append((out - expected).double().square().mean())
        errors.append(float(torch.stack(total).mean()))
        scales.append(scale)
    return scales[errors.index(min(errors))], errors


@pytest.mark.parametrize("scheme", ["W3A16g16", "W4A16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_are_those_of_a_brute_force_search(build_tiny, tokens, variant, scheme) -> None:
    model, family = build(build_tiny, variant)
    parsed = Scheme.parse(scheme)
    grid = Grid(parsed.wbits, group_size=parsed.group_size)
    learned = quantized(model, tokens, scheme).state(0).learned
    chosen = set()
    for site in SITES[family]:
        grouped = variant == "llama-gqa" and site == "value_out"
        expected, errors = brute_force(model, family, tokens, site, grid, grouped)
        assert torch.allclose(learned[f"{site}.scale"].reshape(-1), expected, rtol=1e-4), site
        chosen.add(errors.index(min(errors)))
    assert len(chosen) > 1 and max(chosen) > 0  # the search found something


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_second_moments_choose_the_same_scales(build_tiny, tokens, monkeypatch, variant) -> None:
    model, family = build(build_tiny, variant)
    by_moments = quantized(model, tokens).state(0).learned
    monkeypatch.setattr(Probe, "tokens", lambda self, most: 0)  # fewer than any linear has inputs
    by_outputs = quantized(model, tokens).state(0).learned
    for site in SITES[family]:
        assert torch.equal(by_moments[f"{site}.scale"], by_outputs[f"{site}.scale"]), site


def test_the_search_uses_full_precision_inputs_of_every_block(build_tiny, tokens) -> None:
    """Also behind quantized blocks and with quantized activations: all sites on the block as the model has it."""
    model, family = build(build_tiny, "opt")
    result = quantized(model, tokens, "W3A4g16")
    weight_only = quantized(model, tokens, "W3A16g16")
    for block in (0, 1):
        for site in SITES[family]:
            assert torch.equal(
                result.state(block).learned[f"{site}.scale"],
                weight_only.state(block).learned[f"{site}.scale"],
            )
    assert "full-precision activations" in AWQ().notes(Scheme.parse("W3A4"), spec_of(model))[0]
    assert AWQ().notes(Scheme.parse("W3A16"), spec_of(model)) == []


def ends(state: BlockState, role: str) -> Tensor:
    return state.linears[role].scale.float()


@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_clipping_is_searched_on_the_scaled_block_for_all_but_q_and_k(build_tiny, tokens, variant) -> None:
    model, family = build(build_tiny, variant)
    spec = spec_of(model)
    state = quantized(model, tokens, clip_tokens=10**6).state(0)
    inputs = linear_inputs(model, tokens)[0]
    producers = {"attn_in": None, "value_out": "v", "mlp_in": None, "mlp_out": spec.sites["mlp_out"].producer}
    scaled, x = {}, {}
    for site, (roles, _) in SITES[family].items():
        scale = state.learned[f"{site}.scale"].reshape(-1)
        for role in roles:
            weight = blocks_of(model)[0].get_submodule(spec.linears[role]).weight.detach()
            scaled[role] = scaled.get(role, weight) * scale
            x[role] = inputs[role].reshape(-1, inputs[role].shape[-1]) / scale
    for site, producer in producers.items():
        if producer is not None:
            scaled[producer] = scaled[producer] / state.learned[f"{site}.scale"].reshape(-1, 1)
    clipped = 0
    for role, weight in scaled.items():
        expected = torch.empty(weight.shape[0], weight.shape[1] // 16)
        for group in range(expected.shape[1]):
            columns = slice(group * 16, (group + 1) * 16)
            for row in range(weight.shape[0]):
                w = weight[row, columns]
                best = (torch.inf, 0, None)
                for step in range(1 if role in ("q", "k") else 10):
                    bound = w.abs().max() * (1 - step / 20)
                    cut = w.clamp(-bound, bound)
                    low, high = cut.min().clamp(max=0), cut.max().clamp(min=0)
                    s = ((high - low) / 7).half().float()
                    z = (-low / s).round().clamp(0, 7)
                    rounded = (((w / s).round() + z).clamp(0, 7) - z) * s
                    error = float((x[role][:, columns] @ (rounded - w)).square().mean())
                    best = min(best, (error, step, s))
                expected[row, group] = best[2]
                clipped += best[1] > 0
        same = torch.isclose(ends(state, role), expected, rtol=2e-3)
        assert float(same.float().mean()) > 0.99, role  # a tie may fall the other way
    assert clipped > 100
    without = quantized(model, tokens, clip=False).state(0)
    for role in ("q", "k"):
        assert torch.equal(without.linears[role].codes, state.linears[role].codes)
    assert not torch.equal(without.linears["v"].scale, state.linears["v"].scale)


def test_the_folded_model_computes_what_its_integers_say(build_tiny, tokens) -> None:
    model, _ = build(build_tiny, "llama-gqa")
    result = quantized(model, tokens, "W8A16g16")
    exact = model(input_ids=tokens).logits.detach()
    found = naive_logits(model, result, tokens)
    assert float((found - exact).norm() / exact.norm()) < 0.05


def test_errors_are_below_those_of_rounding_to_nearest_and_gptq_under_it_is_lower_still(
    build_tiny, tokens
) -> None:
    for variant in VARIANTS:
        model, _ = build(build_tiny, variant)
        rtn, awq, both = (
            quantized(model, tokens, method=method).records[-1].accumulated_error
            for method in ("rtn", "awq", "awq+gptq")
        )
        assert both < awq < rtn, variant


def test_gptq_rounds_over_the_searched_ranges(build_tiny, tokens) -> None:
    model, _ = build(build_tiny, "opt")
    alone, both = (quantized(model, tokens, method=method).state(0) for method in ("awq", "awq+gptq"))
    for role, linear in alone.linears.items():
        assert torch.equal(both.linears[role].scale, linear.scale)
    assert not torch.equal(both.linears["fc2"].codes, alone.linears["fc2"].codes)


def test_grouped_values_as_published_and_by_key_value_channel(build_tiny, tokens) -> None:
    model, _ = build(build_tiny, "llama-gqa")
    ours = quantized(model, tokens[:2]).state(0)
    theirs = quantized(model, tokens[:2], **AWQ.published_form).state(0)
    assert "value_out.scale" in ours.learned and "value_out.scale" not in theirs.learned
    assert torch.equal(ours.learned["mlp_out.scale"], theirs.learned["mlp_out.scale"])
    multi_head, _ = build(build_tiny, "llama")
    assert not differences(
        quantized(multi_head, tokens[:2]), quantized(multi_head, tokens[:2], **AWQ.published_form)
    )


@pytest.mark.parametrize("placement", ["disk", "device"])
def test_where_hidden_states_live_changes_nothing(build_tiny, tokens, placement) -> None:
    model, _ = build(build_tiny, "llama-gqa")
    lane = make_lane(model, "awq", "W3A16g16", search_tokens=50)
    plain, other = (reconstruct_lanes(model, tokens, [lane], placement=p)[0] for p in ("cpu", placement))
    assert not differences(plain, other)


def test_scales_are_normalised_and_floored() -> None:
    importance = torch.tensor([0.0, 1e-9, 0.5, 2.0, 30.0])
    for ratio in (0.0, 0.35, 0.95):
        scale = candidate_scale(importance, ratio)
        assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)
        floored = importance.pow(ratio).clamp(min=1e-4)
        assert torch.allclose(scale / scale[-1], floored / floored[-1])
    assert torch.equal(candidate_scale(importance, 0.0), torch.ones(5))


def test_sites_named_by_hand_must_exist_and_sixteen_bit_weights_are_left_alone(build_tiny, tokens) -> None:
    model = build_tiny("opt", activation_function="gelu")
    spec = spec_of(model)
    AWQ().check(Scheme(4), spec)
    with pytest.raises(UnsupportedSchemeError, match="does not commute with a scale"):
        AWQ(sites=("mlp_out",)).check(Scheme(4), spec)
    state = quantized(build_tiny("opt"), tokens[:2], "W16A8").state(0)
    assert not state.transforms and isinstance(state.linears["q"], Tensor)


def test_clipping_ranges_of_a_large_weight_do_not_depend_on_how_it_is_cut(monkeypatch) -> None:
    from qbench.quant import clipping

    weight, inputs = torch.randn(40, 64), torch.randn(90, 64)
    whole = clipping.search_range(weight, inputs, Grid(3, group_size=16))
    monkeypatch.setattr(clipping, "PRODUCTS", 4 * 90 * 7)
    for one, other in zip(clipping.search_range(weight, inputs, Grid(3, group_size=16)), whole, strict=True):
        assert torch.equal(one, other)
    holder = clipping.Clipping({"q": (40, 64)}, Grid(3, group_size=16))
    holder.set_range("q", weight, *whole, Grid(3, group_size=16))
    for one, other in zip(holder.ranges("q", weight, Grid(3, group_size=16)), whole, strict=True):
        assert torch.allclose(one, other)
    untouched = extremes(weight, Grid(3))
    free = clipping.Clipping({"q": (40, 64)}, Grid(3))
    free.set_range("q", weight, *untouched, Grid(3))
    assert all(torch.equal(a, b) for a, b in zip(free.ranges("q", weight, Grid(3)), untouched, strict=True))
    assert round_to_nearest(weight, *untouched, Grid(3)).codes.max() == 7


def test_of_equal_errors_the_least_clipped_is_kept() -> None:
    from qbench.quant.clipping import search_range

    weight, grid = torch.randn(6, 32), Grid(3, group_size=16)
    for found, own in zip(
        search_range(weight, torch.zeros(5, 32), grid), extremes(weight, grid), strict=True
    ):
        assert torch.equal(found, own)
