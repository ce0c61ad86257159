"""How far a model's next-token distributions are from the full-precision model's.

The reference keeps, at every scored position, the k likeliest tokens and their log-probabilities, so that it is
computed once and any number of models is compared with it. All tokens beyond these are one lump: the KL divergence over
that coarser alphabet is never above the true one (data processing), and what it may be short of it is bounded at every
position by `_most_cross_entropy`, from quantities that are known exactly. With k as large as the vocabulary it is 0.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench.errors import DataError, NumericalError
from qbench.evals.perplexity import VALUES_PER_CHUNK, evaluating
from qbench.results import Metric

POSITIONS = 1 << 14  # compared at most: 8 windows of 2048
CACHE_BYTES = 512 << 20  # decides k: 5461 at vocabularies up to 65536, or all tokens of a smaller one
QUANTILES = {"kl_median": 0.5, "kl_p95": 0.95, "kl_p99": 0.99, "kl_max": 1.0}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reference:
    """The full-precision model's answers on some windows, in files.

    Attributes:
        tokens: The k likeliest tokens, likeliest first  # [n, t - 1, k]
        logprobs: Theirs, float32  # [n, t - 1, k]
        target: Log-probability of the token that comes  # [n, t - 1]
        tail: Sum of p log p over all other tokens  # [n, t - 1]
        vocab: Size of the vocabulary.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    target: np.ndarray
    tail: np.ndarray
    vocab: int

    @property
    def top_k(self) -> int:
        """Tokens kept at each position."""
        return int(self.tokens.shape[-1])


@dataclass(frozen=True)
class Divergence:
    """A model against a reference. All by window and position  # [n, t - 1]; `loss_change` by window.

    Attributes:
        kl: KL(reference || model) in nats, tokens beyond the k likeliest taken as one.
        kl_missing: Upper bound of what that leaves out.
        agrees: Whether both hold the same token for the likeliest.
        loss_change: Mean increase of the loss in nats  # [n]
    """

    kl: Tensor
    kl_missing: Tensor
    agrees: Tensor
    loss_change: Tensor

    def metrics(self, dataset: str, protocol: str) -> dict[str, Metric]:
        """TASK/METRIC to measurement; means have one item per window."""
        common: dict[str, Any] = {"protocol": protocol, "n_total": len(self.kl)}
        found = {
            "kl_mean": _mean(self.kl.mean(1), "kl_nats", **common),
            "kl_missing": _mean(self.kl_missing.mean(1), "kl_nats", **common),
            "top1_agreement": _mean(
                self.agrees.double().mean(1), "agreement", higher_is_better=True, **common
            ),
            "loss_change": _mean(self.loss_change, "nats", **common),
        }
        flat = self.kl.flatten()
        for name, q in QUANTILES.items():
            value = float(np.quantile(flat.numpy(), q))
            found[name] = Metric(value=value, n=len(flat), unit="nats", protocol=protocol)
        return {f"{dataset}/{name}": metric for name, metric in found.items()}


def _mean(values: Tensor, name: str, **attributes: Any) -> Metric:
    items = values.tolist()
    stderr = float(values.std() / math.sqrt(len(items))) if len(items) > 1 else None
    value = math.fsum(items) / len(items)
    return Metric(value=value, stderr=stderr, n=len(items), items=items, items_name=name, **attributes)


def choose_top_k(positions: int, vocab: int) -> int:
    """As many tokens as `CACHE_BYTES` hold at six or eight bytes each, at most the vocabulary."""
    size = 4 + _token_type(vocab).itemsize
    return max(1, min(vocab, CACHE_BYTES // (positions * size)))


@torch.no_grad()
def write_reference(
    folder: Path,
    model: nn.Module,
    ids: Tensor,
    *,
    top_k: int | None = None,
    batch_size: int = 1,
    device: torch.device | str,
    progress: Progress | None = None,
) -> Reference:
    """Compute the full-precision model's answers and keep them in `folder`, which appears whole or not at all.

    Args:
        folder: Where; one that is there and whole is left as it is.
        model: The full-precision model, ready to run.
        ids: Token windows  # [n, t]
        top_k: Tokens to keep at each position; default: by `choose_top_k`.
        batch_size: Windows per pass. The same one must be used to compare, or rounding is compared too.
        device: Where inputs go.
        progress: Called with (windows done, windows in all).
    """
    n, steps = len(ids), ids.shape[1] - 1
    if n == 0 or steps < 1:
        raise DataError(f"Fidelity needs at least one window of 2 tokens; got {tuple(ids.shape)}.")
    draft = folder.with_name(f".{uuid.uuid4().hex}.writing")
    draft.mkdir(parents=True)
    try:
        files: dict[str, np.ndarray] = {}
        vocab = 0
        with evaluating(model):
            for start in range(0, n, batch_size):
                batch = ids[start : start + batch_size]
                for place, (part, targets) in _logprob_parts(model, batch, device):
                    if not files:
                        vocab = part.shape[-1]
                        k = min(vocab, top_k or choose_top_k(n * steps, vocab))
                        files = _new_files(draft, n, steps, k, vocab)
                    top = part.topk(files["tokens"].shape[-1], dim=-1)
                    rest = part.double().scatter(-1, top.indices, -math.inf)
                    answers = {
                        "tokens": top.indices,
                        "logprobs": top.values,
                        "target": part.gather(-1, targets[..., None])[..., 0],
                        "tail": torch.special.entr(rest.exp()).sum(-1).neg(),
                    }
                    for name, values in answers.items():
                        files[name][start : start + len(batch), place] = values.cpu().numpy()
                if progress is not None:
                    progress(min(start + batch_size, n), n)
        for file in files.values():
            file.flush()
        (draft / "reference.json").write_text(json.dumps({"vocab": vocab}))
        try:
            draft.rename(folder)
        except OSError:  # a damaged one, or another process was faster: then its answers are as good
            if open_reference(folder) is None:
                shutil.rmtree(folder)
                draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    found = open_reference(folder)
    assert found is not None
    return found


def open_reference(folder: Path) -> Reference | None:
    """A reference that was written earlier; None where there is none, or it is damaged."""
    try:
        vocab = int(json.loads((folder / "reference.json").read_text())["vocab"])
        parts = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FILES}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Reference(**parts, vocab=vocab)


@torch.no_grad()
def divergence(
    reference: Reference,
    model: nn.Module,
    ids: Tensor,
    *,
    batch_size: int = 1,
    device: torch.device | str,
    progress: Progress | None = None,
) -> Divergence:
    """Compare a model with a reference on the windows that the reference was computed on.

    Args:
        reference: Of the full-precision model.
        model: The model, ready to run.
        ids: The reference's windows  # [n, t]
        batch_size: The reference's.
        device: Where inputs go.
        progress: Called with (windows done, windows in all).

    Raises:
        NumericalError: If the model's logits are not numbers.
    """
    shape = reference.target.shape
    assert (len(ids), ids.shape[1] - 1) == shape, "the reference is of other windows"
    kl, missing = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    agrees, change = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.float64)
    with evaluating(model):
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            rows = slice(start, start + len(batch))
            for place, (part, targets) in _logprob_parts(model, batch, device):
                if not bool(part.isfinite().all()):
                    raise NumericalError(
                        f"The model's logits on evaluation window {start} are not numbers; try model dtype float32."
                    )
                if part.shape[-1] != reference.vocab:
                    raise DataError(
                        f"The model has {part.shape[-1]} tokens, the reference {reference.vocab}: fidelity compares a "
                        "model with the one it was quantized from."
                    )
                tokens = torch.from_numpy(reference.tokens[rows, place].astype(np.int64)).to(part.device)
                logprobs = torch.from_numpy(reference.logprobs[rows, place].copy()).to(part.device)
                tail = torch.from_numpy(reference.tail[rows, place].copy()).to(part.device)
                values, bound = _lumped_kl(logprobs, tokens, tail, part)
                kl[rows, place], missing[rows, place] = values.cpu(), bound.cpu()
                agrees[rows, place] = (part.argmax(-1) == tokens[..., 0]).cpu()
                target = part.gather(-1, targets[..., None])[..., 0].double().cpu()
                change[rows, place] = (
                    torch.from_numpy(reference.target[rows, place].astype(np.float64)) - target
                )
            if progress is not None:
                progress(min(start + batch_size, len(ids)), len(ids))
    return Divergence(kl, missing, agrees, change.mean(1))


def _lumped_kl(logprobs: Tensor, tokens: Tensor, tail: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) with all tokens but p's k likeliest as one, and a bound of what that leaves out.

    Args:
        logprobs: log p of its k likeliest tokens, descending  # [..., k]
        tokens: Which these are  # [..., k]
        tail: Sum of p log p over the others  # [...]
        q: log q of all tokens  # [..., vocab]
    """
    log_q = q.gather(-1, tokens)
    p = logprobs.exp()
    kl = (p * (logprobs - log_q)).sum(-1, dtype=torch.float64)
    if tokens.shape[-1] == q.shape[-1]:
        return kl.clamp_min(0), torch.zeros_like(kl)
    smallest = torch.finfo(torch.float64).tiny
    rest_p = (1 - p.sum(-1, dtype=torch.float64)).clamp_min(smallest)
    rest_q = (1 - log_q.exp().sum(-1, dtype=torch.float64)).clamp_min(smallest)
    lump = rest_p * (rest_p / rest_q).log()
    bound = tail + _most_cross_entropy(logprobs[..., -1].double(), rest_p, tokens, q) - lump
    return (kl + lump).clamp_min(0), bound.clamp_min(0)


def _most_cross_entropy(cap: Tensor, rest: Tensor, tokens: Tensor, q: Tensor) -> Tensor:
    """Largest value that -sum of p log q over the lumped tokens can take, knowing only p's sum and its largest value.

    For any λ, as 0 <= p <= cap: sum p x <= λ rest + cap · sum max(x - λ, 0) with x = -log q. The least over a few λ.
    """
    x = -q.scatter(-1, tokens, 0.0)  # 0 where p is known: contributes nothing for λ >= 0
    count = q.shape[-1] - tokens.shape[-1]
    mean = x.sum(-1) / count
    spread = ((x.square().sum(-1) / count) - mean.square()).clamp_min(0).sqrt()
    best = torch.full_like(rest, math.inf)
    for c in (-2.0, -1.0, -0.5, 0.0, 0.5, 1.5):
        level = (mean + c * spread).clamp_min(0)
        excess = (x - level[..., None]).clamp_min(0).sum(-1, dtype=torch.float64)
        best = torch.minimum(best, level.double() * rest + cap.exp() * excess)
    return best


def _logprob_parts(model: nn.Module, batch: Tensor, device: torch.device | str) -> Any:
    """Log-probabilities of a pass, some positions at a time: (positions, (log p [b, m, vocab], targets [b, m]))."""
    batch = batch.to(device)
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    targets = batch[:, 1:].to(logits.device)
    size = max(1, VALUES_PER_CHUNK // (4 * logits.shape[0] * logits.shape[-1]))
    for start in range(0, logits.shape[1], size):
        part = logits[:, start : start + size]
        part = part if part.dtype == torch.float64 else part.float()
        yield slice(start, start + size), (part.log_softmax(-1), targets[:, start : start + size])


_FILES = ("tokens", "logprobs", "target", "tail")


def _new_files(folder: Path, n: int, steps: int, k: int, vocab: int) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "tokens": ((n, steps, k), _token_type(vocab)),
        "logprobs": ((n, steps, k), np.float32),
        "target": ((n, steps), np.float32),
        "tail": ((n, steps), np.float64),
    }
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
    }


def _token_type(vocab: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab <= 1 << 16 else np.int32)


# ------------------------------------------------------------------------------------------------ generations


@torch.no_grad()
def greedy(model: nn.Module, prompts: Tensor, n_new: int, device: torch.device | str) -> Tensor:
    """Continue each prompt by its likeliest token, `n_new` times, past any end of text  # [n, n_new]."""
    ids, cache, made = prompts.to(device), None, []
    with evaluating(model):
        for _ in range(n_new):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            made.append(ids.cpu())
    return torch.cat(made, 1)


def first_difference(one: Tensor, other: Tensor) -> list[int]:
    """Place of the first token in which two continuations differ, their length where they do not  # [n, t] each."""
    differs = one != other
    return [int(row.int().argmax()) if bool(row.any()) else len(row) for row in differs]
