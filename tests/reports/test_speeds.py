"""Latency in the leaderboard: which measured speed is whose, and what may not be joined."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from fake_results import baseline, make_result

from qbench.cli import main
from qbench.errors import DataError
from qbench.latency import Report, Speed
from qbench.reports.layouts import leaderboard_sheets
from qbench.reports.leaderboard import sections
from qbench.reports.speeds import with_latency
from qbench.results import ResultStore, TransformRecord


def speed(backend: str, scheme: str, decode: float, **changes) -> Speed:
    fields = {
        "model": "/models/ref-llama-14m/", "backend": backend, "scheme": scheme, "dtype": "bfloat16", "batch": 2,
        "prompt_tokens": 64, "new_tokens": 16, "prefill_tokens_per_s": 1e4, "decode_tokens_per_s": decode,
        "weight_bytes": 1,
    }  # fmt: skip
    return Speed(**(fields | changes))


def bench(*speeds: Speed, device: str = "a GPU") -> Report:
    return Report(commands=[], device=device, cache_bytes=1, environment={}, protocol={}, speeds=list(speeds))


def transform(foldable: bool) -> TransformRecord:
    return TransformRecord(
        site="attn_in", kind="affine", foldable=foldable, function_preserving=True, stored_bits=0,
        flops_per_token=0,
    )  # fmt: skip


def latencies(rows) -> dict[str, float]:
    return {
        f"{row.method} {row.scheme_label}": metric.value
        for row in rows
        if (metric := row.metrics.get("decode/latency_ms")) is not None
    }


ROWS = [
    baseline(),
    make_result("rtn", "W4A16g128"),
    make_result("smoothquant", "W4A16g128", transforms=[transform(True)]),
    make_result(
        "affinequant", "W4A16g128", transforms=[transform(False)], checkpoint="affinequant-W4A16g128-1"
    ),
    make_result("rtn", "W8A8-sym"),
    make_result("abq", "W2A8", options={"bit_balance": True}),
]


def test_a_speed_is_that_of_every_row_of_its_scheme_with_nothing_left_at_run_time() -> None:
    report = bench(
        speed("none", "W16A16", 100.0),
        speed("torch", "W4A16g128", 200.0),
        speed("humming", "W4A16g128", 250.0, graphed_tokens_per_s=400.0),
        speed("humming", "W2A8", 500.0),  # not bit balanced
        speed("humming", "W4A16g128", 999.0, model="another"),
    )
    rows = with_latency(ROWS, [report])
    # 2 sequences a step: 100 tokens a second are 20 ms a step; the fastest backend counts
    expected = {"full-precision W16A16": 20.0, "rtn W4A16g128": 5.0, "smoothquant W4A16g128": 5.0}
    assert latencies(rows) == pytest.approx(expected)
    assert "decode by humming in bfloat16, one CUDA graph a step" in rows[1].notes
    assert "decode unquantized in bfloat16" in rows[0].notes
    assert not ROWS[1].notes and list(ROWS[1].metrics) == ["wikitext2/perplexity"]


def test_rows_that_share_a_measurement_are_not_ranked_by_it() -> None:
    (sheet,) = leaderboard_sheets(sections(with_latency(ROWS, [bench(speed("torch", "W4A16g128", 1600.0))])))
    column = sheet.header.index("decode latency_ms")
    cells = [line.cells[column] for line in sheet.lines]
    assert [cell.text for cell in cells].count("1.250") == 2 and all(cell.mark is None for cell in cells)


def test_a_row_with_work_at_run_time_has_the_speed_of_its_own_checkpoint_alone() -> None:
    own = speed("torch", "W4A16g128", 100.0, checkpoint="affinequant-W4A16g128-1")
    other = speed("torch", "W4A16g128", 100.0, checkpoint="affinequant-W4A16g128-2")
    assert latencies(with_latency(ROWS, [bench(own)])) == {"affinequant W4A16g128": 20.0}
    assert latencies(with_latency(ROWS, [bench(other)])) == {}


def test_several_workloads_have_columns_of_their_own() -> None:
    report = bench(speed("torch", "W4A16g128", 100.0), speed("torch", "W4A16g128", 100.0, batch=1))
    (sheet,) = leaderboard_sheets(sections(with_latency(ROWS, [report])))
    titles = ["decode 2×64+16 latency_ms", "decode 1×64+16 latency_ms"]
    assert [title for title in sheet.header if "latency" in title] == titles
    assert any("one step of 2 sequences behind 64 tokens" in line for line in sheet.footer)


def test_devices_are_not_mixed_and_layers_alone_are_no_latency() -> None:
    one = speed("torch", "W4A16g128", 100.0)
    with pytest.raises(DataError, match="several devices"):
        with_latency(ROWS, [bench(one), bench(one, device="a CPU")])
    with pytest.raises(DataError, match="--end-to-end"):
        with_latency(ROWS, [bench()])


@pytest.mark.parametrize("form", ["table", "markdown", "csv", "html"])
def test_the_report_shows_it(tmp_path, form) -> None:
    store = ResultStore(tmp_path / "rows")
    for row in ROWS:
        store.save(row)
    file = tmp_path / "bench.json"
    file.write_text(bench(speed("torch", "W4A16g128", 1600.0)).model_dump_json())
    done = CliRunner().invoke(
        main, ["report", str(tmp_path / "rows"), "--bench", str(file), "--format", form]
    )
    assert done.exit_code == 0, done.output
    assert "latency" in done.output and "1.25" in done.output
    missing = CliRunner().invoke(main, ["report", str(tmp_path / "rows"), "--bench", str(tmp_path / "none")])
    assert missing.exit_code != 0 and "Cannot read" in str(missing.output) + str(missing.exception)
