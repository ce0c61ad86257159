"""The table of `qbench plan`: every cell's blocks, time and disk, every pass's peak memory, and the sums."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from qbench.reports.columns import MISSING, format_seconds


def print_plans(
    plans: Sequence[Any], workers: int, form: str, checked_s: float = 0.0, counted: str | None = None
) -> None:
    """Print plans to stdout, as a table or as JSON.

    Args:
        plans: Of every pass.
        workers: How many are computed at once.
        form: `table` or `json`.
        checked_s: What this command took to check the sweep: a sweep takes as long, while its first worker starts.
        counted: What `workers` was counted by, where that is not plain.
    """
    seconds = max([sum(plan.seconds for plan in plans) / workers, *(plan.seconds for plan in plans)])
    seconds += max(0.0, checked_s - plans[0].import_s)
    total = {
        "seconds": seconds,
        "workers": workers,
        "workers_counted_by": counted,
        "cpu_bytes": max(plan.cpu_bytes for plan in plans) * min(workers, len(plans)),
        "checked_s": checked_s,
        "gpu_bytes": max((plan.gpu_bytes or 0 for plan in plans), default=0) or None,
        "disk_bytes": sum(plan.disk_bytes for plan in plans),
    }
    if form == "json":
        click.echo(
            json.dumps({"passes": [plan.as_json()["plan"] for plan in plans], "total": total}, indent=1)
        )
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    on_gpu = any(plan.gpu_bytes is not None for plan in plans)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cell", overflow="fold")
    for name in ("blocks", "quantize", "evaluate", "memory", *["GPU"] * on_gpu, "disk"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        gpu = MISSING if plan.gpu_bytes is None else size(plan.gpu_bytes)
        for cell in plan.cells:
            if cell.stored:
                table.add_row(cell.label, "stored", style="dim")
                continue
            cost = (_seconds(cell.quantize_s), _seconds(cell.evaluate_s))
            peaks = [size(plan.cpu_bytes), *[gpu] * on_gpu]
            table.add_row(cell.label, str(cell.blocks), *cost, *peaks, size(cell.disk_bytes))
        shared = f"{plan.model}: start, full precision" + (f", {plan.parts} passes" if plan.parts > 1 else "")
        whole = _seconds(plan.start_s + plan.shared_s)
        table.add_row(shared, "", whole, _seconds(plan.baseline_s), style="italic", end_section=True)
    Console().print(table)
    click.echo(
        f"{len(plans)} pass{'es' * (len(plans) > 1)}, {workers} at a time: {_seconds(seconds)}, "
        f"peak memory {size(total['cpu_bytes'] or 0)}, disk {size(total['disk_bytes'] or 0)}"
    )

    for note in dict.fromkeys([*filter(None, [counted]), *(note for plan in plans for note in plan.notes)]):
        click.echo(f"note: {note}")


def _seconds(value: float) -> str:
    return format_seconds(value) if value > 0 else MISSING


def size(n_bytes: float) -> str:
    """Bytes as people read them."""
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.2f} GiB"
