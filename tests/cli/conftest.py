"""The real command line in process, with methods and a runner that cost nothing."""

import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # fake_methods, fake_results

import qbench  # noqa: E402  after the path
from qbench.config import RunConfig  # noqa: E402
from qbench.registry import Registry  # noqa: E402


class Recorder:
    """Stands for `qbench.runner`: remembers what it was asked and returns plausible rows."""

    def __init__(self) -> None:
        self.config: RunConfig | None = None
        self.error: BaseException | None = None

    def run(self, config: RunConfig, listener: object = None) -> list:
        from fake_results import make_run

        assert listener is not None
        self.config = config
        listener.stage("load", config.model)
        if self.error is not None:
            raise self.error
        return make_run()


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    module = types.ModuleType("qbench.runner")
    module.run = recorder.run
    monkeypatch.setitem(sys.modules, "qbench.runner", module)
    monkeypatch.setattr(qbench, "runner", module, raising=False)
    return recorder


@pytest.fixture
def fake_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """`affinequant` and `omniquant` with some of their options, `rtn` with none."""
    names = {"rtn": "RTN", "omniquant": "Omni", "affinequant": "Affine"}
    registry = Registry("method", {name: f"fake_methods:{target}" for name, target in names.items()})
    monkeypatch.setattr("qbench.methods.METHODS", registry)


@pytest.fixture
def qbench_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`qbench_cli("run", "--model", "x")` in an empty folder, 100 columns wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def invoke(*arguments: str) -> Result:
        from qbench.cli import main

        return CliRunner().invoke(main, list(arguments))

    return invoke
