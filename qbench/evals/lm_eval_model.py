"""lm-eval's own Hugging Face model class around a model in memory, with a faster scorer.

Tokenization, prefix token, context length and generation are lm-eval's; only the forward passes of log-likelihood
requests are ours (`evals.likelihood`). Imports lm-eval, so it is itself imported only when a task is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from qbench.evals.likelihood import continuation_logprobs

WINDOWS_PER_CALL = 16  # of rolling and generation requests; the scorer sizes its own passes


class InMemoryLM(HFLM):
    """A model that is ready to run, as lm-eval sees it."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        device: torch.device,
        encoded: dict[tuple[str, str], tuple[list[int], list[int]]],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Wrap a model.

        Args:
            model: A causal language model of transformers.
            tokenizer: Its tokenizer.
            device: Where inputs go.
            encoded: Token ids of pairs met before; filled, so that the next model need not tokenize again.
            progress: Called with (requests done, requests in all).
        """
        super().__init__(model, tokenizer=tokenizer, backend="causal", batch_size=WINDOWS_PER_CALL)
        self._device = torch.device(device)
        self._encoded, self._progress = encoded, progress

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        key = (context, continuation)
        if key not in self._encoded:
            self._encoded[key] = super()._encode_pair(context, continuation)
        return self._encoded[key]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """lm-eval's, without its progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """lm-eval's, without its progress bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """lm-eval's, without its progress bar."""
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        return continuation_logprobs(
            self.model,
            [(context, continuation) for _, context, continuation in requests],
            max_length=self.max_length,
            device=self.device,
            progress=self._progress,
        )
