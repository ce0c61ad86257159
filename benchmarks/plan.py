"""How well `qbench plan` predicts: time and peak memory of a sweep, predicted and then measured.

    python benchmarks/plan.py SWEEP.yaml [--json FILE] [further options of `qbench sweep`: --model, --eval, …]

Wall time is that of the command `qbench sweep`, from its start to its end; peak memory is the largest that any record
reports. Nothing else should run on the machine. Exit status 1 beyond 30% of time or 15% of memory.
"""

from __future__ import annotations

import argparse
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
    paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qbench", *arguments], env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json")
    options, given = parser.parse_known_args()
    found: dict[str, object] = {"command": given}

    def keep(**facts: object) -> None:
        found.update(facts)
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=1))

    with tempfile.TemporaryDirectory(prefix="qbench-plan-") as name:
        arguments = [*given, "--output", str(Path(name, "out"))]
        began = time.perf_counter()
        plan = json.loads(qbench("plan", *arguments, "--format", "json")[0])
        predicted = plan["total"]
        probing = time.perf_counter() - began
        keep(plan=plan, probing_s=probing)
        print(f"probing took {probing:.0f} s; predicted {predicted['seconds']:.0f} s", flush=True)
        began = time.perf_counter()
        _, log = qbench("sweep", *arguments)
        measured = time.perf_counter() - began
        lines = [line for line in log.splitlines() if line.startswith("[")]
        rows = ResultStore(Path(name, "out")).load_all()
        cpu = max(row.cost.peak_cpu_bytes or 0 for row in rows)
        gpu = max(max(row.cost.peak_gpu_bytes or 0, row.cost.evaluation_peak_gpu_bytes or 0) for row in rows)
    stages = {f"{row.method} {row.scheme}": row.cost.stages for row in rows}
    peaks = {f"{row.method} {row.scheme}": [row.cost.peak_cpu_bytes, row.cost.peak_gpu_bytes] for row in rows}
    errors = {
        "wall time": (predicted["seconds"], measured, TIME, "s"),
        "peak memory": (predicted["cpu_bytes"] / 2**20, cpu / 2**20, MEMORY, "MiB"),
    }
    if gpu:
        errors["peak GPU memory"] = (predicted["gpu_bytes"] / 2**20, gpu / 2**20, MEMORY, "MiB")
    keep(log=lines, measured_stages=stages, measured_peaks=peaks, errors=errors)
    for what, (plan_, real, _, unit) in errors.items():
        print(f"{what}: predicted {plan_:.0f} {unit}, measured {real:.0f} {unit}, {plan_ / real - 1:+.0%}")
    sys.exit(any(abs(plan_ / real - 1) > limit for plan_, real, limit, _ in errors.values()))


if __name__ == "__main__":
    main()
