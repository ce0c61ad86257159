"""GPTQ as a method: its options, what each linear's rounding is given, and what the row says of it."""

from __future__ import annotations

import pytest
import torch

from qbench.engine.stream import Stream
from qbench.errors import UnsupportedSchemeError
from qbench.methods.gptq import GPTQ
from qbench.quant.gptq import quantize_columns
from qbench.quant.grid import Grid
from qbench.scheme import Scheme
from tests.blocks import blocks_of
from tests.engine.test_calibrated_rounding import direct_moments
from tests.tiny_runs import differences, make_lane, naive_dequantize, reconstruct_lanes, spec_of


def quantized(model, ids, scheme="W3A16", **options):
    return reconstruct_lanes(model, ids, [make_lane(model, "gptq", scheme, **options)])[0]


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"true_sequential": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_each_linear_is_rounded_with_the_moment_of_its_input(
    build_tiny, tokens, monkeypatch, family, options
) -> None:
    moments, passes = {}, []
    gather = Stream.second_moments

    def spy(stream, block, roles, inputs):
        found = gather(stream, block, roles, inputs)
        passes.append(roles)
        for role, moment in found.items():
            moments.setdefault(role, moment.clone())
        return found

    monkeypatch.setattr(Stream, "second_moments", spy)
    model = build_tiny(family)
    state = quantized(model, tokens, "W3A16g16", **options).state(0)
    spec, block = spec_of(model), blocks_of(model)[0]
    one_pass = [[roles[0] for roles in spec.shared_inputs]]
    assert passes[: len(passes) // 2] == (
        [[r] for r in one_pass[0]] if "true_sequential" in options else one_pass
    )
    options = {k: v for k, v in options.items() if k == "act_order"}
    options["static_groups"] = options.get("act_order", False)
    for roles in spec.shared_inputs:
        moment = moments[roles[0]]
        for role in roles:
            weight = block.get_submodule(spec.linears[role]).weight.detach()
            expected = quantize_columns(weight, moment, Grid(3, group_size=16), **options).weight
            assert torch.equal(state.linears[role].codes, expected.codes), role
            assert torch.equal(state.linears[role].scale, expected.scale), role


@pytest.mark.parametrize("scheme", ["W4A16g16", "W3A16", "W2A16", "W3A8"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_linears_output_error_is_below_that_of_rounding_to_nearest(
    build_tiny, tokens, family, scheme
) -> None:
    model = build_tiny(family)
    result = quantized(model, tokens, scheme)
    for record in result.records:
        for role in spec_of(model).linears:
            error, nearest = (
                record.extras[f"{name}.{role}"] for name in ("output_error", "output_error_nearest")
            )
            assert 0 < error < nearest, (record.index, role)
    assert not result.notes
    (rtn,) = reconstruct_lanes(model, tokens, [make_lane(model, "rtn", scheme)])
    assert result.records[-1].accumulated_error < rtn.records[-1].accumulated_error


def nearest(weight: torch.Tensor, clipping: tuple | None, scheme: Scheme) -> torch.Tensor:
    """Each group's weights at their nearest level over its own or its clipped range, group by group, in float64."""
    size, rounded = scheme.group_size or weight.shape[1], torch.empty_like(weight)
    for g in range(weight.shape[1] // size):
        w = weight[:, g * size : (g + 1) * size]
        low, high = w.min(1).values.clamp(max=0), w.max(1).values.clamp(min=0)
        if clipping is not None:
            upper, lower = (1 / (1 + (-logits[:, g].double()).exp()) for logits in clipping)
            low, high = low * lower, high * upper
        scale = ((high - low) / (2**scheme.wbits - 1)).half().double()
        zero = (-low / scale).round()
        codes = ((w / scale[:, None]).round() + zero[:, None]).clamp(0, 2**scheme.wbits - 1)
        rounded[:, g * size : (g + 1) * size] = (codes - zero[:, None]) * scale[:, None]
    return rounded


@pytest.mark.parametrize(
    ("family", "method", "scheme", "options"),
    [
        ("llama", "gptq", "W3A16g16", {}),
        ("llama", "smoothquant+gptq", "W3A8", {}),
        ("opt", "awq+gptq", "W3A16g16", {"search_tokens": 64}),
        ("opt", "omniquant+gptq", "W2A16g16", {"epochs": 2}),
        ("llama", "affinequant+gptq", "W4A4", {"epochs": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recorded_errors_of_both_roundings_are_those_of_a_float64_computation(
    build_tiny, tokens, monkeypatch, family, method, scheme, options
) -> None:
    """Under the same transform and clipping, on inputs of the quantized path, without engine or quantizer."""
    folded, own = [], GPTQ._round

    def spy(self, weight, *args):
        folded.append(weight.double())
        return own(self, weight, *args)

    monkeypatch.setattr(GPTQ, "_round", spy)
    model = build_tiny(family)
    (result,) = reconstruct_lanes(model, tokens, [make_lane(model, method, scheme, **options)])
    spec, parsed = spec_of(model), Scheme.parse(scheme)
    for index, record in enumerate(result.records):
        state = result.state(index)
        weights = {role: folded.pop(0) for roles in spec.shared_inputs for role in roles}
        moments = direct_moments(model, tokens, result, index, {r: w.float() for r, w in weights.items()}, ())
        for role, weight in weights.items():
            logits = [state.learned.get(f"clipping.{end}.{role}") for end in ("upper", "lower")]
            clipping = None if logits[0] is None else tuple(logits)
            assert (clipping is not None) == (method.split("+")[0] in ("awq", "omniquant", "affinequant"))

            def error(change: torch.Tensor, moment: torch.Tensor = moments[role]) -> float:
                return sum(float(row @ moment @ row) for row in change)

            for name, rounded in (
                ("output_error", naive_dequantize(state.linears[role]).double()),
                ("output_error_nearest", nearest(weight, clipping, parsed)),
            ):
                expected = error(weight - rounded) / error(weight)
                assert record.extras[f"{name}.{role}"] == pytest.approx(expected, rel=2e-3), (
                    index,
                    name,
                    role,
                )


def test_raised_damping_and_lost_races_are_notes_of_the_row(tiny_llama, tokens, monkeypatch) -> None:
    gather = Stream.second_moments

    def spoiled(self, block, roles, inputs):
        moments = gather(self, block, roles, inputs)
        lowest = torch.linalg.eigvalsh(moments["o"].double())[0]
        less = float(lowest + 0.05 * moments["o"].diagonal().mean())
        return moments | {"o": moments["o"] - less * torch.eye(len(moments["o"]))}

    monkeypatch.setattr(Stream, "second_moments", spoiled)
    notes = quantized(tiny_llama, tokens).notes
    assert "block 0 o: gptq raised its damping to 0.08, the Hessian was not positive definite" in notes
    assert all(" o: " in note for note in notes)


@pytest.mark.parametrize(
    "options", [{"true_sequential": True}, {"act_order": True}, {"range_search": True}], ids=str
)
def test_options_change_the_codes(tiny_llama, tokens, options) -> None:
    plain, changed = quantized(tiny_llama, tokens), quantized(tiny_llama, tokens, **options)
    assert differences(plain, changed)


def test_a_chunk_is_only_speed(tiny_llama, tokens) -> None:
    one, other = (quantized(tiny_llama, tokens, "W4A16g16", column_chunk=c) for c in (128, 16))
    codes = [(r.state(0).linears["q"].codes == s.state(0).linears["q"].codes) for r, s in [(one, other)]]
    assert float(codes[0].float().mean()) > 0.99  # float32 sums in another order


def test_act_order_brings_static_groups_and_is_refused_without_them(tiny_llama) -> None:
    spec = spec_of(tiny_llama)
    grouped, rows = Scheme.parse("W4A16g16"), Scheme.parse("W4A16")
    assert GPTQ(act_order=True).resolve(grouped, spec).static_groups is True
    assert GPTQ().resolve(grouped, spec).static_groups is False
    GPTQ(act_order=True, static_groups=False).check(rows, spec)
    with pytest.raises(
        UnsupportedSchemeError, match="Leave static_groups out, or use a scheme without groups"
    ):
        GPTQ(act_order=True, static_groups=False).check(grouped, spec)
