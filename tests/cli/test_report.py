"""`qbench report`: the formats reach stdout or a file, errors are one sentence, and torch stays away."""

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
    for result in make_run(tasks=3):
        store.save(result)
    return str(store.folder)


@pytest.mark.parametrize(
    ("format_", "expected"),
    [
        ("table", "affinequant ●"),
        ("markdown", "**28.23** ±4.59"),
        ("latex", r"\textbf{28.23}"),
        ("csv", "pareto"),
        ("html", "<!doctype html>"),
    ],
)
def test_every_format_goes_to_stdout(qbench_cli, folder: str, format_: str, expected: str) -> None:
    result = qbench_cli("report", folder, "--format", format_)
    assert result.exit_code == 0 and expected in result.stdout, result.output


def test_into_a_file_with_its_size_on_stderr(qbench_cli, folder: str, tmp_path: Path) -> None:
    result = qbench_cli("report", folder, "--format", "html", "-o", str(tmp_path / "new/page.html"))
    assert result.exit_code == 0 and result.stdout == "" and "9 rows" in result.stderr
    assert (tmp_path / "new/page.html").read_text().startswith("<!doctype html>")


def test_layout_columns_and_metrics_are_passed_on(qbench_cli, folder: str) -> None:
    arguments = ("--layout", "paper", "--metric", "c4/perplexity", "--columns", "schemes", "--no-intervals")
    text = qbench_cli("report", folder, *arguments).stdout
    assert "c4 perplexity ↓" in text and "wikitext2" not in text and "±" not in text.partition("*")[0]


def test_rows_of_other_protocols_stand_apart_instead_of_being_refused(qbench_cli, folder: str) -> None:
    ResultStore(folder).save(make_result("gptq", contract="e" * 64, contract_fields={"wikitext2": "other"}))
    result = qbench_cli("report", folder, "--layout", "leaderboard")
    assert result.exit_code == 0
    assert "contract 3f9a1c77" in result.stdout and "contract eeeeeeee" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "nowhere"),
        (["{folder}", "--metric", "wikitext2/perplexty"], "wikitext2/perplexity"),
        (["{folder}", "--baseline", "affinquant"], "affinequant"),
        (["{folder}", "--format", "html", "-o", "{folder}"], "Cannot write"),
        (["empty", "--format", "html", "-o", "page.html"], "No records in 'empty'. Give the output folder"),
    ],
    ids=["no_folder", "metric", "baseline", "output", "no_records"],
)
def test_errors_are_one_sentence(qbench_cli, folder: str, arguments: list[str], expected: str) -> None:
    Path("empty").mkdir()
    result = qbench_cli("report", *(argument.format(folder=folder) for argument in arguments))
    assert result.exit_code == 2 and result.stdout == ""
    assert expected in result.stderr and "Traceback" not in result.stderr and not Path("page.html").exists()


def test_works_on_a_machine_without_torch(folder: str) -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from qbench.cli import main; main(['report', sys.argv[1], '--format', 'html'])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "affinequant" in done.stdout, done.stderr
