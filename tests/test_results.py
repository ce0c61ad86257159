import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parent))
from fake_results import baseline, make_result, make_run, perplexity, window_losses

from qbench import results
from qbench.errors import ConfigError, DataError
from qbench.results import BlockRecord, Metric, Result, ResultStore, TransformRecord, require_writable


def full() -> Result:
    return make_result(
        "affinequant",
        options={"sf": 0.1, "sites": ["attn_in"]},
        notes=["fitted in bfloat16"],
        blocks=[
            BlockRecord(index=0, seconds=1.5, losses=[0.2, 0.1], local_error=0.01, extras={"condition": 3.0})
        ],
        transforms=[TransformRecord(site="attn_in", kind="affine", foldable=False, function_preserving=True)],
        provenance={
            "packages": {"transformers": "5.0", "lm-eval": "0.4"},
            "commit": {"hash": "c0ffee", "dirty": True},
        },
    )


def test_a_record_reads_back_equal() -> None:
    record = full()  # carries the moment it was made
    assert Result.from_json(record.to_json()) == record


def test_row_has_what_the_json_format_promises() -> None:
    row = full().row()
    assert {"model", "method", "scheme", "metrics", "bits_per_weight", "cost", "contract", "notes"} <= set(
        row
    )
    assert set(row["cost"]) == {"seconds", "peak_gpu_bytes", "peak_cpu_bytes"}
    assert set(row["metrics"]["wikitext2/perplexity"]) == {"value", "stderr", "n"}
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_collapsed_model_survives_the_file_and_is_null_in_the_row() -> None:
    metric = Metric(value=math.inf, n=2, protocol="p", items=[800.0, 900.0])
    result = make_result(metrics={"wikitext2/perplexity": metric})
    text = result.to_json()
    assert Result.from_json(text).metrics["wikitext2/perplexity"].value == math.inf
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result.row()["metrics"]["wikitext2/perplexity"]["value"] is None


def test_a_value_that_is_not_the_mean_of_its_items_is_a_bug_caught_here() -> None:
    with pytest.raises(ValidationError, match="not the mean of its items"):
        perplexity(window_losses(), value=3.0)
    with pytest.raises(ValidationError, match="not the mean of its items"):
        Metric(value=0.5, n=4, protocol="p", items=[1, 0, 0, 0], items_name="correct")
    Metric(value=0.25, n=4, protocol="p", items=[1, 0, 0, 0], items_name="correct")


def test_lm_eval_reads_the_record() -> None:
    """Their own consumer, their own key names."""
    utils = pytest.importorskip("lm_eval.utils")
    schema = pytest.importorskip("lm_eval.result_schema")
    record = json.loads(make_run(tasks=4)[1].to_json())
    assert set(record) - {"qbench"} <= set(schema.EvalResults.__annotations__)
    table = utils.make_table(record)
    assert "wikitext2" in table and "perplexity" in table and "piqa" in table
    value = record["results"]["wikitext2"]["perplexity,none"]
    assert f"{value:.4f}" in table
    assert record["higher_is_better"] == {
        "wikitext2": {"perplexity": False},
        "c4": {"perplexity": False},
        "ptb": {"perplexity": False},
        "piqa": {"acc": True},
    }


def test_lm_eval_keys_say_the_same_as_ours() -> None:
    metric = perplexity(window_losses(n=64), stderr=None, n_total=300)
    record = json.loads(full().model_copy(update={"metrics": {"a/b/perplexity": metric}}).to_json())
    assert record["results"]["a/b"]["perplexity,none"] == metric.value
    assert record["results"]["a/b"]["perplexity_stderr,none"] == "N/A"
    assert record["n-samples"] == {"a/b": {"original": 300, "effective": 64}}
    assert record["n-shot"] == {"a/b": 0}
    assert record["git_hash"] == "c0ffee"
    assert record["config"]["model_args"]["scheme"] == "W4A4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.update(schema_version=99), "schema version 99"),
        (lambda own: own.pop("contract"), "damaged qbench record: contract"),
        (lambda own: own.update(surprise=1), "damaged qbench record: surprise"),
        (lambda own: own["cost"].update(seconds="slow"), r"cost\.seconds"),
    ],
    ids=["newer", "field missing", "field unknown", "field wrong"],
)
def test_records_of_another_shape_are_refused(change, message: str) -> None:
    record = json.loads(full().to_json())
    change(record["qbench"])
    with pytest.raises(DataError, match=message):
        Result.from_json(json.dumps(record))


def test_store_names_files_so_that_they_can_be_found(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "new" / "folder")
    path = store.save(
        make_result("affinequant", "W4A16g128", model="meta-llama/Llama-2 7b", id="abcdef0123456789")
    )
    assert path.name == "Llama-2-7b__affinequant__W4A16g128__abcdef012345.json"
    assert store.find("abcdef0123456789") == store.find("abcd") == store.load_all()[0]
    assert store.find("beef") is None
    assert ResultStore(tmp_path / "none").find("abcd") is None


def test_an_ambiguous_beginning_of_an_id_is_refused(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.save(make_result(id="aaaa00000000"))
    store.save(make_result(id="aaaa11111111"))
    with pytest.raises(ConfigError, match="Several records"):
        store.find("aaaa")
    assert store.find("aaaa1").id == "aaaa11111111"


def test_load_all_is_oldest_first_and_passes_over_foreign_files(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for i, day in enumerate((3, 1, 2)):
        store.save(make_result(id=f"{i:012x}", created=f"2026-01-0{day}T00:00:00+00:00"))
    (tmp_path / "results_lm_eval.json").write_text('{"results": {}}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "draft.json").write_text("{half")
    (tmp_path / ".abc.writing").write_text("{")
    assert [r.created[9] for r in store.load_all()] == ["1", "2", "3"]


@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.99], ids=["emptied", "header", "half", "nearly all"])
def test_a_damaged_record_is_named(tmp_path: Path, keep: float) -> None:
    store = ResultStore(tmp_path)
    path = store.save(make_result(id="0123456789abcdef"))
    text = path.read_text()
    path.write_text(text[: int(keep if keep >= 1 else keep * len(text))])
    with pytest.raises(DataError, match=path.name):
        store.load_all()
    renamed = path.rename(tmp_path / "renamed.json")
    if keep not in (0,):  # an empty file that is not named like ours says nothing of its maker
        with pytest.raises(DataError, match=renamed.name):
            store.load_all()


def test_a_missing_folder_is_an_error_and_an_empty_one_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no results folder"):
        ResultStore(tmp_path / "none").load_all()
    assert ResultStore(tmp_path).load_all() == []


def test_a_record_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResultStore(tmp_path)
    path = store.save(make_result(id="0123456789abcdef", bits_per_weight=4.0))

    def power_cut(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(DataError, match=r"Cannot write .*No space left"):
        store.save(make_result(id="0123456789abcdef", bits_per_weight=5.0))
    assert [r.bits_per_weight for r in store.load_all()] == [4.0]
    assert list(tmp_path.iterdir()) == [path]


def test_content_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), real_sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), real_replace(*a))[1])
    ResultStore(tmp_path).save(make_result())
    assert events == ["fsync", "replace", "fsync"]


def test_two_processes_writing_one_store_lose_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from fake_results import make_result\n"
        "from qbench.results import ResultStore\n"
        "for i in range(20): ResultStore(sys.argv[2]).save(make_result(id=f'{sys.argv[3]}{i:011x}'))\n"
        "for i in range(20): ResultStore(sys.argv[2]).save(make_result(id=f'c{i:011x}'))\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    command = [sys.executable, "-c", script, str(here), str(tmp_path)]
    writers = [subprocess.Popen([*command, letter], env=environment) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(ResultStore(tmp_path).load_all()) == 60
    assert len(list(tmp_path.iterdir())) == 60


def test_require_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_require_writable_refuses_files_and_folders_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="is a file"):
            require_writable(path)
    with pytest.raises(ConfigError, match="save_dir="):
        require_writable("/proc/qbench-results", "save_dir")  # refuses root too

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(results.tempfile, "TemporaryFile", denied)
    with pytest.raises(ConfigError, match="Permission denied"):
        require_writable(tmp_path / "a")


def test_the_baseline_knows_itself() -> None:
    assert baseline().is_baseline
    assert not make_result("rtn").is_baseline


@pytest.mark.parametrize(
    ("scheme", "options", "label"),
    [
        ("W2A8", {"bit_balance": True}, "W2*A8"),
        ("W2A16g64", {"abq.bit_balance": True}, "W2*A16g64"),
        ("W2A8", {"bit_balance": False}, "W2A8"),
        ("W2A8", {}, "W2A8"),
    ],
    ids=["balanced", "of a composition", "not balanced", "no such option"],
)
def test_an_extra_level_shows_in_the_scheme_as_tables_print_it(
    scheme: str, options: dict, label: str
) -> None:
    assert make_result(scheme=scheme, options=options).scheme_label == label
