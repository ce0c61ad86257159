"""Kill a sweep with SIGKILL at random moments, start it again each time, and compare with an undisturbed one's store.

    python benchmarks/sweep_kill.py [--kills 10] [--model tiny-llama] [--seed 0] [--both]

The sweep's own process is killed, workers end by themselves a moment later; what is compared is every field of every
record but times, peaks of memory and the moment. `--both`: two sweeps write one store at once, and both are killed.
Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
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
        began = time.perf_counter()
        assert start(command(file, whole, options.model)).wait() == 0
        seconds = time.perf_counter() - began
        print(f"undisturbed: {seconds:.0f} s, {progress(whole)[0]} records")
        for kill in range(options.kills):
            runs = [start(command(file, killed, options.model)) for _ in range(1 + options.both)]
            time.sleep(draw.uniform(0.1, 1.0) * seconds)
            for run in runs:
                run.send_signal(signal.SIGKILL)
                run.wait()
            records, blocks = progress(killed)
            print(f"kill {kill + 1}: {records} records, {blocks} blocks on disk", flush=True)
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
