"""Stream the model's blocks once and compute every lane's quantized version of each.

A lane is one (method, scheme) being computed. A block's full-precision outputs and statistics are shared by all
lanes; each lane keeps its own quantized-path activations, so that later blocks are fitted to what earlier ones
really give. Only one block is on the device at a time.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qbench.engine import attention
from qbench.engine.activations import ActivationStats, Observer
from qbench.engine.capture import block_inputs, move, reaching
from qbench.engine.channel_files import ChannelFiles
from qbench.engine.checkpoint import Checkpoint
from qbench.engine.hidden import HiddenStates, choose_placement
from qbench.engine.optimize import FitReport, Windows, fit
from qbench.engine.plan import BlockPlan, BlockView, CalibratedRounding, LearnedRounding, Needs, Rounded
from qbench.engine.prepare import PreparedBlock, block_tensors
from qbench.engine.probe import Probe
from qbench.engine.progress import Listener
from qbench.engine.settings import EngineSettings
from qbench.engine.signed import fit_rounding
from qbench.engine.state import BlockState
from qbench.errors import DataError, NumericalError, QbenchError
from qbench.models.base import BlockSpec
from qbench.quant import uniform
from qbench.quant.grid import Grid
from qbench.quant.offsets import Offsets
from qbench.results import BlockRecord, TransformRecord
from qbench.scheme import Scheme
from qbench.transforms.tensors import BlockTensors
from qbench.transforms.transform import Transform, fold

FELL_BACK = "bfloat16_fallback"  # key of BlockRecord.extras


class Planner(Protocol):
    """What the engine needs of a method."""

    @property
    def needs(self) -> Needs:
        """Statistics to gather before planning."""

    def plan(self, view: BlockView) -> BlockPlan:
        """Decide what to do with one block."""


@dataclass
class Lane:
    """One (method, scheme) on its way through the model.

    Attributes:
        name: For progress and errors.
        planner: The method.
        scheme: The numbers.
        checkpoint: Where finished blocks go, or None to keep them in memory.
    """

    name: str
    planner: Planner
    scheme: Scheme
    checkpoint: Checkpoint | None = None

    def has_block(self, index: int) -> bool:
        """Whether this block is in the checkpoint."""
        return self.checkpoint is not None and index < len(self.checkpoint)


class LaneResult:
    """Finished blocks of one lane, read from the checkpoint or from memory."""

    def __init__(self, lane: Lane):
        """Begin with no block."""
        self.lane = lane
        self.seconds = 0.0
        self.peak_gpu_bytes: int | None = None
        self._kept: list[BlockState] = []
        self.records: list[BlockRecord] = []
        self.transforms: list[list[TransformRecord]] = []
        self.weight_bits = 0
        self.error: QbenchError | None = None
        self._digest = hashlib.sha256()

    @property
    def notes(self) -> list[str]:
        """Notes of all blocks, each once."""
        return list(dict.fromkeys(note for record in self.records for note in record.notes))

    def add(self, index: int, state: BlockState, fresh: bool) -> None:
        """Take a finished block."""
        assert state.record is not None
        self.records.append(state.record)
        self.transforms.append(state.transforms)
        self.weight_bits += state.weight_bits
        self.seconds += state.record.seconds
        state.update_digest(self._digest)
        if self.lane.checkpoint is None:
            self._kept.append(state)
        elif fresh:
            self.lane.checkpoint.save(index, state)

    @property
    def codes(self) -> str:
        """Hash of the integers of all blocks so far."""
        return self._digest.hexdigest()

    def state(self, index: int) -> BlockState:
        """Block `index`."""
        return self._kept[index] if self.lane.checkpoint is None else self.lane.checkpoint.load(index)

    def __len__(self) -> int:
        return len(self.records)


class _Stream:
    """Full-precision path and shared facts of the pass through the model."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        ids: Tensor,
        settings: EngineSettings,
        n_lanes: int = 1,
    ):
        self.settings = settings
        self.notes: list[str] = []
        self.kwargs: dict[str, Any] = {}
        self.inputs: HiddenStates
        for i, (hidden, kwargs) in enumerate(block_inputs(model, blocks[0], ids)):
            if i == 0:
                shape = (len(ids), *hidden.shape[1:])
                # float32: the full-precision path's inputs and outputs, each lane's inputs, and one lane's outputs
                # and second target
                n_bytes = (4 + n_lanes) * settings.dtype.itemsize * hidden.numel() * len(ids)
                placement = settings.placement or choose_placement(n_bytes, settings.device, settings.scratch)
                self.inputs = HiddenStates(
                    shape, settings.device, placement, settings.dtype, settings.scratch
                )
                self.kwargs = move(kwargs, settings.device, settings.dtype)
            self.inputs.write(i, hidden.to(settings.dtype))

    def fall_back(self, what: str) -> None:
        """Go from float16 to bfloat16 for the rest of the pass, if that is allowed; otherwise raise."""
        if self.settings.autocast != torch.float16:
            raise NumericalError(
                f"{what}: is the checkpoint damaged? Try --dtype float32 --autocast float32."
            )
        if not self.settings.allow_fallback:
            raise NumericalError(
                f"{what} in float16, whose largest value is 65504. Use --autocast bfloat16 or float32, or "
                "--allow-fallback to go on in bfloat16 with a note in the row."
            )
        self.settings = replace(self.settings, autocast=torch.bfloat16)
        self.notes.append(f"{what} in float16: the run went on in bfloat16")

    @property
    def may_fall_back(self) -> bool:
        """Whether a lane that fails in float16 may be computed in bfloat16."""
        return self.settings.autocast == torch.float16 and self.settings.allow_fallback

    def in_bfloat16(self) -> _Stream:
        """The same stream with bfloat16 products."""
        other = copy.copy(self)
        other.settings = replace(self.settings, autocast=torch.bfloat16)
        return other

    def forward(self, block: PreparedBlock, inputs: HiddenStates) -> HiddenStates:
        """Outputs of a loaded block for all windows."""
        outputs = inputs.empty_like()
        self.each(block, inputs, lambda start, out: outputs.write(start, out))
        return outputs

    @torch.no_grad()
    def each(self, block: PreparedBlock, inputs: HiddenStates, use: Callable[[int, Tensor], None]) -> None:
        """Call use(first window, outputs) for batches of windows."""
        size = self.settings.forward_batch(inputs.shape[1])
        for start in range(0, len(inputs), size):
            with self.settings.autocast_context():
                out = block(inputs.read(start, min(start + size, len(inputs))), **self.kwargs)
            use(start, out.to(self.settings.dtype))

    @torch.no_grad()
    def attention_maps(self, block: PreparedBlock, inputs: HiddenStates) -> HiddenStates:
        """Attention maps of a loaded block for all windows, one at a time: every head's map is in memory at once."""
        n, tokens, _ = inputs.shape
        placement = self.settings.placement or choose_placement(
            4 * n * tokens**2, self.settings.device, self.settings.scratch
        )
        found = HiddenStates(
            (n, tokens, tokens), self.settings.device, placement, folder=self.settings.scratch
        )
        maps = attention.Maps()
        block.record_attention(maps)
        for i in range(n):
            with self.settings.autocast_context():
                block(inputs.read(i, i + 1), **self.kwargs)
            assert maps.latest is not None
            found.write(i, maps.latest)
        block.record_attention(None)
        return found

    @torch.no_grad()
    def second_moment(self, block: PreparedBlock, role: str, inputs: HiddenStates) -> Tensor:
        """E[xᵀx] over all tokens, [in, in], of what a linear of a loaded block multiplies its weight with."""
        linear, size = block.linears[role], self.settings.forward_batch(inputs.shape[1])
        total: Tensor | None = None
        for start in range(0, len(inputs), size):
            windows = inputs.read(start, min(start + size, len(inputs)))
            with self.settings.autocast_context():
                x, _ = reaching(linear, functools.partial(block, windows, **self.kwargs))
                x = linear.operand(x)
            x = x.to(self.settings.dtype).reshape(-1, x.shape[-1])
            total = x.T @ x if total is None else total.addmm_(x.T, x)
        assert total is not None
        return total.div_(len(inputs) * inputs.shape[1])

    def relative_error(self, block: PreparedBlock, inputs: HiddenStates, target: HiddenStates) -> float:
        """MSE(block(inputs), target) / mean(target²)."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.settings.device)

        def accumulate(start: int, out: Tensor) -> None:
            goal = target.read(start, start + out.shape[0])
            sums[0] += (out - goal).square().sum(dtype=torch.float64)
            sums[1] += goal.square().sum(dtype=torch.float64)

        self.each(block, inputs, accumulate)
        error, energy = sums.tolist()
        return error / energy if energy else 0.0


def reconstruct(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    spec: BlockSpec,
    lanes: Sequence[Lane],
    ids: Tensor,
    settings: EngineSettings,
    listener: Listener | None = None,
    files: ChannelFiles | None = None,
) -> list[LaneResult]:
    """Quantize every block for every lane; the model itself is left unchanged.

    Args:
        model: Causal language model using the registered attention, on the CPU or any device.
        blocks: Its decoder layers, in order.
        spec: Their description.
        lanes: What to compute; each gives exactly what it would give alone.
        ids: Calibration windows [n, seq].
        settings: Device, precision, batch size, placement.
        listener: Told of progress.
        files: Input statistics given or to be kept; None: methods see what is observed.

    Returns:
        One result per lane, in order. A lane that broke down has its `error` set and the blocks before it.

    Raises:
        NumericalError: If the full-precision model itself gives values that are not finite.
    """
    listener = listener or Listener()
    results = [LaneResult(lane) for lane in lanes]
    # A lane whose blocks are all finished is read, not run: nobody needs its activations.
    finished = [lane.has_block(len(blocks) - 1) for lane in lanes]
    keep = files is not None and files.keep
    if keep or not all(finished):
        listener.stage("capture", f"{len(ids)} windows of {ids.shape[1]} tokens")
        stream = _Stream(model, blocks, ids, settings, finished.count(False))
    listener.stage("quantize")
    listener.blocks(len(blocks), [lane.name for lane in lanes])
    for result in (result for result, done in zip(results, finished, strict=True) if done):
        _read(result, len(blocks), listener)
    if all(finished) and not keep:
        return results
    q_inputs = [stream.inputs] * len(lanes)  # never written to: each block's outputs are a new array
    needs_stats = keep or any(
        lane.planner.needs.activation_stats for lane, done in zip(lanes, finished, strict=True) if not done
    )

    for index, module in enumerate(blocks):
        prepared = PreparedBlock(module, spec).to(settings.device, settings.dtype)
        base = block_tensors(module, spec, settings.device, settings.dtype)
        prepared.load(base)
        observer = Observer(prepared, ids.shape[1])
        with observer if needs_stats else nullcontext():
            fp_outputs = stream.forward(prepared, stream.inputs)
            if not fp_outputs.all_finite():
                stream.fall_back(f"The full-precision outputs of block {index} are not finite")
                observer.stats.clear()
                fp_outputs = stream.forward(prepared, stream.inputs)
        stats = observer.stats if files is None else files.apply(index, observer.stats)
        for i, lane in enumerate(lanes):
            if finished[i] or results[i].error is not None:
                continue
            done = lane.has_block(index)
            listener.block_start(lane.name, index, done)
            started = time.perf_counter()
            if settings.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(settings.device)
            work = _LaneBlock(lane, index, len(blocks), prepared, base, stats, q_inputs[i], fp_outputs)
            try:
                state, outputs = work.replay(stream) if done else work.compute(stream, listener)
            except (NumericalError, DataError) as error:  # this lane ends here, the others go on
                results[i].error = type(error)(f"{lane.name}, block {index}: {error}")
                listener.note(str(results[i].error))
                continue
            if not done:
                assert state.record is not None
                used = stream.in_bfloat16() if FELL_BACK in state.record.extras else stream
                state.record = _with_errors(state.record, used, prepared, outputs, fp_outputs, started)
            q_inputs[i] = outputs
            results[i].add(index, state, fresh=not done)
            if settings.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(settings.device)
                results[i].peak_gpu_bytes = max(peak, results[i].peak_gpu_bytes or 0)
            listener.block_end(lane.name, results[i].records[-1])
        stream.inputs = fp_outputs
        prepared = base = observer = work = None  # type: ignore[assignment]  # before the next block is prepared
    return results


def _read(result: LaneResult, n_blocks: int, listener: Listener) -> None:
    """Take all blocks of a lane from its checkpoint."""
    checkpoint = result.lane.checkpoint
    assert checkpoint is not None
    for index in range(n_blocks):
        listener.block_start(result.lane.name, index, True)
        try:
            result.add(index, checkpoint.load(index), fresh=False)
        except DataError as error:
            result.error = error
            return
        listener.block_end(result.lane.name, result.records[-1])


@dataclass
class _LaneBlock:
    """One block of one lane: plan, fit, fold, round, and run the result on the lane's own inputs."""

    lane: Lane
    index: int
    n_blocks: int
    prepared: PreparedBlock
    base: BlockTensors
    stats: dict[str, ActivationStats]
    q_inputs: HiddenStates
    fp_outputs: HiddenStates

    def compute(self, stream: _Stream, listener: Listener) -> tuple[BlockState, HiddenStates]:
        """The finished block and its outputs; in bfloat16 where float16 fails and that is allowed."""
        try:
            state = self._quantize(stream, listener)
            return state, self._run(stream, state)
        except NumericalError:
            if not stream.may_fall_back:
                raise
        again = stream.in_bfloat16()
        state = self._quantize(again, listener)
        assert state.record is not None
        state.record.notes.append(
            f"block {self.index} computed in bfloat16: float16 gave values that are not finite"
        )
        state.record.extras[FELL_BACK] = 1.0
        return state, self._run(again, state)

    def replay(self, stream: _Stream) -> tuple[BlockState, HiddenStates]:
        """The same from the lane's checkpoint, in the arithmetic it was computed in."""
        assert self.lane.checkpoint is not None
        state = self.lane.checkpoint.load(self.index)
        fell_back = state.record is not None and FELL_BACK in state.record.extras
        return state, self._run(stream.in_bfloat16() if fell_back else stream, state)

    def _operands(self, stream: _Stream) -> None:
        settings = stream.settings
        self.prepared.quantize_operands(
            self.lane.scheme, settings.zero_in_range, settings.attention_granularity
        ).record_attention(None)

    def _run(self, stream: _Stream, state: BlockState) -> HiddenStates:
        """Load the block exactly as its integers give it and run it."""
        self.prepared.load(state.tensors(stream.settings.device, stream.settings.dtype))
        self._operands(stream)
        outputs = stream.forward(self.prepared, self.q_inputs)
        if not outputs.all_finite():
            arithmetic = str(stream.settings.autocast or torch.float32).removeprefix("torch.")
            raise NumericalError(
                f"the quantized block's outputs are not finite in {arithmetic}. Try --autocast bfloat16 or float32."
            )
        return outputs

    def _quantize(self, stream: _Stream, listener: Listener) -> BlockState:
        settings, scheme, lane = stream.settings, self.lane.scheme, self.lane
        spec = self.prepared.spec
        grid = Grid(scheme.wbits, scheme.symmetric, scheme.group_size, settings.zero_in_range)
        if scheme.is_identity:  # nothing to do, bit for bit
            return self._finish(stream, self.base.copy(), BlockPlan(), grid, FitReport(), listener)
        probe = Probe(self.prepared, self.base, stream.inputs, stream.kwargs, settings)
        view = BlockView(self.index, self.n_blocks, spec, scheme, grid, self.base, self.stats, probe)
        plan = lane.planner.plan(view)
        grid = plan.grid or grid
        for part in (*plan.transforms, *([plan.clipping] if plan.clipping is not None else [])):
            part.to(settings.device, settings.dtype)
        report = FitReport()
        if plan.training is not None:
            same_input = maps = None
            self.prepared.load(self.base).quantize_operands(None)
            if plan.training.same_input_target:
                same_input = stream.forward(self.prepared, self.q_inputs)
            if plan.training.attention_maps:
                maps = stream.attention_maps(self.prepared, stream.inputs)
            self._operands(stream)
            report = fit(
                self.prepared, plan, self.base, grid, self.q_inputs, self.fp_outputs, same_input, stream.kwargs,
                settings, lambda epoch, epochs, loss: listener.epoch(lane.name, self.index, epoch, epochs, loss),
                maps,
            )  # fmt: skip
        plan.notes.extend(stream.notes)
        return self._finish(stream, fold(self.base, plan.transforms), plan, grid, report, listener)

    def _round(
        self,
        stream: _Stream,
        folded: BlockTensors,
        plan: BlockPlan,
        grid: Grid,
        report: FitReport,
        listener: Listener,
    ) -> dict[str, Rounded]:
        """Folded weights to codes over the plan's ranges, by role; what is learned on the way goes to the report."""

        def ranges(role: str) -> tuple[Tensor, Tensor] | None:
            return plan.clipping.ranges(role, folded.weight[role], grid) if plan.clipping else None

        if isinstance(rounding := plan.rounding, LearnedRounding):
            own = {role: ranges(role) or uniform.extremes(w, grid) for role, w in folded.weight.items()}
            offsets = Offsets(folded.weight, own, grid)
            self._operands(stream)
            learned = fit_rounding(
                self.prepared, offsets, rounding, folded, Windows(self.q_inputs, self.fp_outputs), stream.kwargs,
                stream.settings, stream.settings.seed + self.index,
                lambda turn, turns, loss: listener.epoch(self.lane.name, self.index, turn, turns, loss),
            )  # fmt: skip
            report.losses += learned.losses
            report.extras |= learned.extras
            return {role: Rounded(offsets.quantize(role)) for role in folded.weight}
        if not isinstance(rounding, CalibratedRounding):
            return {
                role: Rounded(rounding(weight, *(ranges(role) or uniform.extremes(weight, grid)), grid))
                for role, weight in folded.weight.items()
            }
        rounded = {}
        seen = folded.copy()
        for roles in self.prepared.spec.shared_inputs:
            self.prepared.load(seen)
            self._operands(stream)
            moment = stream.second_moment(self.prepared, roles[0], self.q_inputs)
            for role in roles:
                rounded[role] = rounding.rule(folded.weight[role], moment, ranges(role), grid)
                if rounding.sequential:
                    seen.weight[role] = rounded[role].weight.dequantize()
        return rounded

    def _finish(
        self,
        stream: _Stream,
        folded: BlockTensors,
        plan: BlockPlan,
        grid: Grid,
        report: FitReport,
        listener: Listener,
    ) -> BlockState:
        """Round and put together everything that is kept of the block."""
        rounded = self._round(stream, folded, plan, grid, report, listener) if grid.bits < 16 else {}
        notes, extras = list(plan.notes), dict(report.extras)
        for role, result in rounded.items():
            if not bool(result.weight.scale.isfinite().all()):
                raise NumericalError(
                    f"Block {self.index}: the scales of {role} are not finite after folding the transforms."
                )
            notes += [f"block {self.index} {role}: {note}" for note in result.notes]
            extras |= {f"{name}.{role}": value for name, value in result.extras.items()}
        linears = {
            role: rounded[role].weight if rounded else weight for role, weight in folded.weight.items()
        }
        learned: dict[str, Tensor] = {}
        for transform in plan.transforms:
            site = transform.site.name
            while any(name.startswith(f"{site}.") for name in learned):  # behind another one at the same site
                site += "+"
            learned |= {f"{site}.{name}": p.detach() for name, p in transform.named_parameters()}
            if (condition := transform.condition()) is not None:
                extras[f"condition.{site}"] = condition
        if plan.clipping is not None:
            learned |= {f"clipping.{name}": p.detach() for name, p in plan.clipping.named_parameters()}
        record = BlockRecord(
            index=self.index,
            seconds=0.0,
            losses=report.losses,
            local_error=None,
            accumulated_error=None,
            notes=notes,
            extras=extras,
        )
        biased = self.prepared.spec.biased
        new_biases = tuple(r for r, bias in folded.bias.items() if bias is not None and r not in biased)
        folded.weight = {}
        return BlockState(
            linears, folded, learned, record, [_describe(t) for t in plan.transforms], new_biases
        )


def _describe(transform: Transform) -> TransformRecord:
    cost = transform.cost()
    return TransformRecord(
        site=transform.site.name,
        kind=f"{transform.kind} and shift"
        if transform.shift_stays and transform.kind != "shift"
        else transform.kind,
        foldable=cost.foldable,
        function_preserving=transform.function_preserving,
        stored_bits=cost.stored_bits,
        flops_per_token=cost.flops_per_token,
        note=transform.note,
    )


def _with_errors(
    record: BlockRecord,
    stream: _Stream,
    prepared: PreparedBlock,
    outputs: HiddenStates,
    fp_outputs: HiddenStates,
    started: float,
) -> BlockRecord:
    """Complete a record: error on full-precision inputs (local), and of the whole path so far (accumulated)."""
    sums = torch.zeros(2, dtype=torch.float64, device=stream.settings.device)
    for i in range(len(outputs)):
        goal = fp_outputs.read(i, i + 1)
        sums[0] += (outputs.read(i, i + 1) - goal).square().sum(dtype=torch.float64)
        sums[1] += goal.square().sum(dtype=torch.float64)
    error, energy = sums.tolist()
    return record.model_copy(
        update={
            "local_error": stream.relative_error(prepared, stream.inputs, fp_outputs),
            "accumulated_error": error / energy if energy else 0.0,
            "seconds": time.perf_counter() - started,
        }
    )
