"""Initial scales against SmoothQuant's equation 4, channel by channel."""

from __future__ import annotations

import pytest
import torch

from qbench.transforms.initial import reduce_to_groups, smooth_scale


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_scale_is_activation_range_to_alpha_over_weight_range_to_the_rest(alpha: float) -> None:
    absmax = torch.rand(7, dtype=torch.float64) * 20
    weights = [torch.randn(5, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)]
    expected = []
    for j in range(7):
        largest = max(abs(row[j]) for weight in weights for row in weight.tolist())
        expected.append(absmax[j].item() ** alpha / largest ** (1 - alpha))
    assert torch.allclose(smooth_scale(absmax, weights, alpha), torch.tensor(expected).double(), rtol=1e-6)


def test_a_large_negative_weight_counts() -> None:
    """AffineQuant's code takes max W_ij without the absolute value and would find 0.1 here."""
    scale = smooth_scale(torch.ones(1), [torch.tensor([[-4.0], [0.1]])], 0.5)
    assert scale.item() == pytest.approx(0.5)


def test_dead_channels_get_a_finite_positive_scale() -> None:
    scale = smooth_scale(torch.tensor([0.0, 1.0, 0.0]), [torch.tensor([[0.0, 0.0, 2.0]])], 0.5)
    assert scale[0].item() == pytest.approx(1.0)  # both at their floor of 1e-5
    assert scale[1].item() == pytest.approx(1e-5**-0.5)
    assert scale.isfinite().all() and scale.min() >= 1e-5


def test_scale_itself_is_at_least_1e_5() -> None:
    assert smooth_scale(torch.zeros(1), [torch.full((1, 1), 1e6)], 1.0).item() == pytest.approx(1e-5)
    assert smooth_scale(torch.zeros(1), [torch.full((1, 1), 1e6)], 0.5).item() == pytest.approx(1e-5)


def test_query_heads_of_one_group_reduce_by_their_maximum() -> None:
    per_channel = torch.tensor([1.0, 2.0, 5.0, 0.0, 3.0, 3.0, 9.0, 4.0])  # 4 heads of 2, 2 per group
    assert reduce_to_groups(per_channel, 2, 2).tolist() == [5.0, 2.0, 9.0, 4.0]
    assert reduce_to_groups(per_channel, 4, 1) is per_channel
