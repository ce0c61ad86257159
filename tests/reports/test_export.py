import csv
import io
import json
import re

import pytest
from fake_results import baseline, make_result, make_run

from qbench.reports.comparison import compare


def test_json_is_an_array_of_rows_one_per_result() -> None:
    results = make_run()
    assert json.loads(compare(results).render("json")) == [result.row() for result in results]


def test_csv_reads_back_at_full_precision_with_one_line_per_result() -> None:
    results = make_run(tasks=3)
    comparison = compare(results)
    read = list(csv.DictReader(io.StringIO(comparison.render("csv"))))
    assert [line["id"] for line in read] == [result.id for result in results]
    for line, result in zip(read, results, strict=True):
        assert float(line["wikitext2/perplexity"]) == result.metrics["wikitext2/perplexity"].value
        assert float(line["bits_per_weight"]) == result.bits_per_weight
    affine = next(line for line in read if (line["method"], line["scheme"]) == ("affinequant", "W4A4"))
    score = comparison.tables[0].blocks[0].rows[4].scores["wikitext2/perplexity"]
    assert float(affine["wikitext2/perplexity ratio"]) == score.ratio
    assert float(affine["wikitext2/perplexity ratio_half_width_95"]) == score.ratio_half_width
    assert affine["wikitext2/perplexity mark"] == "best"


def test_csv_leaves_the_missing_empty() -> None:
    read = list(
        csv.DictReader(io.StringIO(compare([baseline(), make_result("rtn", metrics={})]).render("csv")))
    )
    assert read[1]["wikitext2/perplexity"] == "" and read[0]["peak_gpu_bytes"] == ""


def test_markdown_has_as_many_cells_in_every_line_and_bold_for_the_best() -> None:
    text = compare(make_run(tasks=2)).render("markdown")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 10
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {len(re.split(r"\|", rows[1]))}
    assert "| **28.23** ±4.59 |" in next(row for row in rows if "affinequant" in row)
    assert sum("**" in row for row in rows) == 2
    assert "bits/weight" in rows[0]


def test_markdown_escapes_what_would_be_markup() -> None:
    text = compare([baseline(), make_result("a|b", notes=["x*y_z|"], model="ref-llama-14m")]).render(
        "markdown"
    )
    assert r"a\|b" in text and r"x\*y\_z\|" in text


def test_markdown_renders_as_one_table() -> None:
    """By a Markdown implementation (rich depends on it)."""
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(compare(make_run()).render("markdown"))
    assert html.count("<table>") == 1 and html.count("<tr>") == 11
    assert "<strong>28.23</strong> ±4.59" in html
    assert "omniquant [1]" in html and "<br" in html


def test_latex_is_balanced_and_escaped() -> None:
    run = [
        row.model_copy(update={"model": "a_b", "notes": ["50% of $x_1 & #2 {~^\\}"]})
        for row in make_run(tasks=2)
    ]
    text = compare(run).render("latex")
    tabular = text[text.index(r"\begin{tabular}") : text.index(r"\end{tabular}")]
    n_columns = len(re.search(r"\{tabular\}\{([lr]+)\}", tabular)[1])
    body = [line for line in tabular.splitlines() if line.endswith(r"\\")]
    assert len(body) == 11
    assert {len(re.split(r"(?<!\\)&", line)) for line in body} == {n_columns}
    assert tabular.count(r"\midrule") == 2 and r"\toprule" in tabular and r"\bottomrule" in tabular
    assert r"\textbf{28.23} $\pm$4.59" in tabular
    assert r"50\% of \$x\_1 \& \#2 \{\textasciitilde{}\textasciicircum{}\textbackslash{}\}" in text
    assert not re.search(r"[±≈÷↓↑—∞]", text)
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
