"""From published cells to passes to verdicts; the whole path on the embedded model standing in for a published one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qbench.cli import main
from qbench.errors import ConfigError
from qbench.methods import METHODS
from qbench.parity import Changes, plan
from qbench.reports.published import find

ASSETS = Path(__file__).parents[1] / "qbench/assets"


def invoke(*arguments: str, columns: int = 200) -> Result:
    return CliRunner().invoke(main, ["parity", *arguments], env={"COLUMNS": str(columns)})


def planned(cells: list, changes: Changes | None = None, **settings: object) -> tuple[list, list]:
    return plan(cells, changes or Changes(), {"output": "results", "seeds": 1, **settings}, METHODS.names())


def test_cells_that_agree_in_all_but_method_and_scheme_share_a_pass() -> None:
    cells = find(
        "AffineQuant Table 1", models=["opt-125m"], methods=["FP16", "RTN", "OmniQuant", "AffineQuant"]
    )
    (only,), impossible = planned(cells)
    assert impossible == [] and len(only.cells) == 13 and len(only.rows) == 12
    assert only.config.model == "facebook/opt-125m" and only.config.calibration.n_samples == 128
    assert [label for *_, label in only.cells].count(None) == 1
    assert only.config.quantizer.zero_in_range is False


def test_other_calibration_data_is_another_pass() -> None:
    cells = find("AffineQuant Table 1", models=["opt-125m"], methods=["RTN", "GPTQ"], schemes=["W3A16"])
    assert [each.config.calibration.dataset for each in planned(cells)[0]] == ["wikitext2", "c4"]
    changes = Changes(calibration="some.txt")
    assert [each.config.calibration.dataset for each in planned(cells, changes)[0]] == ["some.txt"]


def test_a_method_that_is_not_here_has_its_verdict_at_once() -> None:
    passes, impossible = planned(find("FlatQuant main table", methods=["QuaRot-RTN"]))
    assert passes == [] and [v.said for v in impossible] == [
        "not comparable: qbench has no method QuaRot-RTN"
    ]


def test_c4_is_measured_in_both_variants_and_texts_may_come_from_files() -> None:
    cells = find("AffineQuant Table 3", models=["llama-7b"], datasets=["c4"], methods=["AffineQuant"])
    (only,), _ = planned(cells, Changes(texts={"c4": "c4.txt"}))
    assert only.config.evals.datasets == ["c4=c4.txt", "c4_new"]


def test_tasks_are_asked_for_by_name_or_file_and_the_average_needs_all_six() -> None:
    cells = find("AffineQuant Table 2", models=["llama-7b"], methods=["AffineQuant"], datasets=["piqa"])
    (only,), _ = planned(cells, Changes(texts={"piqa": "piqa.jsonl"}, limit=8))
    assert only.config.evals.tasks == ["piqa=piqa.jsonl"] and only.config.evals.limit_items == 8
    cells = find("AffineQuant Table 2", models=["llama-7b"], methods=["AffineQuant"], datasets=["avg"])
    assert len(planned(cells)[0][0].config.evals.tasks) == 6


def test_a_folder_for_a_model_that_is_not_asked_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="facebook/opt-125m"):
        planned(find("AffineQuant Table 1", models=["opt-125m"]), Changes(models={"opt-6.7b": "x"}))


def test_what_was_cut_is_said_and_what_was_not_is_not() -> None:
    from qbench.reports.recipes import recipe

    of = recipe(find("AffineQuant Table 1", models=["opt-125m"], methods=["RTN"])[0])
    assert Changes(n_samples=128, seq_len=2048).blockers(of) == []
    (said,) = Changes(n_samples=4, limit=8, epochs=2).blockers(of)
    assert said == "cut short: n_samples 4 instead of 128, the first 8 items only, 2 epochs"


def test_list_shows_tables_and_then_their_cells() -> None:
    overview = invoke("list")
    assert overview.exit_code == 0 and "AffineQuant Table 1" in overview.stdout and "126" in overview.stdout
    cells = invoke(
        "list", "AffineQuant Table 1", "--model", "opt-125m", "--scheme", "W3A16", "--format", "csv"
    )
    assert "AffineQuant Table 1,opt-125m,AffineQuant,W3A16,wikitext2,ppl,30.56" in cells.stdout.splitlines()
    everything = json.loads(invoke("list", "--format", "json").stdout)
    assert len(everything) == 794


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_list_breaks_no_name(width: int) -> None:
    overview = invoke("list", columns=width).stdout
    cells = invoke("list", "AffineQuant Table 1", "--scheme", "W3A16", columns=width).stdout
    assert max(len(line) for line in (overview + cells).splitlines()) <= width
    for cell in find("AffineQuant Table 1"):
        assert cell.model in overview.replace(",", " ").split() and cell.name in overview
    assert cells.startswith("AffineQuant Table 1, W3A16, wikitext2, ppl")
    assert ["opt-125m", "AffineQuant", "30.56"] in [line.split() for line in cells.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run"], "AffineQuant Table 1"),
        (["run", "AffineQuant Table 1", "--model", "opt-175b"], "opt-30b"),
        (["run", "AffineQuant Table 1", "--model", "opt-125m", "--model-path", "x"], "HUB_NAME=FOLDER"),
        (["list", "Affine"], "several tables"),
    ],
    ids=["nothing_named", "unknown_model", "no_pair", "ambiguous"],
)
def test_errors_are_one_sentence(arguments: list[str], expected: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and expected in result.stderr and "Traceback" not in result.stderr


def test_a_dry_run_prints_configurations_and_runs_nothing(tmp_path: Path) -> None:
    import yaml

    from qbench.config import RunConfig

    result = invoke("run", "AffineQuant Table 1", "--model", "facebook/opt-125m", "--scheme", "W3A16", "--dry-run",
                    "-o", str(tmp_path / "out"))  # fmt: skip
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    config = RunConfig.model_validate(yaml.safe_load(result.stdout.partition("\n# ")[0]))
    assert config.model == "facebook/opt-125m" and config.schemes == ["W3A16"]


def test_the_whole_path_on_a_stand_in(tmp_path: Path) -> None:
    """tiny-opt in the place of OPT-125M: everything is computed, and nothing is claimed."""
    arguments = [
        "run", "AffineQuant Table 1", "--model", "opt-125m", "--scheme", "W3A16", "--scheme", "FP16",
        "--method", "FP16", "--method", "RTN", "--method", "AffineQuant",
        "--model-path", f"facebook/opt-125m={ASSETS / 'tiny-opt'}", "--eval", "wikitext2=stdlib",
        "--calib-dataset", "stdlib", "--nsamples", "2", "--seqlen", "32", "--limit", "4", "--epochs", "1",
        "--device", "cpu", "-o", str(tmp_path / "out"), "--format", "json",
    ]  # fmt: skip
    first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    verdicts = json.loads(first.stdout)
    assert [(v["method"], v["status"]) for v in verdicts] == [
        (name, "not comparable") for name in ("FP16", "RTN", "AffineQuant")
    ]
    for v in verdicts:
        assert "is a stand-in for facebook/opt-125m" in v["reason"]
        assert float(v["here"]) > 1 and v["fp_here"] == verdicts[0]["here"] and v["low_95"] is not None
    assert "weights from" in verdicts[1]["remarks"] and "calibrated on stdlib" in verdicts[1]["remarks"]
    # Given again, nothing is computed: the rows are in the folder.
    again = invoke(*arguments)
    assert json.loads(again.stdout) == verdicts
    table = invoke(*[argument if argument != "json" else "table" for argument in arguments])
    assert "[1]" in table.stdout and "3 not comparable" in table.stderr
    # In a narrow terminal there are fewer columns, and still no number in two lines.
    given = [argument if argument != "json" else "table" for argument in arguments]
    narrow = invoke(*given, columns=60).stdout.splitlines()
    above = narrow[: next(i for i, line in enumerate(narrow) if line.startswith("[1]"))]
    assert max(map(len, above)) <= 60 and any(line.startswith("not shown at this width") for line in above)
    for v in verdicts:
        assert any(line.startswith(v["method"]) and f"{v['here']:.2f}" in line.split() for line in above)
