"""Result: one row with everything behind it; and the folder of JSON records that rows are kept in.

A record is a superset of lm-eval's results file, so that tools for those read it: our own fields lie under "qbench"
and hold everything, the other keys repeat part of it in lm-eval's words. Reading uses "qbench" alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from qbench.errors import ConfigError, DataError

SCHEMA_VERSION = 1
BASELINE = "full-precision"  # the method's name in the row of the model as it was given
NLL_ITEMS = (
    "nll_nats"  # items_name of a perplexity: value = exp(mean(items)); of any other: value = mean(items)
)


class _Record(BaseModel):
    # Infinity, the perplexity of a model that collapsed, has no JSON number: written as a string, read as a float.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Metric(_Record):
    """One measurement. Its key in `Result.metrics` is TASK/METRIC, such as `wikitext2/perplexity`.

    Attributes:
        stderr: Standard error of the value, None if it was measured once.
        n: Items that were averaged: windows of text, questions.
        n_total: Items that there would be without a limit.
        protocol: The named protocol, such as `wikitext2 (2048, non-overlapping, test)`.
        items: One number per item in the text's order: for a perplexity the window's mean loss in nats.
        chance: What guessing gives: for a choice among four, 0.25.
    """

    value: float
    stderr: float | None = None
    n: int
    n_total: int | None = None
    unit: str | None = None
    higher_is_better: bool = False
    protocol: str
    items: list[float] | None = None
    items_name: str = NLL_ITEMS
    chance: float | None = None

    @property
    def log_scale(self) -> bool:
        """Whether items are on a log scale: differences of their means are ratios of values."""
        return self.items is not None and self.items_name == NLL_ITEMS

    @model_validator(mode="after")
    def _value_is_mean_of_items(self) -> Self:
        if not self.items:
            return self
        mean = math.fsum(self.items) / len(self.items)
        expected = mean if not self.log_scale else math.exp(mean) if mean < 700 else math.inf
        if not math.isclose(self.value, expected, rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError(
                f"value {self.value} is not the mean of its items ({self.items_name}): {expected}"
            )
        return self


class BlockRecord(_Record):
    """What happened in one block. Errors are MSE / mean(target²).

    Attributes:
        losses: Mean training loss of each epoch.
        local_error: With full-precision inputs: what this block's quantization alone does.
        accumulated_error: With the inputs that the quantized blocks before it give.
    """

    index: int
    seconds: float
    losses: list[float] = []
    local_error: float | None = None
    accumulated_error: float | None = None
    notes: list[str] = []
    extras: dict[str, float] = {}


class Cost(_Record):
    """What making the row cost; evaluation is not in it but by name.

    Attributes:
        seconds: Of all blocks.
        peak_gpu_bytes: Allocated at most while blocks were quantized.
        peak_cpu_bytes: Of the process until the row was finished, whatever else it computed.
        stages: Seconds by stage.
        evaluation_peak_gpu_bytes: Allocated at most while the row's metrics were measured.
    """

    seconds: float
    peak_gpu_bytes: int | None = None
    peak_cpu_bytes: int | None = None
    stages: dict[str, float] = {}
    evaluation_peak_gpu_bytes: int | None = None


class MemoryRecord(_Record):
    """Bytes that the row's model takes. What is stored follows from its shapes; peaks are measured.

    Attributes:
        linear_bytes: Of the blocks' linears: codes, scales, zero points and run-time transforms.
        embedding_bytes: Of the token embedding, as the checkpoint stores it.
        head_bytes: Of the head; 0 where it is the embedding.
        other_bytes: Of norms, biases and position embeddings.
        n_linear_weights: Weights of the blocks' linears.
        kv_cache_bytes: Keys and values of one sequence of `kv_cache_tokens`, at the row's width.
        prompt_tokens: Of the prompt that was read to see the peaks, and `cache_bytes` what its cache held in memory.
        peak_of: "GPU allocations", or "process": resident memory, with all that the process held before.
        simulated: Whether the peaks are those of a simulation in floating point, not of packed weights.
    """

    linear_bytes: int
    embedding_bytes: int
    head_bytes: int
    other_bytes: int
    n_linear_weights: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    kv_cache_bits: int
    prompt_tokens: int | None = None
    cache_bytes: int | None = None
    peak_prefill_bytes: int | None = None
    peak_decode_bytes: int | None = None
    peak_of: str | None = None
    simulated: bool = False

    @property
    def model_bytes(self) -> int:
        """All weights, as stored."""
        return self.linear_bytes + self.embedding_bytes + self.head_bytes + self.other_bytes

    @property
    def bits_per_linear_weight(self) -> float:
        """Stored bits per weight of the blocks' linears; 0 where there are none."""
        return 8 * self.linear_bytes / max(1, self.n_linear_weights)


class Generation(_Record):
    """What the full-precision model and the row's write after a prompt, each by its likeliest token.

    Attributes:
        differs_at: Place of the first token that differs; the number of tokens where none does.
    """

    prompt: str
    reference: str
    text: str
    differs_at: int


class TransformRecord(_Record):
    """A transform that the method left in the model, and what it costs when it cannot be folded."""

    site: str
    kind: str
    foldable: bool
    function_preserving: bool
    stored_bits: int = 0
    flops_per_token: int = 0
    note: str | None = None


class RuntimeCheck(_Record):
    """What one runtime computes from an exported folder, against the fake-quantized reference on the same tokens.

    Attributes:
        runtime: `dequantized` (qbench's own reader), `transformers`, `gptqmodel`, `auto-gptq`.
        failed_at: First linear, block or other thing that differs, such as `layers.17.down_proj`; None if verified.
        dtype: In which the runtime computed; tolerances depend on it.
        largest_logit_difference: Over all tokens of the probe and the vocabulary.
        kl_mean: KL divergence of next-token distributions, nats per token.
        top1_agreement: Share of tokens with the same most likely next token.
        perplexity: On the probe.
        reference_perplexity: Of what it was held against, where that is not the certificate's reference: the same model
            with inputs rounded in the runtime's order of operations.
        note: What was special about loading it.
    """

    runtime: str
    verified: bool
    failed_at: str | None = None
    dtype: str | None = None
    versions: dict[str, str] = {}
    largest_logit_difference: float | None = None
    kl_mean: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    note: str | None = None


class Certificate(_Record):
    """Whether an exported folder computes what was measured, runtime by runtime.

    Attributes:
        format: As `--format` names it.
        folder: Its name, without a path.
        probe: The text that was scored, in words.
        tokens: Fingerprint of the probe's token ids.
        reference_perplexity: Of the fake-quantized model on the probe, quantizing what the format quantizes.
        row_perplexity: The same with everything that the row quantizes; differs where a format leaves operands out.
        bytes: Of the folder's tensors by kind; `expected` is what the row's bits per weight predict for `weights`.
        not_tried: Runtimes that cannot read this folder or are not installed, and why.
    """

    format: str
    folder: str
    probe: str
    tokens: str
    reference_perplexity: float
    row_perplexity: float
    bytes: dict[str, int] = {}
    checks: list[RuntimeCheck] = []
    not_tried: dict[str, str] = {}
    notes: list[str] = []

    @property
    def verified(self) -> bool:
        """Whether no runtime failed."""
        return all(check.verified for check in self.checks)

    def sentence(self) -> str:
        """`verified: dequantized ✓ transformers ✓`, or `FAILED at layers.17.down_proj (gptqmodel)`."""
        failed = [
            f"FAILED at {check.failed_at} ({check.runtime})" for check in self.checks if not check.verified
        ]
        passed = " ".join(f"{check.runtime} ✓" for check in self.checks if check.verified)
        return "; ".join(failed + ([f"verified: {passed}"] if passed else []))


class Result(_Record):
    """One row of a table: one method at one scheme on one model.

    Attributes:
        id: Hash of what the row means: contract, method, options and scheme.
        bits_per_weight: Stored bits of the blocks' linears over their weights, scales, zero points and run-time
            transforms included; embeddings and head are not in it.
        contract: Hash of everything that is not the method (`provenance.contract`), of these `contract_fields`.
        transforms: Of the first block; the others have the same.
        recovery: Percent of the full-precision model's score that is left, by metric; see `recovery`.
        codes: SHA-256 of all integer codes, scales and zero points, block by block; None for full precision.
        checkpoint: Name of the folder of finished blocks below `checkpoints/`.
        certificates: Of the row's exports.
    """

    schema_version: int = SCHEMA_VERSION
    id: str = Field(min_length=12)
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    model: str
    model_fingerprint: str
    revision: str | None = None
    method: str
    scheme: str
    options: dict[str, Any] = {}
    metrics: dict[str, Metric] = {}
    bits_per_weight: float | None = None
    cost: Cost
    contract: str
    contract_fields: dict[str, Any] = {}
    notes: list[str] = []
    transforms: list[TransformRecord] = []
    blocks: list[BlockRecord] = []
    config: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    recovery: dict[str, float] = {}
    memory: MemoryRecord | None = None
    generations: list[Generation] = []
    codes: str | None = None
    checkpoint: str | None = None
    certificates: list[Certificate] = []

    @property
    def is_baseline(self) -> bool:
        """Whether this is the row of the full-precision model."""
        return self.method == BASELINE

    @property
    def scheme_label(self) -> str:
        """The scheme as tables print it: a star on the weights' bits where a method added a level (W2*A8)."""
        starred = any(key.rpartition(".")[2] == "bit_balance" and on for key, on in self.options.items())
        return re.sub(r"^W\d+", r"\g<0>*", self.scheme) if starred else self.scheme

    def row(self) -> dict[str, Any]:
        """The row as `--format json` prints it; a number that is not finite becomes null."""
        return {
            "model": self.model,
            "method": self.method,
            "scheme": self.scheme,
            "options": self.options,
            "metrics": {
                name: {"value": _finite(metric.value), "stderr": _finite(metric.stderr), "n": metric.n}
                for name, metric in self.metrics.items()
            },
            "recovery": self.recovery,
            "bits_per_weight": self.bits_per_weight,
            "memory": self.memory.model_dump() | {"model_bytes": self.memory.model_bytes}
            if self.memory
            else None,
            "cost": self.cost.model_dump(include={"seconds", "peak_gpu_bytes", "peak_cpu_bytes"}),
            "contract": self.contract,
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """The record as it is stored."""
        return json.dumps(
            {"qbench": json.loads(self.model_dump_json()), **_as_lm_eval(self)}, indent=1, allow_nan=False
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a record.

        Raises:
            DataError: If it is no record, damaged, or written by a newer version.
        """
        try:
            own = from_json(text)["qbench"]  # in half the time that json.loads takes
            version = own["schema_version"]
        except (ValueError, KeyError, TypeError):
            raise DataError("not a readable qbench record") from None
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise DataError(
                f"written with schema version {version}, this qbench reads up to {SCHEMA_VERSION}"
            )
        try:
            return cls.model_validate(own)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"damaged qbench record: {where}: {first['msg']}") from None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def recovery(metrics: Mapping[str, Metric], baseline: Mapping[str, Metric]) -> dict[str, float]:
    """Percent of the full-precision score that is left: quotient of accuracies, inverse quotient of perplexities.

    Only of metrics that both were measured on, under the same protocol and with the same number of items.
    """
    found = {}
    for key, metric in metrics.items():
        base = baseline.get(key)
        if base is None or (base.protocol, base.n) != (metric.protocol, metric.n):
            continue
        better, worse = (metric, base) if metric.higher_is_better else (base, metric)
        if worse.value > 0 and math.isfinite(better.value):
            found[key] = 100 * better.value / worse.value
    return found


def split_metric(key: str) -> tuple[str, str]:
    """Task and metric of a key: `wikitext2/perplexity` -> (`wikitext2`, `perplexity`)."""
    task, _, metric = key.rpartition("/")
    return (task, metric) if task else (key, "value")


def _as_lm_eval(result: Result) -> dict[str, Any]:
    """The row in the words of lm-eval's results file (lm_eval/result_schema.py, 0.4.13)."""
    tasks: dict[str, dict[str, Metric]] = {}
    for key, metric in result.metrics.items():
        task, name = split_metric(key)
        tasks.setdefault(task, {})[name] = metric
    scores: dict[str, dict[str, Any]] = {}
    for task, metrics in tasks.items():
        scores[task] = {"name": task, "alias": task, "sample_len": max(m.n for m in metrics.values())}
        for name, metric in metrics.items():
            stderr = _finite(metric.stderr)
            value = _finite(metric.value)
            scores[task] |= {
                f"{name},none": str(metric.value) if value is None else value,
                f"{name}_stderr,none": "N/A" if stderr is None else stderr,
            }
    first = {task: next(iter(metrics.values())) for task, metrics in tasks.items()}
    packages = result.provenance.get("packages") or {}
    commit = result.provenance.get("commit") or {}
    return {
        "results": scores,
        "group_subtasks": {},
        "configs": {task: {"task": task, "protocol": m.protocol} for task, m in first.items()},
        "versions": {task: SCHEMA_VERSION for task in tasks},
        "n-shot": {task: 0 for task in tasks},
        "higher_is_better": {
            task: {name: m.higher_is_better for name, m in metrics.items()} for task, metrics in tasks.items()
        },
        "n-samples": {task: {"original": m.n_total or m.n, "effective": m.n} for task, m in first.items()},
        "config": {
            "model": "qbench",
            "model_args": {
                "pretrained": result.model,
                "revision": result.revision,
                "method": result.method,
                "scheme": result.scheme,
                **result.options,
            },
            "model_revision": result.revision,
            "model_sha": result.model_fingerprint,
        },
        "git_hash": commit.get("hash"),
        "date": datetime.fromisoformat(result.created).timestamp(),
        "transformers_version": packages.get("transformers"),
        "lm_eval_version": packages.get("lm-eval"),
        "model_source": "qbench",
        "model_name": result.model,
        "model_name_sanitized": _sanitized(result.model),
    }


def _sanitized(name: str) -> str:
    """A piece of a file name: a path or hub name keeps its last part."""
    last = name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", last).strip("-.") or "model"


class ResultStore:
    """A folder with one JSON record per row. Several processes may write into it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def save(self, result: Result) -> Path:
        """Write a record; whoever reads meanwhile sees the old file or the new one, never half of it."""
        parts = (result.model, result.method, result.scheme, result.id[:12])
        path = self.folder / ("__".join(_sanitized(part) for part in parts) + ".json")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, result.to_json().encode())
        except OSError as error:
            raise DataError(f"Cannot write {str(path)!r}: {error.strerror}.") from None
        return path

    def load_all(self) -> list[Result]:
        """All records, oldest first. JSON files of other programs are passed over.

        Raises:
            DataError: If the folder does not exist, or a record of ours is damaged: the message names the file.
        """
        if not self.folder.is_dir():
            raise DataError(f"There is no results folder {str(self.folder)!r}.")
        found = [result for path in sorted(self.folder.glob("*.json")) if (result := self._read(path))]
        return sorted(found, key=lambda result: result.created)

    def find(self, id: str) -> Result | None:
        """The record with this id or, if exactly one record's id begins so, with this beginning of an id."""
        if not self.folder.is_dir():
            return None
        paths = sorted(self.folder.glob(f"*__{_sanitized(id[:12])}*.json"))
        found = [result for path in paths if (result := self._read(path)) and result.id.startswith(id)]
        if len({result.id for result in found}) > 1:
            raise ConfigError(f"Several records in {str(self.folder)!r} have an id that begins with {id!r}.")
        return found[0] if found else None

    @classmethod
    def read_file(cls, path: str | Path) -> Result:
        """The record in one file.

        Raises:
            DataError: If it cannot be read or is no record: the message names the file.
        """
        try:
            return Result.from_json(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"Cannot read {str(path)!r}: {error.strerror}.") from None
        except DataError as error:
            raise DataError(f"{str(path)!r}: {error}. Delete the file or restore it.") from None

    def _read(self, path: Path) -> Result | None:
        try:
            data = path.read_bytes()
            if not re.search(rb'"qbench"\s*:', data) and not re.search(r"__[0-9a-f]{12}\.json$", path.name):
                return None
        except OSError as error:
            raise DataError(f"Cannot read {str(path)!r}: {error.strerror}.") from None
        return self.read_file(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content by rename, after the new content has reached the disk."""
    draft = path.with_name(f".{uuid.uuid4().hex}.writing")  # load_all looks at *.json only
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def require_writable(folder: str | Path, option: str = "output") -> None:
    """Refuse a folder that cannot be written to, before any work, and without creating it.

    Raises:
        ConfigError: If it is a file, lies in one, or cannot be written to.
    """
    path = Path(folder)
    try:
        ancestor = next(part for part in [path, *path.absolute().parents] if part.exists())
        if not ancestor.is_dir():
            raise ConfigError(f"{option}={str(folder)!r} cannot be a folder: {str(ancestor)!r} is a file.")
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option}={str(folder)!r} cannot be written to ({error.strerror}). Choose another folder."
        ) from None
