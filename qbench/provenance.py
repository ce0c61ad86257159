"""Where a number comes from: versions, commit, hardware, fingerprints of files, and the protocol contract.

Nothing here is needed to compute a result; everything is needed to believe it later. No user name, host name or
absolute path is recorded, so that a record can be published as it is.

**The contract** is a hash of everything that is not the method: rows with equal contracts may be ranked together. Two
questions decide what goes into it.

*Seeds.* Rows whose calibration windows were drawn by the same rule from the same text, only with another seed, are one
comparison repeated: they are averaged, not refused. So the hash leaves out the two fields that a seed decides
(`PER_SEED`, the seed and the drawn tokens' fingerprint) and has those that define the draw: dataset, the text's
fingerprint, sample count, window length, BOS policy and how windows are cut. Token windows of another text or another
length are another draw, hence another contract. `calibration_fingerprint` tells the repetitions apart. A record that
does not name the text (the first ones did not) keeps its tokens in the hash: nothing shows that two are seeds of
one draw, so each set of tokens is its own contract.

*Evaluations.* The hash covers all that a row was measured on. A row that was also measured on tasks can still be ranked
with one that was not, on what both were measured on: `same_base` leaves the evaluations out, `evaluation_of` gives
one evaluation's own fields. Two rows that were measured on different things under one name are refused.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qbench import __version__
from qbench.errors import DataError

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "datasets", "lm-eval", "numpy", "scipy", "pydantic"
)  # fmt: skip
PER_SEED = ("seed", "tokens")  # fields of the contract's calibration that a seed decides
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
        The hash, and the fields as they come back from a JSON file (tuples are lists there): all of them;
        the hash leaves out those that a calibration seed decides.
    """
    stored = json.loads(canonical_json(fields))
    return sha256_json(without_seed(stored)), stored


def without_seed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The contract's fields that two rows must share: all but what the calibration seed decides."""
    calibration = fields.get("calibration")
    if not isinstance(calibration, Mapping) or "text" not in calibration:
        return dict(fields)
    return {**fields, "calibration": {k: v for k, v in calibration.items() if k not in PER_SEED}}


def calibration_fingerprint(fields: Mapping[str, Any]) -> str | None:
    """Which of the draws that a contract allows a row was calibrated on; None where it is not recorded."""
    calibration = fields.get("calibration")
    if not isinstance(calibration, Mapping) or "text" not in calibration:
        return None
    return sha256_json({name: calibration.get(name) for name in PER_SEED})


def same_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows differ in the method, the calibration seed and what they were measured on, and nothing else."""
    return _base(one) == _base(other)


def _base(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in without_seed(fields).items() if name != "evaluation"}


def evaluation_of(fields: Mapping[str, Any], key: str) -> Any:
    """What the contract says of one measurement; None where it does not name it.

    Args:
        fields: The contract's.
        key: TASK/METRIC; an evaluation is named by its task, or by the whole key.
    """
    evaluations = fields.get("evaluation")
    if not isinstance(evaluations, Mapping):
        return None
    return evaluations.get(key, evaluations.get(key.rpartition("/")[0]))


def differences(sides: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Fields in which contracts differ, with every side's value; a side without the field has None there.

    Nested fields are named by their path, `calibration.n_samples`. An evaluation that some sides lack is no difference.
    """
    rest = [{k: v for k, v in without_seed(side).items() if k != "evaluation"} for side in sides]
    found = _differing([_flat(side) for side in rest])
    evaluations = [side.get("evaluation") or {} for side in sides]
    for name in dict.fromkeys(name for side in evaluations for name in side):
        present = [side[name] for side in evaluations if name in side]
        if any(value != present[0] for value in present):
            found |= _differing([_flat({f"evaluation.{name}": side.get(name)}) for side in evaluations])
    return found


def _differing(sides: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    values = {
        name: [side.get(name) for side in sides] for name in dict.fromkeys(n for side in sides for n in side)
    }
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


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
