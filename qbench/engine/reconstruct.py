"""Stream the model's blocks once and compute every lane's quantized version of each.

A lane is one (method, scheme) being computed. A block's full-precision outputs and statistics are shared by all
lanes; each lane keeps its own quantized-path activations, so that later blocks are fitted to what earlier ones
really give. Only one block is on the device at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from qbench.engine.activations import Observer
from qbench.engine.channel_files import ChannelFiles
from qbench.engine.lane import Lane, LaneResult
from qbench.engine.lane_block import LaneBlock
from qbench.engine.prepare import PreparedBlock, block_tensors
from qbench.engine.progress import Listener
from qbench.engine.settings import EngineSettings
from qbench.engine.stream import Stream
from qbench.errors import DataError, NumericalError
from qbench.models.base import BlockSpec


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
        stream = Stream(model, blocks, ids, settings, finished.count(False))
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
            work = LaneBlock(lane, index, len(blocks), prepared, base, stats, q_inputs[i], fp_outputs)
            try:
                state, outputs = work.replay(stream) if done else work.compute(stream, listener)
            except (NumericalError, DataError) as error:  # this lane ends here, the others go on
                results[i].error = type(error)(f"{lane.name}, block {index}: {error}")
                listener.note(str(results[i].error))
                continue
            if not done:
                work.record_errors(stream, state, outputs, started)
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
