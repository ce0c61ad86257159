"""Verification: a stored row is made again from its own record, on this machine, and compared with what is stored."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qbench import provenance
from qbench.config import PLACES, MethodRequest, RunConfig, validated
from qbench.engine.progress import Listener
from qbench.errors import ConfigError, DataError
from qbench.reports.stats import paired_difference
from qbench.results import Result, ResultStore
from qbench.rows import Wanted
from qbench.runner import run_pass

ROUNDING = 1e-4  # relative difference that kernels of another machine may make


@dataclass(frozen=True)
class MetricCheck:
    """One measurement, then and now.

    Attributes:
        difference: Now minus then, of the mean item (for a perplexity in nats).
        half_width: Of the difference's paired 95% interval; None without items.
        verdict: `identical`, `agrees` (within the interval, or within rounding) or `differs`.
    """

    key: str
    then: float
    now: float | None
    difference: float | None
    half_width: float | None
    verdict: str


@dataclass(frozen=True)
class Verdict:
    """How a row made again compares with the stored one.

    Attributes:
        contract: Fields of the contract that differ, with the stored value and this machine's.
        options: Of the method, presets and contents of files included, that are not what they were.
        codes: Whether all integers are equal; None where the record does not tell.
        environment: Versions and hardware that differ.
    """

    row: Result
    again: Result
    contract: Mapping[str, list[Any]]
    options: Mapping[str, list[Any]]
    codes: bool | None
    metrics: list[MetricCheck]
    environment: Mapping[str, list[Any]]

    @property
    def agrees(self) -> bool:
        """Whether the row stands: the same contract and options, and no measurement that differs."""
        return not (self.contract or self.options) and all(
            check.verdict != "differs" for check in self.metrics
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "id": self.row.id,
            "again": self.again.id,
            "agrees": self.agrees,
            "contract": dict(self.contract),
            "options": dict(self.options),
            "codes": self.codes,
            "metrics": [asdict(check) for check in self.metrics],
            "environment": dict(self.environment),
        }


def find_row(row: str, store: str | Path) -> Result:
    """A record by its file, its id or the beginning of one.

    Raises:
        DataError: If there is none, or it is damaged.
        ConfigError: If the beginning of an id is not enough.
    """
    path = Path(row)
    if path.is_file():
        try:
            return Result.from_json(path.read_bytes())
        except DataError as error:
            raise DataError(f"{row!r}: {error}.") from None
    found = ResultStore(store).find(row) if row and set(row) <= set("0123456789abcdef") else None
    if found is None:
        raise DataError(
            f"No row {row!r}: neither a record's file nor the beginning of an id in {str(store)!r}. "
            "Ids are in `qbench compare DIR --format json`; --store names another folder."
        )
    return found


def request_of(row: Result, overrides: Mapping[str, Any]) -> RunConfig:
    """The request that a record was made by, with inputs that lie elsewhere on this machine replaced.

    Raises:
        ConfigError: If the record does not hold it.
    """
    if not row.config:
        raise ConfigError(
            f"The record of {row.method} {row.scheme} holds no request: it cannot be made again."
        )
    data = {k: v for k, v in row.config.items() if k not in PLACES}
    requests = [MethodRequest.model_validate(m) for m in data.get("methods") or []]
    kept = next((m for m in requests if m.name == row.method and len(requests) == 1), None)
    method = kept or MethodRequest(name=row.method, options=row.options)
    data |= {"methods": [method.model_dump(mode="json")], "schemes": [row.scheme], "seeds": 1}
    for path, value in overrides.items():
        section, _, name = path.rpartition(".")
        if section:
            data[section] = {**data.get(section, {}), name: value}
        else:
            data[name] = value
    return validated(RunConfig, data, "the record's request")


def verify(
    row: Result, overrides: Mapping[str, Any] | None = None, listener: Listener | None = None
) -> Verdict:
    """Make a row again, from nothing, and compare.

    Args:
        row: The stored row.
        overrides: Field of the request (`model`, `calibration.dataset`, …) to value, for inputs that lie elsewhere.
        listener: Told of progress.

    Raises:
        ConfigError: If the request cannot be met here.
        NumericalError: If the method breaks down here.
    """
    config = request_of(row, overrides or {})
    with tempfile.TemporaryDirectory(prefix="qbench-verify-") as folder:
        config = config.model_copy(update={"output": folder})
        label = f"{row.method} {row.scheme}"
        wanted = [] if row.is_baseline else [Wanted(label, config.methods[0], row.scheme)]
        done = run_pass(config, wanted, listener)
    for error in done.errors.values():
        raise error
    again = done.baseline if row.is_baseline else done.rows[label]
    return compare_rows(row, again)


def compare_rows(row: Result, again: Result) -> Verdict:
    """Put the stored row and the one made again side by side."""
    fields = provenance.differences([row.contract_fields, again.contract_fields])
    if row.contract != again.contract and not fields:
        fields = {"contract": [row.contract, again.contract]}
    codes = None if row.codes is None or again.codes is None else row.codes == again.codes
    then, now = _environment(row), _environment(again)
    environment = {k: [then.get(k), now.get(k)] for k in {**then, **now} if then.get(k) != now.get(k)}
    options = {
        name: [value, again.options[name]]
        for name, value in row.options.items()
        if name in again.options and _content(value) != _content(again.options[name])
    }
    checks = [_check(key, row, again) for key in row.metrics]
    return Verdict(row, again, fields, options, codes, checks, environment)


def _content(option: Any) -> Any:
    """What an option means: of a file, written PATH#FINGERPRINT, wherever it lies, its fingerprint."""
    file = re.fullmatch(r".*#([0-9a-f]{16})", option, re.DOTALL) if isinstance(option, str) else None
    return file[1] if file else option


def without_times(row: Result) -> dict[str, Any]:
    """Everything that a row says but times, peaks of memory and the moment: equal for equal requests."""
    data = row.model_dump(mode="json", exclude={"created", "cost"})
    for block in data["blocks"]:
        block.pop("seconds")
    if data.get("memory"):
        data["memory"] = {k: v for k, v in data["memory"].items() if not k.startswith("peak_")}
    return data


def _environment(row: Result) -> dict[str, Any]:
    facts = {k: v for k, v in row.provenance.items() if k not in ("packages", "commit")}
    commit = row.provenance.get("commit") or {}
    return {**facts, **(row.provenance.get("packages") or {}), "commit": commit.get("hash")}


def _check(key: str, row: Result, again: Result) -> MetricCheck:
    then, now = row.metrics[key], again.metrics.get(key)
    if now is None:
        return MetricCheck(key, then.value, None, None, None, "differs")
    if then.value == now.value and then.items == now.items:
        return MetricCheck(key, then.value, now.value, 0.0, 0.0, "identical")
    near = abs(now.value - then.value) <= ROUNDING * abs(then.value)
    if not then.items or not now.items or len(then.items) != len(now.items):
        return MetricCheck(key, then.value, now.value, None, None, "agrees" if near else "differs")
    interval = paired_difference(now.items, then.items)
    if interval is None:
        return MetricCheck(key, then.value, now.value, None, None, "agrees" if near else "differs")
    within = interval.low <= 0 <= interval.high
    return MetricCheck(
        key,
        then.value,
        now.value,
        interval.mean,
        interval.half_width,
        "agrees" if near or within else "differs",
    )
