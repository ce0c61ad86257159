"""Environments of the runtimes that do not live beside current transformers, and a certificate from all of them.

AutoGPTQ 0.7.1 (end of life) needs transformers 4, GPTQModel 7.6.0 pins numpy; each gets a virtual environment of
its own. `qbench export --runtime NAME=PYTHON` then tries a folder there, through qbench/deploy/runtime_worker.py, which
needs nothing of qbench. Needs the package index; set PIP_FIND_LINKS to a folder with the torch wheel to take that one.

    python benchmarks/runtimes.py make /tmp/runtimes
    python benchmarks/runtimes.py export /tmp/runtimes RESULTS --format gptq --method rtn --scheme W4A16g128

`make` prints the options; `export` passes everything after the folder on to `qbench export`, with those options.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
# Runtime -> packages that were installed and tried together on 2026-11-22, and the module that must import.
ENVIRONMENTS = {
    "auto-gptq": (["transformers==4.57.6", "peft==0.17.1", "auto-gptq==0.7.1", "setuptools"], "auto_gptq"),
    "gptqmodel": (
        ["transformers==5.23.0", "optimum==2.3.0", "gptqmodel==7.6.0", "setuptools"],
        "gptqmodel",
    ),
}
ALSO = {
    "gptqmodel": "transformers"
}  # transformers reads GPTQ and AWQ where optimum and gptqmodel are installed


def make(folder: Path) -> None:
    """Create the environments that are missing."""
    uv = shutil.which("uv")
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    local = [wheel for link in links for wheel in Path(link).glob("torch-2.13.0*.whl")]
    torch = str(local[0]) if local else TORCH
    for name, (packages, module) in ENVIRONMENTS.items():
        python = folder / name / "bin" / "python"
        if not python.exists():
            if uv:
                subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder / name)], check=True)
                install = [uv, "pip", "install", "-q", "--python", str(python)]
            else:
                subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
                install = [str(python), "-m", "pip", "install", "-q"]
            subprocess.run([*install, torch, *packages], check=True)
        subprocess.run(
            [str(python), "-I", "-c", f"import importlib.util as u; assert u.find_spec('{module}')"],
            check=True,
        )
    print(" ".join(options(folder)))


def options(folder: Path) -> list[str]:
    """`--runtime` options for `qbench export`."""
    found = {name: folder / name / "bin" / "python" for name in ENVIRONMENTS}
    found |= {also: found[name] for name, also in ALSO.items()}
    return [part for name, python in found.items() for part in ("--runtime", f"{name}={python}")]


def main(arguments: list[str]) -> int:
    """Do what the first argument says."""
    if len(arguments) < 2 or arguments[0] not in ("make", "export"):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[1])
    if arguments[0] == "make":
        make(folder)
        return 0
    return subprocess.run(
        [sys.executable, "-m", "qbench", "export", *arguments[2:], *options(folder)]
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
