"""Sections, averages, recovery and the Pareto front."""

from __future__ import annotations

import math

import pytest
from fake_results import (
    accuracy,
    baseline,
    contracted,
    make_result,
    make_run,
    perplexity,
    seeds,
    window_losses,
)

from qbench.errors import ConfigError, DataError
from qbench.reports.leaderboard import Entry, sections
from qbench.reports.measured import AVERAGE


def by_name(entries: tuple[Entry, ...]) -> dict[tuple[str, str], Entry]:
    return {(entry.row.label, entry.result.scheme): entry for entry in entries}


def test_rows_of_different_contracts_and_models_never_share_a_section() -> None:
    other = [row.model_copy(update={"contract": "e" * 64, "id": row.id[::-1]}) for row in make_run()]
    elsewhere = [row.model_copy(update={"model": "opt", "id": "z" + row.id}) for row in make_run()]
    found = sections([*make_run(), *other, *elsewhere])
    assert [(s.model, s.contract[:1], len(s.entries)) for s in found] == [
        ("ref-llama-14m", "3", 9),
        ("ref-llama-14m", "e", 9),
        ("opt", "3", 9),
    ]


def test_no_rows_and_an_unknown_baseline_are_refused() -> None:
    with pytest.raises(DataError):
        sections([])
    with pytest.raises(ConfigError, match="gptq"):
        sections(make_run(), "gptq")


def test_rows_that_differ_only_in_what_else_was_measured_share_a_section() -> None:
    more = {"wikitext2": {"protocol": "p", "tokens": "w"}, "c4": {"protocol": "q", "tokens": "c"}}
    rows = [contracted(baseline()), contracted(make_result("rtn")), contracted(make_result("gptq"), more)]
    (section,) = sections(rows)
    assert len(section.entries) == 3 and not section.table.mixed
    other = contracted(make_result("awq"), n_samples=8)
    assert [len(s.entries) for s in sections([*rows, other])] == [3, 1]


def test_calibration_seeds_are_one_row() -> None:
    (section,) = sections([baseline(), *seeds("omniquant", [0.10, 0.11, 0.12]), *seeds("rtn", [0.5])])
    assert [(e.row.label, len(e.row.results)) for e in section.entries] == [
        ("full-precision", 1),
        ("omniquant", 3),
        ("rtn", 1),
    ]


def test_recovery_is_the_inverse_ratio_of_perplexities() -> None:
    entries = by_name(sections(make_run())[0].entries)
    row, full = entries["rtn", "W4A4"], entries["full-precision", "W16A16"]
    values = [e.result.metrics["wikitext2/perplexity"].value for e in (full, row)]
    assert row.quality is not None and row.quality.recovery == pytest.approx(values[0] / values[1])


@pytest.mark.parametrize(
    ("keys", "quality"),
    [
        (["w/perplexity", "piqa/acc", "boolq/acc"], AVERAGE),
        (["piqa/acc", "w/perplexity"], "w/perplexity"),
        (["piqa/acc", "piqa/acc_norm"], "piqa/acc"),
        ([], None),
    ],
    ids=["average", "perplexity", "one_task", "nothing"],
)
def test_what_rows_are_ordered_by(keys: list[str], quality: str | None) -> None:
    made = {k: perplexity(window_losses(1)) if "perplexity" in k else accuracy(1, 0.7, k) for k in keys}
    assert sections([make_result("rtn", metrics=made)])[0].quality_key == quality


def place(name: str, extra: float, bits: float, scheme: str = "W4A16", seed: int = 1) -> dict:
    return {"method": name, "scheme": scheme, "extra": extra, "bits_per_weight": bits, "seed": seed}


@pytest.mark.parametrize(
    ("rows", "dominated"),
    [
        ([place("a", 0.1, 4.0), place("b", 0.2, 4.0)], {"b"}),
        ([place("a", 0.1, 4.0), place("b", 0.2, 3.0)], set()),
        ([place("a", 0.1, 4.0), place("b", 0.1, 3.0)], {"a"}),
        # Same bits, and the data cannot tell them apart: neither is dominated.
        ([place("a", 0.1000, 4.0, seed=1), place("b", 0.1003, 4.0, seed=2)], set()),
        # Quantized activations are worth something that bits per weight do not show.
        ([place("a", 0.1, 4.0), place("b", 0.3, 4.0, "W4A4")], set()),
        ([place("a", 0.1, 4.0, "W4A4"), place("b", 0.3, 4.0)], {"b"}),
        ([place("a", 0.1, 4.0, "W4A8KV4"), place("b", 0.2, 4.0, "W4A8")], {"b"}),
        ([place("a", 0.1, 4.0, "W4A16KV4"), place("b", 0.3, 4.0, "W4A4")], set()),
    ],
    ids=[
        "worse",
        "smaller",
        "bigger",
        "tied",
        "weight_only",
        "quantized_inputs_and_better",
        "cache",
        "inputs",
    ],
)
def test_pareto_front(rows: list[dict], dominated: set[str]) -> None:
    section = sections([baseline(), *(make_result(**row) for row in rows)])[0]
    found = {e.result.method: e.place for e in section.entries}
    assert found.pop("full-precision") is None
    assert {name for name, kind in found.items() if kind == "dominated"} == dominated


def test_the_front_agrees_with_a_naive_search_where_nothing_is_noisy() -> None:
    rows = []
    for i in range(30):
        extra, bits = (7 * i % 30) / 20, 2 + (11 * i % 13) / 4
        metric = perplexity([3 + extra] * 8)
        rows.append(make_result(f"m{i}", metrics={"w/perplexity": metric}, bits_per_weight=bits))
    section = sections(rows)[0]
    points = {r.method: (r.metrics["w/perplexity"].value, r.bits_per_weight) for r in rows}
    for entry in section.entries:
        q, b = points[entry.result.method]
        beaten = any(x <= q and y <= b and (x, y) != (q, b) for x, y in points.values())
        assert (entry.place == "dominated") == beaten, entry.result.method


def test_a_collapsed_row_is_dominated_and_one_without_a_size_has_no_place() -> None:
    broken = perplexity([3.0] * 64, value=math.inf, items=[800.0] * 64)
    rows = [
        make_result("rtn", metrics={"wikitext2/perplexity": broken}),
        make_result("omniquant"),
        make_result("gptq", bits_per_weight=None),
    ]
    found = {e.result.method: e.place for e in sections(rows)[0].entries}
    assert found == {"omniquant": "front", "rtn": "dominated", "gptq": None}


def test_entries_are_scheme_by_scheme_the_best_first() -> None:
    section = sections(make_run())[0]
    names = [(e.result.scheme, e.result.method) for e in section.entries]
    order = ["affinequant", "omniquant", "smoothquant", "rtn"]
    assert names[1:] == [(scheme, name) for scheme in ("W4A4", "W3A16") for name in order]


def test_the_front_uses_the_average_of_tasks_and_its_noise() -> None:
    def tasks(seed: int, chance: float) -> dict:
        return {f"t{i}/acc": accuracy(seed * 10 + i, chance, f"t{i}") for i in range(3)}

    rows = [
        make_result("good", metrics=tasks(1, 0.70)),
        make_result("alike", metrics=tasks(2, 0.69)),
        make_result("bad", metrics=tasks(3, 0.30)),
    ]
    found = {e.result.method: e.place for e in sections(rows)[0].entries}
    assert found == {"good": "front", "alike": "front", "bad": "dominated"}


def test_ratios_are_within_a_section_only() -> None:
    """A store without full precision has no recovery, even beside one that has it."""
    alone = make_result(
        "rtn", contract="e" * 64, metrics={"wikitext2/perplexity": perplexity(window_losses(1))}
    )
    found = sections([baseline(), make_result("rtn"), alone])
    assert found[0].entries[1].quality.ratio is not None  # type: ignore[union-attr]
    assert found[1].entries[0].quality.ratio is None  # type: ignore[union-attr]
