"""The paired comparison of two rows, in words and for programs."""

import csv
import io
import json
import math

import numpy as np
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
from rich.cells import cell_len

from qbench.errors import ConfigError
from qbench.reports import pairs, stats
from qbench.reports.pairs import match, pair
from qbench.results import Metric, Result

KEY = "wikitext2/perplexity"


def text_of(*rows: Result, width: int = 100) -> str:
    return pairs.render([pair([rows[0]], [rows[1]])], "table", width)


def test_a_perplexity_is_compared_by_the_ratio_with_its_exact_interval() -> None:
    a, b = make_result("rtn", extra=0.3), make_result("gptq", extra=0.1, seed=2)
    found = pair([a], [b]).metrics[0]
    expected = stats.paired_difference(a.metrics[KEY].items, b.metrics[KEY].items)
    assert found.ratio == pytest.approx(
        tuple(math.exp(x) for x in (expected.mean, expected.low, expected.high))
    )
    assert found.ratio[0] == pytest.approx(a.metrics[KEY].value / b.metrics[KEY].value)
    assert (found.better, found.needed) == ("B", None)
    text = text_of(a, b)
    assert (
        f"A ÷ B {found.ratio[0]:.3f}, 95% interval {found.ratio[1]:.3f} to {found.ratio[2]:.3f}; p < 0.0001"
        in text
    )
    assert "B is better." in text and "wikitext2 ppl ↓, 64 windows" in text


def test_swapping_the_rows_swaps_the_verdict() -> None:
    a, b = make_result("rtn", extra=0.3), make_result("gptq", extra=0.1, seed=2)
    there, back = pair([a], [b]).metrics[0], pair([b], [a]).metrics[0]
    assert back.better == "A" and there.difference.mean == pytest.approx(-back.difference.mean)
    assert there.difference.p_value == pytest.approx(back.difference.p_value)


def test_what_cannot_be_told_apart_says_how_much_more_would() -> None:
    a = make_result("rtn", metrics={"piqa/acc": accuracy(1, 0.5, "p")})
    b = make_result("gptq", metrics={"piqa/acc": accuracy(2, 0.5, "p")})
    found = pair([a], [b]).metrics[0]
    assert found.better is None and found.unit == "questions"
    right = np.array([m.metrics["piqa/acc"].items for m in (a, b)])
    only_a, only_b = int((right[0] > right[1]).sum()), int((right[0] < right[1]).sum())
    power = stats.mcnemar_power(400 + found.needed.items, only_a / 400, only_b / 400)
    assert power == pytest.approx(0.8, abs=0.01)
    text = text_of(a, b)
    assert f"right in A alone {only_a}, in B alone {only_b} (exact McNemar test)" in text
    assert (
        "The data cannot tell them apart." in text and "more questions" in text and "with 80% power" in text
    )
    assert "one calibration seed" in text


def test_higher_accuracy_is_better() -> None:
    right = Metric(
        value=1.0, n=50, protocol="p", items=[1.0] * 50, items_name="correct", higher_is_better=True
    )
    wrong = right.model_copy(update={"value": 0.5, "items": [1.0] * 25 + [0.0] * 25})
    rows = (make_result("good", metrics={"x/acc": right}), make_result("bad", metrics={"x/acc": wrong}))
    assert pair([rows[0]], [rows[1]]).metrics[0].better == "A"


def test_seeds_say_which_source_dominates() -> None:
    a, b = seeds("rtn", [0.1, 0.2, 0.3]), seeds("gptq", [0.2, 0.4, 0.15])
    found = pair(a, b).metrics[0]
    assert found.difference.variance.seed_share > 0.9 and found.better is None
    assert found.needed.seeds is not None and found.needed.items is None
    text = pairs.render([pair(a, b)], "table", 100)
    assert "mean of 3 calibration seeds" in text and "calibration seeds dominate" in text
    assert "more seeds would, with 80% power" in " ".join(text.split()) and "one calibration seed" not in text


def test_a_row_with_one_seed_beside_one_with_several_admits_what_is_missing() -> None:
    text = pairs.render([pair(seeds("rtn", [0.1, 0.2]), [make_result("gptq")])], "table", 200)
    assert "one row has a single seed, its spread is missing" in text
    assert "B: one calibration seed." in text


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        (Metric(value=9.0, n=64, protocol="wikitext2 (1024, non-overlapping, test)"), "no values per item"),
        (perplexity(window_losses(n=32)), "not measured on the same items"),
        (perplexity(window_losses(), protocol="other"), "not measured on the same items"),
        (Metric(value=math.inf, n=64, protocol="wikitext2 (1024, non-overlapping, test)", items=[1000.0] * 64), None),
    ],
    ids=["no items", "fewer", "another protocol", "collapsed"],
)  # fmt: skip
def test_where_there_is_nothing_to_pair_it_says_why(metric: Metric, why: str | None) -> None:
    rows = make_result("rtn"), make_result("gptq", metrics={KEY: metric})
    found = pair([rows[0]], [rows[1]]).metrics[0]
    assert (found.why_not or "") == (why or "") or why in found.why_not
    text = text_of(*rows)
    assert "No interval" in text if why else "A is better" in text
    json.loads(pairs.render([pair([rows[0]], [rows[1]])], "json", 80))


def test_rows_of_two_contracts_are_refused_and_compared_on_request_where_the_windows_are_the_same() -> None:
    rows = contracted(make_result("rtn")), contracted(make_result("gptq", extra=0.4), n_samples=128)
    with pytest.raises(ConfigError, match=r"more than the method: in calibration\.n_samples \(64 / 128\)"):
        pair([rows[0]], [rows[1]])
    found = pair([rows[0]], [rows[1]], allow_mixed=True)
    assert found.metrics[0].better == "A"
    text = pairs.render([found], "table", 100)
    assert "Not the method alone differs: calibration.n_samples (64 / 128)." in text
    other = contracted(make_result("gptq"), {"wikitext2": {"protocol": "p", "tokens": "other"}})
    assert pair([rows[0]], [other], allow_mixed=True).metrics[0].why_not == "not measured on the same items"


def test_what_only_one_row_was_measured_on_is_named() -> None:
    more = make_result("gptq")
    more = more.model_copy(update={"metrics": {**more.metrics, "piqa/acc": accuracy(1, 0.5, "p")}})
    assert "Only B: piqa acc" in text_of(make_result("rtn"), more)


@pytest.mark.parametrize("width", [100, 80, 60, 40])
def test_every_width_is_kept(width: int) -> None:
    rows = make_run(("W4A4",), tasks=7)
    text = text_of(rows[3], rows[4], width=width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "average acc ↑, 1600 questions" in text


def test_rows_of_the_same_name_are_told_apart() -> None:
    one, other = (make_result("rtn", options={"alpha": alpha, "same": 1}) for alpha in (0.5, 0.75))
    assert pair([one], [other]).labels == ("rtn W4A4 alpha=0.5", "rtn W4A4 alpha=0.75")
    again = one.model_copy(update={"id": "f" * 64})
    assert pair([one], [again]).labels[1] == "rtn W4A4 #ffffff"


def test_which_rows_are_paired() -> None:
    run = make_run()
    alone = [make_result("gptq", "W4A4"), make_result("gptq", "W3A16")]
    assert [(a[0].method, b[0].scheme) for a, b in match(run[1:2], alone[1:])] == [("rtn", "W3A16")]
    both = match([row for row in run if row.method in ("rtn", "full-precision")], [baseline(), *alone])
    assert [(a[0].scheme, b[0].scheme) for a, b in both] == [("W4A4", "W4A4"), ("W3A16", "W3A16")]
    assert match(run, alone) == []  # four methods and one: which of them?
    again = [row.model_copy(update={"id": row.id[::-1]}) for row in run]
    assert [a[0].method for a, b in match(run, again)] == 2 * [
        "rtn",
        "smoothquant",
        "omniquant",
        "affinequant",
    ]
    assert match(seeds("rtn", [0.1, 0.2]), seeds("gptq", [0.1, 0.2]))[0][0][1].calibration["seed"] == 1


def test_programs_get_every_number() -> None:
    rows = make_run(("W4A4",), tasks=5)
    found = pair([rows[3]], [rows[4]])
    (read,) = json.loads(pairs.render([found], "json", 80))
    assert read["a"]["method"] == "omniquant" and read["b"]["ids"] == [rows[4].id]
    assert set(read["metrics"]) == {*rows[3].metrics, "average/acc"}
    metric = read["metrics"][KEY]
    assert metric["difference"] == found.metrics[0].difference.mean and metric["scale"] == "nats"
    assert metric["better"] == "b" and metric["p"] < 0.05 and metric["items_needed"] is None
    assert read["metrics"]["piqa/acc"]["items_needed"] > 0
    lines = list(csv.DictReader(io.StringIO(pairs.render([found], "csv", 80))))
    assert [line["metric"] for line in lines] == list(read["metrics"])
    assert float(lines[0]["low_95"]) == metric["low_95"] and lines[0]["row_b"] == "affinequant W4A4"
