"""The script that holds the fast path against the reference: what it calls "the same parameters" are the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.same_answer import AtParameters
from qbench.engine.lane import Lane
from tests.tiny_runs import make_lane, reconstruct_lanes


@pytest.mark.parametrize("method", ["omniquant", "affinequant"])
@pytest.mark.parametrize("scheme", ["W3A16", "W4A4"])
def test_a_lane_at_the_parameters_of_another_ends_with_its_integers(
    tiny_llama, tokens: torch.Tensor, method: str, scheme: str
) -> None:
    (trained,) = reconstruct_lanes(tiny_llama, tokens[:2], [make_lane(tiny_llama, method, scheme, epochs=3)])
    fresh = make_lane(tiny_llama, method, scheme, epochs=3)
    fixed = Lane("at parameters", AtParameters(fresh.planner, trained), fresh.scheme)
    (found,) = reconstruct_lanes(tiny_llama, tokens[:2], [fixed])
    assert found.codes == trained.codes
    assert [len(record.losses) for record in found.records] == [1] * len(trained)
