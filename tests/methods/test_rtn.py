"""RTN is the quantizer's formula and nothing else: every number here is computed a second time, group by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from qbench.methods.rtn import RTN
from tests.blocks import blocks_of
from tests.tiny_runs import make_lane, naive_dequantize, reconstruct_lanes, spec_of


def naive_codes(row: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, float, int]:
    """Codes, scale and zero point of one group; the scale is stored in float16 and used as it is stored."""
    low, high, qmax = min(row.min(), 0), max(row.max(), 0), 2**bits - 1
    if symmetric:
        scale = np.float32(np.float16(max(-low, high) / np.float32(2 ** (bits - 1) - 1)))
        zero = 2 ** (bits - 1)
    else:
        scale = np.float32(np.float16((high - low) / np.float32(qmax)))
        zero = int(np.clip(np.round(-low / scale), 0, qmax))
    return np.clip(np.round(row / scale) + zero, 0, qmax), scale, zero


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    ("scheme", "bits", "size", "symmetric"),
    [
        ("W4A16", 4, None, False),
        ("W3A16g16", 3, 16, False),
        ("W2A4g8", 2, 8, False),
        ("W8A8-sym", 8, None, True),
    ],
)
def test_codes_are_the_formula_group_by_group(
    build_tiny, tokens, family, scheme, bits, size, symmetric
) -> None:
    model = build_tiny(family)
    (result,) = reconstruct_lanes(model, tokens[:1], [make_lane(model, "rtn", scheme)])
    for i, block in enumerate(blocks_of(model)):
        for role, path in spec_of(model).linears.items():
            weight = block.get_submodule(path).weight.detach().numpy()
            found = result.state(i).linears[role]
            width = size or weight.shape[1]
            for row in range(weight.shape[0]):
                for group in range(weight.shape[1] // width):
                    columns = slice(group * width, (group + 1) * width)
                    codes, scale, zero = naive_codes(weight[row, columns], bits, symmetric)
                    assert float(found.scale[row, group]) == scale
                    assert int(found.zero_point[row, group]) == zero
                    assert np.array_equal(found.codes[row, columns].numpy(), codes)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_nothing_but_the_weights_of_linears_changes(build_tiny, tokens, family) -> None:
    model = build_tiny(family)
    (result,) = reconstruct_lanes(model, tokens[:1], [make_lane(model, "rtn", "W3A16")])
    spec = spec_of(model)
    for i, block in enumerate(blocks_of(model)):
        state = result.state(i)
        assert not state.learned and not state.transforms and not state.record.losses
        for role, path in spec.linears.items():
            bias = block.get_submodule(path).bias
            assert (state.rest.bias[role] is None) == (bias is None)
            assert bias is None or torch.equal(state.rest.bias[role], bias)
        for name, path in spec.norms.items():
            norm = block.get_submodule(path)
            assert torch.equal(state.rest.norm_weight[name], norm.weight)
            assert state.rest.norm_matrix[name] is None


def test_every_bit_more_makes_the_error_smaller(tiny_llama, tokens) -> None:
    lanes = [make_lane(tiny_llama, "rtn", f"W{bits}A16") for bits in (2, 3, 4, 5, 6, 7, 8)]
    errors = [r.records[-1].accumulated_error for r in reconstruct_lanes(tiny_llama, tokens, lanes)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and errors[-1] < 1e-3


def test_quantized_activations_change_the_error_and_not_the_codes(tiny_llama, tokens) -> None:
    lanes = [make_lane(tiny_llama, "rtn", scheme) for scheme in ("W4A16", "W4A4")]
    plain, quantized = reconstruct_lanes(tiny_llama, tokens, lanes)
    for i in range(len(plain)):
        for role, linear in plain.state(i).linears.items():
            assert torch.equal(naive_dequantize(linear), naive_dequantize(quantized.state(i).linears[role]))
    assert quantized.records[0].local_error > 1.5 * plain.records[0].local_error


def test_it_needs_no_statistics_and_has_no_options() -> None:
    assert not RTN().needs.activation_stats and not RTN.model_fields
    with pytest.raises(ValidationError):
        RTN(alpha=0.5)
