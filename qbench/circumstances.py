"""What all rows of a pass share: the model, the arithmetic, the texts, and the contract that says so in a hash.

Two rows of one contract differ by their methods only. The defaults that depend on the model are settled here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qbench import provenance
from qbench.config import RunConfig
from qbench.data.overlap import ngram_overlap, same_corpus
from qbench.data.text import load_text, parse_dataset
from qbench.data.windows import TokenWindows, draw_calibration
from qbench.engine.channel_files import ChannelFiles, read_channels
from qbench.engine.progress import Listener
from qbench.engine.settings import EngineSettings
from qbench.errors import ConfigError
from qbench.evaluate import Suite, choose_device, make_suite, model_fingerprint
from qbench.models.loading import EMBEDDED, LoadedModel
from qbench.results import ResultStore

EMBEDDED_SAMPLES, PUBLISHED_SAMPLES = 16, 128
PUBLISHED_SEQ_LEN, EMBEDDED_SEQ_LEN = 2048, 256


@dataclass(frozen=True)
class Circumstances:
    """What all rows of a pass share."""

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


def circumstances(config: RunConfig, loaded: LoadedModel, listener: Listener) -> Circumstances:
    """Settle everything that does not depend on the method; reads the texts and every weight once.

    Raises:
        ConfigError: A window longer than the model takes.
        DataError: A text or a file of channel ranges that is missing, unreadable or too short.
    """
    settings = _settings(config, choose_device(config.compute.device), loaded)
    files = _channel_files(config, loaded)
    listener.stage("calibration")
    calibration, suite, notes = read_texts(config, loaded)
    overlap, warnings = _overlap(config, loaded, calibration, suite)
    contract, fields = provenance.contract(_contract_fields(config, loaded, settings, calibration, suite))
    for warning in warnings:
        listener.note(warning)
    return Circumstances(
        config, loaded, settings, calibration, suite, contract, fields, ResultStore(config.output), listener,
        [*notes, *warnings], overlap, files,
    )  # fmt: skip


def _channel_files(config: RunConfig, loaded: LoadedModel) -> ChannelFiles | None:
    """Channel ranges that are given, and whether observed ones are to be written."""
    scales, shifts = (
        None if path is None else read_channels(path, loaded.spec, loaded.architecture.blocks)
        for path in (config.calibration.act_scales, config.calibration.act_shifts)
    )
    keep = config.save_act_scales is not None
    return None if scales is None and shifts is None and not keep else ChannelFiles(scales, shifts, keep)


def _settings(config: RunConfig, device: torch.device, loaded: LoadedModel) -> EngineSettings:
    compute, asked = config.compute, config.quantizer.attention_granularity
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
        attention_granularity=loaded.spec.published_granularity if asked == "published" else asked,
        allow_fallback=compute.allow_fallback,
        seed=config.calibration.seed,
    )


def _calibration_source(config: RunConfig, loaded: LoadedModel) -> str:
    asked = config.calibration.dataset
    return asked if asked != "auto" else "stdlib" if loaded.name in EMBEDDED else "wikitext2"


def read_texts(config: RunConfig, loaded: LoadedModel) -> tuple[TokenWindows, Suite, list[str]]:
    """Calibration windows, what is evaluated, and notes on the two, with the defaults that depend on the model.

    Raises:
        ConfigError: A window longer than the model takes.
        DataError: A text that is missing, unreadable or too short.
    """
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
                f"Use --{'eval-' * (what == 'evaluation')}seqlen {loaded.max_seq_len} or less."
            )
    n_samples = calibration.n_samples or (EMBEDDED_SAMPLES if embedded else PUBLISHED_SAMPLES)
    if config.compute.batch_size > n_samples:
        raise ConfigError(
            f"batch_size={config.compute.batch_size} is more than the {n_samples} calibration windows: a step would "
            "have fewer samples than were asked for. Use a smaller --batch-size, or more --nsamples."
        )
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
        "arithmetic": settings.arithmetic,
        "inputs_of_later_blocks": "quantized path",
    }
