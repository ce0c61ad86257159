"""Ablations: switches read off an option model, designs with their textbook properties, effects of known size."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import ClassVar, Literal
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, Field

from qbench import sweep as sweeps
from qbench.ablation import REFERENCE, Variant, analyse, as_svg, cells, foldover, switches, variants
from qbench.cli import main
from qbench.config import MethodRequest, RunConfig
from qbench.errors import ConfigError, NumericalError
from qbench.methods import METHODS
from qbench.results import Result
from tests.fake_results import make_result, perplexity
from tests.test_runner import SEQ_LEN, Setting
from tests.test_sweep import Here


class Options(BaseModel):
    """A method's options, of every kind."""

    name: ClassVar[str] = "own"
    lwc: bool = True
    matrix: bool | None = None
    form: Literal["legal", "published", "other"] = "legal"
    alpha: float = Field(0.5, json_schema_extra={"alternatives": [0.25, 0.5]})
    rate: float = 1e-3
    label: str = "x"


SVG = "{http://www.w3.org/2000/svg}"
RESOLVED = Options(matrix=False)


class Dependent(BaseModel):
    """One switch that has nothing to do without another."""

    let: bool = True
    shift: bool = Field(True, json_schema_extra={"acts_with": "let"})
    lwc: bool = True


class Chain(Dependent):
    """One more, that acts with the one that acts with another."""

    mask: bool = Field(True, json_schema_extra={"acts_with": "shift"})


def test_switches_are_read_off_the_options() -> None:
    found = switches(RESOLVED)
    assert [switch.name for switch in found] == [
        "lwc=false", "matrix=true", "form=published", "form=other", "alpha=0.25",
    ]  # fmt: skip
    assert [switch.component for switch in found] == [True, True, False, False, False]
    assert [switch.name for switch in switches(RESOLVED, ["form", "lwc"])] == [
        "lwc=false",
        "form=published",
        "form=other",
    ]


def test_what_is_no_switch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Option rate is no switch.*Switches: lwc, matrix, form, alpha"):
        switches(RESOLVED, ["rate"])
    with pytest.raises(ConfigError, match=r"Unknown switch 'alhpa'. Did you mean 'alpha'"):
        switches(RESOLVED, ["alhpa"])


@pytest.mark.parametrize("name", ["omniquant", "affinequant"])
def test_every_learned_method_has_switches(name: str) -> None:
    method = METHODS.load(name)
    options = {switch.option for switch in switches(method())}
    assert {"lwc", "let", "shift", "aug_loss"} <= options
    for switch in switches(method()):  # each other value is one that the method takes
        method(**{switch.option: switch.other})


def test_leave_one_out_changes_one_thing_at_a_time() -> None:
    made = variants(switches(RESOLVED), "leave-one-out", samples=[8])
    assert [v.name for v in made] == [
        REFERENCE, "lwc=false", "matrix=true", "form=published", "form=other", "alpha=0.25", "n_samples=8",
    ]  # fmt: skip
    assert all(len(v.options) == (v.n_samples is None) for v in made[1:]) and made[0].options == {}


def test_one_at_a_time_begins_with_everything_off() -> None:
    options = Options(matrix=True)
    made = variants(switches(options), "one-at-a-time")
    assert [v.options for v in made] == [
        {"lwc": False, "matrix": False},
        {"lwc": True, "matrix": False},
        {"lwc": False, "matrix": True},
    ]
    assert {v.against for v in made} == {REFERENCE}
    with pytest.raises(ConfigError, match="nothing to turn on"):
        variants(switches(Options(lwc=False, matrix=False)), "one-at-a-time")
    with pytest.raises(ConfigError, match="samples is for leave-one-out"):
        variants(switches(options), "factorial", samples=[4])
    with pytest.raises(ConfigError, match="no switch"):
        variants([], "factorial")


def test_what_acts_with_another_is_turned_on_beside_it_and_compared_with_it() -> None:
    found = switches(Dependent())
    runs = variants(found, "one-at-a-time")
    off = {"let": False, "shift": False, "lwc": False}
    assert [(v.name, v.options, v.against) for v in runs] == [
        (REFERENCE, off, REFERENCE),
        ("let=true", off | {"let": True}, REFERENCE),
        ("shift=true", off | {"let": True, "shift": True}, "let=true"),
        ("lwc=true", off | {"lwc": True}, REFERENCE),
    ]
    truth = {REFERENCE: 0.0, "let=true": -0.3, "shift=true": -0.2, "lwc=true": -0.1}
    rows = {(name, 0): row(name, nats) for name, nats in truth.items()}
    result = analyse("own", "W4A4", "one-at-a-time", found, runs, rows, [0])
    assert [e.nats for e in result.effects] == pytest.approx([-0.3, 0.1, -0.1])
    assert result.base == "every yes/no switch off: let, shift, lwc; for shift=true: let=true"
    del rows["let=true", 0]
    left = analyse("own", "W4A4", "one-at-a-time", found, runs, rows, [0], {"let=true": "nan"})
    assert [e.switch for e in left.effects] == ["lwc=true"]
    chain = Chain()
    assert variants(switches(chain), "one-at-a-time")[-1] == Variant(
        "mask=true",
        {"let": True, "shift": True, "lwc": False, "mask": True},
        ("mask=true",),
        against="shift=true",
    )
    # without the other being on, there is nothing to be beside: it stands alone
    alone = variants(switches(Dependent(), ["shift"]), "one-at-a-time")
    assert [(v.options, v.against) for v in alone[1:]] == [({"shift": True}, REFERENCE)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 11, 15])
def test_a_foldover_is_of_resolution_four(n: int) -> None:
    """Balanced; main effects uncorrelated with each other and with every product of two; by plain sums."""
    design = foldover(n)
    assert design[0] == [1] * n
    assert len(design) == 2 ** (math.ceil(math.log2(n + 1)) + 1)
    columns = list(zip(*design, strict=True))
    assert all(sum(column) == 0 for column in columns)
    for a, b in itertools.combinations(columns, 2):
        assert sum(x * y for x, y in zip(a, b, strict=True)) == 0
    for a in columns:
        for b, c in itertools.combinations(columns, 2):
            assert sum(x * y * z for x, y, z in zip(a, b, c, strict=True)) == 0


# ------------------------------------------------------------------------- effects of known size

TEXT = 3 + 0.3 * np.sin(np.arange(64) * 1.7)


def row(name: str, nats: float, noise: float = 0.0, seed: int = 0, **changes: object) -> Result:
    """A row whose windows lose `nats` more than the text's own loss."""
    rng = np.random.default_rng([seed, *name.encode()])
    losses = TEXT + nats + noise * rng.normal(size=len(TEXT))
    fields = {"options": {"name": name, "seed": seed}, "codes": f"{name}{seed}"} | changes
    return make_result("own", metrics={"wikitext2/perplexity": perplexity(losses.tolist())}, **fields)


def effects_of(design: str, found, runs, rows, seeds=(0,), failed=None) -> dict:
    result = analyse("own", "W4A4", design, found, runs, rows, seeds, failed)
    assert json.loads(json.dumps(result.as_json()))["effects"]
    return {effect.switch: effect for effect in result.effects}


def test_effects_of_a_leave_one_out() -> None:
    found = switches(RESOLVED)
    runs = variants(found, "leave-one-out")
    truth = {
        REFERENCE: 0.0,
        "lwc=false": 0.1,
        "matrix=true": -0.05,
        "form=published": 0.001,
        "form=other": 0.0,
    }
    rows = {(name, 0): row(name, nats, noise=0.02) for name, nats in truth.items()}
    rows["form=other", 0] = rows[REFERENCE, 0]
    found_effects = effects_of("leave-one-out", found, runs, rows, failed={"alpha=0.25": "block 0: nan"})
    assert {name: effect.verdict for name, effect in found_effects.items()} == {
        "lwc=false": "hurts",
        "matrix=true": "helps",
        "form=published": "undecided",
        "form=other": "nothing changes",
    }
    for name, effect in found_effects.items():
        assert effect.nats == pytest.approx(truth[name], abs=0.015)
        mean = math.fsum(rows[name, 0].metrics["wikitext2/perplexity"].items) / 64
        assert effect.perplexity == pytest.approx(math.exp(mean)) and effect.seed_std is None
    assert 0.002 < found_effects["lwc=false"].half_width < 0.02


def test_a_reference_that_broke_down_leaves_nothing_to_say() -> None:
    found = switches(RESOLVED)
    runs = variants(found, "leave-one-out")
    with pytest.raises(NumericalError, match="reference"):
        effects_of("leave-one-out", found, runs, {("lwc=false", 0): row("a", 0.0)})


def test_main_effects_of_a_factorial_are_found_under_interactions() -> None:
    """loss = 0.10·a − 0.04·b + 0.03·a·b: the interaction must not leak into any main effect."""
    found = [s for s in switches(RESOLVED) if s.option in ("lwc", "matrix", "alpha")]
    runs = variants(found, "factorial")
    assert len(runs) == 8 and runs[0].name == REFERENCE
    rows = {}
    for run in runs:
        a, b = (1.0 if name in run.changed else -1.0 for name in ("lwc=false", "matrix=true"))
        rows[run.name, 0] = row(run.name, 0.10 * a - 0.04 * b + 0.03 * a * b, noise=0.004)
    effects = effects_of("factorial", found, runs, rows)
    assert effects["lwc=false"].nats == pytest.approx(0.20, abs=0.004)
    assert effects["matrix=true"].nats == pytest.approx(-0.08, abs=0.004)
    assert effects["alpha=0.25"].nats == pytest.approx(0.0, abs=0.004)
    assert [e.verdict for e in effects.values()] == ["hurts", "helps", "undecided"]
    del rows[runs[3].name, 0]
    with pytest.raises(NumericalError, match="the effects cannot be told without"):
        effects_of("factorial", found, runs, rows)


def test_seeds_are_averaged_and_their_spread_told() -> None:
    found = switches(RESOLVED, ["lwc"])
    runs = variants(found, "leave-one-out")
    rows = {(REFERENCE, seed): row("r", 0.0, seed=seed) for seed in (2, 3)}
    rows |= {("lwc=false", 2): row("l", 0.1, seed=2), ("lwc=false", 3): row("l", 0.2, seed=3)}
    effect = effects_of("leave-one-out", found, runs, rows, seeds=(2, 3))["lwc=false"]
    assert effect.nats == pytest.approx(0.15) and effect.seed_std == pytest.approx(0.1 / math.sqrt(2))
    # Two seeds, no spread over windows: the interval is Student's with one degree of freedom.
    assert effect.half_width == pytest.approx(12.7062 * 0.1 / math.sqrt(2) / math.sqrt(2), rel=1e-4)
    assert effect.verdict == "undecided"


def test_the_plot_shows_every_effect_and_keeps_a_far_one_at_its_edge() -> None:
    found = switches(RESOLVED)
    runs = variants(found, "leave-one-out")
    sizes = {
        REFERENCE: 0.0,
        "lwc=false": 6.0,
        "matrix=true": -0.05,
        "form=published": 0.06,
        "form=other": 0.01,
    }
    rows = {(name, 0): row(name, nats, noise=0.02) for name, nats in sizes.items()}
    drawn = as_svg(analyse("own", "W4A4", "leave-one-out", found, runs, rows, [0], {"alpha=0.25": "nan"}))
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    centres = {mark[0].text.split(":")[0]: float(mark[-1].get("cx")) for mark in root.iter(f"{SVG}g")}
    assert list(centres) == ["lwc=false", "form=published", "form=other", "matrix=true"]  # worst on top
    zero = float(re.search(r'class="zero" d="M([\d.]+)', drawn)[1])
    assert centres["matrix=true"] < zero < centres["form=published"] < centres["lwc=false"] <= 640
    assert centres["form=published"] - zero == pytest.approx(zero - centres["matrix=true"], rel=0.35)
    assert "lwc=false (+4.0" in drawn and "form=published (" not in drawn


def test_costs_are_differences() -> None:
    found = switches(RESOLVED, ["lwc"])
    runs = variants(found, "leave-one-out")
    reference, changed = row("r", 0.0), row("l", 0.1, bits_per_weight=5.13)
    changed = changed.model_copy(update={"cost": changed.cost.model_copy(update={"seconds": 20.0})})
    effect = effects_of("leave-one-out", found, runs, {(REFERENCE, 0): reference, ("lwc=false", 0): changed})[
        "lwc=false"
    ]
    assert (effect.seconds, effect.bits_per_weight, effect.row) == (7.5, pytest.approx(1.0), changed.id)


def test_cells_carry_the_users_options_and_the_change() -> None:
    config = RunConfig.model_validate({"methods": ["rtn"], "calibration": {"n_samples": 4}})
    runs = [
        Variant(REFERENCE, {}, ()),
        Variant("let=false", {"let": False}, ("let=false",)),
        Variant("n", {}, ("n",), 2),
    ]
    made = cells(config, MethodRequest(name="omniquant", options={"epochs": 3}), "W4A4", runs, [5, 6])
    assert made["let=false", 6].config.methods[0].options == {"epochs": 3, "let": False}
    assert (
        made["let=false", 6].config.calibration.seed == 6 and made["n", 5].config.calibration.n_samples == 2
    )
    assert made["n", 5].label == "omniquant W4A4 n seed=5" and len({c.key for c in made.values()}) == 6


def test_the_command_line(tmp_path, build_tiny, monkeypatch) -> None:
    here = Setting(tmp_path, build_tiny)
    executors: list[Here] = []
    monkeypatch.setattr(
        sweeps, "make_executor", lambda config, cells: executors.append(Here()) or executors[-1]
    )
    arguments = ["ablate", "--model", here.model, "--method", "omniquant", "--scheme", "W4A4", "--epochs", 1]
    arguments += ["--switch", "let", "--switch", "lwc", "--samples", 2, "--calib-dataset", here.calibration]
    arguments += [
        "--eval",
        f"own={here.evaluation}",
        "--nsamples",
        3,
        "--seqlen",
        SEQ_LEN,
        "--output",
        here.output,
    ]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "### omniquant W4A4, leave-one-out" in result.stdout
    for name in ("lwc=false", "let=false", "n_samples=2"):
        assert f"| {name} |" in result.stdout
    assert [len(job.cells) for job in executors[0].started] == [3, 1]  # fewer windows are another pass
    stored = json.loads((here.output / "ablations" / "omniquant-W4A4-leave-one-out.json").read_text())
    assert [effect["switch"] for effect in stored["effects"]] == ["lwc=false", "let=false", "n_samples=2"]
    ElementTree.fromstring((here.output / "ablations" / "omniquant-W4A4-leave-one-out.svg").read_bytes())
    broken = [*arguments, "--no-let", "--let-lr", "1e30", "--epochs", 2]  # what turns it on breaks down
    failed = CliRunner().invoke(main, list(map(str, broken)))
    assert (
        failed.exit_code == 3 and "| let=true | — | | failed: omniquant W4A4 let=true, block" in failed.stdout
    )
    assert "Error: 1 of 4 cells failed. omniquant W4A4 let=true, block" in failed.stderr
    assert CliRunner().invoke(main, [*map(str, arguments), "--samples", "0"]).exit_code == 2
