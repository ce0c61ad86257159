"""Latency of the leaderboard: what `qbench bench --end-to-end` measured, joined to the rows that it is of.

How fast a row decodes follows from its model, its scheme and what it does at run time, not from its integers: a speed
measured with rounded-to-nearest codes is that of every row of this scheme whose transforms were folded into the
weights. A row with work left at run time has a speed only from its own checkpoint (`--checkpoint`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qbench.errors import DataError
from qbench.latency import Report, Speed
from qbench.results import Metric, Result

METRIC = "latency_ms"


def with_latency(rows: Iterable[Result], reports: Sequence[Report]) -> list[Result]:
    """The rows, those that were timed with a metric `decode/latency_ms`: milliseconds per step, the fastest there is.

    Args:
        rows: From any store; not changed.
        reports: Of `qbench bench`, on one device.

    Raises:
        DataError: If the reports are of several devices, or none has a speed of a whole model.
    """
    speeds = [speed for report in reports for speed in report.speeds]
    devices = list(dict.fromkeys(report.device for report in reports if report.speeds))
    if not speeds:
        raise DataError(
            "The reports of `qbench bench` have no speed of a whole model. Measure one with "
            "`qbench bench --end-to-end --model MODEL --scheme SCHEME`."
        )
    if len(devices) > 1:
        raise DataError(
            f"Latencies of several devices ({'; '.join(devices)}): give the reports of one of them."
        )
    workloads = list(dict.fromkeys(_workload(speed) for speed in speeds))
    return [_joined(row, speeds, workloads, devices[0]) for row in rows]


def _joined(
    row: Result, speeds: Sequence[Speed], workloads: Sequence[tuple[int, int, int]], device: str
) -> Result:
    metrics, notes = dict(row.metrics), list(row.notes)
    for workload in workloads:
        found = [speed for speed in speeds if _workload(speed) == workload and _is_of(speed, row)]
        if not found:
            continue
        best = min(found, key=step_ms)
        batch, prompt, new = workload
        name = "decode" if len(workloads) == 1 else f"decode {batch}×{prompt}+{new}"
        metrics[f"{name}/{METRIC}"] = Metric(
            value=step_ms(best),
            n=new,
            unit="ms",
            protocol=f"one step of {batch} sequence{'s' if batch > 1 else ''} behind {prompt} tokens, by the fastest "
            f"backend; {device}",
        )
        graphed = ", one CUDA graph a step" if best.graphed_tokens_per_s else ""
        way = "unquantized" if best.backend == "none" else f"by {best.backend}"
        notes.append(f"{name} {way} in {best.dtype}{graphed}")
    return row.model_copy(update={"metrics": metrics, "notes": notes})


def _workload(speed: Speed) -> tuple[int, int, int]:
    return speed.batch, speed.prompt_tokens, speed.new_tokens


def step_ms(speed: Speed) -> float:
    """Milliseconds of one decoding step, replayed as a graph where that was measured."""
    return 1000 * speed.batch / max(speed.decode_tokens_per_s, speed.graphed_tokens_per_s or 0.0)


def _is_of(speed: Speed, row: Result) -> bool:
    if _last(speed.model) != _last(row.model):
        return False
    if row.is_baseline:
        return speed.backend == "none"
    if speed.backend == "none" or speed.scheme != row.scheme_label:
        return False
    if speed.checkpoint is not None:
        return speed.checkpoint == row.checkpoint
    return all(transform.foldable for transform in row.transforms)


def _last(name: str) -> str:
    """A model's name without its folders or organization: both sides name it as their command line did."""
    return name.rstrip("/").rpartition("/")[2]
