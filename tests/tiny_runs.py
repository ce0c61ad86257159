"""Reconstruction of tiny models for tests, and what its result should compute, written again without the engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from qbench.engine import attention
from qbench.engine.activations import ActivationStats
from qbench.engine.checkpoint import Checkpoint
from qbench.engine.lane import Lane, LaneResult
from qbench.engine.plan import BlockView
from qbench.engine.prepare import block_tensors
from qbench.engine.progress import Listener
from qbench.engine.reconstruct import reconstruct
from qbench.engine.settings import EngineSettings
from qbench.engine.state import BlockState
from qbench.methods import METHODS
from qbench.models.base import BlockSpec
from qbench.models.loading import architecture_for
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme
from tests.blocks import blocks_of

CPU = torch.device("cpu")


def spec_of(model: nn.Module) -> BlockSpec:
    """Description of the model's blocks."""
    return architecture_for(model.config).block_spec(blocks_of(model)[0], model.config)


def make_lane(
    model: nn.Module, method: str, scheme: str, checkpoint: Checkpoint | None = None, **options: Any
) -> Lane:
    """A lane as the runner makes it, presets resolved."""
    parsed = Scheme.parse(scheme)
    planner = METHODS.load(method)(**options).resolve(parsed, spec_of(model))
    return Lane(f"{method} {scheme}", planner, parsed, checkpoint)


def reconstruct_lanes(
    model: nn.Module,
    ids: Tensor,
    lanes: Sequence[Lane],
    listener: Listener | None = None,
    **settings: Any,
) -> list[LaneResult]:
    """Run the lanes through the engine on the CPU."""
    model.set_attn_implementation(attention.register())
    arranged = EngineSettings(**({"device": CPU, "placement": "cpu"} | settings))
    return reconstruct(model, list(blocks_of(model)), spec_of(model), lanes, ids, arranged, listener)


def stored(result: LaneResult, learned: bool = True) -> dict[str, Tensor]:
    """Every tensor that a lane leaves behind, by block and name."""
    flat: dict[str, Tensor] = {}
    for i in range(len(result)):
        state = result.state(i)
        for role, linear in state.linears.items():
            if isinstance(linear, QuantizedWeight):
                parts = {"codes": linear.codes, "scale": linear.scale, "zero_point": linear.zero_point}
                flat |= {f"{i}.{role}.{name}": part for name, part in parts.items()}
            else:
                flat[f"{i}.{role}.weight"] = linear
        for group in ("bias", "norm_weight", "norm_bias", "norm_matrix"):
            for name, tensor in getattr(state.rest, group).items():
                if tensor is not None:
                    flat[f"{i}.{group}.{name}"] = tensor
        if learned:
            flat |= {f"{i}.learned.{name}": tensor for name, tensor in state.learned.items()}
    return flat


def differences(one: LaneResult, other: LaneResult) -> list[str]:
    """Names of stored tensors that are not equal bit for bit, or are in one of the two only."""
    first, second = stored(one), stored(other)
    unmatched = sorted(first.keys() ^ second.keys())
    return unmatched + [
        name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])
    ]


@torch.no_grad()
def linear_inputs(model: nn.Module, ids: Tensor) -> list[dict[str, Tensor]]:
    """What reaches each linear of the full-precision model: by block, by role, [windows, tokens, in]."""
    spec, seen = spec_of(model), [{} for _ in blocks_of(model)]
    handles = []
    for inputs, block in zip(seen, blocks_of(model), strict=True):
        for role, path in spec.linears.items():

            def keep(_: nn.Module, args: tuple[Tensor], inputs: dict = inputs, role: str = role) -> None:
                inputs.setdefault(role, []).append(args[0].reshape(-1, args[0].shape[-1]))

            handles.append(block.get_submodule(path).register_forward_pre_hook(keep))
    for window in ids:
        model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [{role: torch.stack(windows) for role, windows in inputs.items()} for inputs in seen]


def view_of(model: nn.Module, ids: Tensor, scheme: str, index: int = 0) -> BlockView:
    """What a method sees of a block, its statistics gathered by `linear_inputs`."""
    parsed, spec, blocks = Scheme.parse(scheme), spec_of(model), blocks_of(model)
    stats = {}
    for role, x in linear_inputs(model, ids)[index].items():
        centres = (x.amax(1) + x.amin(1)) / 2  # [windows, in]
        centre = centres[0]
        for new in centres[1:]:
            centre = 0.99 * centre + 0.01 * new
        stats[role] = ActivationStats(x.abs().amax((0, 1)), centre)
    grid = Grid(parsed.wbits, parsed.symmetric, parsed.group_size)
    tensors = block_tensors(blocks[index], spec, "cpu", torch.float32)
    return BlockView(index, len(blocks), spec, parsed, grid, tensors, stats)


# ------------------------------------------------------------------ the same model, without the engine


def naive_dequantize(weight: QuantizedWeight) -> Tensor:
    """Group by group: scale · (code − zero point), in float32."""
    codes, scale, zero = weight.codes.float(), weight.scale.float(), weight.zero_point.float()
    size = weight.grid.group_size or codes.shape[1]
    out = torch.empty_like(codes)
    for group in range(codes.shape[1] // size):
        columns = slice(group * size, (group + 1) * size)
        out[:, columns] = (codes[:, columns] - zero[:, group, None]) * scale[:, group, None]
    return out


def naive_fake_quantize(x: Tensor, bits: int) -> Tensor:
    """Asymmetric over the last dimension, the range widened to contain 0."""
    if bits >= 16:
        return x
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(1e-5, 1e4)
    zero = torch.round(-low / scale)
    codes = torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1)
    return (codes - zero) * scale


class _NaiveNorm(nn.Module):
    def __init__(self, norm: nn.Module, bias: Tensor | None, matrix: Tensor | None):
        super().__init__()
        self.norm, self.bias, self.matrix = norm, bias, matrix

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = y if self.bias is None else y + self.bias
        return y if self.matrix is None else y @ self.matrix


def naive_block(block: nn.Module, spec: BlockSpec, state: BlockState, scheme: Scheme) -> nn.Module:
    """A copy of transformers' own layer with the state's weights, and hooks that quantize every linear's input."""
    # the configuration stays shared: it names the attention
    configs = {id(m.config): m.config for m in block.modules() if hasattr(m, "config")}
    layer = copy.deepcopy(block, configs)
    dtype = next(block.parameters()).dtype

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    for role, path in spec.linears.items():
        stored_linear = state.linears[role]
        is_integer = isinstance(stored_linear, QuantizedWeight)
        weight = naive_dequantize(stored_linear) if is_integer else stored_linear
        linear = nn.Linear(
            weight.shape[1], weight.shape[0], bias=state.rest.bias[role] is not None, dtype=dtype
        )
        linear.weight.data = cast(weight)
        if state.rest.bias[role] is not None:
            linear.bias.data = cast(state.rest.bias[role])
        linear.register_forward_pre_hook(lambda _, args: (naive_fake_quantize(args[0], scheme.abits),))
        layer.set_submodule(path, linear)
    for name, path in spec.norms.items():
        norm = layer.get_submodule(path)
        norm.weight.data = cast(state.rest.norm_weight[name])
        bias, matrix = state.rest.norm_bias[name], state.rest.norm_matrix[name]
        if spec.norm_bias:
            norm.bias.data = cast(bias)
            bias = None
        layer.set_submodule(path, _NaiveNorm(norm, cast(bias), cast(matrix)))
    return layer


@contextmanager
def naive_attention(model: nn.Module, scheme: Scheme, per_token: bool = False) -> Iterator[None]:
    """Within the context the model's attention quantizes q, k and v by `naive_fake_quantize`."""

    def quantize(x: Tensor, bits: int) -> Tensor:
        if not per_token:
            return naive_fake_quantize(x, bits)
        rows = naive_fake_quantize(x.transpose(1, 2).flatten(2), bits)  # [batch, tokens, heads·width]
        return rows.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
    ):
        query_bits, other_bits = scheme.attention_bits
        query, key, value = (
            quantize(query, query_bits),
            quantize(key, other_bits),
            quantize(value, other_bits),
        )
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register("naive", attend)
    AttentionMaskInterface.register("naive", sdpa_mask)
    model.set_attn_implementation("naive")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def naive_logits(
    model: nn.Module, result: LaneResult, ids: Tensor, per_token: bool = False, operands: bool = True
) -> Tensor:
    """Logits of a deep copy of the model whose blocks are `naive_block`s; `operands=False`: weights only."""
    scheme = result.lane.scheme if operands else Scheme(16, 16)
    model = copy.deepcopy(model)
    spec, blocks = spec_of(model), blocks_of(model)
    for i in range(len(blocks)):
        blocks[i] = naive_block(blocks[i], spec, result.state(i), scheme)
    with naive_attention(model, scheme, per_token):
        return model(input_ids=ids, use_cache=False).logits
