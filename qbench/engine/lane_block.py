"""One block of one lane: plan, fit, fold, round to integers, and run the result on the lane's own inputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from qbench.engine.activations import ActivationStats
from qbench.engine.hidden import HiddenStates, RelativeError
from qbench.engine.lane import Lane
from qbench.engine.optimize import FitReport, Windows, fit
from qbench.engine.plan import BlockPlan, BlockView, CalibratedRounding, LearnedRounding, Rounded
from qbench.engine.prepare import PreparedBlock
from qbench.engine.probe import Probe
from qbench.engine.progress import Listener
from qbench.engine.signed import fit_rounding
from qbench.engine.state import BlockState
from qbench.engine.stream import Stream
from qbench.errors import NumericalError
from qbench.quant import uniform
from qbench.quant.grid import Grid
from qbench.quant.offsets import Offsets
from qbench.results import BlockRecord, TransformRecord
from qbench.transforms.tensors import BlockTensors
from qbench.transforms.transform import Transform, fold

FELL_BACK = "bfloat16_fallback"  # key of BlockRecord.extras


@dataclass
class LaneBlock:
    """One block of one lane: plan, fit, fold, round, and run the result on the lane's own inputs."""

    lane: Lane
    index: int
    n_blocks: int
    prepared: PreparedBlock
    base: BlockTensors
    stats: dict[str, ActivationStats]
    q_inputs: HiddenStates
    fp_outputs: HiddenStates

    def compute(self, stream: Stream, listener: Listener) -> tuple[BlockState, HiddenStates]:
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

    def replay(self, stream: Stream) -> tuple[BlockState, HiddenStates]:
        """The same from the lane's checkpoint, in the arithmetic it was computed in."""
        assert self.lane.checkpoint is not None
        state = self.lane.checkpoint.load(self.index)
        fell_back = state.record is not None and FELL_BACK in state.record.extras
        return state, self._run(stream.in_bfloat16() if fell_back else stream, state)

    def record_errors(self, stream: Stream, state: BlockState, outputs: HiddenStates, started: float) -> None:
        """Complete a record: error on full-precision inputs (local), and of the whole path so far (accumulated)."""
        assert state.record is not None
        used = stream.in_bfloat16() if FELL_BACK in state.record.extras else stream
        accumulated = RelativeError(self.fp_outputs)
        for i in range(len(outputs)):
            accumulated.add(i, outputs.read(i, i + 1))
        state.record = state.record.model_copy(
            update={
                "local_error": used.relative_error(self.prepared, used.inputs, self.fp_outputs),
                "accumulated_error": accumulated.value,
                "seconds": time.perf_counter() - started,
            }
        )

    def _operands(self, stream: Stream) -> None:
        settings = stream.settings
        self.prepared.quantize_operands(
            self.lane.scheme, settings.zero_in_range, settings.attention_granularity
        ).record_attention(None)

    def _run(self, stream: Stream, state: BlockState) -> HiddenStates:
        """Load the block exactly as its integers give it and run it."""
        self.prepared.load(state.tensors(stream.settings.device, stream.settings.dtype))
        self._operands(stream)
        outputs = stream.forward(self.prepared, self.q_inputs)
        if not outputs.all_finite():
            raise NumericalError(
                f"the quantized block's outputs are not finite in {stream.settings.arithmetic}. "
                "Try --autocast bfloat16 or float32."
            )
        return outputs

    def _quantize(self, stream: Stream, listener: Listener) -> BlockState:
        settings, scheme, lane = stream.settings, self.lane.scheme, self.lane
        spec = self.prepared.spec
        grid = Grid(scheme.wbits, scheme.symmetric, scheme.group_size, settings.zero_in_range)
        if scheme.is_identity:  # nothing to do, bit for bit
            return self._finish(self.base.copy(), BlockPlan(), FitReport(), {})
        probe = Probe(self.prepared, self.base, stream.inputs, stream.kwargs, settings)
        view = BlockView(self.index, self.n_blocks, spec, scheme, grid, self.base, self.stats, probe)
        plan = lane.planner.plan(view)
        grid = plan.grid or grid
        for part in (*plan.transforms, *([plan.clipping] if plan.clipping is not None else [])):
            part.to(settings.device, settings.dtype)
        report, tell = FitReport(), partial(listener.epoch, lane.name, self.index)
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
                settings, tell, maps,
            )  # fmt: skip
        plan.notes.extend(stream.notes)
        folded = fold(self.base, plan.transforms)
        rounded = self._round(stream, folded, plan, grid, report, tell) if grid.bits < 16 else {}
        return self._finish(folded, plan, report, rounded)

    def _round(
        self,
        stream: Stream,
        folded: BlockTensors,
        plan: BlockPlan,
        grid: Grid,
        report: FitReport,
        tell: Callable[[int, int, float], None],
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
                stream.settings, stream.settings.seed + self.index, tell,
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
        shared = self.prepared.spec.shared_inputs
        for stage in [[roles] for roles in shared] if rounding.sequential else [shared]:
            self.prepared.load(seen)
            self._operands(stream)
            moments = stream.second_moments(self.prepared, [roles[0] for roles in stage], self.q_inputs)
            for roles in stage:
                for role in roles:
                    rounded[role] = rounding.rule(folded.weight[role], moments[roles[0]], ranges(role), grid)
                    if rounding.sequential:
                        seen.weight[role] = rounded[role].weight.dequantize()
                del moments[roles[0]]
        return rounded

    def _finish(
        self, folded: BlockTensors, plan: BlockPlan, report: FitReport, rounded: dict[str, Rounded]
    ) -> BlockState:
        """Put together everything that is kept of the block; what is not rounded stays as it was folded."""
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
