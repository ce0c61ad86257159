"""Learn a plan's parameters on one block: AdamW on the block's reconstruction error.

OmniQuant §3.1 and AffineQuant §3.4; reference bytedance/AffineQuant@0f3ba93, quantize/affinequant.py:240-330. The
windows keep their order, the rates are constant, weight decay is 0. Transforms and weight quantization run once
per optimizer step and micro-batches share them. Nothing inside an epoch waits for the device: losses stay on it
until the epoch ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbench.engine.graph import capture_step
from qbench.engine.hidden import HiddenStates
from qbench.engine.plan import BlockPlan, LossInputs, Training
from qbench.engine.prepare import PreparedBlock
from qbench.engine.settings import EngineSettings
from qbench.errors import NumericalError
from qbench.quant.fake import fake_quantize
from qbench.quant.grid import Grid
from qbench.transforms.tensors import BlockTensors
from qbench.transforms.transform import apply_all

EpochCallback = Callable[[int, int, float], None]


def quantized_tensors(base: BlockTensors, plan: BlockPlan, grid: Grid) -> BlockTensors:
    """The block's tensors after transforms and fake quantization, differentiable in the plan's parameters."""
    tensors = apply_all(base, plan.transforms)
    if grid.bits < 16:
        for role, weight in tensors.weight.items():
            logits = plan.clipping.logits(role) if plan.clipping is not None else (None, None)
            tensors.weight[role] = fake_quantize(weight, grid, *logits)
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

        def buffer() -> Tensor:
            return torch.empty(settings.batch_size, *window_shape, device=settings.device)

        self.inputs, self.target = buffer(), buffer()
        self.same_input = buffer() if training.same_input_target else None
        self.loss = torch.zeros((), device=settings.device)
        transform_parameters = [p for t in plan.transforms for p in t.parameters()]
        clipping_parameters = list(plan.clipping.parameters()) if plan.clipping is not None else []
        groups = [
            {"params": transform_parameters, "lr": training.transform_lr},
            {"params": clipping_parameters, "lr": training.clipping_lr},
        ]
        on_gpu = settings.device.type == "cuda"
        self.parameters = transform_parameters + clipping_parameters
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], weight_decay=0.0, fused=True, capturable=on_gpu
        )
        self.scaler = torch.amp.GradScaler(settings.device.type) if settings.autocast == torch.float16 else None

    def fill(self, batch: list[int], inputs: HiddenStates, target: HiddenStates, same: HiddenStates | None) -> None:
        """Copy the windows of one step into the buffers."""
        start, stop = batch[0], batch[-1] + 1
        self.inputs[: len(batch)].copy_(inputs.read(start, stop), non_blocking=True)
        self.target[: len(batch)].copy_(target.read(start, stop), non_blocking=True)
        if self.same_input is not None and same is not None:
            self.same_input[: len(batch)].copy_(same.read(start, stop), non_blocking=True)

    def run(self, count: int) -> None:
        """Guard, transform, quantize, forward, backward, update; the loss lands in `self.loss`."""
        for transform in self.plan.transforms:
            transform.guard_()
        tensors = quantized_tensors(self.base, self.plan, self.grid)
        pairs: list[tuple[Tensor, Tensor]] = []

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            pairs.append((tensor, tensor.detach().requires_grad_()))
            return pairs[-1][1]

        self.prepared.load(tensors.map(leaf))
        self.loss.zero_()
        for start in range(0, count, self.micro):
            part = slice(start, min(start + self.micro, count))
            share = (part.stop - part.start) / count
            with self.settings.autocast_context():
                output = self.prepared(self.inputs[part], **self.kwargs)
            same = self.same_input[part] if self.same_input is not None else None
            loss = share * self.training.loss(LossInputs(output, self.target[part], same))
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
) -> list[float]:
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

    Returns:
        Mean loss per epoch.

    Raises:
        NumericalError: On the first loss that is not finite, at the end of its epoch.
    """
    training = plan.training
    assert training is not None
    step = _Step(prepared, plan, training, base, grid, kwargs, settings, inputs.shape[1:])
    size, n = settings.batch_size, len(inputs)
    batches = [list(range(i, min(i + size, n))) for i in range(0, n, size)]
    replay: Callable[[], None] | None = None
    if settings.cuda_graph and settings.device.type == "cuda" and step.scaler is None and step.parameters:
        step.fill(batches[0], inputs, target, same_input_target)
        replay = capture_step(lambda: step.run(len(batches[0])), step.parameters, step.optimizer)
    history: list[float] = []
    last_finite = math.nan
    for epoch in range(training.epochs):
        for transform in plan.transforms:
            transform.set_epoch(epoch, training.epochs)
        losses = torch.zeros(len(batches), device=settings.device)
        for i, batch in enumerate(batches):
            step.fill(batch, inputs, target, same_input_target)
            if replay is not None and len(batch) == size:
                replay()
            else:
                step.run(len(batch))
            losses[i].copy_(step.loss)
        values = losses.tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise NumericalError(
                    f"The loss became {value} in epoch {epoch + 1} of {training.epochs}, step {i + 1} of "
                    f"{len(batches)} (last finite loss {last_finite:.4g}; arithmetic "
                    f"{str(settings.autocast or torch.float32).removeprefix('torch.')}). "
                    "Try --autocast bfloat16 or float32, a lower --let-lr, or a smaller --sf."
                )
            last_finite = value
        weights = [len(b) for b in batches]
        history.append(math.fsum(v * w for v, w in zip(values, weights, strict=True)) / n)
        on_epoch(epoch, training.epochs, history[-1])
    for transform in plan.transforms:
        transform.set_epoch(training.epochs - 1, training.epochs)
    return history
