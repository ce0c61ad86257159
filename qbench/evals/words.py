"""Perplexity per word as lm-eval's `wikitext` task computes it: rolling windows over whole documents.

The papers' perplexity and this one differ by more than a factor of two on the same model, so it has a name of its own,
DATASET/word_perplexity. Every token of a document is predicted exactly once, the first from the tokenizer's BOS (or
EOS) token; the loss is divided by the words of the text before it was detokenized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qbench.errors import DataError
from qbench.evals.likelihood import Pair, continuation_logprobs
from qbench.results import Metric


@dataclass(frozen=True)
class WordText:
    """Documents to score.

    Attributes:
        documents: As they are fed to the model.
        words: In each, before detokenization.
        n_total: Documents that there would be without a limit.
    """

    documents: Sequence[str]
    words: Sequence[int]
    protocol: str
    n_total: int


def word_text(name: str, text: str, max_length: int, limit: int | None = None) -> WordText:
    """Cut a text into its documents: WikiText's articles, or the whole text where there are none.

    Args:
        name: The dataset's.
        text: WikiText as the original file or as the hub's rows joined by a blank line; or any other text.
        max_length: Tokens per rolling window.
        limit: Score only the first documents.
    """
    articles = split_articles(text)
    found = articles or [text]
    kept = found if limit is None else found[:limit]
    cut = "" if len(kept) == len(found) else f", first {len(kept)}"
    kind = f"{len(found)} articles, detokenized" if articles else "one document"
    return WordText(
        [detokenized(document) if articles else document for document in kept],
        [len(document.split()) for document in kept],  # lm-eval's count
        f"{name} word perplexity (rolling {max_length}, {kind}{cut})",
        len(found),
    )


def split_articles(text: str) -> list[str]:
    """WikiText's articles, as the hub's document-level copy has them; empty where no line is an article's heading."""
    articles: list[list[str]] = [[]]
    headings = 0
    for line in original_lines(text):
        if _is_heading(line):
            headings += 1
            if any(part.strip() for part in articles[-1]):
                articles.append([])
            else:
                articles[-1].clear()
        articles[-1].append(line)
    return ["\n".join(article) for article in articles] if headings else []


def original_lines(text: str) -> list[str]:
    """Lines of WikiText's original file, also where the hub's rows of it were joined by a blank line.

    A row of the hub is a line with its line break, or nothing for a line of one blank: joined, two lines with b blank
    lines between them are 2b + 3 line breaks apart.
    """
    if re.search(r"[^\n]\n[^\n]", text) is None and "\n\n\n" in text:
        body = text.lstrip("\n")
        leading, trailing = len(text) - len(body), len(body) - len(body.rstrip("\n"))
        inner = re.sub(r"\n+", lambda m: "\n" + " \n" * ((len(m[0]) - 3) // 2), body.rstrip("\n"))
        text = " \n" * (leading // 2) + inner + "\n" + " \n" * ((trailing - 1) // 2)
    return text.split("\n")


def _is_heading(line: str) -> bool:
    """Of an article; sections have two or three signs."""
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def detokenized(text: str) -> str:
    """WikiText's text with its token boundaries undone, replacement by replacement as lm-eval does it."""
    for old, new in _BEFORE:
        text = text.replace(old, new)
    for pattern, new in _PAIRS:
        text = re.sub(pattern, new, text)
    for old, new in _AFTER:
        text = text.replace(old, new)
    return text


def word_perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: WordText,
    *,
    max_length: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
) -> Metric:
    """Score a text.

    Args:
        model: A causal language model, ready to run.
        tokenizer: Its tokenizer.
        text: What to score.
        max_length: Tokens per rolling window.
        device: Where inputs go.
        progress: Called with (windows done, windows in all).

    Returns:
        exp of the loss per word. Its items are the documents' losses over the mean number of words, so that their mean
        is the log of the value; its standard error is that of a ratio of sums.

    Raises:
        DataError: If a document has no token.
    """
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pairs: list[Pair] = []
    owners: list[int] = []
    for i, document in enumerate(text.documents):
        windows = rolling_windows(tokenizer.encode(document, verbose=False), prefix, max_length)
        if not windows:
            raise DataError(f"Document {i} of the text has no token; remove it.")
        pairs += windows
        owners += [i] * len(windows)
    answers = continuation_logprobs(model, pairs, max_length=max_length, device=device, progress=progress)
    losses = [0.0] * len(text.documents)
    for owner, (logprob, _) in zip(owners, answers, strict=True):
        losses[owner] -= logprob
    n, words = len(losses), sum(text.words)
    rate = math.fsum(losses) / words
    value = math.exp(rate) if rate < 700 else math.inf
    residuals = [loss - rate * count for loss, count in zip(losses, text.words, strict=True)]
    spread = math.sqrt(math.fsum(r * r for r in residuals) * n / (n - 1)) / words if n > 1 else None
    return Metric(
        value=value,
        stderr=None if spread is None else value * spread,
        n=n,
        n_total=text.n_total,
        protocol=text.protocol,
        items=[loss * n / words for loss in losses],
    )


def rolling_windows(tokens: Sequence[int], prefix: int, max_length: int) -> list[Pair]:
    """Cut a document into (context, continuation) so that every token is predicted once.

    The first window begins with the prefix token; later ones continue after one token of context, and the last one is
    as long as the others: what it does not predict is its context.
    """
    if not tokens:
        return []
    first = min(max_length, len(tokens))
    windows: list[Pair] = [([prefix], list(tokens[:first]))]
    done = first
    while done < len(tokens):
        end = min(done + max_length, len(tokens))
        windows.append((list(tokens[end - max_length - 1 : done]), list(tokens[done:end])))
        done = end
    return windows


_BEFORE = (
    ("s '", "s'"),
    (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
_PAIRS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_AFTER = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="),
    (" " + chr(176) + " ", chr(176)),
    (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip
