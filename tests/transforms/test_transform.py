"""Every transform at every legal site leaves every architecture's block output as it was, before and after folding.

The reference is transformers' own layer with its own attention, in float64. Parameters are random and far from the
identity, so that a missing inverse, transpose or head repetition cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qbench.models.base import BlockSpec, Site
from qbench.transforms.tensors import BlockTensors
from qbench.transforms.transform import (
    DiagonalTransform,
    MatrixTransform,
    RotationTransform,
    Transform,
    TransformCost,
    apply_all,
    fold,
)
from tests.blocks import VARIANTS, Case, build_case, relative

DOUBLE = {"dtype": torch.float64}
TOLERANCE = 1e-9
SITES = ("attn_in", "mlp_in", "value_out", "query_key", "mlp_out")
BY_KIND = {
    "attn_in": ("shift", "diagonal", "diagonal+shift", "matrix", "matrix+shift"),
    "mlp_in": ("shift", "diagonal", "diagonal+shift", "matrix", "matrix+shift"),
    "value_out": ("shift", "diagonal", "diagonal+shift", "matrix", "matrix+shift"),
    "mlp_out": ("diagonal",),
}


def legal_kinds(variant: str, site: str) -> tuple[str, ...]:
    if site != "query_key":
        return BY_KIND[site]
    return {"opt": ("diagonal", "paired", "matrix", "rotation"), "qwen3": ()}.get(
        variant, ("paired", "rotation")
    )


LEGAL = [
    pytest.param(variant, site, kind, id=f"{variant}-{site}-{kind}")
    for variant in VARIANTS
    for site in SITES
    for kind in legal_kinds(variant, site)
]


def channels(spec: BlockSpec, site: Site) -> int:
    if site.kind in ("value", "query_key"):
        return spec.n_kv_heads * spec.head_dim
    return spec.hidden_size if site.kind == "norm" else spec.shapes[site.producer][0]


def make(kind: str, spec: BlockSpec, site: Site, dtype: torch.dtype = torch.float64) -> Transform:
    """A transform with random parameters: scales from about 0.2 to 5, of both signs where that is legal."""
    form, _, with_shift = kind.partition("+")
    n = channels(spec, site)
    shift = torch.randn(n, dtype=dtype) if with_shift or form == "shift" else None
    scale = torch.randn(n, dtype=dtype).mul(0.5).exp()
    if site.kind != "hidden":  # ReLU passes positive scales only
        scale = scale * torch.where(torch.rand(n) < 0.3, -1.0, 1.0)
    if form == "shift":
        return Transform(spec, site, shift)
    if form in ("diagonal", "paired"):
        return DiagonalTransform(spec, site, scale, shift, paired=form == "paired")
    if form == "matrix":
        transform = MatrixTransform(spec, site, scale, shift, stability_factor=0.5)
        with torch.no_grad():  # off-diagonals of the effective matrix about a quarter of the diagonal's size
            transform.matrix += torch.randn_like(transform.matrix) / transform.matrix.shape[-1] ** 0.5 / 2
        return transform
    assert form == "rotation"
    rotation = RotationTransform(spec, site).to(dtype)
    with torch.no_grad():
        rotation.a.copy_(torch.randn_like(rotation.a).exp())
        rotation.b.copy_(torch.randn_like(rotation.b))
    return rotation


def all_tensors(tensors: BlockTensors) -> dict[str, Tensor]:
    groups = ("weight", "bias", "norm_weight", "norm_bias", "norm_matrix")
    named = {f"{group}.{name}": t for group in groups for name, t in getattr(tensors, group).items()}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def changed(tensors: BlockTensors, base: BlockTensors) -> bool:
    new, old = all_tensors(tensors), all_tensors(base)
    return new.keys() != old.keys() or any(not torch.equal(new[name], old[name]) for name in old)


@pytest.fixture
def case_of(build_tiny: Callable[..., nn.Module], tokens: Tensor) -> Callable[[str], Case]:
    return lambda variant: build_case(build_tiny, variant, tokens[:2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cases_below_cover_every_site_of_every_architecture(case_of, variant: str) -> None:
    assert {site for site in SITES if legal_kinds(variant, site)} == set(case_of(variant).spec.sites)


@pytest.mark.parametrize(("variant", "site", "kind"), LEGAL)
def test_block_output_is_unchanged_before_and_after_folding(
    case_of, variant: str, site: str, kind: str
) -> None:
    case = case_of(variant)
    transform = make(kind, case.spec, case.spec.site(site))
    assert transform.function_preserving
    base = case.tensors()
    with torch.no_grad():
        applied = apply_all(base, [transform])
    assert changed(applied, base)
    assert relative(case.run(applied), case.expected) < TOLERANCE
    assert relative(case.run(fold(base, [transform])), case.expected) < TOLERANCE


@pytest.mark.parametrize("norm_map", ["diagonal+shift", "matrix+shift"], ids=["diagonal", "matrix"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_sites_together_keep_the_function(case_of, variant: str, norm_map: str) -> None:
    """As the methods order them: later sites rewrite what earlier ones have already transformed."""
    case = case_of(variant)
    kinds = {"attn_in": norm_map, "mlp_in": norm_map, "value_out": "matrix+shift", "mlp_out": "diagonal"}
    kinds["query_key"] = "matrix" if variant == "opt" else "rotation"
    transforms = [make(kinds[name], case.spec, site) for name, site in case.spec.sites.items()]
    assert relative(case.run(fold(case.tensors(), transforms)), case.expected) < TOLERANCE


@pytest.mark.parametrize("epoch", range(4))
def test_every_epoch_of_the_mask_keeps_the_function(case_of, epoch: int) -> None:
    case = case_of("llama")
    transform = make("matrix", case.spec, case.spec.site("value_out"))
    transform.set_epoch(epoch, 4)
    assert relative(case.run(fold(case.tensors(), [transform])), case.expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["diagonal", "matrix"])
@pytest.mark.parametrize("variant", ["llama", "llama-mha", "llama-wide", "mistral", "qwen2"])
def test_published_query_key_forms_do_not_survive_rotary_embedding_and_say_so(
    case_of, variant, kind: str
) -> None:
    case = case_of(variant)
    transform = make(kind, case.spec, case.spec.site("query_key"))
    assert not transform.function_preserving
    assert relative(case.run(fold(case.tensors(), [transform])), case.expected) > 1e-3


def test_the_activation_becomes_x_minus_shift_times_the_inverse(case_of) -> None:
    """What the consumers read: equivalence alone would accept a transform and its inverse swapped."""
    case = case_of("llama")
    spec = case.spec

    def read_by(role: str, tensors: BlockTensors) -> Tensor:
        prepared, seen = case.prepared().load(tensors), []
        prepared.linears[role].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            prepared(case.hidden, **case.kwargs)
        return seen[0]

    for name, reader in (("attn_in", "k"), ("value_out", "o")):
        transform = make("matrix+shift", spec, spec.site(name))
        old, new = read_by(reader, case.tensors()), read_by(reader, fold(case.tensors(), [transform]))
        matrices, shift = transform.effective().detach(), transform.shift.detach()
        if name == "value_out":  # each key/value head serves two query heads
            matrices = matrices[[0, 0, 1, 1]]
            shift = shift.reshape(2, 8)[[0, 0, 1, 1]].reshape(-1)
        expected = (old - shift) @ torch.linalg.inv(torch.block_diag(*matrices))
        assert torch.allclose(new, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_fold_is_the_float64_result_in_the_dtype_of_the_block(case_of, variant: str) -> None:
    case = case_of(variant)
    base = case.tensors().map(lambda t: t.float())
    transforms = [
        make("matrix+shift", case.spec, case.spec.site("attn_in"), torch.float32),
        make("matrix+shift", case.spec, case.spec.site("value_out"), torch.float32),
    ]
    folded = fold(base, transforms)
    with torch.no_grad():
        trained = apply_all(base, transforms)
        exact = apply_all(base.map(lambda t: t.double()), [t.folded_copy() for t in transforms])
    for group in ("weight", "bias", "norm_weight", "norm_bias", "norm_matrix"):
        for name, tensor in getattr(folded, group).items():
            if tensor is None:
                assert getattr(exact, group)[name] is None
                continue
            assert tensor.dtype == torch.float32 and not tensor.requires_grad
            assert torch.equal(tensor, getattr(exact, group)[name].float())
            assert torch.allclose(tensor, getattr(trained, group)[name], rtol=1e-3, atol=1e-4)
    assert all(p.dtype == torch.float32 and p.requires_grad for t in transforms for p in t.parameters())


@pytest.mark.parametrize("kind", ["shift", "diagonal+shift", "matrix+shift", "paired", "rotation"])
def test_every_parameter_gets_a_gradient(case_of, kind: str) -> None:
    case = case_of("llama")
    transform = make(
        kind, case.spec, case.spec.site("query_key" if kind in ("paired", "rotation") else "attn_in")
    )
    tensors = apply_all(case.tensors(), [transform])
    sum(tensor.square().sum() for tensor in all_tensors(tensors).values()).backward()
    assert list(transform.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in transform.parameters())


# ------------------------------------------------------------------------------------ starting values


def test_a_paired_diagonal_starts_at_the_mean_of_each_rotary_pair(case_of) -> None:
    spec = case_of("llama").spec
    scale = torch.arange(16.0) + 1  # two heads of eight
    transform = DiagonalTransform(spec, spec.site("query_key"), scale, paired=True)
    assert transform.scale.tolist() == [[3, 4, 5, 6], [11, 12, 13, 14]]
    assert transform.build_map().scale.tolist() == [
        [3, 4, 5, 6, 3, 4, 5, 6],
        [11, 12, 13, 14, 11, 12, 13, 14],
    ]


def test_a_matrix_starts_at_its_diagonal_and_a_rotation_at_the_identity(case_of) -> None:
    case = case_of("llama")
    spec = case.spec
    scale = torch.randn(16, **DOUBLE).exp()
    matrix = MatrixTransform(spec, spec.site("value_out"), scale, stability_factor=0.1)
    assert torch.equal(torch.block_diag(*matrix.effective()), scale.diag())
    base = case.tensors()
    rotated = fold(base, [RotationTransform(spec, spec.site("query_key"))])
    assert all(torch.equal(rotated.weight[role], base.weight[role]) for role in base.weight)


def test_epochs_widen_the_band_of_the_effective_matrix(case_of) -> None:
    spec = case_of("llama").spec
    transform = make("matrix", spec, spec.site("value_out"))  # heads of eight, stability factor 0.5
    nonzero = []
    for epoch in range(5):
        transform.set_epoch(epoch, 5)
        effective = transform.effective()[0]
        assert torch.equal(effective.diagonal(), transform.matrix[0].diagonal())
        off = effective[effective != 0].numel() - 8
        inside = (effective != 0) & ~torch.eye(8, dtype=torch.bool)
        assert torch.equal(effective[inside], 0.5 * transform.matrix[0][inside])
        nonzero.append(off)
    assert nonzero[0] == 0 and nonzero[-1] == 56
    assert all(earlier < later for earlier, later in pairwise(nonzero))


def test_without_the_gradual_mask_the_band_is_full_from_the_first_epoch(case_of) -> None:
    spec = case_of("llama").spec
    transform = MatrixTransform(
        spec, spec.site("value_out"), torch.ones(16), stability_factor=0.1, gradual=False
    )
    transform.set_epoch(0, 20)
    assert (transform.mask[~torch.eye(8, dtype=torch.bool)] == torch.tensor(0.1)).all()


# --------------------------------------------------------------------------------------------- guards

SMALL = torch.tensor([0.0, 5e-3, -5e-3, 1e-2, -1e-2, 0.5, -0.5, 1e-9])
GUARDED = torch.tensor([0.0, 1e-2, -1e-2, 1e-2, -1e-2, 0.5, -0.5, 1e-2])


def test_guard_pushes_small_scales_out_and_leaves_exact_zeros(case_of) -> None:
    spec = case_of("llama").spec
    transform = DiagonalTransform(spec, spec.site("value_out"), SMALL.repeat(2))
    transform.guard_()
    assert torch.equal(transform.scale.detach(), GUARDED.repeat(2, 1))


@pytest.mark.parametrize("guard", ["diagonal", "all"])
def test_guard_of_a_matrix_covers_its_diagonal_or_all_of_it(case_of, guard: str) -> None:
    spec = case_of("llama").spec
    transform = MatrixTransform(
        spec, spec.site("value_out"), torch.ones(16), stability_factor=0.1, guard=guard
    )
    with torch.no_grad():
        transform.matrix.copy_(SMALL.repeat(2, 8, 1))
        for head in transform.matrix:
            head.diagonal().copy_(SMALL)
    transform.guard_()
    off = ~torch.eye(8, dtype=torch.bool).expand(2, 8, 8)
    expected = (GUARDED if guard == "all" else SMALL).repeat(2, 8, 1)
    assert torch.equal(transform.matrix.detach()[off], expected[off])
    assert torch.equal(transform.matrix.detach().diagonal(dim1=-2, dim2=-1), GUARDED.repeat(2, 1))


def test_guard_of_a_rotation_and_of_a_shift(case_of) -> None:
    spec = case_of("llama").spec
    rotation = RotationTransform(spec, spec.site("query_key"))
    with torch.no_grad():
        rotation.a.copy_(SMALL.reshape(2, 4))
    rotation.guard_()
    assert torch.equal(rotation.a.detach(), GUARDED.reshape(2, 4)) and (rotation.b == 0).all()
    shift = Transform(spec, spec.site("attn_in"), torch.full((32,), 1e-3))
    shift.guard_()
    assert (shift.shift == 1e-3).all()


# ------------------------------------------------------------------------------------- condition and cost


def test_condition_number_is_that_of_the_worst_head_after_its_diagonal(case_of) -> None:
    spec = case_of("llama").spec
    transform = make("matrix", spec, spec.site("value_out"))
    effective = transform.effective().detach().numpy()
    expected = max(np.linalg.cond(np.diag(1 / np.diag(head)) @ head) for head in effective)
    assert transform.condition() == pytest.approx(expected)
    assert expected > 1.1
    transform.set_epoch(0, 5)  # the diagonal alone
    assert transform.condition() == pytest.approx(1.0)
    assert make("diagonal", spec, spec.site("value_out")).condition() is None


COSTS = [
    ("llama", "attn_in", "diagonal", TransformCost(True, 0, 0)),
    # the RMSNorm gains a bias of 32 that no linear can absorb; those of q, k, v are counted in BlockState.weight_bits
    ("llama", "attn_in", "diagonal+shift", TransformCost(False, 16 * 32, 32)),
    ("llama", "attn_in", "matrix", TransformCost(False, 16 * 32 * 32, 2 * 32 * 32)),
    ("llama", "attn_in", "matrix+shift", TransformCost(False, 16 * (32 * 32 + 32), 2 * 32 * 32 + 32)),
    ("llama", "mlp_in", "shift", TransformCost(False, 16 * 32, 32)),
    ("llama", "value_out", "matrix", TransformCost(True, 0, 0)),
    ("llama", "value_out", "matrix+shift", TransformCost(True, 0, 0)),
    ("llama", "query_key", "rotation", TransformCost(True, 0, 0)),
    ("llama", "query_key", "paired", TransformCost(True, 0, 0)),
    ("qwen2", "attn_in", "shift", TransformCost(False, 16 * 32, 32)),  # q, k, v have biases already
    ("qwen2", "value_out", "shift", TransformCost(True, 0, 0)),
    ("opt", "attn_in", "diagonal+shift", TransformCost(True, 0, 0)),
    ("opt", "attn_in", "matrix+shift", TransformCost(False, 16 * 32 * 32, 2 * 32 * 32)),
    ("opt", "value_out", "matrix+shift", TransformCost(True, 0, 0)),
]


@pytest.mark.parametrize(
    ("variant", "site", "kind", "cost"),
    COSTS,
    ids=[f"{variant}-{site}-{kind}" for variant, site, kind, _ in COSTS],
)
def test_cost_after_folding(case_of, variant: str, site: str, kind: str, cost: TransformCost) -> None:
    spec = case_of(variant).spec
    assert make(kind, spec, spec.site(site)).cost() == cost
