import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_results import make_result, make_run

from qbench.results import ResultStore


@pytest.fixture
def folder(tmp_path: Path) -> str:
    store = ResultStore(tmp_path / "store")
    for result in make_run():
        store.save(result)
    return str(store.folder)


def test_prints_the_table_of_a_folder(qbench_cli, folder: str) -> None:
    result = qbench_cli("compare", folder)
    assert result.exit_code == 0 and result.stderr == ""
    assert "28.23 ±4.59 *" in result.stdout and "÷ FP" in result.stdout


def test_several_folders_and_another_baseline(qbench_cli, folder: str, tmp_path: Path) -> None:
    ResultStore(tmp_path / "more").save(make_result("gptq", "W4A4"))
    result = qbench_cli("compare", folder, str(tmp_path / "more"), "--baseline", "rtn")
    assert "gptq" in result.stdout and "÷ rtn" in result.stdout


def test_mixed_protocols_need_permission(qbench_cli, folder: str) -> None:
    ResultStore(folder).save(make_result("gptq", contract="e" * 64, contract_fields={"wikitext2": "other"}))
    refused = qbench_cli("compare", folder)
    assert refused.exit_code == 2 and refused.stdout == ""
    assert "wikitext2 (abcd / other)" in refused.stderr and "--allow-mixed" in refused.stderr
    assert "eeeeeeee" in qbench_cli("compare", folder, "--allow-mixed").stdout


def test_a_damaged_record_is_named(qbench_cli, folder: str) -> None:
    path = next(Path(folder).glob("*.json"))
    path.write_text(path.read_text()[:100])
    result = qbench_cli("compare", folder)
    assert result.exit_code == 2 and path.name in result.stderr and "Traceback" not in result.stderr


def without_torch(*arguments: str) -> subprocess.CompletedProcess:
    """The command line where torch and transformers cannot be imported."""
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from qbench.cli import main; main(sys.argv[1:])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env)


def test_works_on_a_machine_without_torch(folder: str) -> None:
    done = without_torch("compare", folder)
    assert done.returncode == 0 and "affinequant" in done.stdout, done.stderr


def test_two_rows_are_compared_in_pairs(qbench_cli, folder: str) -> None:
    result = qbench_cli("compare", "--in", folder, "rtn@W4A4", "affinequant@w4a4")
    assert result.exit_code == 0 and result.stderr == ""
    assert "A  rtn W4A4" in result.stdout and "B  affinequant W4A4" in result.stdout
    assert "B is better." in result.stdout and "÷ FP" not in result.stdout
    short = qbench_cli("compare", f"{folder}:rtn@W4A4", f"{folder}:affinequant@W4A4")
    assert short.stdout == result.stdout


def test_a_method_alone_is_compared_at_every_scheme(qbench_cli, folder: str) -> None:
    text = qbench_cli("compare", "--in", folder, "omniquant", "affinequant").stdout
    for scheme in ("W4A4", "W3A16"):
        assert text.count(f"A  omniquant {scheme}") == text.count(f"B  affinequant {scheme}") == 1


def test_records_and_ids_name_rows(qbench_cli, folder: str) -> None:
    rows = {(row.method, row.scheme): row for row in ResultStore(folder).load_all()}
    rtn, affine = rows["rtn", "W4A4"], rows["affinequant", "W4A4"]
    file = next(str(path) for path in Path(folder).glob(f"*{affine.id[:12]}.json"))
    text = qbench_cli("compare", "--in", folder, rtn.id[:8], file).stdout
    assert f"id {rtn.id[:8]}" in text and "B  affinequant W4A4" in text


def test_two_folders_give_the_table_and_the_pairs(qbench_cli, folder: str, tmp_path: Path) -> None:
    for row in make_run():
        ResultStore(tmp_path / "more").save(row.model_copy(update={"id": row.id[::-1]}))
    text = qbench_cli("compare", folder, str(tmp_path / "more")).stdout
    assert "÷ FP" in text and "row by row" in text and text.count("A ÷ B") == 8
    rows = qbench_cli("compare", folder, str(tmp_path / "more"), "--format", "json")
    assert isinstance(json.loads(rows.stdout), list)


def test_pairs_for_programs(qbench_cli, folder: str) -> None:
    found = qbench_cli("compare", "--in", folder, "rtn@W4A4", "affinequant@W4A4", "--format", "json")
    assert json.loads(found.stdout)[0]["metrics"]["wikitext2/perplexity"]["better"] == "b"
    refused = qbench_cli("compare", "--in", folder, "rtn@W4A4", "affinequant@W4A4", "--format", "latex")
    assert refused.exit_code == 2 and "table, json, csv" in refused.stderr


def test_full_precision_can_be_one_of_two(qbench_cli, folder: str) -> None:
    text = qbench_cli("compare", "--in", folder, "full-precision", "rtn@W4A4").stdout
    assert "A is better." in text and "B: one calibration seed." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rtnn@W4A4", "rtn@W4A4"), "Did you mean 'rtn@W4A4'"),
        (("rtn@W9A9", "rtn@W4A4"), "no row"),
        (("rtn@W4A4", "no/such/folder"), "no row"),
    ],
    ids=["misspelt", "no such scheme", "no such folder"],
)
def test_a_row_that_is_not_there_is_named_with_what_is(
    qbench_cli, folder: str, arguments, message: str
) -> None:
    result = qbench_cli("compare", "--in", folder, *arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_without_a_place_to_look_a_row_up_it_says_so(qbench_cli) -> None:
    result = qbench_cli("compare", "rtn", "gptq")
    assert result.exit_code == 2 and "no folder 'results' to look up a row in" in result.stderr


def test_rows_that_do_not_pair_are_refused(qbench_cli, folder: str) -> None:
    result = qbench_cli("compare", folder, f"{folder}:rtn@W4A4")
    assert result.exit_code == 2 and "Name one row on either side" in result.stderr


def test_pairs_work_on_a_machine_without_torch(folder: str) -> None:
    done = without_torch("compare", "--in", folder, "rtn@W4A4", "affinequant@W4A4")
    assert done.returncode == 0 and "B is better." in done.stdout, done.stderr
