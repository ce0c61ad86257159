"""Bytes against what is really there: caches that transformers filled, files that safetensors wrote."""

from __future__ import annotations

import pytest
import torch

from qbench.errors import DataError
from qbench.evals.memory import (
    cache_bytes,
    folder_memory,
    kv_cache_bytes,
    measure_peaks,
    peak_cpu_bytes,
    stored_memory,
    tensor_bytes,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
@pytest.mark.parametrize("n", [1, 17])
def test_the_formula_is_what_the_cache_holds(build_tiny, tokens, family: str, n: int) -> None:
    model = build_tiny(family)
    cache = model(input_ids=tokens[:1, :n], use_cache=True).past_key_values
    assert (
        cache_bytes(cache) == kv_cache_bytes(model.config, n, bits=32) == 2 * kv_cache_bytes(model.config, n)
    )


def test_a_sliding_window_keeps_no_more_than_it(build_tiny) -> None:
    config = build_tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1).config
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert kv_cache_bytes(config, 20) == kv_cache_bytes(config, 1) // 2 * (20 + 8)


def test_a_quantized_cache_has_scales_and_zero_points(tiny_llama) -> None:
    layers, heads, head_dim = 2, 2, 8
    expected = layers * 2 * 5 * heads * (head_dim * 4 + 32) / 8
    assert kv_cache_bytes(tiny_llama.config, 5, bits=4) == expected
    per_token = layers * 2 * 5 * (heads * head_dim * 4 + 32) / 8
    assert kv_cache_bytes(tiny_llama.config, 5, bits=4, per_head=False) == per_token


def test_peaks_of_a_process_are_said_to_be_that(tiny_llama, tokens) -> None:
    found = measure_peaks(tiny_llama, tokens[:1], CPU)
    assert found["peak_of"] == "process" and found["prompt_tokens"] == 24
    assert 10**7 < found["peak_prefill_bytes"] <= found["peak_decode_bytes"] <= peak_cpu_bytes()
    assert found["cache_bytes"] == kv_cache_bytes(tiny_llama.config, 24, bits=32)


@pytest.mark.gpu
def test_peaks_on_a_gpu_are_of_each_phase(build_tiny) -> None:
    device = torch.device("cuda")
    model = build_tiny("llama", max_position_embeddings=2048, hidden_size=256).to(device)
    found = measure_peaks(model, torch.full((1, 2000), 5), device)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert found["peak_of"] == "GPU allocations"
    assert found["peak_prefill_bytes"] > found["peak_decode_bytes"] > weights + found["cache_bytes"]


def linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


@pytest.mark.parametrize("family,tied", [("llama", False), ("llama", True), ("opt", True)])
def test_everything_stored_is_counted_once(build_tiny, family: str, tied: bool) -> None:
    model = build_tiny(family, tie_word_embeddings=tied)
    model.tie_weights()
    model.config.dtype = torch.float16
    n_linear = sum(m.weight.numel() for m in linears(model))
    found = stored_memory(model, n_linear * 3.5 / 8, n_linear, tokens=64)
    total = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    assert found.bits_per_linear_weight == pytest.approx(3.5, rel=1e-3)
    assert found.model_bytes == found.linear_bytes + 2 * (total - n_linear)
    assert found.embedding_bytes == 96 * 32 * 2 and found.head_bytes == (0 if tied else 96 * 32 * 2)
    assert found.other_bytes > 0 and found.kv_cache_tokens == 64


def test_a_folder_is_counted_by_its_files(tmp_path, build_tiny) -> None:
    import safetensors.torch

    model = build_tiny("llama").half()
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert tensor_bytes(tmp_path) == {name: t.numel() * 2 for name, t in stored.items()}
    found = folder_memory(model, tmp_path, tokens=8)
    assert found.bits_per_linear_weight == 16
    assert found.model_bytes == sum(t.numel() * 2 for t in stored.values())
    assert found.embedding_bytes == found.head_bytes == 96 * 32 * 2

    # Packed: four bits a weight and a scale for each row, under the linear's name.
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = stored.pop(f"{name}.weight")
            stored[f"{name}.qweight"] = torch.zeros(weight.numel() // 8, dtype=torch.int32)
            stored[f"{name}.scales"] = torch.zeros(weight.shape[0], dtype=torch.float16)
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rows = sum(m.out_features for m in linears(model))
    weights = sum(m.weight.numel() for m in linears(model))
    assert folder_memory(model, tmp_path, tokens=8).bits_per_linear_weight == 4 + 16 * rows / weights


def test_a_damaged_file_is_named(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        tensor_bytes(tmp_path)
