"""A sweep's wall time against the sum of its cells run one by one, and whether the integers are the same.

    python benchmarks/sweep.py --model MODEL --calib-dataset TRAIN.txt --eval wikitext2=TEST.txt
        [--methods rtn,smoothquant,awq,gptq] [--schemes W4A16g128,W3A16,W4A4,W6A6] [--nsamples 32] [--seqlen 1024]
        [--limit 16] [--device auto] [--epochs 4] [--cores "0,1 2-3"] [--gpus "0 1"] [--within S] [--json FILE]
        [options of `qbench run` and `sweep`]

Each cell alone is `qbench run` in a process and a folder of its own, as somebody without sweeps would do it: it loads
the model, passes through it and evaluates full precision for itself. The sweep is `qbench sweep`, its check and its
worker's start included. `--cores` lists sets of CPU cores: every process is pinned to one of them and has as many
threads as it has cores, and as many processes run at once as there are sets, the sweep beside the runs; `--gpus` gives
each set a GPU of its own. What is measured is printed and written at once; `--within` starts nothing that late, so that
what is there is kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qbench.results import BASELINE, ResultStore

REPO = Path(__file__).resolve().parent.parent
LEARNED = ("omniquant", "affinequant", "abq")
SLOWEST = ("affinequant", "omniquant", "signround", "awq", "gptq", "smoothquant", "rtn")


@dataclass
class Found:
    """What was measured; `alone_s` and the integers by cell."""

    settings: list[str]
    cores: str
    gpus: str
    sweep_s: float | None = None
    sweep_codes: dict[str, str | None] = field(default_factory=dict)
    sweep_stages: dict[str, dict[str, float]] = field(default_factory=dict)
    alone_s: dict[str, float] = field(default_factory=dict)
    alone_codes: dict[str, str | None] = field(default_factory=dict)
    alone_stages: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def different(self) -> list[str]:
        """Cells whose integers are not those of the sweep."""
        return [label for label, codes in self.alone_codes.items() if codes != self.sweep_codes.get(label)]


@dataclass(frozen=True)
class Place:
    """Cores, as taskset names them, and the GPU that a process gets; empty: as they come."""

    cores: str = ""
    gpu: str = ""

    @property
    def threads(self) -> int:
        """One per core."""
        ends = [part.partition("-")[::2] for part in self.cores.split(",")]
        return sum(int(last or first) - int(first) + 1 for first, last in ends)


def timed(arguments: list[str], place: Place) -> float:
    """Seconds of one command, pinned to its place.

    Raises:
        RuntimeError: If it fails, with the end of what it said.
    """
    paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if place.cores:
        env["OMP_NUM_THREADS"] = str(place.threads)
    if place.gpu:
        env["CUDA_VISIBLE_DEVICES"] = place.gpu
    pinned = ["taskset", "-c", place.cores] if place.cores else []
    began = time.perf_counter()
    done = subprocess.run(
        [*pinned, sys.executable, "-m", "qbench", *arguments], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    return time.perf_counter() - began


def rows(folder: Path) -> tuple[dict[str, str | None], dict[str, dict[str, float]]]:
    """Integers and stages of the rows of a folder, by `METHOD SCHEME`."""
    found = [row for row in ResultStore(folder).load_all() if row.method != BASELINE]
    return (
        {f"{row.method} {row.scheme}": row.codes for row in found},
        {f"{row.method} {row.scheme}": row.cost.stages for row in found},
    )


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
    parser.add_argument("--epochs", help="Of the learned methods among them.")
    parser.add_argument("--cores", default="")
    parser.add_argument("--gpus", default="")
    parser.add_argument("--within", type=float, default=float("inf"))
    parser.add_argument("--json")
    options, extra = parser.parse_known_args()
    began = time.perf_counter()
    common = ["--model", options.model, "--nsamples", options.nsamples, "--seqlen", options.seqlen]
    common += ["--limit", options.limit, "--device", options.device]
    for flag in ("calib-dataset", "eval"):
        if value := getattr(options, flag.replace("-", "_")):
            common += [f"--{flag}", value]
    common += extra
    epochs = ["--epochs", options.epochs] if options.epochs else []
    methods, schemes = options.methods.split(","), options.schemes.split(",")
    gpus = itertools.chain(options.gpus.split(), itertools.repeat(""))
    places = [Place(cores, gpu) for cores, gpu in zip(options.cores.split() or [""], gpus, strict=False)]
    found = Found(common, options.cores, options.gpus)
    order = sorted(methods, key=lambda name: SLOWEST.index(name) if name in SLOWEST else 0)
    labels = [f"{method} {scheme}" for method in order for scheme in schemes]
    waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for label in (None, *labels):  # None: the sweep
        waiting.put(label)
    lock = threading.Lock()

    def say(text: str) -> None:
        with lock:
            print(f"[{time.perf_counter() - began:.0f} s] {text}", flush=True)
            if options.json:
                Path(options.json).write_text(
                    json.dumps(asdict(found) | {"different": found.different}, indent=1)
                )

    def measure(label: str | None, place: Place, folder: Path) -> None:
        if label is None:
            grid = [part for method in methods for part in ("--method", method)]
            grid += [part for scheme in schemes for part in ("--scheme", scheme)]
            found.sweep_s = timed(["sweep", *grid, *common, *epochs, "--output", str(folder)], place)
            found.sweep_codes, found.sweep_stages = rows(folder)
            say(f"sweep of {len(found.sweep_codes)} cells: {found.sweep_s:.1f} s")
            return
        method, scheme = label.split(" ")
        asked = ["run", "--method", method, "--scheme", scheme, *common, "--output", str(folder)]
        seconds = timed([*asked, *(epochs if method in LEARNED else [])], place)
        codes, stages = rows(folder)
        found.alone_s[label] = seconds
        found.alone_codes |= codes
        found.alone_stages |= stages
        say(f"{label}: {seconds:.1f} s alone")

    def work(place: Place, scratch: str) -> None:
        while time.perf_counter() - began < options.within:
            try:
                label = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                measure(label, place, Path(scratch, label or "sweep"))
            except RuntimeError as error:
                found.errors[label or "sweep"] = str(error)
                say(f"{label or 'sweep'} failed: {error}")

    with tempfile.TemporaryDirectory(prefix="qbench-sweep-") as scratch:
        threads = [threading.Thread(target=work, args=(place, scratch)) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    summary(found, labels, say)
    sys.exit(bool(found.errors or found.different or len(found.alone_s) < len(labels)))


def summary(found: Found, labels: list[str], say: Callable[[str], None]) -> None:
    """Print the ratio and whether the integers agree."""
    missing = [label for label in labels if label not in found.alone_s]
    total = sum(found.alone_s.values())
    if found.sweep_s is not None and not missing:
        say(f"sum of {len(found.alone_s)} runs: {total:.1f} s; ratio {found.sweep_s / total:.3f}")
    else:
        say(f"not measured: {', '.join(missing) or 'the sweep'}; sum of the others {total:.1f} s")
    if found.sweep_codes:
        different = ", ".join(found.different)
        say("integers: " + (f"different in {different}" if different else "all equal"))


if __name__ == "__main__":
    main()
