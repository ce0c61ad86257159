"""Checkpoint of one lane: a file per finished block, then a manifest advanced by atomic rename.

A kill at any moment leaves either the old or the new manifest, and every block the manifest names is on disk and
hashed. Resuming replays finished blocks from their files, so the codes are the same bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from qbench.engine.state import BlockState
from qbench.errors import ConfigError, DataError


class Checkpoint:
    """Folder of one lane's finished blocks."""

    def __init__(self, folder: Path, key: str, restart: bool = False):
        """Open a folder, or begin one.

        Args:
            folder: Created if missing.
            key: Hash of everything the blocks depend on; a folder of another key is refused, never reused.
            restart: Forget what the folder holds, damaged or not.

        Raises:
            ConfigError: If the folder belongs to another run or cannot be written.
            DataError: If its manifest is damaged.
        """
        self.folder, self.key = folder, key
        self.hashes: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"Cannot create checkpoint folder {folder}: {error.strerror}.") from error
        if restart:
            self.clear()
        manifest = folder / "manifest.json"
        if not manifest.exists():
            return
        try:
            content = json.loads(manifest.read_text())
            found, self.hashes = content["key"], list(content["blocks"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"Checkpoint manifest {manifest} is damaged ({error}). Use --restart.") from error
        if found != key:
            raise ConfigError(
                f"Checkpoint folder {folder} belongs to another run (key {found[:12]}, this run {key[:12]}): "
                "model, tokens, method, scheme or arithmetic differ. Use another --output, or --restart."
            )

    @classmethod
    def existing(cls, folder: Path) -> Checkpoint:
        """Open a folder for reading, whatever run it belongs to.

        Raises:
            DataError: If its manifest is missing or damaged.
        """
        try:
            key = str(json.loads((folder / "manifest.json").read_text())["key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"Checkpoint folder {folder} has no readable manifest ({error}).") from error
        return cls(folder, key)

    def __len__(self) -> int:
        return len(self.hashes)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def save(self, index: int, state: BlockState) -> None:
        """Store block `index`, which must be the next one."""
        assert index == len(self.hashes), "blocks are stored in order"
        path, temporary = self._path(index), self._path(index).with_suffix(".tmp")
        state.save(temporary)
        _sync(temporary)
        temporary.replace(path)
        self.hashes.append(_sha256(path))
        self._write_manifest()

    def _write_manifest(self) -> None:
        manifest = self.folder / "manifest.json"
        temporary = manifest.with_suffix(".tmp")
        temporary.write_text(json.dumps({"key": self.key, "blocks": self.hashes}, indent=1))
        _sync(temporary)
        temporary.replace(manifest)
        _sync(self.folder)

    def load(self, index: int) -> BlockState:
        """Read block `index`.

        Raises:
            DataError: If the file is missing or is not what was written.
        """
        path = self._path(index)
        if not path.exists() or _sha256(path) != self.hashes[index]:
            raise DataError(
                f"Checkpoint file {path} is missing or damaged (its hash differs from the manifest's). "
                "Use --restart to begin this run again."
            )
        return BlockState.load(path)

    def truncate(self, count: int) -> None:
        """Forget all blocks but the first `count`."""
        self.hashes = self.hashes[:count]
        self._write_manifest()

    def clear(self) -> None:
        """Forget everything, manifest first."""
        (self.folder / "manifest.json").unlink(missing_ok=True)
        for path in self.folder.glob("block-*.safetensors"):
            path.unlink()
        self.hashes = []


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
