"""Word perplexity against lm-eval's own `wikitext` task run by lm-eval's own model class."""

from __future__ import annotations

import math
import re

import pytest
import torch

from qbench.errors import DataError
from qbench.evals.words import (
    detokenized,
    original_lines,
    rolling_windows,
    split_articles,
    word_perplexity,
    word_text,
)
from tests import model_folders

RAW = (
    ' \n = First = \n \n the quick ( brown ) fox \'s @-@ dog , while \n seven " grey " wolves . \n = = Part = = \n \n'
    " old stone @,@ bridges \n = Second one = \n \n rain falls ; on green hills ° N \n \n"
)
MAX_LENGTH = 24


def joined(raw: str) -> str:
    """As the hub's rows are joined: a row is a line with its break, or nothing for a blank line."""
    rows = [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]
    return "\n\n".join(rows)


def test_articles_begin_at_their_headings() -> None:
    first, second = split_articles(RAW)
    assert first.split("\n")[0] == " = First = " and " = = Part = = " in first
    assert second.startswith(" = Second one = \n") and "rain" in second
    assert split_articles("plain text\nwith lines") == []


@pytest.mark.parametrize(
    "raw", [RAW, RAW[2:], RAW.rstrip(" \n") + " \n"], ids=["blanks", "no-lead", "no-tail"]
)
def test_joined_rows_give_the_original_lines(raw: str) -> None:
    assert original_lines(joined(raw)) == raw.split("\n") and original_lines(raw) == raw.split("\n")


def test_the_detokenizer_is_lm_evals() -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    for text in [*split_articles(RAW), "[ a ] { b } ' c ' = = = = d e ! f ? g : h 1 @.@ 5 \" q \" s ' x"]:
        assert detokenized(text) == wikitext_detokenizer({"page": text}) != text


@pytest.mark.parametrize("n", [1, 2, 23, 24, 25, 48, 49, 60])
def test_rolling_windows_are_lm_evals(n: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = list(range(10, 10 + n))
    theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(tokens, 1, MAX_LENGTH, 1)]
    ours = rolling_windows(tokens, 1, MAX_LENGTH)
    assert ours == theirs
    assert [token for _, continuation in ours for token in continuation] == tokens
    assert rolling_windows([], 1, MAX_LENGTH) == []


def by_lm_eval(model: torch.nn.Module, pages: list[str], limit: int | None) -> dict[str, float]:
    """lm-eval's wikitext task on these pages, its questions aside."""
    import datasets
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext import preprocess_wikitext as own

    config = {
        "task": "wikitext_here",
        "custom_dataset": lambda **_: {
            "test": datasets.Dataset.from_list([{"page": page} for page in pages])
        },
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": own.wikitext_detokenizer,
        "process_results": own.process_results,
        "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }
    lm = HFLM(model, tokenizer=model_folders.tokenizer(), batch_size=2, max_length=MAX_LENGTH)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    return simple_evaluate(lm, tasks=[config], task_manager=manager, limit=limit)["results"]["wikitext_here"]


@pytest.mark.parametrize("limit", [None, 2], ids=["all", "limit"])
def test_word_perplexity_is_lm_evals(tiny_llama, limit: int | None) -> None:
    parts = [
        f" = {model_folders.text(2, s)} = \n \n {model_folders.text(40 + 9 * s, s)} , . \n" for s in range(4)
    ]
    raw = " \n" + "".join(parts)
    text = word_text("wiki", raw, MAX_LENGTH, limit)
    found = word_perplexity(tiny_llama, model_folders.tokenizer(), text, max_length=MAX_LENGTH, device="cpu")
    theirs = by_lm_eval(tiny_llama, split_articles(raw), limit)
    assert found.value == pytest.approx(theirs["word_perplexity,none"], rel=1e-6)
    assert (found.n, found.n_total) == (limit or 4, 4)
    assert found.value == pytest.approx(math.exp(sum(found.items) / len(found.items)), rel=1e-9)
    assert found.stderr > 0 and ("first 2" in found.protocol) == (limit == 2)


def test_a_text_without_articles_is_one_document(tiny_llama) -> None:
    plain = model_folders.text(50)
    text = word_text("own", plain, MAX_LENGTH)
    metric = word_perplexity(tiny_llama, model_folders.tokenizer(), text, max_length=MAX_LENGTH, device="cpu")
    assert text.documents == [plain] and text.words == [50] == [len(re.split(r"\s+", plain))]
    assert metric.n == 1 and metric.stderr is None
    empty = word_text("own", "", MAX_LENGTH)
    with pytest.raises(DataError, match="no token"):
        word_perplexity(tiny_llama, model_folders.tokenizer(), empty, max_length=MAX_LENGTH, device="cpu")


def test_the_reference_text_is_sixty_two_articles_either_way(shared) -> None:
    raw = (shared / "data/wikitext2/wiki.test.raw").read_text(encoding="utf-8")
    rows = (shared / "data/wikitext2/wiki.test.joined.txt").read_text(encoding="utf-8")
    articles = split_articles(raw)
    assert len(articles) == 62 and articles == split_articles(rows)
