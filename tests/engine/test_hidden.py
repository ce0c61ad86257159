"""Hidden states read back what was written wherever they live, and a place is chosen by what is free."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from qbench.engine.hidden import HiddenStates, choose_placement
from qbench.errors import ConfigError

CPU = torch.device("cpu")
PLACES = pytest.mark.parametrize("placement", ["device", "cpu", "disk"])


@PLACES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_reads_back_what_was_written(placement, dtype, tmp_path: Path) -> None:
    states = HiddenStates((5, 3, 4), CPU, placement, dtype, tmp_path)
    values = torch.randn(5, 3, 4).to(dtype)
    states.write(3, values[3:])
    states.write(0, values[:1])
    states.write(1, values[1:3])
    assert len(states) == 5
    assert torch.equal(states.read(0, 5), values)
    assert torch.equal(states.read(2, 4), values[2:4])
    assert states.read(4, 5).dtype == dtype


@PLACES
def test_writing_casts_to_the_arrays_own_type(placement, tmp_path: Path) -> None:
    states = HiddenStates((1, 2, 2), CPU, placement, torch.float32, tmp_path)
    values = torch.randn(1, 2, 2, dtype=torch.float64)
    states.write(0, values)
    assert torch.equal(states.read(0, 1), values.float())


@PLACES
def test_another_array_of_the_same_kind_shares_nothing(placement, tmp_path: Path) -> None:
    first = HiddenStates((2, 2, 2), CPU, placement, torch.float32, tmp_path)
    first.write(0, torch.ones(2, 2, 2))
    second = first.empty_like()
    second.write(0, torch.zeros(2, 2, 2))
    assert (second.shape, second.placement) == (first.shape, placement)
    assert (first.read(0, 2) == 1).all() and (second.read(0, 2) == 0).all()


def test_the_file_lies_in_the_folder_asked_for_and_goes_with_the_array(tmp_path: Path) -> None:
    states = HiddenStates((2, 8, 16), CPU, "disk", torch.float32, tmp_path)
    another = states.empty_like()
    files = list(tmp_path.iterdir())
    assert len(files) == 2 and all(file.stat().st_size == 2 * 8 * 16 * 4 for file in files)
    del states, another
    assert not list(tmp_path.iterdir())


def test_what_is_written_reaches_the_file_and_not_private_memory(tmp_path: Path) -> None:
    states = HiddenStates((2, 2, 2), CPU, "disk", torch.float32, tmp_path)
    values = torch.arange(8.0).reshape(2, 2, 2)
    states.write(0, values)
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == values.numpy().tobytes()


def test_what_half_of_the_disk_cannot_hold_is_refused(monkeypatch, tmp_path: Path) -> None:
    free(monkeypatch, 0, 2**21 - 2)
    with pytest.raises(ConfigError):
        choose_placement(2**20, CPU, tmp_path)


def test_only_disk_writes_files(tmp_path: Path) -> None:
    HiddenStates((2, 2, 2), CPU, "cpu", torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())


def free(monkeypatch: pytest.MonkeyPatch, memory: int, disk: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=disk))


@pytest.mark.parametrize(
    ("memory", "disk", "expected"),
    [(2**30, 2**30, "cpu"), (2**20, 2**30, "disk"), (2**21 - 2, 2**30, "disk"), (2**21 + 2, 0, "cpu")],
    ids=[
        "memory first",
        "disk when memory is short",
        "half of memory stays free",
        "half of memory is enough",
    ],
)
def test_place_is_chosen_by_free_memory(monkeypatch, tmp_path, memory: int, disk: int, expected: str) -> None:
    free(monkeypatch, memory, disk)
    assert choose_placement(2**20, CPU, tmp_path) == expected


def test_what_fits_nowhere_is_refused_with_its_size(monkeypatch, tmp_path: Path) -> None:
    free(monkeypatch, 2**30, 2**30)
    with pytest.raises(ConfigError, match=r"need 3\.0 GiB.*--nsamples, --seqlen"):
        choose_placement(3 * 2**30, CPU, tmp_path)


@pytest.mark.gpu
def test_on_a_gpu_windows_are_read_onto_the_device_from_anywhere(tmp_path: Path) -> None:
    device, values = torch.device("cuda"), torch.randn(3, 2, 4)
    for placement in ("device", "cpu", "disk"):
        states = HiddenStates((3, 2, 4), device, placement, torch.float32, tmp_path)
        states.write(0, values.to(device))
        torch.cuda.synchronize()
        assert states.read(0, 3).device.type == "cuda"
        assert torch.equal(states.read(0, 3).cpu(), values)
    assert choose_placement(2**10, device) == "device"
