"""Put activation outliers like those of large models into a small one, without changing what it computes.

From a few billion parameters on, a handful of channels of a transformer's activations are 20 to 100 times
larger than the median channel, always the same ones (LLM.int8(), Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339; SmoothQuant, Xiao et al. 2022, https://arxiv.org/abs/2211.10438, figure 4).
They are what makes activation quantization hard, and models small enough to ship do not have them. Here
chosen channels are multiplied where they are produced and divided where they are consumed: norm -> its
linears, v -> o, up -> down (fc1 -> fc2 through ReLU, which commutes with a positive factor). With factors
that are powers of two, float64 and float32 weights stay exact, and fp16 ones down to where fp16 runs out of
exponents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.errors import UnsupportedSchemeError


@dataclass(frozen=True)
class RescaleSite:
    """Where a channel may be rescaled in a block: paths of the producer and of everything that reads it."""

    name: str
    producer: str
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class OutlierTarget:
    """How many channels become outliers, and from how many to how many times the median channel."""

    channels: int
    low: float
    high: float


LLAMA_SITES = (
    RescaleSite("attn_in", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    RescaleSite("value_out", "self_attn.v_proj", ("self_attn.o_proj",)),
    RescaleSite("mlp_in", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    RescaleSite("mlp_out", "mlp.up_proj", ("mlp.down_proj",)),
)
OPT_SITES = (
    RescaleSite(
        "attn_in", "self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ),
    RescaleSite("value_out", "self_attn.v_proj", ("self_attn.out_proj",)),
    RescaleSite("mlp_in", "final_layer_norm", ("fc1",)),
    RescaleSite("mlp_out", "fc1", ("fc2",)),
)
SITES = {"llama": ("model.layers", LLAMA_SITES), "opt": ("model.decoder.layers", OPT_SITES)}

# Norm outputs get what the papers show; value and MLP activations milder ones, as in large models.
TARGETS = {
    "attn_in": OutlierTarget(6, 20.0, 70.0),
    "mlp_in": OutlierTarget(6, 20.0, 70.0),
    "value_out": OutlierTarget(4, 6.0, 12.0),
    "mlp_out": OutlierTarget(6, 10.0, 40.0),
}


def sites_of(model: nn.Module) -> list[tuple[str, nn.Module, RescaleSite]]:
    """List every site of a LLaMA or OPT model as (full name, block, site), in model order.

    Raises:
        UnsupportedSchemeError: If rescaling is not known to keep this model's function.
    """
    config = model.config
    kind = getattr(config, "model_type", None)
    if kind not in SITES:
        raise UnsupportedSchemeError(
            f"Outliers can be put into models of type {' and '.join(sorted(SITES))}, not {kind!r}: "
            "add the paths of its norms and linears to qbench/models/outliers.py."
        )
    if kind == "opt" and not (config.do_layer_norm_before and config.activation_function == "relu"):
        raise UnsupportedSchemeError(
            "Rescaling an OPT model needs norms before attention and ReLU; this one has "
            f"do_layer_norm_before={config.do_layer_norm_before}, activation {config.activation_function!r}."
        )
    path, sites = SITES[kind]
    blocks = model.get_submodule(path)
    return [(f"{path}.{i}.{site.name}", block, site) for i, block in enumerate(blocks) for site in sites]


@torch.no_grad()
def rescale(block: nn.Module, site: RescaleSite, factor: Tensor) -> None:
    """Multiply the channels of `site` by `factor` where they are produced, divide where they are consumed.

    Computed in float64 and written back in the parameters' own dtype. Under grouped-query attention one value
    channel is read by every query head of its group, so its factor is repeated over the group.

    Args:
        block: A decoder block; changed in place.
        site: Which tensors.
        factor: Positive, one per produced channel  # [out]
    """
    producer = block.get_submodule(site.producer)
    _multiply(producer.weight, factor if producer.weight.dim() == 1 else factor[:, None])
    if getattr(producer, "bias", None) is not None:
        _multiply(producer.bias, factor)
    for path in site.consumers:
        linear = block.get_submodule(path)
        columns = factor
        if linear.in_features != len(factor):  # grouped queries: o reads each value head several times
            head_dim = block.self_attn.head_dim
            groups = linear.in_features // len(factor)
            columns = factor.view(-1, 1, head_dim).expand(-1, groups, -1).reshape(-1)
        _multiply(linear.weight, 1 / columns)


@torch.no_grad()
def channel_absmax(model: nn.Module, ids: Tensor, batch_size: int = 8) -> dict[str, Tensor]:
    """Largest absolute input of every channel of every linear in the blocks, over some token windows.

    Args:
        model: A LLaMA or OPT model.
        ids: Token windows  # [n, seq_len]
        batch_size: Windows per forward pass.

    Returns:
        Linear's full name -> absmax per input channel, float64 on the CPU  # [in]
    """
    largest: dict[str, Tensor] = {}
    with _watch_linears(model, largest):
        device = next(model.parameters()).device
        for batch in ids.split(batch_size):
            model(input_ids=batch.to(device), use_cache=False)
    return {name: value.double().cpu() for name, value in largest.items()}


def outlier_ratios(absmax: dict[str, Tensor]) -> dict[str, float]:
    """Per linear, the largest channel's absmax over the median channel's: 20 to 100 in large models."""
    return {name: (value.max() / _median_alive(value)).item() for name, value in absmax.items()}


def choose_factors(absmax: Tensor, channels: Tensor, target: OutlierTarget) -> Tensor:
    """Powers of two that lift the given channels to about the target multiples of the median channel.

    The targets of the channels are spread geometrically from `low` to `high`; a channel already there keeps
    its size.

    Args:
        absmax: Largest absolute value per channel, measured  # [n]
        channels: Indices of the channels to lift, the last one highest  # [k]
        target: The multiples of the median to reach.

    Returns:
        One factor per channel, 1 for all others, float64  # [n]
    """
    absmax = absmax.double()
    low, high = math.log2(target.low), math.log2(target.high)
    wanted = torch.linspace(low, high, len(channels), dtype=torch.float64).exp2()
    gain = wanted * _median_alive(absmax) / absmax[channels].clamp_min(1e-30)
    factor = torch.ones_like(absmax)
    factor[channels] = torch.exp2(gain.log2().round().clamp(min=0, max=10))
    return factor


@torch.no_grad()
def add_outliers(
    model: nn.Module, ids: Tensor, seed: int, targets: dict[str, OutlierTarget] | None = None
) -> dict[str, dict[int, float]]:
    """Give a model the outlier channels of a large one; its function stays the same.

    The norm outputs of all blocks share their channels, as in large models, where outliers live in the
    residual stream; the other sites draw their own.

    Args:
        model: A LLaMA or OPT model; changed in place.
        ids: Token windows on which present channel sizes are measured  # [n, seq_len]
        seed: Of the choice of channels.
        targets: Multiples of the median by site name; default `TARGETS`.

    Returns:
        Site's full name -> {channel: factor applied}.
    """
    targets = targets or TARGETS
    generator = torch.Generator().manual_seed(seed)
    sites = sites_of(model)
    absmax = channel_absmax(model, ids)
    residual: Tensor | None = None
    applied = {}
    for name, block, site in sites:
        target = targets[site.name]
        prefix = name.removesuffix(site.name)
        size = absmax[prefix + site.consumers[0]]
        produced = _out_channels(block, site)
        if len(size) != produced:  # grouped queries: several of o's columns read one value channel
            size = size.view(-1, len(size) // produced, block.self_attn.head_dim).amax(1).reshape(-1)
        if site.name in ("attn_in", "mlp_in"):
            if residual is None:
                residual = torch.randperm(produced, generator=generator)[: target.channels]
            channels = residual
        else:
            channels = torch.randperm(produced, generator=generator)[: target.channels]
        factor = choose_factors(size, channels, target)
        rescale(block, site, factor.to(next(block.parameters()).device))
        applied[name] = {int(c): factor[c].item() for c in channels}
    return applied


def _median_alive(absmax: Tensor) -> Tensor:
    """Median over the channels that are ever used: ReLU leaves some at zero for all inputs."""
    alive = absmax[absmax > 0]
    return alive.median() if len(alive) else torch.ones((), dtype=absmax.dtype)


def _multiply(parameter: Tensor, factor: Tensor) -> None:
    parameter.copy_((parameter.double() * factor.to(parameter.device, torch.float64)).to(parameter.dtype))


def _out_channels(block: nn.Module, site: RescaleSite) -> int:
    return block.get_submodule(site.producer).weight.shape[0]


@contextmanager
def _watch_linears(model: nn.Module, largest: dict[str, Tensor]) -> Iterator[None]:
    handles = []
    prefixes = {id(block): name.rpartition(".")[0] for name, block, _ in sites_of(model)}
    for block in {id(block): block for _, block, _ in sites_of(model)}.values():
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear):
                name = f"{prefixes[id(block)]}.{path}"

                def watch(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                    size = inputs[0].detach().abs().flatten(0, -2).amax(0)
                    largest[name] = torch.maximum(largest[name], size) if name in largest else size

                handles.append(module.register_forward_pre_hook(watch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
