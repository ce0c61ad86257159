"""Sections, averages, recovery and the Pareto front."""

from __future__ import annotations

import math

import pytest
from fake_results import accuracy, baseline, make_result, make_run, perplexity, window_losses

from qbench.errors import ConfigError, DataError
from qbench.reports.leaderboard import Entry, average_marks, sections


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


def test_recovery_is_the_inverse_ratio_of_perplexities() -> None:
    entries = by_name(sections(make_run())[0].entries)
    row = entries["rtn", "W4A4"]
    full = entries["full-precision", "W16A16"]
    values = [e.result.metrics["wikitext2/perplexity"].value for e in (full, row)]
    assert row.recovery == pytest.approx(values[0] / values[1])
    assert full.recovery is None and row.recovery_half_width is not None


def test_tasks_average_counts_each_task_once_and_prefers_acc() -> None:
    def metrics(chance: float) -> dict:
        return {
            "piqa/acc_norm": accuracy(1, 0.1, "piqa"),
            "piqa/acc": accuracy(2, chance, "piqa"),
            "hellaswag/acc_norm": accuracy(3, chance, "hellaswag"),
        }

    rows = [baseline(metrics=metrics(0.9)), make_result("rtn", metrics=metrics(0.6))]
    section = sections(rows)[0]
    assert section.task_keys == ("piqa/acc", "hellaswag/acc_norm")
    entry = by_name(section.entries)["rtn", "W4A4"]
    expected = [entry.result.metrics[key].value for key in section.task_keys]
    assert entry.tasks is not None and entry.tasks.value == pytest.approx(sum(expected) / 2)
    halves = [entry.row.scores[key].half_width or 0 for key in section.task_keys]
    assert entry.tasks.half_width == pytest.approx(math.hypot(*halves) / 2)


def test_a_row_without_one_of_the_tasks_has_no_average() -> None:
    both = {"piqa/acc": accuracy(1, 0.7, "p"), "boolq/acc": accuracy(2, 0.7, "b")}
    rows = [make_result("rtn", metrics=both), make_result("gptq", metrics={"piqa/acc": both["piqa/acc"]})]
    entries = by_name(sections(rows)[0].entries)
    assert entries["rtn", "W4A4"].tasks is not None
    assert entries["gptq", "W4A4"].tasks is None


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
    ],
    ids=["worse", "smaller", "bigger", "tied", "weight_only", "quantized_inputs_and_better", "cache"],
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


def test_average_marks_tie_what_the_items_cannot_tell_apart() -> None:
    def tasks(seed: int, chance: float) -> dict:
        return {f"t{i}/acc": accuracy(seed * 10 + i, chance, f"t{i}") for i in range(3)}

    rows = [
        make_result("good", metrics=tasks(1, 0.70)),
        make_result("alike", metrics=tasks(2, 0.69)),
        make_result("bad", metrics=tasks(3, 0.30)),
    ]
    section = sections(rows)[0]
    marks = average_marks(section.entries, section.task_keys)
    named = {e.result.method: marks.get(e.result.id) for e in section.entries}
    assert sorted(named[name] or "" for name in ("good", "alike")) == ["best", "tied"]
    assert named["bad"] is None


def test_ratios_are_within_a_section_only() -> None:
    """A store without full precision has no recovery, even beside one that has it."""
    alone = make_result(
        "rtn", contract="e" * 64, metrics={"wikitext2/perplexity": perplexity(window_losses(1))}
    )
    found = sections([baseline(), make_result("rtn"), alone])
    assert found[0].entries[1].recovery is not None
    assert found[1].entries[0].recovery is None
