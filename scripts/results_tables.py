"""Print the tables of docs/results.md from result folders, so that no figure there is typed by hand.

    python scripts/results_tables.py RESULTS

RESULTS holds one folder per run of the two experiment files: methods-MODEL, parity-legal-MODEL and
parity-published-MODEL for each reference model. Repeated parity runs have a suffix (parity-legal-MODEL-2) and are
averaged; cells that were run with the auxiliary loss as well lie in parity-aug-…. The authors' figures are
experiments/reference-authors.csv.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev

from qbench.reports.comparison import compare
from qbench.reports.stats import paired_difference
from qbench.results import Result, ResultStore

ORDER = ("rtn", "smoothquant", "omniquant", "affinequant")  # as published: each below the one before
OTHERS = (
    "abq",
    "signround",
    "gptq",
    "smoothquant+gptq",
    "omniquant+gptq",
    "affinequant+gptq",
    "awq",
    "awq+gptq",
)
SCHEMES = ("W16A16", "W4A16g128", "W3A16g128", "W3A16", "W2A16g64", "W4A4", "W6A6", "W2A8")
METRIC = "wikitext2/perplexity"
GPTQ, NEAREST = "gptq", "rtn"
ERROR, ERROR_NEAREST = "output_error.", "output_error_nearest."  # what gptq's rows hold of every linear
TOLERANCE = 1.01
AUTHORS = Path(__file__).parent.parent / "experiments" / "reference-authors.csv"


def rank(method: str) -> int:
    """Place in a table: the baseline, the published order, the others."""
    return (*ORDER, *OTHERS).index(method) if method in ORDER + OTHERS else -1


def perplexity(rows: Sequence[Result], method: str, scheme: str) -> float | None:
    """Of one row, if it is there."""
    for row in rows:
        if (row.method, row.scheme) == (method, scheme):
            return row.metrics[METRIC].value
    return None


def order_report(rows: Sequence[Result]) -> list[str]:
    """One sentence per scheme: whether the published order RTN ≥ SmoothQuant ≥ OmniQuant ≥ AffineQuant holds."""
    sentences = []
    for scheme in dict.fromkeys(row.scheme for row in rows if not row.is_baseline):
        values = {method: perplexity(rows, method, scheme) for method in ORDER}
        breaks = [
            f"{worse} {values[worse]:.2f} < {better} {values[better]:.2f}"
            for worse, better in pairwise(ORDER)
            if values[worse] is not None and values[better] is not None and values[worse] < values[better]
        ]
        sentences.append(f"* {scheme}: " + ("does not hold: " + "; ".join(breaks) if breaks else "holds"))
    return sentences


def weight_errors(row: Result) -> dict[str, float]:
    """GPTQ's error of every linear over that of rounding to nearest, by `block.role`.

    The error is tr(ΔHΔᵀ), Δ the change of the folded weight and H the second moment of the linear's input on the
    quantized path. Both roundings have weight, H, bits, groups and clipping in common; nearest has the folded weight's
    ranges, and so has GPTQ but for groups without clipping, whose ranges it reads again as it goes.
    """
    return {
        f"{block.index}.{role}": error / block.extras[ERROR_NEAREST + role]
        for block in row.blocks
        for key, error in block.extras.items()
        if (role := key.removeprefix(ERROR)) != key and block.extras[ERROR_NEAREST + role] > 0
    }


def rounding_table(rows: Sequence[Result]) -> list[str]:
    """GPTQ beside rounding to nearest under every transform: errors of the linears, then perplexity.

    The perplexity's neighbour is the row of the transform alone. A learned transform is fitted once for each of the two
    rows, so there the perplexities belong to two fits; the errors of the linears to one.
    """
    lines = [
        "| transform | scheme | linears | not below | median ÷ | worst ÷ | at | ppl nearest | ppl GPTQ | ÷ |",
        "|:--|:--|--:|--:|--:|--:|:--|--:|--:|--:|",
    ]
    linears, beside_each, above, worse = 0, 0, [], []
    for row in rows:
        under, _, rounding = row.method.rpartition("+")
        ratios = weight_errors(row) if rounding == GPTQ else {}
        if not ratios:
            continue
        worst = max(ratios, key=lambda at: ratios[at])
        lost = [at for at, ratio in ratios.items() if not ratio < 1]
        linears += len(ratios)
        above += [f"{row.method} {row.scheme} {at} ({ratios[at]:.3f})" for at in lost]
        own = row.metrics[METRIC]
        cells = [
            under or "none",
            row.scheme,
            str(len(ratios)),
            str(len(lost)),
            f"{median(ratios.values()):.3f}",
        ]
        cells += [f"{ratios[worst]:.3f}", worst]
        other = next((r for r in rows if (r.method, r.scheme) == (under or NEAREST, row.scheme)), None)
        if other is None or other.contract != row.contract:
            cells += ["—", f"{own.value:.2f}", "—"]
        else:
            beside = other.metrics[METRIC]
            beside_each += 1
            gap = paired_difference(own.items or [], beside.items or [])
            assert gap is not None
            ratio, half = math.exp(gap.mean), math.exp(gap.mean) * gap.half_width
            tied = gap.low <= 0 <= gap.high
            cells += [
                f"{beside.value:.2f}",
                f"{own.value:.2f}",
                f"{ratio:.3f} ±{half:.3f}{' ≈' if tied else ''}",
            ]
            if ratio > 1:
                worse.append(f"{under or 'none'} {row.scheme} ({ratio:.3f}{', ≈' if tied else ''})")
        lines.append(f"| {' | '.join(cells)} |")
    if linears:
        lines += [
            "",
            f"Weight error: GPTQ is below rounding to nearest in {linears - len(above)} of {linears} linears"
            + (f"; not in {', '.join(above)}." if above else "."),
            f"Perplexity: GPTQ is below in {beside_each - len(worse)} of {beside_each} rows"
            + (f"; not at {', '.join(worse)}." if worse else "."),
        ]
    return lines if linears else []


def repeats(folder: Path, name: str, method: str, scheme: str) -> list[float]:
    """Perplexities of one cell over all folders whose name begins with `name`: a GPU's runs differ."""
    found = [
        perplexity(ResultStore(path).load_all(), method, scheme) for path in sorted(folder.glob(f"{name}*"))
    ]
    return [value for value in found if value is not None]


def spread(values: Sequence[float]) -> str:
    """Mean, and with several runs their standard deviation and number."""
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f} ({len(values)})" if len(values) > 1 else "")


def parity_table(folder: Path) -> list[str]:
    """The authors' figures beside both forms of ours."""
    lines = [
        "| model | method | scheme | authors' code | published form | ÷ | preserving form | ÷ | within 1% or below |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    with AUTHORS.open() as file:
        for cell in csv.DictReader(file):
            theirs = float(cell["perplexity"])
            for kind, remark in (("", ""), ("aug-", ", auxiliary loss")):
                shown, good, found = [], True, False
                for form in ("published", "legal"):
                    runs = repeats(
                        folder, f"parity-{kind}{form}-{cell['model']}", cell["method"], cell["scheme"]
                    )
                    shown += [spread(runs), f"{fmean(runs) / theirs:.3f}"] if runs else ["—", "—"]
                    good = good and bool(runs) and fmean(runs) <= TOLERANCE * theirs
                    found = found or bool(runs)
                if found or not kind:
                    verdict = "yes" if good else "no"
                    name = f"{cell['model']} | {cell['method']} | {cell['scheme']}{remark}"
                    lines.append(f"| {name} | {theirs} | {' | '.join(shown)} | {verdict} |")
    return lines


def main() -> None:
    """Print everything."""
    folder = Path(sys.argv[1])
    for path in sorted(folder.glob("methods-*")):
        rows = sorted(
            ResultStore(path).load_all(), key=lambda row: (SCHEMES.index(row.scheme), rank(row.method))
        )
        print(f"## {path.name.removeprefix('methods-')}\n")
        print(compare(rows).render("markdown"))
        print("\nPublished order RTN ≥ SmoothQuant ≥ OmniQuant ≥ AffineQuant in perplexity:\n")
        print("\n".join(order_report(rows)), "\n")
        if table := rounding_table(rows):
            print("GPTQ against rounding to nearest under the same transform, linear by linear:\n")
            print("\n".join(table), "\n")
    print("## Against the authors' code\n")
    print("\n".join(parity_table(folder)))


if __name__ == "__main__":
    main()
