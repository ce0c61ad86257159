"""What the printed table must never do: cut a number, lose a column in silence, or run over its width."""

import re

import pytest
from fake_results import accuracy, baseline, make_result, make_run, seeds
from rich.cells import cell_len

from qbench.errors import ConfigError
from qbench.reports.columns import columns, format_half_width, format_seconds, format_value
from qbench.reports.comparison import compare
from qbench.results import Metric

WIDTHS = [200, 120, 100, 80, 70, 60, 50, 45]
DROPPED = "not shown at this width: "


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def body(text: str) -> list[str]:
    """Lines of the tables, without the legend."""
    found = lines(text)
    return found[: next(i for i, line in enumerate(found) if line.startswith("* best"))]


@pytest.mark.parametrize("tasks", [1, 2, 7])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_fits_and_every_number_is_whole(tasks: int, width: int) -> None:
    comparison = compare(make_run(tasks=tasks))
    text = comparison.render("table", width)
    assert max(cell_len(line) for line in lines(text)) <= width
    table = comparison.tables[0]
    full = columns(table, comparison, table.metrics)
    printed = set(re.findall(r"[^\s]+", "\n".join(body(text))))
    for column in full:
        if column.kind in ("method", "scheme", "value"):
            for cell in column.cells:
                assert set(cell.split()) <= printed, cell
    whole = {piece for column in full for cell in column.cells for piece in cell.split()}
    whole |= {piece for column in full for line in column.header for piece in line.split()}
    cut = {piece for piece in printed - whole if not set(piece) <= {"─"} and piece != "ref-llama-14m"}
    assert not cut


@pytest.mark.parametrize("width", WIDTHS)
def test_columns_go_in_the_stated_order_and_the_table_says_so(width: int) -> None:
    order = [
        "recovery",
        "contract",
        "CPU memory",
        "GPU memory",
        "time",
        "± of ratio",
        "bits/weight",
        "ratio",
        "± of value",
    ]
    text = " ".join(lines(compare(make_run()).render("table", width)))
    gone = text.partition(DROPPED)[2].partition(" (--format")[0].split(", ") if DROPPED in text else []
    assert gone == order[: len(gone)]
    head = text.partition("─")[0]
    assert ("contract" in head) == ("contract" not in gone)
    assert ("÷ FP" in head) == ("ratio" not in gone)
    assert ("weight" in head) == ("bits/weight" not in gone)
    assert len(re.findall("GiB", head)) == 2 - ("CPU memory" in gone) - ("GPU memory" in gone)


def test_wide_enough_shows_everything() -> None:
    text = compare(make_run()).render("table", 120)
    assert DROPPED not in text
    assert re.search(
        r"affinequant \[1,2\] +W3A16 +26\.66 ±4\.37 \* +1\.059 ±0\.003 +94\.4 +3\.13 +3m12s", text
    )
    assert re.search(r"full-precision +W16A16 +25\.17 ±4\.15 +1\.000 +100\.0 +16\.00 +— +— +—", text)


def test_a_terminal_that_is_far_too_narrow_still_gets_whole_numbers() -> None:
    text = compare(make_run(tasks=2)).render("table", 25)
    for number in ("28.23 *", "121.34 *", "43.91", "200.21"):
        assert number in text


def test_many_metrics_become_several_tables_with_the_costs_kept() -> None:
    text = compare(make_run(tasks=7)).render("table", 80)
    assert sum("─" in line for line in lines(text)) == 5
    assert "weight" in text and "3m12s" in text
    assert text.count("÷ FP") == 3 and "± of ratio (--format" in " ".join(lines(text))


def test_details_go_first_and_are_named() -> None:
    def metrics(shift: float) -> dict[str, Metric]:
        kl = {
            f"wikitext2/kl_{name}": Metric(value=0.1 + shift, n=9, protocol="kl")
            for name in ("mean", "p99", "max")
        }
        task = {f"piqa/{name}": accuracy(3, 0.5, "piqa (0-shot)") for name in ("acc", "acc_norm")}
        return {**make_result().metrics, **kl, **task}

    rows = [baseline(), make_result("rtn", metrics=metrics(0.1)), make_result("gptq", metrics=metrics(0.0))]
    wide, narrow = (compare(rows).render("table", width) for width in (250, 130))
    for name in ("kl_p99", "kl_max", "acc_norm"):
        assert name in wide and name not in narrow.partition("* best")[0]
    assert "KL ↓" in narrow and "acc ↑" in narrow and "not shown at this width: details" in narrow
    assert "kl_p99" in compare(rows).render("csv")


def test_a_table_with_tasks_shows_their_average_and_what_is_left_of_full_precision() -> None:
    text = compare(make_run(tasks=7)).render("table", 300)
    assert re.search(r"average +bits/", text)
    assert re.search(r"0\.481 ±0\.024 \* +94\.5 ±\d\.\d", text)
    assert "average acc: mean over piqa, arc_easy, hellaswag, winogrande, equally weighted" in text
    assert "of % of FP: paired question by question" in text


@pytest.mark.parametrize("width", [120, 80, 60])
def test_rows_of_several_seeds_are_one_line_with_their_spread(width: int) -> None:
    rows = [baseline(), *seeds("rtn", [0.10, 0.12, 0.11]), *seeds("gptq", [0.3, 0.2])]
    text = compare(rows).render("table", width)
    assert max(cell_len(line) for line in lines(text)) <= width
    assert text.count("rtn") == 1 and text.count("gptq") == 1
    if width > 60:
        assert re.search(r"rtn .* 0\.32 \(3\)", text) and "(2)" in text
    assert "values are means over them" in " ".join(text.split())


def test_a_task_that_no_row_does_better_than_guessing_says_so() -> None:
    def metrics(seed: int, skill: float) -> dict[str, Metric]:
        hard = accuracy(seed, 0.25, "arc (0-shot)").model_copy(update={"chance": 0.25})
        easy = accuracy(seed, skill, "piqa (0-shot)").model_copy(update={"chance": 0.25})
        return {"arc/acc": hard, "piqa/acc": easy}

    comparison = compare([baseline(metrics=metrics(1, 0.9)), make_result("rtn", metrics=metrics(2, 0.8))])
    for row in comparison.tables[0].blocks[0].rows:
        assert row.scores["arc/acc"].above_chance is False
        assert row.scores["piqa/acc"].above_chance is True
        assert row.scores["average/acc"].chance == 0.25 and row.scores["average/acc"].above_chance
    text = comparison.render("table", 120)
    assert len(re.findall(r"0\.2\d\d ±0\.0\d\d°", text)) == 2 and text.count("°") == 3
    assert "° not shown to be above what guessing gives (arc 0.25); where full precision is not, rows" in text
    assert "°" not in compare(make_run(tasks=7)).render("table", 200)  # no chance is known
    assert "^\\circ" in comparison.render("latex")


def test_a_balanced_grid_has_its_star() -> None:
    starred = make_result("abq", "W2A8", options={"bit_balance": True})
    text = compare([baseline(), starred, make_result("rtn", "W2A8", extra=0.4)]).render("table", 120)
    assert re.search(r"abq +W2\*A8 ", text) and re.search(r"rtn +W2A8 ", text)


def test_rows_of_mixed_protocols_show_their_contract_at_any_width() -> None:
    rows = [*make_run(("W4A4",)), make_result("gptq", contract="e" * 64)]
    for width in (120, 60, 50):
        text = "\n".join(body(compare(rows, allow_mixed=True).render("table", width)))
        assert text.count("eeeeeeee") >= 1 and "3f9a1c77" in text


def test_a_long_label_wraps_between_words() -> None:
    options = [{"let_lr": 0.001, "alpha": 0.75, "use_ln_matrix": use} for use in (True, False)]
    options[1]["let_lr"] = 0.005
    text = compare(
        [baseline(), *(make_result("affinequant", options=o, extra=o["let_lr"]) for o in options)]
    ).render("table", 80)
    assert max(cell_len(line) for line in lines(text)) <= 80
    assert "use_ln_matrix=true" in text and "let_lr=0.001" in text


def test_markup_in_names_is_text() -> None:
    text = compare(
        [baseline(model="[bold]x[/]"), make_result("rtn", model="[bold]x[/]", notes=["see [1]"])]
    ).render("table", 100)
    assert "[bold]x[/]" in text and "[1] see [1]" in text


def test_protocol_contract_and_notes_stand_below() -> None:
    text = compare(make_run()).render("table", 120)
    assert "wikitext2 ppl: wikitext2 (1024, non-overlapping, test), n=64" in text
    assert "contract 3f9a1c77" in text
    assert "[1] attention logits overflow float16" in text
    assert text.count("attention logits overflow") == 1


def test_metrics_of_one_protocol_share_a_line() -> None:
    def metrics(protocol: str) -> dict[str, Metric]:
        return {f"piqa/{name}": accuracy(3, 0.5, protocol) for name in ("acc", "acc_norm")}

    text = compare([baseline(metrics=metrics("piqa (0-shot)"))]).render("table", 120)
    assert [line for line in lines(text) if "0-shot" in line] == ["piqa acc, acc_norm: piqa (0-shot), n=400"]
    apart = metrics("piqa (0-shot)") | {"piqa/acc": accuracy(3, 0.5, "piqa (5-shot)")}
    text = compare([baseline(metrics=apart)]).render("table", 120)
    assert len([line for line in lines(text) if "-shot" in line]) == 2


def test_missing_is_a_dash_and_an_all_missing_column_is_not_printed() -> None:
    rows = [baseline(), make_result("rtn"), make_result("gptq", extra=0.2, metrics={}, bits_per_weight=None)]
    for row in rows:
        object.__setattr__(row.cost, "peak_gpu_bytes", None)
    text = compare(rows).render("table", 120)
    assert "GPU" not in text
    assert "GPU" not in compare(rows).render("table", 50)  # nor is it named among the columns left out
    assert "CPU memory" in " ".join(compare(rows).render("table", 50).split())
    assert re.search(r"gptq +W4A4 +— +— +— +— +12\.5s", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.12345, "1.123"), (9.9994, "9.999"), (25.171, "25.17"), (999.994, "999.99"), (1234.56, "1234.6"),
     (99999.0, "99999.0"), (123456.0, "1.23e+05"), (float("inf"), "∞"), (float("nan"), "—"), (-0.5, "-0.500"),
     (0.0, "0.000"), (0.00042, "0.000420"), (-0.0099, "-0.00990"), (0.01, "0.010"), (3e-9, "3.00e-09")],
)  # fmt: skip
def test_values(value: float, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("half_width", "value", "text"),
    [(4.153, 25.17, "±4.15"), (0.00432, 1.128, "±0.004"), (0.0004, 1.128, "±0.0004"), (0.004, 25.0, "±0.004"),
     (0.0, 25.0, "±0"), (float("inf"), 25.0, ""), (12000.0, 2e5, "±1.2e+04")],
)  # fmt: skip
def test_a_half_width_never_shows_as_zero_unless_it_is(half_width: float, value: float, text: str) -> None:
    assert format_half_width(half_width, value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "—"),
        (0.44, "0.4s"),
        (59.94, "59.9s"),
        (59.97, "1m00s"),
        (192, "3m12s"),
        (3599.6, "1h00m"),
        (7320, "2h02m"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Unknown format 'markdwn'. Did you mean 'markdown'"):
        compare([baseline()]).render("markdwn")
