"""What a calibrated rounding rule is given: second moments on the quantized path, ranges, order; and what it leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from qbench.engine.checkpoint import Checkpoint
from qbench.engine.lane import Lane, LaneResult
from qbench.engine.plan import BlockPlan, BlockView, CalibratedRounding, Needs, Rounded
from qbench.engine.settings import EngineSettings
from qbench.engine.state import BlockState
from qbench.quant.clipping import Clipping
from qbench.quant.grid import Grid
from qbench.quant.uniform import extremes, round_to_nearest
from qbench.scheme import Scheme
from qbench.transforms.transform import DiagonalTransform
from tests.blocks import blocks_of
from tests.tiny_runs import differences, naive_attention, naive_block, reconstruct_lanes, spec_of

GROUPS = {
    "llama": [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]],
    "opt": [["q", "k", "v"], ["o"], ["fc1"], ["fc2"]],
}


@dataclass
class Recorder:
    """Rounds to nearest and remembers what it was called with, call by call."""

    sequential: bool = False
    clip: float | None = None
    transform: bool = False
    needs: Needs = field(default_factory=Needs)
    calls: list[tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]] = field(default_factory=list)

    def plan(self, view: BlockView) -> BlockPlan:
        def rule(weight: Tensor, moment: Tensor, ranges, grid: Grid) -> Rounded:
            self.calls.append((weight.clone(), moment.clone(), ranges))
            rounded = round_to_nearest(weight, *(ranges or extremes(weight, grid)), grid)
            return Rounded(rounded, ["a remark"] if len(self.calls) == 2 else [], {"calls": len(self.calls)})

        plan = BlockPlan(rounding=CalibratedRounding(rule, self.sequential))
        if self.clip is not None:
            plan.clipping = Clipping(view.spec.shapes, view.grid)
            for logit in plan.clipping.parameters():
                logit.data.fill_(self.clip)
        if self.transform:
            scale = torch.linspace(0.5, 2, view.spec.hidden_size)
            plan.transforms = [DiagonalTransform(view.spec, view.spec.site("mlp_in"), scale)]
        return plan


def run(
    model: nn.Module, ids: Tensor, scheme: str, planner: Recorder, checkpoint=None, **settings
) -> LaneResult:
    (result,) = reconstruct_lanes(
        model, ids, [Lane("recorder", planner, Scheme.parse(scheme), checkpoint)], **settings
    )
    assert result.error is None
    return result


@torch.no_grad()
def direct_moments(
    model: nn.Module,
    ids: Tensor,
    result: LaneResult,
    index: int,
    weights: dict[str, Tensor],
    rounded: Sequence[str],
) -> dict[str, Tensor]:
    """E[xᵀx] in float64 of what each linear of block `index` multiplies, without the engine.

    Blocks before it are the result's; in it the linears in `rounded` are too, the others have `weights`.
    """
    model, spec, scheme = copy.deepcopy(model), spec_of(model), result.lane.scheme
    blocks = blocks_of(model)
    for i in range(index):
        blocks[i] = naive_block(blocks[i], spec, result.state(i), scheme)
    state = result.state(index)
    mixed = {role: state.linears[role] if role in rounded else weights[role] for role in spec.linears}
    blocks[index] = naive_block(blocks[index], spec, BlockState(mixed, state.rest), scheme)
    moments = {role: torch.zeros(cols, cols).double() for role, (_, cols) in spec.shapes.items()}
    for role, path in spec.linears.items():

        def add(_: nn.Module, args: tuple[Tensor], role: str = role) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            moments[role] += x.T @ x / ids.numel()

        blocks[index].get_submodule(path).register_forward_pre_hook(add)  # behind the quantizing hook
    with naive_attention(model, scheme):
        for window in ids:
            model(input_ids=window[None], use_cache=False)
    return moments


def by_role(spec_roles: Sequence[str], calls: list) -> list[dict[str, tuple]]:
    """The calls of each block, by role: they come in the order of data flow."""
    n = len(spec_roles)
    return [dict(zip(spec_roles, calls[i : i + n], strict=True)) for i in range(0, len(calls), n)]


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "true sequential"])
@pytest.mark.parametrize("scheme", ["W3A16", "W3A8g16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_moments_are_those_of_the_quantized_path(
    build_tiny, tokens, monkeypatch, family, scheme, sequential
) -> None:
    monkeypatch.setattr(EngineSettings, "forward_batch", lambda self, seq_len: 3)  # several batches
    model, planner = build_tiny(family), Recorder(sequential, transform=True)
    result = run(model, tokens, scheme, planner)
    roles = list(spec_of(model).linears)
    for index, calls in enumerate(by_role(roles, planner.calls)):
        weights = {role: weight for role, (weight, _, _) in calls.items()}
        done: list[str] = []
        for group in GROUPS[family]:
            moments = direct_moments(model, tokens, result, index, weights, done if sequential else ())
            for role in (role for role in roles if role in group and role not in done):
                assert deviation(calls[role][1], moments[role]) < 1e-4, (index, role)
            done += [role for role in roles if role in group]
        assert done == roles


def test_sequential_moments_differ_from_those_at_once_behind_the_first_linears(tiny_llama, tokens) -> None:
    recorders = Recorder(False), Recorder(True)
    for planner in recorders:
        run(tiny_llama, tokens, "W2A16", planner)
    roles = list(spec_of(tiny_llama).linears)
    first, second = (by_role(roles, planner.calls)[0] for planner in recorders)
    same = {role for role in roles if torch.equal(first[role][1], second[role][1])}
    assert same == {"q", "k", "v"}


@pytest.mark.parametrize(
    "settings", [{"placement": "disk"}, {"autocast": torch.bfloat16}], ids=["disk", "bfloat16"]
)
def test_moments_do_not_depend_on_where_hidden_states_live_and_little_on_the_arithmetic(
    tiny_llama, tokens, settings
) -> None:
    plain, other = Recorder(), Recorder()
    run(tiny_llama, tokens, "W4A8", plain)
    run(tiny_llama, tokens, "W4A8", other, **settings)
    for (_, one, _), (_, two, _) in zip(plain.calls, other.calls, strict=True):
        assert two.dtype == torch.float32
        assert deviation(one, two.double()) <= (0 if "placement" in settings else 0.05)


def test_clipped_ranges_reach_the_rule_and_none_where_there_is_no_clipping(tiny_llama, tokens) -> None:
    free, clipped = Recorder(), Recorder(clip=0.0)  # σ(0) = ½
    run(tiny_llama, tokens, "W3A16g16", free)
    run(tiny_llama, tokens, "W3A16g16", clipped)
    assert all(ranges is None for _, _, ranges in free.calls)
    for weight, _, (low, high) in clipped.calls:
        expected = extremes(weight, Grid(3, group_size=16))
        assert torch.allclose(low, expected[0] / 2) and torch.allclose(high, expected[1] / 2)


def test_notes_say_which_linear_and_figures_are_kept_by_linear(tiny_llama, tokens, tmp_path) -> None:
    result = run(tiny_llama, tokens, "W3A16", Recorder(), Checkpoint(tmp_path, "key"))
    assert result.notes == ["block 0 k: a remark"]
    assert result.records[0].extras["calls.q"] == 1 and result.records[1].extras["calls.down"] == 14
    again = run(tiny_llama, tokens, "W3A16", Recorder(), Checkpoint(tmp_path, "key"))
    assert again.notes == result.notes and not differences(again, result)


def test_weights_left_at_16_bits_are_not_rounded(tiny_llama, tokens) -> None:
    planner = Recorder()
    result = run(tiny_llama, tokens, "W16A4", planner)
    assert not planner.calls and isinstance(result.state(0).linears["q"], Tensor)


def test_what_lies_behind_the_linear_is_not_run(tiny_llama, tokens, monkeypatch) -> None:
    from qbench.engine.prepare import PreparedLinear

    counts: dict[PreparedLinear, int] = {}
    operand: Callable = PreparedLinear.operand

    def counted(self: PreparedLinear, x: Tensor) -> Tensor:
        counts[self] = counts.get(self, 0) + 1
        return operand(self, x)

    monkeypatch.setattr(PreparedLinear, "operand", counted)
    run(tiny_llama, tokens[:1], "W4A8", Recorder())
    # per block: full-precision path, own path, local error; and for the moments q once more, down in no other's pass
    by_module = sorted(counts.values())
    assert by_module[:2] == [4, 4] and len(by_module) == 14
