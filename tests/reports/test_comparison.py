import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from fake_results import (
    CONTRACT,
    accuracy,
    baseline,
    contracted,
    make_result,
    make_run,
    perplexity,
    seeds,
    window_losses,
)
from scipy import stats as scipy_stats

from qbench.errors import ConfigError, DataError
from qbench.reports import stats
from qbench.reports.comparison import compare
from qbench.reports.measured import task_keys
from qbench.results import BASELINE, Metric, Result, ResultStore, TransformRecord

KEY = "wikitext2/perplexity"


def labels(comparison, block: int = 0) -> list[str]:
    return [row.label for row in comparison.tables[0].blocks[block].rows]


def marks(comparison, key: str = KEY, block: int = 0) -> dict[str, str | None]:
    return {
        row.label: row.scores[key].mark
        for row in comparison.tables[0].blocks[block].rows
        if key in row.scores
    }


def with_losses(method: str, losses: list[float], **changes) -> Result:
    return make_result(method, metrics={KEY: perplexity(losses)}, **changes)


def test_one_block_per_scheme_with_full_precision_first() -> None:
    rows = make_run(("W4A4", "W3A16"))
    random.Random(0).shuffle(rows)
    table = compare(rows).tables[0]
    assert {block.scheme for block in table.blocks} == {"W4A4", "W3A16"}
    for block in table.blocks:
        assert block.rows[0].result.is_baseline and block.rows[0].is_reference
        assert {row.result.scheme for row in block.rows[1:]} == {block.scheme}
        assert len(block.rows) == 5


def test_ratio_is_unrounded_and_its_interval_is_paired() -> None:
    fp, quantized = window_losses(0), window_losses(1, extra=0.1)
    comparison = compare([baseline(metrics={KEY: perplexity(fp)}), with_losses("rtn", quantized)])
    reference, row = (row.scores[KEY] for row in comparison.tables[0].blocks[0].rows)
    mean = sum(q - f for q, f in zip(quantized, fp, strict=True)) / len(fp)
    assert row.ratio == pytest.approx(math.exp(mean), rel=1e-12)
    assert row.ratio_half_width == pytest.approx(
        row.ratio * stats.paired_difference(quantized, fp).half_width, rel=1e-12
    )
    assert (reference.ratio, reference.ratio_half_width) == (1.0, None)
    assert row.half_width == pytest.approx(row.value * stats.mean_interval(quantized).half_width, rel=1e-12)
    assert row.ratio_half_width < row.half_width / 20


def test_a_metric_without_items_has_the_interval_of_its_standard_error_and_no_ties() -> None:
    metric = {KEY: Metric(value=10.0, stderr=1.0, n=64, protocol="p")}
    near = {KEY: Metric(value=10.1, stderr=1.0, n=64, protocol="p")}
    comparison = compare([baseline(), make_result("rtn", metrics=near), make_result("gptq", metrics=metric)])
    assert marks(comparison) == {"full-precision": None, "rtn": None, "gptq": "best"}
    row = comparison.tables[0].blocks[0].rows[1].scores[KEY]
    assert row.half_width == pytest.approx(1.96, abs=1e-4)
    assert row.ratio is not None and row.ratio_half_width is None


def test_best_and_tied_are_among_quantized_rows_only() -> None:
    text = window_losses(0)
    noise = [0.02 * ((i * 37) % 11 - 5) / 5 for i in range(64)]
    comparison = compare(
        [
            baseline(metrics={KEY: perplexity(text)}),
            with_losses("worse", [x + 0.3 for x in text]),
            with_losses("near", [x + 0.1001 + e for x, e in zip(text, noise, strict=True)]),
            with_losses("best", [x + 0.1 for x in text]),
        ]
    )
    assert marks(comparison) == {"full-precision": None, "worse": None, "near": "tied", "best": "best"}


def test_higher_is_better_where_the_metric_says_so() -> None:
    def accuracy(right: int) -> dict[str, Metric]:
        items = [1.0] * right + [0.0] * (100 - right)
        return {"piqa/acc": Metric(value=right / 100, n=100, protocol="p", items=items, items_name="correct",
                                   higher_is_better=True)}  # fmt: skip

    rows = [make_result("good", metrics=accuracy(90)), make_result("bad", metrics=accuracy(10))]
    assert marks(compare(rows), "piqa/acc") == {"good": "best", "bad": None}


def test_a_single_row_is_the_best_of_nothing() -> None:
    assert marks(compare([baseline(), make_result("rtn")])) == {"full-precision": None, "rtn": None}


def test_a_missing_metric_is_missing() -> None:
    comparison = compare([baseline(), make_result("rtn"), make_result("gptq", metrics={})])
    assert KEY not in comparison.tables[0].blocks[0].rows[2].scores


def test_a_collapsed_row_is_neither_best_nor_tied_nor_an_error() -> None:
    collapsed = {KEY: Metric(value=math.inf, n=64, protocol="p", items=[1000.0] * 64)}
    rows = [baseline(), make_result("rtn", metrics=collapsed), make_result("a"), make_result("b", extra=0.5)]
    assert marks(compare(rows)) == {"full-precision": None, "rtn": None, "a": "best", "b": None}


def test_rows_of_one_method_are_told_apart_by_the_options_that_differ() -> None:
    rows = [
        baseline(),
        make_result("affinequant", options={"sf": 0.1, "alpha": 0.5, "let": True}),
        make_result("affinequant", options={"sf": 1.0, "alpha": 0.5}),
        make_result("rtn", options={"alpha": 0.1}),
    ]
    assert labels(compare(rows)) == [
        "full-precision", "affinequant sf=0.1 let=true", "affinequant sf=1.0 let=default", "rtn"
    ]  # fmt: skip


def test_rows_that_nothing_tells_apart_carry_their_ids() -> None:
    rows = [baseline(), make_result(id="a" * 12), make_result(id="b" * 12)]
    assert labels(compare(rows)) == ["full-precision", "rtn #aaaaaa", "rtn #bbbbbb"]


def test_the_same_row_from_two_folders_is_one(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for result in make_run():
            ResultStore(tmp_path / folder).save(result)
    comparison = compare(tmp_path / "a", str(tmp_path / "b"), ResultStore(tmp_path / "a"))
    assert len(comparison.results) == len(make_run())


def test_models_are_separate_tables() -> None:
    other = {"model": "tiny-opt", "contract": "f" * 64}
    comparison = compare([baseline(), make_result("rtn"), baseline(**other), make_result("rtn", **other)])
    assert [table.model for table in comparison.tables] == ["ref-llama-14m", "tiny-opt"]
    assert all(len(table.blocks[0].rows) == 2 for table in comparison.tables)


def test_different_contracts_are_refused_and_the_difference_named() -> None:
    fields = {"calibration": {"n_samples": 128, "seq_len": 1024}, "wikitext2": "abcd"}
    rows = [baseline(), make_result("rtn"), make_result("gptq", contract="e" * 64, contract_fields=fields)]
    with pytest.raises(
        ConfigError, match=r"2 different protocols.*calibration\.n_samples \(64 / 128\)\."
    ) as caught:
        compare(rows)
    assert "seq_len" not in str(caught.value) and "--allow-mixed" in str(caught.value)


def test_a_model_that_changed_under_the_same_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model_fingerprint \(feedfeedfeed… / beefbeefbeef…\)"):
        compare([baseline(), make_result("rtn", model_fingerprint="beef" * 16)])


def test_mixed_rows_are_ranked_on_request_without_statistics_across_contracts() -> None:
    other = {"contract": "e" * 64, "contract_fields": {"wikitext2": "efgh"}}
    losses = window_losses(1, extra=0.1)
    near = [loss + 0.01 * (-1) ** i + 1e-4 for i, loss in enumerate(losses)]
    assert set(marks(compare([with_losses("rtn", losses), with_losses("gptq", near)])).values()) == {
        "best",
        "tied",
    }
    rows = [baseline(), with_losses("rtn", losses), with_losses("gptq", near, **other)]
    comparison = compare(rows, allow_mixed=True)
    assert comparison.tables[0].contracts == (CONTRACT, "e" * 64)
    rtn, gptq = comparison.tables[0].blocks[0].rows[1:]
    assert rtn.scores[KEY].ratio is not None
    assert gptq.scores[KEY].ratio is None  # there is no full-precision row of its protocol
    assert set(marks(comparison).values()) == {None, "best"}  # "tied" would need the same windows


WIKI = {"wikitext2": {"protocol": "p", "tokens": "w"}}


def test_seeds_of_one_draw_are_one_row_with_the_mean_of_their_losses() -> None:
    rows = [contracted(r, seed=i) for i, r in enumerate(seeds("rtn", [0.1, 0.2, 0.4]))]
    table = compare([contracted(baseline()), *rows, contracted(make_result("gptq", extra=0.6))]).tables[0]
    row = table.blocks[0].rows[1]
    assert [r.calibration["seed"] for r in row.results] == [0, 1, 2] and row.label == "rtn"
    score, values = row.scores[KEY], [r.metrics[KEY].value for r in rows]
    assert score.value == pytest.approx(math.prod(values) ** (1 / 3), rel=1e-12)
    assert score.seed_spread == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert (score.n_seeds, score.mark, row.seconds) == (3, "best", 12.5)
    one = compare([contracted(baseline()), rows[1]]).tables[0].blocks[0].rows[1].scores[KEY]
    assert score.ratio_half_width > 5 * one.ratio_half_width  # what one seed cannot know of


def test_two_seeds_and_the_same_again_are_not_averaged_twice() -> None:
    one, two = (contracted(r, seed=i) for i, r in enumerate(seeds("rtn", [0.1, 0.2])))
    again = two.model_copy(update={"id": "f" * 64})
    assert [len(row.results) for row in compare([one, two, again]).tables[0].blocks[0].rows] == [2, 1]
    assert [len(row.results) for row in compare([one, two, two]).tables[0].blocks[0].rows] == [2]


@pytest.mark.parametrize("difference", ["options", "scheme", "batch size"])
def test_only_seeds_are_averaged(difference: str) -> None:
    one, two = (contracted(r, seed=i) for i, r in enumerate(seeds("rtn", [0.1, 0.2])))
    change = {
        "options": {"options": {"alpha": 0.5}}, "scheme": {"scheme": "W3A16"},
        "batch size": {"config": {"compute": {"batch_size": 4}}},
    }[difference]  # fmt: skip
    blocks = compare([one, two.model_copy(update=change)]).tables[0].blocks
    assert [len(row.results) for block in blocks for row in block.rows] == [1, 1]


def test_two_texts_are_two_draws_and_refused() -> None:
    one, two = (contracted(make_result("rtn"), text=text) for text in ("aaaa", "bbbb"))
    with pytest.raises(ConfigError, match=r"calibration\.text \(aaaa / bbbb\)"):
        compare([one, two])


def test_full_precision_has_no_seed() -> None:
    one, two = (contracted(baseline(), seed=seed) for seed in (0, 1))
    assert one.id == two.id
    assert len(compare([one, two.model_copy(update={"id": "e" * 64})]).tables[0].blocks[0].rows) == 2


def tasks_of(seed: int, chance: float) -> dict[str, Metric]:
    return {f"{name}/acc": accuracy(seed + i, chance, name) for i, name in enumerate(("piqa", "boolq"))}


def test_rows_with_and_without_tasks_are_compared_on_what_both_were_measured_on() -> None:
    more = {**WIKI, "piqa": {"protocol": "q"}, "boolq": {"protocol": "r"}}
    plain = [contracted(baseline(), WIKI), contracted(make_result("rtn", extra=0.3), WIKI)]
    full = make_result("gptq", extra=0.1)
    full = contracted(full.model_copy(update={"metrics": {**full.metrics, **tasks_of(1, 0.7)}}), more)
    comparison = compare([*plain, full])
    table = comparison.tables[0]
    assert len(table.contracts) == 2 and not table.mixed
    assert marks(comparison) == {"full-precision": None, "rtn": None, "gptq": "best"}
    gptq = table.blocks[0].rows[2]
    assert (
        gptq.scores[KEY].ratio_half_width is not None
    )  # paired with the full precision of the other contract
    assert gptq.scores["piqa/acc"].ratio is None and gptq.scores["piqa/acc"].mark is None
    assert "differ only in what else was measured" in comparison.render("table", 100)


def test_one_name_for_two_evaluations_is_refused() -> None:
    other = {"wikitext2": {"protocol": "p", "tokens": "other"}}
    rows = [contracted(make_result("rtn"), WIKI), contracted(make_result("gptq"), other)]
    with pytest.raises(
        ConfigError, match=r"2 different protocols.*evaluation\.wikitext2\.tokens \(w / other\)"
    ):
        compare(rows)
    assert set(marks(compare(rows, allow_mixed=True)).values()) == {None, "best"}


def test_fields_that_do_not_explain_their_hash_are_not_trusted() -> None:
    row = contracted(make_result("gptq"), {})
    with pytest.raises(ConfigError, match="fields that were not recorded"):
        compare([contracted(make_result("rtn")), row.model_copy(update={"contract": "e" * 64})])


def test_permitted_mixing_prints_the_difference_with_both_values() -> None:
    rows = [
        contracted(baseline()),
        contracted(make_result("rtn")),
        contracted(make_result("gptq"), n_samples=128),
    ]
    text = compare(rows, allow_mixed=True).render("table", 160)
    hashes = " / ".join(dict.fromkeys(row.contract[:8] for row in rows))
    assert f"different protocols {hashes}: calibration.n_samples (64 / 128)" in text
    with pytest.raises(ConfigError, match=r"calibration\.n_samples \(64 / 128\)"):
        compare(rows)


def test_accuracies_are_compared_question_by_question() -> None:
    def row(method: str, right: list[int]) -> Result:
        metric = Metric(value=sum(right) / len(right), n=len(right), protocol="p", items=[float(x) for x in right],
                        items_name="correct", higher_is_better=True)  # fmt: skip
        return make_result(method, metrics={"piqa/acc": metric})

    a, b = [1] * 60 + [0] * 40, [1] * 50 + [0] * 50
    comparison = compare([row("a", a), row("b", b), row("c", a[::-1])])
    found = {r.label: r.scores["piqa/acc"] for r in comparison.tables[0].blocks[0].rows}
    assert found["b"].behind.discordant == (0, 10) and found["b"].p_value == pytest.approx(2 * 2 / 2**10)
    assert found["c"].behind.discordant == (40, 40) and found["c"].p_value == 1.0
    assert {label: score.mark for label, score in found.items()} == {"a": "best", "b": None, "c": "tied"}
    assert {label: score.rank for label, score in found.items()} == {"a": 1, "b": 3, "c": 1}
    own = scipy_stats.binomtest(60, 100).proportion_ci(method="wilson")
    assert (found["a"].low, found["a"].high) == pytest.approx((own.low, own.high), rel=1e-12)


@pytest.mark.parametrize(
    ("full", "marks"), [(0.5, {None}), (0.8, {"best", None})], ids=["full precision guesses", "it does not"]
)
def test_rows_are_not_ranked_where_full_precision_guesses(full: float, marks: set) -> None:
    """A row far below guessing has a preference among answers, and losing it is no merit."""

    def metrics(seed: int, share: float) -> dict[str, Metric]:
        return {"boolq/acc": accuracy(seed, share, "boolq").model_copy(update={"chance": 0.5})}

    rows = [make_result("a", metrics=metrics(1, 0.75)), make_result("b", metrics=metrics(2, 0.2))]
    for given in ([baseline(metrics=metrics(3, full)), *rows], rows):  # without it: where no row is above
        found = [r.scores["boolq/acc"] for r in compare(given).tables[0].blocks[0].rows][-2:]
        expected = marks if len(given) > 2 else {"best", None}
        assert {score.mark for score in found} == expected
        assert {score.rank for score in found} == ({None} if expected == {None} else {1, 2})
    low = [make_result("a", metrics=metrics(1, 0.3)), make_result("b", metrics=metrics(2, 0.2))]
    assert {r.scores["boolq/acc"].mark for r in compare(low).tables[0].blocks[0].rows} == {None}


def test_the_average_counts_every_task_once_and_only_where_all_were_measured() -> None:
    short = accuracy(9, 0.4, "boolq")
    short = short.model_copy(
        update={"items": short.items[:100], "value": sum(short.items[:100]) / 100, "n": 100}
    )
    rows = [
        make_result(name, metrics={"piqa/acc": accuracy(seed, 0.6, "piqa"), "boolq/acc": short})
        for name, seed in (("a", 1), ("b", 2))
    ]
    half = make_result("half", metrics={"piqa/acc": accuracy(3, 0.6, "piqa")})
    table = compare([*rows, half]).tables[0]
    assert table.metrics == ("piqa/acc", "boolq/acc", "average/acc")
    a, b, c = (row.scores for row in table.blocks[0].rows)
    piqa, boolq = rows[0].metrics["piqa/acc"], rows[0].metrics["boolq/acc"]
    assert a["average/acc"].value == pytest.approx((piqa.value + boolq.value) / 2)
    variance = (np.var(piqa.items, ddof=1) / 400 + np.var(short.items, ddof=1) / 100) / 4
    assert a["average/acc"].half_width == pytest.approx(1.97 * math.sqrt(variance), rel=0.01)
    assert "average/acc" not in c
    assert {a["average/acc"].mark, b["average/acc"].mark} == {"best", "tied"}


def test_acc_stands_for_a_task_that_has_acc_norm_too() -> None:
    keys = [
        "piqa/acc_norm",
        "piqa/acc",
        "hellaswag/acc_norm",
        "wikitext2/perplexity",
        "wikitext2/top1_agreement",
    ]
    assert task_keys(keys) == ("piqa/acc", "hellaswag/acc_norm")


def test_recovery_is_what_is_left_in_either_direction() -> None:
    def row(method: str, ppl: float, right: int) -> Result:
        items = [1.0] * right + [0.0] * (100 - right)
        return make_result(method, metrics={
            KEY: perplexity([math.log(ppl)] * 4),
            "piqa/acc": Metric(value=right / 100, n=100, protocol="p", items=items, items_name="correct",
                               higher_is_better=True)})  # fmt: skip

    fp, rtn = compare([row(BASELINE, 10.0, 80), row("rtn", 12.5, 60)]).tables[0].blocks[0].rows
    assert (fp.scores[KEY].recovery, fp.scores["piqa/acc"].recovery) == (1.0, 1.0)
    assert rtn.scores[KEY].recovery == pytest.approx(0.8)
    assert rtn.scores["piqa/acc"].recovery == pytest.approx(0.75)


def test_the_interval_of_a_recovery_of_accuracies_is_the_delta_method_on_pairs() -> None:
    a, b = accuracy(1, 0.5, "p"), accuracy(2, 0.6, "p")
    rows = [baseline(metrics={"piqa/acc": b}), make_result("rtn", metrics={"piqa/acc": a})]
    score = compare(rows).tables[0].blocks[0].rows[1].scores["piqa/acc"]
    ratio = a.value / b.value
    residual = np.array(a.items) - ratio * np.array(b.items)
    expected = 1.966 * residual.std(ddof=1) / 20 / b.value
    assert score.recovery_half_width == pytest.approx(expected, rel=1e-3)


def test_one_record_can_be_given_as_a_file(tmp_path: Path) -> None:
    paths = [ResultStore(tmp_path).save(result) for result in make_run(("W4A4",))]
    assert labels(compare(paths[0], str(paths[2]))) == ["full-precision", "smoothquant"]
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json"):
        compare(tmp_path / "broken.json")


def test_any_method_can_be_the_reference() -> None:
    comparison = compare(make_run(), baseline="rtn")
    for block in comparison.tables[0].blocks:
        assert [row.label for row in block.rows][:2] == ["full-precision", "rtn"]
        by_label = {row.label: row.scores[KEY] for row in block.rows}
        assert by_label["rtn"].ratio == 1.0
        assert by_label["affinequant"].ratio == by_label["affinequant"].value / by_label["rtn"].value
        assert by_label["full-precision"].ratio < 1
    with pytest.raises(
        ConfigError, match=r"Unknown method among these rows 'omniquan'. Did you mean 'omniquant'"
    ):
        compare(make_run(), baseline="omniquan")


def test_without_a_reference_row_there_is_no_ratio() -> None:
    comparison = compare([make_result("rtn"), make_result("gptq", extra=0.4)])
    assert all(row.scores[KEY].ratio is None for row in comparison.tables[0].blocks[0].rows)


def test_only_full_precision_is_a_table_too() -> None:
    assert labels(compare([baseline()])) == ["full-precision"]


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results to compare"):
        compare(tmp_path)
    with pytest.raises(DataError, match="There is no results folder"):
        compare(tmp_path / "none")


def test_notes_are_numbered_once_and_transforms_admit_their_cost() -> None:
    transforms = [
        TransformRecord(site="attn_in", kind="affine", foldable=False, function_preserving=True,
                        flops_per_token=300_000, stored_bits=8_000_000),
        TransformRecord(site="mlp_in", kind="affine", foldable=False, function_preserving=True,
                        flops_per_token=300_000, stored_bits=8_000_000),
        TransformRecord(site="query_key", kind="affine", foldable=True, function_preserving=False),
        TransformRecord(site="value_out", kind="affine", foldable=True, function_preserving=True),
    ]  # fmt: skip
    rows = [make_result("a", notes=["shared"]), make_result("b", notes=["shared"], transforms=transforms)]
    assert list(compare(rows).footnotes) == [
        "shared",
        "not function-preserving: query_key (affine)",
        "not foldable, stays at run time: attn_in (affine), mlp_in (affine); "
        "per block 600 kFLOP per token, 2 MB stored",
    ]
    assert list(compare(rows).footnotes.values()) == [1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [{"protocol": "another"}, {"losses": window_losses(1, n=32, extra=0.1)}],
    ids=["protocol", "fewer"],
)
def test_what_was_measured_otherwise_under_one_contract_is_never_tied(change: dict) -> None:
    losses = window_losses(1, extra=0.1)
    other = {KEY: perplexity(**({"losses": [x + 1e-9 for x in losses]} | change))}
    rows = [with_losses("best", losses), make_result("other", metrics=other)]
    assert list(marks(compare(rows)).values()).count("tied") == 0
    same = [rows[0], make_result("other", metrics={KEY: perplexity([x + 1e-9 for x in losses[::-1]])})]
    assert list(marks(compare(same)).values()).count("tied") == 1
