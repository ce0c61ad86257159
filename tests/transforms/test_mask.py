"""The gradual mask against the paper's formula, entry by entry, at every epoch."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from qbench.transforms.mask import bandwidth, gradual_mask

SIZES = [1, 2, 3, 8, 13, 32]
EPOCHS = [1, 2, 3, 10, 20, 40]


def published_band(size: int, epoch: int, epochs: int) -> int:
    """k_e = int((n − 1)/(E − 1)·e) + 1, in exact arithmetic."""
    return int(Fraction(size - 1, epochs - 1) * epoch) + 1


def entry(i: int, j: int, band: int, stability_factor: float) -> float:
    if i == j:
        return 1.0
    return stability_factor if 0 < abs(i - j) < band else 0.0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epochs", EPOCHS[1:])
def test_band_follows_the_formula_at_every_epoch(size: int, epochs: int) -> None:
    bands = [bandwidth(size, epoch, epochs) for epoch in range(epochs)]
    assert bands == [published_band(size, epoch, epochs) for epoch in range(epochs)]
    assert bands[0] == 1 and bands[-1] == size
    assert bands == sorted(bands)


@pytest.mark.parametrize("stability_factor", [1.0, 0.1, 1e-2])
@pytest.mark.parametrize(("size", "epochs"), [(5, 3), (8, 20), (12, 4)])
def test_every_entry_at_every_epoch(size: int, epochs: int, stability_factor: float) -> None:
    like = torch.zeros(1, dtype=torch.float64)
    for epoch in range(epochs):
        band = published_band(size, epoch, epochs)
        expected = [[entry(i, j, band, stability_factor) for j in range(size)] for i in range(size)]
        mask = gradual_mask(size, bandwidth(size, epoch, epochs), stability_factor, like)
        assert mask.dtype == torch.float64
        assert torch.allclose(mask, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_a_single_epoch_has_the_full_band(size: int) -> None:
    assert bandwidth(size, 0, 1) == size
    mask = gradual_mask(size, size, 0.25, torch.zeros(1))
    assert (mask.diagonal() == 1).all()
    assert (mask[~torch.eye(size, dtype=torch.bool)] == 0.25).all()


def test_after_the_last_epoch_the_band_stays_full() -> None:
    assert bandwidth(8, 5, 5) == bandwidth(8, 50, 5) == 8


def test_the_authors_floating_point_ends_one_band_short_where_the_docstring_says() -> None:
    in_floats = int((4096 - 1) / (20 - 1) * 19) + 1
    assert in_floats == 4095
    assert bandwidth(4096, 19, 20) == 4096
    for size in (64, 128, 768, 2048, 5120, 8192):
        for epochs in (20, 40):
            assert int((size - 1) / (epochs - 1) * (epochs - 1)) + 1 == bandwidth(size, epochs - 1, epochs)


def test_a_float64_mask_holds_the_stability_factor_in_float64() -> None:
    assert gradual_mask(2, 2, 0.01, torch.zeros(1, dtype=torch.float64))[0, 1].item() == 0.01


def test_the_mask_takes_dtype_and_device_of_its_example() -> None:
    mask = gradual_mask(4, 2, 0.1, torch.zeros(1, dtype=torch.bfloat16))
    assert mask.dtype == torch.bfloat16 and mask.shape == (4, 4)
