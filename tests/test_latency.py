"""Arithmetic on kernel measurements against hand calculation; rendering; what may not be claimed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qbench.cli.bench import read
from qbench.latency import Ceilings, Cell, Report, ShapeSet, Timing, break_even, floor_us, scheme_bytes
from qbench.reports.latency import as_markdown, tables

REPO = Path(__file__).resolve().parent.parent
CEILINGS = Ceilings(read_bytes_per_s=4.3e12, flops={"float16": 700e12, "int8": 1900e12})


def timing(first: float, last: float | None = None) -> Timing:
    last = first if last is None else last
    return Timing(
        median_us=(first + last) / 2,
        iqr_us=0,
        first_us=first,
        last_us=last,
        n_samples=30,
        calls_per_sample=20,
    )


def cell(**changes: object) -> Cell:
    usual: dict[str, object] = {
        "out_features": 4096, "in_features": 4096, "tokens": 1, "backend": "humming", "scheme": "W4A16g128",
        "dtype": "float16", "status": "timed", "arithmetic": "float16 product", "error": 3e-4, "worst_channel": 1e-3,
        "layer": timing(9.0), "baseline": timing(13.5), "packed_bytes": 9_000_000, "cold": True,
    }  # fmt: skip
    return Cell.model_validate(usual | changes)


@pytest.mark.parametrize(
    ("bits", "expected"), [(16, 7.8), (8, 3.9), (4, 1.95), (3, 1.46), (2, 0.98)], ids=lambda v: str(v)
)
def test_floor_at_one_token_is_the_read_of_the_weight(bits: int, expected: float) -> None:
    """Limits of 4096×4096 at 4.3 TB/s: 33.5 MB in 7.8 µs at 16 bits, and proportionally less."""
    weight = scheme_bytes(4096, 4096, bits, 0, True)
    assert floor_us(4096, 4096, 1, weight, CEILINGS, "float16") == pytest.approx(expected, rel=5e-3)


def test_floor_at_many_tokens_is_the_product() -> None:
    # 2·4096³ = 137.4 GFLOP at 700 TFLOP/s: 196 µs; reading takes 8 + 67 MB at 4.3 TB/s: 18 µs
    assert floor_us(4096, 4096, 4096, 8.4e6, CEILINGS, "float16") == pytest.approx(196.3, rel=1e-3)
    assert floor_us(4096, 4096, 4096, 8.4e6, CEILINGS, "int8") == pytest.approx(72.3, rel=1e-3)


def test_scheme_bytes_counts_scales_and_zero_points() -> None:
    # 8 rows of 64 codes at 3 bits, 2 groups a row with a 16-bit scale, and a zero point of 3 bits
    assert scheme_bytes(8, 64, 3, 2, True) == (8 * 64 * 3 + 16 * 16) / 8
    assert scheme_bytes(8, 64, 3, 2, False) == (8 * 64 * 3 + 16 * 19) / 8


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 1.5), (16, 1.2), (256, 1.1)], ">256"),
        ([(1, 0.9), (16, 0.5)], "<1"),
        ([(16, 2.0), (256, 0.5), (1, 3.0)], "≈64"),  # log-log: halfway between 16 and 256
        ([], "—"),
    ],
    ids=["always", "never", "between", "nothing measured"],
)
def test_break_even(points: list[tuple[int, float]], expected: str) -> None:
    assert break_even(points) == expected


@pytest.mark.parametrize(
    ("layer", "baseline", "claim"),
    [
        (timing(9.0), timing(13.5), "faster"),
        (timing(20.0), timing(13.5), "slower"),
        (timing(13.0), timing(13.0, 14.0), "no difference"),  # 4% faster, the baseline is 7% from itself
        (timing(12.0, 14.5), timing(14.0), "no difference"),
    ],
    ids=["faster", "slower", "baseline unsure", "layer unsure"],
)
def test_no_claim_within_the_spread(layer: Timing, baseline: Timing, claim: str) -> None:
    assert cell(layer=layer, baseline=baseline).claim == claim


def report(*cells: Cell) -> Report:
    linears = {role: (4096, 4096) for role in ("q", "k", "v", "o")}
    model = ShapeSet(name="small", linears=linears, norm_groups=[("q", "k", "v")], n_blocks=2)
    return Report(
        commands=["qbench bench"], device="a GPU", cache_bytes=1, environment={"packages": {"torch": "2"}}, protocol={},
        models=[model], ceilings=CEILINGS, cells=list(cells),
    )  # fmt: skip


def test_rendered_cell_has_time_ratio_and_share() -> None:
    text = as_markdown(report(cell()))
    # the floor: 8 388 608 B of codes, 131 072 scales with 4-bit zero points, inputs and outputs: 2.03 µs of 9
    assert "| W4A16g128 humming | 9 · 1.50× · 23% |" in text
    assert "| float16, not quantized | 13.5 · 58% |" in text
    assert "8.72 | 1.03× | 3.73× |" in text


def test_a_layer_faster_than_the_measured_peak_raises_it() -> None:
    # 2·4096³ = 137.4 GFLOP in 171.8 µs: 800 TFLOP/s, above the 700 of CEILINGS; the layer takes twice as long
    text = as_markdown(report(cell(tokens=4096, layer=timing(343.6), baseline=timing(171.8))))
    assert "float16, not quantized | 172 · 100% |" in text
    assert "| W4A16g128 humming | 344 · 0.50× · 50% |" in text
    assert "float16 700 → 800 (W16A16 not quantized, 4096×4096 at 4096)" in text
    assert "read 4.3 TB/s; peak TFLOP/s (int8: TOP/s) float16 700, int8 1900" in text
    # 33.6 MB in 4 µs are read from a cache if the copies do not exceed it: no rate of the memory
    assert "read 4.3 →" in as_markdown(report(cell(baseline=timing(4.0))))
    assert "→" not in as_markdown(report(cell(baseline=timing(4.0), cold=False)))


def test_sum_of_a_block_counts_a_shared_matrix_once() -> None:
    made = tables(report(cell(layer=timing(10.0)), cell(norm_matrix=True, layer=timing(15.0))))
    block = next(t for t in made if "sum over" in t.title)
    assert [list(row) for row in block.rows] == [
        ["W4A16g128 humming", "40 · 1.35×"],
        ["W4A16g128 humming + norm matrices", "45 · 1.20×"],  # 15 + 3 · 10: q, k and v share one matrix
    ]


def test_what_was_not_timed_is_listed_with_its_reason() -> None:
    wrong = cell(status="wrong", message="relative error 0.4", layer=None, baseline=None, error=0.4)
    refused = cell(scheme="W4A8g128", status="refused", message="group scales", layer=None, baseline=None)
    text = as_markdown(report(cell(tokens=16), wrong, refused))
    assert "| W4A16g128 humming | wrong | 9 ·" in text
    assert "| W4A16g128 humming | wrong | relative error 0.4 | 4096×4096 at 1 |" in text
    assert "| W4A8g128 humming | refused | group scales | 4096×4096 at 1 |" in text


def test_fewer_bits_than_eight_on_both_sides_are_labelled_as_what_they_run_as() -> None:
    text = as_markdown(report(cell(scheme="W4A4", arithmetic="int8 arithmetic: 4-bit weights …")))
    assert "| W4A4 humming (int8 arithmetic) | 9 ·" in text


@pytest.mark.parametrize("file", sorted((REPO / "experiments").glob("kernels-*.json")), ids=lambda f: f.stem)
def test_the_page_shows_what_was_measured(file: Path) -> None:
    """`python benchmarks/kernels.py render` was run after the last change."""
    assert as_markdown(read(file)) in (REPO / "docs" / "kernels.md").read_text()


def test_report_survives_its_json() -> None:
    given = report(cell(), cell(tokens=16, status="slow", message="one call", layer=None, baseline=None))
    assert Report.model_validate_json(given.model_dump_json(exclude_none=True)) == given
