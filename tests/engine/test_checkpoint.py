"""A kill at any moment leaves a valid state; nothing damaged and nothing of another run is ever used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qbench.engine import checkpoint as module
from qbench.engine.checkpoint import Checkpoint
from qbench.errors import ConfigError, DataError
from tests.block_states import block_state, same_state

KEY = "a" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two finished blocks."""
    checkpoint = Checkpoint(tmp_path / "lane", KEY)
    for index in range(2):
        checkpoint.save(index, block_state(index))
    return tmp_path / "lane"


def test_blocks_read_back_as_they_were_saved(folder: Path) -> None:
    again = Checkpoint(folder, KEY)
    assert len(again) == 2
    for index in range(2):
        assert same_state(again.load(index), block_state(index))


def test_a_new_folder_is_made_with_its_parents_and_is_empty(tmp_path: Path) -> None:
    assert len(Checkpoint(tmp_path / "a" / "b", KEY)) == 0
    assert (tmp_path / "a" / "b").is_dir()


def test_saving_goes_on_where_a_reopened_folder_ends(folder: Path) -> None:
    again = Checkpoint(folder, KEY)
    again.save(2, block_state(2))
    assert len(Checkpoint(folder, KEY)) == 3
    assert same_state(Checkpoint(folder, KEY).load(2), block_state(2))


def test_blocks_must_come_in_order(folder: Path) -> None:
    with pytest.raises(AssertionError, match="in order"):
        Checkpoint(folder, KEY).save(3, block_state(3))


def test_a_folder_of_another_run_is_refused_and_left_alone(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"belongs to another run.*--restart") as refusal:
        Checkpoint(folder, "b" * 64)
    assert refusal.value.exit_code == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"key": "x"}', '{"key": "x", "blocks": 3}'])
def test_a_damaged_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest .*manifest\.json is damaged"):
        Checkpoint(folder, KEY)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # inside the last tensor: the file still parses
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def exchange(path: Path) -> None:
    path.write_bytes((path.parent / "block-0000.safetensors").read_bytes())


@pytest.mark.parametrize(
    "damage", [flip_a_bit, cut, exchange, Path.unlink], ids=["bit", "cut", "exchanged", "gone"]
)
def test_a_damaged_block_is_refused_by_name_and_others_still_load(folder: Path, damage) -> None:
    damage(folder / "block-0001.safetensors")
    checkpoint = Checkpoint(folder, KEY)
    with pytest.raises(DataError, match=r"block-0001\.safetensors is missing or damaged.*--restart"):
        checkpoint.load(1)
    assert same_state(checkpoint.load(0), block_state(0))


def test_clear_forgets_everything(folder: Path) -> None:
    checkpoint = Checkpoint(folder, KEY)
    checkpoint.clear()
    assert len(checkpoint) == 0 and not list(folder.iterdir())
    Checkpoint(folder, "b" * 64).save(0, block_state(5))


def test_truncating_forgets_later_blocks_for_good(folder: Path) -> None:
    Checkpoint(folder, KEY).truncate(1)
    again = Checkpoint(folder, KEY)
    assert len(again) == 1 and same_state(again.load(0), block_state(0))
    again.save(1, block_state(7))
    assert same_state(Checkpoint(folder, KEY).load(1), block_state(7))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot create checkpoint folder"):
        Checkpoint(tmp_path / "file" / "lane", KEY)


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def steps_of_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many times one save reaches the disk (flushes and renames)."""
    count = kill_after(10**9, monkeypatch)
    Checkpoint(tmp_path / "count", KEY).save(0, block_state(0))
    monkeypatch.undo()
    return count[0]


def kill_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Raise at the step after `steps` flushes and renames."""
    done = [0]

    def counted(original):
        def step(*args):
            if done[0] == steps:
                raise Killed
            done[0] += 1
            return original(*args)

        return step

    monkeypatch.setattr(module, "_sync", counted(module._sync))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    return done


def test_a_kill_at_any_step_of_a_save_leaves_the_older_or_the_newer_state(
    tmp_path: Path, monkeypatch
) -> None:
    total = steps_of_one_save(tmp_path, monkeypatch)
    assert total >= 4  # block and manifest, each flushed and renamed
    outcomes = []
    for steps in range(total):
        folder = tmp_path / str(steps)
        Checkpoint(folder, KEY).save(0, block_state(0))
        kill_after(steps, monkeypatch)
        with pytest.raises(Killed):
            Checkpoint(folder, KEY).save(1, block_state(1))
        monkeypatch.undo()
        again = Checkpoint(folder, KEY)
        outcomes.append(len(again))
        for index in range(len(again)):
            assert same_state(again.load(index), block_state(index))
        if len(again) == 1:  # the run resumes and computes the block again
            again.save(1, block_state(1))
        assert same_state(Checkpoint(folder, KEY).load(1), block_state(1))
    assert outcomes == sorted(outcomes) and outcomes[0] == 1
    assert outcomes[2] == 1, "the block's file alone, without the manifest, does not count"


def test_block_manifest_and_folder_are_flushed_in_this_order(tmp_path: Path, monkeypatch) -> None:
    """After a power cut the manifest names no block that is not on disk, and the renames are there too."""
    flushed, sync = [], module._sync
    monkeypatch.setattr(module, "_sync", lambda path: (flushed.append(Path(path).name), sync(path)))
    Checkpoint(tmp_path / "lane", KEY).save(0, block_state(0))
    assert flushed == ["block-0000.tmp", "manifest.tmp", "lane"]


def test_a_process_that_dies_between_block_and_manifest_resumes(tmp_path: Path) -> None:
    """A real kill, without Python's unwinding."""
    script = f"""
import os
from pathlib import Path
from qbench.engine import checkpoint
from tests.block_states import block_state
lane = checkpoint.Checkpoint(Path({str(tmp_path / "lane")!r}), {KEY!r})
lane.save(0, block_state(0))
checkpoint.json.dumps = lambda *args, **kwargs: os._exit(9)
lane.save(1, block_state(1))
"""
    root = str(Path(module.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 9, done.stderr.decode()
    assert json.loads((tmp_path / "lane" / "manifest.json").read_text())["key"] == KEY
    again = Checkpoint(tmp_path / "lane", KEY)
    assert len(again) == 1 and same_state(again.load(0), block_state(0))
    again.save(1, block_state(1))
    assert len(Checkpoint(tmp_path / "lane", KEY)) == 2
