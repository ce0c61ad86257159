"""Learn a plan's transforms and clipping on one block: AdamW on the block's reconstruction error.

OmniQuant §3.1 and AffineQuant §3.4; reference bytedance/AffineQuant@0f3ba93, quantize/affinequant.py:240-330. The
windows keep their order, the rates are constant, weight decay is 0. Transforms and weight quantization run once
per optimizer step and micro-batches share them. Nothing inside an epoch waits for the device: losses stay on it
until the epoch ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qbench.engine.attention import Maps
from qbench.engine.graph import capture_step
from qbench.engine.hidden import HiddenStates
from qbench.engine.plan import BlockPlan, LossInputs
from qbench.engine.prepare import PreparedBlock
from qbench.engine.settings import EngineSettings
from qbench.errors import NumericalError
from qbench.quant.fake import bound_by_operations, fake_quantize
from qbench.quant.grid import Grid
from qbench.transforms.maps import WarmInverse
from qbench.transforms.tensors import BlockTensors
from qbench.transforms.transform import apply_all

EpochCallback = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Windows:
    """What a block is fitted to, window by window.

    Attributes:
        inputs: Quantized-path inputs.
        target: Full-precision outputs.
        same_input: Full-precision block on `inputs`, where the loss needs it.
        attention: Full-precision attention maps, [n, tokens, tokens], where the loss needs them.
    """

    inputs: HiddenStates
    target: HiddenStates
    same_input: HiddenStates | None = None
    attention: HiddenStates | None = None

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Learned:
    """What an optimizer step changes, and the block's tensors that follow from it.

    Attributes:
        parameters: In the order of the optimizer's groups.
        optimizer: Over these parameters.
        guard: Called before each step: keeps parameters where they may be, in place.
        tensors: The block's tensors, differentiable in the parameters.
    """

    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    guard: Callable[[], None]
    tensors: Callable[[], BlockTensors]


def quantized_tensors(
    base: BlockTensors,
    plan: BlockPlan,
    grid: Grid,
    dtype: torch.dtype | None = None,
    halves: Mapping[str, Tensor] | None = None,
) -> BlockTensors:
    """The block's tensors after transforms and fake quantization, differentiable in the plan's parameters.

    Args:
        base: Original tensors.
        plan: Its transforms and clipping.
        grid: Of the weights.
        dtype: Of the quantized weights: the autocast type saves a cast before each product.
        halves: Equal copies of base weights in half precision, read instead where no transform has changed one.
    """
    tensors = apply_all(base, plan.transforms, settle=grid.bits >= 16)
    if grid.bits < 16:
        dtype = dtype or next(iter(base.weight.values())).dtype
        for role, half in (halves or {}).items():
            if tensors.weight[role] is base.weight[role]:
                tensors.weight[role] = half
        for roles in _quantized_together(tensors):
            logits = [plan.clipping.logits(role) for role in roles] if plan.clipping is not None else []
            rows, columns = (
                [scale.pop(role) for role in roles] if roles[0] in scale else []
                for scale in (tensors.row_scale, tensors.column_scale)
            )
            quantized = fake_quantize(
                _joined([tensors.weight[role] for role in roles]),
                grid,
                _joined([upper for upper, _ in logits]) if logits else None,
                _joined([lower for _, lower in logits]) if logits else None,
                dtype,
                row_scale=_joined(rows) if rows else None,
                column_scale=columns[0] if columns else None,  # the same for all
            )
            lengths = [len(tensors.weight[role]) for role in roles]
            parts = quantized.split(lengths) if len(roles) > 1 else [quantized]
            tensors.weight.update(zip(roles, parts, strict=True))
    return tensors


def exact_halves(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Half-precision copies of the weights that lose nothing by it, as all do of a checkpoint in half precision.

    Fake quantization reads the weight in each direction and writes half precision: half of its input is a quarter or a
    third of its bytes. Weights in float64 have none: what they are multiplied by shall be float64 too.
    """
    halves = {}
    for role, weight in weights.items():
        if weight.dtype == torch.float64:
            continue
        for dtype in (torch.bfloat16, torch.float16):
            half = weight.to(dtype)
            if torch.equal(half.to(weight.dtype), weight):
                halves[role] = half
                break
    return halves


def _quantized_together(tensors: BlockTensors) -> list[list[str]]:
    """Roles by the call that quantizes them: one each, but small weights with the same column factors share one."""
    calls: dict[Any, list[str]] = {}
    for role, weight in tensors.weight.items():
        columns = tensors.column_scale.get(role)
        alike = (weight.shape[1], weight.requires_grad, id(columns), role in tensors.row_scale)
        calls.setdefault(alike if bound_by_operations(weight) else role, []).append(role)
    return list(calls.values())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors, without a copy of one alone."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


class Step:
    """One optimizer step on fixed input buffers, so that it can be captured and replayed."""

    def __init__(
        self,
        prepared: PreparedBlock,
        learned: Learned,
        loss: Callable[[LossInputs], Tensor],
        windows: Windows,
        kwargs: dict[str, Any],
        settings: EngineSettings,
    ):
        self.prepared, self.learned, self.loss_of, self.windows = prepared, learned, loss, windows
        self.kwargs, self.settings = kwargs, settings
        self.parameters, self.optimizer = learned.parameters, learned.optimizer
        self.micro = settings.micro_batch or settings.batch_size

        def buffer(*shape: int) -> Tensor:
            return torch.empty(settings.batch_size, *shape, device=settings.device, dtype=settings.dtype)

        shape = windows.inputs.shape[1:]
        self.inputs, self.target = buffer(*shape), buffer(*shape)
        self.same_input = buffer(*shape) if windows.same_input is not None else None
        self.attention = buffer(shape[0], shape[0]) if windows.attention is not None else None
        self.maps = Maps() if windows.attention is not None else None
        self.loss = torch.zeros((), device=settings.device, dtype=settings.dtype)
        self.scaler = (
            torch.amp.GradScaler(settings.device.type) if settings.autocast == torch.float16 else None
        )

    def snapshot(self) -> list[Tensor]:
        """Copies of everything a step changes."""
        return [t.detach().clone() for t in self._state()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Go back to a snapshot, in place; state that came after it is zeroed."""
        for i, tensor in enumerate(self._state()):
            tensor.copy_(snapshot[i]) if i < len(snapshot) else tensor.zero_()

    def _state(self) -> list[Tensor]:
        moments = [
            v for p in self.parameters for v in self.optimizer.state[p].values() if isinstance(v, Tensor)
        ]
        return [*self.parameters, *moments]

    def fill(self, batch: Sequence[int]) -> None:
        """Copy the windows of one step into the buffers."""
        windows = self.windows
        for buffer, states in (
            (self.inputs, windows.inputs),
            (self.target, windows.target),
            (self.same_input, windows.same_input),
            (self.attention, windows.attention),
        ):
            if buffer is None or states is None:
                continue
            if isinstance(batch, range):
                buffer[: len(batch)].copy_(states.read(batch.start, batch.stop), non_blocking=True)
            else:
                for slot, i in enumerate(batch):
                    buffer[slot].copy_(states.read(i, i + 1)[0], non_blocking=True)

    def run(self, count: int) -> None:
        """Guard, transform, quantize, forward, backward, update; the loss lands in `self.loss`."""
        self.learned.guard()
        tensors = self.learned.tensors()
        pairs: list[tuple[Tensor, Tensor]] = []

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            pairs.append((tensor, tensor.detach().requires_grad_()))
            return pairs[-1][1]

        self.prepared.load(tensors.map(leaf)).record_attention(self.maps)
        self.loss.zero_()
        for start in range(0, count, self.micro):
            part = slice(start, min(start + self.micro, count))
            share = (part.stop - part.start) / count
            with self.settings.autocast_context():
                output = self.prepared(self.inputs[part], **self.kwargs)
            same = self.same_input[part] if self.same_input is not None else None
            seen = self.maps.latest if self.maps is not None else None
            wanted = self.attention[part] if self.attention is not None else None
            loss = share * self.loss_of(LossInputs(output, self.target[part], same, seen, wanted))
            self.loss.add_(loss.detach())
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        used = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None]
        torch.autograd.backward([t for t, _ in used], [g for _, g in used])
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def each(self, batches: Sequence[Sequence[int]], replay: Callable[[], None] | None) -> list[float]:
        """A step for each batch of windows; the only wait for the device is at the end. Returns the losses."""
        losses = torch.zeros(len(batches), device=self.settings.device)
        for i, batch in enumerate(batches):
            self.fill(batch)
            if replay is not None and len(batch) == self.settings.batch_size:
                replay()
            else:
                self.run(len(batch))
            losses[i].copy_(self.loss)
        return losses.tolist()


@dataclass
class FitReport:
    """What training did.

    Attributes:
        losses: Mean loss per epoch.
        extras: `inverse_residual`: largest ‖I − AX‖ of a warm-started inverse (GPU); `direct_inverse_epochs`: epochs
            repeated with direct inverses because of it; `captured`: 1 if the step ran as a CUDA graph.
    """

    losses: list[float] = field(default_factory=list)
    extras: dict[str, float] = field(default_factory=dict)


def fit(
    prepared: PreparedBlock,
    plan: BlockPlan,
    base: BlockTensors,
    grid: Grid,
    inputs: HiddenStates,
    target: HiddenStates,
    same_input_target: HiddenStates | None,
    kwargs: dict[str, Any],
    settings: EngineSettings,
    on_epoch: EpochCallback,
    attention_target: HiddenStates | None = None,
) -> FitReport:
    """Train the plan's transforms and clipping in place.

    Args:
        prepared: The block, with its operands already set to be quantized.
        plan: Must have `training`.
        base: Original tensors of the block, float32 on the device.
        grid: Grid of the weights.
        inputs: Quantized-path inputs.
        target: Full-precision outputs.
        same_input_target: Full-precision block on `inputs`, where the loss needs it.
        kwargs: Keyword arguments of the block.
        settings: Device, precision and batch size.
        on_epoch: Called with (epoch, epochs, mean loss).
        attention_target: Full-precision attention maps, [n, tokens, tokens], where the loss needs them.

    Raises:
        NumericalError: On the first loss that is not finite, at the end of its epoch.
    """
    training = plan.training
    assert training is not None
    windows = Windows(inputs, target, same_input_target, attention_target)
    learned = _of_plan(plan, base, grid, settings)
    step = Step(prepared, learned, training.loss, windows, kwargs, settings)
    batches = [
        range(i, min(i + settings.batch_size, len(inputs)))
        for i in range(0, len(inputs), settings.batch_size)
    ]
    on_gpu = settings.device.type == "cuda"
    warm = on_gpu if settings.warm_inverse is None else settings.warm_inverse
    report = FitReport()
    replay: Callable[[], None] | None = None
    last_finite = math.nan
    for epoch in range(training.epochs):
        for transform in plan.transforms:
            transform.set_epoch(epoch, training.epochs)
            if warm:
                transform.warm_up()
        if epoch == 0 and on_gpu and settings.cuda_graph and step.scaler is None:
            step.fill(batches[0])
            replay = capture_step(lambda: step.run(len(batches[0])), step.parameters, step.optimizer)
            report.extras["captured"] = float(replay is not None)
            if warm:  # the runs before the capture moved it
                for transform in plan.transforms:
                    transform.warm_up()
        before = step.snapshot() if warm else []
        losses = step.each(batches, replay)
        residuals = [r for t in plan.transforms if (r := t.residual()) is not None]
        if residuals:
            report.extras["inverse_residual"] = max(*residuals, report.extras.get("inverse_residual", 0.0))
        if any(not r <= WarmInverse.LIMIT for r in residuals):  # "not ≤" also where it is not a number
            step.restore(before)
            for transform in plan.transforms:
                transform.cool_down()
            losses = step.each(batches, None)
            report.extras["direct_inverse_epochs"] = report.extras.get("direct_inverse_epochs", 0.0) + 1
        last_finite = require_finite(losses, last_finite, epoch, training.epochs, settings)
        weighted = math.fsum(loss * len(batch) for loss, batch in zip(losses, batches, strict=True))
        report.losses.append(weighted / len(inputs))
        on_epoch(epoch, training.epochs, report.losses[-1])
    for transform in plan.transforms:
        transform.set_epoch(training.epochs - 1, training.epochs)
        transform.cool_down()
        transform.guard_()  # once more before the fold, as both authors' codes do
    return report


def _of_plan(plan: BlockPlan, base: BlockTensors, grid: Grid, settings: EngineSettings) -> Learned:
    """The plan's transforms and clipping under AdamW."""
    assert plan.training is not None
    parameters = [
        (p, t.learning_rate or plan.training.transform_lr) for t in plan.transforms for p in t.parameters()
    ]
    if plan.clipping is not None:
        parameters += [(p, plan.training.clipping_lr) for p in plan.clipping.parameters()]
    groups = [  # as few as there are rates: the optimizer is called once for each
        {"params": [p for p, _ in same], "lr": lr}
        for lr, same in groupby(parameters, key=lambda pair: pair[1])
    ]
    optimizer = torch.optim.AdamW(
        groups, weight_decay=0.0, fused=True, capturable=settings.device.type == "cuda"
    )

    halves = exact_halves(base.weight) if settings.device.type == "cuda" else {}

    def guard() -> None:
        for transform in plan.transforms:
            transform.guard_()

    return Learned(
        [p for p, _ in parameters],
        optimizer,
        guard,
        lambda: quantized_tensors(base, plan, grid, settings.autocast, halves),
    )


def require_finite(
    losses: Sequence[float], last_finite: float, epoch: int, epochs: int, settings: EngineSettings
) -> float:
    """The last loss.

    Raises:
        NumericalError: On the first one that is not finite.
    """
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise NumericalError(
                f"The loss became {loss} in epoch {epoch + 1} of {epochs}, step {i + 1} of {len(losses)} (last finite "
                f"loss {last_finite:.4g}; arithmetic {settings.arithmetic}). "
                "Try --autocast bfloat16 or float32, a lower --let-lr, or a smaller --sf."
            )
        last_finite = loss
    return last_finite
