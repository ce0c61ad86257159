"""The published cells as they are shipped, how they are found, and the recipe that stands behind each."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from qbench.config import RunConfig
from qbench.errors import ConfigError
from qbench.methods import METHODS
from qbench.reports.published import HUB_NAMES, cells, find, full_precision, tables
from qbench.reports.recipes import PUBLISHED_FORM, recipe
from qbench.results import BASELINE
from qbench.scheme import Scheme


def test_every_cell_is_shipped_once_and_can_be_read() -> None:
    assert len(cells()) == 794
    keys = [(c.name, c.model, c.method, c.scheme, c.dataset, c.metric) for c in cells()]
    assert [key for key, n in Counter(keys).items() if n > 1] == []
    for cell in cells():
        assert (cell.value > 0 or cell.printed == "nan") and cell.metric in ("ppl", "acc") and cell.hub_name
        Scheme.parse(recipe(cell).scheme)


def test_the_shipped_file_is_the_collected_one(shared: Path) -> None:
    original = shared / "published/published.csv"
    if not original.is_file():
        pytest.skip("REFERENCE DATA ABSENT: no published/published.csv")
    rows = [tuple(row.values()) for row in csv.DictReader(original.read_text().splitlines())]
    ours = [(c.source, c.table, c.model, c.method, c.scheme, c.dataset, c.metric, c.printed) for c in cells()]
    assert ours == rows


@pytest.mark.parametrize(("printed", "half"), [("30.56", 0.005), ("7.4", 0.05), ("1.2e3", 50), ("64", 0.5)])
def test_rounding_is_half_of_the_last_printed_digit(printed: str, half: float) -> None:
    from dataclasses import replace

    assert replace(cells()[0], printed=printed).rounding == pytest.approx(half)


def test_known_numbers_are_found_by_name() -> None:
    """Read off the papers: AffineQuant Table 1 (OPT-125M W3A16) and OmniQuant's LLaMA-7B W4A4 zero-shot average."""
    (cell,) = find(
        "affinequant table 1", models=["facebook/opt-125m"], methods=["affinequant"], schemes=["w3a16"]
    )
    assert cell.value == 30.56 and cell.name == "AffineQuant Table 1"
    (same,) = find("AffineQuant Table 1", models=["opt-125m"], methods=["AffineQuant"], schemes=["W3A16"])
    assert same is cell
    assert {c.dataset for c in find("OmniQuant weight-activation", models=["llama-7b"])} >= {"piqa", "avg"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"table": "AffineQuant Table 9"}, "AffineQuant Table 1"),
        ({"table": "AffineQuant"}, "several"),
        ({"models": ["opt-175b"]}, "opt-30b"),
        ({"table": "AffineQuant Table 1", "models": ["llama-7b"]}, "No published cell"),
    ],
    ids=["unknown_table", "ambiguous", "unknown_model", "nothing_left"],
)
def test_what_is_not_there_is_said_with_what_is(arguments: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        find(**arguments)


def test_full_precision_is_taken_from_the_same_table_first() -> None:
    for cell in cells():
        other = full_precision(cell)
        if other is not None:
            assert (other.model, other.dataset, other.metric) == (cell.model, cell.dataset, cell.metric)
    (cell,) = find("AffineQuant Table 1", models=["opt-6.7b"], methods=["RTN"], schemes=["W4A16"])
    reference = full_precision(cell)
    assert reference is not None and (reference.name, reference.value) == ("AffineQuant Table 1", 10.86)
    # ABQ-LLM's Table 2 has no full-precision row: its Table 4 has.
    abq = full_precision(find("ABQ-LLM Table 2", models=["llama-7b"], datasets=["c4"])[0])
    assert abq is not None and abq.source == "ABQ-LLM (README)"


def test_published_forms_are_the_methods_own() -> None:
    for name in METHODS.names():
        if name in PUBLISHED_FORM:
            assert dict(METHODS.load(name).published_form) == PUBLISHED_FORM[name]
        else:
            assert not dict(METHODS.load(name).published_form), (
                f"{name} has a published form that recipes lack"
            )


def test_every_recipe_is_a_request_that_its_method_understands() -> None:
    for cell in cells():
        of = recipe(cell)
        if of.method in (None, BASELINE) or of.method not in METHODS.names():
            continue
        METHODS.load(of.method).model_validate(of.options)
        RunConfig(model=of.model, calibration=of.calibration)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (("AffineQuant Table 3", "llama-7b", "AffineQuant", "W4A4"), {}),
        (("AffineQuant Table 3", "llama-30b", "AffineQuant", "W4A4"), {"alpha": 0.75}),
        (
            ("AffineQuant Table 3", "llama-2-7b", "OmniQuant", "W4A4"),
            {"aug_loss": False, "let_lr": 1e-3, "alpha": 0.75},
        ),
        (("ABQ-LLM Table 4", "llama-2-7b", "AffineQuant", "W3A16"), {}),
        (("ABQ-LLM Table 4", "llama-2-13b", "AffineQuant", "W3A16"), {"use_ln_matrix": False, "sf": 1.0}),
        (("ABQ-LLM Table 2", "llama-7b", "ABQ-LLM", "W2*A8"), {"bit_balance": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_single_models_have_the_settings_of_their_scripts(cell: tuple, options: dict) -> None:
    table, model, method, scheme = cell
    of = recipe(find(table, models=[model], methods=[method], schemes=[scheme])[0])
    assert of.options == PUBLISHED_FORM[of.method or ""] | options


def test_tables_and_models_are_all_named() -> None:
    assert list(tables(cells())) == [
        "AffineQuant Table 1",
        "AffineQuant Table 2",
        "AffineQuant Table 3",
        "OmniQuant weight-only (LLaMA)",
        "OmniQuant weight-activation zero-shot",
        "ABQ-LLM Table 2",
        "ABQ-LLM Table 4",
        "FlatQuant main table",
    ]
    assert {cell.model for cell in cells()} == set(HUB_NAMES)
