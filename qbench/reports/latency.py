"""Tables of a kernel benchmark, rendered from its JSON: Markdown for a page, the same rows for a terminal.

Each time stands with its ratio to the unquantized layer of the same round and its share of the roofline; a difference
that the measurement cannot resolve is marked, and what was not timed is listed with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbench.latency import Ceilings, Cell, Report, ShapeSet, Timing, break_even, floor_us, scheme_bytes
from qbench.reports.columns import MISSING
from qbench.scheme import Scheme

UNRESOLVED = "="  # behind a ratio that is within the spread of the same code with itself
NOT_TIMED = {"wrong": "wrong", "refused": MISSING, "failed": "failed", "slow": "slow"}


@dataclass(frozen=True)
class Table:
    """One table with its caption; the first column and those of `words` are text, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: tuple[int, ...] = ()

    def is_text(self, column: int) -> bool:
        """Whether a column is set flush left."""
        return column == 0 or column in self.words


def tables(report: Report) -> list[Table]:
    """All tables of a report, empty ones left out."""
    report = report.model_copy(update={"ceilings": best_rates(report)[0]})
    made = []
    for model in report.models:
        made += [_times(report, model, shape) for shape in model.shapes]
        made += [_blocks(report, model)]
    made += [_break_even(report), _sizes(report), _gates(report), _untimed(report), _speeds(report)]
    return [table for table in made if table.rows]


def as_markdown(report: Report) -> str:
    """The report as a page's part: circumstances, then the tables."""
    pieces = ["  \n".join(circumstances(report))]
    for table in tables(report):
        lines = [f"**{table.title}**", ""]
        lines += [
            _pipes(table.header),
            _pipes(":--" if table.is_text(i) else "--:" for i in range(len(table.header))),
        ]
        lines += [_pipes(cell.replace("|", "\\|") for cell in row) for row in table.rows]
        pieces.append("\n".join(lines))
    return "\n\n".join(pieces) + "\n"


def circumstances(report: Report) -> list[str]:
    """What the numbers were measured with, one sentence each."""
    packages = report.environment.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lines = [f"{report.device}; {versions}.", *(f"`{command}`" for command in report.commands)]
    _, raised = best_rates(report)
    if (c := report.ceilings) is not None:
        peaks = ", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in c.flops.items())
        lines.append(
            f"Measured in the same run: read {c.read_bytes_per_s / 1e12:.3g} TB/s; peak TFLOP/s (int8: TOP/s) {peaks}; "
            f"{'; '.join(c.notes)}."
        )
    if raised:
        lines.append(
            "For the shares, rates that a layer of the tables exceeded are raised to that layer's: "
            + f"{'; '.join(raised)}."
        )
    if report.cells:
        lines.append(
            "A cell: µs with everything that the row needs at run time (in brackets the product alone where that is "
            f"less) · times as fast as the unquantized layer of the same round ({UNRESOLVED}: within the spread of the "
            "same code measured twice, no claim) · share of the roofline."
        )
    of_rows: dict[str, list[str]] = {}
    for s in report.speeds:
        for note in s.notes:
            of_rows.setdefault(note, []).append(f"{s.model} {s.scheme} {s.backend} batch {s.batch}")
    lines += [f"{', '.join(dict.fromkeys(rows))}: {note}." for note, rows in of_rows.items()]
    return [*lines, *report.notes]


def best_rates(report: Report) -> tuple[Ceilings | None, list[str]]:
    """The measured rates, raised to what any timed layer reached, and which ones were raised by what.

    A large product in a loop runs into the GPU's power limit and stays below smaller ones; a share above 100% would
    say nothing.
    """
    ceilings = report.ceilings
    if ceilings is None:
        return None, []
    measured = {"read": ceilings.read_bytes_per_s, **ceilings.flops}
    best = {name: (rate, "") for name, rate in measured.items()}
    for cell in report.cells:
        if cell.layer is None or cell.baseline is None:
            continue
        dense = cell.model_copy(update={"scheme": "W16A16", "backend": "not quantized"})
        for which, timing in ((dense, cell.baseline), (cell, cell.product or cell.layer)):
            seconds = 1e-6 * timing.median_us
            m, n, k = cell.tokens, cell.out_features, cell.in_features
            moved = _least_bytes(which) + 2 * m * (n + k)
            reached = {_operands(which): 2 * m * n * k / seconds}
            if cell.cold:  # or the cache's rate would be taken for the memory's
                reached["read"] = moved / seconds
            for name, rate in reached.items():
                if name in best and rate > best[name][0]:
                    best[name] = (rate, f"{which.scheme} {which.backend}, {n}×{k} at {m}")
    raised = [
        f"{name} {measured[name] / 1e12:.4g} → {rate / 1e12:.4g} ({by})"
        for name, (rate, by) in best.items()
        if by
    ]
    flops = {name: rate for name, (rate, _) in best.items() if name != "read"}
    return ceilings.model_copy(update={"read_bytes_per_s": best["read"][0], "flops": flops}), raised


def _operands(cell: Cell) -> str:
    return cell.dtype if Scheme.parse(cell.scheme).abits >= 16 else "int8"


def _times(report: Report, model: ShapeSet, shape: tuple[int, int]) -> Table:
    roles = ", ".join(role for role, other in model.linears.items() if tuple(other) == tuple(shape))
    cells = [c for c in report.cells if (c.out_features, c.in_features) == tuple(shape)]
    batches = sorted({cell.tokens for cell in cells})
    rows = []
    for dtype in dict.fromkeys(cell.dtype for cell in cells if cell.baseline):
        rows.append(
            [f"{dtype}, not quantized", *(_baseline(report, cells, dtype, tokens) for tokens in batches)]
        )
    for row in _rows(cells):
        found = {cell.tokens: cell for cell in row}
        if any(cell.status != "refused" for cell in row):
            rows.append([_label(row[0]), *(_entry(found.get(tokens), report.ceilings) for tokens in batches)])
    return Table(f"{model.name}, {shape[0]}×{shape[1]} ({roles})", ["", *(f"M = {m}" for m in batches)], rows)


def _rows(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells of one scheme, backend and transform, which differ in their batch."""
    rows: dict[tuple, list[Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.scheme, cell.norm_matrix, cell.backend), []).append(cell)
    order = {scheme: i for i, scheme in enumerate(dict.fromkeys(cell.scheme for cell in cells))}
    return [rows[key] for key in sorted(rows, key=lambda key: (order[key[0]], key[1]))]


def _label(cell: Cell) -> str:
    label = f"{cell.scheme} {cell.backend}" + (" + norm matrix" if cell.norm_matrix else "")
    return label + (" (int8 arithmetic)" if (cell.arithmetic or "").startswith("int8 arithmetic") else "")


def _baseline(report: Report, cells: Sequence[Cell], dtype: str, tokens: int) -> str:
    times = sorted(
        c.baseline.median_us for c in cells if c.dtype == dtype and c.tokens == tokens and c.baseline
    )
    if not times:
        return MISSING
    middle = times[len(times) // 2]
    cell = next(c for c in cells if c.dtype == dtype)
    floor = _floor(cell.model_copy(update={"tokens": tokens, "scheme": "W16A16"}), report.ceilings)
    return _microseconds(middle) + (f" · {floor / middle:.0%}" if floor else "")


def _floor(cell: Cell, ceilings: Ceilings | None) -> float | None:
    operands = _operands(cell)
    if ceilings is None or operands not in ceilings.flops:
        return None
    return floor_us(cell.out_features, cell.in_features, cell.tokens, _least_bytes(cell), ceilings, operands)


def _least_bytes(cell: Cell) -> float:
    scheme = Scheme.parse(cell.scheme)
    groups = cell.in_features // (scheme.group_size or cell.in_features)
    return scheme_bytes(cell.out_features, cell.in_features, scheme.wbits, groups, scheme.symmetric)


def _entry(cell: Cell | None, ceilings: Ceilings | None) -> str:
    if cell is None:
        return MISSING
    if cell.layer is None or cell.ratio is None:
        return NOT_TIMED[cell.status]
    text = _microseconds(cell.layer.median_us)
    if cell.product is not None:
        text += f" ({_microseconds(cell.product.median_us)})"
    text += f" · {cell.ratio:.2f}×" + (UNRESOLVED if cell.claim == "no difference" else "")
    floor = _floor(cell, ceilings)
    return text + (f" · {floor / cell.layer.median_us:.0%}" if floor else "")


def _blocks(report: Report, model: ShapeSet) -> Table:
    """Sum over the linears of one block; roles that read one norm share its matrix."""
    batches = sorted({cell.tokens for cell in report.cells})
    by_key = {cell.key: cell for cell in report.cells}
    kinds = dict.fromkeys((cell.backend, cell.scheme, cell.norm_matrix) for cell in report.cells)
    rows = []
    for backend, scheme, matrix in kinds:
        entries = []
        for tokens in batches:
            plain = {shape: by_key.get((*shape, tokens, backend, scheme, False)) for shape in model.shapes}
            chosen = []
            for role, shape in model.linears.items():
                leads = any(group[0] == role for group in model.norm_groups)
                cell = (
                    by_key.get((*shape, tokens, backend, scheme, True)) if matrix and leads else plain[shape]
                )
                if cell is not None and cell.layer is not None and cell.baseline is not None:
                    chosen.append((cell.layer, cell.baseline))
            entries.append(_sum(chosen) if len(chosen) == len(model.linears) else MISSING)
        if any(entry != MISSING for entry in entries):
            rows.append([f"{scheme} {backend}" + (" + norm matrices" if matrix else ""), *entries])
    return Table(
        f"{model.name}, sum over the {len(model.linears)} linears of one block (of {model.n_blocks})",
        ["", *(f"M = {m}" for m in batches)],
        rows,
    )


def _sum(pairs: Sequence[tuple[Timing, Timing]]) -> str:
    """Time of several layers, and how many times as fast as their baselines they are together."""
    layer, base = (
        [sum(getattr(pair[i], name) for pair in pairs) for name in ("median_us", "first_us", "last_us")]
        for i in (0, 1)
    )
    ratio = base[0] / layer[0]
    spread = max(abs(first - last) / median for median, first, last in (layer, base))
    return f"{_microseconds(layer[0])} · {ratio:.2f}×" + (UNRESOLVED if abs(ratio - 1) <= spread else "")


def _break_even(report: Report) -> Table:
    shapes = list(dict.fromkeys((c.out_features, c.in_features) for c in report.cells))
    rows = []
    for kind in dict.fromkeys((c.scheme, c.norm_matrix, c.backend) for c in report.cells):
        entries, sample = [], None
        for shape in shapes:
            cells = [
                c for c in report.cells
                if (c.scheme, c.norm_matrix, c.backend) == kind and (c.out_features, c.in_features) == shape
            ]  # fmt: skip
            points = [(c.tokens, c.ratio) for c in cells if c.ratio is not None]
            sample = sample or (cells[0] if points else None)
            entries.append(break_even(points))
        if sample is not None:
            rows.append([_label(sample), *entries])
    return Table(
        "Break-even: tokens up to which the row is not slower than the unquantized layer (≈: between measured batches)",
        ["", *(f"{n}×{k}" for n, k in shapes)],
        rows,
    )


def _sizes(report: Report) -> Table:
    rows = []
    for cell in _distinct(report.cells):
        if cell.packed_bytes is None:
            continue
        least, dense = _least_bytes(cell), 2.0 * cell.out_features * cell.in_features
        peaks = [c.peak_bytes for c in report.cells if _kind(c) == _kind(cell) and c.peak_bytes is not None]
        rows.append(
            [
                f"{cell.scheme} {cell.backend}, {cell.out_features}×{cell.in_features}",
                f"{cell.packed_bytes / 1e6:.2f}",
                f"{least / 1e6:.2f}",
                f"{cell.packed_bytes / least:.2f}×",
                f"{dense / cell.packed_bytes:.2f}×",
                f"{max(peaks) / 1e6:.2f}" if peaks else MISSING,
            ]
        )
    header = [
        "",
        "MB packed",
        "MB of the scheme",
        "packed / scheme",
        "16-bit / packed",
        "MB during a call, at most",
    ]
    return Table("Bytes of every buffer after packing", header, rows)


def _kind(cell: Cell) -> tuple:
    return cell.out_features, cell.in_features, cell.backend, cell.scheme


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    found: dict[tuple, Cell] = {}
    for cell in cells:
        if not cell.norm_matrix:
            found.setdefault(_kind(cell), cell)
    return list(found.values())


def _gates(report: Report) -> Table:
    rows = []
    for kind in dict.fromkeys((c.scheme, c.backend) for c in report.cells):
        cells = [c for c in report.cells if (c.scheme, c.backend) == kind and c.error is not None]
        if cells:
            rows.append(
                [
                    " ".join(kind),
                    f"{max(c.error for c in cells if c.error is not None):.1e}",
                    f"{sum(c.status != 'wrong' for c in cells)} of {len(cells)}",
                    cells[0].arithmetic or MISSING,
                ]
            )
    return Table(
        "Correctness gate and arithmetic", ["", "largest relative error", "passed", "what runs"], rows, (3,)
    )


def _untimed(report: Report) -> Table:
    reasons: dict[tuple, list[Cell]] = {}
    for cell in report.cells:
        if cell.status != "timed":
            key = (cell.scheme, cell.backend, cell.norm_matrix, cell.status, cell.message)
            reasons.setdefault(key, []).append(cell)
    rows = [
        [_label(cells[0]), cells[0].status, cells[0].message or MISSING, _where(cells)]
        for cells in reasons.values()
    ]
    return Table("Not timed", ["", "", "why", "where"], rows, (1, 2, 3))


def _where(cells: Sequence[Cell]) -> str:
    places: dict[str, list[str]] = {}
    for cell in cells:
        places.setdefault(f"{cell.out_features}×{cell.in_features}", []).append(str(cell.tokens))
    return "; ".join(f"{shape} at {', '.join(tokens)}" for shape, tokens in places.items())


def _speeds(report: Report) -> Table:
    rows = [
        [
            f"{s.model} {s.scheme} {s.backend} ({s.dtype}, batch {s.batch}, {s.prompt_tokens} + {s.new_tokens} tokens)",
            f"{s.prefill_tokens_per_s:.4g}",
            f"{s.decode_tokens_per_s:.4g}",
            f"{s.graphed_tokens_per_s:.4g}" if s.graphed_tokens_per_s else MISSING,
            f"{s.weight_bytes / 2**30:.3f}",
            f"{s.peak_bytes / 2**30:.3f}" if s.peak_bytes else MISSING,
        ]
        for s in report.speeds
    ]
    header = [
        "",
        "prefill tokens/s",
        "decode tokens/s",
        "decode tokens/s, graphed",
        "weights GiB",
        "peak GiB",
    ]
    return Table("Whole models through transformers", header, rows)


def _microseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
