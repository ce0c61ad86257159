"""Fixtures for every test: tiny models with random weights, token windows, reference data where it exists.

Nothing here or below touches a network. The tiny models are built from a configuration with fixed seeds; all
their parameters are random, biases and norm weights too: the zeros and ones of a fresh initialisation would
let a forgotten bias or norm pass.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before anything imports torch or a hub library: both read their environment once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other on shared cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the deterministic cuBLAS, for tests marked gpu

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
VOCAB, MAX_LEN = 96, 64
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GATED = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2}  # head_dim 8, two query heads per KV head


def pytest_configure(config: pytest.Config) -> None:
    """Give the datasets cache a folder of its own, so that no test sees an earlier run's copy."""
    cache = tempfile.TemporaryDirectory(prefix="qbench-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["HF_HOME"] = cache.name
    os.environ["HF_DATASETS_CACHE"] = str(Path(cache.name, "datasets"))
    torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without a GPU; mark whatever uses the reference data, so `-m "not shared"` works."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test at the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """Folder with `models/` and `data/`: QBENCH_REFERENCE, or `shared` beside the repository."""
    folder = Path(os.environ.get("QBENCH_REFERENCE") or REPO.parent / "shared")
    if not (folder / "models").is_dir() or not (folder / "data").is_dir():
        pytest.skip(f"REFERENCE DATA ABSENT: no models/ and data/ in {folder}; set QBENCH_REFERENCE")
    return folder


@pytest.fixture
def tokens() -> torch.Tensor:
    """Eight windows of 24 token ids that every tiny model accepts: [n_samples, seq_len]."""
    return torch.randint(3, VOCAB, (8, 24), generator=torch.Generator().manual_seed(2))


def _randomized(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Redraw every parameter so that each one matters to the output, in float32 and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise if "embed" in name else noise / parameter.shape[1] ** 0.5)
            elif name.endswith("weight"):  # of a norm
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return model.eval()


@pytest.fixture
def build_tiny() -> Callable[..., torch.nn.Module]:
    """Factory: `build_tiny("llama", num_key_value_heads=4, seed=1)` is a tiny LLaMA with MHA instead."""
    import transformers as hf

    families: dict[str, tuple[type, type, dict]] = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, GATED),
        "mistral": (hf.MistralConfig, hf.MistralForCausalLM, GATED | {"sliding_window": None}),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, GATED),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, GATED | {"head_dim": 8}),
        "opt": (hf.OPTConfig, hf.OPTForCausalLM, SMALL | {"ffn_dim": 64, "dropout": 0.0}),
    }

    def build(family: str, *, seed: int = 0, **changes: object) -> torch.nn.Module:
        config_class, model_class, settings = families[family]
        return _randomized(model_class(config_class(**(settings | changes))), seed)

    return build


@pytest.fixture
def tiny_llama(build_tiny: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """LLaMA with 2 blocks, hidden 32, 4 query and 2 key/value heads of 8."""
    return build_tiny("llama")


@pytest.fixture
def tiny_mistral(build_tiny: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """Mistral of the same shape."""
    return build_tiny("mistral")


@pytest.fixture
def tiny_qwen2(build_tiny: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """Qwen2 of the same shape: q, k and v have biases."""
    return build_tiny("qwen2")


@pytest.fixture
def tiny_qwen3(build_tiny: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """Qwen3 of the same shape: q and k are normalised per head before RoPE."""
    return build_tiny("qwen3")


@pytest.fixture
def tiny_opt(build_tiny: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """OPT with 2 blocks, hidden 32, 4 heads: LayerNorm, biases everywhere, ReLU, no RoPE."""
    return build_tiny("opt")
