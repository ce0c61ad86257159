"""What a model is measured by, and the measuring of one model in memory: shared by `qbench run` and `qbench eval`.

A suite is prepared once and scores any number of models, so that every row of a table is measured on the same windows
and items. It knows nothing of methods: it is handed a model that is ready to run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench import provenance
from qbench.config import EvalConfig
from qbench.data.text import load_text, parse_dataset
from qbench.data.windows import TokenWindows, evaluation_windows
from qbench.engine.install import on_device
from qbench.engine.settings import EngineSettings
from qbench.errors import ConfigError
from qbench.evals import fidelity
from qbench.evals.memory import measure_peaks
from qbench.evals.perplexity import perplexity, protocol_name
from qbench.evals.tasks import TaskSet, load_tasks
from qbench.evals.words import WordText, word_perplexity, word_text
from qbench.results import Generation, Metric, write_atomically

Progress = Callable[[str, int, int], None]  # what is measured, done, in all
PROMPTS, PROMPT_TOKENS = 8, 64  # of the greedy continuations: the beginnings of the first windows


@dataclass(frozen=True)
class ScoredText:
    """One text to measure on.

    Attributes:
        fingerprint: Of the text's content, to compare it with the calibration text's.
        n_total: Windows that there would be without a limit.
        words: Its documents, where perplexity per word is asked for.
    """

    name: str
    windows: TokenWindows
    protocol: str
    fingerprint: str
    n_total: int
    words: WordText | None = None


@dataclass(frozen=True)
class Suite:
    """Everything that a model is scored on.

    Attributes:
        tokenizer: The model's.
        max_length: Longest sequence the model takes.
        batch_size: Windows per forward pass; 0 chooses by the device.
        fidelity: Whether to compare with the full-precision model's distributions.
        generate: Tokens of the greedy continuations to compare with the full-precision model's.
    """

    texts: Sequence[ScoredText]
    tokenizer: Any
    max_length: int
    batch_size: int = 0
    tasks: TaskSet | None = None
    fidelity: bool = False
    generate: int = 0

    def contract_fields(self) -> dict[str, Any]:
        """What two rows must share to be ranked together, by dataset or task."""
        fields: dict[str, Any] = {}
        for text in self.texts:
            fields[text.name] = {"protocol": text.protocol, "tokens": text.windows.fingerprint}
            if text.words is not None:
                digest = provenance.sha256_json([list(text.words.documents), list(text.words.words)])
                fields[f"{text.name}/word_perplexity"] = {
                    "protocol": text.words.protocol,
                    "documents": digest,
                }
            if self.fidelity:
                fields[f"{text.name}/kl_mean"] = {"protocol": self.fidelity_protocol(text)}
            if self.generate:
                fields[f"{text.name}/first_difference"] = {"protocol": self.generation_protocol(text)}
        return fields | (self.tasks.contract_fields() if self.tasks else {})

    def windows_per_pass(self, device: torch.device, seq_len: int) -> int:
        """As asked for, or by the device."""
        return self.batch_size or EngineSettings(device).forward_batch(seq_len)

    def compared(self, text: ScoredText) -> Tensor:
        """The windows on which distributions are compared  # [n, t]."""
        ids = text.windows.ids
        return ids[: max(1, fidelity.POSITIONS // (ids.shape[1] - 1))]

    def prompts(self, text: ScoredText) -> Tensor:
        """Beginnings of windows that are continued  # [n, t]."""
        return text.windows.ids[:PROMPTS, :PROMPT_TOKENS]

    def fidelity_protocol(self, text: ScoredText) -> str:
        """Its name."""
        n = len(self.compared(text))
        shown = text.protocol if n == len(text.windows.ids) else f"{text.protocol} first {n} windows"
        return f"{shown}, against full precision"

    def generation_protocol(self, text: ScoredText) -> str:
        """How a text's greedy continuations are made, in the words of a row."""
        n, length = self.prompts(text).shape
        return f"{text.name} greedy, {n} prompts of {length}, {self.generate} tokens, against full precision"


@dataclass(frozen=True)
class Scores:
    """Everything measured of one model.

    Attributes:
        metrics: TASK/METRIC to measurement, in the suite's order.
        peaks: Measured fields of a `MemoryRecord`.
        peak_gpu_bytes: Allocated at most while the metrics were measured, None on a CPU.
    """

    metrics: dict[str, Metric]
    generations: list[Generation] = field(default_factory=list)
    peaks: dict[str, Any] = field(default_factory=dict)
    peak_gpu_bytes: int | None = None


def make_suite(evals: EvalConfig, tokenizer: Any, seq_len: int, max_length: int, source: str) -> Suite:
    """Read and prepare everything that a request evaluates on.

    Args:
        evals: The request.
        tokenizer: The model's.
        seq_len: Tokens per perplexity window.
        max_length: Longest sequence the model takes.
        source: Dataset that `auto` stands for.

    Raises:
        ConfigError: Unknown tasks, continuations longer than the model takes.
        DataError: Texts or tasks that are missing, unreadable or too short.
    """
    if min(PROMPT_TOKENS, seq_len) + evals.generate > max_length:
        raise ConfigError(
            f"--generate {evals.generate} after prompts of {min(PROMPT_TOKENS, seq_len)} tokens is more than the "
            f"{max_length} tokens of this model. Use --generate {max(0, max_length - PROMPT_TOKENS)} or less."
        )
    texts = [
        scored_text(
            source if spec == "auto" else spec,
            tokenizer,
            seq_len,
            evals.limit,
            max_length if evals.word_perplexity else None,
        )
        for spec in evals.datasets
    ]
    tasks = load_tasks(evals.tasks, evals.limit_items or evals.limit, evals.fewshot) if evals.tasks else None
    return Suite(texts, tokenizer, max_length, evals.batch_size, tasks, evals.fidelity, evals.generate)


def scored_text(
    spec: str, tokenizer: Any, seq_len: int, limit: int | None = None, rolling: int | None = None
) -> ScoredText:
    """Read the evaluation split of a dataset and cut it into windows.

    Args:
        spec: NAME, PATH or NAME=PATH.
        tokenizer: The model's.
        seq_len: Tokens per window.
        limit: Keep only the first windows, and of documents as many.
        rolling: Also prepare perplexity per word, with rolling windows of this length.

    Raises:
        DataError: If the text is missing, unreadable, or shorter than one window.
    """
    name, target = parse_dataset(spec)
    text = load_text(target, "evaluation")
    every = evaluation_windows(text, tokenizer, seq_len)
    windows = evaluation_windows(text, tokenizer, seq_len, limit) if limit else every
    applied = limit if len(windows.ids) < len(every.ids) else None
    cut = "non-overlapping" if text.documents is None else "random, within documents"
    protocol = protocol_name(name, seq_len, windows.split, applied, cut)
    if rolling and text.documents is not None:
        raise ConfigError(
            f"Word perplexity is defined for one text; {name} is evaluated on random pieces of documents. "
            "Leave --word-perplexity out."
        )
    words = word_text(name, text.text, rolling, limit) if rolling else None
    return ScoredText(name, windows, protocol, text.fingerprint, len(every.ids), words)


def score(
    model: nn.Module,
    blocks: nn.ModuleList,
    suite: Suite,
    device: torch.device,
    progress: Progress | None = None,
    references: Path | None = None,
    resident: bool = False,
) -> Scores:
    """Measure the model as it is now.

    Args:
        model: A causal language model on the CPU.
        blocks: Its decoder layers: these visit the device one by one if the whole model does not fit.
        suite: What to measure.
        device: Where to compute; the model is back on the CPU afterwards.
        progress: Called after each pass.
        references: Folder of the full-precision model's answers (`write_references`); without it nothing is compared.
        resident: The model is on the device already and stays there.
    """
    metrics: dict[str, Metric] = {}
    generations: list[Generation] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with nullcontext() if resident else on_device(model, blocks, device):
        for text in suite.texts:
            ids = text.windows.ids
            batch_size = suite.windows_per_pass(device, ids.shape[1])
            result = perplexity(
                model, ids, batch_size=batch_size, device=device, progress=_telling(progress, text.name)
            )
            metrics[f"{text.name}/perplexity"] = Metric(
                value=result.value,
                stderr=result.stderr,
                n=len(result.window_nll),
                n_total=text.n_total,
                protocol=text.protocol,
                items=result.window_nll,
            )
            if text.words is not None:
                metrics[f"{text.name}/word_perplexity"] = word_perplexity(
                    model,
                    suite.tokenizer,
                    text.words,
                    max_length=suite.max_length,
                    device=device,
                    progress=_telling(progress, f"{text.name} words"),
                )
            if references is not None:
                _compare(model, suite, text, device, progress, references, metrics, generations)
        if suite.tasks is not None:
            metrics |= suite.tasks.score(model, suite.tokenizer, device, _telling(progress, "tasks"))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        # this counts anew, for each of its phases
        peaks = measure_peaks(model, suite.texts[0].windows.ids[:1], device) if suite.texts else {}
    return Scores(metrics, generations, peaks, peak)


def _compare(
    model: nn.Module,
    suite: Suite,
    text: ScoredText,
    device: torch.device,
    progress: Progress | None,
    references: Path,
    metrics: dict[str, Metric],
    generations: list[Generation],
) -> None:
    """Measure one text's distance from the full-precision model."""
    if suite.fidelity:
        ids = suite.compared(text)
        reference = fidelity.open_reference(references / text.name)
        assert reference is not None, "references are written before any model is compared"
        found = fidelity.divergence(
            reference,
            model,
            ids,
            batch_size=suite.windows_per_pass(device, ids.shape[1]),
            device=device,
            progress=_telling(progress, f"{text.name} fidelity"),
        )
        metrics |= found.metrics(text.name, suite.fidelity_protocol(text))
    if suite.generate:
        prompts = suite.prompts(text)
        expected = torch.from_numpy(np.load(_generated(references, text, suite.generate)))
        made = fidelity.greedy(model, prompts, suite.generate, device)
        places = fidelity.first_difference(expected, made)
        items = [float(place) for place in places]
        metrics[f"{text.name}/first_difference"] = Metric(
            value=sum(items) / len(items),
            stderr=float(np.std(items, ddof=1) / len(items) ** 0.5) if len(items) > 1 else None,
            n=len(items),
            unit="tokens",
            higher_is_better=True,
            protocol=suite.generation_protocol(text),
            items=items,
            items_name="tokens",
        )
        decode = suite.tokenizer.decode
        generations += [
            Generation(prompt=decode(p), reference=decode(e), text=decode(m), differs_at=place)
            for p, e, m, place in zip(prompts, expected, made, places, strict=True)
        ]


def write_references(
    model: nn.Module,
    blocks: nn.ModuleList,
    suite: Suite,
    device: torch.device,
    references: Path,
    progress: Progress | None = None,
    restart: bool = False,
) -> None:
    """Keep the full-precision model's answers for `score`, as far as they are not there yet.

    Args:
        model: The full-precision model, on the CPU.
        blocks: Its decoder layers.
        suite: What will be measured.
        device: Where to compute.
        references: From `reference_folder`.
        progress: Called after each pass.
        restart: Compute them anew.
    """
    if restart:
        shutil.rmtree(references, ignore_errors=True)
    for text in suite.texts:
        ids = suite.compared(text)
        if suite.fidelity and (fidelity.open_reference(references / text.name) is None):
            with on_device(model, blocks, device):
                fidelity.write_reference(
                    references / text.name,
                    model,
                    ids,
                    batch_size=suite.windows_per_pass(device, ids.shape[1]),
                    device=device,
                    progress=_telling(progress, f"{text.name} reference"),
                )
        path = _generated(references, text, suite.generate)
        if suite.generate and not path.exists():
            with on_device(model, blocks, device):
                made = fidelity.greedy(model, suite.prompts(text), suite.generate, device)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{uuid.uuid4().hex}.{path.name}")  # several processes may share a store
            np.save(draft, made.numpy())
            draft.rename(path)


def _generated(references: Path, text: ScoredText, n_new: int) -> Path:
    return references / f"{text.name}-greedy-{n_new}.npy"


def reference_folder(store: Path, fields: dict[str, Any], suite: Suite, device: torch.device) -> Path | None:
    """Where the full-precision model's answers are kept, by all they depend on; None where nothing is compared.

    Rounding depends on the device, the batch and the libraries: with these in the name, a model that is not quantized
    differs from its own reference by exactly 0.
    """
    if not (suite.fidelity or suite.generate):
        return None
    key = provenance.sha256_json(
        {
            "model": fields["model"],
            "model_dtype": fields["model_dtype"],
            "windows": {t.name: [t.windows.fingerprint, len(suite.compared(t))] for t in suite.texts},
            "batch": [suite.windows_per_pass(device, t.windows.ids.shape[1]) for t in suite.texts],
            "device": device.type,
            "bytes": fidelity.CACHE_BYTES,
            "packages": [torch.__version__, provenance.environment()["packages"]["transformers"]],
        }
    )
    return store / "cache" / f"reference-{key[:24]}"


def _telling(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


def cached_scores(path: Path) -> Scores | None:
    """What `cache_scores` kept; None where the file is missing or damaged: measuring again costs only time."""
    try:
        kept = json.loads(path.read_text())
        return Scores({name: Metric(**m) for name, m in kept["metrics"].items()}, peaks=dict(kept["peaks"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def cache_scores(path: Path, scores: Scores) -> None:
    """Keep the full-precision model's scores for later runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = {name: metric.model_dump() for name, metric in scores.metrics.items()}
    write_atomically(path, json.dumps({"metrics": metrics, "peaks": scores.peaks}).encode())


def baseline_cache(store: Path, fields: dict[str, Any], device: torch.device) -> Path:
    """File of the full-precision model's metrics, named by the content they depend on.

    Args:
        store: The results folder.
        fields: The contract's fields: model, its dtype and the evaluation decide.
        device: Kernels of a CPU and a GPU differ in the last digits.
    """
    key = provenance.sha256_json(
        {k: fields[k] for k in ("model", "model_dtype", "evaluation")} | {"device": device.type}
    )
    return store / "cache" / f"baseline-{key[:24]}.json"


def choose_device(asked: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device of this machine.

    Raises:
        ConfigError: If there is no such device here.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device={asked}: torch sees no CUDA device here. Use --device cpu, or leave it out."
        )
    device = torch.device(asked)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device={asked}: there are {torch.cuda.device_count()} CUDA devices here, counted from 0."
        )
    return device


def model_fingerprint(model: nn.Module, location: str) -> str:
    """Identity of a model by content: its folder's files, or the weights themselves for a hub name."""
    if Path(location).is_dir():
        return provenance.fingerprint_folder(location)
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
