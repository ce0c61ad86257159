"""What the engine needs to know of an architecture: where things are and how they relate, no modelling code.

An `Architecture` is paths (blocks, norms, linears by role); a `BlockSpec` is the same read off one concrete
model: shapes, heads, biases, and the *sites* where a function-preserving transform can sit. Roles are
`q k v o` and `gate up down` or `fc1 fc2`; norms are `attn_norm` and `mlp_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from qbench.errors import UnsupportedSchemeError

SiteKind = Literal["norm", "value", "query_key", "hidden"]


@dataclass(frozen=True)
class Site:
    """A place inside a block where a transform and its inverse cancel.

    Attributes:
        name: `attn_in`, `mlp_in` (kind norm), `value_out`, `query_key` or `mlp_out` (kind hidden).
        kind: Decides which rewrite applies (`transforms/sites.py`).
        producer: The norm's name or the linear's role whose output is transformed.
        consumers: Linear roles that read it; for `query_key` the second operand, k.
        observed: Linear role whose input statistics belong to this site.
        positive: Only a positive scale passes: a ReLU sits between producer and consumer.
    """

    name: str
    kind: SiteKind
    producer: str
    consumers: tuple[str, ...]
    observed: str
    positive: bool = False


@dataclass(frozen=True)
class BlockSpec:
    """One decoder layer of a concrete model.

    Attributes:
        recipes: Whose published recipes apply: most methods have some for LLaMA and some for OPT.
        published_granularity: Of the ranges of q, k and v in the authors' code; see `engine.attention.Operands`.
        linears: Path inside the block by role, in the order of data flow.
        norms: Path by name.
        attention: Path of the attention module.
        shapes: (out, in) by role.
        biased: Roles that carry a bias in the checkpoint.
        norm_bias: The norms are LayerNorms with a bias; False: RMSNorm, where a shift must be added.
        sites: Legal sites by name.
        rope: Queries and keys are rotated after their projections (channels i and i + head_dim/2 pair up).
        missing_sites: Why a site that other models have is absent, by name.
        n_blocks: Blocks of the model, all alike.
    """

    recipes: Literal["llama", "opt"]
    published_granularity: Literal["per_head", "per_token"]
    linears: Mapping[str, str]
    norms: Mapping[str, str]
    attention: str
    shapes: Mapping[str, tuple[int, int]]
    biased: frozenset[str]
    norm_bias: bool
    sites: Mapping[str, Site]
    rope: bool
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    missing_sites: Mapping[str, str] = field(default_factory=dict)
    n_blocks: int = 0

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head (1 without grouped-query attention)."""
        return self.n_heads // self.n_kv_heads

    @property
    def shared_inputs(self) -> list[tuple[str, ...]]:
        """Roles in the order of data flow, those that read the same tensor together: (q, k, v), then (o,) and so on."""
        groups = {
            role: site.consumers
            for site in self.sites.values()
            if site.kind == "norm"
            for role in site.consumers
        }
        return list(dict.fromkeys(groups.get(role, (role,)) for role in self.linears))

    @property
    def n_weights(self) -> int:
        """Weights in the block's linears."""
        return sum(rows * cols for rows, cols in self.shapes.values())

    def site(self, name: str) -> Site:
        """The site, or a refusal that says why this model has none of that name."""
        if name not in self.sites:
            why = self.missing_sites.get(name, f"sites of this model: {', '.join(self.sites)}")
            raise UnsupportedSchemeError(f"No transform can sit at {name!r} here: {why}.")
        return self.sites[name]


@dataclass(frozen=True)
class Architecture:
    """Description of a model family; see `llama.py` and `opt.py` for the two that ship.

    Attributes:
        name: Registry name.
        recipes: See `BlockSpec`.
        published_granularity: See `BlockSpec`.
        model_types: `config.model_type` values it describes.
        summary: One line for `qbench models`.
        blocks: Path of the block list.
        linears: Path by role.
        norms: Path by name.
        attention: Path of the attention module inside a block.
        norm_bias: See `BlockSpec`.
        rope: See `BlockSpec`.
        qk_norm: Path of a norm between q/k projections and the attention product, if the family has one.
        hidden_site: (producer, consumer, predicate on the config): where a positive diagonal passes the MLP's
            non-linearity.
        hidden_relu: Whether that non-linearity is a ReLU, which passes positive scales only.
        bias_options: Configuration switches that give linears a bias they do not have, with the roles each adds.
        refuse: Returns one sentence for configurations of this family that are not supported, else None.
    """

    name: str
    recipes: Literal["llama", "opt"]
    published_granularity: Literal["per_head", "per_token"]
    model_types: tuple[str, ...]
    summary: str
    blocks: str
    linears: Mapping[str, str]
    norms: Mapping[str, str]
    attention: str
    norm_bias: bool
    rope: bool
    hidden_site: tuple[str, str, Callable[[Any], bool]]
    hidden_relu: bool = False
    qk_norm: str | None = None
    bias_options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refuse: Callable[[Any], str | None] = lambda config: None

    def block_spec(self, block: nn.Module, config: Any) -> BlockSpec:
        """Read shapes, biases and heads off a concrete block.

        Raises:
            UnsupportedSchemeError: If a described linear is missing or is not an `nn.Linear`
                (mixture-of-experts blocks and already quantized checkpoints end here).
        """
        shapes, biased = {}, set()
        for role, path in self.linears.items():
            try:
                linear = block.get_submodule(path)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                found = "nothing" if linear is None else type(linear).__name__
                raise UnsupportedSchemeError(
                    f"{self.name} blocks should have an nn.Linear at {path!r}; this model has {found}. "
                    "Mixture-of-experts and already quantized checkpoints cannot be quantized by qbench."
                )
            shapes[role] = (linear.out_features, linear.in_features)
            if linear.bias is not None:
                biased.add(role)
        n_heads = config.num_attention_heads
        n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
        sites, missing = self._sites(block, config)
        return BlockSpec(
            recipes=self.recipes,
            published_granularity=self.published_granularity,
            linears=MappingProxyType(dict(self.linears)),
            norms=MappingProxyType(dict(self.norms)),
            attention=self.attention,
            shapes=MappingProxyType(shapes),
            biased=frozenset(biased),
            norm_bias=self.norm_bias,
            sites=MappingProxyType(sites),
            missing_sites=MappingProxyType(missing),
            rope=self.rope,
            hidden_size=config.hidden_size,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=shapes["v"][0] // n_kv_heads,
            n_blocks=config.num_hidden_layers,
        )

    def _sites(self, block: nn.Module, config: Any) -> tuple[dict[str, Site], dict[str, str]]:
        mlp_inputs = tuple(role for role in ("gate", "up", "fc1") if role in self.linears)
        sites = {
            "attn_in": Site("attn_in", "norm", "attn_norm", ("q", "k", "v"), "q"),
            "mlp_in": Site("mlp_in", "norm", "mlp_norm", mlp_inputs, mlp_inputs[-1]),
            "value_out": Site("value_out", "value", "v", ("o",), "o"),
        }
        missing = {}
        if self.qk_norm is not None and _has(block, self.qk_norm):
            missing["query_key"] = "a norm sits between the q, k projections and the attention product"
        else:
            sites["query_key"] = Site("query_key", "query_key", "q", ("k",), "q")
        producer, consumer, linear_between = self.hidden_site
        if linear_between(config):
            sites["mlp_out"] = Site("mlp_out", "hidden", producer, (consumer,), consumer, self.hidden_relu)
        else:
            missing["mlp_out"] = (
                f"the activation between {producer} and {consumer} does not commute with a scale"
            )
        return sites, missing


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
