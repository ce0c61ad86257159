"""Verdicts on made-up measurements: what is noise, what is off, and what cannot be compared."""

from __future__ import annotations

import math

import pytest
from fake_results import baseline, make_result, perplexity

from qbench.reports.parity import Verdict, judge
from qbench.reports.published import Published, find
from qbench.results import Metric, Result


def cell(method: str = "AffineQuant", table: str = "AffineQuant Table 1", **picked: list) -> Published:
    picked = {"models": ["opt-125m"], "schemes": ["W3A16"]} | picked
    return find(table, methods=[method], **picked)[0]


FULL = find("AffineQuant Table 1", models=["opt-125m"], methods=["FP16"])[0]


def ppl(value: float, name: str = "wikitext2") -> dict[str, Metric]:
    return {f"{name}/perplexity": perplexity([math.log(value)] * 8)}


def accuracy(percent: float, key: str, n: int = 1000) -> dict[str, Metric]:
    items = [1.0] * round(n * percent / 100) + [0.0] * (n - round(n * percent / 100))
    metric = perplexity(
        items, value=sum(items) / n, items_name="correct", higher_is_better=True, protocol=key
    )
    return {key: metric}


def row(metrics: dict, seed: int = 0) -> Result:
    return make_result("affinequant", "W3A16", metrics=metrics, seed=seed)


def verdict(*values: float, full: float = 27.65, of: Published | None = None, **extra: object) -> Verdict:
    rows = [row(ppl(value), i) for i, value in enumerate(values)]
    return judge(of or cell(), rows, baseline(metrics=ppl(full)), **extra)  # type: ignore[arg-type]


def test_the_published_number_itself_is_reproduced() -> None:
    found = verdict(30.56)
    assert found.status == "reproduced" and found.said == "reproduced within noise"
    assert found.relative == pytest.approx(0, abs=1e-9) and "reruns" in found.reason


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (30.60, "reproduced"),
        (30.85, "reproduced"),
        (31.0, "off"),
        (30.1, "off"),
        (29.0, "off"),
        (40.0, "off"),
    ],
)
def test_one_run_is_held_against_what_reruns_differ_by(value: float, status: str) -> None:
    """1.1% for weight-only: 30.56 · 1.011 = 30.90 and 30.56 / 1.011 = 30.23."""
    assert verdict(value).status == status


def test_quantized_activations_are_noisier() -> None:
    of = cell(
        "AffineQuant", "AffineQuant Table 3", models=["llama-7b"], schemes=["W4A4"], datasets=["wikitext2"]
    )
    full = find("AffineQuant Table 3", models=["llama-7b"], methods=["FP16"], datasets=["wikitext2"])[0].value
    assert verdict(of.value * 1.025, full=full, of=of).status == "reproduced"
    assert verdict(of.value * 1.035, full=full, of=of).status == "off"


def test_off_by_says_how_much_with_an_interval_around_it() -> None:
    found = verdict(33.0)
    assert found.relative == pytest.approx(33.0 / 30.56 - 1)
    assert found.low is not None and found.high is not None and found.low < found.relative < found.high
    assert found.said.startswith("off by +8.0% [+6.")


def test_seeds_replace_the_borrowed_noise_by_a_measured_one() -> None:
    tight, wide = verdict(30.86, 30.87, 30.88), verdict(30.2, 31.2, 32.2)
    assert tight.status == "off" and wide.status == "reproduced" and "3 calibration seeds" in wide.reason
    # Independent: Student's t(2) at 97.5% is 4.3027.
    logs = [math.log(v) for v in (30.2, 31.2, 32.2)]
    mean = sum(logs) / 3
    spread = math.sqrt(sum((v - mean) ** 2 for v in logs) / 2)
    parts = (4.302653 * spread * math.sqrt(4 / 3), 0.005 / 30.56, 0.001)
    assert wide.high is not None and wide.relative is not None
    assert math.log((1 + wide.high) / (1 + wide.relative)) == pytest.approx(math.hypot(*parts), rel=1e-6)
    assert wide.value == pytest.approx(math.exp(mean))


def test_full_precision_that_differs_makes_everything_incomparable() -> None:
    found = verdict(30.56, full=28.4)
    assert found.status == "not comparable" and "full precision already differs, 28.4" in found.said
    assert found.value == pytest.approx(30.56), "computed all the same"
    assert verdict(30.56, full=27.70).status == "reproduced"


def test_without_a_full_precision_measurement_nothing_is_claimed() -> None:
    found = judge(cell(), [row(ppl(30.56))], None)
    assert found.status == "not comparable" and "not measured" in found.reason


def test_a_folder_is_a_stand_in_unless_full_precision_says_it_is_the_model() -> None:
    other = verdict(180.0, full=152.2, stand_in="some/folder")
    assert other.said == "not comparable: some/folder is a stand-in for facebook/opt-125m"
    assert other.value == pytest.approx(180.0) and other.relative is not None
    assert verdict(30.5, stand_in="some/folder").status == "reproduced"
    full = judge(FULL, [baseline(metrics=ppl(152.2))], baseline(metrics=ppl(152.2)), stand_in="some/folder")
    assert full.status == "not comparable" and "stand-in" in full.reason


def test_full_precision_is_a_cell_of_its_own() -> None:
    same, other = (judge(FULL, [baseline(metrics=ppl(v))], baseline(metrics=ppl(v))) for v in (27.66, 28.4))
    assert same.status == "reproduced" and other.status == "off"
    assert judge(FULL, [], None).status == "not comparable"


def test_blockers_win_over_agreement() -> None:
    found = verdict(30.56, blockers=["cut short: 4 windows"])
    assert found.said == "not comparable: cut short: 4 windows" and found.relative == pytest.approx(
        0, abs=1e-9
    )


def test_a_missing_metric_and_a_collapsed_model() -> None:
    none = judge(cell(), [row({})], baseline(metrics=ppl(27.65)))
    assert none.status == "not comparable" and none.value is None
    metrics = {"wikitext2/perplexity": perplexity([1.0] * 2, value=math.inf, items=[800.0] * 2)}
    assert judge(cell(), [row(metrics)], baseline(metrics=ppl(27.65))).status == "off"


def test_a_cell_in_which_the_method_broke_down_has_nothing_to_compare_with() -> None:
    of = find("OmniQuant weight-only", models=["llama-2-70b"], methods=["GPTQ"], schemes=["W2A16g128"])[0]
    full = find("OmniQuant weight-only", models=["llama-2-70b"], methods=["FP16"])[0].value
    found = verdict(7.0, full=full, of=of)
    assert (
        found.status == "not comparable"
        and "broke down" in found.reason
        and found.value == pytest.approx(7.0)
    )


def test_the_full_precision_row_tells_which_c4_is_meant() -> None:
    of = cell("AffineQuant", "AffineQuant Table 3", models=["llama-7b"], schemes=["W4A4"], datasets=["c4"])
    reference = find("AffineQuant Table 3", models=["llama-7b"], methods=["FP16"], datasets=["c4"])[0].value
    full = {**ppl(reference * 1.03, "c4"), **ppl(reference, "c4_new")}
    ours = {**ppl(of.value, "c4"), **ppl(of.value * 1.2, "c4_new")}
    found = judge(of, [row(ours)], baseline(metrics=full))
    assert found.variant == "c4_new/perplexity" and found.status == "off"
    swapped = judge(
        of, [row(ours)], baseline(metrics={**ppl(reference, "c4"), **ppl(reference * 1.03, "c4_new")})
    )
    assert swapped.variant == "c4/perplexity" and swapped.status == "reproduced"
    neither = {**ppl(reference * 1.03, "c4"), **ppl(reference * 0.96, "c4_new")}
    assert judge(of, [row(ours)], baseline(metrics=neither)).status == "not comparable"


def test_accuracies_are_in_percent_and_their_variant_is_found_likewise() -> None:
    of = cell("AffineQuant", "AffineQuant Table 2", models=["llama-7b"], schemes=["W4A4"], datasets=["piqa"])
    reference = find("AffineQuant Table 2", models=["llama-7b"], methods=["FP16"], datasets=["piqa"])[0].value
    full = {**accuracy(reference - 2, "piqa/acc"), **accuracy(reference, "piqa/acc_norm")}
    ours = {**accuracy(of.value - 20, "piqa/acc"), **accuracy(of.value, "piqa/acc_norm")}
    found = judge(of, [row(ours)], baseline(metrics=full))
    assert found.variant == "piqa/acc_norm" and found.status == "reproduced"
    assert found.value == pytest.approx(of.value, abs=0.06)
    worse = {**ours, **accuracy(of.value - 8, "piqa/acc_norm")}
    assert judge(of, [row(worse)], baseline(metrics=full)).status == "off"


def test_the_average_needs_all_six_tasks() -> None:
    from qbench.reports.recipes import TASKS

    of = cell("AffineQuant", "AffineQuant Table 2", models=["llama-7b"], schemes=["W4A4"], datasets=["avg"])
    reference = find("AffineQuant Table 2", models=["llama-7b"], methods=["FP16"], datasets=["avg"])[0].value

    def six(value: float) -> dict:
        return {key: m for task in TASKS for key, m in accuracy(value, f"{task}/acc", 10_000).items()}

    found = judge(of, [row(six(of.value))], baseline(metrics=six(reference)))
    assert found.status == "reproduced" and found.value == pytest.approx(of.value, abs=0.01)
    five = {key: m for key, m in six(of.value).items() if key != "piqa/acc"}
    assert judge(of, [row(five)], baseline(metrics=six(reference))).status == "not comparable"
