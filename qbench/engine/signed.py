"""Learn how a folded block's weights are rounded: SignSGD on the block's error over randomly drawn windows.

SignRound / AutoRound (arXiv 2309.05516) §3; reference intel/auto-round@b9f3d00. Every parameter moves by the learning
rate in the direction against its gradient's sign; the rate decays linearly to 0, which bounds each offset by half the
sum of the rates. The loss of a step is that of the state before it, and the state with the lowest loss is kept.

We differ: the losses that are compared belong to different windows, so the state kept can be worse than rounding to
nearest over all of them. Here the two are compared on every window at the end, and the better one stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qbench.engine.graph import capture_step
from qbench.engine.losses import mse
from qbench.engine.optimize import EpochCallback, FitReport, Learned, Step, Windows, require_finite
from qbench.engine.plan import LearnedRounding, LossInputs
from qbench.engine.prepare import PreparedBlock
from qbench.engine.settings import EngineSettings
from qbench.quant.offsets import Offsets
from qbench.transforms.tensors import BlockTensors

ROUNDS = 10  # progress is told, and losses are looked at, this often


class SignSGD(torch.optim.Optimizer):
    """p ← p − lr·sign(gradient). Rates are tensors on the parameters' device, so that a captured step sees them."""

    def __init__(self, groups: Sequence[dict[str, Any]]):
        """Groups of `params` and their rate `lr`."""
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """See the class."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign() * group["lr"])


class _Best:
    """Parameters of the lowest loss so far, on the device: choosing does not wait for it."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = parameters
        self.before, self.kept = ([p.detach().clone() for p in parameters] for _ in range(2))
        self.loss = torch.full((), torch.inf, device=parameters[0].device)

    @torch.no_grad()
    def remember(self) -> None:
        """Call before a step."""
        for copy, parameter in zip(self.before, self.parameters, strict=True):
            copy.copy_(parameter)

    @torch.no_grad()
    def offer(self, loss: Tensor) -> None:
        """Call after it, with the loss of the state before it."""
        better = loss < self.loss
        self.loss.copy_(torch.where(better, loss, self.loss))
        for kept, before in zip(self.kept, self.before, strict=True):
            kept.copy_(torch.where(better, before, kept))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept parameters back."""
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(kept)


def fit_rounding(
    prepared: PreparedBlock,
    offsets: Offsets,
    rounding: LearnedRounding,
    folded: BlockTensors,
    windows: Windows,
    kwargs: dict[str, Any],
    settings: EngineSettings,
    seed: int,
    on_round: EpochCallback,
) -> FitReport:
    """Train offsets and range factors in place.

    Args:
        prepared: The block, with its operands already set to be quantized.
        offsets: Of the folded weights.
        rounding: Iterations, rates, batch.
        folded: The block's tensors after all transforms.
        windows: Inputs and targets.
        kwargs: Keyword arguments of the block.
        settings: Device and precision; its batch size is the rounding rule's.
        seed: Of the draw of windows.
        on_round: Called with (round, rounds, mean loss).

    Returns:
        Mean losses per round. `rounding_gain` in the extras: 1 − loss / loss of rounding to nearest, over all windows;
        0 where rounding to nearest was better and was kept.

    Raises:
        NumericalError: On a loss that is not finite.
    """
    batch = min(rounding.batch_size, len(windows))
    settings = replace(settings, batch_size=batch, micro_batch=settings.micro_batch)
    rates = [torch.zeros((), device=settings.device) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": list(offsets.offset.parameters()), "lr": rates[0]}]
    if rounding.clipping_lr > 0:
        factors = [*offsets.upper.parameters(), *offsets.lower.parameters()]
        groups.append({"params": factors, "lr": rates[1]})
    offsets.requires_grad_(False)
    parameters: list[Tensor] = [p.requires_grad_() for group in groups for p in group["params"]]

    def tensors() -> BlockTensors:
        current = folded.copy()
        current.weight = {role: offsets.fake_quantize(role, settings.autocast) for role in folded.weight}
        return current

    learned = Learned(parameters, SignSGD(groups), offsets.clamp_factors_, tensors)
    step = Step(prepared, learned, mse, windows, kwargs, settings)
    best = _Best(parameters)
    draw = _draw(len(windows), batch, seed)
    replay: Callable[[], None] | None = None
    report = FitReport()
    if settings.device.type == "cuda" and settings.cuda_graph and step.scaler is None:
        step.fill(range(batch))
        replay = capture_step(lambda: step.run(batch), parameters, learned.optimizer)
        report.extras["captured"] = float(replay is not None)
    last_finite = torch.nan
    rounds = min(ROUNDS, rounding.iterations)
    for turn in range(rounds):
        first, stop = (rounding.iterations * t // rounds for t in (turn, turn + 1))
        losses = torch.zeros(stop - first, device=settings.device)
        for i in range(first, stop):
            left = 1 - i / rounding.iterations
            for rate, initial in zip(rates, (rounding.lr, rounding.clipping_lr), strict=True):
                rate.fill_(initial * left)
            step.fill(next(draw))
            best.remember()
            replay() if replay is not None else step.run(batch)
            best.offer(step.loss)
            losses[i - first].copy_(step.loss)
        listed = losses.tolist()
        last_finite = require_finite(listed, last_finite, turn, rounds, settings)
        report.losses.append(sum(listed) / len(listed))
        on_round(turn, rounds, report.losses[-1])
    best.restore()
    offsets.clamp_factors_()
    report.extras["rounding_gain"] = _keep_better(prepared, offsets, tensors, windows, kwargs, settings)
    return report


@torch.no_grad()
def _keep_better(
    prepared: PreparedBlock,
    offsets: Offsets,
    tensors: Callable[[], BlockTensors],
    windows: Windows,
    kwargs: dict[str, Any],
    settings: EngineSettings,
) -> float:
    """Go back to rounding to nearest where that has the lower loss over all windows; returns the share gained."""

    def loss() -> float:
        prepared.load(tensors())
        total = torch.zeros((), dtype=torch.float64, device=settings.device)
        for i in range(len(windows)):
            with settings.autocast_context():
                output = prepared(windows.inputs.read(i, i + 1), **kwargs)
            total += mse(LossInputs(output, windows.target.read(i, i + 1), None))
        return float(total)

    found = loss()
    learned = {name: value.clone() for name, value in offsets.state_dict().items()}
    offsets.reset_()
    nearest = loss()
    if found >= nearest:
        return 0.0
    offsets.load_state_dict(learned)
    return 1 - found / nearest


def _draw(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Batches of windows without replacement, drawn anew when too few are left."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]
