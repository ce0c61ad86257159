"""What a model is measured by, and the measuring of one model in memory: shared by `qbench run` and `qbench eval`.

A suite is prepared once and scores any number of models, so that every row of a table is measured on the same
windows. It knows nothing of methods: it is handed a model that is ready to run.
"""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbench import provenance
from qbench.data.text import Text, load_text, parse_dataset
from qbench.data.windows import TokenWindows, evaluation_windows
from qbench.engine.install import on_device
from qbench.engine.settings import EngineSettings
from qbench.errors import ConfigError
from qbench.evals.perplexity import perplexity, protocol_name
from qbench.results import Metric, write_atomically

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ScoredText:
    """One text to measure perplexity on, cut into windows.

    Attributes:
        fingerprint: Of the text's content, to compare it with the calibration text's.
        n_total: Windows that there would be without a limit.
    """

    name: str
    windows: TokenWindows
    protocol: str
    fingerprint: str
    n_total: int


@dataclass(frozen=True)
class Suite:
    """Everything that a model is scored on.

    Attributes:
        batch_size: Windows per forward pass; 0 chooses by the device.
    """

    texts: Sequence[ScoredText]
    batch_size: int = 0

    def contract_fields(self) -> dict[str, Any]:
        """What two rows must share to be ranked together, by dataset."""
        return {t.name: {"protocol": t.protocol, "tokens": t.windows.fingerprint} for t in self.texts}


def scored_text(spec: str, tokenizer: Any, seq_len: int, limit: int | None = None) -> ScoredText:
    """Read the evaluation split of a dataset and cut it into windows.

    Args:
        spec: NAME, PATH or NAME=PATH.
        tokenizer: The model's.
        seq_len: Tokens per window.
        limit: Keep only the first windows.

    Raises:
        DataError: If the text is missing, unreadable, or shorter than one window.
    """
    name, target = parse_dataset(spec)
    text: Text = load_text(target, "evaluation")
    every = evaluation_windows(text, tokenizer, seq_len)
    windows = evaluation_windows(text, tokenizer, seq_len, limit) if limit else every
    applied = limit if len(windows.ids) < len(every.ids) else None
    cut = "non-overlapping" if text.documents is None else "random, within documents"
    protocol = protocol_name(name, seq_len, windows.split, applied, cut)
    return ScoredText(name, windows, protocol, text.fingerprint, len(every.ids))


def score(
    model: nn.Module,
    blocks: nn.ModuleList,
    suite: Suite,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Metric]:
    """Measure the model as it is now.

    Args:
        model: A causal language model on the CPU.
        blocks: Its decoder layers: these visit the device one by one if the whole model does not fit.
        suite: What to measure.
        device: Where to compute; the model is back on the CPU afterwards.
        progress: Called with (windows done, windows in all) for each text.

    Returns:
        TASK/METRIC to measurement, in the suite's order.
    """
    metrics = {}
    with on_device(model, blocks, device):
        for text in suite.texts:
            ids = text.windows.ids
            result = perplexity(
                model,
                ids,
                batch_size=suite.batch_size or EngineSettings(device).forward_batch(ids.shape[1]),
                device=device,
                progress=progress,
            )
            metrics[f"{text.name}/perplexity"] = Metric(
                value=result.value,
                stderr=result.stderr,
                n=len(result.window_nll),
                n_total=text.n_total,
                protocol=text.protocol,
                items=result.window_nll,
            )
    return metrics


def cached_metrics(path: Path) -> dict[str, Metric]:
    """Metrics that `cache_metrics` kept; none where the file is missing or damaged: measuring again costs only time."""
    try:
        return {name: Metric(**m) for name, m in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def cache_metrics(path: Path, metrics: dict[str, Metric]) -> None:
    """Keep a model's metrics for later runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({k: m.model_dump() for k, m in metrics.items()}).encode())


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


def peak_cpu_bytes() -> int:
    """Peak resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
