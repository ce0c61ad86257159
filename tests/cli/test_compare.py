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


def test_works_on_a_machine_without_torch(folder: str) -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from qbench.cli import main; main(['compare', sys.argv[1]])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "affinequant" in done.stdout, done.stderr
