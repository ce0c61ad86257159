"""The probe runs parts of a block as the block itself would, on any placement, and leaves the lane's work alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qbench.engine.activations import Observer
from qbench.engine.hidden import HiddenStates
from qbench.engine.plan import BlockView
from qbench.engine.prepare import PreparedBlock
from qbench.engine.probe import Probe
from qbench.engine.settings import EngineSettings
from qbench.quant.grid import Grid
from qbench.scheme import Scheme
from qbench.transforms.transform import DiagonalTransform
from tests.blocks import VARIANTS, Case, build_case

CPU = torch.device("cpu")


@pytest.fixture(params=VARIANTS)
def case(request, build_tiny, tokens) -> Case:
    return build_case(build_tiny, request.param, tokens, torch.float32)


def probe_of(case: Case, placement: str = "cpu") -> tuple[Probe, PreparedBlock]:
    prepared = case.prepared()
    states = HiddenStates(tuple(case.hidden.shape), CPU, placement)
    states.write(0, case.hidden)
    settings = EngineSettings(device=CPU, placement=placement)
    return Probe(prepared, case.tensors(), states, case.kwargs, settings), prepared


def parts_of(case: Case) -> list[str]:
    """Attention, the MLP where it is a module, and a linear of it."""
    return (
        ["self_attn", "fc1", "fc2"] if "fc1" in case.spec.linears else ["self_attn", "mlp", "mlp.down_proj"]
    )


@torch.no_grad()
def outputs_of(block, path: str, case: Case, windows: int) -> Tensor:
    """What a submodule gives inside the original block."""
    seen = []
    handle = block.get_submodule(path).register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    block(case.hidden[:windows], **case.kwargs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("placement", ["cpu", "disk", "device"])
def test_a_parts_error_is_the_mse_of_its_output_inside_the_block(case: Case, placement: str) -> None:
    probe, prepared = probe_of(case, placement)
    prepared.load(case.tensors()).quantize_operands(Scheme(4, 4))  # as a lane leaves it
    for path in parts_of(case):
        part = probe.part(path, tokens=5 * case.hidden.shape[1])
        assert part.error(case.tensors()) == 0
        changed = case.tensors()
        # weights behind the part's input alone: q, k, v inside attention, gate and up in an MLP, the linear itself
        roles = {"self_attn": ("q", "k", "v"), "mlp": ("gate", "up")}.get(path) or tuple(
            role for role, where in case.spec.linears.items() if where == path
        )
        generator = torch.Generator().manual_seed(1)
        original = {}
        for role in roles:
            linear = case.block.get_submodule(case.spec.linears[role])
            original[role] = linear.weight.detach().clone()
            noise = 0.05 * torch.randn(linear.weight.shape, generator=generator)
            changed.weight[role] = changed.weight[role] + noise
        before = outputs_of(case.block, path, case, 5)
        for role in roles:
            case.block.get_submodule(case.spec.linears[role]).weight.data.copy_(changed.weight[role])
        expected = float((outputs_of(case.block, path, case, 5) - before).double().square().mean())
        for role in roles:
            case.block.get_submodule(case.spec.linears[role]).weight.data.copy_(original[role])
        assert part.error(changed) == pytest.approx(expected, rel=1e-4) and expected > 0


def test_an_error_above_its_limit_is_infinite_and_not_computed_to_its_end(case: Case, monkeypatch) -> None:
    monkeypatch.setattr(EngineSettings, "forward_batch", lambda self, seq_len: 1)
    probe, _ = probe_of(case)
    part = probe.part("self_attn", tokens=10**6)
    changed = case.tensors()
    changed.weight["o"] = changed.weight["o"] * 0.5
    error = part.error(changed)
    assert part.error(changed, error * 1.001) == error
    calls = []
    handle = part._module.register_forward_hook(lambda *call: calls.append(1))
    assert part.error(changed, error / 1000) == float("inf") and len(calls) == 1
    calls.clear()
    assert part.error(changed, error * 0.999) == float("inf") and len(calls) <= len(case.hidden)
    handle.remove()


def test_a_second_moment_is_that_of_what_reaches_the_linear(case: Case, monkeypatch) -> None:
    monkeypatch.setattr(EngineSettings, "forward_batch", lambda self, seq_len: 2)  # the last batch is smaller
    probe, prepared = probe_of(case)
    prepared.load(case.tensors()).quantize_operands(Scheme(4, 4))  # as a lane leaves it
    for role, path in case.spec.linears.items():
        seen = []
        handle = case.block.get_submodule(path).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            case.block(case.hidden[:5], **case.kwargs)
        handle.remove()
        x = seen[0].reshape(-1, seen[0].shape[-1]).double()
        moment = probe.second_moment(path, tokens=5 * case.hidden.shape[1])
        assert torch.allclose(moment.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5), role


@pytest.mark.parametrize("count", [7, 20, 192, 10**6])
def test_a_sample_is_evenly_spaced_over_all_windows(case: Case, count: int, monkeypatch) -> None:
    probe, _ = probe_of(case)
    path = case.spec.linears["o"]
    whole = probe.sample(path, 10**6)
    tokens = case.hidden.shape[0] * case.hidden.shape[1]
    assert len(whole) == tokens
    monkeypatch.setattr(
        EngineSettings, "forward_batch", lambda self, seq_len: 3
    )  # batches that no stride divides
    sampled = probe.sample(path, count)
    assert torch.allclose(sampled, whole[:: max(1, tokens // count)], atol=1e-6)


def test_observing_again_gives_the_engines_statistics(case: Case) -> None:
    probe, _ = probe_of(case)
    prepared = case.prepared().load(case.tensors())
    with Observer(prepared, case.hidden.shape[1]) as observer, torch.no_grad():
        prepared(case.hidden, **case.kwargs)
    for role, stats in probe.observe().items():
        assert torch.equal(stats.absmax, observer.stats[role].absmax)
        assert torch.equal(stats.centre, observer.stats[role].centre)
        assert torch.equal(stats.absmean, observer.stats[role].absmean)


def test_the_view_behind_a_transform_is_that_of_the_transformed_block(case: Case) -> None:
    probe, _ = probe_of(case)
    view = BlockView(0, 2, case.spec, Scheme(4), Grid(4), case.tensors(), probe.observe(), probe)
    scale = torch.linspace(0.5, 2, case.spec.hidden_size)
    site = case.spec.site("attn_in")
    behind = view.after([DiagonalTransform(case.spec, site, scale)], stats=True)
    assert torch.allclose(behind.tensors.weight["q"], view.tensors.weight["q"] * scale)
    assert torch.allclose(behind.stats["q"].absmean, view.stats["q"].absmean / scale, rtol=1e-4)
    assert torch.allclose(behind.stats["o"].absmax, view.stats["o"].absmax, rtol=1e-4)
    assert not view.after([], stats=False).stats
    assert behind.probe.part("self_attn", 24).error(behind.tensors) == 0
