"""Tasks against lm-eval run by itself: its own model class on the same folder, its own task definitions."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qbench.data import stdlib
from qbench.errors import ConfigError, DataError
from qbench.evals import tasks as module
from qbench.evals.continuations import CHOICES, CONTINUATION, questions
from qbench.evals.tasks import load_tasks
from qbench.models.loading import ASSETS
from tests import model_folders

CPU = torch.device("cpu")


def words(n: int, seed: int) -> str:
    return model_folders.text(n, seed)


def choice_rows(n: int, blank: str = " ") -> list[dict]:
    draw = random.Random(1)
    return [
        {
            "query": words(draw.randrange(1, 12), seed),
            "choices": [
                blank + words(draw.randrange(1, 5), 100 * seed + k) for k in range(draw.randrange(2, 5))
            ],
            "gold": draw.randrange(2),
        }
        for seed in range(n)
    ]


def partial_rows(n: int) -> list[dict]:
    return [
        {
            "context_options": [words(3, seed) + " one", words(3, seed) + " two"],
            "continuation": words(4, 50 + seed),
            "gold": seed % 2,
        }
        for seed in range(n)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def folder(tmp_path, build_tiny) -> Path:
    return model_folders.save(build_tiny("llama"), tmp_path / "model")


def score(specs: list[str], model_folder: Path, **options: object):
    tasks = load_tasks(specs, **options)
    return tasks, tasks.score(model_folders.plain_model(model_folder), model_folders.tokenizer(), CPU)


def by_lm_eval(model_folder: Path, task: dict, **options: object) -> dict:
    """lm-eval's own entry point, model class and batching."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(model_folders.plain_model(model_folder), tokenizer=model_folders.tokenizer(), batch_size=3)
    return simple_evaluate(lm, tasks=[task], task_manager=TaskManager(include_defaults=False), **options)


def definition(path: Path, name: str, **changes: object) -> dict:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
        ],
    } | changes


@pytest.mark.parametrize("fewshot", [0, 2], ids=["zero-shot", "two-shot"])
def test_multiple_choice_scores_are_lm_evals_own(tmp_path, folder, fewshot: int) -> None:
    """Choices without their blank, which is lm-eval's delimiter: how its own tasks hold them."""
    rows = choice_rows(40)
    bare = [row | {"choices": [choice[1:] for choice in row["choices"]]} for row in rows]
    theirs = by_lm_eval(
        folder, definition(write(tmp_path / "bare.jsonl", bare), "own"), num_fewshot=fewshot, limit=30
    )
    _, ours = score([f"own={write(tmp_path / 'own.jsonl', rows)}"], folder, limit=30, fewshot=fewshot)
    for metric in ("acc", "acc_norm"):
        found = ours[f"own/{metric}"]
        assert found.value == theirs["results"]["own"][f"{metric},none"]
        assert found.stderr == theirs["results"]["own"][f"{metric}_stderr,none"]
        assert found.items == [sample[metric] for sample in theirs["samples"]["own"]]
        assert (
            (found.n, found.n_total) == (30, 40) and found.items_name == "correct" and found.higher_is_better
        )
        assert found.protocol.endswith(f"own.jsonl, {fewshot}-shot, first 30)")
    chances = [1 / len(row["choices"]) for row in rows[:30]]
    assert ours["own/acc"].chance == pytest.approx(sum(chances) / 30)


def test_one_choice_that_begins_with_two_blanks_keeps_the_second(tmp_path, folder) -> None:
    """As one of piqa's 3,676 does: all the others must still lose theirs, or every acc_norm divides by one more."""
    rows = choice_rows(60)
    rows[7]["choices"][0] = " " + rows[7]["choices"][0]
    bare = [row | {"choices": [choice[1:] for choice in row["choices"]]} for row in rows]
    theirs = by_lm_eval(folder, definition(write(tmp_path / "bare.jsonl", bare), "own"))
    _, ours = score([f"own={write(tmp_path / 'own.jsonl', rows)}"], folder)
    assert ours["own/acc_norm"].items == [sample["acc_norm"] for sample in theirs["samples"]["own"]]
    blank = [row | {"choices": [" ", *row["choices"]]} for row in rows]  # nothing would be left of it
    tasks = load_tasks([str(write(tmp_path / "blank.jsonl", blank))]).loaded["tasks"]["blank"]
    assert tasks.instances[0].arguments[1] == " " and tasks.config.target_delimiter == ""


def test_partial_scoring_is_lm_evals_own(tmp_path, folder) -> None:
    path = write(tmp_path / "wino_val.partial.jsonl", partial_rows(25))
    theirs = by_lm_eval(
        folder,
        definition(
            path,
            "wino",
            doc_to_text="{{gold}}",
            doc_to_target="{{continuation}}",
            doc_to_choice="{{context_options}}",
            metric_list=[{"metric": "acc"}],
        ),
    )
    _, ours = score([str(path)], folder)
    assert list(ours) == ["wino/acc"]
    assert ours["wino/acc"].value == theirs["results"]["wino"]["acc,none"]
    assert ours["wino/acc"].items == [sample["acc"] for sample in theirs["samples"]["wino"]]
    assert 0 < ours["wino/acc"].value < 1


def test_a_yaml_task_with_data_named_relative_to_it(tmp_path, folder) -> None:
    own = tmp_path / "tasks"
    own.mkdir()
    write(own / "rows.jsonl", choice_rows(12, blank=""))
    task = definition(Path("rows.jsonl"), "yamled")
    (own / "yamled.yaml").write_text(yaml.safe_dump(task))
    theirs = by_lm_eval(folder, definition(own / "rows.jsonl", "yamled"))
    for spec in (f"yamled={own}", str(own / "yamled.yaml")):
        _, ours = score([spec], folder)
        assert ours["yamled/acc"].value == theirs["results"]["yamled"]["acc,none"]
        assert ours["yamled/acc_norm"].stderr == theirs["results"]["yamled"]["acc_norm_stderr,none"]


def test_rolling_and_generating_tasks_run_too(tmp_path, folder) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": words(90, seed)} for seed in range(3)])
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
    }
    rolling = common | {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    generating = common | {
        "task": "generating",
        "output_type": "generate_until",
        "doc_to_text": "{{text[:20]}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (rolling, generating):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
        theirs = by_lm_eval(folder, task)["results"][task["task"]]
        _, ours = score([str(tmp_path / f"{task['task']}.yaml")], folder)
        for key, metric in ours.items():
            assert metric.value == pytest.approx(theirs[key.partition("/")[2] + ",none"], rel=1e-6)
        assert ours
    assert not ours["generating/exact_match"].value


def test_every_model_sees_the_same_examples_and_prompts_are_hashed(tmp_path, folder) -> None:
    path = write(tmp_path / "own.jsonl", choice_rows(20))
    tasks = load_tasks([str(path)], fewshot=2)
    shown = []
    for _ in range(3):  # as hashed, to the first model, to the second
        shown.append([instance.arguments for instance in tasks.loaded["tasks"]["own"].instances])
        tasks.score(model_folders.plain_model(folder), model_folders.tokenizer(), CPU)
    assert shown[0] == shown[1] == shown[2]
    assert load_tasks([str(path)], fewshot=2).contract_fields() == tasks.contract_fields()
    prompts = {
        load_tasks([str(path)], limit=limit, fewshot=shots).fingerprints["own"]
        for limit, shots in ((None, 2), (None, 0), (5, 0), (5, 1))
    }
    assert len(prompts) == 4
    changed = choice_rows(20)
    changed[7]["gold"] = 1 - changed[7]["gold"]
    write(path, changed)
    assert load_tasks([str(path)], fewshot=2).fingerprints != tasks.fingerprints


def test_models_with_other_tokenizers_share_prepared_tasks(tmp_path, folder) -> None:
    """Token ids are kept from model to model, but only for the tokenizer that made them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    first = model_folders.tokenizer()
    words = [word for word, _ in sorted(first.get_vocab().items(), key=lambda item: -item[1])]
    backward = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backward.pre_tokenizer = pre_tokenizers.Whitespace()
    second = PreTrainedTokenizerFast(tokenizer_object=backward, bos_token="<s>", eos_token="</s>")
    path, model = write(tmp_path / "own.jsonl", choice_rows(30)), model_folders.plain_model(folder)
    alone = load_tasks([str(path)]).score(model, second, CPU)["own/acc"].items
    shared = load_tasks([str(path)])
    assert shared.score(model, first, CPU)["own/acc"].items != alone
    assert shared.score(model, second, CPU)["own/acc"].items == alone


def test_the_six_by_one_name_in_a_folder(tmp_path, folder) -> None:
    for name in ("arc_easy_test", "arc_challenge_test", "boolq_val", "hellaswag_val", "piqa_val"):
        write(tmp_path / f"{name}.mc.jsonl", choice_rows(4))
    same = [{"query": words(4, s), "choices": [" no", " yes"], "gold": s % 2} for s in range(4)]
    write(tmp_path / "boolq_val.mc.jsonl", same)
    write(tmp_path / "winogrande_val.partial.jsonl", partial_rows(4))
    _, found = score([f"paper6={tmp_path}"], folder)
    assert [key.partition("/")[0] for key in found if key.endswith("/acc")] == list(module.PAPER6)
    assert "boolq/acc_norm" not in found and "piqa/acc_norm" in found  # yes and no: nothing to normalize
    tasks, some = score([f"piqa={tmp_path}", f"{tmp_path / 'arc_easy_test.mc.jsonl'}"], folder)
    assert {key.partition("/")[0] for key in some} == {"piqa", "arc_easy"} == set(tasks.contract_fields())
    (tmp_path / "boolq_val.mc.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no task 'boolq'.*piqa"):
        load_tasks([f"paper6={tmp_path}"])


def test_a_group_is_one_score_over_all_its_items(tmp_path, folder) -> None:
    for name, n in (("a", 6), ("b", 10)):
        path = write(tmp_path / f"{name}.jsonl", choice_rows(n, blank=""))
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(definition(path, f"part_{name}")))
    group = {
        "group": "whole",
        "task": ["part_a", "part_b"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(group))
    tasks, found = score([f"whole={tmp_path}"], folder)
    assert list(found) == ["whole/acc"] and found["whole/acc"].n == 16 == len(found["whole/acc"].items)
    assert list(tasks.contract_fields()) == ["whole"]


def test_the_embedded_task_needs_no_files_and_is_not_guessing() -> None:
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-llama", dtype=torch.float32)
    tokenizer = hf.AutoTokenizer.from_pretrained(ASSETS / "tiny-llama")
    found = load_tasks(["stdlib"], limit=30).score(model, tokenizer, CPU)
    assert list(found) == ["stdlib_choice/acc"]  # equally long choices: nothing to normalize
    metric = found["stdlib_choice/acc"]
    assert metric.chance == 0.25 and metric.value - 3 * metric.stderr > 0.25


def test_the_embedded_questions_come_from_evaluation_modules_alone() -> None:
    rows = questions()
    assert rows == questions() and len(rows) > 200
    evaluation = [document.text for document in stdlib.documents("evaluation")]
    seen = "\0".join(document.text for document in stdlib.documents("train"))
    for row in rows[::25]:
        assert len(row["choices"]) == CHOICES == len(set(row["choices"]))
        assert {len(choice) for choice in row["choices"]} == {CONTINUATION}
        true = row["query"] + row["choices"][row["gold"]]
        assert any(true in text for text in evaluation) and true not in seen
        for place, choice in enumerate(row["choices"]):
            assert any(row["query"] + choice in text for text in evaluation) == (place == row["gold"])
    assert {row["gold"] for row in rows} == set(range(CHOICES))


BAD = {
    "not json": ("{", "Line 1 of .* is not JSON"),
    "no gold": ('{"query": "a", "choices": ["b"]}', "no question"),
    "gold outside": ('{"query": "a", "choices": ["b"], "gold": 1}', "no question"),
    "empty choice": ('{"query": "a", "choices": ["", "b"], "gold": 1}', "no question"),
    "empty": ("", "is empty"),
    "two layouts": (
        '{"query": "a", "choices": ["b"], "gold": 0}\n'
        '{"context_options": ["a", "b"], "continuation": "c", "gold": 0}',
        "mixes two layouts",
    ),
}


@pytest.mark.parametrize("content,message", BAD.values(), ids=list(BAD))
def test_a_bad_file_is_named(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_tasks([str(path)])


def test_bad_requests_are_one_sentence(tmp_path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        load_tasks([f"piqa={tmp_path / 'absent'}"])
    with pytest.raises(ConfigError, match="one side"):
        load_tasks(["piqa="])
    with pytest.raises(DataError, match="holds no tasks"):
        load_tasks([str(tmp_path)])
    (tmp_path / "own.txt").write_text("x")
    with pytest.raises(DataError, match="jsonl or"):
        load_tasks([str(tmp_path / "own.txt")])
    path = write(tmp_path / "own.jsonl", choice_rows(3))
    with pytest.raises(ConfigError, match="asked for twice"):
        load_tasks([str(path), f"own={path}"])
    zero = definition(path, "zero", num_fewshot=0)
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump(zero))
    with pytest.raises(ConfigError, match="lets nobody override"):
        load_tasks([str(tmp_path / "zero.yaml")], fewshot=2)


def test_a_hub_task_without_the_hub_says_what_to_give_instead() -> None:
    with pytest.raises(DataError, match=r"piqa.*NAME=PATH"):
        load_tasks(["piqa"])


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        load_tasks(["piqa"])


def test_lm_eval_is_imported_only_when_a_task_is_run() -> None:
    for name in ("evaluate.py", "evals/tasks.py", "evals/words.py"):
        source = (Path(module.__file__).parent.parent / name).read_text()
        assert not re.search(
            r"^(import|from) (lm_eval|datasets|qbench\.evals\.lm_eval_model)", source, re.MULTILINE
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", module.PAPER6)
def test_the_reference_files_score_as_lm_eval_does(shared, name: str) -> None:
    """All six, on a real model: scripts/lm_eval_agreement.py does the same for every item."""
    from scripts.lm_eval_agreement import compare

    (task,) = compare(shared / "models/ref-llama-14m", shared / "data/tasks", [name], limit=50)
    assert task["same_items"] and task["same_scores"] and not math.isnan(task["acc"])
