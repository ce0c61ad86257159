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
from tests.tiny_runs import differences, make_lane, reconstruct_lanes, spec_of


def quantized(model, ids, scheme="W3A16", **options):
    return reconstruct_lanes(model, ids, [make_lane(model, "gptq", scheme, **options)])[0]


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"true_sequential": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_each_linear_is_rounded_with_the_moment_of_its_input(
    build_tiny, tokens, monkeypatch, family, options
) -> None:
    moments = []
    gather = Stream.second_moment

    def spy(*args):
        moments.append(gather(*args))
        return moments[-1].clone()

    monkeypatch.setattr(Stream, "second_moment", spy)
    model = build_tiny(family)
    state = quantized(model, tokens, "W3A16g16", **options).state(0)
    spec, block = spec_of(model), blocks_of(model)[0]
    options = {k: v for k, v in options.items() if k == "act_order"}
    options["static_groups"] = options.get("act_order", False)
    for roles, moment in zip(spec.shared_inputs, moments, strict=False):
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


def test_raised_damping_and_lost_races_are_notes_of_the_row(tiny_llama, tokens, monkeypatch) -> None:
    gather = Stream.second_moment

    def spoiled(self, block, role, inputs):
        moment = gather(self, block, role, inputs)
        if role != "o":
            return moment
        lowest = torch.linalg.eigvalsh(moment.double())[0]
        return moment - float(lowest + 0.05 * moment.diagonal().mean()) * torch.eye(len(moment))

    monkeypatch.setattr(Stream, "second_moment", spoiled)
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
