"""The script behind docs/results.md: what it says of GPTQ beside rounding to nearest."""

from __future__ import annotations

import math
import re

import pytest

from qbench.results import BlockRecord
from scripts.results_tables import method_table, order_report, rounding_table, star_report, weight_errors
from tests.fake_results import baseline, make_result, perplexity, window_losses

ERRORS = {"q": (0.02, 0.04), "down": (0.09, 0.1)}  # GPTQ, nearest


def row(method: str, extra: float, errors: dict | None = None, **changes):
    """A row of two blocks, the second with twice as large errors; `errors` are of the second."""
    extras = [
        {f"output_error.{role}": k * gptq, f"output_error_nearest.{role}": k * nearest}
        for k, per_block in ((1, ERRORS), (2, errors or ERRORS))
        for role, (gptq, nearest) in per_block.items()
    ]
    blocks = [
        BlockRecord(index=i, seconds=1, extras={"rounding_gain": 1.0} | extras[2 * i] | extras[2 * i + 1])
        for i in range(2)
    ]
    plain = {"blocks": blocks} if method.endswith("gptq") else {}
    metrics = {"wikitext2/perplexity": perplexity(window_losses(1, extra=extra, rho=0.0))}
    return make_result(method, "W3A16", metrics=metrics, **(plain | changes))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_errors_are_of_each_linear_over_those_of_nearest() -> None:
    found = weight_errors(row("gptq", 0.1, {"q": (0.03, 0.04), "down": (0.12, 0.1)}))
    assert found == pytest.approx({"0.q": 0.5, "0.down": 0.9, "1.q": 0.75, "1.down": 1.2})
    assert weight_errors(row("rtn", 0.1)) == {}


def test_the_table_has_median_worst_and_the_transforms_own_row_beside_it() -> None:
    rows = [row("rtn", 0.4), row("gptq", 0.2), row("omniquant", 0.1), row("omniquant+gptq", 0.3)]
    _, _, alone, under, _, weight, perplexity_line = rounding_table(rows)
    assert cells(alone)[:7] == ["none", "W3A16", "4", "0", "0.700", "0.900", "0.down"]
    assert cells(under)[0] == "omniquant"
    ratio, half = (float(x) for x in cells(alone)[-1].split(" ±"))
    assert ratio == pytest.approx(math.exp(-0.2), abs=0.02) and 0 < half < 0.05
    assert cells(alone)[7:9] == [f"{r.metrics['wikitext2/perplexity'].value:.2f}" for r in rows[:2]]
    assert cells(under)[7:9] == [f"{r.metrics['wikitext2/perplexity'].value:.2f}" for r in rows[2:]]
    assert weight == "Weight error: GPTQ is below rounding to nearest in 8 of 8 linears."
    assert perplexity_line.startswith("Perplexity: GPTQ is below in 1 of 2 rows; not at omniquant W3A16 (1.2")


def test_lost_linears_are_named_and_what_is_missing_is_missing() -> None:
    lost = row("awq+gptq", 0.2, {"q": (0.04, 0.04), "down": (0.12, 0.1)})
    other = row("awq", 0.3, contract="another")
    for beside in ([], [other]):  # no such row, or one of another contract
        *_, line, _, weight, verdict = rounding_table([lost, *beside])
        assert cells(line)[3:6] == ["2", "0.950", "1.200"] and cells(line)[-1] == "—"
        assert (
            weight == "Weight error: GPTQ is below rounding to nearest in 2 of 4 linears; "
            "not in awq+gptq W3A16 1.q (1.000), awq+gptq W3A16 1.down (1.200)."
        )
        assert verdict == "Perplexity: GPTQ is below in 0 of 0 rows."
    assert rounding_table([row("rtn", 0.1)]) == []


def test_the_published_order_is_told_of_schemes_with_two_of_its_methods() -> None:
    rows = [row("rtn", 0.1), row("smoothquant", 0.2), row("omniquant", 0.05)]
    (told,) = order_report([*rows, make_result("rtn", "W4A4"), make_result("gptq", "W4A4")])
    assert told.startswith("* W3A16: does not hold: rtn ") and told.count(";") == 0


def test_a_methods_table_has_its_compositions_and_its_quotient_to_full_precision() -> None:
    full = baseline(metrics={"wikitext2/perplexity": perplexity(window_losses(1, extra=0.0, rho=0.0))})
    starred = row("abq", 0.3, options={"bit_balance": True})
    llama = [full, row("gptq", 0.2), row("omniquant", 0.1), row("omniquant+gptq", 0.1), starred]
    models = {"llama": llama, "opt": [full, row("omniquant", 0.4)]}
    head, _, alone, composed = map(cells, method_table(models, "omniquant"))
    assert head == ["", "scheme", "llama", "÷ FP", "opt", "÷ FP"]
    assert (
        alone[:2] == ["omniquant", "W3A16"] and composed[0] == "omniquant+gptq" and composed[4:] == ["—", "—"]
    )
    ratios = [float(text.split(" ±")[0]) for text in (alone[3], alone[5])]
    assert ratios == pytest.approx([math.exp(0.1), math.exp(0.4)], rel=0.02)
    assert [cells(line)[0] for line in method_table(models, "gptq")[2:]] == ["gptq"]


def test_the_fifth_level_is_set_beside_four_of_the_same_method_and_contract() -> None:
    def abq(extra: float, star: bool, **changes):
        metrics = {"wikitext2/perplexity": perplexity(window_losses(1, extra=extra, rho=0.0))}
        return make_result("abq", "W2A8", metrics=metrics, options={"bit_balance": star}, **changes)

    (line,) = star_report([abq(0.3, False), abq(0.1, True), row("abq", 0.2), abq(0.4, False, contract="x")])
    assert re.match(r"\* abq W2\*A8 [\d.]+ against W2A8 [\d.]+: ÷ 0.8\d\d ±0.0\d\d$", line)
    assert star_report([abq(0.1, True)]) == []
