"""What is read off a concrete block, which sites are legal in it, and what is refused before anything is computed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from qbench.errors import UnsupportedSchemeError
from qbench.models import ARCHITECTURES
from qbench.models.base import BlockSpec, Site
from qbench.models.llama import LLAMA
from qbench.models.loading import architecture_for
from tests.blocks import VARIANTS, blocks_of

GATED_SHAPES = {
    "q": (32, 32),
    "k": (16, 32),  # two key/value heads of eight
    "v": (16, 32),
    "o": (32, 32),
    "gate": (64, 32),
    "up": (64, 32),
    "down": (32, 64),
}
OPT_SHAPES = {role: (32, 32) for role in "qkvo"} | {"fc1": (64, 32), "fc2": (32, 64)}
SHAPES = {
    "llama-mha": GATED_SHAPES | {"k": (32, 32), "v": (32, 32)},
    "llama-wide": GATED_SHAPES | {"q": (64, 32), "k": (32, 32), "v": (32, 32), "o": (32, 64)},
    "opt": OPT_SHAPES,
}
BIASED = {"qwen2": {"q", "k", "v"}, "opt": set(OPT_SHAPES)}


@pytest.fixture
def spec_of(build_tiny):
    def read(variant: str, **changes: object) -> BlockSpec:
        family, settings = VARIANTS[variant]
        model = build_tiny(family, **(settings | changes))
        return architecture_for(model.config).block_spec(blocks_of(model)[0], model.config)

    return read


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_biases_and_heads(spec_of, variant: str) -> None:
    spec = spec_of(variant)
    shapes = SHAPES.get(variant, GATED_SHAPES)
    assert dict(spec.shapes) == shapes
    assert spec.biased == BIASED.get(variant, set())
    assert (spec.hidden_size, spec.n_heads) == (32, 4)
    assert spec.n_kv_heads == (4 if variant in ("opt", "llama-mha") else 2)
    assert spec.head_dim == (16 if variant == "llama-wide" else 8)
    assert spec.heads_per_group == spec.n_heads // spec.n_kv_heads
    assert spec.n_weights == sum(rows * cols for rows, cols in shapes.values())
    assert (spec.rope, spec.norm_bias) == ((False, True) if variant == "opt" else (True, False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_path_leads_to_what_it_says(build_tiny, variant: str) -> None:
    family, changes = VARIANTS[variant]
    model = build_tiny(family, **changes)
    architecture = architecture_for(model.config)
    assert len(blocks_of(model)) == 2
    for block in blocks_of(model):
        spec = architecture.block_spec(block, model.config)
        linears = {block.get_submodule(path) for path in spec.linears.values()}
        assert linears == {m for m in block.modules() if isinstance(m, nn.Linear)}, (
            "a linear is missed or doubled"
        )
        assert all(hasattr(block.get_submodule(path), "weight") for path in spec.norms.values())
        assert hasattr(block.get_submodule(spec.attention), "head_dim")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "opt"])
def test_sites_of_the_llama_family(spec_of, variant: str) -> None:
    sites = dict(spec_of(variant).sites)
    assert sites.pop("attn_in") == Site("attn_in", "norm", "attn_norm", ("q", "k", "v"), "q")
    assert sites.pop("mlp_in") == Site("mlp_in", "norm", "mlp_norm", ("gate", "up"), "up")
    assert sites.pop("value_out") == Site("value_out", "value", "v", ("o",), "o")
    assert sites.pop("mlp_out") == Site("mlp_out", "hidden", "up", ("down",), "down")
    if variant != "qwen3":
        assert sites.pop("query_key") == Site("query_key", "query_key", "q", ("k",), "q")
    assert not sites


def test_sites_of_opt(spec_of) -> None:
    sites = spec_of("opt").sites
    assert set(sites) == {"attn_in", "mlp_in", "value_out", "query_key", "mlp_out"}
    assert sites["mlp_in"] == Site("mlp_in", "norm", "mlp_norm", ("fc1",), "fc1")
    assert sites["mlp_out"] == Site("mlp_out", "hidden", "fc1", ("fc2",), "fc2", positive=True)


def test_qwen3_has_no_query_key_site_and_says_why(spec_of) -> None:
    spec = spec_of("qwen3")
    assert "query_key" not in spec.sites
    with pytest.raises(
        UnsupportedSchemeError, match="norm sits between the q, k projections and the attention"
    ):
        spec.site("query_key")


def test_opt_with_another_activation_has_no_mlp_out_site(spec_of) -> None:
    spec = spec_of("opt", activation_function="gelu")
    with pytest.raises(UnsupportedSchemeError, match="between fc1 and fc2 does not commute with a scale"):
        spec.site("mlp_out")


def test_a_site_nobody_has_is_refused_with_those_that_exist(spec_of) -> None:
    with pytest.raises(
        UnsupportedSchemeError, match=r"'attn_inn'.*attn_in, mlp_in, value_out, query_key, mlp_out"
    ):
        spec_of("llama").site("attn_inn")


def test_biases_are_read_off_the_model(spec_of) -> None:
    spec = spec_of("llama", attention_bias=True, mlp_bias=True)
    assert spec.biased == set(GATED_SHAPES)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_bias_options_add_exactly_the_roles_they_say(spec_of, family: str) -> None:
    before = spec_of(family).biased
    for option, roles in ARCHITECTURES.load(family).bias_options.items():
        assert spec_of(family, **{option: True}).biased == before | set(roles)


def test_a_description_cannot_be_changed_by_its_readers(spec_of) -> None:
    spec = spec_of("llama")
    with pytest.raises(TypeError):
        spec.shapes["q"] = (1, 1)  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.rope = False  # type: ignore[misc]


def test_post_norm_opt_is_refused_in_one_sentence() -> None:
    """OPT-350m's configuration."""
    from transformers import OPTConfig

    config = OPTConfig(
        do_layer_norm_before=False, word_embed_proj_dim=512, hidden_size=1024, num_attention_heads=16
    )
    with pytest.raises(UnsupportedSchemeError) as refusal:
        architecture_for(config)
    message = str(refusal.value)
    assert "OPT-350m" in message and "not supported" in message
    assert message.count(".") == 1 and message.endswith(".")


@pytest.mark.parametrize(
    "change", [{"enable_bias": False}, {"layer_norm_elementwise_affine": False}], ids=str
)
def test_opt_without_biases_is_refused(change: dict) -> None:
    from transformers import OPTConfig

    with pytest.raises(UnsupportedSchemeError, match="Galactica"):
        architecture_for(OPTConfig(**change))


@pytest.mark.parametrize("name", ["GPT2Config", "MixtralConfig", "Qwen3MoeConfig", "GemmaConfig"])
def test_an_unsupported_model_type_lists_what_is_supported(name: str) -> None:
    import transformers

    config = getattr(transformers, name)()
    with pytest.raises(UnsupportedSchemeError) as refusal:
        architecture_for(config)
    message = str(refusal.value)
    assert repr(config.model_type) in message
    for supported in ("llama", "mistral", "qwen2", "qwen3", "opt"):
        assert supported in message


def test_every_registered_architecture_answers_to_its_own_model_types() -> None:
    for name in ARCHITECTURES.names():
        architecture = ARCHITECTURES.load(name)
        assert architecture.name == name
        assert architecture.recipes in ("llama", "opt")
        assert architecture.summary and architecture.model_types


def test_a_block_without_the_described_linear_is_refused_by_path(tiny_llama) -> None:
    block = blocks_of(tiny_llama)[0]
    del block.mlp.down_proj
    with pytest.raises(
        UnsupportedSchemeError, match=r"nn\.Linear at 'mlp\.down_proj'; this model has nothing"
    ):
        LLAMA.block_spec(block, tiny_llama.config)


def test_experts_in_place_of_a_linear_are_refused(tiny_llama) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 64, 32))

    block = blocks_of(tiny_llama)[0]
    block.mlp.up_proj = Experts()
    with pytest.raises(
        UnsupportedSchemeError, match=r"'mlp\.up_proj'; this model has Experts.*Mixture-of-experts"
    ):
        LLAMA.block_spec(block, tiny_llama.config)
