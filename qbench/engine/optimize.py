"""Learn a plan's parameters on one block: AdamW on the block's reconstruction error.

OmniQuant §3.1 and AffineQuant §3.4; reference bytedance/AffineQuant@0f3ba93, quantize/affinequant.py:240-330. The
windows keep their order, the rates are constant, weight decay is 0. Transforms and weight quantization run once
per optimizer step and micro-batches share them. Nothing inside an epoch waits for the device: losses stay on it
until the epoch ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qbench.engine.attention import Maps
from qbench.engine.graph import capture_step
from qbench.engine.hidden import HiddenStates
from qbench.engine.plan import BlockPlan, LossInputs, Training
from qbench.engine.prepare import PreparedBlock
from qbench.engine.settings import EngineSettings
from qbench.errors import NumericalError
from qbench.quant.fake import fake_quantize
from qbench.quant.grid import Grid
from qbench.transforms.maps import WarmInverse
from qbench.transforms.tensors import BlockTensors
from qbench.transforms.transform import apply_all

EpochCallback = Callable[[int, int, float], None]


def quantized_tensors(
    base: BlockTensors, plan: BlockPlan, grid: Grid, dtype: torch.dtype | None = None
) -> BlockTensors:
    """The block's tensors after transforms and fake quantization, differentiable in the plan's parameters.

    `dtype` is that of the quantized weights: the autocast type saves a cast before each product.
    """
    tensors = apply_all(base, plan.transforms, settle=grid.bits >= 16)
    if grid.bits < 16:
        for role, weight in tensors.weight.items():
            upper, lower = plan.clipping.logits(role) if plan.clipping is not None else (None, None)
            tensors.weight[role] = fake_quantize(
                weight, grid, upper, lower, dtype,
                row_scale=tensors.row_scale.pop(role, None), column_scale=tensors.column_scale.pop(role, None),
            )  # fmt: skip
    return tensors


class _Step:
    """One optimizer step on fixed input buffers, so that it can be captured and replayed."""

    def __init__(
        self,
        prepared: PreparedBlock,
        plan: BlockPlan,
        training: Training,
        base: BlockTensors,
        grid: Grid,
        kwargs: dict[str, Any],
        settings: EngineSettings,
        window_shape: tuple[int, ...],
    ):
        self.prepared, self.plan, self.training, self.base, self.grid = prepared, plan, training, base, grid
        self.kwargs, self.settings = kwargs, settings
        self.micro = settings.micro_batch or settings.batch_size

        def buffer(*shape: int) -> Tensor:
            return torch.empty(settings.batch_size, *shape, device=settings.device)

        self.inputs, self.target = buffer(*window_shape), buffer(*window_shape)
        self.same_input = buffer(*window_shape) if training.same_input_target else None
        self.maps = Maps() if training.attention_maps else None
        self.attention = buffer(window_shape[0], window_shape[0]) if training.attention_maps else None
        self.loss = torch.zeros((), device=settings.device)
        transform_parameters = [p for t in plan.transforms for p in t.parameters()]
        clipping_parameters = list(plan.clipping.parameters()) if plan.clipping is not None else []
        groups = [
            {"params": list(t.parameters()), "lr": t.learning_rate or training.transform_lr}
            for t in plan.transforms
        ] + [{"params": clipping_parameters, "lr": training.clipping_lr}]
        on_gpu = settings.device.type == "cuda"
        self.parameters = transform_parameters + clipping_parameters
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], weight_decay=0.0, fused=True, capturable=on_gpu
        )
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

    def fill(
        self,
        batch: range,
        inputs: HiddenStates,
        target: HiddenStates,
        same: HiddenStates | None,
        attention: HiddenStates | None = None,
    ) -> None:
        """Copy the windows of one step into the buffers."""
        start, stop = batch.start, batch.stop
        self.inputs[: len(batch)].copy_(inputs.read(start, stop), non_blocking=True)
        self.target[: len(batch)].copy_(target.read(start, stop), non_blocking=True)
        if self.same_input is not None and same is not None:
            self.same_input[: len(batch)].copy_(same.read(start, stop), non_blocking=True)
        if self.attention is not None and attention is not None:
            self.attention[: len(batch)].copy_(attention.read(start, stop), non_blocking=True)

    def run(self, count: int) -> None:
        """Guard, transform, quantize, forward, backward, update; the loss lands in `self.loss`."""
        for transform in self.plan.transforms:
            transform.guard_()
        tensors = quantized_tensors(self.base, self.plan, self.grid, self.settings.autocast)
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
            loss = share * self.training.loss(LossInputs(output, self.target[part], same, seen, wanted))
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
    step = _Step(prepared, plan, training, base, grid, kwargs, settings, inputs.shape[1:])
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
            step.fill(batches[0], inputs, target, same_input_target, attention_target)
            replay = capture_step(lambda: step.run(len(batches[0])), step.parameters, step.optimizer)
            report.extras["captured"] = float(replay is not None)
            if warm:  # the runs before the capture moved it
                for transform in plan.transforms:
                    transform.warm_up()
        before = step.snapshot() if warm else []
        losses = _epoch(step, batches, inputs, target, same_input_target, replay, attention_target)
        residuals = [r for t in plan.transforms if (r := t.residual()) is not None]
        if residuals:
            report.extras["inverse_residual"] = max(*residuals, report.extras.get("inverse_residual", 0.0))
        if any(not r <= WarmInverse.LIMIT for r in residuals):  # "not ≤" also where it is not a number
            step.restore(before)
            for transform in plan.transforms:
                transform.cool_down()
            losses = _epoch(step, batches, inputs, target, same_input_target, None, attention_target)
            report.extras["direct_inverse_epochs"] = report.extras.get("direct_inverse_epochs", 0.0) + 1
        last_finite = _require_finite(losses, last_finite, epoch, training.epochs, settings)
        weighted = math.fsum(loss * len(batch) for loss, batch in zip(losses, batches, strict=True))
        report.losses.append(weighted / len(inputs))
        on_epoch(epoch, training.epochs, report.losses[-1])
    for transform in plan.transforms:
        transform.set_epoch(training.epochs - 1, training.epochs)
        transform.cool_down()
        transform.guard_()  # once more before the fold, as both authors' codes do
    return report


def _epoch(
    step: _Step,
    batches: Sequence[range],
    inputs: HiddenStates,
    target: HiddenStates,
    same_input_target: HiddenStates | None,
    replay: Callable[[], None] | None,
    attention_target: HiddenStates | None = None,
) -> list[float]:
    """One pass over the windows; the only wait for the device is at its end."""
    losses = torch.zeros(len(batches), device=step.settings.device)
    for i, batch in enumerate(batches):
        step.fill(batch, inputs, target, same_input_target, attention_target)
        if replay is not None and len(batch) == step.settings.batch_size:
            replay()
        else:
            step.run(len(batch))
        losses[i].copy_(step.loss)
    return losses.tolist()


def _require_finite(
    losses: Sequence[float], last_finite: float, epoch: int, epochs: int, settings: EngineSettings
) -> float:
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            arithmetic = str(settings.autocast or torch.float32).removeprefix("torch.")
            raise NumericalError(
                f"The loss became {loss} in epoch {epoch + 1} of {epochs}, step {i + 1} of {len(losses)} (last finite "
                f"loss {last_finite:.4g}; arithmetic {arithmetic}). "
                "Try --autocast bfloat16 or float32, a lower --let-lr, or a smaller --sf."
            )
        last_finite = loss
    return last_finite
