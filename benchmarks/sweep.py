"""A sweep's wall time against the sum of its cells run one by one, and whether the integers are the same.

    python benchmarks/sweep.py --model MODEL --calib-dataset TRAIN.txt --eval wikitext2=TEST.txt
        [--methods rtn,smoothquant,awq,gptq] [--schemes W4A16g128,W3A16,W4A4,W6A6] [--nsamples 32] [--seqlen 1024]
        [--limit 16] [--device auto] [--output DIR] [--json FILE] [--shared] [options of `qbench run` and `sweep`]

Each cell alone is `qbench run` in a process and a folder of its own, as somebody without sweeps would do it: it loads
the model, passes through it and evaluates full precision for itself. `--shared` also measures them in one folder after
each other, where the baseline is measured once. The sweep is `qbench sweep`, its check and its worker's start included.
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

from qbench.results import BASELINE, ResultStore

REPO = Path(__file__).resolve().parent.parent


def timed(arguments: list[str]) -> float:
    env = os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "qbench", *arguments], env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - began


def codes(folder: Path) -> dict[tuple[str, str], str | None]:
    rows = ResultStore(folder).load_all()
    return {(row.method, row.scheme): row.codes for row in rows if row.method != BASELINE}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--calib-dataset")
    parser.add_argument("--eval")
    parser.add_argument("--methods", default="rtn,smoothquant,awq,gptq")
    parser.add_argument("--schemes", default="W4A16g128,W3A16,W4A4,W6A6")
    parser.add_argument("--nsamples", default="32")
    parser.add_argument("--seqlen", default="1024")
    parser.add_argument("--limit", default="16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--output")
    parser.add_argument("--json")
    options, extra = parser.parse_known_args()
    common = ["--model", options.model, "--nsamples", options.nsamples, "--seqlen", options.seqlen]
    common += ["--limit", options.limit, "--device", options.device]
    for flag in ("calib-dataset", "eval"):
        if value := getattr(options, flag.replace("-", "_")):
            common += [f"--{flag}", value]
    common += extra
    methods, schemes = options.methods.split(","), options.schemes.split(",")
    with tempfile.TemporaryDirectory(prefix="qbench-sweep-") as name:
        folder = Path(options.output or name)
        grid = [part for method in methods for part in ("--method", method)]
        grid += [part for scheme in schemes for part in ("--scheme", scheme)]
        together = timed(["sweep", *grid, *common, "--output", str(folder / "sweep")])
        swept = codes(folder / "sweep")
        print(f"sweep of {len(swept)} cells: {together:.1f} s", flush=True)
        alone: dict[str, float] = {}
        shared: dict[str, float] = {}
        different = []
        for scheme in schemes:
            for method in methods:
                label = f"{method} {scheme}"
                one = ["run", "--method", method, "--scheme", scheme, *common, "--output"]
                alone[label] = timed([*one, str(folder / "alone" / label)])
                if codes(folder / "alone" / label) != {(method, scheme): swept[method, scheme]}:
                    different.append(label)
                if options.shared:
                    shared[label] = timed([*one, str(folder / "shared")])
                print(f"{label}: {alone[label]:.1f} s alone", flush=True)
    total = sum(alone.values())
    print(f"sum of {len(alone)} runs: {total:.1f} s; ratio {together / total:.3f}")
    if shared:
        print(
            f"with one baseline for all runs: {sum(shared.values()):.1f} s; ratio {together / sum(shared.values()):.3f}"
        )
    print("integers: " + (f"different in {', '.join(different)}" if different else "all equal"))
    if options.json:
        found = {"sweep_s": together, "alone_s": alone, "shared_s": shared, "different": different}
        Path(options.json).write_text(json.dumps(found, indent=1))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
