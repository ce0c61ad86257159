"""How well `qbench plan` predicts: time and peak memory of a sweep's worker, predicted and then measured.

    python benchmarks/plan.py SWEEP.yaml [further options of `qbench sweep`: --model, --calib-dataset, --eval, …]

Wall time is that of the workers, from the start of each process to its end; peak memory is the largest that any record
reports. Nothing else should run on the machine. Exit status 1 beyond 30% of time or 15% of memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qbench.results import ResultStore

REPO = Path(__file__).resolve().parent.parent
TIME, MEMORY = 0.30, 0.15


def qbench(*arguments: str) -> tuple[str, str]:
    env = os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qbench", *arguments], env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout, done.stderr


def seconds_of(text: str) -> float:
    """`1m30s`, `12.3s` as the log prints it."""
    total = 0.0
    for unit, size in (("h", 3600.0), ("m", 60.0), ("s", 1.0)):
        head, mark, rest = text.partition(unit)
        if mark:
            total, text = total + float(head) * size, rest
    return total


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="qbench-plan-") as name:
        arguments = [*sys.argv[1:], "--output", str(Path(name, "out"))]
        began = time.perf_counter()
        predicted = json.loads(qbench("plan", *arguments, "--format", "json")[0])["total"]
        probing = time.perf_counter() - began
        _, log = qbench("sweep", *arguments)
        lines = [line for line in log.splitlines() if line.startswith("[")]
        # The first line is printed when the worker is started, the last when the last cell is settled.
        measured = seconds_of(lines[-1][1:].partition("]")[0]) - seconds_of(lines[0][1:].partition("]")[0])
        rows = ResultStore(Path(name, "out")).load_all()
        cpu = max(row.cost.peak_cpu_bytes or 0 for row in rows)
        gpu = max(row.cost.peak_gpu_bytes or 0 for row in rows)
    errors = {
        "wall time": (predicted["seconds"], measured, TIME, "s"),
        "peak memory": (predicted["cpu_bytes"] / 2**20, cpu / 2**20, MEMORY, "MiB"),
    }
    if gpu:
        errors["peak GPU memory"] = (predicted["gpu_bytes"] / 2**20, gpu / 2**20, MEMORY, "MiB")
    print(f"probing took {probing:.0f} s")
    for what, (plan, real, _, unit) in errors.items():
        print(f"{what}: predicted {plan:.0f} {unit}, measured {real:.0f} {unit}, {plan / real - 1:+.0%}")
    sys.exit(any(abs(plan / real - 1) > limit for plan, real, limit, _ in errors.values()))


if __name__ == "__main__":
    main()
