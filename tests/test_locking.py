"""The lock between processes, with real processes: held once, and gone with its holder however that ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qbench.locking import Lock

HOLDER = """
import sys, time
from pathlib import Path
from qbench.locking import Lock
print(Lock(Path(sys.argv[1])).acquire() and "held", flush=True)
time.sleep(600)
"""
COUNTER = """
import sys, time
from pathlib import Path
from qbench.locking import Lock
lock, total = Lock(Path(sys.argv[1])), Path(sys.argv[2])
for _ in range(50):
    while not lock.acquire():
        time.sleep(0.0005)
    total.write_text(str(int(total.read_text()) + 1))
    lock.release()
"""


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    one, other = (Lock(tmp_path / "folder" / "lock") for _ in range(2))
    assert one.acquire() and one.acquire() and not other.acquire()
    other.release()  # not its own: nothing happens
    assert not other.acquire()
    one.release()
    assert not one.path.exists() and other.acquire()


def test_a_lock_goes_with_a_holder_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    lock = Lock(path)
    assert not lock.acquire()
    holder.kill()
    holder.communicate()
    assert path.exists() and lock.acquire()


def test_processes_never_hold_a_lock_together(tmp_path: Path) -> None:
    """An unprotected read, add, write by three processes would lose counts."""
    total = tmp_path / "total"
    total.write_text("0")
    command = [sys.executable, "-c", COUNTER, str(tmp_path / "lock"), str(total)]
    workers = [subprocess.Popen(command) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert total.read_text() == "150"
