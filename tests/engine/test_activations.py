"""Statistics against a direct computation on the inputs of the model's own linears, window by window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qbench.engine.activations import ActivationStats, Observer
from tests.blocks import VARIANTS, Case, build_case

WINDOWS = 6


@pytest.fixture(params=VARIANTS)
def case(request, build_tiny, tokens) -> Case:
    return build_case(build_tiny, request.param, tokens[:WINDOWS], torch.float32)


def inputs_by_role(case: Case) -> dict[str, list[Tensor]]:
    """Inputs of the original block's linears, [tokens, in] for each window run alone."""
    seen: dict[str, list[Tensor]] = {role: [] for role in case.spec.linears}
    handles = [
        case.block.get_submodule(path).register_forward_pre_hook(
            lambda _, args, role=role: seen[role].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for role, path in case.spec.linears.items()
    ]
    with torch.no_grad():
        for window in case.hidden:
            case.block(window[None], **case.kwargs)
    for handle in handles:
        handle.remove()
    return seen


def observe(case: Case, batches: list[int]) -> dict[str, ActivationStats]:
    prepared = case.prepared().load(case.tensors())
    start = 0
    with Observer(prepared, case.hidden.shape[1]) as observer, torch.no_grad():
        for size in batches:
            prepared(case.hidden[start : start + size], **case.kwargs)
            start += size
    assert start == WINDOWS
    return observer.stats


@pytest.mark.parametrize(
    "batches", [[1] * WINDOWS, [WINDOWS], [4, 2]], ids=["one by one", "at once", "uneven"]
)
def test_statistics_match_a_direct_computation_however_windows_are_batched(
    case: Case, batches: list[int]
) -> None:
    stats = observe(case, batches)
    inputs = inputs_by_role(case)
    assert stats.keys() == inputs.keys()
    for role, windows in inputs.items():
        assert len(windows) == WINDOWS
        absmax = torch.stack(windows).abs().amax((0, 1))
        centre = None
        for window in windows:  # OmniQuant's generate_act_shifts: 0.99·old + 0.01·new
            middle = (window.max(0).values + window.min(0).values) / 2
            centre = middle if centre is None else 0.99 * centre + 0.01 * middle
        assert torch.allclose(stats[role].absmax, absmax, rtol=1e-5, atol=1e-6), role
        assert torch.allclose(stats[role].centre, centre, rtol=1e-4, atol=1e-5), role
        absmean = torch.stack(windows).double().abs().mean((0, 1)).float()
        assert torch.allclose(stats[role].absmean, absmean, rtol=1e-5, atol=1e-6), role


def test_opts_mlp_sees_all_tokens_in_one_matrix_and_is_still_split_into_windows(build_tiny, tokens) -> None:
    case = build_case(build_tiny, "opt", tokens[:WINDOWS], torch.float32)
    shapes = []
    prepared = case.prepared().load(case.tensors())
    prepared.linears["fc1"].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        prepared(case.hidden, **case.kwargs)
    assert shapes == [
        (WINDOWS * tokens.shape[1], 32)
    ]  # what makes the test above one of two-dimensional inputs


def test_no_hook_is_left_and_statistics_outlive_the_context(case: Case) -> None:
    prepared = case.prepared().load(case.tensors())
    with Observer(prepared, case.hidden.shape[1]) as observer, torch.no_grad():
        prepared(case.hidden, **case.kwargs)
    assert not any(module._forward_pre_hooks for module in prepared.linears.values())
    before = {role: s.absmax.clone() for role, s in observer.stats.items()}
    with torch.no_grad():
        prepared(100 * case.hidden, **case.kwargs)
    assert all(torch.equal(observer.stats[role].absmax, before[role]) for role in before)


def test_hooks_go_away_after_an_error(case: Case) -> None:
    prepared = case.prepared().load(case.tensors())
    with pytest.raises(ZeroDivisionError), Observer(prepared, 24):
        _ = 1 / 0
    assert not any(module._forward_pre_hooks for module in prepared.linears.values())
