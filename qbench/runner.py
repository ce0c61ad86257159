"""One run: load a model, quantize it in every requested way on one pass, evaluate, record.

The only place where methods, engine, data and evaluators meet. The command line calls `run` and prints what it returns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from qbench import provenance
from qbench.cells import labels
from qbench.config import PLACES, MethodRequest, RunConfig, validated
from qbench.data.overlap import ngram_overlap, same_corpus
from qbench.data.text import load_text, parse_dataset
from qbench.data.windows import TokenWindows, draw_calibration
from qbench.deploy.export import foresee
from qbench.engine import attention
from qbench.engine.channel_files import ChannelFiles, read_channels, write_channels
from qbench.engine.checkpoint import Checkpoint
from qbench.engine.install import quantized
from qbench.engine.lane import Lane, LaneResult
from qbench.engine.progress import Listener
from qbench.engine.reconstruct import reconstruct
from qbench.engine.settings import EngineSettings
from qbench.errors import ConfigError, NumericalError, QbenchError, UnsupportedSchemeError
from qbench.evals.memory import peak_cpu_bytes, stored_memory
from qbench.evaluate import (
    Progress,
    Scores,
    Suite,
    baseline_cache,
    cache_scores,
    cached_scores,
    choose_device,
    guesses,
    make_suite,
    model_fingerprint,
    reference_folder,
    score,
    write_references,
)
from qbench.exports import export_all, require_distinct
from qbench.failures import Failure, FailureStore
from qbench.locking import Lock
from qbench.methods import METHODS
from qbench.methods.base import Method
from qbench.models.loading import EMBEDDED, LoadedModel, describe_model, load_model
from qbench.results import BASELINE, Cost, Result, ResultStore, recovery, require_writable
from qbench.scheme import Scheme

EMBEDDED_SAMPLES, PUBLISHED_SAMPLES = 16, 128
PUBLISHED_SEQ_LEN, EMBEDDED_SEQ_LEN = 2048, 256
SHARED_ARRAYS = 4  # of hidden states besides one per lane: see engine.reconstruct
POLL_S = 1.0  # between looks at rows that another process computes


@dataclass(frozen=True)
class Wanted:
    """One row that a pass is asked for.

    Attributes:
        label: Unique within the pass; the name of its lane.
    """

    label: str
    request: MethodRequest
    scheme: str


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
    loaded = load(config, listener)
    if config.export:
        lanes = [Lane(c.label, c.method, c.scheme) for c in _cells(wanted, methods, loaded)]
        foresee(loaded, lanes, config.export, config.quantizer.zero_in_range)
    rows, errors = [], []
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


def check_texts(config: RunConfig, described: LoadedModel) -> tuple[TokenWindows, Suite]:
    """Read and cut the texts of a request.

    Raises:
        ConfigError: A window longer than the model takes.
        DataError: A text that is missing, unreadable or too short.
    """
    calibration, suite, _ = _texts(config, described)
    return calibration, suite


def prepare(
    config: RunConfig, wanted: Sequence[Wanted], listener: Listener, loaded: LoadedModel | None = None
) -> tuple[_Common, list[_Cell]]:
    """Everything that a pass needs before the first block is computed: see `run_pass`."""
    methods = check_request(config, wanted)
    device = choose_device(config.compute.device)
    loaded = loaded or load(config, listener)
    cells = _cells(wanted, methods, loaded)
    settings = _settings(config, device, loaded)
    files = _channel_files(config, loaded)
    listener.stage("calibration")
    calibration, suite, notes = _texts(config, loaded)
    overlap, warnings = _overlap(config, loaded, calibration, suite)
    contract, fields = provenance.contract(_contract_fields(config, loaded, settings, calibration, suite))
    for warning in warnings:
        listener.note(warning)
    common = _Common(
        config, loaded, settings, calibration, suite, contract, fields, ResultStore(config.output), listener,
        [*notes, *warnings], overlap, files,
    )  # fmt: skip
    return common, cells


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
    result = PassResult(_baseline(common))
    listener.row(result.baseline)
    for cell in cells:
        if cell not in waiting:
            _finish(common, cell, result, stored_row(common, cell))
    told = False
    while waiting:
        locked = [cell for cell in waiting if cell.lock(_folder(common, cell)).acquire()]
        try:
            for part in parts(common, [c for c in locked if not _made_meanwhile(common, c, result)]):
                _compute(common, part, result)
        finally:
            for cell in locked:
                cell.held.release()
        waiting = [cell for cell in waiting if cell not in locked]
        if waiting and not told:
            listener.note(f"{len(waiting)} rows are being computed by another process: waiting for it")
            told = True
        if waiting and not locked:
            time.sleep(POLL_S)
    order = [cell.label for cell in cells]
    result.rows = {label: result.rows[label] for label in order if label in result.rows}
    return result


@dataclass(eq=False)
class _Cell:
    """One row on its way: the request, and the method with its presets resolved."""

    label: str
    request: MethodRequest
    method: Method
    scheme: Scheme
    aliases: list[str] = field(default_factory=list)  # other requests that come to the same row
    held: Lock = field(init=False)

    @property
    def options(self) -> dict[str, Any]:
        """Every option, as the record keeps it."""
        return self.method.model_dump(mode="json")

    def lock(self, folder: Path) -> Lock:
        """The lock of its checkpoint folder."""
        self.held = Lock(folder / "lock")
        return self.held


def _cells(wanted: Sequence[Wanted], methods: Sequence[Method], loaded: LoadedModel) -> list[_Cell]:
    """Resolve presets and refuse what cannot be done, all offences at once."""
    cells, problems = [], []
    for w, method in zip(wanted, methods, strict=True):
        scheme = Scheme.parse(w.scheme)
        resolved = method.resolve(scheme, loaded.spec)
        try:
            resolved.check(scheme, loaded.spec)
        except UnsupportedSchemeError as error:
            problems.append(f"{method.name} at {scheme}: {error}")
        cells.append(_Cell(w.label, w.request, resolved, scheme))
    if problems:
        distinct = {problem.split(": ", 1)[1]: problem for problem in problems}
        raise UnsupportedSchemeError(" ".join(distinct.values()))
    # Two requests can come to the same when their presets are resolved: the first stands for both.
    distinct_cells: dict[str, _Cell] = {}
    for cell in cells:
        first = distinct_cells.setdefault(repr((cell.method.name, cell.scheme, cell.options)), cell)
        if first is not cell:
            first.aliases.append(cell.label)
    return list(distinct_cells.values())


def stored_row(common: _Common, cell: _Cell) -> Result | None:
    """The row of an earlier run, if nothing has to be done for it again."""
    config = common.config
    if config.restart or config.save_act_scales is not None:
        return None
    row = common.store.find(_row_id(common, cell.method.name, cell.scheme, cell.options, trained=True))
    return row if row is not None and _same_code(row) else None


def _same_code(row: Result) -> bool:
    """Whether the code that decides the codes is what made this row: after a change, rows are made again."""
    return row.provenance.get("code") == provenance.code_fingerprint()


def _made_meanwhile(common: _Common, cell: _Cell, result: PassResult) -> bool:
    """Whether the process that held the cell before us finished it."""
    row = stored_row(common, cell)
    if row is not None:
        _finish(common, cell, result, row)
    return row is not None


def _finish(
    common: _Common, cell: _Cell, result: PassResult, row: Result | None, fresh: bool = False
) -> None:
    """Take a finished row."""
    assert row is not None
    result.rows[cell.label] = row
    FailureStore(common.config.output).clear(_key(common, cell))
    common.listener.row(row)
    common.listener.cell(cell.label, "done" if fresh else "stored")
    for alias in cell.aliases:
        common.listener.cell(alias, "stored")


def _fail(common: _Common, cell: _Cell, result: PassResult, error: QbenchError) -> None:
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


def _key(common: _Common, cell: _Cell) -> str:
    return common.config.alone(cell.request, str(cell.scheme)).hash()


def parts(common: _Common, cells: Sequence[_Cell]) -> list[Sequence[_Cell]]:
    """As many lanes to a pass as memory holds hidden states for; the rest take another pass."""
    settings, ids = common.settings, common.calibration.ids
    if not cells or settings.placement is not None:
        return [cells] if cells else []
    array = 4 * ids.numel() * common.loaded.spec.hidden_size  # float32 hidden states of all windows
    fits = psutil.virtual_memory().available // 2 // array - SHARED_ARRAYS
    size = len(cells) if fits < 1 else min(len(cells), int(fits))  # not even one: the engine takes the disk
    return [cells[i : i + size] for i in range(0, len(cells), size)]


def _compute(common: _Common, cells: Sequence[_Cell], result: PassResult) -> None:
    """Quantize cells as lanes of one pass and measure each."""
    loaded = common.loaded
    lanes: list[tuple[_Cell, Lane]] = []
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
            row = _measure(common, lane, cell, quantized_lane)
        except NumericalError as error:
            _fail(common, cell, result, NumericalError(f"{cell.label}: {error}"))
            continue
        _finish(common, cell, result, row, fresh=True)


@dataclass(frozen=True)
class _Common:
    """What all rows of a run share."""

    config: RunConfig
    loaded: LoadedModel
    settings: EngineSettings
    calibration: TokenWindows
    suite: Suite
    contract: str
    fields: dict[str, Any]
    store: ResultStore
    listener: Listener
    notes: Sequence[str]
    overlap: Mapping[str, Any]
    files: ChannelFiles | None = None


def _channel_files(config: RunConfig, loaded: LoadedModel) -> ChannelFiles | None:
    """Channel ranges that are given, and whether observed ones are to be written."""
    given = [
        None if path is None else read_channels(path, loaded.spec, loaded.architecture.blocks)
        for path in (config.calibration.act_scales, config.calibration.act_shifts)
    ]
    keep = config.save_act_scales is not None
    return ChannelFiles(*given, keep) if keep or any(channels is not None for channels in given) else None


def _settings(config: RunConfig, device: torch.device, loaded: LoadedModel) -> EngineSettings:
    compute = config.compute
    autocast: torch.dtype | None = None
    if compute.autocast == "auto":
        # bfloat16 keeps float32's range, where float16 overflows in the attention of some models
        autocast = torch.bfloat16 if device.type == "cuda" and loaded.n_parameters > 10**9 else None
    elif compute.autocast != "float32":
        autocast = getattr(torch, compute.autocast)
    return EngineSettings(
        device=device,
        autocast=autocast,
        batch_size=compute.batch_size,
        micro_batch=compute.micro_batch,
        placement=None if compute.hidden_states == "auto" else compute.hidden_states,
        zero_in_range=config.quantizer.zero_in_range,
        attention_granularity=_granularity(config.quantizer.attention_granularity, loaded),
        allow_fallback=compute.allow_fallback,
        seed=config.calibration.seed,
    )


def _granularity(asked: str, loaded: LoadedModel) -> Literal["per_head", "per_token"]:
    """Of q, k and v; the authors' OPT code quantizes them before the split into heads, their LLaMA code after it."""
    if asked == "published":
        return "per_token" if loaded.spec.family == "opt" else "per_head"
    return "per_token" if asked == "per_token" else "per_head"


def _calibration_source(config: RunConfig, loaded: LoadedModel) -> str:
    asked = config.calibration.dataset
    return asked if asked != "auto" else "stdlib" if loaded.name in EMBEDDED else "wikitext2"


def _texts(config: RunConfig, loaded: LoadedModel) -> tuple[TokenWindows, Suite, list[str]]:
    """Calibration windows and what is evaluated, with the defaults that depend on the model."""
    embedded = loaded.name in EMBEDDED
    calibration = config.calibration
    source = _calibration_source(config, loaded)
    default_length = EMBEDDED_SEQ_LEN if embedded else min(PUBLISHED_SEQ_LEN, loaded.max_seq_len)
    seq_len = calibration.seq_len or default_length
    eval_seq_len = config.evals.seq_len or (
        min(PUBLISHED_SEQ_LEN, loaded.max_seq_len) if embedded else seq_len
    )
    for what, length in (("calibration", seq_len), ("evaluation", eval_seq_len)):
        if length > loaded.max_seq_len:
            raise ConfigError(
                f"{what} seq_len={length} is longer than the {loaded.max_seq_len} tokens {loaded.name} was made for. "
                f"Use --seqlen {loaded.max_seq_len} or less."
            )
    n_samples = calibration.n_samples or (EMBEDDED_SAMPLES if embedded else PUBLISHED_SAMPLES)
    _, target = parse_dataset(source)
    text = load_text(target, "calibration")
    windows = draw_calibration(text, loaded.tokenizer, n_samples, seq_len, calibration.seed)
    suite = make_suite(config.evals, loaded.tokenizer, eval_seq_len, loaded.max_seq_len, source)
    notes = [
        f"calibrated and evaluated on the same text ({scored.name})"
        for scored in suite.texts
        if scored.fingerprint == text.fingerprint
    ]
    return windows, suite, notes


def _overlap(
    config: RunConfig, loaded: LoadedModel, calibration: TokenWindows, suite: Suite
) -> tuple[dict[str, Any], list[str]]:
    """What the windows that methods see share with those they are scored on: for the record, and in words."""
    source, seen = _calibration_source(config, loaded), calibration.ids.numpy()
    record: dict[str, Any] = {}
    warnings = []
    for spec, scored in zip(config.evals.datasets, suite.texts, strict=True):
        found = ngram_overlap(seen, scored.windows.ids.numpy())
        target = source if spec == "auto" else spec
        corpus = same_corpus(parse_dataset(source)[1], parse_dataset(target)[1])
        record[scored.name] = {**found.record(), "same_corpus": corpus}
        if corpus and scored.fingerprint != calibration.text_fingerprint:
            warnings.append(f"calibrated on the corpus that {scored.name} is part of")
        warnings += found.notes(scored.name)
    for name, texts in (suite.tasks.texts() if suite.tasks is not None else {}).items():
        found = ngram_overlap(
            seen, loaded.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        )
        record[name] = found.record()
        warnings += found.notes(name)
    return record, warnings


def _contract_fields(
    config: RunConfig,
    loaded: LoadedModel,
    settings: EngineSettings,
    calibration: TokenWindows,
    suite: Suite,
) -> dict[str, Any]:
    """Everything that is not the method: two rows with equal fields differ by their methods only."""
    return {
        "model": model_fingerprint(loaded.model, loaded.location),
        "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
        "calibration": {
            "dataset": calibration.dataset,
            "text": calibration.text_fingerprint,
            "drawn": calibration.scheme_note,
            "seed": config.calibration.seed,
            "tokens": calibration.fingerprint,
            "n_samples": len(calibration.ids),
            "seq_len": calibration.ids.shape[1],
            "bos": calibration.bos_policy,
            **{
                name: provenance.fingerprint_file(path)
                for name in ("act_scales", "act_shifts")
                if (path := getattr(config.calibration, name)) is not None
            },
        },
        "evaluation": suite.contract_fields(),
        "operands": {
            "linear_inputs": "per token, asymmetric, dynamic",
            "attention": f"q, k, v {settings.attention_granularity}; softmax not quantized",
            "zero_in_range": settings.zero_in_range,
        },
        "arithmetic": str(settings.autocast or torch.float32).removeprefix("torch."),
        "inputs_of_later_blocks": "quantized path",
    }


def _folder(common: _Common, cell: _Cell) -> Path:
    """Checkpoint folder of a cell, named by everything its codes depend on, this package's code included."""
    config = common.config
    key = _checkpoint_key(common, cell)
    return (
        Path(config.resume or config.output) / "checkpoints" / f"{cell.method.name}-{cell.scheme}-{key[:12]}"
    )


def _checkpoint_key(common: _Common, cell: _Cell) -> str:
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


def _checkpoint(common: _Common, cell: _Cell) -> Checkpoint:
    return Checkpoint(_folder(common, cell), _checkpoint_key(common, cell), common.config.restart)


def _has_blocks(common: _Common, cell: _Cell) -> bool:
    folder = _folder(common, cell)
    return folder.is_dir() and len(Checkpoint(folder, _checkpoint_key(common, cell))) > 0


def _evaluate(common: _Common, label: str) -> Scores:
    """Score the model as it is now."""
    return score(
        common.loaded.model,
        common.loaded.blocks,
        common.suite,
        common.settings.device,
        _progress(common, label),
        None if label == BASELINE else _references(common),
    )


def _progress(common: _Common, label: str) -> Progress:
    return lambda what, done, total: common.listener.evaluating(f"{label}, {what}", done, total)


def _references(common: _Common) -> Path | None:
    return reference_folder(common.store.folder, common.fields, common.suite, common.settings.device)


def _baseline_cache(common: _Common) -> Path:
    return baseline_cache(common.store.folder, common.fields, common.settings.device)


def _baseline(common: _Common) -> Result:
    """Row of the full-precision model; its measurements are cached by content."""
    scheme, restart = Scheme(16, 16), common.config.restart
    cache, references = _baseline_cache(common), _references(common)
    loaded, device = common.loaded, common.settings.device
    if references is not None:
        progress = _progress(common, BASELINE)
        write_references(loaded.model, loaded.blocks, common.suite, device, references, progress, restart)
    row = _baseline_row(common)
    if row is not None and not restart and _same_code(row):
        return row
    started = time.perf_counter()
    common.listener.stage("evaluate", BASELINE)
    scores = None if restart else cached_scores(cache)
    if scores is None:
        scores = _evaluate(common, BASELINE)
        cache_scores(cache, scores)
    cost = Cost(
        seconds=0.0, peak_cpu_bytes=peak_cpu_bytes(), stages={"evaluate": time.perf_counter() - started}
    )
    request = common.config.model_copy(update={"methods": [], "schemes": [], "seeds": 1})
    return _record(common, request, BASELINE, scheme, {}, scores, 16.0, cost, [], None)


def _baseline_row(common: _Common) -> Result | None:
    """The full-precision row, once it is in the store."""
    return common.store.find(_row_id(common, BASELINE, Scheme(16, 16), {}, trained=False))


def baseline_is_known(common: _Common) -> bool:
    """Whether the full-precision model need not be evaluated."""
    return not common.config.restart and cached_scores(_baseline_cache(common)) is not None


def _measure(common: _Common, lane: Lane, cell: _Cell, result: LaneResult) -> Result:
    """Evaluate one finished lane and record its row."""
    loaded, settings, method = common.loaded, common.settings, cell.method
    common.listener.stage("evaluate", lane.name)
    started = time.perf_counter()
    with quantized(loaded.model, loaded.blocks, loaded.spec, result, settings):
        scores = _evaluate(common, lane.name)
    evaluated = time.perf_counter() - started
    notes = method.notes(lane.scheme, loaded.spec) + list(result.notes) + list(common.notes)
    trained = any(record.losses for record in result.records)
    if trained and (settings.device.type == "cuda" or settings.autocast is not None):
        arithmetic = str(settings.autocast or torch.float32).removeprefix("torch.")
        notes.append(f"blocks fitted with {arithmetic} products")
    extra_bits = sum(t.stored_bits for block in result.transforms for t in block)
    n_weights = loaded.spec.n_weights * len(result)
    cost = Cost(
        seconds=result.seconds,
        peak_gpu_bytes=result.peak_gpu_bytes,
        peak_cpu_bytes=peak_cpu_bytes(),
        stages={"quantize": result.seconds, "evaluate": evaluated},
    )
    bits = (result.weight_bits + extra_bits) / n_weights
    request = common.config.alone(cell.request, str(cell.scheme))
    return _record(common, request, method.name, lane.scheme, cell.options, scores, bits, cost, notes, result)


def _row_id(common: _Common, method: str, scheme: Scheme, options: Mapping[str, Any], trained: bool) -> str:
    """Hash of what a row means."""
    identity = {
        "contract": common.contract,
        "method": method,
        "options": dict(options),
        "scheme": str(scheme),
        # Nothing of the full-precision row depends on these: with several seeds it is still one record.
        "batch_size": common.config.compute.batch_size if trained else None,
        "calibration": provenance.calibration_fingerprint(common.fields) if trained else None,
    }
    return provenance.sha256_json(identity)


def _record(
    common: _Common,
    request: RunConfig,
    method: str,
    scheme: Scheme,
    options: Mapping[str, Any],
    scores: Scores,
    bits: float,
    cost: Cost,
    notes: list[str],
    result: LaneResult | None,
) -> Result:
    loaded = common.loaded
    baseline = None if result is None else _baseline_row(common)
    n_linear = loaded.spec.n_weights * len(loaded.blocks)
    memory = stored_memory(
        loaded.model,
        n_linear * bits / 8,
        n_linear,
        cache_bits=scheme.attention_bits[1],
        tokens=loaded.max_seq_len,
        simulated=result is not None,
        **scores.peaks,
    )
    row = Result(
        id=_row_id(common, method, scheme, options, trained=result is not None),
        model=common.config.model,
        model_fingerprint=common.fields["model"],
        revision=common.config.revision,
        method=method,
        scheme=str(scheme),
        options=dict(options),
        metrics=scores.metrics,
        bits_per_weight=bits,
        cost=cost,
        contract=common.contract,
        contract_fields=common.fields,
        notes=list(dict.fromkeys(notes + guesses(scores.metrics))),
        transforms=result.transforms[0] if result is not None and result.transforms else [],
        blocks=result.records if result is not None else [],
        config=request.model_dump(mode="json", exclude=PLACES),  # where files lie changes no number
        provenance=provenance.environment(),
        calibration={
            **common.fields["calibration"],
            **({"overlap": common.overlap} if result is not None else {}),
        },
        recovery=recovery(scores.metrics, baseline.metrics if baseline else scores.metrics),
        memory=memory,
        generations=scores.generations,
        codes=result.codes if result is not None else None,
        checkpoint=None
        if result is None or result.lane.checkpoint is None
        else result.lane.checkpoint.folder.name,
    )
    common.store.save(row)
    return row
