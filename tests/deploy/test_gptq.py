"""The GPTQ layout, decoded by a loop over bits written from its description, and the choice of its version."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from qbench.deploy.gptq import GPTQ
from qbench.models.packed import PackedFolder
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight
from tests.deploy.exports import quantize, write


def random_weight(bits: int, *, symmetric: bool = False, lowest_zero: int = 1) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (32, 64), dtype=torch.uint8, generator=generator)
    scale = torch.rand(32, 4, generator=generator).half()
    zero = torch.randint(lowest_zero, 2**bits, (32, 4), dtype=torch.int16, generator=generator)
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    return QuantizedWeight(codes, scale, zero, Grid(bits, symmetric, 16))


def field(words: list[int], bits: int, i: int) -> int:
    """Code i of a dense little-endian stream, one bit at a time."""
    return sum(((words[(i * bits + b) // 32] >> ((i * bits + b) % 32)) & 1) << b for b in range(bits))


@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tensors_decode_by_the_formats_description(bits, symmetric, version) -> None:
    weight = random_weight(bits, symmetric=symmetric)
    tensors = type(GPTQ)(version).tensors(weight)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "qweight": (torch.int32, (64 * bits // 32, 32)),
        "qzeros": (torch.int32, (4, 32 * bits // 32)),
        "scales": (torch.float16, (4, 32)),
        "g_idx": (torch.int32, (64,)),
    }
    columns, zeros = tensors["qweight"].T.tolist(), tensors["qzeros"].tolist()
    expected = weight.dequantize()
    for row in range(0, 32, 7):
        for column in range(0, 64, 5):
            group = int(tensors["g_idx"][column])
            zero = field(zeros[group], bits, row) + (1 if version == 1 else 0)
            value = float(tensors["scales"][group, row]) * (field(columns[row], bits, column) - zero)
            assert value == pytest.approx(float(expected[row, column]), rel=1e-6)


def test_a_zero_point_of_0_makes_version_2() -> None:
    one, other = random_weight(4), random_weight(4, lowest_zero=0)
    other.zero_point[3, 1] = 0
    assert GPTQ.settle(None, [one]).version == 1
    settled = GPTQ.settle(None, [one, other])
    assert settled.version == 2
    assert settled.quantization_config(_scheme())["checkpoint_format"] == "gptq_v2"
    assert "AutoGPTQ 0.7.1 does not" in settled.notes(_scheme())[0]
    with pytest.raises(AssertionError, match="needs version 2"):
        GPTQ.tensors(other)


def _scheme():
    from qbench.scheme import Scheme

    return Scheme.parse("W4A16g16")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_borrowed_across_a_word_are_read_back(bits, tmp_path) -> None:
    """GPTQModel turns v2 into v1 by subtracting 1 from every field of whole words: a zero point of 0 borrows."""
    from safetensors.torch import save_file

    weight = random_weight(bits, lowest_zero=0)
    weight.zero_point[5] = 0
    tensors = type(GPTQ)(2).tensors(weight)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    tensors["qzeros"] = (tensors["qzeros"].long() - ones).to(torch.int32)
    save_file({f"model.layers.0.linear.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    settings = GPTQ.quantization_config(_scheme()) | {"bits": bits}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    found = PackedFolder(tmp_path).linear("model.layers.0.linear")
    assert torch.equal(found.zero_point, weight.zero_point)


def test_the_folder_has_what_each_reader_looks_for(build_tiny, tokens, tmp_path) -> None:
    loaded, result = quantize(build_tiny, tokens, tmp_path, "llama", "rtn", "W4A16g16-sym")
    folder = tmp_path / "packed"
    write(loaded, result, "gptq", folder)
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    assert json.loads((folder / "quantize_config.json").read_text()) == settings  # AutoGPTQ
    assert (
        settings["quant_method"] == "gptq" and settings["checkpoint_format"] == "gptq"
    )  # GPTQModel, transformers
    assert (settings["bits"], settings["group_size"], settings["sym"], settings["desc_act"]) == (
        4,
        16,
        True,
        False,
    )
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # transformers 4
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16  # as in the checkpoint
    assert not any(name.endswith("proj.weight") for name in tensors)
