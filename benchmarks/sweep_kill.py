"""Kill a sweep with SIGKILL at random moments, start it again each time, and compare with an undisturbed one's store.

    python benchmarks/sweep_kill.py [--kills 10] [--both] [--model tiny-llama] [--seed 0] [--nsamples 4] [--seqlen 64]
        [--within S] [--json FILE] [options of `qbench sweep`]

A kill comes at a moment drawn uniformly from the time that the undisturbed sweep took, starting processes and loading
the model included, and counts if it hits a sweep that is running. The same command is then given again, in the same
folder, until one of them comes to its end before its moment: its store is compared with the undisturbed one, every
field of every record but times, peaks of memory and the moment. With kills left, the next round begins with an empty
folder; the store of a round that no kill hit is compared too, but not counted. Each kill takes the sweep's own process,
and by the toss of a coin its workers in the same moment; otherwise these end by themselves. `--both`: two sweeps write
one store at once, and both are killed. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from qbench.results import ResultStore
from qbench.verification import without_times

REPO = Path(__file__).resolve().parent.parent
SWEEP = """
methods:
  - {name: omniquant, options: {epochs: 2}}
  - {name: affinequant, options: {epochs: 2}}
  - rtn
  - smoothquant
  - awq
  - gptq
schemes: [W4A4, W3A16]
evals: {limit: 4}
"""


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=out, env=env)


def kill(run: subprocess.Popen[bytes], workers_too: bool) -> None:
    """SIGKILL for a sweep, and for its workers in the same moment if that is asked for."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(run.pid).children(recursive=True) if workers_too else []
        run.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    run.wait()


def progress(output: Path) -> tuple[int, int]:
    """Records and finished blocks."""
    return len(list(output.glob("*.json"))), len(list(output.glob("checkpoints/*/block-*.safetensors")))


def store(output: Path) -> dict[str, Any]:
    """Records without times, by id."""
    return {row.id: without_times(row) for row in ResultStore(output).load_all()}


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs, in words: missing rows, and fields of rows."""
    said = [f"{id_}: not there" for id_ in wanted if id_ not in found]
    said += [f"{id_}: too many" for id_ in found if id_ not in wanted]
    for id_ in wanted.keys() & found.keys():
        fields = [key for key in wanted[id_] if wanted[id_][key] != found[id_].get(key)]
        said += [f"{id_}: {', '.join(fields)}"] if fields else []
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nsamples", default="4")
    parser.add_argument("--seqlen", default="64")
    parser.add_argument("--both", action="store_true")
    parser.add_argument("--within", type=float, default=float("inf"))
    parser.add_argument("--json")
    options, extra = parser.parse_known_args()
    draw = random.Random(options.seed)
    began = time.perf_counter()
    found: dict[str, Any] = {"both": options.both, "hits": [], "rounds": [], "complete": False}

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:.0f} s] {text}", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=1))

    with tempfile.TemporaryDirectory(prefix="qbench-kill-") as name:
        folder = Path(name)
        file, log = folder / "sweep.yaml", folder / "log"
        file.write_text(SWEEP)

        def command(output: Path) -> list[str]:
            sizes = ["--nsamples", options.nsamples, "--seqlen", options.seqlen]
            return [
                sys.executable, "-m", "qbench", "sweep", str(file), "--model", options.model, *sizes, *extra,
                "--output", str(output), "--retry-failed",
            ]  # fmt: skip

        def ended_well(runs: list[subprocess.Popen[bytes]]) -> None:
            for run in runs:
                if run.wait() != 0:
                    sys.exit(f"a sweep ended with status {run.returncode}: {log.read_text()[-800:]}")

        whole = folder / "whole"
        first = time.perf_counter()
        ended_well([start(command(whole), log)])
        seconds = time.perf_counter() - first
        wanted = store(whole)
        found |= {"undisturbed_s": seconds, "records": len(wanted)}
        say(f"undisturbed: {len(wanted)} records in {seconds:.1f} s")
        while len(found["hits"]) < options.kills and time.perf_counter() - began < options.within:
            output = folder / f"round-{len(found['rounds']) + 1}"
            killed = 0
            while True:
                runs = [start(command(output), log) for _ in range(1 + options.both)]
                late = time.perf_counter() - began > options.within
                if len(found["hits"]) == options.kills or late:  # the last one goes to its end
                    ended_well(runs)
                    break
                moment, too = draw.uniform(0, seconds), draw.random() < 0.5
                started = time.perf_counter()
                while time.perf_counter() - started < moment and any(run.poll() is None for run in runs):
                    time.sleep(0.02)
                if all(run.poll() is not None for run in runs):
                    ended_well(runs)
                    break
                both = sum(run.poll() is None for run in runs)
                for run in runs:
                    kill(run, too)
                killed += 1
                done = progress(output)
                found["hits"].append(
                    {
                        "at_s": moment,
                        "records": done[0],
                        "blocks": done[1],
                        "workers_too": too,
                        "sweeps": both,
                    }
                )
                say(
                    f"kill {len(found['hits'])} after {moment:.1f} s{', workers too' if too else ''}: "
                    f"{done[0]} records, {done[1]} blocks on disk"
                )
            said = differences(wanted, store(output))
            failures = len(list(output.glob("failures/*.json")))
            found["rounds"].append({"kills": killed, "different": said, "failures": failures})
            say(
                f"round {len(found['rounds'])}, {killed} kills: {len(wanted)} records, "
                + ("different: " + "; ".join(said) if said else "equal field by field but for times")
                + f"; failures left: {failures}"
            )
    wrong = any(part["different"] or part["failures"] for part in found["rounds"])
    found["complete"] = len(found["hits"]) == options.kills
    compared = sum(part["kills"] > 0 for part in found["rounds"])
    say(
        f"{len(found['hits'])} kills of {options.kills} hit, {compared} stores of killed sweeps compared: "
        + ("something differs" if wrong else "all the same")
    )
    sys.exit(0 if found["complete"] and not wrong else 1)


if __name__ == "__main__":
    main()
