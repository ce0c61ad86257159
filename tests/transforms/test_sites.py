"""Every rewritten tensor against the papers' formulas, spelled out with dense block-diagonal matrices.

x' = (x − δ)·A⁻¹, W' = W·Aᵀ, b' = b + W·δ. Equivalence of the whole block is test_transform.py's business; a sign or
a transpose that cancels within a block shows here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qbench.models.base import BlockSpec, Site
from qbench.transforms import sites
from qbench.transforms.maps import Blocks, Diagonal, Map
from qbench.transforms.tensors import BlockTensors
from tests.blocks import Case, build_case

DOUBLE = {"dtype": torch.float64}


def rewrite(tensors: BlockTensors, spec: BlockSpec, site: Site, a: Map | None, shift: Tensor | None) -> None:
    """The rewrite with its pending factors multiplied in."""
    sites.rewrite(tensors, spec, site, a, shift)
    tensors.settle()


@pytest.fixture(params=["llama", "qwen2", "opt"])
def case(request, build_tiny, tokens) -> Case:
    """Two query heads per key/value head without and with q, k, v biases; and LayerNorms with every bias."""
    return build_case(build_tiny, request.param, tokens[:1])


def matrices(groups: int, width: int) -> Tensor:
    return torch.eye(width, **DOUBLE) + 0.3 * torch.randn(groups, width, width, **DOUBLE)


def for_query_heads(per_head: Tensor, spec: BlockSpec) -> list[Tensor]:
    """One entry per query head: that of its key/value head."""
    return [per_head[head * spec.n_kv_heads // spec.n_heads] for head in range(spec.n_heads)]


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


def plus(bias: Tensor | None, term: Tensor) -> Tensor:
    return term if bias is None else bias + term


@pytest.mark.parametrize("name", ["attn_in", "mlp_in"])
def test_diagonal_after_a_norm_folds_into_its_weight_and_bias(case: Case, name: str) -> None:
    old, new, site = case.tensors(), case.tensors(), case.spec.site(name)
    s, shift = torch.randn(32, **DOUBLE).exp(), torch.randn(32, **DOUBLE)
    rewrite(new, case.spec, site, Diagonal(s[None]), shift)
    norm = site.producer
    assert same(new.norm_weight[norm], old.norm_weight[norm] / s)
    assert same(new.norm_bias[norm], plus(old.norm_bias[norm], -shift) / s)
    assert new.norm_matrix[norm] is None
    for role in site.consumers:
        assert same(new.weight[role], old.weight[role] * s)
        assert same(new.bias[role], plus(old.bias[role], old.weight[role] @ shift))
    untouched = set(case.spec.shapes) - set(site.consumers)
    assert all(
        new.weight[role] is not None and torch.equal(new.weight[role], old.weight[role]) for role in untouched
    )


def test_diagonal_without_shift_adds_no_bias(case: Case) -> None:
    old, new = case.tensors(), case.tensors()
    rewrite(new, case.spec, case.spec.site("attn_in"), Diagonal(torch.full((1, 32), 2.0, **DOUBLE)), None)
    for role in "qkv":
        assert same(new.bias[role], old.bias[role])
    assert (new.norm_bias["attn_norm"] is None) == (old.norm_bias["attn_norm"] is None)


def test_full_matrix_stays_behind_the_norm(case: Case) -> None:
    old, new, site = case.tensors(), case.tensors(), case.spec.site("mlp_in")
    a, shift = matrices(1, 32), torch.randn(32, **DOUBLE)
    rewrite(new, case.spec, site, Blocks.of(a), shift)
    assert same(new.norm_weight["mlp_norm"], old.norm_weight["mlp_norm"])
    assert same(new.norm_bias["mlp_norm"], plus(old.norm_bias["mlp_norm"], -shift))
    assert same(new.norm_matrix["mlp_norm"], torch.linalg.inv(a[0]))
    for role in site.consumers:
        assert same(new.weight[role], old.weight[role] @ a[0].T)
        assert same(new.bias[role], plus(old.bias[role], old.weight[role] @ shift))


def test_per_head_matrices_between_value_and_output(case: Case) -> None:
    spec, old, new = case.spec, case.tensors(), case.tensors()
    a, shift = matrices(spec.n_kv_heads, spec.head_dim), torch.randn(spec.n_kv_heads, spec.head_dim, **DOUBLE)
    rewrite(new, spec, spec.site("value_out"), Blocks.of(a), shift.reshape(-1))
    inner, outer = torch.block_diag(*a), torch.block_diag(*for_query_heads(a, spec))
    seen = torch.cat(for_query_heads(shift, spec))
    assert same(new.weight["v"], torch.linalg.inv(inner).T @ old.weight["v"])
    assert same(new.bias["v"], plus(old.bias["v"], -shift.reshape(-1)) @ torch.linalg.inv(inner))
    assert same(new.weight["o"], old.weight["o"] @ outer.T)
    assert same(new.bias["o"], plus(old.bias["o"], old.weight["o"] @ seen))


def test_per_head_matrices_between_query_and_key(case: Case) -> None:
    spec, old, new = case.spec, case.tensors(), case.tensors()
    a = matrices(spec.n_kv_heads, spec.head_dim)
    rewrite(new, spec, spec.site("query_key"), Blocks.of(a), None)
    inner, outer = torch.block_diag(*a), torch.block_diag(*for_query_heads(a, spec))
    assert same(new.weight["q"], torch.linalg.inv(outer).T @ old.weight["q"])
    assert same(new.weight["k"], inner @ old.weight["k"])
    for role, right in (("q", torch.linalg.inv(outer)), ("k", inner.T)):
        bias = old.bias[role]
        assert same(new.bias[role], None if bias is None else bias @ right)


def test_diagonal_between_query_and_key_divides_the_one_and_multiplies_the_other(case: Case) -> None:
    spec, old, new = case.spec, case.tensors(), case.tensors()
    s = torch.randn(spec.n_kv_heads, spec.head_dim, **DOUBLE).exp()
    rewrite(new, spec, spec.site("query_key"), Diagonal(s), None)
    assert same(new.weight["q"], old.weight["q"] / torch.cat(for_query_heads(s, spec))[:, None])
    assert same(new.weight["k"], old.weight["k"] * s.reshape(-1, 1))


def test_diagonal_of_the_hidden_channels(case: Case) -> None:
    spec, old, new = case.spec, case.tensors(), case.tensors()
    site = spec.site("mlp_out")
    s = torch.randn(64, **DOUBLE).exp()
    rewrite(new, spec, site, Diagonal(s[None]), None)
    (consumer,) = site.consumers
    assert same(new.weight[site.producer], old.weight[site.producer] / s[:, None])
    assert same(new.weight[consumer], old.weight[consumer] * s)
    bias = old.bias[site.producer]
    assert same(new.bias[site.producer], None if bias is None else bias / s)
    assert same(new.bias[consumer], old.bias[consumer])


def test_maps_at_one_norm_compose_in_the_order_they_are_given(case: Case) -> None:
    """x·A₁⁻¹·A₂⁻¹, whichever of the two is diagonal."""
    first, second = matrices(1, 32), matrices(1, 32)
    s = torch.randn(1, 32, **DOUBLE).exp()
    undo_first, undo_second = torch.linalg.inv(first[0]), torch.linalg.inv(second[0])
    site = case.spec.site("attn_in")
    chains = [
        ([Blocks.of(first), Blocks.of(second)], undo_first @ undo_second),
        ([Blocks.of(first), Diagonal(s)], undo_first / s),
        ([Diagonal(s), Blocks.of(first)], (1 / s).T * undo_first),
    ]
    for maps, undone in chains:
        new = case.tensors()
        for a in maps:
            rewrite(new, case.spec, site, a, None)
        matrix = new.norm_matrix["attn_norm"]
        x = torch.randn(3, 32, **DOUBLE)

        def after_norm(x: Tensor, new: BlockTensors = new, matrix: Tensor = matrix) -> Tensor:
            return (x * new.norm_weight["attn_norm"]) @ matrix

        assert same(after_norm(x), (x * case.tensors().norm_weight["attn_norm"]) @ undone)
        assert same(x @ undone @ new.weight["v"].T, x @ case.tensors().weight["v"].T)


def test_a_shift_after_a_full_matrix_at_the_same_norm_is_a_bug_of_the_caller(case: Case) -> None:
    new, site = case.tensors(), case.spec.site("attn_in")
    rewrite(new, case.spec, site, Blocks.of(matrices(1, 32)), None)
    with pytest.raises(AssertionError, match="shift must come before"):
        rewrite(new, case.spec, site, None, torch.ones(32, **DOUBLE))


def test_tensors_given_are_never_written_to(case: Case) -> None:
    base = case.tensors()
    kept = base.map(torch.clone)
    new = base.copy()
    spec = case.spec
    rewrite(
        new,
        spec,
        spec.site("attn_in"),
        Diagonal(torch.full((1, 32), 3.0, **DOUBLE)),
        torch.ones(32, **DOUBLE),
    )
    a = matrices(spec.n_kv_heads, spec.head_dim)
    rewrite(
        new, spec, spec.site("value_out"), Blocks.of(a), torch.ones(spec.n_kv_heads * spec.head_dim, **DOUBLE)
    )
    for group in ("weight", "bias", "norm_weight", "norm_bias", "norm_matrix"):
        for name, tensor in getattr(base, group).items():
            assert same(tensor, getattr(kept, group)[name])
