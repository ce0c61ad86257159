"""Which records may stand side by side: ranked together, item by item, or as the seeds of one row.

A record's contract is the hash of everything that is not its method. Where the fields behind the hash are recorded,
they decide field by field; where they are not, only equal hashes are comparable.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qbench import provenance
from qbench.results import Result


def contract_differences(results: Sequence[Result]) -> dict[str, tuple[str, ...]] | None:
    """What forbids ranking these rows of one model together: field to its values, one per contract.

    None if nothing does. Empty if their contracts differ in fields that were not recorded.
    """
    sides: dict[tuple[str, str], Result] = {}
    for result in results:
        sides.setdefault((result.contract, result.model_fingerprint), result)
    if len(sides) < 2:
        return None
    fields = [{"model_fingerprint": r.model_fingerprint, **r.contract_fields} for r in sides.values()]
    found = provenance.differences(fields)
    if not found and all(map(_explains_its_contract, sides.values())):
        return None
    return {
        name: tuple("(not recorded)" if value is None else short_value(value) for value in values)
        for name, values in found.items()
    }


def describe_differences(differences: Mapping[str, Sequence[str]]) -> str:
    """The differences as a sentence says them: every field with its distinct values."""
    distinct = {name: list(dict.fromkeys(values)) for name, values in differences.items()}
    return (
        ", ".join(
            f"{name} ({' / '.join(values[:4])}{' / …' if len(values) > 4 else ''})"
            for name, values in distinct.items()
        )
        or "fields that were not recorded"
    )


def _explains_its_contract(result: Result) -> bool:
    """Whether the recorded fields are those that the hash was made of, so that they can be compared instead of it."""
    return provenance.contract(result.contract_fields)[0] == result.contract


def comparable(one: Result, other: Result, key: str | None = None) -> bool:
    """Whether two rows may be ranked together, on one metric or in general.

    With equal contracts they may; else if they differ in nothing but what else they were measured on.
    """
    if one.contract == other.contract:
        return True
    if not (_explains_its_contract(one) and _explains_its_contract(other)):
        return False
    fields = one.contract_fields, other.contract_fields
    if not provenance.same_base(*fields):
        return False
    return key is None or same_evaluation(one, other, key)


def same_evaluation(one: Result, other: Result, key: str) -> bool:
    """Whether one metric was measured on the same thing, whatever else differs."""
    sides = [provenance.evaluation_of(result.contract_fields, key) for result in (one, other)]
    return sides[0] is not None and sides[0] == sides[1]


def short_value(value: Any) -> str:
    """A value of a contract or an option, short enough for a table."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) > 40 and " " not in text:
        return text[:12] + "…"  # a hash
    return text if len(text) <= 80 else text[:79] + "…"


def seed_groups(results: Iterable[Result]) -> list[tuple[Result, ...]]:
    """Gather records that differ by their calibration seed alone, in the order of the seeds.

    The full-precision model has no calibration: its records are one row. Records of the same seed stay apart.
    """
    groups: dict[str, list[dict[str, Result]]] = {}
    for result in results:
        seed = "none" if result.is_baseline else provenance.calibration_fingerprint(result.contract_fields)
        request = [
            result.contract, result.model_fingerprint, result.method, result.scheme, result.options,
            None if result.is_baseline else (result.config.get("compute") or {}).get("batch_size"),
            result.id if seed is None else None,
        ]  # fmt: skip
        lanes = groups.setdefault(json.dumps(request, sort_keys=True, default=str), [])
        lane = next((lane for lane in lanes if seed not in lane), None)
        if lane is None:
            lanes.append(lane := {})
        lane[seed or ""] = result
    return [tuple(sorted(lane.values(), key=seed_of)) for lanes in groups.values() for lane in lanes]


def seed_of(result: Result) -> int:
    """The calibration seed, 0 where none is recorded."""
    seed = result.calibration.get("seed", result.config.get("calibration", {}).get("seed"))
    return seed if isinstance(seed, int) else 0
