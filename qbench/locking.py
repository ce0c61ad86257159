"""A lock between processes that share a folder: who holds it computes, the others wait or do something else.

The kernel releases it when its holder ends in whatever way, SIGKILL included; a lock file that is left behind locks
nothing.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Lock:
    """One advisory lock on one file, which exists only while it is held."""

    def __init__(self, path: Path) -> None:
        """Name the lock; nothing is created."""
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock if nobody holds it; says whether it is ours now."""
        if self._descriptor is not None:
            return True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder removes the file before it lets go: what was opened may no longer be the file of this name.
            if os.stat(self.path).st_ino != os.fstat(descriptor).st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let others have it; nothing happens if it is not ours."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
