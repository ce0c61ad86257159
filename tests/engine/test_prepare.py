"""A prepared block is the model's own layer until something is substituted, and never touches the model."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qbench.engine import attention
from qbench.engine.prepare import PreparedBlock, block_tensors, rms_epsilon
from qbench.quant.grid import Grid
from qbench.quant.uniform import fake_quantize
from qbench.scheme import Scheme
from tests.blocks import VARIANTS, Case, blocks_of, build_case, relative


@pytest.fixture(params=VARIANTS)
def case(request, build_tiny, tokens) -> Case:
    return build_case(build_tiny, request.param, tokens[:2], torch.float32)


@pytest.fixture
def llama(build_tiny, tokens) -> Case:
    return build_case(build_tiny, "llama", tokens[:2], torch.float32)


def inputs_of(prepared: PreparedBlock, case: Case) -> dict[str, Tensor]:
    """What each linear multiplies its weight with, quantized if it is."""
    seen: dict[str, Tensor] = {}
    linear = nn.functional.linear
    by_weight = {module.weight.data_ptr(): role for role, module in prepared.linears.items()}

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() in by_weight:
            seen[by_weight[weight.data_ptr()]] = x
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("qbench.engine.product.functional.linear", spy)
        prepared(case.hidden, **case.kwargs)
    return seen


def operands_of(prepared: PreparedBlock, case: Case) -> dict[str, Tensor]:
    """q, k, v as the attention product sees them: [batch, heads, tokens, head_dim]."""
    seen: dict[str, Tensor] = {}
    sdpa = attention.sdpa_attention_forward

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        seen.update(q=query, k=key, v=value)
        return sdpa(module, query, key, value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "sdpa_attention_forward", spy)
        prepared(case.hidden, **case.kwargs)
    return seen


def most_values_per_row(x: Tensor) -> int:
    return max(len(row.unique()) for row in x.reshape(-1, x.shape[-1]))


def test_with_original_tensors_it_gives_the_models_own_output_bit_for_bit(case: Case) -> None:
    assert torch.equal(case.run(case.tensors()), case.expected)


def test_the_second_block_too(case: Case, tokens) -> None:
    second = blocks_of(case.model)[1]
    with torch.no_grad():
        expected = second(case.expected, **case.kwargs)
        prepared = PreparedBlock(second, case.spec).load(
            block_tensors(second, case.spec, "cpu", torch.float32)
        )
        assert torch.equal(prepared(case.expected, **case.kwargs), expected)


def test_the_model_stays_as_it_was_and_shares_no_memory(case: Case) -> None:
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    modules = [type(module) for module in case.model.modules()]
    prepared = case.prepared().load(case.tensors()).to(torch.float64)
    prepared.quantize_operands(Scheme(4, 4))
    with torch.no_grad():
        prepared(case.hidden.double(), **case.kwargs)
        for tensor in [*prepared.block.parameters(), *prepared.block.buffers()]:
            tensor.zero_()
    after = case.model.state_dict()
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], before[name]) and after[name].dtype == torch.float32 for name in before
    )
    assert [type(module) for module in case.model.modules()] == modules
    assert not any(hasattr(module, attention.ATTRIBUTE) for module in case.model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in case.model.modules())


def test_it_holds_no_copy_of_the_blocks_weights(llama: Case) -> None:
    """Its structure is cloned, its linears are not: a prepared block costs what is loaded into it."""
    prepared = llama.prepared()
    assert sum(t.numel() for t in [*prepared.block.parameters(), *prepared.block.buffers()]) == 0
    tensors = llama.tensors()
    reference = weakref.ref(tensors.weight["q"])
    prepared.load(tensors)
    prepared.load(llama.tensors())
    del tensors
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("role", ["q", "v", "o", "up", "down"])
def test_a_substituted_weight_is_used(llama: Case, role: str) -> None:
    tensors = llama.tensors()
    tensors.weight[role] = tensors.weight[role] * 1.5
    assert relative(llama.run(tensors), llama.expected) > 1e-3


def test_gradients_reach_every_substituted_tensor(case: Case) -> None:
    tensors = case.tensors().map(lambda t: t.requires_grad_())
    case.prepared().load(tensors)(case.hidden, **case.kwargs).square().sum().backward()
    for group in ("weight", "bias", "norm_weight", "norm_bias"):
        for name, tensor in getattr(tensors, group).items():
            if tensor is not None and (group, name) != ("bias", "k"):  # softmax cancels what all keys share
                assert tensor.grad is not None and tensor.grad.abs().max() > 0, (group, name)


def test_a_bias_and_a_matrix_may_follow_a_norm_that_has_none(case: Case) -> None:
    tensors = case.tensors()
    bias, matrix = torch.randn(32), torch.eye(32) + 0.2 * torch.randn(32, 32)
    tensors.add_norm_bias("attn_norm", bias)
    tensors.norm_matrix["attn_norm"] = matrix
    plain, changed = (inputs_of(case.prepared().load(t), case)["k"] for t in (case.tensors(), tensors))
    assert torch.allclose(changed, (plain + bias) @ matrix, rtol=1e-5, atol=1e-5)


def test_the_norms_that_torch_has_fused_are_recognized_by_what_they_compute(case: Case) -> None:
    """Their values and gradients are then those of torch's function; a norm that differs is left alone."""
    rms = not case.spec.norm_bias
    assert all((norm.rms_epsilon is not None) == rms for norm in case.prepared().norms.values())
    if not rms:
        return
    norm = copy.deepcopy(case.block.get_submodule(case.spec.norms["attn_norm"])).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(torch.randn_like(norm.weight))
    epsilon = rms_epsilon(norm)
    x = (1e-2 * torch.randn(3, 5, 32)).requires_grad_()
    upstream = torch.randn(3, 5, 32)
    fused = functional.rms_norm(x, (32,), norm.weight, epsilon)
    for one, other in zip(
        torch.autograd.grad(fused, (x, norm.weight), upstream),
        torch.autograd.grad(norm(x), (x, norm.weight), upstream),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)

    class PlusOne(type(norm)):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + hidden_states

    norm.__class__ = PlusOne
    assert rms_epsilon(norm) is None
    norm.__class__ = PlusOne.__mro__[1]
    norm.variance_epsilon *= 2
    assert rms_epsilon(norm) == 2 * epsilon


@pytest.mark.gpu
def test_a_gpus_fused_norm_gives_the_models_gradients(llama: Case) -> None:
    """The prepared norm in a step (fused) and the model's own, both on the GPU in float32."""
    norm = llama.block.get_submodule(llama.spec.norms["attn_norm"])
    prepared = PreparedBlock(llama.block, llama.spec).to("cuda").norms["attn_norm"]
    x = torch.randn(2, 7, 32, device="cuda", requires_grad=True)
    weight = norm.weight.detach().cuda().requires_grad_()
    prepared.load(weight, None, None)
    found = torch.autograd.grad(prepared(x).square().sum(), (x, weight))
    own = copy.deepcopy(norm).cuda().requires_grad_()
    expected = torch.autograd.grad(own(x).square().sum(), (x, own.weight))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- quantized operands


def test_quantized_operands_change_the_output(case: Case) -> None:
    prepared = case.prepared().load(case.tensors()).quantize_operands(Scheme(4, 4))
    with torch.no_grad():
        coarse = relative(prepared(case.hidden, **case.kwargs), case.expected)
        fine = relative(prepared.quantize_operands(Scheme(4, 8))(case.hidden, **case.kwargs), case.expected)
    assert 1e-4 < fine < coarse / 4


@pytest.mark.parametrize("scheme", ["W4A16", "W16A16", "W2A16g8"])
def test_sixteen_bits_are_the_identity_bit_for_bit(case: Case, scheme: str) -> None:
    prepared = case.prepared().load(case.tensors()).quantize_operands(Scheme.parse("W4A4"))
    prepared.quantize_operands(Scheme.parse(scheme))
    with torch.no_grad():
        assert torch.equal(prepared(case.hidden, **case.kwargs), case.expected)
        prepared.quantize_operands(Scheme.parse("W4A4"))
        prepared.quantize_operands(None)
        assert torch.equal(prepared(case.hidden, **case.kwargs), case.expected)


def test_every_linear_reads_a_quantized_input_and_only_once(case: Case) -> None:
    tensors = case.tensors()
    plain = inputs_of(case.prepared().load(tensors), case)
    quantized = inputs_of(case.prepared().load(tensors).quantize_operands(Scheme(4, 3)), case)
    assert set(quantized) == set(case.spec.shapes)
    for role, x in quantized.items():
        assert most_values_per_row(x) <= 8 < most_values_per_row(plain[role]), role
    assert torch.equal(quantized["q"], fake_quantize(plain["q"], Grid(3)))  # nothing before it is quantized


def test_attention_operands_are_quantized_per_token_and_head(case: Case) -> None:
    scheme = Scheme.parse("W4A4KV2")
    operands = operands_of(case.prepared().load(case.tensors()).quantize_operands(scheme), case)
    assert operands["k"].shape[1] == case.spec.n_kv_heads, "quantized before heads are repeated"
    assert 4 < most_values_per_row(operands["q"]) <= 16
    assert most_values_per_row(operands["k"]) <= 4
    assert most_values_per_row(operands["v"]) <= 4
    tokens = operands["v"].transpose(1, 2).flatten(2)  # each head has a range of its own
    assert most_values_per_row(tokens) > 4


def test_kv_bits_alone_leave_linear_inputs_and_queries(case: Case) -> None:
    prepared = case.prepared().load(case.tensors()).quantize_operands(Scheme.parse("W4A16KV4"))
    operands = operands_of(prepared, case)
    plain = operands_of(case.prepared().load(case.tensors()), case)
    assert torch.equal(operands["k"], fake_quantize(plain["k"], Grid(4)))
    assert torch.equal(operands["v"], fake_quantize(plain["v"], Grid(4)))
    assert torch.equal(operands["q"], plain["q"])
    assert all(module.input_grid is None for module in prepared.linears.values())


def test_per_token_granularity_shares_one_range_over_the_heads(case: Case) -> None:
    prepared = case.prepared().load(case.tensors())
    plain = operands_of(prepared, case)
    operands = operands_of(prepared.quantize_operands(Scheme(16, 16, 3), granularity="per_token"), case)
    for name in "kv":
        batch, heads, length, width = plain[name].shape
        rows = plain[name].transpose(1, 2).reshape(batch, length, heads * width)
        expected = fake_quantize(rows, Grid(3)).reshape(batch, length, heads, width).transpose(1, 2)
        assert torch.equal(operands[name], expected)


def test_the_published_range_is_an_option_of_the_operands(llama: Case) -> None:
    prepared = llama.prepared().load(llama.tensors()).quantize_operands(Scheme(4, 4), zero_in_range=False)
    grids = {module.input_grid for role, module in prepared.linears.items() if role in ("o", "down")}
    grids |= {norm.output_grid for norm in prepared.norms.values()}
    assert grids == {Grid(4, zero_in_range=False)}


def test_tensors_taken_from_a_block_are_copies(llama: Case) -> None:
    tensors = block_tensors(llama.block, llama.spec, "cpu", torch.float32)
    tensors.weight["q"].zero_()
    tensors.norm_weight["attn_norm"].zero_()
    assert llama.block.self_attn.q_proj.weight.abs().max() > 0
    assert llama.block.input_layernorm.weight.abs().max() > 0
    assert block_tensors(llama.block, llama.spec, "cpu", torch.float64).weight["o"].dtype == torch.float64
