"""One run: load a model, quantize it in every requested way on one pass, evaluate, record.

A request is refused here or becomes the cells of a pass; each cell's row is found in the store, waited for, or computed
as a lane of the engine. The command line calls `run` and prints what it returns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from qbench import provenance
from qbench.cells import labels
from qbench.circumstances import Circumstances, circumstances
from qbench.config import PLACES, RunConfig, validated
from qbench.data.text import require_source
from qbench.deploy.export import foresee
from qbench.engine import attention
from qbench.engine.channel_files import write_channels
from qbench.engine.checkpoint import Checkpoint
from qbench.engine.lane import Lane
from qbench.engine.progress import Listener
from qbench.engine.reconstruct import reconstruct
from qbench.errors import ConfigError, NumericalError, QbenchError
from qbench.evaluate import choose_device
from qbench.exports import export_all, require_distinct
from qbench.failures import Failure, FailureStore
from qbench.locking import Lock
from qbench.methods import METHODS
from qbench.methods.base import Method
from qbench.models.loading import LoadedModel, describe_model, load_model
from qbench.results import Result, require_writable
from qbench.rows import PassCell, Wanted, baseline, measure, resolved_cells, stored_row

SHARED_ARRAYS = 4  # of hidden states besides one per lane: see engine.stream
POLL_S = 1.0  # between looks at rows that another process computes


@dataclass
class PassResult:
    """What became of the rows of one pass, by label; each is in exactly one of the two."""

    baseline: Result
    rows: dict[str, Result] = field(default_factory=dict)
    errors: dict[str, QbenchError] = field(default_factory=dict)


def run(config: RunConfig, listener: Listener | None = None) -> list[Result]:
    """Do what the configuration asks and return its rows, the full-precision baseline first.

    Args:
        config: Resolved request.
        listener: Told of progress and of each finished row.

    Returns:
        Rows in the order baseline, then seed by seed, scheme by scheme in the order of the methods.
        Each is also in the store.

    Raises:
        ConfigError: Anything wrong with the request, before a weight is touched.
        DataError: Missing or damaged files.
        NumericalError: A method broke down; finished rows are in the store, beside a record of the failure.
    """
    listener = listener or Listener()
    wanted = every_row(config)
    methods = check_request(config, wanted)
    resolved_cells(wanted, methods, describe(config))  # a scheme that cannot be done: before a weight is read
    for source in {config.calibration.dataset, *config.evals.datasets} - {"auto"}:
        require_source(source)
    loaded = load(config, listener)
    if config.export:
        lanes = [Lane(c.label, c.method, c.scheme) for c in resolved_cells(wanted, methods, loaded)]
        for note in foresee(loaded, lanes, config.export, config.quantizer.zero_in_range):
            listener.note(note)
    rows: list[Result] = []
    errors: list[QbenchError] = []
    for seed in range(config.calibration.seed, config.calibration.seed + config.seeds):
        if config.seeds > 1:
            listener.note(f"calibration seed {seed}")
        done = run_pass(config.at_seed(seed), wanted, listener, loaded)
        rows += [done.baseline, *done.rows.values()] if not rows else done.rows.values()
        errors += done.errors.values()
    rows = export_all(config, rows, loaded, listener)
    if errors:
        finished = (
            f" Finished rows are in {config.output}." if any(not row.is_baseline for row in rows) else ""
        )
        kinds = {type(error) for error in errors}
        kind = kinds.pop() if len(kinds) == 1 else NumericalError
        raise kind(" ".join(map(str, errors)) + finished)
    return rows


def every_row(config: RunConfig) -> list[Wanted]:
    """Methods × schemes of a request, each with a label of its own."""
    pairs = [(request, scheme) for scheme in config.schemes for request in config.methods]
    names = labels([config.alone(request, scheme) for request, scheme in pairs])
    return [Wanted(name, request, scheme) for name, (request, scheme) in zip(names, pairs, strict=True)]


def check_request(config: RunConfig, wanted: Sequence[Wanted]) -> list[Method]:
    """Refuse what can be refused without reading a weight; returns the methods with their options.

    Raises:
        ConfigError: Unknown methods or options, folders that cannot be written or read, a device that is not there.
    """
    methods = [
        validated(METHODS.load(w.request.name), w.request.options, f"method {w.request.name}") for w in wanted
    ]
    require_writable(config.output)
    if config.save_dir is not None:
        require_writable(config.save_dir, "save-dir")
    require_distinct(config, wanted)
    if config.save_act_scales is not None:
        require_writable(config.save_act_scales, "save-act-scales")
    if config.resume is not None and not Path(config.resume).is_dir():
        raise ConfigError(
            f"resume={config.resume!r} is not a folder. Give the output folder of an earlier run; a parameter file "
            "(.pth) is an option of its method: {name: omniquant, options: {parameters: FILE}}."
        )
    choose_device(config.compute.device)
    return methods


def load(config: RunConfig, listener: Listener | None = None) -> LoadedModel:
    """The model of a request, ready for the engine."""
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    (listener or Listener()).stage("load", config.model)
    loaded = load_model(
        config.model,
        config.revision,
        dtype=config.compute.model_dtype,
        on_gpu=choose_device(config.compute.device).type == "cuda",
        trust_remote_code=config.trust_remote_code,
    )
    loaded.model.set_attn_implementation(attention.register())
    return loaded


def describe(config: RunConfig) -> LoadedModel:
    """What a request's model is, without its weights: description, tokenizer, limits.

    Raises:
        ConfigError: Unknown name or unsupported model type.
        DataError: Unreadable files.
    """
    return describe_model(config.model, config.revision, trust_remote_code=config.trust_remote_code)


def prepare(
    config: RunConfig, wanted: Sequence[Wanted], listener: Listener, loaded: LoadedModel | None = None
) -> tuple[Circumstances, list[PassCell]]:
    """Everything that a pass needs before the first block is computed: see `run_pass`."""
    methods = check_request(config, wanted)
    loaded = loaded or load(config, listener)
    cells = resolved_cells(wanted, methods, loaded)
    return circumstances(config, loaded, listener), cells


def run_pass(
    config: RunConfig,
    wanted: Sequence[Wanted],
    listener: Listener | None = None,
    loaded: LoadedModel | None = None,
) -> PassResult:
    """Compute rows that share model, calibration and arithmetic on one pass through the model.

    Rows that the store has, made by the same code, are taken from there. Rows that another process is computing at this
    moment are left to it, and looked at again when the others are done. A row that breaks down is recorded as a failure
    and the others go on.

    Args:
        config: The request; its methods and schemes are not looked at, nor is its number of seeds.
        wanted: The rows.
        listener: Told of progress.
        loaded: The model, if it is in memory already.

    Raises:
        ConfigError: Anything wrong with the request, all offences at once.
        DataError: Missing or damaged files.
        NumericalError: The full-precision model itself gives values that are not finite.
    """
    common, cells = prepare(config, wanted, listener or Listener(), loaded)
    listener = common.listener
    waiting = [cell for cell in cells if stored_row(common, cell) is None]
    if config.resume is not None and waiting and not any(_has_blocks(common, cell) for cell in waiting):
        raise ConfigError(
            f"resume={config.resume!r} holds no finished block of this request: model, tokens, method, options, "
            "scheme, arithmetic or qbench's own code differ. Leave --resume out to begin anew."
        )
    result = PassResult(baseline(common))
    listener.row(result.baseline)
    for cell in cells:
        if cell not in waiting:
            _finish(common, cell, result, stored_row(common, cell))
    told = False
    while waiting:
        locks = {cell: Lock(_folder(common, cell) / "lock") for cell in waiting}
        locked = [cell for cell, lock in locks.items() if lock.acquire()]
        try:
            for part in parts(common, [c for c in locked if not _made_meanwhile(common, c, result)]):
                _compute(common, part, result)
        finally:
            for cell in locked:
                locks[cell].release()
        waiting = [cell for cell in waiting if cell not in locked]
        if waiting and not told:
            listener.note(f"{len(waiting)} rows are being computed by another process: waiting for it")
            told = True
        if waiting and not locked:
            time.sleep(POLL_S)
    order = [cell.label for cell in cells]
    result.rows = {label: result.rows[label] for label in order if label in result.rows}
    return result


def _made_meanwhile(common: Circumstances, cell: PassCell, result: PassResult) -> bool:
    """Whether the process that held the cell before us finished it."""
    row = stored_row(common, cell)
    if row is not None:
        _finish(common, cell, result, row)
    return row is not None


def _finish(
    common: Circumstances, cell: PassCell, result: PassResult, row: Result | None, fresh: bool = False
) -> None:
    """Take a finished row."""
    assert row is not None
    result.rows[cell.label] = row
    FailureStore(common.config.output).clear(_key(common, cell))
    common.listener.row(row)
    common.listener.cell(cell.label, "done" if fresh else "stored")
    for alias in cell.aliases:
        common.listener.cell(alias, "stored")


def _fail(common: Circumstances, cell: PassCell, result: PassResult, error: QbenchError) -> None:
    """Record a failure; the others go on."""
    result.errors[cell.label] = error
    config = common.config.alone(cell.request, str(cell.scheme))
    failure = Failure(
        key=config.hash(),
        label=cell.label,
        model=config.model,
        method=cell.method.name,
        scheme=str(cell.scheme),
        error=str(error),
        kind=type(error).__name__,
        code=provenance.code_fingerprint(),
        config=config.model_dump(mode="json", exclude=PLACES),
    )
    FailureStore(config.output).save(failure)
    for label in (cell.label, *cell.aliases):
        common.listener.cell(label, "failed", str(error))


def _key(common: Circumstances, cell: PassCell) -> str:
    return common.config.alone(cell.request, str(cell.scheme)).hash()


def parts(common: Circumstances, cells: Sequence[PassCell]) -> list[Sequence[PassCell]]:
    """As many lanes to a pass as memory holds hidden states for; the rest take another pass."""
    settings, ids = common.settings, common.calibration.ids
    if not cells or settings.placement is not None:
        return [cells] if cells else []
    array = 4 * ids.numel() * common.loaded.spec.hidden_size  # float32 hidden states of all windows
    fits = psutil.virtual_memory().available // 2 // array - SHARED_ARRAYS
    size = len(cells) if fits < 1 else min(len(cells), int(fits))  # not even one: the engine takes the disk
    return [cells[i : i + size] for i in range(0, len(cells), size)]


def _compute(common: Circumstances, cells: Sequence[PassCell], result: PassResult) -> None:
    """Quantize cells as lanes of one pass and measure each."""
    loaded = common.loaded
    lanes: list[tuple[PassCell, Lane]] = []
    for cell in cells:
        try:
            lanes.append((cell, Lane(cell.label, cell.method, cell.scheme, _checkpoint(common, cell))))
        except QbenchError as error:  # a damaged checkpoint
            _fail(common, cell, result, error)
    finished = reconstruct(
        loaded.model, list(loaded.blocks), loaded.spec, [lane for _, lane in lanes], common.calibration.ids,
        common.settings, common.listener, common.files,
    )  # fmt: skip
    if common.config.save_act_scales is not None and common.files is not None:
        folder, name = Path(common.config.save_act_scales), Path(loaded.name).name
        paths = write_channels(folder, name, common.files, loaded.spec, loaded.architecture.blocks)
        common.listener.note(f"channel ranges written to {' and '.join(map(str, paths))}")
        common.files.observed.clear()  # the next part of the pass observes the same
    for (cell, lane), quantized_lane in zip(lanes, finished, strict=True):
        if quantized_lane.error is not None:
            _fail(common, cell, result, quantized_lane.error)
            continue
        try:
            row = measure(common, lane, cell, quantized_lane)
        except NumericalError as error:
            _fail(common, cell, result, NumericalError(f"{cell.label}: {error}"))
            continue
        _finish(common, cell, result, row, fresh=True)


def _folder(common: Circumstances, cell: PassCell) -> Path:
    """Checkpoint folder of a cell, named by everything its codes depend on, this package's code included."""
    config = common.config
    key = _checkpoint_key(common, cell)
    return (
        Path(config.resume or config.output) / "checkpoints" / f"{cell.method.name}-{cell.scheme}-{key[:12]}"
    )


def _checkpoint_key(common: Circumstances, cell: PassCell) -> str:
    compute = common.config.compute
    return provenance.sha256_json(
        {
            "contract": {k: v for k, v in common.fields.items() if k != "evaluation"},
            "method": cell.method.name,
            "options": cell.options,
            "scheme": str(cell.scheme),
            "batch_size": compute.batch_size,
            "micro_batch": compute.micro_batch,
            "device": common.settings.device.type,
            "code": provenance.code_fingerprint(),
        }
    )


def _checkpoint(common: Circumstances, cell: PassCell) -> Checkpoint:
    return Checkpoint(_folder(common, cell), _checkpoint_key(common, cell), common.config.restart)


def _has_blocks(common: Circumstances, cell: PassCell) -> bool:
    folder = _folder(common, cell)
    return folder.is_dir() and len(Checkpoint(folder, _checkpoint_key(common, cell))) > 0
