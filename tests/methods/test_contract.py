"""Facts true of every registered method, one test for each; a new method is covered by its line in the registry.

The facts themselves are those of `qbench check`. The second half tests the tests: plugins with one seeded fault
each, which the check must catch, and by the right fact.
"""

from __future__ import annotations

import functools

import pytest
from click.testing import CliRunner

from qbench.cli import main
from qbench.errors import ConfigError
from qbench.methods import METHODS
from qbench.methods.conformance import Fact, check

OPTIONS = "options are a frozen, documented model"
REFUSES = "unsupported schemes are refused early"
IDENTITY = "16 bits is the identity"
GRID = "weights lie on their grid"
DETERMINISTIC = "same seed, same codes"
LANES = "lanes do not influence each other"
RESUME = "a resumed run is the same run"
UNTOUCHED = "the model is left as it was"
FUNCTION = "transforms preserve the function"
ERROR = "error is not above RTN's"
COMPOSITIONS = ["smoothquant+gptq", "omniquant+gptq", "affinequant+gptq", "awq+gptq"]
FACTS = [OPTIONS, REFUSES, IDENTITY, GRID, DETERMINISTIC, LANES, RESUME, UNTOUCHED, FUNCTION, ERROR]


@functools.cache
def facts_of(method: str) -> dict[str, Fact]:
    return {fact.fact: fact for fact in check(method)}


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("method", [*METHODS.names(), *COMPOSITIONS])
def test_holds(method: str, fact: str) -> None:
    found = facts_of(method)[fact]
    assert found.passed, found.detail


@pytest.mark.parametrize("method", METHODS.names())
def test_the_list_above_is_complete(method: str) -> None:
    assert list(facts_of(method)) == FACTS


def test_the_check_saw_transforms_of_every_kind() -> None:
    assert facts_of("rtn")[FUNCTION].detail == "no transforms"
    for method in ("smoothquant", "omniquant", "affinequant"):
        assert int(facts_of(method)[FUNCTION].detail.split()[0]) >= 8  # 2 models, 2 schemes, 2 sites at least


FAULTS = [
    pytest.param("ForgetsInverse", {FUNCTION}, id="a transform without its inverse"),
    pytest.param("ChangesGroups", {GRID}, id="another group size than asked"),
    pytest.param("ExtraBit", {GRID}, id="a bit too many"),
    pytest.param("KeepsFloats", {GRID, DETERMINISTIC, LANES, RESUME, UNTOUCHED}, id="no integers"),
    pytest.param("Dice", {DETERMINISTIC, LANES, RESUME}, id="random rounding"),
    pytest.param("Scribbles", {LANES}, id="a changed view"),
    pytest.param("Remembers", {RESUME}, id="state between blocks"),
    pytest.param("Floors", {ERROR}, id="rounding down"),
    pytest.param("Undocumented", {OPTIONS}, id="an option without help"),
    pytest.param("Thawed", {OPTIONS}, id="options that can change"),
    pytest.param("Lenient", {REFUSES}, id="any group size accepted"),
]


@pytest.mark.parametrize(("plugin", "caught_by"), FAULTS)
def test_a_seeded_fault_is_caught_by_the_right_fact(monkeypatch, plugin: str, caught_by: set[str]) -> None:
    monkeypatch.setitem(METHODS.builtin, "broken", f"tests.methods.broken_methods:{plugin}")
    failed = {fact.fact: fact.detail for fact in check("broken") if not fact.passed}
    assert failed.keys() >= caught_by, failed
    # beside it only what follows from the fault: a wrong function or scale also has a larger error
    assert failed.keys() <= caught_by | {ERROR}, failed


def test_a_rounding_rule_without_a_fault_passes_every_fact(monkeypatch) -> None:
    monkeypatch.setitem(METHODS.builtin, "broken", "tests.methods.broken_methods:Broken")
    assert not [fact for fact in check("broken") if not fact.passed]


def test_a_plugin_that_crashes_fails_its_facts_and_not_the_check(monkeypatch) -> None:
    monkeypatch.setitem(METHODS.builtin, "broken", "tests.methods.broken_methods:Crashes")
    facts = {fact.fact: fact for fact in check("broken")}
    assert list(facts) == FACTS
    assert facts[OPTIONS].passed and facts[REFUSES].passed
    assert not facts[GRID].passed and "ZeroDivisionError: a bug of the plugin" in facts[GRID].detail


def test_an_unknown_method_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'smoothquant'"):
        check("smothquant")


@pytest.mark.parametrize(("plugin", "status"), [("Broken", 0), ("ExtraBit", 1)], ids=["sound", "broken"])
def test_the_command_line_prints_every_fact(monkeypatch, plugin: str, status: int) -> None:
    monkeypatch.setitem(METHODS.builtin, "broken", f"tests.methods.broken_methods:{plugin}")
    result = CliRunner().invoke(main, ["check", "broken"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status
    assert all(fact in result.stdout for fact in FACTS)
    assert ("FAIL" in result.stdout) == bool(status)
