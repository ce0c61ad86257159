"""Which elements share a scale, and which group sizes are refused before anything is computed."""

from __future__ import annotations

import pytest
import torch

from qbench.errors import UnsupportedSchemeError
from qbench.quant.grid import Grid, check_group_size

WIDTHS = {"self_attn.q_proj": 96, "mlp.up_proj": 96, "mlp.down_proj": 160}


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_run_from_zero_to_two_to_the_bits_less_one(bits: int) -> None:
    grid = Grid(bits, symmetric=True)
    assert grid.qmax + 1 == 2**bits
    assert grid.mid == 2**bits // 2


def test_groups_are_consecutive_elements_of_one_row() -> None:
    x = torch.arange(24).reshape(2, 12)
    groups = Grid(4, group_size=4).split(x)
    assert groups.tolist() == [
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
        [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]],
    ]
    assert Grid(4, group_size=4).n_groups(12) == 3


def test_without_a_group_size_the_whole_last_dimension_shares_a_scale() -> None:
    assert Grid(4).split(torch.zeros(5, 3, 12)).shape == (5, 3, 1, 12)
    assert Grid(4).n_groups(12) == 1


@pytest.mark.parametrize("group_size", [None, 1, 8, 16, 32], ids=["none", "1", "8", "16", "32"])
def test_group_sizes_that_divide_every_width_pass(group_size: int | None) -> None:
    check_group_size(group_size, WIDTHS)


def test_a_group_size_that_divides_nothing_names_every_linear_and_what_would_fit() -> None:
    with pytest.raises(UnsupportedSchemeError) as refusal:
        check_group_size(36, WIDTHS)
    message = str(refusal.value)
    for name, width in WIDTHS.items():
        assert f"{name} ({width})" in message
    assert "group_size=36" in message
    assert "divide all of them: 16, 32;" in message


def test_only_the_offending_linears_are_named() -> None:
    with pytest.raises(UnsupportedSchemeError, match=r"of mlp\.down_proj \(160\)\.") as refusal:
        check_group_size(96, WIDTHS)
    assert "q_proj" not in str(refusal.value) and "up_proj" not in str(refusal.value)


def test_widths_without_a_common_group_size_say_so() -> None:
    with pytest.raises(UnsupportedSchemeError, match="None of 16 to 256 fits"):
        check_group_size(64, {"a": 100, "b": 36})
