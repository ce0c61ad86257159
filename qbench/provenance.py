"""Where a number comes from: versions, commit, hardware, fingerprints of files, and the protocol contract.

Nothing here is needed to compute a result; everything is needed to believe it later. No user name, host name or
absolute path is recorded, so that a record can be published as it is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbench import __version__
from qbench.errors import DataError

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "datasets", "lm-eval", "numpy", "scipy", "pydantic"
)  # fmt: skip
# In order of preference: a folder that holds the same weights in two formats is fingerprinted by the first.
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth")


def environment() -> dict[str, Any]:
    """Describe software and hardware; torch is asked only if somebody has imported it already."""
    return {
        "qbench": __version__,
        "code": code_fingerprint(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": git_commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "gpus": _gpu_names(),
    }


def git_commit(package: Path = Path(__file__).parent) -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from, and whether the package differs from it.

    Returns:
        `{"hash", "dirty"}`; None for an installed package, even one whose environment lies inside some other checkout.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.resolve().parent:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    return (
        {"hash": commit, "dirty": bool(_git(package, "status", "--porcelain", "--", "."))} if commit else None
    )


def contract(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Hash everything that is not the method, so that rows with equal hashes may be ranked together.

    Args:
        fields: Fingerprints and settings of the protocol, JSON values: calibration token ids, sample count, window
            length, BOS policy, evaluation protocols, quantized matmuls.

    Returns:
        The hash, and the fields as they come back from a JSON file (tuples are lists there).
    """
    stored = json.loads(canonical_json(fields))
    return sha256_json(stored), stored


def canonical_json(value: Any) -> str:
    """JSON that is equal for equal values: sorted keys, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return sha256_bytes(canonical_json(value).encode())


def sha256_bytes(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def fingerprint_file(path: str | Path) -> str:
    """SHA-256 of a file's content.

    The hub's cache names a large file by exactly this hash and links to it, so that the 140 GB of a 70B model need not
    be read again: such a name is believed.
    """
    path = Path(path)
    try:
        target = path.resolve(strict=True)
        if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
            return target.name
        with target.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read {str(path)!r}: {error.strerror}.") from None


def fingerprint_folder(path: str | Path) -> str:
    """Identify a model by content, never by path: its weight files and config.json, by name and SHA-256.

    Raises:
        DataError: If the folder holds no weights.
    """
    folder = Path(path)
    weights = next((found for pattern in WEIGHT_FILES if (found := sorted(folder.glob(pattern)))), [])
    if not weights:
        raise DataError(f"No model weights in {str(folder)!r}: expected {' or '.join(WEIGHT_FILES)}.")
    files = [file for file in [folder / "config.json", *weights] if file.exists()]
    return sha256_json({file.name: fingerprint_file(file) for file in files})


@functools.cache
def code_fingerprint() -> str:
    """Identify the code that decides which codes come out: neither a checkpoint nor a row of other code is reused."""
    package = Path(__file__).parent
    sources = sorted(
        f
        for part in ("quant", "transforms", "models", "engine", "methods")
        for f in package.glob(f"{part}/*.py")
    )
    return sha256_json({str(file.relative_to(package)): fingerprint_file(file) for file in sources})


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or a checkout of somebody else
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
