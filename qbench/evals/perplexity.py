"""Perplexity under a named protocol, keeping every window's loss.

The value is exp of the mean loss over the tokens that were actually predicted, never over those that were
asked for: with a limit the authors' code divides by the whole text. Per-window losses make paired comparisons
possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.errors import DataError, NumericalError

# Logits are taken to float32 this many at a time: 64 Mi values are 256 MiB, whatever the vocabulary.
VALUES_PER_CHUNK = 1 << 26


@dataclass(frozen=True)
class PerplexityResult:
    """Mean negative log-likelihood of each window, in nats per predicted token."""

    window_nll: list[float]
    n_predicted: int

    @property
    def value(self) -> float:
        """Perplexity: exp of the mean over all predicted tokens (all windows are equally long)."""
        mean = math.fsum(self.window_nll) / len(self.window_nll)
        return math.exp(mean) if mean < 700 else math.inf  # exp(710) overflows a float

    @property
    def stderr(self) -> float | None:
        """Standard error by the delta method from the spread between windows; None with a single window."""
        n = len(self.window_nll)
        if n < 2:
            return None
        mean = math.fsum(self.window_nll) / n
        variance = math.fsum((x - mean) ** 2 for x in self.window_nll) / (n - 1)
        return self.value * math.sqrt(variance / n)


def protocol_name(
    dataset: str, seq_len: int, split: str, limit: int | None = None, cut: str = "non-overlapping"
) -> str:
    """Name the protocol: `wikitext2 (2048, non-overlapping, test)`, with the limit if one was set.

    `cut` says how windows were taken from the text; C4's are random ones within documents.
    """
    windows = "" if limit is None else f", first {limit} windows"
    return f"{dataset} ({seq_len}, {cut}, {split}{windows})"


@torch.no_grad()
def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Score token windows with a causal language model.

    Each window predicts its tokens 2 ... seq_len from those before them in the window. Log-softmax in float32
    (float64 for a float64 model), sums in float64. The model's training mode is restored afterwards.

    Args:
        model: Any causal language model of transformers, given ready to run.
        ids: Token windows  # [n, seq_len]
        batch_size: Windows per forward pass; need not divide n.
        device: Where inputs go; default: where the model's parameters are.
        progress: Called with (windows done, windows in all) after each pass.

    Raises:
        DataError: If there is no window, or a window holds no prediction.
        NumericalError: If a window's loss is not a number.
    """
    n, seq_len = ids.shape
    if n == 0 or seq_len < 2:
        raise DataError(f"Perplexity needs at least one window of 2 tokens; got {n} windows of {seq_len}.")
    device = next(model.parameters()).device if device is None else torch.device(device)
    window_nll: list[float] = []
    with evaluating(model):
        for batch in ids.split(batch_size):
            batch = batch.to(device)
            window_nll += _batch_nll(model, batch).tolist()
            for i in range(len(window_nll) - len(batch), len(window_nll)):
                if math.isnan(window_nll[i]):
                    raise NumericalError(
                        f"The model's loss on evaluation window {i} is not a number; try model dtype float32."
                    )
            if progress is not None:
                progress(len(window_nll), n)
    return PerplexityResult(window_nll, n * (seq_len - 1))


def _batch_nll(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean loss of each window, float64  # [b]."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]  # [b, seq_len - 1, vocab]
    targets = batch[:, 1:].to(logits.device)
    rows = max(1, VALUES_PER_CHUNK // (logits.shape[0] * logits.shape[-1]))
    total = torch.zeros(len(batch), dtype=torch.float64, device=logits.device)
    for part, wanted in zip(logits.split(rows, dim=1), targets.split(rows, dim=1), strict=True):
        values = part if part.dtype == torch.float64 else part.float()
        nll = values.logsumexp(-1) - values.gather(-1, wanted[..., None])[..., 0]
        total += nll.double().sum(1)
    return total / targets.shape[1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
