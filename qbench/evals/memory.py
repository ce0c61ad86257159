"""Bytes: of the weights as stored, of the key-value cache, and of the peak while a prompt is read and continued.

What is stored follows from shapes and bit widths and is the same on every machine. Peaks are measured, and a model
whose quantization is simulated has the peak of the simulation, not of a deployment: the record says which it is.
"""

from __future__ import annotations

import json
import math
import resource
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import DataError
from qbench.evals.perplexity import evaluating
from qbench.results import MemoryRecord

DECODED = 4  # tokens decoded to see the peak: the cache grows by one position a step
SCALE_AND_ZERO_BITS = 32  # of one range of a quantized cache: float16 scale, 16-bit zero point


def peak_cpu_bytes() -> int:
    """Peak resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def kv_cache_bytes(config: Any, tokens: int, bits: int = 16, per_head: bool = True) -> int:
    """Bytes of the keys and values of one sequence.

    Args:
        config: Of the model, as transformers has it; layers that see a window keep no more than it.
        tokens: Length of the sequence.
        bits: Of a stored number; below 16 each token has a scale and a zero point.
        per_head: Whether these are per token and head, or per token.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    ranges = 0 if bits >= 16 else SCALE_AND_ZERO_BITS * (heads if per_head else 1)
    per_token = 2 * (heads * head_dim * bits + ranges)  # keys and values
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    kept = sum(min(tokens, window) if kind == "sliding_attention" and window else tokens for kind in kinds)
    return math.ceil(per_token * kept / 8)


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache of transformers really holds."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@torch.no_grad()
def measure_peaks(model: nn.Module, ids: Tensor, device: torch.device) -> dict[str, Any]:
    """Read a prompt and decode a few tokens.

    Args:
        model: A causal language model, ready to run on `device`.
        ids: The prompt  # [1, t]; cut so that what is decoded still fits the model's positions
        device: Where it runs.

    Returns:
        Fields of a `MemoryRecord`: on a GPU the peak of allocated memory in each phase, elsewhere the process's peak
        resident memory until the end of both, which also holds whatever came before.
    """
    cuda = device.type == "cuda"
    ids = ids[:, : max(1, getattr(model.config, "max_position_embeddings", ids.shape[1] + DECODED) - DECODED)]
    with evaluating(model):
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        out = model(input_ids=ids.to(device), use_cache=True, **_last_logits(model))
        prefill = torch.cuda.max_memory_allocated(device) if cuda else peak_cpu_bytes()
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        held = cache_bytes(cache)
        del out
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(DECODED):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        decode = torch.cuda.max_memory_allocated(device) if cuda else peak_cpu_bytes()
    return {
        "prompt_tokens": ids.shape[1],
        "cache_bytes": held,
        "peak_prefill_bytes": prefill,
        "peak_decode_bytes": decode,
        "peak_of": "GPU allocations" if cuda else "process",
    }


def _last_logits(model: nn.Module) -> dict[str, Any]:
    import inspect

    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def stored_memory(
    model: Any, linear_bytes: float, n_linear: int, *, cache_bits: int = 16, tokens: int, **measured: Any
) -> MemoryRecord:
    """Account for a model whose blocks' linears take `linear_bytes`; everything else as its checkpoint stores it.

    Args:
        model: A causal language model of transformers.
        linear_bytes: Codes, scales, zero points and run-time transforms of the blocks' linears.
        n_linear: Their weights, biases not counted.
        cache_bits: Of the numbers in the key-value cache.
        tokens: Length for which the cache's size is given.
        measured: Further fields, see `measure_peaks`.
    """
    size = _stored_size(model)
    embedding, head = _embedding_and_head(model)
    tied = head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr()
    embedding_bytes = 0 if embedding is None else embedding.numel() * size
    head_bytes = 0 if head is None or tied else head.numel() * size
    every = {p.data_ptr(): p.numel() for p in model.parameters()}
    known = n_linear + (embedding_bytes + head_bytes) // size
    return MemoryRecord(
        linear_bytes=math.ceil(linear_bytes),
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        other_bytes=max(0, sum(every.values()) - known) * size,
        n_linear_weights=n_linear,
        kv_cache_bytes=kv_cache_bytes(model.config, tokens, cache_bits),
        kv_cache_tokens=tokens,
        kv_cache_bits=cache_bits,
        **measured,
    )


def folder_memory(model: Any, folder: Path, *, tokens: int, **measured: Any) -> MemoryRecord:
    """Account for a saved model by the tensors in its safetensors files, whatever their format is.

    Args:
        model: The model as it was loaded from there.
        folder: With safetensors files.
        tokens: Length for which the cache's size is given.
        measured: Further fields, see `measure_peaks`.

    Raises:
        DataError: If a file is damaged.
    """
    linears = {name: module for name, module in model.named_modules() if _n_weights(module)}
    head_name = next((n for n, m in linears.items() if m is model.get_output_embeddings()), None)
    linears.pop(head_name, None)
    embedding_name = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), "")
    counted = dict.fromkeys(("linear_bytes", "embedding_bytes", "head_bytes", "other_bytes"), 0)
    for name, n_bytes in tensor_bytes(folder).items():
        owner, _, leaf = name.rpartition(".")
        if owner in linears and leaf != "bias":
            counted["linear_bytes"] += n_bytes
        elif owner == embedding_name:
            counted["embedding_bytes"] += n_bytes
        elif owner == head_name:
            counted["head_bytes"] += n_bytes
        else:
            counted["other_bytes"] += n_bytes
    return MemoryRecord(
        **counted,
        n_linear_weights=sum(_n_weights(module) for module in linears.values()),
        kv_cache_bytes=kv_cache_bytes(model.config, tokens),
        kv_cache_tokens=tokens,
        kv_cache_bits=16,
        **measured,
    )


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Tensor to bytes, from the headers of a folder's safetensors files; weights are not read."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    found[name] = end - begin
        except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError):
            raise DataError(f"{str(path)!r} is no readable safetensors file.") from None
    return found


def _n_weights(module: Any) -> int:
    """Weights of a linear, packed or not; 0 for anything else. GPT-2's linears have `nf` outputs."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features * module.out_features)
    return int(module.weight.numel()) if hasattr(module, "nf") else 0


def _embedding_and_head(model: Any) -> tuple[Tensor | None, Tensor | None]:
    return tuple(
        getattr(module, "weight", None)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )


def _stored_size(model: Any) -> int:
    """Bytes of a number in the model's checkpoint, whatever precision it was loaded in."""
    dtype = getattr(model.config, "dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return (dtype or next(model.parameters()).dtype).itemsize
