import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest

from qbench.errors import ConfigError
from qbench.registry import Registry

BUILTIN = {"sqrt": "math:sqrt", "scheme": "qbench.scheme:Scheme", "broken": "qbench.no_such_module:thing"}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package for real: a module and its metadata on sys.path, found by importlib.metadata."""

    def make(package: str, points: dict[str, str], source: str = "THING = 'plugged in'") -> None:
        (tmp_path / f"{package}.py").write_text(source)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {target}" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[test.things]\n{lines}\n")
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield make
    for name in [name for name in sys.modules if (tmp_path / f"{name}.py").exists()]:
        del sys.modules[name]


def things() -> Registry:
    return Registry("thing", BUILTIN, group="test.things")


def test_loads_what_the_name_stands_for() -> None:
    from qbench.scheme import Scheme

    assert things().load("scheme") is Scheme
    assert things().load("sqrt")(9) == 3


def test_listing_imports_nothing(install) -> None:
    install("heavy_plugin", {"heavy": "heavy_plugin:THING"}, "raise RuntimeError('imported')")
    assert things().names() == ["sqrt", "scheme", "broken", "heavy"]
    assert "heavy_plugin" not in sys.modules


def test_an_unknown_name_suggests_and_lists() -> None:
    with pytest.raises(
        ConfigError, match=r"Unknown thing 'schem'. Did you mean 'scheme'\?.*broken, scheme, sqrt"
    ):
        things().load("schem")


def test_plugins_load_and_say_where_they_are_from(install) -> None:
    install("nice_plugin", {"nice": "nice_plugin:THING"})
    assert things().load("nice") == "plugged in"
    assert things().origin("nice") == "nice_plugin"
    assert things().origin("sqrt") == "built in"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_dependency", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("OTHER = 1", "AttributeError"),
    ],
    ids=["missing dependency", "raises", "lacks the object"],
)
def test_a_plugin_that_cannot_be_imported_is_named(install, source: str, reason: str) -> None:
    install("bad_plugin", {"bad": "bad_plugin:THING"}, source)
    with pytest.raises(ConfigError, match=f"'bad' of package bad_plugin .*{reason}"):
        things().load("bad")
    assert things().load("sqrt")(4) == 2


def test_a_builtin_that_cannot_be_imported_keeps_its_traceback() -> None:
    with pytest.raises(ModuleNotFoundError):
        things().load("broken")


def test_a_name_claimed_twice_is_refused_not_chosen(install) -> None:
    install("greedy_plugin", {"sqrt": "greedy_plugin:THING"})
    with pytest.raises(ConfigError, match=r"'sqrt' is claimed more than once \(built in, greedy_plugin\)"):
        things().load("sqrt")
    assert things().names().count("sqrt") == 1


def test_own_metadata_that_repeats_a_builtin_line_is_no_conflict(install) -> None:
    install("same_again", {"sqrt": "math:sqrt"})
    assert things().load("sqrt")(9) == 3


def test_one_distribution_seen_twice_is_no_conflict(
    install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("nice_plugin", {"nice": "nice_plugin:THING"})
    points = list(importlib.metadata.entry_points(group="test.things"))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points * 2)
    assert things().load("nice") == "plugged in"


def test_without_a_group_installed_packages_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**_: object) -> None:
        raise AssertionError("entry points were read")

    monkeypatch.setattr(importlib.metadata, "entry_points", never)
    assert Registry("thing", BUILTIN).names() == list(BUILTIN)
