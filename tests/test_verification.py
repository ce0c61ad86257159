"""A stored row is made again and compared: what stands, what does not, and what cannot be found."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from click.testing import CliRunner

from qbench.cli import main
from qbench.errors import ConfigError, DataError
from qbench.results import Result, ResultStore
from qbench.verification import compare_rows, find_row, request_of, verify
from tests.fake_results import make_result, perplexity, window_losses
from tests.test_runner import TRAINED, Setting


@pytest.fixture
def here(tmp_path, build_tiny) -> Setting:
    return Setting(tmp_path, build_tiny)


def test_a_row_stands_on_the_machine_that_made_it(here) -> None:
    baseline, row = here.run(methods=TRAINED[2:3], schemes=["W4A4"])
    for stored in (baseline, row):
        verdict = verify(stored)
        assert verdict.agrees and not verdict.contract and not verdict.environment
        assert verdict.again.id == stored.id and verdict.codes is (None if stored is baseline else True)
        assert {check.verdict for check in verdict.metrics} == {"identical"}
    assert len(ResultStore(here.output).load_all()) == 2  # nothing was written


def test_a_row_of_several_methods_and_seeds_is_made_alone(here) -> None:
    rows = here.run(methods=TRAINED[:2], schemes=["W4A4", "W3A16"], seeds=2)
    verdict = verify(rows[-1])
    assert verdict.agrees and verdict.codes and verdict.again.calibration["seed"] == 3


def test_a_record_that_was_changed_does_not_stand(here) -> None:
    row = here.run(schemes=["W4A4"])[1]
    metric = row.metrics["own/perplexity"]
    better = [item - 0.05 for item in metric.items]
    forged = metric.model_copy(update={"items": better, "value": math.exp(math.fsum(better) / len(better))})
    verdict = verify(row.model_copy(update={"metrics": {"own/perplexity": forged}, "codes": "0" * 64}))
    assert not verdict.agrees and verdict.codes is False and verdict.metrics[0].verdict == "differs"
    assert verdict.metrics[0].difference == pytest.approx(0.05)


def test_another_model_in_the_same_place_is_another_contract(here) -> None:
    row = here.run()[1]
    shutil.rmtree(here.model)
    here.save("llama", seed=1)
    verdict = verify(row)
    assert not verdict.agrees and list(verdict.contract) == ["model"] and not verdict.codes


def test_options_that_mean_something_else_now_are_another_row() -> None:
    """A parameter file is what its content is, not where it lies; an option of later code is no change."""
    then = make_result("own", options={"parameters": f"a/p.pth#{'0' * 16}", "epochs": 20})
    moved = make_result("own", options={"parameters": f"b/p.pth#{'0' * 16}", "epochs": 20, "new": 1})
    other = make_result("own", options={"parameters": f"a/p.pth#{'1' * 16}", "epochs": 40})
    assert compare_rows(then, moved).agrees and not compare_rows(then, moved).options
    verdict = compare_rows(then, other)
    assert not verdict.agrees and list(verdict.options) == ["parameters", "epochs"]
    assert verdict.as_json()["options"]["epochs"] == [20, 40]


def test_inputs_may_lie_elsewhere(here) -> None:
    row = here.run()[1]
    moved = here.folder / "moved"
    here.model.rename(moved)
    texts = {}
    for name in ("calibration", "evaluation"):
        texts[name] = getattr(here, name).rename(here.folder / f"{name}-moved.txt")
    with pytest.raises(ConfigError, match="No model"):
        verify(row)
    overrides = {"model": str(moved), "calibration.dataset": str(texts["calibration"])}
    verdict = verify(row, overrides | {"evals.datasets": [f"own={texts['evaluation']}"]})
    assert verdict.codes and [check.verdict for check in verdict.metrics] == ["identical"]


@pytest.mark.parametrize(
    ("shift", "noise", "verdict"),
    [(0.0, 0.0, "identical"), (1e-6, 0.0, "agrees"), (0.0, 0.05, "agrees"), (0.02, 0.001, "differs")],
    ids=["equal", "rounding", "noise", "shift"],
)
def test_verdicts(shift: float, noise: float, verdict: str) -> None:
    losses = window_losses(seed=1)
    changed = [x + shift + noise * (-1) ** i for i, x in enumerate(losses)]
    rows = [make_result(metrics={"w/perplexity": perplexity(items)}) for items in (losses, changed)]
    (check,) = compare_rows(*rows).metrics
    assert check.verdict == verdict
    missing = compare_rows(rows[0], make_result(metrics={}))
    assert missing.metrics[0].verdict == "differs" and missing.metrics[0].now is None


def test_a_row_is_found_by_file_or_by_the_beginning_of_its_id(here) -> None:
    row = here.run()[1]
    (file,) = [path for path in here.records() if "rtn" in path.name]
    assert (
        find_row(str(file), "nowhere")
        == row
        == find_row(row.id, here.output)
        == find_row(row.id[:9], here.output)
    )
    for wrong in ("ffffffffffff", "no such row", ""):
        with pytest.raises(DataError, match="No row"):
            find_row(wrong, here.output)
    here.evaluation.write_text("{}")
    with pytest.raises(DataError, match="not a readable"):
        find_row(str(here.evaluation), here.output)


def test_a_record_without_its_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no request"):
        request_of(make_result(), {})


def test_a_record_of_an_earlier_version_that_lists_all_methods(here) -> None:
    row = here.run(methods=["rtn", "smoothquant"])[2]
    config = {**row.config, "methods": [{"name": "rtn"}, {"name": "smoothquant"}], "output": "elsewhere"}
    request = request_of(row.model_copy(update={"config": config}), {})
    assert [m.name for m in request.methods] == ["smoothquant"] and request.methods[0].options == row.options
    assert request.output == "results"


def test_the_command_line(here) -> None:
    row: Result = here.run()[1]

    def ask(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
        return result.exit_code, result.stdout

    code, shown = ask(row.id[:12], "--store", here.output)
    assert (
        code == 0
        and "contract: the same\nintegers: all equal\n" in shown
        and shown.endswith("The row stands.\n")
    )
    code, shown = ask(row.id, "--store", here.output, "--calib-dataset", here.evaluation, "--format", "json")
    verdict = json.loads(shown)
    assert code == 1 and not verdict["agrees"] and "calibration.text" in verdict["contract"]
