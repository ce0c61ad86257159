"""A finished block survives its file bit for bit; weights follow from integers; a damaged file is named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.engine.state import BlockState
from qbench.errors import DataError
from tests.block_states import block_state, same_state


@pytest.mark.parametrize("quantized", [True, False], ids=["integers", "floats"])
def test_a_file_gives_back_the_same_state(tmp_path: Path, quantized: bool) -> None:
    state = block_state(3, quantized=quantized)
    state.save(tmp_path / "block")
    assert same_state(BlockState.load(tmp_path / "block"), state)


def test_a_state_without_record_and_parameters_round_trips(tmp_path: Path) -> None:
    state = replace(block_state(), learned={}, record=None, transforms=[])
    state.save(tmp_path / "block")
    assert same_state(BlockState.load(tmp_path / "block"), state)


def test_the_comparison_used_here_sees_a_single_bit() -> None:
    state, other = block_state(), block_state()
    assert same_state(state, other)
    other.linears["q"].codes[0, 0] ^= 1
    assert not same_state(state, other)
    other = block_state()
    other.rest.bias["down"] = torch.zeros(16)
    assert not same_state(state, other)


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    block_state(1).save(tmp_path / "a")
    block_state(1).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_parameters_with_gradients_and_views_can_be_saved(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    state = replace(block_state(), learned={"p": parameter, "transposed": parameter.detach().T.clone().T})
    state.save(tmp_path / "block")
    learned = BlockState.load(tmp_path / "block").learned
    assert torch.equal(learned["p"], parameter.detach()) and not learned["p"].requires_grad
    assert torch.equal(learned["transposed"], parameter.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tensors_are_derived_from_the_integers(dtype: torch.dtype) -> None:
    state = block_state()
    tensors = state.tensors("cpu", dtype)
    q = state.linears["q"]
    expected = [
        [
            (q.codes[i, j].item() - q.zero_point[i, j // 8].item()) * q.scale[i, j // 8].float().item()
            for j in range(16)
        ]
        for i in range(8)
    ]
    assert torch.equal(tensors.weight["q"], torch.tensor(expected).to(dtype))
    assert tensors.weight["down"].dtype == dtype and tensors.norm_matrix["attn_norm"].dtype == dtype
    assert tensors.bias["down"] is None and tensors.norm_bias["attn_norm"] is None


def test_deriving_tensors_leaves_the_state_alone() -> None:
    state = block_state()
    state.tensors("cpu")
    assert state.rest.weight == {}
    assert same_state(state, block_state())


def test_weight_bits_count_codes_scales_and_zero_points() -> None:
    # q: 8 × 16 at 4 bits, two groups of 8 per row; down: 16 × 8 at 3 bits, symmetric, one scale per row
    assert block_state().weight_bits == (128 * 4 + 16 * (16 + 4)) + (128 * 3 + 16 * 16)
    assert block_state(quantized=False).weight_bits == 2 * 128 * 16


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read checkpoint file .*gone"):
        BlockState.load(tmp_path / "gone")
    path = tmp_path / "block"
    block_state().save(path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a tensor file at all", content[:4]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="--restart"):
            BlockState.load(path)


def test_a_file_of_another_format_or_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "block"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="has format None, this version reads 1"):
        BlockState.load(path)
    block_state().save(path)
    save_file(load_file(path), path, {"qbench": json.dumps({"format": 99})})
    with pytest.raises(DataError, match="has format 99"):
        BlockState.load(path)


@pytest.mark.parametrize("part", ["codes", "scale", "zero_point", "role"])
def test_the_digest_sees_every_integer_and_nothing_else(part: str) -> None:
    def digest(state: BlockState) -> str:
        found = hashlib.sha256()
        state.update_digest(found)
        return found.hexdigest()

    state = block_state()
    timed = replace(state, record=None, learned={}, transforms=[])
    assert digest(block_state()) == digest(state) == digest(timed)
    other = block_state()
    if part == "role":
        other.linears["k"] = other.linears.pop("q")
    else:
        tensor = getattr(other.linears["q"], part)
        tensor[0, 0] += 1
    assert digest(other) != digest(state)
