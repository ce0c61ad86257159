import math
import random
from pathlib import Path

import pytest
from fake_results import CONTRACT, baseline, make_result, make_run, perplexity, window_losses

from qbench.errors import ConfigError, DataError
from qbench.reports import stats
from qbench.reports.comparison import compare
from qbench.results import Metric, Result, ResultStore, TransformRecord

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
