"""Log-likelihood of continuations after contexts, for many pairs at once.

Zero-shot tasks ask for tens of thousands of short pairs. Pairs that feed the model the same tokens are computed once
(a question with one-token answers is one sequence), sequences are sorted by length so that little is padding, and
logits are made for the positions that some continuation needs, not for the contexts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qbench.evals.perplexity import VALUES_PER_CHUNK, evaluating

Pair = tuple[Sequence[int], Sequence[int]]  # context ids, continuation ids; neither empty
CPU_TOKENS, MOST_GPU_TOKENS = 2048, 1 << 16


@torch.no_grad()
def continuation_logprobs(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    device: torch.device | str,
    tokens_per_pass: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, bool]]:
    """Sum of the log-probabilities of each continuation's tokens, and whether greedy decoding would produce it.

    A pair longer than the model takes loses the beginning of its context. Padding is on the right and without a mask:
    in a causal model no scored position sees it. Log-softmax in float32 (float64 for a float64 model).

    Args:
        model: Any causal language model of transformers, ready to run.
        pairs: Token ids.
        max_length: Most tokens the model takes.
        device: Where inputs go.
        tokens_per_pass: Tokens per forward pass, padding included; default by memory. Halved where memory runs out.
        progress: Called with (pairs done, pairs in all) after each pass.
    """
    if not pairs:
        return []
    wanted: dict[tuple[int, ...], list[int]] = {}  # input sequence -> pairs that it answers
    targets: list[Sequence[int]] = []
    for i, (context, continuation) in enumerate(pairs):
        sequence = (*context, *continuation)[-(max_length + 1) :]
        targets.append(continuation[-(len(sequence) - 1) :])
        wanted.setdefault(sequence[:-1], []).append(i)
    sequences = sorted(wanted, key=lambda sequence: (-len(sequence), sequence))
    budget = tokens_per_pass or _tokens_per_pass(model, torch.device(device))
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    done = start = 0
    with evaluating(model):
        while start < len(sequences):
            batch = sequences[start : start + max(1, budget // len(sequences[start]))]
            asked = [(row, i) for row, sequence in enumerate(batch) for i in wanted[sequence]]
            try:
                scored = _score(model, batch, [(row, targets[i]) for row, i in asked], device)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                budget = max(1, len(batch) // 2) * len(batch[0])
                torch.cuda.empty_cache()
                continue
            for (_, i), answer in zip(asked, scored, strict=True):
                answers[i] = answer
            start, done = start + len(batch), done + len(asked)
            if progress is not None:
                progress(done, len(pairs))
    return answers


def _score(
    model: nn.Module,
    batch: Sequence[tuple[int, ...]],
    asked: Sequence[tuple[int, Sequence[int]]],
    device: torch.device | str,
) -> Iterator[tuple[float, bool]]:
    """One pass: the answers to (row of the batch, continuation that ends where the row does)."""
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    first = min(len(batch[row]) - len(target) for row, target in asked)
    logits = _logits(model, ids.to(device), first)  # [b, longest - first, vocab]
    rows = torch.tensor([row for row, target in asked for _ in target])
    positions = torch.tensor(
        [p - first for row, target in asked for p in range(len(batch[row]) - len(target), len(batch[row]))]
    )
    tokens = torch.tensor([token for _, target in asked for token in target])
    logprobs, greedy = _gather(logits, rows, positions, tokens)
    lengths = [len(target) for _, target in asked]
    return (
        (float(values.sum()), bool(equal.all()))
        for values, equal in zip(logprobs.split(lengths), greedy.split(lengths), strict=True)
    )


def _logits(model: nn.Module, ids: Tensor, first: int) -> Tensor:
    """Logits of the positions from `first` on  # [b, t - first, vocab]."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept = ids.shape[1] - first
        return model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
    return model(input_ids=ids, use_cache=False).logits[:, first:]


def _gather(logits: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token at its place, and whether it is the likeliest there; on the CPU  # [m], [m]."""
    logprobs, greedy = [], []
    size = max(1, VALUES_PER_CHUNK // logits.shape[-1])
    for row, position, token in zip(rows.split(size), positions.split(size), tokens.split(size), strict=True):
        values = logits[row.to(logits.device), position.to(logits.device)]  # [m, vocab]
        values = values if values.dtype == torch.float64 else values.float()
        token = token.to(values.device)
        logprobs.append(values.log_softmax(-1).gather(-1, token[:, None])[:, 0].double().cpu())
        greedy.append((values.argmax(-1) == token).cpu())
    return torch.cat(logprobs), torch.cat(greedy)


def _tokens_per_pass(model: nn.Module, device: torch.device) -> int:
    """As many as a third of the free GPU memory holds logits and hidden states for."""
    if device.type != "cuda":
        return CPU_TOKENS
    config = model.config.get_text_config()
    # logits twice (as computed and as float32), and some thirty tensors of the width of a hidden state
    per_token = 8 * config.vocab_size + 30 * 4 * config.hidden_size
    return int(min(MOST_GPU_TOKENS, max(1024, torch.cuda.mem_get_info(device)[0] // 3 // per_token)))
