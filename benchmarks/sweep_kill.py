"""Kill a sweep with SIGKILL at random moments, start it again each time, and compare with an undisturbed one's store.

    python benchmarks/sweep_kill.py [--kills 10] [--model tiny-llama] [--seed 0] [--both]

Each is killed at a random moment after it has begun to write. The sweep's own process is killed, its workers end by
themselves a moment later. What is compared is every field of every record but times, peaks of memory and the moment.
`--both`: two sweeps write one store at once, and both are killed. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qbench.results import ResultStore
from qbench.verification import without_times

REPO = Path(__file__).resolve().parent.parent
SWEEP = """
methods: [rtn, smoothquant, {name: omniquant, options: {epochs: 2}}, {name: affinequant, options: {epochs: 2}}]
schemes: [W4A4, W3A16]
calibration: {n_samples: 4, seq_len: 64}
evals: {limit: 4, seq_len: 64}
"""


def command(file: Path, output: Path, model: str) -> list[str]:
    return [
        sys.executable, "-m", "qbench", "sweep", str(file), "--model", model, "--output", str(output),
        "--retry-failed",
    ]  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)


def progress(output: Path) -> tuple[int, int]:
    """Records and finished blocks."""
    return len(list(output.glob("*.json"))), len(list(output.glob("checkpoints/*/block-*.safetensors")))


def watched(run: subprocess.Popen[bytes], output: Path, delay: float | None) -> float:
    """Wait until a sweep writes its first block or record, then `delay` seconds more; None: until it ends.

    Returns:
        Seconds since that first writing.
    """
    before = progress(output)
    while run.poll() is None and progress(output) == before:
        time.sleep(0.02)
    began = time.perf_counter()
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(delay)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--both", action="store_true")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="qbench-kill-") as name:
        folder = Path(name)
        file = folder / "sweep.yaml"
        file.write_text(SWEEP)
        whole, killed = folder / "whole", folder / "killed"
        first = start(command(file, whole, options.model))
        seconds = watched(first, whole, None)
        assert first.returncode == 0
        print(
            f"undisturbed: {progress(whole)[0]} records, {seconds:.0f} s from the first block to the end",
            flush=True,
        )
        for kill in range(options.kills):
            runs = [start(command(file, killed, options.model)) for _ in range(1 + options.both)]
            watched(runs[0], killed, draw.uniform(0, seconds / options.kills))
            ended = [run.poll() is not None for run in runs]
            for run in runs:
                run.send_signal(signal.SIGKILL)
                run.wait()
            records, blocks = progress(killed)
            late = ", it had ended already" if all(ended) else ""
            print(f"kill {kill + 1}: {records} records, {blocks} blocks on disk{late}", flush=True)
        for run in [start(command(file, killed, options.model)) for _ in range(1 + options.both)]:
            assert run.wait() == 0, "the last sweep did not finish"
        stores = [{row.id: without_times(row) for row in ResultStore(f).load_all()} for f in (whole, killed)]
        same = stores[0] == stores[1]
        left = list(killed.glob("failures/*.json"))
        print(
            f"{len(stores[0])} records, equal field by field but for times: {same}; failures left: {len(left)}"
        )
        sys.exit(0 if same and not left else 1)


if __name__ == "__main__":
    main()
