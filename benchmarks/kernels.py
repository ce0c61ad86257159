"""The tables of docs/kernels.md: measure them on one machine, and render the page from what was measured.

    python benchmarks/kernels.py measure --output experiments/kernels-h200.json --max-minutes 8   # one GPU
    python benchmarks/kernels.py measure --output experiments/kernels-cpu.json                    # a CPU
    python benchmarks/kernels.py render                                                           # both, into the page

`measure` is a list of `qbench bench` commands over one report: it is written after every round, what fails is recorded
with its sentence, and the same command continues where an earlier one stopped. `--wheels DIR` first installs carried
wheels of the optional backends into a folder of their own, for machines that reach no package index.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "kernels.md"
DATA = REPO / "experiments"
MARK = "<!-- {end}kernels: {name} -->"
ATTEMPTS = 4  # at one job
GRACE_S = 45  # that a job may take to finish the round it is in

SLOW = (
    "--slow-seconds=3"  # of the GPU's protocol: tinygemm at 4096 tokens would take most of the time otherwise
)


def job(shapes: str, backends: str, *schemes: str) -> list[str]:
    """Linears of a published size; weight-only rows with AffineQuant's matrix as well."""
    return [f"--shapes={shapes}", *(f"--backend={b}" for b in backends.split()), "--method=affinequant",
            *(f"--scheme={s}" for s in schemes), SLOW]  # fmt: skip


# In the order of their worth: what a time limit cuts off is least missed. gemlite tunes for minutes, so it comes last.
GPU_JOBS: list[list[str]] = [
    job("llama-7b", "humming torch", "W4A16g128", "W8A8-sym", "W4A4", "W2A8"),
    job("llama-7b", "humming torch", "W3A16g128", "W2A16g64", "W4A8", "W3A8", "W6A6"),
    job("llama-70b", "humming torch", "W4A16g128", "W8A8-sym", "W3A16g128", "W2A16g64", "W4A8"),
    [
        "--shapes=llama-7b",
        "--end-to-end",
        "--backend=humming",
        "--scheme=W4A16g128",
        "--scheme=W8A8-sym",
        SLOW,
    ],
    job("llama-7b", "gemlite", "W4A16g128", "W2A16g64"),
]
CPU_JOBS: list[list[str]] = [
    ["--shapes=llama-7b", "--backend=torch", "--threads=1", "--tokens=1", "--tokens=16",
     "--scheme=W4A16g128", "--scheme=W8A16", "--scheme=W8A8"],
    ["--model=tiny-llama", "--backend=torch", "--method=affinequant", "--threads=1", "--tokens=1", "--tokens=16",
     *(f"--scheme={s}" for s in ("W4A16g128", "W3A16g128", "W8A16", "W8A8", "W4A4"))],
]  # fmt: skip


def measure(output: Path, wheels: Path | None, minutes: float | None) -> int:
    """Run every job as a process of its own: what one kernel does to its CUDA context ends with it."""
    path = [str(REPO)]
    if wheels is not None:
        target = tempfile.mkdtemp(prefix="qbench-wheels-")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*install, "--target", target, *map(str, sorted(wheels.glob("*.whl")))], check=True)
        path.append(target)
    import os

    import torch

    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    deadline = time.monotonic() + 60 * (minutes or 1e6)
    worst = 0
    for arguments in GPU_JOBS if torch.cuda.is_available() else CPU_JOBS:
        worst = max(worst, _work(arguments, output, environment, deadline))
    return worst


def _work(arguments: list[str], output: Path, environment: dict[str, str], deadline: float) -> int:
    """One job, begun anew where a kernel ended its process: the report holds what is done and what failed."""
    code = 0
    for _ in range(ATTEMPTS):
        left = deadline - time.monotonic()
        if left <= 0:
            print("time is over; the same command continues", file=sys.stderr)
            break
        command = [sys.executable, "-m", "qbench", "bench", *arguments, f"--output={output}", "--format=json"]
        limit = [f"--max-minutes={left / 60:.2f}"] if left < 1e6 else []
        print("$ qbench", *command[3:], *limit, file=sys.stderr, flush=True)
        try:
            code = subprocess.run(
                [*command, *limit], env=environment, stdout=subprocess.DEVNULL, timeout=left + GRACE_S
            ).returncode
        except subprocess.TimeoutExpired:
            print("stopped: it did not end when its time was over", file=sys.stderr)
            return 1
        if code in (0, 2):  # done, or a request that no second attempt changes
            break
    return code


def render() -> int:
    """Replace the page's parts between marks by tables of the reports in experiments/."""
    from qbench.cli.bench import read
    from qbench.reports.latency import as_markdown

    page = PAGE.read_text()
    for file in sorted(DATA.glob("kernels-*.json")):
        begin, end = (MARK.format(end=e, name=file.stem.removeprefix("kernels-")) for e in ("", "end of "))
        if begin not in page or end not in page:
            print(f"{PAGE} has no place for {file.name}: write {begin} and {end} into it", file=sys.stderr)
            return 1
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2]
        page = f"{before}{begin}\n\n{as_markdown(read(file))}\n{end}{after}"
    PAGE.write_text(page)
    return 0


def main() -> int:
    """Parse and do one of the two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--output", type=Path, required=True)
    measuring.add_argument("--wheels", type=Path)
    measuring.add_argument("--max-minutes", type=float)
    commands.add_parser("render")
    given = parser.parse_args()
    return render() if given.command == "render" else measure(given.output, given.wheels, given.max_minutes)


if __name__ == "__main__":
    sys.exit(main())
