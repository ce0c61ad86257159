"""Where transforms start on a concrete block: the published formula, with query heads reduced to their group."""

from __future__ import annotations

import pytest
import torch

from qbench.engine.activations import ActivationStats, Observer
from qbench.engine.initial import initial_scale, initial_shift
from qbench.engine.plan import BlockView
from qbench.quant.grid import Grid
from qbench.scheme import Scheme
from tests.blocks import build_case


@pytest.fixture(params=["llama", "opt"])
def view(request, build_tiny, tokens) -> BlockView:
    case = build_case(build_tiny, request.param, tokens[:4], torch.float32)
    prepared = case.prepared().load(case.tensors())
    with Observer(prepared, tokens.shape[1]) as observer, torch.no_grad():
        prepared(case.hidden, **case.kwargs)
    return BlockView(0, 2, case.spec, Scheme(4), Grid(4), case.tensors(), observer.stats)


@pytest.mark.parametrize("alpha", [0.5, 0.75])
@pytest.mark.parametrize(
    ("site", "role"), [("attn_in", "q"), ("mlp_in", {"llama": "up", "opt": "fc1"})], ids=["attn_in", "mlp_in"]
)
def test_norm_sites_balance_one_consumer(view: BlockView, site: str, role, alpha: float) -> None:
    if isinstance(role, dict):
        role = role["opt" if view.spec.norm_bias else "llama"]
    absmax, largest = view.stats[role].absmax, view.tensors.weight[role].abs().max(0).values
    expected = absmax**alpha / largest ** (1 - alpha)
    assert torch.allclose(initial_scale(view, view.spec.site(site), alpha), expected, rtol=1e-5)


def test_value_site_takes_the_largest_over_the_query_heads_of_a_group(view: BlockView) -> None:
    spec = view.spec
    absmax, largest = view.stats["o"].absmax, view.tensors.weight["o"].abs().max(0).values
    expected = []
    for group in range(spec.n_kv_heads):
        for channel in range(spec.head_dim):
            heads = range(group * spec.heads_per_group, (group + 1) * spec.heads_per_group)
            a, w = (
                max(v[head * spec.head_dim + channel].item() for head in heads) for v in (absmax, largest)
            )
            expected.append((a / w) ** 0.5)
    scale = initial_scale(view, spec.site("value_out"), 0.5)
    assert torch.allclose(scale, torch.tensor(expected), rtol=1e-5)


def test_query_key_starts_at_one(view: BlockView) -> None:
    scale = initial_scale(view, view.spec.site("query_key"), 0.5)
    assert torch.equal(scale, torch.ones(view.spec.n_kv_heads * view.spec.head_dim))


def test_shifts_start_at_the_observed_centre_where_norms_have_a_bias_and_at_zero_elsewhere(
    view: BlockView,
) -> None:
    at_norm = initial_shift(view, view.spec.site("attn_in"))
    at_value = initial_shift(view, view.spec.site("value_out"))
    if view.spec.norm_bias:
        assert torch.equal(at_norm, view.stats["q"].centre) and torch.equal(at_value, view.stats["o"].centre)
        assert at_norm.abs().max() > 0
    else:
        assert torch.equal(at_norm, torch.zeros(32))
        assert torch.equal(at_value, torch.zeros(16))  # one entry per channel of the key/value heads


def test_a_dead_channel_starts_finite(view: BlockView) -> None:
    stats = {"q": ActivationStats(torch.zeros(32), torch.zeros(32))}
    dead = BlockView(0, 2, view.spec, view.scheme, view.grid, view.tensors, stats)
    scale = initial_scale(dead, view.spec.site("attn_in"), 0.5)
    assert scale.isfinite().all() and (scale > 0).all()
