"""Rescaling keeps the function, in every architecture it accepts, and makes the outliers it says."""

from __future__ import annotations

import math

import pytest
import torch

from qbench.errors import UnsupportedSchemeError
from qbench.models.outliers import (
    OutlierTarget,
    add_outliers,
    channel_absmax,
    choose_factors,
    outlier_ratios,
    rescale,
    sites_of,
)

FAMILIES = ["llama", "llama-mha", "opt"]
TARGETS = {
    "attn_in": OutlierTarget(3, 20.0, 70.0),
    "mlp_in": OutlierTarget(3, 20.0, 70.0),
    "value_out": OutlierTarget(2, 6.0, 12.0),
    "mlp_out": OutlierTarget(3, 10.0, 40.0),
}


@pytest.fixture(params=FAMILIES)
def model(request, build_tiny) -> torch.nn.Module:
    changes = {"num_key_value_heads": 4} if request.param == "llama-mha" else {}
    return build_tiny(request.param.partition("-")[0], **changes).double()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("site", ["attn_in", "value_out", "mlp_in", "mlp_out"])
def test_each_site_alone_keeps_the_function(model, tokens, site: str) -> None:
    before = logits(model, tokens)
    generator = torch.Generator().manual_seed(1)
    changed = 0
    for _, block, where in sites_of(model):
        if where.name == site:
            width = block.get_submodule(where.producer).weight.shape[0]
            weights = block.get_submodule(where.consumers[0]).weight.clone()
            rescale(block, where, torch.exp(torch.randn(width, generator=generator, dtype=torch.float64)))
            changed += not torch.equal(weights, block.get_submodule(where.consumers[0]).weight)
    assert changed == 2  # blocks
    assert (logits(model, tokens) - before).abs().max() < 1e-9 * before.abs().max()


def test_all_together_keep_the_function_and_raise_the_statistics(model, tokens) -> None:
    before = logits(model, tokens)
    ratios_before = outlier_ratios(channel_absmax(model, tokens))
    applied = add_outliers(model, tokens, seed=4, targets=TARGETS)
    assert (logits(model, tokens) - before).abs().max() < 1e-9 * before.abs().max()
    ratios = outlier_ratios(channel_absmax(model, tokens))
    assert set(ratios) == set(ratios_before)
    for name, ratio in ratios.items():
        assert ratio > 1.5 * ratios_before[name], name
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")):
            # a factor of two is rounded to: at most sqrt(2) off, and the median moves a little
            assert 70 / 1.6 < ratio < 70 * 1.6, name
    assert len(applied) == 8 and all(factors for factors in applied.values())


def test_outlier_channels_of_the_norms_are_the_same_in_every_block(model, tokens) -> None:
    applied = add_outliers(model, tokens, seed=4, targets=TARGETS)
    channels = {tuple(sorted(f)) for name, f in applied.items() if name.endswith(("attn_in", "mlp_in"))}
    assert len(channels) == 1
    assert applied != add_outliers(model, tokens, seed=5, targets=TARGETS)


def test_a_value_channel_is_as_large_as_its_largest_reader(build_tiny, tokens) -> None:
    """Two query heads read each value head: channel c of value head g is columns 16g + c and 16g + 8 + c of o."""
    model = build_tiny("llama")
    size = channel_absmax(model, tokens)["model.layers.0.self_attn.o_proj"].tolist()
    targets = TARGETS | {"value_out": OutlierTarget(16, 10.0, 10.0)}
    applied = add_outliers(model, tokens, seed=4, targets=targets)["model.layers.0.value_out"]
    largest = [max(size[16 * (i // 8) + i % 8], size[16 * (i // 8) + 8 + i % 8]) for i in range(16)]
    median = sorted(largest)[7]  # torch's: the lower of the two middle ones
    for channel, factor in applied.items():
        assert factor == 2 ** max(0, round(math.log2(10 * median / largest[channel])))


def test_seed_decides(build_tiny, tokens) -> None:
    runs = [add_outliers(build_tiny("llama"), tokens, seed=s, targets=TARGETS) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_factors_are_powers_of_two_so_float32_stays_exact(build_tiny, tokens) -> None:
    model = build_tiny("llama")
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    applied = add_outliers(model, tokens, seed=4, targets=TARGETS)
    for factors in applied.values():
        assert all(math.log2(factor).is_integer() for factor in factors.values())
    after = model.model.layers[1].mlp.down_proj.weight
    for channel, factor in applied["model.layers.1.mlp_out"].items():
        assert torch.equal(after[:, channel] * factor, before[:, channel])


def test_choose_factors_reaches_its_targets() -> None:
    absmax = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 0.0, 1.0])
    factor = choose_factors(absmax, torch.tensor([0, 2, 1]), OutlierTarget(3, 8.0, 32.0))
    assert factor.tolist() == [8.0, 16.0, 32.0, 1.0, 1.0, 1.0, 1.0]  # 8, 16 and 32 times the median, 1


def test_choose_factors_never_shrinks_a_channel() -> None:
    factor = choose_factors(torch.tensor([500.0, 1.0, 1.0]), torch.tensor([0, 1]), OutlierTarget(2, 8.0, 8.0))
    assert factor.tolist() == [1.0, 8.0, 1.0]


def test_ratios_pass_over_channels_that_are_never_used() -> None:
    ratios = outlier_ratios({"a": torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 6.0]), "dead": torch.zeros(3)})
    assert ratios == {"a": 3.0, "dead": 0.0}


def test_channel_absmax_is_the_largest_input_of_each_channel(tiny_llama, tokens) -> None:
    found = channel_absmax(tiny_llama, tokens, batch_size=3)  # 8 windows: the last batch is smaller
    assert len(found) == 2 * 7
    seen: list[torch.Tensor] = []
    handle = tiny_llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, x: seen.append(x[0])
    )
    with torch.no_grad():
        tiny_llama(input_ids=tokens)
    handle.remove()
    expected = seen[0].abs().amax((0, 1)).double()
    assert torch.allclose(found["model.layers.1.mlp.down_proj"], expected, rtol=1e-4)
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {}, "not 'qwen2'"),
        ("opt", {"activation_function": "gelu"}, "gelu"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
    ],
)
def test_models_whose_function_would_change_are_refused(
    build_tiny, family: str, changes: dict, message: str
) -> None:
    with pytest.raises(UnsupportedSchemeError, match=message):
        sites_of(build_tiny(family, **changes))
