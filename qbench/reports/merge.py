"""Merging stores from several machines into one, losing nothing.

Records are told apart by their id, which names model, protocol, method, options, scheme and seed. Of records with the
same id but different content the newest stands in the merged store (of equally old ones that whose content has the
larger hash, so that the order of the sources does not matter); every other version goes to `superseded/`, under a name
that holds its content's hash. Failures, caches and checkpoints are not rows and stay where they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qbench.errors import ConfigError, DataError
from qbench.results import Result, ResultStore, require_writable, write_atomically

SUPERSEDED = "superseded"


@dataclass(frozen=True)
class Conflict:
    """Records with one id and different content.

    Attributes:
        versions: The one that stands first, then the others, newest first.
        difference: Largest relative difference of a metric between any version and the one that stands; 0 if all
            measured the same and differ in times or machines only, infinite where a metric is missing.
    """

    versions: tuple[Result, ...]
    difference: float


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    results: tuple[Result, ...]
    conflicts: tuple[Conflict, ...]


def merge(sources: Sequence[str | Path], target: str | Path) -> Merged:
    """Write all records of some stores into one; a store that is there already is merged too.

    Raises:
        ConfigError: If the target cannot be written to.
        DataError: If a source is missing or a record damaged; nothing is written then.
    """
    require_writable(target)
    folders = [Path(source) for source in sources]
    if Path(target).is_dir() and Path(target).resolve() not in [folder.resolve() for folder in folders]:
        folders.append(Path(target))
    if not folders:
        raise ConfigError("There is nothing to merge: give at least one folder of results.")
    versions: dict[str, dict[str, Result]] = {}
    for folder in folders:
        for result in _all_versions(folder):
            versions.setdefault(result.id, {})[_hash(result)] = result
    if not versions:
        raise DataError(f"There are no results in {', '.join(str(folder) for folder in folders)}.")
    store = ResultStore(target)
    rows, conflicts = [], []
    for found in versions.values():
        ordered = sorted(found.items(), key=lambda item: (item[1].created, item[0]), reverse=True)
        rows.append(ordered[0][1])
        # Others first: whatever interrupts this, no version is nowhere.
        for digest, result in ordered[1:]:
            _keep(result, digest, Path(target) / SUPERSEDED)
        store.save(ordered[0][1])
        (Path(target) / SUPERSEDED / _name(ordered[0][1], ordered[0][0])).unlink(missing_ok=True)
        if len(ordered) > 1:
            others = tuple(result for _, result in ordered)
            conflicts.append(Conflict(others, max(_difference(others[0], other) for other in others[1:])))
    return Merged(tuple(rows), tuple(conflicts))


def _all_versions(folder: Path) -> list[Result]:
    kept = folder / SUPERSEDED
    return ResultStore(folder).load_all() + (ResultStore(kept).load_all() if kept.is_dir() else [])


def _hash(result: Result) -> str:
    return hashlib.sha256(result.to_json().encode()).hexdigest()


def _name(result: Result, digest: str) -> str:
    return f"{result.id[:12]}-{digest[:12]}.json"


def _keep(result: Result, digest: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _name(result, digest), result.to_json().encode())


def _difference(one: Result, other: Result) -> float:
    if set(one.metrics) != set(other.metrics):
        return float("inf")
    pairs = [(one.metrics[key].value, other.metrics[key].value) for key in one.metrics]
    return max((abs(a - b) / abs(a) if a else abs(b) for a, b in pairs if a != b), default=0.0)
