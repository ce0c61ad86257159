"""`run` from a model folder and text files to rows, and every way in which its input can be bad.

Models are random and tiny, so nothing here says how good a method is; that what is measured is what the integers
compute is checked against plain transformers on dequantized weights.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import qbench
import qbench.rows as rows_module
import qbench.runner as runner_module
from qbench import circumstances
from qbench.cli import main
from qbench.config import RunConfig
from qbench.data.text import load_text
from qbench.data.windows import draw_calibration, evaluation_windows
from qbench.engine.progress import Listener
from qbench.engine.state import BlockState
from qbench.errors import ConfigError, DataError, NumericalError, UnsupportedSchemeError
from qbench.failures import FailureStore
from qbench.locking import Lock
from qbench.methods.rtn import RTN
from qbench.models.loading import describe_model, load_model
from qbench.results import Result, ResultStore
from qbench.runner import run
from qbench.scheme import Scheme
from tests import model_folders
from tests.tiny_runs import naive_logits

SEQ_LEN, WINDOWS = 32, 6
FAST = {"epochs": 1}
TRAINED = [
    "rtn",
    "smoothquant",
    {"name": "omniquant", "options": FAST},
    {"name": "affinequant", "options": FAST},
]


class Setting:
    """A folder with models and texts, and runs in it."""

    def __init__(self, folder: Path, build) -> None:
        self.folder, self.build = folder, build
        self.calibration, self.evaluation = folder / "calibration.txt", folder / "evaluation.txt"
        self.calibration.write_text(model_folders.text(600, seed=1))
        self.evaluation.write_text(model_folders.text(SEQ_LEN * WINDOWS + 5, seed=2))
        self.output = folder / "results"
        self.model = self.save("llama")

    def save(self, family: str, name: str | None = None, **changes: object) -> Path:
        return model_folders.save(self.build(family, **changes), self.folder / (name or f"tiny-{family}"))

    def request(self, **changes: object) -> dict:
        base = {
            "model": str(self.model),
            "methods": ["rtn"],
            "schemes": ["W3A16"],
            "calibration": {"dataset": str(self.calibration), "n_samples": 3, "seq_len": SEQ_LEN},
            "evals": {"datasets": [f"own={self.evaluation}"]},
            "output": str(self.output),
        }
        return base | changes

    def run(self, listener: Listener | None = None, **changes: object) -> list[Result]:
        return run(RunConfig.model_validate(self.request(**changes)), listener)

    def records(self) -> list[Path]:
        return sorted(self.output.glob("*.json"))

    def written(self) -> set[Path]:
        return {path for path in self.output.rglob("*") if path.is_file()} if self.output.exists() else set()


@pytest.fixture
def here(tmp_path, build_tiny) -> Setting:
    return Setting(tmp_path, build_tiny)


class Watcher(Listener):
    """What a run says of itself."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.stages: list[str] = []
        self.started: list[tuple[str, int, bool]] = []
        self.evaluated: list[tuple[str, int, int]] = []
        self.rows: list[Result] = []
        self.settled: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.stop = stop

    def stage(self, name: str, detail: str = "") -> None:
        self.stages.append(name)

    def block_start(self, lane: str, index: int, resumed: bool) -> None:
        self.started.append((lane, index, resumed))
        if self.stop == (lane, index):
            raise KeyboardInterrupt

    def evaluating(self, label: str, done: int, total: int) -> None:
        self.evaluated.append((label, done, total))

    def row(self, result: Result) -> None:
        self.rows.append(result)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def cell(self, label: str, outcome: str, detail: str = "") -> None:
        self.settled.append((label, outcome))


# --------------------------------------------------------------------------------------- rows


def test_a_run_gives_the_baseline_and_a_row_for_every_method_and_scheme(here) -> None:
    watcher = Watcher()
    rows = here.run(watcher, methods=TRAINED, schemes=["W4A4", "W3A16g16"])
    methods = ["rtn", "smoothquant", "omniquant", "affinequant"]
    expected = [("full-precision", "W16A16")] + [(m, s) for s in ("W4A4", "W3A16g16") for m in methods]
    assert [(row.method, row.scheme) for row in rows] == expected
    assert watcher.rows == rows
    assert watcher.stages[:2] == ["load", "calibration"] and watcher.stages.count("evaluate") == 9
    assert len({row.contract for row in rows}) == 1
    assert len({row.id for row in rows}) == 9
    for row in rows:
        metric = row.metrics["own/perplexity"]
        assert metric.n == metric.n_total == WINDOWS == len(metric.items)
        assert metric.value == pytest.approx(math.exp(sum(metric.items) / WINDOWS), rel=1e-12)
        assert metric.protocol == f"own ({SEQ_LEN}, non-overlapping, evaluation)"
        assert not metric.higher_is_better and metric.stderr > 0
        assert row.cost.seconds >= 0 and row.cost.peak_cpu_bytes > 10**7
        assert row.model == str(here.model)
        if row.method != "full-precision":
            assert [block.index for block in row.blocks] == [0, 1]
            assert len(row.blocks[0].losses) == (1 if row.method in ("omniquant", "affinequant") else 0)
    assert rows[4].options["sf"] == 0.1 and rows[8].options["sf"] == 0.01  # presets, resolved by scheme
    assert {t.site for t in rows[4].transforms} == {"attn_in", "mlp_in", "value_out", "query_key"}


def test_every_row_is_recorded_as_it_was_returned(here) -> None:
    rows = here.run(methods=TRAINED[:3], schemes=["W4A4"])
    stored = {result.id: result for result in ResultStore(here.output).load_all()}
    assert stored == {row.id: row for row in rows}
    for path in here.records():
        record = json.loads(path.read_text())
        assert set(record) >= {
            "qbench",
            "results",
            "configs",
            "versions",
            "n-shot",
            "higher_is_better",
            "n-samples",
        }
        assert record["results"]["own"]["perplexity,none"] > 1
    assert not [path for path in here.written() if path.suffix in (".tmp", ".writing")]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_numbers_are_those_of_plain_transformers(here, family) -> None:
    """Perplexity written out over the tokenized text; the quantized row through dequantized weights."""
    here.model = here.save(family)
    baseline, row = here.run(schemes=["W2A16g8"])
    model = model_folders.plain_model(here.model)
    ids = torch.tensor(model_folders.tokenizer()(here.evaluation.read_text())["input_ids"])
    windows = ids[: SEQ_LEN * WINDOWS].reshape(WINDOWS, SEQ_LEN)

    def perplexity(logits: torch.Tensor) -> float:
        chosen = logits[:, :-1].double().log_softmax(-1).gather(-1, windows[:, 1:, None])
        return math.exp(-float(chosen.mean()))

    (folder,) = (
        here.output / "checkpoints"
    ).iterdir()  # what the run left: integers, read back without the run
    codes = SimpleNamespace(
        lane=SimpleNamespace(scheme=Scheme.parse("W2A16g8")),
        state=lambda index: BlockState.load(folder / f"block-{index:04d}.safetensors"),
    )
    with torch.no_grad():
        assert baseline.metrics["own/perplexity"].value == pytest.approx(
            perplexity(model(windows).logits), rel=1e-6
        )
    expected = perplexity(naive_logits(model, codes, windows))
    assert row.metrics["own/perplexity"].value == pytest.approx(expected, rel=1e-5)
    assert row.metrics["own/perplexity"].value != pytest.approx(
        baseline.metrics["own/perplexity"].value, rel=1e-3
    )


def test_several_texts_and_a_limit(here) -> None:
    other = here.folder / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": model_folders.text(40, seed)}) for seed in range(4)))
    evals = {"datasets": [f"own={here.evaluation}", str(other)], "limit": 3, "batch_size": 2}
    watcher = Watcher()
    for row in here.run(watcher, evals=evals):
        assert list(row.metrics) == ["own/perplexity", "other/perplexity"]
        own = row.metrics["own/perplexity"]
        assert (own.n, own.n_total) == (3, WINDOWS) and own.protocol.endswith("first 3 windows)")
    assert watcher.evaluated[:2] == [("full-precision, own", 2, 3), ("full-precision, own", 3, 3)]


def test_the_model_in_a_run_is_not_changed_on_disk(here) -> None:
    before = {path.name: path.read_bytes() for path in here.model.iterdir()}
    here.run(methods=TRAINED)
    assert {path.name: path.read_bytes() for path in here.model.iterdir()} == before


def test_the_same_request_gives_the_same_row_elsewhere(here) -> None:
    first = here.run(methods=TRAINED[3:])
    second = here.run(methods=TRAINED[3:], output=str(here.folder / "elsewhere"))
    for one, other in zip(first, second, strict=True):
        assert one.id == other.id and one.metrics == other.metrics and one.contract == other.contract


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("calibration", {"n_samples": 4}),
        ("calibration", {"seq_len": 16}),
        ("evals", {"limit": 2}),
        ("evals", {"seq_len": 16}),
        ("quantizer", {"zero_in_range": False}),
        ("quantizer", {"attention_granularity": "per_token"}),
        ("compute", {"model_dtype": "bfloat16"}),
        ("compute", {"autocast": "bfloat16"}),
    ],
    ids=str,
)
def test_whatever_is_not_the_method_is_in_the_contract(here, section, change) -> None:
    request = here.request()
    first = here.run()
    second = here.run(**{section: request.get(section, {}) | change})
    assert first[1].contract != second[1].contract and first[1].id != second[1].id


@pytest.mark.parametrize(
    ("model", "asked", "settled"),
    [
        ("tiny-llama", "published", "per_head"),
        ("tiny-opt", "published", "per_token"),
        ("tiny-llama", "per_token", "per_token"),
        ("tiny-opt", "per_head", "per_head"),
    ],
    ids="-".join,
)
def test_the_published_granularity_is_that_of_the_architecture(model: str, asked: str, settled: str) -> None:
    config = RunConfig.model_validate({"model": model, "quantizer": {"attention_granularity": asked}})
    settings = circumstances._settings(config, torch.device("cpu"), describe_model(model))
    assert settings.attention_granularity == settled


def test_another_seed_is_another_row_of_the_same_contract(here) -> None:
    request = here.request()
    first = here.run()
    second = here.run(calibration=request["calibration"] | {"seed": 3})
    assert first[0].id == second[0].id  # the full-precision model has not changed
    assert first[1].contract == second[1].contract and first[1].id != second[1].id
    assert first[1].calibration["tokens"] != second[1].calibration["tokens"]
    assert [row.calibration["seed"] for row in (first[1], second[1])] == [2, 3]


def test_two_batch_sizes_are_two_runs(here) -> None:
    """The optimizer steps differ, so the codes do: neither the record nor the codes of one may stand for the other."""
    rows = [here.run(methods=TRAINED[2:3], compute={"batch_size": size})[1] for size in (1, 3)]
    assert rows[0].blocks[0].losses != rows[1].blocks[0].losses
    assert rows[0].id != rows[1].id
    assert len([r for r in ResultStore(here.output).load_all() if r.method == "omniquant"]) == 2


# ------------------------------------------------------------------------------- bits per weight

# tiny LLaMA: q and o 32×32, k and v 16×32, gate and up 64×32, down 32×64
WEIGHTS = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32
ROWS = 32 + 16 + 16 + 32 + 64 + 64 + 32


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("W4A16", 4 + (16 + 4) * ROWS / WEIGHTS),  # a float16 scale and a 4-bit zero point per output channel
        ("W4A16g16", 4 + (16 + 4) / 16),
        ("W3A4g8", 3 + (16 + 3) / 8),
        ("W8A8-sym", 8 + 16 * ROWS / WEIGHTS),  # no zero point is stored
        ("W16A4", 16.0),
    ],
)
def test_bits_per_weight_count_codes_scales_and_zero_points(here, scheme, bits) -> None:
    baseline, row = here.run(schemes=[scheme])
    assert baseline.bits_per_weight == 16.0
    assert row.bits_per_weight == pytest.approx(bits, rel=1e-12)


def test_bits_per_weight_count_what_stays_of_the_transforms(here) -> None:
    rows = here.run(methods=TRAINED[3:], schemes=["W4A16g16"])
    matrices, norm_biases = 2 * 32 * 32, 2 * 32
    linear_biases = 32 + 16 + 16 + 32 + 64 + 64  # q k v o gate up, once each
    extra = 16 * (matrices + norm_biases + linear_biases) / WEIGHTS
    assert rows[1].bits_per_weight == pytest.approx(4 + 20 / 16 + extra, rel=1e-12)
    assert any("hidden×hidden product after each norm" in note for note in rows[1].notes)


# ------------------------------------------------------------------------- baseline, resume, restart


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """Labels of what is really scored."""
    labels: list[str] = []
    evaluate = rows_module.evaluate

    def spy(common, label):
        labels.append(label)
        return evaluate(common, label)

    monkeypatch.setattr(rows_module, "evaluate", spy)
    return labels


def test_the_baseline_is_measured_once_for_one_content(here, scored) -> None:
    first = here.run()
    here.run(schemes=["W4A4"])
    assert scored.count("full-precision") == 1
    copy = here.folder / "the-same-model-elsewhere"
    shutil.copytree(here.model, copy)
    moved = here.run(model=str(copy))
    assert scored.count("full-precision") == 1
    assert moved[0].metrics == first[0].metrics and moved[0].model_fingerprint == first[0].model_fingerprint


def test_other_content_at_the_same_path_is_measured_again(here, scored) -> None:
    (before, _) = here.run()
    shutil.rmtree(here.model)
    here.save("llama", seed=1)
    (after, _) = here.run()
    assert scored.count("full-precision") == 2
    assert after.metrics["own/perplexity"].value != before.metrics["own/perplexity"].value
    assert after.contract != before.contract


@pytest.mark.parametrize("change", ["text", "dtype", "length"])
def test_the_baseline_depends_on_everything_it_measures(here, scored, change) -> None:
    here.run()
    changes: dict[str, object] = {}
    if change == "text":
        here.evaluation.write_text(model_folders.text(SEQ_LEN * WINDOWS, seed=9))
    elif change == "dtype":
        changes["compute"] = {"model_dtype": "bfloat16"}
    else:
        changes["evals"] = {"datasets": [f"own={here.evaluation}"], "seq_len": 16}
    here.run(**changes)
    assert scored.count("full-precision") == 2


def test_a_damaged_baseline_cache_does_not_end_in_a_traceback(here) -> None:
    (first, _) = here.run()
    (cache,) = (here.output / "cache").glob("*.json")
    cache.write_text(cache.read_text()[:20])
    try:
        (again, _) = here.run()
    except DataError as error:
        assert cache.name in str(error)
    else:
        assert again.metrics == first.metrics


def test_the_same_request_again_computes_no_block_twice(here) -> None:
    first = here.run(methods=TRAINED[3:])
    watcher = Watcher()
    second = here.run(watcher, methods=TRAINED[3:])
    assert watcher.started == [] and second == first == watcher.rows
    assert watcher.settled == [("affinequant W3A16", "stored")]
    for (
        record
    ) in here.records():  # the blocks are there, the rows are not: nothing but the evaluation is done again
        record.unlink()
    watcher = Watcher()
    third = here.run(watcher, methods=TRAINED[3:])
    assert watcher.started == [("affinequant W3A16", i, True) for i in range(2)]
    assert "capture" not in watcher.stages and watcher.settled == [("affinequant W3A16", "done")]
    assert [row.metrics for row in third] == [row.metrics for row in first]
    assert third[1].blocks == first[1].blocks and third[1].codes == first[1].codes
    assert third[1].bits_per_weight == first[1].bits_per_weight


def test_an_interrupted_run_goes_on_where_it_stopped(here) -> None:
    expected = here.run(methods=TRAINED[3:], output=str(here.folder / "whole"))
    with pytest.raises(KeyboardInterrupt):
        here.run(Watcher(("affinequant W3A16", 1)), methods=TRAINED[3:])
    watcher = Watcher()
    rows = here.run(watcher, methods=TRAINED[3:])
    assert watcher.started == [("affinequant W3A16", 0, True), ("affinequant W3A16", 1, False)]
    assert rows[1].metrics == expected[1].metrics and rows[1].id == expected[1].id


def test_a_row_says_what_its_calibration_shares_with_each_evaluation(here) -> None:
    seen = here.folder / "seen.txt"
    seen.write_text(here.calibration.read_text() + here.evaluation.read_text())
    evals = {"datasets": [f"same={here.calibration}", f"seen={seen}", f"other={here.evaluation}"]}
    watcher = Watcher()
    baseline, row = here.run(watcher, evals=evals)
    overlap = row.calibration["overlap"]
    known = load_text(str(here.calibration), "calibration")
    tokenizer = load_model(str(here.model)).tokenizer
    windows = draw_calibration(known, tokenizer, 3, SEQ_LEN, seed=2).ids.tolist()
    grams = {tuple(window[i : i + 13]) for window in windows for i in range(SEQ_LEN - 12)}
    for name, path in (("same", here.calibration), ("seen", seen), ("other", here.evaluation)):
        scored = evaluation_windows(load_text(str(path), "evaluation"), tokenizer, SEQ_LEN).ids.tolist()
        hits = [tuple(window[i : i + 13]) in grams for window in scored for i in range(SEQ_LEN - 12)]
        assert (overlap[name]["shared"], overlap[name]["total"]) == (sum(hits), len(hits))
    assert [overlap[name]["same_corpus"] for name in ("same", "seen", "other")] == [True, False, False]
    assert overlap["seen"]["shared"] > 20 and overlap["other"]["shared"] == 0
    notes = [note for note in row.notes if "13-grams" in note]
    assert [note.partition(" of the ")[2] for note in notes] == [
        "13-grams of same are in the calibration windows", "13-grams of seen are in the calibration windows"
    ]  # fmt: skip
    assert [note for note in watcher.notes if "13-grams" in note] == notes
    assert "overlap" not in baseline.calibration and baseline.notes == []
    assert row.contract_fields["calibration"] == baseline.contract_fields["calibration"]


def test_another_part_of_one_corpus_and_tasks_are_noted_in_the_row(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = {
        "methods": ["rtn"],
        "calibration": {"n_samples": 2, "seq_len": 32},
        "evals": {"limit": 2, "seq_len": 64, "tasks": ["stdlib"], "limit_items": 3},
    }
    watcher = Watcher()
    _, row = run(RunConfig.model_validate(request), watcher)
    assert "calibrated on the corpus that stdlib is part of" in row.notes
    assert "calibrated on the corpus that stdlib is part of" in watcher.notes
    text, task = (row.calibration["overlap"][name] for name in ("stdlib", "stdlib_choice"))
    assert text["same_corpus"] and text["total"] == 2 * (64 - 12)
    assert task["total"] > 0 and "same_corpus" not in task


def test_calibrating_on_the_evaluated_text_is_noted_in_the_row(here) -> None:
    _, apart = here.run()
    _, same = here.run(evals={"datasets": [f"own={here.calibration}"]})
    assert not any("same text" in note for note in apart.notes)
    assert any("calibrated and evaluated on the same text (own)" in note for note in same.notes)


def test_resume_takes_the_checkpoints_of_another_folder(here) -> None:
    here.run()
    watcher = Watcher()
    here.run(watcher, output=str(here.folder / "new"), resume=str(here.output))
    assert [resumed for *_, resumed in watcher.started] == [True, True]
    assert ResultStore(here.folder / "new").load_all()


def test_restart_computes_everything_again(here, scored) -> None:
    first = here.run(methods=TRAINED[3:])
    watcher = Watcher()
    second = here.run(watcher, methods=TRAINED[3:], restart=True)
    assert [resumed for *_, resumed in watcher.started] == [False, False]
    assert scored == ["full-precision", "affinequant W3A16"] * 2
    assert [row.metrics for row in second] == [row.metrics for row in first]


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": {"seed": 5}},
        {"compute": {"batch_size": 2}},
        {"methods": [{"name": "omniquant", "options": {"epochs": 2}}]},
    ],
    ids=["seed", "batch size", "epochs"],
)
def test_checkpoints_of_another_request_are_not_used(here, change) -> None:
    request = here.request(methods=TRAINED[2:3])
    here.run(methods=TRAINED[2:3])
    watcher = Watcher()
    section = next(iter(change))
    if section != "methods":
        change = {section: request.get(section, {}) | change[section]}
    here.run(watcher, **({"methods": TRAINED[2:3]} | change))
    assert [resumed for *_, resumed in watcher.started] == [False, False]


def test_the_same_blocks_serve_another_evaluation(here) -> None:
    here.run()
    watcher = Watcher()
    here.run(watcher, evals={"datasets": [f"own={here.evaluation}"], "limit": 2})
    assert [resumed for *_, resumed in watcher.started] == [True, True]


# ------------------------------------------------------------------- rows as lanes of one pass


def test_two_lanes_of_one_method_have_names_and_rows_of_their_own(here) -> None:
    methods = [{"name": "omniquant", "options": {"epochs": n}} for n in (1, 2)] + ["rtn"]
    watcher = Watcher()
    rows = here.run(watcher, methods=methods)
    assert [label for label, *_ in watcher.started[:3]] == [
        "omniquant W3A16 epochs=1",
        "omniquant W3A16 epochs=2",
        "rtn W3A16",
    ]
    assert [len(row.blocks[0].losses) for row in rows[1:]] == [1, 2, 0]
    assert len({row.codes for row in rows[1:]}) == len({row.id for row in rows}) - 1 == 3


def test_a_row_of_a_run_is_the_row_of_that_method_alone(here) -> None:
    together = here.run(methods=TRAINED, schemes=["W4A4", "W3A16"])
    for row in together[1:]:
        method = next(m for m in TRAINED if (m if isinstance(m, str) else m["name"]) == row.method)
        alone = here.run(methods=[method], schemes=[row.scheme], output=str(here.folder / "alone"))[1]
        times = {
            "created": True,
            "cost": True,
            "blocks": True,
            "memory": {"peak_prefill_bytes", "peak_decode_bytes"},
        }
        assert alone.model_dump(exclude=times) == row.model_dump(exclude=times)
        assert [b.losses for b in alone.blocks] == [b.losses for b in row.blocks]


def test_only_what_is_missing_is_computed(here) -> None:
    first = here.run(methods=TRAINED[:2])
    watcher = Watcher()
    rows = here.run(watcher, methods=TRAINED)
    assert [row.method for row in rows[1:]] == ["rtn", "smoothquant", "omniquant", "affinequant"]
    assert rows[:3] == first
    assert {label for label, *_ in watcher.started} == {"omniquant W3A16", "affinequant W3A16"}
    assert dict(watcher.settled) == {
        "rtn W3A16": "stored",
        "smoothquant W3A16": "stored",
        "omniquant W3A16": "done",
        "affinequant W3A16": "done",
    }


def test_a_finished_lane_beside_one_that_is_not(here) -> None:
    """The finished one is read, and what the others compute does not depend on it."""
    expected = here.run(methods=TRAINED, output=str(here.folder / "whole"))
    here.run(methods=TRAINED[1:3])
    for record in here.records():
        record.unlink()
    watcher = Watcher()
    rows = here.run(watcher, methods=TRAINED)
    assert [row.codes for row in rows] == [row.codes for row in expected]
    assert [row.metrics for row in rows] == [row.metrics for row in expected]
    resumed = {label for label, _, again in watcher.started if again}
    assert resumed == {"smoothquant W3A16", "omniquant W3A16"} and len(watcher.started) == 8


def test_a_row_of_other_code_is_made_again(here, monkeypatch) -> None:
    before = here.run()
    monkeypatch.setattr(runner_module.provenance, "code_fingerprint", lambda: "changed")
    watcher = Watcher()
    after = here.run(watcher)
    assert [resumed for *_, resumed in watcher.started] == [False, False]
    assert after[1].id == before[1].id and after[1].provenance["code"] == "changed"


def test_seeds_repeat_the_quantization_and_load_the_model_once(here, scored) -> None:
    watcher = Watcher()
    rows = here.run(watcher, methods=TRAINED[2:3], seeds=3)
    quantized = [row for row in rows if row.method == "omniquant"]
    assert [row.calibration["seed"] for row in quantized] == [2, 3, 4]
    assert (
        len(rows) == 4
        and len({row.codes for row in quantized}) == 3
        and len({row.contract for row in rows}) == 1
    )
    assert watcher.stages.count("load") == 1 and scored.count("full-precision") == 1
    seeded = here.request()["calibration"] | {"seed": 3}
    alone = here.run(methods=TRAINED[2:3], calibration=seeded, output=str(here.folder / "alone"))
    assert alone[1].id == quantized[1].id and alone[1].codes == quantized[1].codes
    assert alone[1].config == quantized[1].config


def test_a_failure_is_recorded_and_goes_away_when_its_row_succeeds(here) -> None:
    bad = {"name": "omniquant", "options": {"epochs": 2, "let_lr": 1e30}}
    watcher = Watcher()
    with pytest.raises(NumericalError):
        here.run(watcher, methods=["rtn", bad], schemes=["W4A4"])
    (failure,) = FailureStore(here.output).load_all()
    assert (failure.method, failure.scheme, failure.kind) == ("omniquant", "W4A4", "NumericalError")
    assert "The loss became" in failure.error and failure.code
    assert ("omniquant W4A4", "failed") in watcher.settled and ("rtn W4A4", "done") in watcher.settled
    again = RunConfig.model_validate(failure.config)
    assert again.hash() == failure.key and again.methods[0].options == bad["options"]
    original = runner_module.reconstruct
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:  # as if the cause had been removed

        def healed(model, blocks, spec, lanes, *rest):
            for lane in lanes:
                lane.planner = lane.planner.model_copy(update={"let_lr": 1e-3})
            return original(model, blocks, spec, lanes, *rest)

        patch.setattr(runner_module, "reconstruct", healed)
        here.run(methods=["rtn", bad], schemes=["W4A4"])
    assert FailureStore(here.output).load_all() == []


def test_rows_that_memory_has_no_room_for_take_another_pass(here, monkeypatch) -> None:
    expected = here.run(methods=TRAINED, output=str(here.folder / "together"))
    array = 4 * 3 * SEQ_LEN * 32  # float32, windows, tokens, hidden
    room = SimpleNamespace(available=2 * (runner_module.SHARED_ARRAYS + 2) * array + 1)
    monkeypatch.setattr(runner_module.psutil, "virtual_memory", lambda: room)
    lanes = []
    original = runner_module.reconstruct
    monkeypatch.setattr(
        runner_module, "reconstruct", lambda *a: lanes.append([lane.name for lane in a[3]]) or original(*a)
    )
    compute = {"hidden_states": "auto"}
    monkeypatch.setattr("qbench.engine.stream.choose_placement", lambda *a: "cpu")
    rows = here.run(methods=TRAINED, compute=compute)
    assert lanes == [["rtn W3A16", "smoothquant W3A16"], ["omniquant W3A16", "affinequant W3A16"]]
    assert [row.codes for row in rows] == [row.codes for row in expected]


def test_a_row_that_another_process_computes_is_waited_for(here, monkeypatch) -> None:
    """The other one finishes its row while this run looks elsewhere; it must not be computed twice."""
    other = here.run(methods=TRAINED[2:3], output=str(here.folder / "other"))
    theirs = ResultStore(here.output)
    monkeypatch.setattr(runner_module, "POLL_S", 0.0)
    tries = []

    class Contended(Lock):
        def acquire(self) -> bool:
            if "omniquant" not in str(self.path):
                return super().acquire()
            tries.append(self.path)
            if len(tries) < 3:
                return False
            theirs.save(other[1])
            return super().acquire()

    monkeypatch.setattr(runner_module, "Lock", Contended)
    watcher = Watcher()
    rows = here.run(watcher, methods=TRAINED[:3])
    assert len(tries) == 3 and {label for label, *_ in watcher.started} == {"rtn W3A16", "smoothquant W3A16"}
    assert rows[3] == other[1] and [row.method for row in rows[1:]] == ["rtn", "smoothquant", "omniquant"]
    assert not list(here.output.rglob("lock"))


# ------------------------------------------------------------------------------- other behaviour


def test_save_dir_writes_what_folds_and_says_what_does_not(here) -> None:
    saved = here.folder / "saved"
    rows = here.run(methods=[TRAINED[0], TRAINED[3]], save_dir=str(saved))
    assert [path.name for path in saved.iterdir()] == ["tiny-llama-RTN-W3A16"]
    assert "exported as fake: verified: transformers ✓" in rows[1].notes
    (note,) = [note for note in rows[2].notes if note.startswith("not saved: ")]
    assert "full matrices remain after the norms" in note
    assert (
        ResultStore(here.output).find(rows[1].id) == rows[1]
        and ResultStore(here.output).find(rows[2].id) == rows[2]
    )
    again = here.run(model=str(saved / "tiny-llama-RTN-W3A16"), schemes=["W16A16"])
    assert again[0].metrics["own/perplexity"].value == pytest.approx(
        rows[1].metrics["own/perplexity"].value, rel=1e-6
    )


def test_models_that_would_overwrite_each_other_are_not_saved(here) -> None:
    twice = [{"name": "smoothquant", "options": {"alpha": alpha}} for alpha in (0.4, 0.6)]
    for changes in ({"seeds": 2}, {"methods": twice}):
        with pytest.raises(ConfigError, match="would be exported to"):
            here.run(save_dir=str(here.folder / "saved"), **changes)
    assert not here.output.exists()


def test_the_published_form_is_noted_in_the_row(here) -> None:
    options = FAST | {"query_key": "published", "truncate": "all"}
    rows = here.run(methods=[{"name": "affinequant", "options": options}], schemes=["W4A4"])
    assert any("published form" in note and "RoPE" in note for note in rows[1].notes)


def test_the_identity_scheme_beside_others_equals_the_baseline(here) -> None:
    rows = here.run(schemes=["W16A16", "W3A16"], methods=["affinequant"])
    assert rows[1].metrics == rows[0].metrics
    assert "hidden×hidden" in " ".join(rows[2].notes)
    assert "hidden×hidden" not in " ".join(rows[1].notes)  # nothing was transformed
    alone = here.run(schemes=["W3A16"], methods=["affinequant"], output=str(here.folder / "alone"))
    assert rows[2].metrics == alone[1].metrics


def test_a_method_that_breaks_down_does_not_take_the_others_with_it(here, monkeypatch) -> None:
    options = {"epochs": 2, "let_lr": 1e30}
    watcher = Watcher()
    with pytest.raises(NumericalError) as caught:
        here.run(watcher, methods=["rtn", {"name": "omniquant", "options": options}], schemes=["W4A4"])
    assert "omniquant W4A4, block 0: The loss became" in str(caught.value)
    assert str(caught.value).endswith(f"Finished rows are in {here.output}.")
    assert [row.method for row in watcher.rows] == ["full-precision", "rtn"]
    assert [r.method for r in ResultStore(here.output).load_all()] == ["full-precision", "rtn"]


def test_half_precision_fitting_is_noted(here) -> None:
    rows = here.run(methods=TRAINED[2:3], schemes=["W4A4"], compute={"autocast": "bfloat16"})
    assert any("bfloat16" in note for note in rows[1].notes)
    assert not rows[0].notes


def test_the_default_run_needs_nothing_but_the_package(tmp_path, monkeypatch) -> None:
    """The embedded model and the standard library's text; windows cut short to take a second."""
    monkeypatch.chdir(tmp_path)
    request = {
        "methods": ["rtn"],
        "calibration": {"n_samples": 2, "seq_len": 32},
        "evals": {"limit": 2, "seq_len": 64},
    }
    baseline, row = qbench.run(RunConfig.model_validate(request))
    assert (row.model, row.method, row.scheme) == ("tiny-llama", "rtn", "W4A4")
    assert row.calibration["dataset"] == "stdlib"
    full, rounded = (r.metrics["stdlib/perplexity"].value for r in (baseline, row))
    assert 2 < full < 60 and rounded > 1.05 * full
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def test_the_second_embedded_model_runs_too(tmp_path) -> None:
    request = {
        "model": "tiny-opt",
        "methods": ["rtn"],
        "calibration": {"n_samples": 1, "seq_len": 16},
        "evals": {"limit": 1, "seq_len": 64},
        "output": str(tmp_path),
    }
    baseline, row = run(RunConfig.model_validate(request))
    assert baseline.metrics["stdlib/perplexity"].value < row.metrics["stdlib/perplexity"].value


def test_a_model_in_memory_is_left_alone_by_the_run(here, monkeypatch) -> None:
    """The one that the runner loaded: afterwards it is the full-precision model again."""
    kept = []
    monkeypatch.setattr(
        runner_module, "load_model", lambda *a, **k: kept.append(load_model(*a, **k)) or kept[-1]
    )
    here.run(methods=TRAINED[:3], schemes=["W4A4"])
    fresh = load_model(str(here.model)).model.state_dict()
    found = kept[0].model.state_dict()
    assert list(found) == list(fresh) and all(torch.equal(found[name], fresh[name]) for name in fresh)


# ------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(here, monkeypatch):
    """Runs `qbench run` for real; returns its one sentence. Nothing may be left behind, finished rows apart."""
    monkeypatch.setenv("COLUMNS", "200")

    def ask(*arguments: str, code: int = 2, **options: str | None) -> str:
        given = {
            "--model": str(here.model),
            "--method": "rtn",
            "--scheme": "W3A16",
            "--calib-dataset": str(here.calibration),
            "--eval": f"own={here.evaluation}",
            "--nsamples": "3",
            "--seqlen": str(SEQ_LEN),
            "--output": str(here.output),
        } | {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        flat = [part for option, value in given.items() if value is not None for part in (option, value)]
        before = here.written()
        result = CliRunner().invoke(main, ["run", *flat, *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and result.stderr.rstrip().endswith(errors[0]), result.stderr
        assert result.stdout == ""
        for path in here.written() - before:  # whole files only, of lanes that did finish
            assert path.suffix in (".json", ".safetensors"), path
            assert load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
        return errors[0].removeprefix("Error: ")

    return ask


def test_an_unknown_method_is_refused_with_a_suggestion(here, refused) -> None:
    message = refused(method="afinequant")
    assert "Unknown method 'afinequant'. Did you mean 'affinequant'" in message and "Known:" in message
    assert not here.output.exists()


@pytest.mark.parametrize("scheme", ["4bit", "W4", "W4A4x", " "])
def test_an_unreadable_scheme_is_refused_with_examples(here, refused, scheme) -> None:
    message = refused(scheme=scheme)
    assert repr(scheme) in message and "W4A16g128" in message
    assert not here.output.exists()


@pytest.mark.parametrize("scheme", ["W9A16", "W1A16", "W4A12"])
def test_a_bit_width_that_does_not_exist_is_refused(here, refused, scheme) -> None:
    assert "2 to 8, or 16" in refused(scheme=scheme)
    assert not here.output.exists()


def test_a_group_size_that_does_not_divide_is_refused_before_a_weight_is_read(here, refused) -> None:
    path = Path(here.model) / "model.safetensors"
    path.write_bytes(b"damaged")
    assert "group_size=24 does not divide" in refused(scheme="W4A16g24")
    assert "Cannot load model" in refused(scheme="W4A16")


def test_more_samples_to_a_step_than_there_are_is_refused(here, refused) -> None:
    assert "batch_size=4 is more than the 3 calibration windows" in refused("--batch-size", "4")
    assert not here.output.exists()


def test_a_group_size_that_does_not_divide_names_every_linear(here, refused) -> None:
    here.model = here.save("llama", "odd", intermediate_size=48)
    message = refused("--method", "affinequant", model=str(here.model), scheme="W4A16g32")
    assert "group_size=32 does not divide the input width of mlp.down_proj (48)" in message
    assert "q_proj" not in message and message.count("mlp.down_proj") == 1
    assert not here.output.exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--scheme", "W4A16g24"), "group_size=24"),
        (
            (
                "--method",
                "gptq",
                "--scheme",
                "W4A16g16",
                "--set",
                "gptq.act_order=1",
                "--set",
                "static_groups=0",
            ),
            "perm",
        ),
        (("--eval", "own=absent.txt"), "No dataset, file or folder 'absent.txt'"),
        (("--calib-dataset", "absent.txt"), "No dataset, file or folder 'absent.txt'"),
        (("--method", "omniquant", "--resume", "absent.pth"), "Cannot read parameter file 'absent.pth'"),
    ],
    ids=["group size", "groups that need an index", "evaluation text", "calibration text", "parameter file"],
)
def test_what_can_be_refused_is_refused_before_a_weight_is_read(
    here, refused, monkeypatch, arguments, word
) -> None:
    monkeypatch.setattr(runner_module, "load_model", lambda *args, **given: pytest.fail("weights were read"))
    assert word in refused(*arguments)
    assert not here.output.exists()


def test_an_unknown_option_is_refused_with_a_suggestion(here, refused) -> None:
    message = refused("--set", "alhpa=0.5", method="smoothquant")
    assert "alpha" in message
    assert not here.output.exists()


def test_an_option_value_out_of_range_is_refused(here, refused) -> None:
    assert "alpha" in refused("--alpha", "1.5", method="smoothquant")
    assert not here.output.exists()


@pytest.mark.parametrize("which", ["calib_dataset", "eval"])
def test_a_missing_dataset_is_refused(here, refused, which) -> None:
    message = refused(**{which: "wikitex2"})
    assert "'wikitex2'" in message and "Did you mean 'wikitext2'" in message
    assert not here.output.exists()


@pytest.mark.parametrize("which", ["calib_dataset", "eval"])
def test_a_dataset_that_cannot_be_reached_is_refused(here, refused, which) -> None:
    assert "wikitext2" in refused(**{which: "wikitext2"})
    assert not here.output.exists()


def test_a_sequence_longer_than_the_models_limit_is_refused(here, refused) -> None:
    message = refused(seqlen="65")
    assert "seq_len=65" in message and "64 tokens" in message and "--seqlen 64" in message
    assert not here.output.exists()


@pytest.mark.parametrize("which", ["calibration", "evaluation"])
@pytest.mark.parametrize("content", ["", " \n\n ", "one two three"], ids=["nothing", "blanks", "too short"])
def test_a_text_without_a_window_is_refused(here, refused, which, content) -> None:
    getattr(here, which).write_text(content)
    message = refused()
    assert ("no text" if not content.strip() else "tokens, a window needs") in message
    assert not here.output.exists()


@pytest.mark.parametrize("option", ["output", "save_dir"])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_read(here, refused, option) -> None:
    blocked = here.folder / "a-file"
    blocked.write_text("in the way")
    message = refused(**{option: str(blocked / "results"), "model": str(here.folder / "no-model")})
    assert str(blocked) in message and "is a file" in message
    assert blocked.read_text() == "in the way" and not here.output.exists()


def test_an_unknown_model_is_refused_with_a_suggestion(here, refused) -> None:
    message = refused(model="tiny-lama")
    assert "'tiny-lama'" in message and "'tiny-llama'" in message
    assert not here.output.exists()


def test_a_hub_model_that_cannot_be_reached_is_refused(here, refused) -> None:
    assert "facebook/opt-125m" in refused(model="facebook/opt-125m")
    assert not here.output.exists()


def test_a_model_type_that_is_not_supported_lists_those_that_are(here, refused) -> None:
    config = json.loads((here.model / "config.json").read_text())
    (here.model / "config.json").write_text(
        json.dumps(config | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    message = refused()
    assert "'gpt2' is not supported" in message and "llama, mistral, qwen2, qwen3, opt" in message
    assert not here.output.exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_weights_that_are_not_finite_are_refused_by_name(here, refused, bad) -> None:
    path = here.model / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = bad
    save_file(weights, path, {"format": "pt"})
    message = refused()
    assert "not finite" in message and name in message
    assert not here.output.exists()


@pytest.mark.parametrize(
    "damage", ["truncated", "garbage", "missing tensor", "no config", "no weights", "no tokenizer"]
)
def test_a_damaged_model_folder_is_refused(here, refused, damage) -> None:
    path = here.model / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 100)
    elif damage == "missing tensor":
        weights = load_file(path)
        del weights["model.layers.0.self_attn.o_proj.weight"]
        save_file(weights, path, {"format": "pt"})
    elif damage == "no config":
        (here.model / "config.json").unlink()
    elif damage == "no weights":
        path.unlink()
    else:
        (here.model / "tokenizer.json").unlink()
        (here.model / "tokenizer_config.json").unlink()
    assert str(here.model) in refused()
    assert not here.output.exists()


@pytest.mark.parametrize("part", ["block", "manifest", "missing block"])
def test_a_corrupted_checkpoint_is_refused_and_restart_helps(here, refused, part) -> None:
    here.run()
    for record in here.records():
        record.unlink()
    (folder,) = (here.output / "checkpoints").iterdir()
    block, manifest = folder / "block-0001.safetensors", folder / "manifest.json"
    if part == "block":
        content = bytearray(block.read_bytes())
        content[-1] ^= 1
        block.write_bytes(content)
    elif part == "manifest":
        manifest.write_text(manifest.read_text()[:-10])
    else:
        block.unlink()
    message = refused()
    assert "damaged" in message and "--restart" in message
    rows = here.run(restart=True)
    assert rows[1].method == "rtn"
    assert here.run()[1].metrics == rows[1].metrics


def test_a_resume_folder_that_does_not_exist_is_refused(here, refused) -> None:
    assert "nowhere" in refused(resume=str(here.folder / "nowhere"))
    assert not here.output.exists()


def test_a_resume_folder_without_a_matching_block_is_refused(here, refused) -> None:
    here.run()
    message = refused(resume=str(here.output), scheme="W2A16")
    assert "holds no finished block of this request" in message


def test_a_device_that_does_not_exist_is_refused(here, refused) -> None:
    device = "cuda:99" if torch.cuda.is_available() else "cuda"
    assert f"device={device}" in refused(device=device)
    assert not here.output.exists()


def test_a_method_that_breaks_down_exits_with_3_and_keeps_the_finished_rows(here, refused) -> None:
    message = refused("--method", "omniquant", "--let-lr", "1e30", "--epochs", "2", scheme="W4A4", code=3)
    assert "omniquant W4A4, block 0" in message
    assert {r.method for r in ResultStore(here.output).load_all()} == {"full-precision", "rtn"}


def test_the_command_line_prints_what_was_recorded(here) -> None:
    arguments = ["--model", str(here.model), "--method", "rtn", "--scheme", "W3A16", "--nsamples", "3"]
    arguments += [
        "--seqlen",
        str(SEQ_LEN),
        "--calib-dataset",
        str(here.calibration),
        "--eval",
        str(here.evaluation),
    ]
    arguments += ["--output", str(here.output), "--format", "json"]
    result = CliRunner().invoke(main, ["run", *arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["method"], row["scheme"]) for row in rows] == [
        ("full-precision", "W16A16"),
        ("rtn", "W3A16"),
    ]
    wanted = {"model", "method", "scheme", "metrics", "bits_per_weight", "cost", "contract", "notes"}
    assert all(set(row) >= wanted for row in rows)
    stored = {r.method: r for r in ResultStore(here.output).load_all()}
    for row in rows:
        metric = stored[row["method"]].metrics["evaluation/perplexity"]
        printed = row["metrics"]["evaluation/perplexity"]
        assert printed == {"value": metric.value, "stderr": metric.stderr, "n": WINDOWS}
        assert set(row["cost"]) == {"seconds", "peak_gpu_bytes", "peak_cpu_bytes"}


def test_every_offence_of_several_schemes_is_reported_at_once(here) -> None:
    with pytest.raises(UnsupportedSchemeError) as caught:
        here.run(schemes=["W4A16g20", "W4A16g24"])
    assert "group_size=20" in str(caught.value) and "group_size=24" in str(caught.value)


def test_a_plugins_own_refusal_comes_before_the_texts_are_read(here, monkeypatch) -> None:
    def refuse(self, scheme, spec) -> None:
        raise UnsupportedSchemeError("not today")

    monkeypatch.setattr(RTN, "check", refuse)
    here.calibration.unlink()
    with pytest.raises(ConfigError, match=re.escape("rtn at W3A16: not today")):
        here.run()
    assert not here.output.exists()
