"""The engine's AffineQuant and OmniQuant against the same loop written without it, in float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.naive_affinequant import Recipe, quantize
from qbench.quant.uniform import QuantizedWeight
from tests.tiny_runs import make_lane, reconstruct_lanes

CASES = {
    "affinequant-3bit": (Recipe(bits=3, group_size=None, epochs=3, sf=0.1, absolute=True), "W3A16"),
    "affinequant-2bit-groups": (Recipe(bits=2, group_size=8, epochs=4, sf=0.01, absolute=True), "W2A16g8"),
    "affinequant-auxiliary": (
        Recipe(bits=2, group_size=16, epochs=2, sf=1.0, aug_loss=True, absolute=True), "W2A16g16",
    ),
    "omniquant": (Recipe(bits=2, group_size=8, epochs=3, let=False, absolute=True), "W2A16g8"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_engine_computes_the_naive_loop(build_tiny, tokens, name: str) -> None:
    recipe, scheme = CASES[name]
    model, tokens = build_tiny("llama", num_key_value_heads=4).double(), tokens[:4]
    options = {"epochs": recipe.epochs, "aug_loss": recipe.aug_loss}
    if recipe.let:
        method = "affinequant"
        options |= {"query_key": "published", "truncate": "all", "sf": recipe.sf, "use_ln_matrix": True}
    else:
        method = "omniquant"
    blocks, curves = quantize(model, tokens, recipe, torch.float64)
    lane = make_lane(model, method, scheme, **options)
    (result,) = reconstruct_lanes(model, tokens, [lane], dtype=torch.float64, zero_in_range=False)
    assert result.error is None
    for i, (curve, (_, (weights, biases, _))) in enumerate(zip(curves, blocks, strict=True)):
        state = result.state(i)
        # The first block's inputs are equal. What follows sees float16 scales here, exact ones there.
        assert state.record.losses == pytest.approx(curve, rel=1e-6 if i == 0 else 5e-2)
        for role, linear in state.linears.items() if i == 0 else ():
            assert isinstance(linear, QuantizedWeight)
            off = (linear.dequantize().double() - weights[role]).abs()
            assert (off > 1e-3 * weights[role].abs().amax()).double().mean() < 1e-2, role  # codes at an edge
        for role, bias in biases.items() if i == 0 else ():
            assert state.rest.bias[role] is not None
            torch.testing.assert_close(state.rest.bias[role].double(), bias, rtol=1e-4, atol=1e-6)


def test_a_wrong_recipe_is_seen(build_tiny, tokens) -> None:
    model = build_tiny("llama", num_key_value_heads=4).double()
    _, curves = quantize(model, tokens, Recipe(bits=3, group_size=None, epochs=2, sf=0.1, absolute=True))
    lane = make_lane(model, "affinequant", "W3A16", epochs=2, sf=0.11, query_key="published", truncate="all")
    (result,) = reconstruct_lanes(model, tokens, [lane], dtype=torch.float64, zero_in_range=False)
    assert result.state(0).record.losses[-1] != pytest.approx(curves[0][-1], rel=1e-5)
