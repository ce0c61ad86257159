import sys
import types

import pytest

from qbench.cli.catalogue import type_name
from qbench.registry import Registry


@pytest.mark.usefixtures("fake_methods")
def test_methods_lists_names_summaries_and_papers(qbench_cli) -> None:
    text = qbench_cli("methods").stdout
    assert text.index("rtn") < text.index("omniquant") < text.index("affinequant")
    assert "Learn clipping and diagonals." in text and "https://arxiv.org/abs/2308.13137" in text
    assert "Details that a list does not show" not in text


@pytest.mark.usefixtures("fake_methods")
def test_one_method_shows_every_option_and_preset(qbench_cli) -> None:
    text = qbench_cli("methods", "omniquant").stdout
    assert "let  bool, default true" in text and "Learn the transformation." in text
    assert "epochs  int, default by preset" in text and "parameters  str, default none" in text
    assert "sites  [str, …], default [attn_in, mlp_in]" in text
    assert "query_key  legal | published, default legal" in text
    assert "W4A4: let, lwc, 20 epochs" in text
    assert "--set let=VALUE" in text
    assert "No options." in qbench_cli("methods", "rtn").stdout


@pytest.mark.usefixtures("fake_methods")
def test_an_unknown_method_gets_a_suggestion(qbench_cli) -> None:
    result = qbench_cli("methods", "omnquant")
    assert result.exit_code == 2 and "Did you mean 'omniquant'" in result.stderr


def test_a_broken_plugin_does_not_hide_the_others(qbench_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("method", {"rtn": "fake_methods:RTN"}, group="test.none")
    point = types.SimpleNamespace(
        name="bad", value="no_such_plugin:X", dist=types.SimpleNamespace(name="badpkg")
    )
    point.load = lambda: __import__("no_such_plugin")
    registry.__dict__["_plugins"] = {"bad": [point]}
    monkeypatch.setattr("qbench.methods.METHODS", registry)
    result = qbench_cli("methods")
    assert result.exit_code == 0
    assert "Round to nearest." in result.stdout and "badpkg cannot be imported" in " ".join(
        result.stdout.split()
    )


def test_models_lists_architectures_and_embedded_models(
    qbench_cli, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    module = types.ModuleType("fake_architectures")
    module.OPT = types.SimpleNamespace(model_types=("opt", "opt2"), summary="OPT, pre-norm.")
    monkeypatch.setitem(sys.modules, "fake_architectures", module)
    monkeypatch.setattr(
        "qbench.models.ARCHITECTURES", Registry("architecture", {"opt": "fake_architectures:OPT"})
    )
    (tmp_path / "tiny-opt").mkdir()
    (tmp_path / "tiny-opt" / "config.json").write_text("{}")
    (tmp_path / "tiny-opt" / "model.safetensors").write_bytes(b"x" * 1_500_000)
    monkeypatch.setattr("qbench.cli.catalogue.ASSETS", tmp_path)
    text = qbench_cli("models").stdout
    assert "opt  model type opt, opt2" in text and "OPT, pre-norm." in text and "tiny-opt  1.5 MB" in text


@pytest.mark.parametrize("broken", [False, True], ids=["all hold", "one broken"])
@pytest.mark.usefixtures("fake_methods")
def test_check_prints_each_fact_and_exits_1_if_one_fails(
    qbench_cli, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    def check(name: str) -> list[tuple[str, bool, str]]:
        assert name == "rtn"
        return [
            ("16 bits is the identity", True, ""),
            ("same seed, same bits", not broken, "12 codes differ"),
        ]

    module = types.ModuleType("qbench.methods.conformance")
    module.check = check
    monkeypatch.setitem(sys.modules, "qbench.methods.conformance", module)
    result = qbench_cli("check", "rtn")
    assert result.exit_code == broken
    assert "pass  16 bits is the identity\n" in result.stdout
    assert ("FAIL  same seed, same bits: 12 codes differ" in result.stdout) == broken
    assert f"{2 - broken} of 2 hold for rtn." in result.stdout


@pytest.mark.usefixtures("fake_methods")
def test_check_refuses_an_unknown_method(qbench_cli) -> None:
    assert qbench_cli("check", "rnt").exit_code == 2


def test_types_as_a_user_writes_them() -> None:
    from typing import Literal, Optional

    assert type_name(int) == "int"
    assert type_name(float | None) == "float"
    assert type_name(Optional[bool]) == "bool"  # noqa: UP045  the older spelling is the case
    assert type_name(Literal["a", "b"] | None) == "a | b"
    assert type_name(tuple[str, ...]) == "[str, …]"
    assert type_name(tuple[Literal["a", "b"], ...]) == "[a | b, …]"
