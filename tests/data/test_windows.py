"""Windows against the authors' loaders, written out here as plain loops."""

from __future__ import annotations

import random

import pytest
import torch

from qbench.data.text import Text
from qbench.data.windows import draw_calibration, evaluation_windows, fingerprint
from qbench.errors import DataError


class Bytes:
    """A tokenizer with one token per byte."""

    bos_token_id: int | None = None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        return {"input_ids": start + list(text.encode())}


class BytesWithBos(Bytes):
    bos_token_id = 256


def text_of(content: str, split: str = "evaluation", **extra: object) -> Text:
    return Text("mine", split, content, "f" * 64, "a test", **extra)


CONTENT = "".join(chr(33 + i * i % 89) for i in range(1000))


def test_calibration_starts_where_the_authors_code_starts() -> None:
    """Among few possible starts, so that one more or one less would show."""
    content = CONTENT[:60]
    windows = draw_calibration(text_of(content, "calibration"), Bytes(), n_samples=20, seq_len=50, seed=2)
    stream = list(content.encode())
    random.seed(2)
    expected = []
    for _ in range(20):
        i = random.randint(0, len(stream) - 50 - 1)
        expected.append(stream[i : i + 50])
    assert windows.ids.tolist() == expected
    assert windows.ids.dtype == torch.int64
    assert windows.n_tokens_total == 60
    assert (windows.dataset, windows.split, windows.bos_policy) == ("mine", "calibration", "none")


def test_calibration_leaves_the_global_generator_alone() -> None:
    random.seed(5)
    before = random.getstate()
    draw_calibration(text_of(CONTENT), Bytes(), n_samples=3, seq_len=10, seed=0)
    assert random.getstate() == before


def test_another_seed_draws_other_windows_and_the_same_seed_the_same() -> None:
    draw = [draw_calibration(text_of(CONTENT), Bytes(), 5, 20, seed).fingerprint for seed in (0, 1, 0)]
    assert draw[0] == draw[2] != draw[1]


@pytest.mark.parametrize(("seq_len", "count"), [(100, 10), (99, 10), (101, 9), (1000, 1)])
def test_evaluation_windows_are_consecutive_and_drop_the_last_partial_one(seq_len: int, count: int) -> None:
    windows = evaluation_windows(text_of(CONTENT), Bytes(), seq_len)
    assert windows.ids.shape == (count, seq_len)
    assert windows.ids.flatten().tolist() == list(CONTENT.encode())[: count * seq_len]


def test_limit_keeps_the_first_windows() -> None:
    everything = evaluation_windows(text_of(CONTENT), Bytes(), 90)
    some = evaluation_windows(text_of(CONTENT), Bytes(), 90, limit=3)
    assert torch.equal(some.ids, everything.ids[:3])
    assert some.fingerprint != everything.fingerprint
    assert len(evaluation_windows(text_of(CONTENT), Bytes(), 90, limit=99).ids) == 11


def test_protocol_caps_the_windows() -> None:
    assert len(evaluation_windows(text_of(CONTENT, max_windows=4), Bytes(), 50).ids) == 4
    assert len(evaluation_windows(text_of(CONTENT, max_windows=4), Bytes(), 50, limit=2).ids) == 2


def test_one_bos_at_the_start_of_the_stream_only() -> None:
    windows = evaluation_windows(text_of(CONTENT), BytesWithBos(), 100)
    assert windows.ids[0, 0] == 256
    assert (windows.ids == 256).sum() == 1
    assert windows.bos_policy == "stream start"


DOCUMENTS = tuple(letter * length for letter, length in zip("abcdef", (5, 40, 8, 20, 3, 30), strict=True))


def test_documents_are_drawn_as_the_authors_draw_them() -> None:
    windows = draw_calibration(text_of("", documents=DOCUMENTS), Bytes(), n_samples=9, seq_len=20, seed=3)
    rng = random.Random(3)
    expected = []
    for _ in range(9):
        while True:
            document = DOCUMENTS[rng.randint(0, len(DOCUMENTS) - 1)]
            if len(document) > 20:
                break
        i = rng.randint(0, len(document) - 20 - 1)
        expected.append(list(document[i : i + 20].encode()))
    assert windows.ids.tolist() == expected
    assert all(len(set(window)) == 1 for window in windows.ids.tolist())  # none crosses a document


def test_evaluation_on_documents_draws_with_seed_zero_and_a_limit_keeps_the_first() -> None:
    text = text_of("", documents=DOCUMENTS, max_windows=6)
    windows = evaluation_windows(text, Bytes(), 20)
    assert torch.equal(windows.ids, draw_calibration(text, Bytes(), 6, 20, seed=0).ids)
    assert torch.equal(evaluation_windows(text, Bytes(), 20, limit=2).ids, windows.ids[:2])


@pytest.mark.parametrize("draw", ["calibration", "evaluation"])
@pytest.mark.parametrize(
    ("content", "extra", "message"),
    [
        ("", {}, "empty"),
        (" \n", {}, "empty"),
        ("short", {}, "5 tokens"),
        ("", {"documents": ("a" * 99, "b" * 100)}, "longest: 100"),
    ],
    ids=["empty", "blank", "short", "documents"],
)
def test_too_little_text_is_one_sentence(draw: str, content: str, extra: dict, message: str) -> None:
    text = text_of(content, **extra)
    with pytest.raises(DataError, match=message) as caught:
        if draw == "calibration":
            draw_calibration(text, Bytes(), 2, 100, 0)
        else:
            evaluation_windows(text, Bytes(), 100)
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)


def test_exactly_one_window_is_enough_to_evaluate_and_too_little_to_draw() -> None:
    assert len(evaluation_windows(text_of("a" * 100), Bytes(), 100).ids) == 1
    with pytest.raises(DataError, match="needs 101"):
        draw_calibration(text_of("a" * 100), Bytes(), 1, 100, 0)
    assert len(draw_calibration(text_of("a" * 101), Bytes(), 1, 100, 0).ids) == 1


def test_fingerprint_sees_values_order_and_shape() -> None:
    ids = torch.arange(12).view(3, 4)
    assert fingerprint(ids) == fingerprint(ids.clone().to(torch.int32))
    assert len({fingerprint(x) for x in (ids, ids.view(4, 3), ids.flip(0), ids + 1)}) == 4


def test_a_long_text_gives_no_warning_about_the_models_limit(tmp_path) -> None:
    """Warnings are errors here, and transformers logs one for a text beyond `model_max_length`."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4)
    said: list[object] = []
    log = transformers.utils.logging.get_logger("transformers")
    handler = type(
        "Said", (__import__("logging").Handler,), {"emit": lambda self, record: said.append(record)}
    )()
    log.addHandler(handler)
    try:
        windows = evaluation_windows(text_of("a b " * 10), fast, 4)
    finally:
        log.removeHandler(handler)
    assert windows.ids.tolist() == [[0, 1, 0, 1]] * 5
    assert not said
