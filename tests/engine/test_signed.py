"""Signed descent against the same steps written out, and its promise: never worse than rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qbench.engine import signed
from qbench.engine.hidden import HiddenStates
from qbench.engine.optimize import Windows
from qbench.engine.plan import LearnedRounding
from qbench.engine.settings import EngineSettings
from qbench.engine.signed import SignSGD, fit_rounding
from qbench.errors import NumericalError
from qbench.quant.grid import Grid
from qbench.quant.offsets import Offsets
from qbench.quant.uniform import extremes, round_to_nearest
from qbench.scheme import Scheme
from tests.blocks import Case, build_case

CPU = torch.device("cpu")
WINDOWS = 6


class Problem:
    """A block, its quantized-path inputs and its full-precision outputs."""

    def __init__(self, case: Case, scheme: str):
        self.case, self.scheme = case, Scheme.parse(scheme)
        self.grid = Grid(self.scheme.wbits, self.scheme.symmetric, self.scheme.group_size)
        self.inputs = case.hidden + 0.05 * torch.randn_like(case.hidden)

    def states(self, values: Tensor) -> HiddenStates:
        states = HiddenStates(tuple(values.shape), CPU, "cpu", values.dtype)
        states.write(0, values)
        return states

    def offsets(self) -> Offsets:
        weights = self.case.tensors().weight
        return Offsets(weights, {role: extremes(w, self.grid) for role, w in weights.items()}, self.grid)

    def fit(self, offsets: Offsets, rounding: LearnedRounding, seed: int = 0, **settings: object):
        windows = Windows(self.states(self.inputs), self.states(self.case.expected))
        prepared = self.case.prepared().quantize_operands(self.scheme)
        return fit_rounding(
            prepared, offsets, rounding, self.case.tensors(), windows, self.case.kwargs,
            EngineSettings(**({"device": CPU} | settings)), seed, lambda turn, turns, loss: None,
        )  # fmt: skip

    def loss(self, offsets: Offsets, windows: list[int]) -> Tensor:
        tensors = self.case.tensors()
        tensors.weight = {role: offsets.fake_quantize(role) for role in tensors.weight}
        prepared = self.case.prepared().quantize_operands(self.scheme).load(tensors)
        return functional.mse_loss(
            prepared(self.inputs[windows], **self.case.kwargs), self.case.expected[windows]
        )


@pytest.fixture
def problem(build_tiny, tokens) -> Problem:
    return Problem(build_case(build_tiny, "llama", tokens[:WINDOWS], torch.float32), "W3A8")


def test_sign_sgd_moves_every_entry_by_the_rate_of_its_group() -> None:
    first, second = torch.zeros(3, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = SignSGD(
        [{"params": [first], "lr": torch.tensor(0.5)}, {"params": [second], "lr": torch.tensor(0.1)}]
    )
    first.grad, second.grad = torch.tensor([3.0, -1e-9, 0.0]), torch.tensor([-7.0, 7.0])
    optimizer.step()
    assert first.tolist() == [-0.5, 0.5, 0.0]
    assert second.tolist() == pytest.approx([1.1, 0.9])


def test_the_fit_is_the_loop_written_out(problem: Problem) -> None:
    """Rates decay linearly, the loss belongs to the state before the step, the lowest one's state is kept."""
    iterations, batch, lr, factor_lr = 7, 2, 0.1, 0.05
    by_hand = problem.offsets()
    generator = torch.Generator().manual_seed(3)
    batches: list[list[int]] = []
    while len(batches) < iterations:
        order = torch.randperm(WINDOWS, generator=generator).tolist()
        batches += [order[i : i + batch] for i in range(0, WINDOWS, batch)]
    best, kept, losses = float("inf"), {}, []
    for k in range(iterations):
        for group in (by_hand.upper, by_hand.lower):
            for p in group.values():
                p.data.clamp_(0, 1)
        loss = problem.loss(by_hand, batches[k])
        losses.append(float(loss.detach()))
        if losses[-1] < best:
            best, kept = losses[-1], {n: p.detach().clone() for n, p in by_hand.named_parameters()}
        named = dict(by_hand.named_parameters())
        for (name, p), g in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
            rate = (lr if name.startswith("offset") else factor_lr) * (1 - k / iterations)
            p.data -= rate * g.sign()

    found = problem.offsets()
    report = problem.fit(found, LearnedRounding(iterations, lr, factor_lr, batch), seed=3)
    assert report.losses == pytest.approx(losses, rel=1e-5)
    assert report.extras["rounding_gain"] > 0
    for name, p in found.named_parameters():
        same = (p - kept[name]).abs() < 1e-6
        assert same.float().mean() > 0.999, (
            name
        )  # a gradient of nearly zero may change its sign in the last digit


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_take_the_same_steps(problem: Problem, micro_batch: int) -> None:
    whole, split = problem.offsets(), problem.offsets()
    rounding = LearnedRounding(4, 0.1, 0.1, 4)
    losses = problem.fit(whole, rounding).losses
    assert problem.fit(split, rounding, micro_batch=micro_batch).losses == pytest.approx(losses, rel=1e-4)
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        assert ((one - other).abs() < 1e-6).float().mean() > 0.99


@pytest.mark.parametrize("lr", [0.02, 0.1, 40.0], ids=["small steps", "large steps", "absurd steps"])
def test_the_block_is_never_worse_than_rounded_to_nearest(problem: Problem, lr: float) -> None:
    offsets = problem.offsets()
    everything = list(range(WINDOWS))
    nearest = float(problem.loss(offsets, everything).detach())
    report = problem.fit(offsets, LearnedRounding(12, lr, lr, 2))
    found = float(problem.loss(offsets, everything).detach())
    assert found <= nearest * (1 + 1e-6)
    assert report.extras["rounding_gain"] == pytest.approx(1 - found / nearest, abs=1e-5)


def test_where_nothing_better_was_found_the_codes_are_those_of_rounding_to_nearest(
    problem: Problem, monkeypatch
) -> None:
    monkeypatch.setattr(signed._Best, "restore", lambda self: [p.data.fill_(0.3) for p in self.parameters])
    offsets = problem.offsets()
    assert problem.fit(offsets, LearnedRounding(2, 0.1, 0.1, 2)).extras["rounding_gain"] == 0
    for role, weight in problem.case.tensors().weight.items():
        nearest = round_to_nearest(weight, *extremes(weight, problem.grid), problem.grid)
        assert torch.equal(offsets.quantize(role).codes, nearest.codes)


def test_ranges_can_be_left_alone(problem: Problem) -> None:
    offsets = problem.offsets()
    problem.fit(offsets, LearnedRounding(12, 0.05, 0.0, 8))
    assert all(bool((factor == 1).all()) for factor in (*offsets.upper.values(), *offsets.lower.values()))
    assert any(bool((v != 0).any()) for v in offsets.offset.values())


def test_windows_are_drawn_without_replacement_and_anew_when_too_few_are_left() -> None:
    draw = signed._draw(5, 2, seed=1)
    batches = [next(draw) for _ in range(6)]
    for first in range(0, 6, 2):
        pair = batches[first] + batches[first + 1]
        assert len(set(pair)) == 4 and set(pair) <= set(range(5))
    assert [next(signed._draw(5, 2, seed=1))] == batches[:1]
    assert len({tuple(b) for b in batches}) > 2


def test_a_loss_that_is_not_finite_stops_the_lane(problem: Problem) -> None:
    problem.inputs[2] = torch.nan
    with pytest.raises(NumericalError, match="became nan"):
        problem.fit(problem.offsets(), LearnedRounding(4, 0.1, 0.1, 6))
