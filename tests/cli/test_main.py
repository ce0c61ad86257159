"""The frame around all commands: start-up, help, errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qbench.cli import COMMANDS, SUMMARIES
from qbench.errors import DataError, NumericalError

REPO = Path(__file__).parents[2]
HEAVY = "torch", "transformers", "datasets", "lm_eval", "scipy", "pandas", "matplotlib", "numpy"


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(REPO), **environment}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env)


def imported_by(*arguments: str) -> set[str]:
    """Heavy modules that a command line imports."""
    code = (
        "import sys\nfrom qbench.cli import main\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit as e: assert not e.code, e.code\n"
        f"print('IMPORTED', *[m for m in {(*HEAVY, 'pydantic', 'rich', 'yaml')!r} if m in sys.modules])"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("IMPORTED")[2].split())


def test_help_imports_nothing_heavy() -> None:
    assert imported_by("--help") == set()
    assert imported_by("--version") == set()


@pytest.mark.parametrize("command", COMMANDS.names())
def test_the_help_of_every_command_works_without_torch(command: str) -> None:
    assert imported_by(command, "--help").isdisjoint(HEAVY)


def test_python_dash_m_works() -> None:
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-m", "qbench", "--version"], capture_output=True, text=True, env=env
    )
    assert done.stdout.startswith("qbench, version")


def test_every_command_has_a_summary_and_a_help(qbench_cli) -> None:
    assert set(SUMMARIES) == set(COMMANDS.names())
    listing = qbench_cli("--help").stdout
    for name, summary in SUMMARIES.items():
        assert name in listing and summary in " ".join(listing.split())
        result = qbench_cli(name, "--help")
        assert result.exit_code == 0 and f" {name} " in result.stdout


def test_without_arguments_it_prints_help(qbench_cli) -> None:
    assert qbench_cli().stdout == qbench_cli("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], r"Error: Unknown command 'rum'. Did you mean 'run'?"),
        (["run", "--modl", "x"], "Error: No such option '--modl'."),
        (["run", "--nsamples", "many"], "Error: Invalid value for '--nsamples'"),
        (["run", "--format", "html"], "Error: Invalid value for '--format'"),
        (["compare"], "Error: Missing argument 'DIR|FILE|ROW...'."),
        (["compare", "nowhere"], "Error: There is no results folder 'nowhere', no such file"),
        (["export", "results"], "Error: Missing option '--format'. Choose from: gptq, compressed-tensors, awq"),
        (["run", "--config", ""], "Error: The argument after --config is empty. Write its value, or leave it out."),
        (["export", "results", "--format", "gptq", "-o", ""], "Error: The argument after -o is empty."),
        (["eval"], "Error: No model to measure: give a folder, a hub name or an embedded model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence_on_stderr_and_exit_2(
    qbench_cli, arguments: list[str], message: str
) -> None:
    result = qbench_cli(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stdout == "" and result.stderr.count("\n") == 1


@pytest.mark.parametrize("debug", [["run", "--debug"], ["--debug", "run"]], ids=["after", "before"])
def test_debug_shows_the_traceback_wherever_it_stands(
    qbench_cli, runner, fake_methods, debug: list[str]
) -> None:
    runner.error = NumericalError("Block 3 diverged.")
    quiet = qbench_cli("run")
    assert quiet.exit_code == 3
    assert quiet.stderr.splitlines()[-1] == "Error: Block 3 diverged." and "Traceback" not in quiet.stderr
    loud = qbench_cli(*debug)
    assert loud.exit_code == 3 and "Traceback" in loud.stderr and "Error: Block 3 diverged." in loud.stderr


def test_exit_codes_follow_the_error(qbench_cli, runner, fake_methods) -> None:
    runner.error = DataError("No such file.")
    assert qbench_cli("run").exit_code == 2


def test_a_bug_keeps_its_traceback(qbench_cli, runner, fake_methods) -> None:
    runner.error = KeyError("a bug")
    result = qbench_cli("run")
    assert result.exit_code == 1 and isinstance(result.exception, KeyError)


def test_an_interrupt_says_how_to_go_on(qbench_cli, runner, fake_methods) -> None:
    runner.error = KeyboardInterrupt()
    result = qbench_cli("run")
    assert result.exit_code == 130 and "continues after the last finished block" in result.stderr


def test_a_terminal_without_the_signs_does_not_crash(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from fake_results import make_run\n"
        "from qbench.results import ResultStore; [ResultStore(sys.argv[2]).save(r) for r in make_run()]\n"
        "from qbench.cli import main; main(['compare', sys.argv[2]])"
    )
    done = python(code, str(REPO / "tests"), str(tmp_path), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "25.17 ?4.15" in done.stdout


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = f"{sys.executable} -m qbench run --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stderr and "Usage" in done.stdout


def test_the_package_exports_lazily() -> None:
    done = python(
        "import sys, qbench; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert str(qbench.Scheme.parse('w4a4')) == 'W4A4' and qbench.RunConfig and qbench.Result and qbench.compare\n"
        "assert 'torch' not in sys.modules and {'run', 'compare'} <= set(dir(qbench))\n"
        "try: qbench.nothing\nexcept AttributeError as e: print(e)"
    )
    assert done.stdout == "module 'qbench' has no attribute 'nothing'\n", done.stderr
