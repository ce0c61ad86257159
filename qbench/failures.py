"""Failures: cells that broke down, each a file in the store's folder `failures`, with the error and the request.

A failure is not a result: it never appears in a table, and it goes away when its cell succeeds.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qbench.errors import DataError
from qbench.results import write_atomically


class Failure(BaseModel):
    """One cell that broke down.

    Attributes:
        key: Hash of the request (`RunConfig.hash` with one method and one scheme).
        kind: The error's class, or `killed` where the process ended without a word.
        code: Fingerprint of the code that failed: other code may succeed.
        config: The request, to be run again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    label: str
    model: str
    method: str
    scheme: str
    error: str
    kind: str
    code: str
    config: dict[str, Any] = {}
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


class FailureStore:
    """The failures of one results folder."""

    def __init__(self, store: str | Path) -> None:
        self.folder = Path(store) / "failures"

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:24]}.json"

    def save(self, failure: Failure) -> None:
        """Record a failure, or replace the earlier one of the same request."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(failure.key), failure.model_dump_json(indent=1).encode())

    def clear(self, key: str) -> None:
        """Forget a failure, because its cell succeeded."""
        self._path(key).unlink(missing_ok=True)

    def find(self, key: str) -> Failure | None:
        """The failure of a request, if there is one."""
        path = self._path(key)
        return self._read(path) if path.exists() else None

    def load_all(self) -> list[Failure]:
        """All failures, oldest first."""
        found = [self._read(path) for path in sorted(self.folder.glob("*.json"))]
        return sorted(found, key=lambda failure: failure.created)

    def _read(self, path: Path) -> Failure:
        try:
            return Failure.model_validate(json.loads(path.read_text()))
        except (OSError, ValueError, ValidationError) as error:
            reason = re.sub(r"\s+", " ", str(error))[:120]
            raise DataError(f"Cannot read failure record {str(path)!r}: {reason}. Delete the file.") from None
