"""`qbench eval`: measure any model folder with the evaluators of `qbench run`, as a row that stands beside theirs.

The folder may be full precision, an export of ours (its record says what made it), or a checkpoint that somebody else
quantized and transformers loads. Nothing is quantized here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from qbench import provenance
from qbench.config import ScoreConfig
from qbench.engine.progress import Listener
from qbench.errors import ConfigError, DataError
from qbench.evals.memory import folder_memory, peak_cpu_bytes
from qbench.evaluate import (
    Progress,
    Scores,
    Suite,
    baseline_cache,
    cache_scores,
    cached_scores,
    choose_device,
    make_suite,
    model_fingerprint,
    reference_folder,
    score,
    write_references,
)
from qbench.models.loading import EMBEDDED, ScorableModel, load_as_is, resolve_location
from qbench.results import (
    BASELINE,
    Cost,
    MemoryRecord,
    Result,
    ResultStore,
    recovery,
    require_writable,
)
from qbench.scheme import Scheme

AS_IS = "as-is"  # the method's name where nobody says what made the model
EXPORT_RECORD = "qbench.json"  # beside the weights of a model that qbench exported
PUBLISHED_SEQ_LEN = 2048


def score_model(config: ScoreConfig, listener: Listener | None = None) -> list[Result]:
    """Measure a model and, where it is named, the full-precision model it was made from.

    Args:
        config: The request.
        listener: Told of progress and of each finished row.

    Returns:
        The full-precision row if `fidelity_to` is given, then the model's. Both are in the store.

    Raises:
        ConfigError: Anything wrong with the request.
        DataError: Missing or damaged files.
        NumericalError: The model gives values that are not finite.
    """
    listener = listener or Listener()
    require_writable(config.output)
    if (config.evals.fidelity or config.evals.generate) and config.fidelity_to is None:
        raise ConfigError(
            "--fidelity and --generate compare with a full-precision model: name it with --fidelity-to MODEL."
        )
    device = choose_device(config.compute.device)
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    store = ResultStore(config.output)
    made_by = _record_beside(config.model)
    base = None if config.fidelity_to is None else _score_base(config, device, store, made_by, listener)
    model = _load(config, config.model, device, listener)
    suite = _suite(config, model, made_by)
    if base is not None and suite.contract_fields() != base.contract_fields["evaluation"]:
        raise ConfigError(
            f"{config.model} and {config.fidelity_to} do not read the texts in the same tokens, so their distributions "
            "cannot be compared. Name the model that it was made from, or leave --fidelity-to out."
        )
    fields = _fields(model, suite, base, made_by)
    listener.stage("evaluate", config.model)
    started = time.perf_counter()
    scores = score(
        model.model,
        model.blocks,
        suite,
        device,
        _progress(listener, config.model),
        None if base is None else reference_folder(store.folder, base.contract_fields, suite, device),
        resident=model.quantization is not None,
    )
    row = _row(config, model, fields, scores, base, made_by, time.perf_counter() - started)
    store.save(row)
    listener.row(row)
    return [row] if base is None else [base, row]


def _score_base(
    config: ScoreConfig,
    device: torch.device,
    store: ResultStore,
    made_by: Result | None,
    listener: Listener,
) -> Result:
    """The full-precision model's row; its scores and its answers are cached by content."""
    assert config.fidelity_to is not None
    model = _load(config, config.fidelity_to, device, listener)
    if model.quantization is not None:
        raise ConfigError(
            f"--fidelity-to {config.fidelity_to} is itself quantized ({model.quantization.get('quant_method')}); name "
            "the full-precision model it was made from."
        )
    suite = _suite(config, model, made_by)
    fields = _fields(model, suite, None, None)
    if made_by is not None:
        if made_by.contract_fields.get("model") != fields["model"]:
            raise ConfigError(
                f"--fidelity-to {config.fidelity_to} is not the model that {config.model} was made from, which is "
                f"{made_by.model}: their files differ."
            )
        fields = {**made_by.contract_fields, **fields}
    cache = baseline_cache(store.folder, fields, device)
    progress = _progress(listener, BASELINE)
    listener.stage("evaluate", BASELINE)
    started = time.perf_counter()
    scores = None if config.restart else cached_scores(cache)
    if scores is None:
        scores = score(model.model, model.blocks, suite, device, progress)
        cache_scores(cache, scores)
    references = reference_folder(store.folder, fields, suite, device)
    if references is not None:
        write_references(model.model, model.blocks, suite, device, references, progress, config.restart)
    row = _row(config, model, fields, scores, None, None, time.perf_counter() - started, BASELINE)
    store.save(row)
    listener.row(row)
    return row


def _load(config: ScoreConfig, name: str, device: torch.device, listener: Listener) -> ScorableModel:
    listener.stage("load", name)
    return load_as_is(
        name,
        config.revision if name == config.model else None,
        dtype=config.compute.model_dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
    )


def _suite(config: ScoreConfig, model: ScorableModel, made_by: Result | None) -> Suite:
    seq_len = config.evals.seq_len or min(PUBLISHED_SEQ_LEN, model.max_seq_len)
    if seq_len > model.max_seq_len:
        raise ConfigError(
            f"evaluation seq_len={seq_len} is longer than the {model.max_seq_len} tokens {model.name} was made for. "
            f"Use --seqlen {model.max_seq_len} or less."
        )
    origins = {model.name, config.fidelity_to, None if made_by is None else made_by.model}
    source = "stdlib" if origins & set(EMBEDDED) else "wikitext2"
    return make_suite(config.evals, model.tokenizer, seq_len, model.max_seq_len, source)


def _progress(listener: Listener, label: str) -> Progress:
    return lambda what, done, total: listener.evaluating(f"{label}, {what}", done, total)


def _record_beside(name: str) -> Result | None:
    """The record of the run that an export of ours came from."""
    path = Path(resolve_location(name)) / EXPORT_RECORD
    if not path.is_file():
        return None
    try:
        return Result.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(f"{str(path)!r}: {error}. Delete the file to score the folder as it is.") from None


def _fields(
    model: ScorableModel, suite: Suite, base: Result | None, made_by: Result | None
) -> dict[str, Any]:
    """The contract's fields: those of the run that made the model where it is known, with this evaluation.

    Without a record nothing is known of a calibration, and the model is its own, or the one it was made from.
    """
    evaluation = {"evaluation": suite.contract_fields()}
    if made_by is not None:
        return {**made_by.contract_fields, **evaluation}
    if base is not None:
        return {**base.contract_fields, **evaluation}
    return {
        "model": model_fingerprint(model.model, model.location),
        "model_dtype": str(model.model.dtype).removeprefix("torch."),
        **evaluation,
    }


def _row(
    config: ScoreConfig,
    model: ScorableModel,
    fields: dict[str, Any],
    scores: Scores,
    base: Result | None,
    made_by: Result | None,
    seconds: float,
    method: str | None = None,
) -> Result:
    contract, fields = provenance.contract(fields)
    memory = _memory(model, scores)
    scheme, notes = _scheme(model, made_by)
    options: dict[str, Any] = dict(made_by.options) if made_by is not None else {}
    if method is None:  # two folders of one base are two rows
        weights = model_fingerprint(model.model, model.location)
        options |= {"folder": Path(model.location).name, "weights": weights[:12]}
    method = method or (AS_IS if made_by is None else made_by.method)
    identity = {"contract": contract, "method": method, "options": options, "scheme": str(scheme)}
    against = scores.metrics if method == BASELINE else base.metrics if base is not None else {}
    return Result(
        id=provenance.sha256_json(identity),
        model=_shown_model(model, base, made_by),
        model_fingerprint=fields["model"],
        revision=config.revision,
        method=method,
        scheme=str(scheme),
        options=options,
        metrics=scores.metrics,
        bits_per_weight=None if memory is None else memory.bits_per_linear_weight,
        cost=Cost(seconds=0.0, peak_cpu_bytes=peak_cpu_bytes(), stages={"evaluate": seconds}),
        contract=contract,
        contract_fields=fields,
        notes=notes,
        config=config.model_dump(mode="json", exclude={"output", "restart"}),
        provenance=provenance.environment(),
        calibration=fields.get("calibration") or {},
        recovery=recovery(scores.metrics, against),
        memory=memory,
        generations=scores.generations,
    )


def _shown_model(model: ScorableModel, base: Result | None, made_by: Result | None) -> str:
    """The name under which tables group the row: the full-precision model's, where it is known."""
    if base is not None:
        return base.model
    return model.name if made_by is None else made_by.model


def _memory(model: ScorableModel, scores: Scores) -> MemoryRecord | None:
    """By the folder's files; a hub name or an old .bin file has no such account."""
    folder = Path(model.location)
    if not any(folder.glob("*.safetensors")):
        return None
    return folder_memory(model.model, folder, tokens=model.max_seq_len, **scores.peaks)


def _scheme(model: ScorableModel, made_by: Result | None) -> tuple[Scheme, list[str]]:
    """Bits as the folder states them, and what a reader must know of them."""
    settings = model.quantization
    if made_by is not None:
        scheme = Scheme.parse(made_by.scheme)
        note = (
            f"scored from its exported folder ({(settings or {}).get('quant_method', 'dequantized weights')})"
        )
        plain = settings is None or settings.get("quant_method") != "compressed-tensors"
        if scheme.attention_bits != (16, 16) and plain:
            note += "; activations are not quantized when transformers runs it"
        return scheme, [note]
    if settings is None:
        return Scheme(16, 16), []
    found = stated_bits(settings)
    by = f"quantized by {settings.get('quant_method', 'an unnamed method')}, as its folder says"
    if found is None:
        return Scheme(16, 16), [f"{by}; its bits are not stated in a way that qbench reads"]
    return found, [by]


def stated_bits(settings: dict[str, Any]) -> Scheme | None:
    """The scheme in a `quantization_config` of GPTQ, AWQ, bitsandbytes or compressed-tensors."""
    groups = settings.get("config_groups")
    if isinstance(groups, dict) and groups:
        first = next(iter(groups.values()))
        weights, inputs = first.get("weights") or {}, first.get("input_activations") or {}
        bits, size, symmetric = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric")
        abits = inputs.get("num_bits") or 16
    else:
        loaded = 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None
        bits, abits = settings.get("bits") or settings.get("w_bit") or loaded, 16
        size = settings.get("group_size") or settings.get("q_group_size")
        symmetric = settings.get("sym", not settings.get("zero_point", False))
    if bits is None:
        return None
    try:
        group_size = size if isinstance(size, int) and size > 0 else None
        return Scheme(int(bits), int(abits), group_size=group_size, symmetric=bool(symmetric))
    except (TypeError, ValueError, ConfigError):
        return None
