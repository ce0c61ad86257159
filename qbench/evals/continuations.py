"""The embedded task: choose the true continuation of a passage of the standard library among four.

It needs no download and no files, so that zero-shot accuracy can be measured on a fresh machine. Passages come from the
evaluation modules alone, which the embedded models have never seen (`data.stdlib`). The three false continuations are
true ones of other modules, of the same kind (code or prose) and all equally long in characters, so that neither length
nor subject alone gives the answer away.
"""

from __future__ import annotations

import hashlib
from typing import Any

from qbench.data import stdlib

CONTEXT, CONTINUATION = 400, 100  # characters
EVERY, MOST_PER_DOCUMENT = 500, 24  # characters from passage to passage; no module dominates
CHOICES = 4


def questions() -> list[dict[str, Any]]:
    """The questions, in an order that depends on the documents' names alone.

    Returns:
        One `{"query", "choices", "gold"}` per passage, as the files of local tasks have it.
    """
    passages = [
        (document.name, context, continuation)
        for document in stdlib.documents("evaluation")
        for context, continuation in _passages(document.text)
    ]
    kinds: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for name, _, continuation in passages:
        kinds[_is_prose(name)].append((name, continuation))
    made = []
    for i, (name, context, continuation) in enumerate(passages):
        others = [text for other, text in kinds[_is_prose(name)] if other != name and text != continuation]
        false = _drawn(others, f"{name}:{i}")
        if len(false) == CHOICES - 1:
            gold = _number(f"{name}:{i}:gold") % CHOICES
            made.append(
                {
                    "query": context,
                    "choices": [*false[:gold], continuation, *false[gold:]],
                    "gold": gold,
                }
            )
    return made


def _passages(text: str) -> list[tuple[str, str]]:
    """Passages of a document: whole lines of context, and what follows, beginning with the line break."""
    found = []
    for place in range(CONTEXT, len(text) - 2 * CONTINUATION, EVERY):
        end = text.find("\n", place)
        if end < 0 or end + CONTINUATION > len(text):
            break
        begin = text.find("\n", end - CONTEXT - 1) + 1
        context, continuation = text[begin:end].rstrip(), text[end : end + CONTINUATION]
        if len(context) > CONTEXT // 2 and len(continuation.strip()) > CONTINUATION // 2:
            found.append((context, continuation))
    return found[:MOST_PER_DOCUMENT]


def _is_prose(name: str) -> bool:
    return name.startswith("topic:")


def _drawn(others: list[str], seed: str) -> list[str]:
    """Distinct texts at places that the seed decides."""
    drawn: list[str] = []
    for attempt in range(20 * CHOICES):
        if not others or len(drawn) == CHOICES - 1:
            break
        text = others[_number(f"{seed}:{attempt}") % len(others)]
        if text not in drawn:
            drawn.append(text)
    return drawn


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
