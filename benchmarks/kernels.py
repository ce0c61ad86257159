"""The tables of docs/kernels.md: measure them on one machine, and render the page from what was measured.

    python benchmarks/kernels.py measure --output experiments/kernels-h200.json --max-minutes 8   # one GPU
    python benchmarks/kernels.py measure --output experiments/kernels-cpu.json                    # a CPU
    python benchmarks/kernels.py measure --part 7b --output 7b.json        # one part of it, for one of several GPUs
    python benchmarks/kernels.py merge --output experiments/kernels-h200.json 7b.json 70b.json  # parts into one report
    python benchmarks/kernels.py render                                    # all reports, into the page

`measure` is a list of `qbench bench` commands over one report: it is written after every round, what fails is recorded
with its sentence, and the same command continues where an earlier one stopped. Where a kernel broke a whole round, each
of the round's cells is repeated in a process of its own, beside the unquantized layer, so that it costs itself only.
`--wheels DIR` first installs carried wheels of the optional backends into a folder of their own, for machines that
reach no package index.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qbench.latency import Cell, Report

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "kernels.md"
DATA = REPO / "experiments"
MARK = "<!-- {end}kernels: {name} -->"
ATTEMPTS = 4  # at one job
GRACE_S = 45  # that a job may take to finish the round it is in
CELL_S = 60  # for one cell in a process of its own
ALONE = "alone in its process"  # begins the message of a cell that was repeated so, and failed again

SLOW = (
    "--slow-seconds=3"  # of the GPU's protocol: tinygemm at 4096 tokens would take most of the time otherwise
)


def job(shapes: str, backends: str, *schemes: str) -> list[str]:
    """Linears of a published size; weight-only rows with AffineQuant's matrix as well."""
    return [f"--shapes={shapes}", *(f"--backend={b}" for b in backends.split()), "--method=affinequant",
            *(f"--scheme={s}" for s in schemes), SLOW]  # fmt: skip


def generation(*schemes: str) -> list[list[str]]:
    """Whole models: one sequence, and sixteen."""
    common = [
        "--shapes=llama-7b",
        "--end-to-end",
        "--backend=humming",
        *(f"--scheme={s}" for s in schemes),
        SLOW,
    ]
    return [common, [*common, "--batch=16"]]


# In the order of their worth: what a time limit cuts off is least missed. gemlite tunes for minutes, so it comes last.
GPU_PARTS: dict[str, list[list[str]]] = {
    "7b": [
        job("llama-7b", "humming torch", "W4A16g128", "W8A8-sym", "W4A4", "W2A8"),
        job("llama-7b", "humming torch", "W3A16g128", "W2A16g64", "W4A8", "W3A8", "W6A6"),
    ],
    "70b": [job("llama-70b", "humming torch", "W4A16g128", "W8A8-sym", "W3A16g128", "W2A16g64", "W4A8")],
    "end-to-end": generation("W4A16g128", "W8A8-sym", "W3A16g128", "W2A16g64", "W4A8"),
    "gemlite": [job("llama-7b", "gemlite", "W4A16g128", "W2A16g64")],
}
CPU_JOBS: list[list[str]] = [
    ["--shapes=llama-7b", "--backend=torch", "--threads=1", "--tokens=1", "--tokens=16",
     "--scheme=W4A16g128", "--scheme=W8A16", "--scheme=W8A8"],
    ["--model=tiny-llama", "--backend=torch", "--method=affinequant", "--threads=1", "--tokens=1", "--tokens=16",
     *(f"--scheme={s}" for s in ("W4A16g128", "W3A16g128", "W8A16", "W8A8", "W4A4"))],
]  # fmt: skip


def measure(output: Path, wheels: Path | None, minutes: float | None, parts: list[str]) -> int:
    """Run every job as a process of its own: what one kernel does to its CUDA context ends with it."""
    path = [str(REPO)]
    if wheels is not None:
        target = tempfile.mkdtemp(prefix="qbench-wheels-")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*install, "--target", target, *map(str, sorted(wheels.glob("*.whl")))], check=True)
        path.append(target)
    import torch

    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    deadline = time.monotonic() + 60 * (minutes or 1e6)
    worst = 0
    on_gpu = torch.cuda.is_available()
    if parts and not on_gpu:
        print(
            "--part names parts of what a GPU measures, and torch sees none here: leave it out",
            file=sys.stderr,
        )
        return 2
    for arguments in [j for part in parts or GPU_PARTS for j in GPU_PARTS[part]] if on_gpu else CPU_JOBS:
        worst = max(worst, _work(arguments, output, environment, deadline))
    return max(worst, _apart(output, environment, deadline))


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


def _apart(output: Path, environment: dict[str, str], deadline: float) -> int:
    """Repeat each cell of a round that broke in a process of its own; those whose like was timed elsewhere first."""
    from qbench.bench import BROKEN_ROUND
    from qbench.cli.bench import read

    if not output.exists():
        return 1
    cells = read(output).cells
    good = Counter((c.backend, c.scheme, c.norm_matrix) for c in cells if c.status == "timed")
    broken = [c for c in cells if c.status == "failed" and (c.message or "").startswith(BROKEN_ROUND)]
    for cell in sorted(broken, key=lambda c: -good[c.backend, c.scheme, c.norm_matrix]):
        left = deadline - time.monotonic()
        if left <= 0:
            print("time is over; the same command continues", file=sys.stderr)
            return 1
        command = [sys.executable, str(Path(__file__).resolve()), "cell", f"--output={output}"]
        try:
            done = subprocess.run(
                [*command, f"--index={[c.key for c in cells].index(cell.key)}"],
                env=environment,
                timeout=min(CELL_S, left + GRACE_S),
            )
            reason = f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {CELL_S} s"
        now = next(c for c in read(output).cells if c.key == cell.key)
        if now == cell:  # the process could not even write down what happened
            now = cell.model_copy(update={"message": f"{ALONE}: {reason}"})
            _replace(output, now)
        print(*cell.key, now.status, now.message or "", file=sys.stderr, flush=True)
    return 0


def repeat(output: Path, index: int) -> int:
    """Measure the report's cell of this number again, beside the unquantized layer and nothing else."""
    import torch

    from qbench import bench
    from qbench.cli.bench import read
    from qbench.evals.latency import Protocol
    from qbench.scheme import Scheme

    report = read(output)
    old = report.cells[index]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, scheme = (old.out_features, old.in_features), Scheme.parse(old.scheme)
    backends, _ = bench.load_backends([old.backend], device)
    work = bench.Workload(
        [shape], frozenset([shape]), [old.tokens], [scheme], [old.backend], frozenset([scheme])
    )
    other = old.model_copy(update={"norm_matrix": not old.norm_matrix})
    # The first round only, without what follows it: after a broken context that would fail.
    (found, *_) = next(iter(bench.measure(work, backends, device, Protocol(**report.protocol), [other])))
    if found.status == "failed":
        found = found.model_copy(update={"message": f"{ALONE}: {found.message}"})
    _replace(output, found)
    return 0


def _replace(output: Path, cell: Cell) -> None:
    from qbench.cli.bench import read

    report = read(output)
    _write(
        output, report.model_copy(update={"cells": [cell if c.key == cell.key else c for c in report.cells]})
    )


def _write(output: Path, report: Report) -> None:
    from qbench.results import write_atomically

    write_atomically(output, (report.model_dump_json(exclude_none=True) + "\n").encode())


def merge(files: list[Path], output: Path) -> int:
    """Join reports that were measured side by side on GPUs of one kind; the first one's ceilings count."""
    from qbench.cli.bench import read

    reports = [read(file) for file in files]
    joined = reports[0]
    for file, report in zip(files[1:], reports[1:], strict=True):
        for what in ("device", "protocol", "packages"):
            if _circumstance(report, what) != _circumstance(joined, what):
                print(
                    f"{file} was measured with another {what} than {files[0]}: measure it again",
                    file=sys.stderr,
                )
                return 2
        cells = {c.key: c for c in (*joined.cells, *report.cells)}
        cells |= {c.key: c for c in (*report.cells, *joined.cells) if c.status == "timed"}
        joined = joined.model_copy(
            update={
                "commands": list(dict.fromkeys([*joined.commands, *report.commands])),
                "models": list({m.name: m for m in (*joined.models, *report.models)}.values()),
                "ceilings": joined.ceilings or report.ceilings,
                "cells": list(cells.values()),
                "speeds": [*joined.speeds, *(s for s in report.speeds if s not in joined.speeds)],
                "notes": list(dict.fromkeys([*joined.notes, *report.notes])),
            }
        )
    apart = _rates_apart([r for r in reports if r.ceilings is not None])
    if apart is not None:
        joined = joined.model_copy(update={"notes": [*joined.notes, apart]})
    _write(output, joined)
    return 0


def _circumstance(report: Report, what: str) -> object:
    """What must be the same; another commit of qbench may have measured another part."""
    return report.environment.get("packages") if what == "packages" else getattr(report, what)


def _rates_apart(reports: list[Report]) -> str | None:
    """How far the rates of several GPUs lie from the first one's, in words; only rates that were found the same way."""
    ceilings = [r.ceilings for r in reports if r.ceilings]
    if len(ceilings) < 2:
        return None
    first, *others = ceilings
    most = abs(max((c.read_bytes_per_s / first.read_bytes_per_s - 1 for c in others), key=abs))
    for other in others:
        for name, rate in other.flops.items():
            probes = [[note for note in c.notes if note.startswith(f"{name} ")] for c in (first, other)]
            if probes[0] == probes[1] and name in first.flops:
                most = max(most, abs(rate / first.flops[name] - 1))
    return (
        f"joined from {len(ceilings)} measurements, each on a GPU of its own; their own rates lie within "
        f"{100 * most:.1f}% of the first one's, which the shares refer to"
    )


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
    measuring.add_argument(
        "--part", action="append", choices=list(GPU_PARTS), default=[], help="default: all"
    )
    repeating = commands.add_parser("cell", help="repeat one cell of a report: what `measure` calls for each")
    repeating.add_argument("--output", type=Path, required=True)
    repeating.add_argument("--index", type=int, required=True)
    merging = commands.add_parser("merge")
    merging.add_argument("--output", type=Path, required=True)
    merging.add_argument("files", type=Path, nargs="+")
    commands.add_parser("render")
    given = parser.parse_args()
    if given.command == "render":
        return render()
    if given.command == "merge":
        return merge(given.files, given.output)
    if given.command == "cell":
        return repeat(given.output, given.index)
    return measure(given.output, given.wheels, given.max_minutes, given.part)


if __name__ == "__main__":
    sys.exit(main())
