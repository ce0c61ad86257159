"""The references of the methods in a report, as BibTeX: whoever prints our table cites their papers."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files


def references(methods: Iterable[str]) -> str:
    """BibTeX entries of the methods in a report (compositions cite each part), and of qbench itself."""
    wanted = {part for method in methods for part in method.split("+")}
    text = (files("qbench.reports") / "references.bib").read_text(encoding="utf-8")
    entries = [entry.strip() for entry in text.split("\n\n") if entry.strip().startswith("@")]
    return "\n\n".join(entry for entry in entries if _method_of(entry) in {*wanted, "qbench"}) + "\n"


def _method_of(entry: str) -> str:
    """The citation key begins with the method's registered name: `gptq:frantar2022`."""
    return entry.partition("{")[2].partition(",")[0].partition(":")[0]
