"""docs/methods: one page per method, with all that it owes its reader; its published numbers are the shipped ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qbench.methods import METHODS
from qbench.reports.published import cells

PAGES = Path(__file__).resolve().parents[1] / "docs" / "methods"
PUBLISHED_AS = {
    "rtn": "RTN",
    "smoothquant": "SmoothQuant",
    "omniquant": "OmniQuant",
    "affinequant": "AffineQuant",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "abq": "ABQ-LLM",
}
SHIPPED = [name for name in METHODS.names() if METHODS.load(name).__module__.startswith("qbench.")]


def sections(name: str) -> dict[str, str]:
    """Text below each heading of a method's page."""
    parts = re.split(r"^## (.+)$", (PAGES / f"{name}.md").read_text(), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> list[list[list[str]]]:
    """Cells of the Markdown tables in a text, their rules left out."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    return [
        [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in table.splitlines()
            if "--" not in line
        ]
        for table in found
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_page_has_paper_computation_differences_published_and_measured_numbers(name: str) -> None:
    page = sections(name)
    assert METHODS.load(name).paper in page[""], "the paper that the method names"
    assert len(page["What is computed"].split()) > 50
    (differences,) = (text for heading, text in page.items() if heading.startswith("Differences"))
    assert all(len(row) == 3 and all(row) for row in tables(differences)[0]), "theirs, ours, and why"
    assert page["Published numbers"].strip()
    measured = page["Measured numbers"]
    assert re.search(r"^```console\n\$ (qbench|python) ", measured, flags=re.MULTILINE) and tables(measured)


@pytest.mark.parametrize("name", SHIPPED)
def test_published_numbers_are_those_that_are_shipped(name: str) -> None:
    known = {(c.method, c.model, c.scheme, c.dataset, c.printed) for c in cells() if c.metric == "ppl"}
    of_method = {cell for cell in known if cell[0] == PUBLISHED_AS.get(name)}
    found = tables(sections(name)["Published numbers"])
    assert bool(of_method) == bool(found)
    for head, *rows in found:
        for row in rows:
            scheme, _, text = row[0].partition(", ")
            scheme = re.match(r"[\w*]+", scheme)[0]
            for model, value in zip(head[1:], row[1:], strict=True):
                if value not in ("–", "—"):
                    method = "FP16" if scheme == "FP16" else PUBLISHED_AS[name]
                    dataset = {"": "wikitext2", "WikiText-2": "wikitext2", "C4": "c4"}[text]
                    assert (method, model.lower(), scheme, dataset, value) in known, (model, row[0])
