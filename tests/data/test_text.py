"""Text by name, file and folder; every failure is one sentence."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qbench.data import hub, stdlib
from qbench.data import text as text_module
from qbench.data.text import load_text, parse_dataset
from qbench.errors import ConfigError, DataError


def one_sentence(caught: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 500, message
    return message


# Names


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("wikitext2", ("wikitext2", "wikitext2")),
        ("wiki=some/file.txt", ("wiki", "some/file.txt")),
        ("wiki=a=b.txt", ("wiki", "a=b.txt")),
        ("some/wiki.test.raw", ("wiki.test", "some/wiki.test.raw")),
        ("c4-train.json.gz", ("c4-train", "c4-train.json.gz")),
        ("owner/corpus", ("corpus", "owner/corpus")),
    ],
)
def test_parse_dataset(spec: str, expected: tuple[str, str]) -> None:
    assert parse_dataset(spec) == expected


def test_an_existing_path_may_contain_an_equals_sign(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.txt").write_text("words")
    assert parse_dataset("a=b.txt") == ("a=b", "a=b.txt")


@pytest.mark.parametrize("spec", ["=file.txt", "name=", " = "])
def test_half_an_alias_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="NAME=PATH") as caught:
        parse_dataset(spec)
    one_sentence(caught)


def test_unknown_name_suggests(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="Did you mean 'wikitext2'"):
        load_text("wikitext", "evaluation")
    with pytest.raises(DataError, match=r"folder 'no/such/file\.txt'"):
        load_text("wiki=no/such/file.txt", "evaluation")


def test_stdlib_has_two_disjoint_splits() -> None:
    calibration, evaluation = load_text("stdlib", "calibration"), load_text("stdlib", "evaluation")
    assert evaluation.text == stdlib.text("evaluation")
    assert calibration.text == stdlib.text("calibration")
    assert calibration.fingerprint != evaluation.fingerprint
    assert (evaluation.name, evaluation.split) == ("stdlib", "evaluation")


# Files


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.raw", "noextension"])
def test_a_text_file_is_taken_as_it_is(tmp_path, name: str) -> None:
    (tmp_path / name).write_text(" = Title = \n\nBody\r\n", encoding="utf-8", newline="")
    loaded = load_text(f"mine={tmp_path / name}", "calibration")
    assert loaded.text == " = Title = \n\nBody\n"
    assert loaded.name == "mine"


def test_fingerprint_is_of_the_content_alone(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.md").write_text("same")
    (tmp_path / "c.txt").write_text("other")
    marks = [load_text(str(tmp_path / name), "evaluation").fingerprint for name in ("a.txt", "b.md", "c.txt")]
    assert marks[0] == marks[1] != marks[2]


RECORDS = [{"text": "one", "url": "u"}, {"text": "two\nlines", "url": "v"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", "\n".join(map(json.dumps, RECORDS)) + "\n\n"),
        ("x.json", json.dumps(RECORDS)),
        ("lines.json", "\n".join(map(json.dumps, RECORDS))),
        ("strings.json", json.dumps(["one", "two\nlines"])),
        ("sentence.jsonl", '{"sentence": "one"}\n{"sentence": "two\\nlines"}'),
        ("x.jsonl.gz", "\n".join(map(json.dumps, RECORDS))),
    ],
)
def test_json_records_are_joined_by_a_blank_line(tmp_path, name: str, content: str) -> None:
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert load_text(str(tmp_path / name), "evaluation").text == "one\n\ntwo\nlines"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "no text"),
        ("x.txt", b" \n ", "no text"),
        ("x.txt", b"\xff\xfe\x00", "UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "Line 2"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}', "Record 2 .* only 'body'"),
        ("x.jsonl", b'{"text": 3}\n{"text": 4}', "int"),
        ("x.json", b"[[1]]", "list"),
        ("x.json", b"[]", "no text"),
        ("x.jsonl.gz", b"not gzip", "Cannot read"),
        ("x.parquet", b"PAR1", "not text"),
    ],
)
def test_a_bad_file_is_a_data_error(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_text(str(tmp_path / name), "calibration")
    one_sentence(caught)


# Folders, through the real `datasets` library


def write_lines(path: Path, *texts: str) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_folder_in_hub_layout(tmp_path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "train.jsonl", "t1", "t2")
    write_lines(folder / "validation.jsonl", "v1")
    write_lines(folder / "test.jsonl", "", "e1", "e2")
    assert load_text(str(folder), "calibration").text == "t1\n\nt2"
    evaluation = load_text(str(folder), "evaluation")
    assert evaluation.text == "\n\ne1\n\ne2"
    assert evaluation.name == "corpus"


def test_folder_with_parquet_and_no_test_split_evaluates_on_validation(tmp_path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["v1", "v2"]}).to_parquet(
        str(tmp_path / "validation-00000-of-00001.parquet")
    )
    assert load_text(str(tmp_path), "evaluation").text == "v1\n\nv2"
    with pytest.raises(DataError, match=r"has the splits validation, but train is needed") as caught:
        load_text(str(tmp_path), "calibration")
    one_sentence(caught)


def test_saved_datasets(tmp_path) -> None:
    import datasets

    whole = datasets.Dataset.from_dict({"sentence": ["a", "b"]})
    whole.save_to_disk(tmp_path / "whole")
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(tmp_path / "parts")
    assert load_text(str(tmp_path / "whole"), "evaluation").text == "a\n\nb"
    assert load_text(str(tmp_path / "parts"), "calibration").text == "a\n\nb"
    assert load_text(str(tmp_path / "parts"), "evaluation").text == "b"


def test_bad_folders_are_data_errors(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="Cannot read folder") as caught:
        load_text(str(tmp_path / "empty"), "evaluation")
    one_sentence(caught)
    (tmp_path / "columns").mkdir()
    (tmp_path / "columns" / "test.jsonl").write_text('{"question": "a", "label": 1}\n')
    with pytest.raises(DataError, match="only 'question', 'label'") as caught:
        load_text(str(tmp_path / "columns"), "evaluation")
    one_sentence(caught)


# The hub: what is asked of it, with the library replaced; and what it says when there is none


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """Record what is asked of the hub; answer with twelve hundred numbered rows."""
    calls: list[tuple] = []

    def load(asked: str, path: str, config: str | None = None, **options: object) -> list[str]:
        calls.append((path, config, options))
        return [f"row{i}" for i in range(1200)]

    monkeypatch.setattr(text_module, "load_hub_rows", load)
    return calls


C4 = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


@pytest.mark.parametrize(
    ("name", "split", "path", "read", "separator"),
    [
        ("wikitext2", "calibration", "Salesforce/wikitext", "train", "\n\n"),
        ("wikitext2", "evaluation", "Salesforce/wikitext", "test", "\n\n"),
        ("ptb", "calibration", "ptb-text-only/ptb_text_only", "train", "\n\n"),
        ("ptb", "evaluation", "ptb-text-only/ptb_text_only", "validation", "\n\n"),
        ("ptb_new", "calibration", "ptb-text-only/ptb_text_only", "train", " "),
        ("ptb_new", "evaluation", "ptb-text-only/ptb_text_only", "test", " "),
        ("owner/corpus", "evaluation", "owner/corpus", "test", "\n\n"),
    ],
)
def test_hub_names(asked, name: str, split: str, path: str, read: str, separator: str) -> None:
    loaded = load_text(name, split)
    assert asked[0][0] == path
    assert asked[0][2]["split"] == read
    assert loaded.text == separator.join(f"row{i}" for i in range(1200))
    assert loaded.documents is None


def test_c4_keeps_documents_apart_and_c4_new_joins_the_first_1100(asked) -> None:
    for name in ("c4", "c4_new"):
        calibration = load_text(name, "calibration")
        assert len(calibration.documents) == 1200 and calibration.max_windows is None
        assert asked[-1][2] == {"split": "train", "data_file": C4["train"]}
    evaluation = load_text("c4", "evaluation")
    assert len(evaluation.documents) == 1200 and evaluation.max_windows == 256
    assert asked[-1][2] == {"split": "validation", "data_file": C4["validation"]}
    new = load_text("c4_new", "evaluation")
    assert new.text == " ".join(f"row{i}" for i in range(1100))
    assert new.documents is None and new.max_windows == 256


def test_pile_splits_share_no_document(asked) -> None:
    calibration, evaluation = (
        load_text("pile", split).text.split("\n\n") for split in ("calibration", "evaluation")
    )
    assert calibration[0] == "row0" and len(calibration) == 1000
    assert evaluation[0] == "row1000" and not set(calibration) & set(evaluation)


def test_documents_have_a_fingerprint_that_sees_their_borders(monkeypatch) -> None:
    marks = []
    for rows in (["ab", "c"], ["a", "bc"], ["abc"]):
        monkeypatch.setattr(text_module, "load_hub_rows", lambda *a, rows=rows, **k: rows)
        marks.append(load_text("c4", "calibration").fingerprint)
    assert len(set(marks)) == 3


def test_offline_hub_is_one_sentence_and_exit_code_two() -> None:
    """In its own process: the library reads its environment once."""
    program = (
        "from qbench.data.text import load_text\nfrom qbench.errors import DataError\n"
        "for name in ('wikitext2', 'c4', 'owner/nothing'):\n"
        "    try:\n        load_text(name, 'evaluation')\n"
        "    except DataError as error:\n        print(error.exit_code, error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    for line, name in zip(lines, ("wikitext2", "c4", "owner/nothing"), strict=True):
        assert line.startswith(f"2 Cannot load dataset '{name}'")
        assert "HF_HUB_OFFLINE is set" in line and "=PATH" in line


def test_any_other_failure_names_its_cause(monkeypatch) -> None:
    class Broken:
        @staticmethod
        def load_dataset(*_: object, **__: object) -> None:
            raise RuntimeError("server said no.\nlong traceback")

    monkeypatch.setattr(hub, "_datasets", lambda: Broken)
    with pytest.raises(DataError, match="RuntimeError: server said no; give") as caught:
        load_text("ptb", "calibration")
    assert "split train" in one_sentence(caught)


def test_without_the_library_files_still_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.txt").write_text("words")
    assert load_text(str(tmp_path / "a.txt"), "evaluation").text == "words"
    with pytest.raises(DataError, match="pip install datasets") as caught:
        load_text("wikitext2", "evaluation")
    one_sentence(caught)
