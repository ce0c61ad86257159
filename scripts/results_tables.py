"""Print the tables of docs/results.md from result folders, so that no figure there is typed by hand.

    python scripts/results_tables.py RESULTS
    python scripts/results_tables.py RESULTS METHOD     # one method's table, as in docs/methods/METHOD.md

RESULTS holds one folder per run of the two experiment files: methods-MODEL, parity-legal-MODEL and
parity-published-MODEL for each reference model. Repeated parity runs have a suffix (parity-legal-MODEL-2) and are
averaged; cells that were run with the auxiliary loss as well lie in parity-aug-…, with 40 epochs in parity-40-….
The authors' figures are experiments/reference-authors.csv.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Mapping, Sequence
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
        if len(values) - list(values.values()).count(None) < 2:
            continue
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


def quotient(row: Result, other: Result) -> tuple[float, float, bool]:
    """One row's perplexity over another's, half of its paired 95% interval, and whether that holds 1."""
    gap = paired_difference(row.metrics[METRIC].items or [], other.metrics[METRIC].items or [])
    assert gap is not None
    ratio = math.exp(gap.mean)
    return ratio, ratio * gap.half_width, gap.low <= 0 <= gap.high


def method_table(models: Mapping[str, Sequence[Result]], method: str) -> list[str]:
    """Perplexity of a method, and with another rounding behind it, on each model; the quotient to full precision."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for model, rows in models.items():
        baseline = next(row for row in rows if row.is_baseline)
        for row in rows:
            if method == row.method.partition("+")[0]:
                ratio, half, _ = quotient(row, baseline)
                cell = f"{row.metrics[METRIC].value:.2f} | {ratio:.3f} ±{half:.3f}"
                found.setdefault((row.method, row.scheme_label), {})[model] = cell
    plain = [*SCHEMES, *(scheme.replace("W2", "W2*") for scheme in SCHEMES)]
    order = sorted(found, key=lambda key: (rank(key[0]), plain.index(key[1])))
    return [
        f"| | scheme | {' | '.join(f'{model} | ÷ FP' for model in models)} |",
        f"|:--|:--|{'--:|--:|' * len(models)}",
        *(
            f"| {name} | {scheme.replace('*', chr(92) + '*')} | "
            + " | ".join(found[name, scheme].get(model, "— | —") for model in models)
            + " |"
            for name, scheme in order
        ),
    ]


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
            beside_each += 1
            ratio, half, tied = quotient(row, other)
            cells += [
                f"{other.metrics[METRIC].value:.2f}",
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


def star_report(rows: Sequence[Result]) -> list[str]:
    """One line per scheme on which a method was run with the fifth level and without: what it is worth."""
    lines = []
    for row in rows:
        if row.scheme_label == row.scheme:
            continue
        for other in rows:
            if (other.method, other.scheme_label, other.contract) == (row.method, row.scheme, row.contract):
                ratio, half, tied = quotient(row, other)
                lines.append(
                    f"* {row.method} {row.scheme_label} {row.metrics[METRIC].value:.2f} against "
                    f"{row.scheme} {other.metrics[METRIC].value:.2f}: ÷ {ratio:.3f} ±{half:.3f}{' ≈' if tied else ''}"
                )
    return lines


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
            for kind, remark in (("", ""), ("aug-", ", auxiliary loss"), ("40-", ", 40 epochs")):
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
    """Print everything, or one method's table."""
    folder = Path(sys.argv[1])
    models = {
        path.name.removeprefix("methods-"): sorted(
            ResultStore(path).load_all(), key=lambda row: (SCHEMES.index(row.scheme), rank(row.method))
        )
        for path in sorted(folder.glob("methods-*"))
    }
    if len(sys.argv) > 2:
        print("\n".join(method_table(models, sys.argv[2])))
        return
    for model, rows in models.items():
        print(f"## {model}\n")
        print(compare(rows).render("markdown"))
        print("\nPublished order RTN ≥ SmoothQuant ≥ OmniQuant ≥ AffineQuant in perplexity:\n")
        print("\n".join(order_report(rows)), "\n")
        if lines := star_report(rows):
            print("The fifth level (W2*) against four:\n")
            print("\n".join(lines).replace("*A", "\\*A"), "\n")
        if table := rounding_table(rows):
            print("GPTQ against rounding to nearest under the same transform, linear by linear:\n")
            print("\n".join(table), "\n")
    print("## Against the authors' code\n")
    print("\n".join(parity_table(folder)))


if __name__ == "__main__":
    main()
