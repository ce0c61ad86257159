"""The papers' tables: who is bold, who is second, who is tied, what is missing; and how each format writes it."""

from __future__ import annotations

import re

import pytest
from fake_results import accuracy, baseline, make_result, make_run, perplexity, window_losses

from qbench.errors import ConfigError
from qbench.reports.comparison import Score
from qbench.reports.drawing import as_latex, as_markdown, as_text
from qbench.reports.layouts import Cell, Line, Sheet, leaderboard_sheets, paper_sheets, ranks
from qbench.reports.leaderboard import sections
from qbench.reports.report import render

GOLDEN = Sheet(
    "wikitext2 perplexity ↓",
    ("scheme", "method", "llama_7b"),
    2,
    (
        Line((Cell("FP"), Cell("full-precision"), Cell("5.68")), dim=True, rule=True),
        Line((Cell("W4A4"), Cell("rtn"), Cell("—")), rule=True),
        Line((Cell(""), Cell("smoothquant"), Cell("25.25", "±0.31"))),
        Line((Cell(""), Cell("omniquant"), Cell("11.26", "±0.12", "second"))),
        Line((Cell(""), Cell("affinequant"), Cell("10.28", "±0.11", "best"))),
        Line((Cell(""), Cell("gptq|x"), Cell("10.31", "±0.12", "tied"))),
    ),
    ("wikitext2 (2048), n=163",),
)
MARKDOWN = r"""**wikitext2 perplexity ↓**

| scheme | method | llama\_7b |
| :-- | :-- | --: |
| FP | full-precision | 5.68 |
| W4A4 | rtn | — |
|  | smoothquant | 25.25 ±0.31 |
|  | omniquant | <u>11.26</u> ±0.12 |
|  | affinequant | **10.28** ±0.11 |
|  | gptq\|x | 10.31 ±0.12 ≈ |

bold: best of its scheme; ≈: tied with the best (paired, 95%, Holm); underlined: best of the rest  
wikitext2 (2048), n=163

- rtn W4A4: a note
"""
LATEX = r"""% \usepackage{booktabs}

\begin{table}[t]
\centering
\caption{wikitext2 perplexity $\downarrow$}
\begin{tabular}{llr}
\toprule
scheme & method & llama\_7b \\
\midrule
FP & full-precision & 5.68 \\
\midrule
W4A4 & rtn & --- \\
 & smoothquant & 25.25 {\scriptsize $\pm$0.31} \\
 & omniquant & \underline{11.26} {\scriptsize $\pm$0.12} \\
 & affinequant & \textbf{10.28} {\scriptsize $\pm$0.11} \\
 & gptq|x & 10.31$^{\approx}$ {\scriptsize $\pm$0.12} \\
\bottomrule
\end{tabular}
\par\smallskip{\footnotesize bold: best of its scheme; $\approx$: tied with the best (paired, 95\%, Holm); underlined: best of the rest\\
wikitext2 (2048), n=163\par}
\end{table}

{\footnotesize rtn W4A4: a note\par}
"""  # noqa: E501


def test_golden_markdown() -> None:
    assert as_markdown([GOLDEN], ["rtn W4A4: a note"]) == MARKDOWN


def test_golden_latex() -> None:
    assert as_latex([GOLDEN], ["rtn W4A4: a note"]) == LATEX


def test_golden_terminal_without_styles_still_says_who_is_best() -> None:
    text = as_text([GOLDEN], width=80)
    assert re.search(r"affinequant +10\.28 ±0\.11 \*", text)
    assert re.search(r"omniquant +11\.26 ±0\.12 _", text)
    assert re.search(r"gptq\|x +10\.31 ±0\.12 ≈", text)


def test_without_intervals_there_is_no_plus_minus() -> None:
    table = as_markdown([GOLDEN], intervals=False) + as_latex([GOLDEN], intervals=False)
    assert "±" not in table and r"\pm" not in table


@pytest.mark.parametrize(
    ("scores", "higher", "expected"),
    [
        ({"a": (3.0, "best"), "b": (4.0, None), "c": (5.0, None)}, False, {"a": "best", "b": "second"}),
        (
            {"a": (3.0, "best"), "b": (3.1, "tied"), "c": (5.0, None)},
            False,
            {"a": "best", "b": "tied", "c": "second"},
        ),
        ({"a": (0.7, "best"), "b": (0.5, None), "c": (0.6, None)}, True, {"a": "best", "c": "second"}),
        ({"a": (3.0, "best"), "b": (3.0, "tied")}, False, {"a": "best", "b": "tied"}),
        ({"a": (3.0, None)}, False, {}),
        ({"a": (3.0, "best"), "b": (float("nan"), None)}, False, {"a": "best"}),
    ],
    ids=["plain", "a_tie_is_not_second", "higher", "all_tied", "alone", "nan"],
)
def test_second_is_the_best_row_that_is_not_tied(scores: dict, higher: bool, expected: dict) -> None:
    given = {n: Score(value, mark=mark, higher_is_better=higher) for n, (value, mark) in scores.items()}
    assert ranks(given) == expected


def two_models() -> list:
    other = [row.model_copy(update={"model": "facebook/opt-125m", "contract": "ab" * 32, "id": row.id[::-1]})
             for row in make_run(("W4A4",))]  # fmt: skip
    return make_run(("W4A4", "W3A16")) + other


def test_columns_are_models_where_there_are_several_and_missing_cells_are_dashes() -> None:
    (sheet,) = paper_sheets(sections(two_models()))
    assert sheet.header == ("scheme", "method", "ref-llama-14m", "opt-125m")
    lines = [[cell.text for cell in line.cells] for line in sheet.lines]
    assert lines[0][:2] == ["FP", "full-precision"]
    assert [line[:2] for line in lines[1:3]] == [["W4A4", "rtn"], ["", "smoothquant"]]
    w3 = next(line for line in lines if line[0] == "W3A16")
    assert w3[2] != "—" and w3[3] == "—"


def test_columns_are_schemes_for_one_model() -> None:
    (sheet,) = paper_sheets(sections(make_run()))
    assert sheet.header == ("method", "W4A4", "W3A16")
    full = sheet.lines[0].cells
    assert full[0].text == "full-precision" and full[1] == full[2]
    assert [line.cells[1].mark for line in sheet.lines[1:]] == [None, None, "second", "best"]


def test_accuracies_stand_together_with_their_average_in_percent() -> None:
    sheets = paper_sheets(sections(make_run(tasks=7)))
    tasks = sheets[-1]
    assert tasks.header == (
        "scheme",
        "method",
        "piqa",
        "arc_easy",
        "hellaswag acc_norm",
        "winogrande",
        "tasks average",
    )
    row = next(line for line in tasks.lines if line.cells[1].text == "affinequant")
    values = [float(cell.text) for cell in row.cells[2:]]
    assert values[-1] == pytest.approx(sum(values[:4]) / 4, abs=0.006) and values[0] > 1


def test_one_model_under_two_contracts_has_two_columns() -> None:
    rows = make_run(("W4A4",))
    other = [row.model_copy(update={"contract": "e" * 64, "id": row.id[::-1]}) for row in rows]
    (sheet,) = paper_sheets(sections([*rows, *other]), columns="models")
    assert sheet.header[2:] == ("ref-llama-14m (3f9a1c)", "ref-llama-14m (eeeeee)")


def test_unknown_metric_columns_format_and_layout_are_refused() -> None:
    found = sections(make_run())
    with pytest.raises(ConfigError, match="wikitext2/perplexity"):
        paper_sheets(found, metrics=["wikitext2/perplexty"])
    with pytest.raises(ConfigError, match="models"):
        paper_sheets(found, columns="model")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="markdown"):
        render(found, "markdwn")
    with pytest.raises(ConfigError, match="leaderboard"):
        render(found, layout="leaderbord")


@pytest.mark.parametrize("width", [200, 100, 70, 50])
def test_a_sheet_never_cuts_a_number_and_always_fits(width: int) -> None:
    sheets = leaderboard_sheets(sections(make_run(tasks=7)))
    text = as_text(sheets, width=width)
    tables = [line for line in text.splitlines() if re.match(r"(FP|W\dA\d+) ", line)]
    assert max(map(len, tables)) <= width
    for sheet in sheets:
        for line in sheet.lines:
            for cell in line.cells:
                assert cell.text in text


def test_a_sheet_never_cuts_a_header_at_any_width() -> None:
    sheets = [*leaderboard_sheets(sections(make_run())), GOLDEN]
    for width in range(60, 121):
        lines = as_text(sheets, width=width).splitlines()
        found = [line for line in lines if line.startswith(("scheme", "method"))]
        assert max(map(len, found)) <= width
        for title in (title for sheet in sheets for title in sheet.header):
            assert any(title in line for line in found), (width, title)


def test_leaderboard_dims_dominated_rows_and_drops_empty_columns() -> None:
    rows = [baseline(), make_result("rtn", extra=0.5, cost={"seconds": 1.0}), make_result("awq", extra=0.1)]
    (sheet,) = leaderboard_sheets(sections(rows))
    dim = {line.cells[1].text: line.dim for line in sheet.lines}
    assert dim == {"full-precision": True, "awq ●": False, "rtn": True}
    plain = [
        row.model_copy(update={"cost": row.cost.model_copy(update={"peak_gpu_bytes": None})}) for row in rows
    ]
    (sheet,) = leaderboard_sheets(sections(plain))
    assert "GPU GiB" not in sheet.header


def test_an_accuracy_that_guessing_explains_says_so() -> None:
    def tasks(chance: float) -> dict:
        return {"t/acc": accuracy(1, chance, "t").model_copy(update={"chance": 0.5})}

    found = sections([make_result("good", metrics=tasks(0.9)), make_result("guess", metrics=tasks(0.5))])
    text = render(found, width=120)
    (good,) = re.findall(r"good.*?([\d.]+°?) ±", text)[:1]
    (guess,) = re.findall(r"guess .*?([\d.]+°?) ±", text)[:1]
    assert not good.endswith("°") and guess.endswith("°") and "° not shown to be above what" in text
    assert r"$^\circ$" in render(found, "latex")


def test_latency_has_a_column_where_a_record_has_one() -> None:
    fields = {"n": 1, "protocol": "one token, batch 1", "unit": "ms", "items": None}
    metrics = {
        "wikitext2/perplexity": perplexity(window_losses(1)),
        "decode/latency_ms": perplexity([0.0, 0.0], value=7.25, **fields),
    }
    (sheet,) = leaderboard_sheets(sections([make_result("rtn", metrics=metrics)]))
    assert sheet.header[3] == "decode latency_ms" and sheet.lines[0].cells[3].text == "7.250"


def test_names_and_notes_from_records_cannot_break_a_table() -> None:
    evil = "a|b\n\n<script>& $x_1$ \\input{/etc/passwd} %"
    rows = [make_result(evil, notes=[evil]), make_result("rtn", metrics={"t/acc": accuracy(1, 0.5, evil)})]
    found = sections(rows)
    markdown, latex = render(found, "markdown"), render(found, "latex")
    assert "<script>" not in markdown and "a\\|b \\<script\\>" in markdown
    assert r"\input{" not in latex and r"\textbackslash{}input\{" in latex
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert line.endswith("|") and len(re.findall(r"(?<!\\)\|", line)) >= 3


def test_csv_has_every_row_once_with_what_was_computed() -> None:
    import csv
    import io

    rows = list(csv.DictReader(io.StringIO(render(sections(two_models()), "csv"))))
    assert len(rows) == 14 and len({row["id"] for row in rows}) == 14
    best = next(r for r in rows if r["method"] == "affinequant" and r["scheme"] == "W4A4")
    assert best["pareto"] == "front" and 0.8 < float(best["recovery"]) < 1
