"""One run: load a model, quantize it in every requested way on one pass, evaluate, record.

The only place where methods, engine, data and evaluators meet. The command line calls `run` and prints what it returns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qbench import provenance
from qbench.config import RunConfig, validated
from qbench.data.text import load_text, parse_dataset
from qbench.data.windows import TokenWindows, draw_calibration
from qbench.deploy.folder import save_plain
from qbench.engine import attention
from qbench.engine.checkpoint import Checkpoint
from qbench.engine.install import quantized
from qbench.engine.progress import Listener
from qbench.engine.reconstruct import Lane, LaneResult, reconstruct
from qbench.engine.settings import EngineSettings
from qbench.errors import ConfigError, NumericalError, UnsupportedSchemeError
from qbench.evaluate import (
    Suite,
    baseline_cache,
    cache_metrics,
    cached_metrics,
    choose_device,
    model_fingerprint,
    peak_cpu_bytes,
    score,
    scored_text,
)
from qbench.methods import METHODS
from qbench.methods.base import Method
from qbench.models.loading import EMBEDDED, LoadedModel, load_model
from qbench.results import BASELINE, Cost, Metric, Result, ResultStore, require_writable
from qbench.scheme import Scheme

EMBEDDED_SAMPLES, PUBLISHED_SAMPLES = 16, 128
PUBLISHED_SEQ_LEN, EMBEDDED_SEQ_LEN = 2048, 256


def run(config: RunConfig, listener: Listener | None = None) -> list[Result]:
    """Do what the configuration asks and return its rows, the full-precision baseline first.

    Args:
        config: Resolved request.
        listener: Told of progress and of each finished row.

    Returns:
        Rows in the order baseline, then scheme by scheme in the order of the methods. Each is also in the store.

    Raises:
        ConfigError: Anything wrong with the request, before a weight is touched.
        DataError: Missing or damaged files.
        NumericalError: A method broke down; finished rows are in the store.
    """
    listener = listener or Listener()
    classes = {request.name: METHODS.load(request.name) for request in config.methods}
    methods = [
        validated(classes[request.name], request.options, f"method {request.name}")
        for request in config.methods
    ]
    schemes = config.parsed_schemes
    require_writable(config.output)
    if config.save_dir is not None:
        require_writable(config.save_dir, "save-dir")
    if config.resume is not None and not Path(config.resume).is_dir():
        raise ConfigError(
            f"resume={config.resume!r} is not a folder. Give the output folder of an earlier run; the parameter files "
            "(.pth) of the authors' programs are not read by this version."
        )
    device = choose_device(config.compute.device)
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)

    listener.stage("load", config.model)
    loaded = load_model(
        config.model,
        config.revision,
        dtype=config.compute.model_dtype,
        on_gpu=device.type == "cuda",
        trust_remote_code=config.trust_remote_code,
    )
    loaded.model.set_attn_implementation(attention.register())
    lanes = _lanes(methods, schemes, loaded)
    settings = _settings(config, device, loaded)

    listener.stage("calibration")
    calibration, suite, notes = _texts(config, loaded)
    contract, fields = provenance.contract(_contract_fields(config, loaded, settings, calibration, suite))
    store = ResultStore(config.output)
    common = _Common(config, loaded, settings, calibration, suite, contract, fields, store, listener, notes)
    for lane, method in lanes:
        _attach_checkpoint(lane, method, common)
    if config.resume is not None and not any(lane.checkpoint for lane, _ in lanes):
        raise ConfigError(
            f"resume={config.resume!r} holds no finished block of this request: model, tokens, method, options, "
            "scheme, arithmetic or qbench's own code differ. Leave --resume out to begin anew."
        )

    rows = [_baseline(common)]
    listener.row(rows[0])
    finished = reconstruct(
        loaded.model,
        list(loaded.blocks),
        loaded.spec,
        [lane for lane, _ in lanes],
        calibration.ids,
        settings,
        listener,
    )
    failures = []
    for (lane, method), result in zip(lanes, finished, strict=True):
        if result.error is not None:
            failures.append(result.error)
            continue
        rows.append(_measure(common, lane, method, result))
        listener.row(rows[-1])
    if failures:
        done = f" Finished rows are in {config.output}." if len(rows) > 1 else ""
        raise NumericalError(" ".join(str(error) for error in failures) + done)
    return rows


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
    )


def _granularity(asked: str, loaded: LoadedModel) -> Literal["per_head", "per_token"]:
    """Of q, k and v; the authors' OPT code quantizes them before the split into heads, their LLaMA code after it."""
    if asked == "published":
        return "per_token" if loaded.spec.family == "opt" else "per_head"
    return "per_token" if asked == "per_token" else "per_head"


def _lanes(
    methods: Sequence[Method], schemes: Sequence[Scheme], loaded: LoadedModel
) -> list[tuple[Lane, Method]]:
    """Resolve presets and refuse what cannot be done, all offences at once."""
    lanes, problems = [], []
    for scheme in schemes:
        for method in methods:
            resolved = method.resolve(scheme, loaded.spec)
            try:
                resolved.check(scheme, loaded.spec)
            except UnsupportedSchemeError as error:
                problems.append(f"{method.name} at {scheme}: {error}")
            lanes.append((Lane(f"{method.name} {scheme}", resolved, scheme), resolved))
    if problems:
        distinct = {problem.split(": ", 1)[1]: problem for problem in problems}
        raise UnsupportedSchemeError(" ".join(distinct.values()))
    return lanes


def _texts(config: RunConfig, loaded: LoadedModel) -> tuple[TokenWindows, Suite, list[str]]:
    """Calibration windows and what is evaluated, with the defaults that depend on the model."""
    embedded = loaded.name in EMBEDDED
    calibration = config.calibration
    source = calibration.dataset if calibration.dataset != "auto" else "stdlib" if embedded else "wikitext2"
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
    texts = [
        scored_text(source if spec == "auto" else spec, loaded.tokenizer, eval_seq_len, config.evals.limit)
        for spec in config.evals.datasets
    ]
    notes = [
        f"calibrated and evaluated on the same text ({scored.name})"
        for scored in texts
        if scored.fingerprint == text.fingerprint
    ]
    return windows, Suite(texts, config.evals.batch_size), notes


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


def _attach_checkpoint(lane: Lane, method: Method, common: _Common) -> None:
    """Give a lane its checkpoint folder, named by everything its codes depend on, this package's code included."""
    config = common.config
    key = provenance.sha256_json(
        {
            "contract": {k: v for k, v in common.fields.items() if k != "evaluation"},
            "method": method.name,
            "options": method.model_dump(mode="json"),
            "scheme": str(lane.scheme),
            "batch_size": config.compute.batch_size,
            "micro_batch": config.compute.micro_batch,
            "device": common.settings.device.type,
            "code": provenance.code_fingerprint(),
        }
    )
    folder = Path(config.resume or config.output) / "checkpoints" / f"{method.name}-{lane.scheme}-{key[:12]}"
    lane.checkpoint = Checkpoint(folder, key, config.restart)


def _evaluate(common: _Common, label: str) -> dict[str, Metric]:
    """Score the model as it is now."""
    return score(
        common.loaded.model,
        common.loaded.blocks,
        common.suite,
        common.settings.device,
        lambda done, total: common.listener.evaluating(label, done, total),
    )


def _baseline(common: _Common) -> Result:
    """Row of the full-precision model; its measurements are cached by content."""
    cache = baseline_cache(common.store.folder, common.fields, common.settings.device)
    notes: list[str] = []
    started = time.perf_counter()
    common.listener.stage("evaluate", BASELINE)
    metrics = {} if common.config.restart else cached_metrics(cache)
    if not metrics:
        metrics = _evaluate(common, BASELINE)
        cache_metrics(cache, metrics)
    cost = Cost(
        seconds=0.0, peak_cpu_bytes=peak_cpu_bytes(), stages={"evaluate": time.perf_counter() - started}
    )
    return _record(common, BASELINE, Scheme(16, 16), {}, metrics, 16.0, cost, notes, None)


def _measure(common: _Common, lane: Lane, method: Method, result: LaneResult) -> Result:
    """Evaluate one finished lane and record its row."""
    loaded, settings = common.loaded, common.settings
    common.listener.stage("evaluate", lane.name)
    started = time.perf_counter()
    with quantized(loaded.model, loaded.blocks, loaded.spec, result, settings):
        metrics = _evaluate(common, lane.name)
    evaluated = time.perf_counter() - started
    notes = method.notes(lane.scheme, loaded.spec) + list(result.notes) + list(common.notes)
    trained = any(record.losses for record in result.records)
    if trained and (settings.device.type == "cuda" or settings.autocast is not None):
        arithmetic = str(settings.autocast or torch.float32).removeprefix("torch.")
        notes.append(f"blocks fitted with {arithmetic} products")
    extra_bits = sum(t.stored_bits for block in result.transforms for t in block)
    n_weights = loaded.spec.n_weights * len(result)
    if common.config.save_dir is not None:
        notes.append(save_plain(loaded, result, Path(common.config.save_dir), method.name))
    cost = Cost(
        seconds=result.seconds,
        peak_gpu_bytes=result.peak_gpu_bytes,
        peak_cpu_bytes=peak_cpu_bytes(),
        stages={"quantize": result.seconds, "evaluate": evaluated},
    )
    bits = (result.weight_bits + extra_bits) / n_weights
    options = method.model_dump(mode="json")
    return _record(common, method.name, lane.scheme, options, metrics, bits, cost, notes, result)


def _record(
    common: _Common,
    method: str,
    scheme: Scheme,
    options: Mapping[str, Any],
    metrics: dict[str, Metric],
    bits: float,
    cost: Cost,
    notes: list[str],
    result: LaneResult | None,
) -> Result:
    compute = common.config.compute
    identity = {
        "contract": common.contract,
        "method": method,
        "options": dict(options),
        "scheme": str(scheme),
        # Nothing of the full-precision row depends on these: with several seeds it is still one record.
        "batch_size": compute.batch_size if result is not None else None,
        "calibration": provenance.calibration_fingerprint(common.fields) if result is not None else None,
    }
    row = Result(
        id=provenance.sha256_json(identity),
        model=common.config.model,
        model_fingerprint=common.fields["model"],
        revision=common.config.revision,
        method=method,
        scheme=str(scheme),
        options=dict(options),
        metrics=metrics,
        bits_per_weight=bits,
        cost=cost,
        contract=common.contract,
        contract_fields=common.fields,
        notes=list(dict.fromkeys(notes)),
        transforms=result.transforms[0] if result is not None and result.transforms else [],
        blocks=result.records if result is not None else [],
        config=common.config.model_dump(mode="json"),
        provenance=provenance.environment(),
        calibration=common.fields["calibration"],
    )
    common.store.save(row)
    return row
