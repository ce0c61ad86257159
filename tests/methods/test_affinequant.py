"""AffineQuant: the published recipes, initial matrices, the gradual mask epoch by epoch, and every switch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qbench.cli.method_options import Setting, apply_settings
from qbench.config import MethodRequest
from qbench.engine.lane import Lane
from qbench.engine.plan import BlockPlan, BlockView, Needs
from qbench.engine.progress import Listener
from qbench.methods.affinequant import AffineQuant
from qbench.models.base import BlockSpec
from qbench.scheme import Scheme
from qbench.transforms.transform import MatrixTransform
from tests.blocks import blocks_of
from tests.tiny_runs import differences, linear_inputs, make_lane, reconstruct_lanes, spec_of, view_of

COMMON = {
    "parameters": None,
    "lwc": True, "let": True, "use_value_matrix": True, "shift": True, "gradual": True, "query_key": "legal",
    "truncate": "diagonal", "let_lr": 5e-3, "lwc_lr": 1e-2, "alpha": 0.5,
}  # fmt: skip
WEIGHT_ONLY = {"use_ln_matrix": True, "use_matrix": False, "sf": 1e-2, "epochs": 20, "aug_loss": False}
TWO_BITS = WEIGHT_ONLY | {"epochs": 40, "aug_loss": True}
ACTIVATIONS = {"use_ln_matrix": False, "use_matrix": True, "sf": 0.1, "epochs": 20, "aug_loss": False}
RECIPES = [
    ("llama", "W4A16", WEIGHT_ONLY),
    ("llama", "W3A16", WEIGHT_ONLY),
    ("llama", "W4A16g128", WEIGHT_ONLY),
    ("mistral", "W3A16g128", WEIGHT_ONLY),
    ("llama", "W2A16", TWO_BITS),
    ("llama", "W2A16g128", TWO_BITS),
    ("qwen2", "W2A16g64", TWO_BITS),
    ("llama", "W4A4", ACTIVATIONS | {"aug_loss": True}),
    ("llama", "W6A6", ACTIVATIONS),
    ("opt", "W4A4", ACTIVATIONS),
]
# hidden size of OPT-125m, 1.3b, 2.7b, 6.7b, 13b, 30b → stability factor in the authors' scripts
OPT_SIZES = {"125m": 768, "1.3b": 2048, "2.7b": 2560, "6.7b": 4096, "13b": 5120, "30b": 7168}
OPT_FACTORS = {
    "W4A16": {"125m": 1.0, "1.3b": 0.1, "2.7b": 1.0, "6.7b": 1.0, "13b": 1e-2, "30b": 1e-2},
    "W3A16": {"125m": 1.0, "1.3b": 0.1, "2.7b": 0.1, "6.7b": 0.1, "13b": 1e-2, "30b": 1e-2},
    "W3A16g128": {"125m": 1.0, "1.3b": 0.1, "2.7b": 1.0, "6.7b": 1.0, "13b": 1e-2, "30b": 1e-2},
    "W2A16g128": {"125m": 1.0, "1.3b": 0.1, "2.7b": 0.1, "6.7b": 1.0, "13b": 1e-2, "30b": 1e-2},
    "W2A16g64": {"125m": 1.0, "1.3b": 0.1, "2.7b": 1.0, "6.7b": 1.0, "13b": 1e-2, "30b": 1e-2},
}


def resolved(spec: BlockSpec, scheme: str, **options) -> AffineQuant:
    return AffineQuant(**options).resolve(Scheme.parse(scheme), spec)


def planned(model: nn.Module, ids: Tensor, scheme: str, **options) -> BlockPlan:
    view = view_of(model, ids, scheme)
    return resolved(view.spec, scheme, **options).plan(view)


def quantized(model: nn.Module, ids: Tensor, scheme: str, **options):
    return reconstruct_lanes(model, ids, [make_lane(model, "affinequant", scheme, **options)])[0]


# ----------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(("family", "scheme", "recipe"), RECIPES, ids=[f"{f}-{s}" for f, s, _ in RECIPES])
def test_presets_are_the_published_recipes(build_tiny, family, scheme, recipe) -> None:
    options = resolved(spec_of(build_tiny(family)), scheme).model_dump()
    assert options == COMMON | recipe


@pytest.mark.parametrize("size", OPT_SIZES)
@pytest.mark.parametrize("scheme", OPT_FACTORS)
def test_the_weight_only_recipe_of_opt_depends_on_its_size(tiny_opt, scheme, size) -> None:
    spec = replace(spec_of(tiny_opt), hidden_size=OPT_SIZES[size])
    epochs = 40 if scheme.startswith("W2") else 20
    expected = COMMON | WEIGHT_ONLY | {"sf": OPT_FACTORS[scheme][size], "epochs": epochs}
    assert resolved(spec, scheme).model_dump() == expected


def test_an_option_that_is_given_wins_over_the_preset(build_tiny) -> None:
    given = {
        "use_ln_matrix": False,
        "use_matrix": True,
        "sf": 0.5,
        "epochs": 3,
        "aug_loss": True,
        "shift": False,
    }
    options = resolved(spec_of(build_tiny("llama")), "W3A16", **given).model_dump()
    assert {name: options[name] for name in given} == given


DIAGONALS = {"attn_in": "diagonal", "mlp_in": "diagonal", "value_out": "matrix"}
MATRICES = {"attn_in": "matrix", "mlp_in": "matrix", "value_out": "matrix"}
KINDS = [
    ("llama", "W3A16", {}, MATRICES | {"query_key": "diagonal"}),
    ("llama", "W4A4", {}, DIAGONALS | {"query_key": "rotation"}),
    ("llama", "W4A4", {"query_key": "published"}, DIAGONALS | {"query_key": "matrix"}),
    (
        "llama",
        "W3A16",
        {"use_value_matrix": False},
        MATRICES | {"value_out": "diagonal", "query_key": "diagonal"},
    ),
    ("opt", "W3A16", {}, MATRICES | {"query_key": "diagonal"}),
    ("opt", "W4A4", {}, DIAGONALS | {"query_key": "matrix"}),
    ("qwen3", "W4A4", {}, DIAGONALS),
]


@pytest.mark.parametrize(
    ("family", "scheme", "options", "kinds"),
    KINDS,
    ids=["-".join([family, scheme, *options]) for family, scheme, options, _ in KINDS],
)
def test_each_site_has_the_published_kind_of_map(build_tiny, tokens, family, scheme, options, kinds) -> None:
    transforms = planned(build_tiny(family), tokens, scheme, **options).transforms
    assert {t.site.name: t.kind for t in transforms} == kinds
    tied = [t for t in transforms if t.site.name == "query_key" and t.kind == "diagonal"]
    assert all(t.paired == (family != "opt") for t in tied)
    assert all(t.function_preserving for t in transforms) == ("query_key" not in options)


# --------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_matrices_start_at_the_diagonal_of_the_scale_and_shifts_at_the_centre(
    build_tiny, tokens, family
) -> None:
    model, alpha = build_tiny(family), 0.4
    spec, inputs = spec_of(model), linear_inputs(model, tokens)[0]
    transforms = {t.site.name: t for t in planned(model, tokens, "W3A16", alpha=alpha).transforms}
    observed = {"attn_in": "q", "value_out": "o", "mlp_in": "up" if family == "llama" else "fc1"}
    for name, role in observed.items():
        weight = blocks_of(model)[0].get_submodule(spec.linears[role]).weight.detach()
        a, w = inputs[role].abs().amax((0, 1)), weight.abs().amax(0)  # |W|, unlike the authors' code
        groups, shape = 1, (-1, spec.hidden_size)
        if name == "value_out":
            groups, shape = spec.n_kv_heads, (-1, spec.head_dim)
            a, w = (v.reshape(groups, -1, spec.head_dim).amax(1) for v in (a, w))
        scale = (a**alpha / w ** (1 - alpha)).reshape(shape)
        matrix = transforms[name].matrix.detach()
        assert matrix.shape[0] == groups
        assert torch.allclose(matrix, torch.diag_embed(scale), rtol=1e-4)
        shift = transforms[name].shift.detach()
        if family == "llama":
            assert bool((shift == 0).all())
        else:
            assert float(shift.abs().max()) > 0.01
    assert transforms["query_key"].shift is None
    assert bool((transforms["query_key"].scale == 1).all())


def test_query_key_matrices_and_rotations_start_at_the_identity(tiny_llama, tiny_opt, tokens) -> None:
    rotation = planned(tiny_llama, tokens, "W4A4").transforms[-1]
    assert bool((rotation.a == 1).all()) and bool((rotation.b == 0).all())
    assert rotation.a.shape == (2, 4)  # key/value heads, rotary pairs
    for model, options in ((tiny_opt, {}), (tiny_llama, {"query_key": "published"})):
        transform = planned(model, tokens, "W4A4", **options).transforms[-1]
        spec = spec_of(model)
        assert torch.equal(transform.matrix, torch.eye(spec.head_dim).expand(spec.n_kv_heads, -1, -1))


# --------------------------------------------------------------------------------------- the mask


def naive_mask(size: int, epoch: int, epochs: int, sf: float) -> Tensor:
    """Γ entry by entry; k_e = int((n − 1)/(E − 1)·e) + 1 in exact integers, the full band for E = 1."""
    band = size if epochs == 1 else (size - 1) * epoch // (epochs - 1) + 1
    mask = torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            mask[i, j] = 1.0 if i == j else sf if abs(i - j) < band else 0.0
    return mask


@pytest.mark.parametrize("epochs", [1, 2, 5, 20])
@pytest.mark.parametrize("scheme", ["W3A16", "W4A4"])
def test_the_effective_matrix_is_the_parameter_times_the_mask_in_every_epoch(
    tiny_opt, tokens, scheme, epochs
) -> None:
    method = resolved(spec_of(tiny_opt), scheme, sf=0.3)
    matrices = [
        t for t in method.plan(view_of(tiny_opt, tokens, scheme)).transforms if isinstance(t, MatrixTransform)
    ]
    assert {t.matrix.shape[-1] for t in matrices} == ({32, 8} if scheme == "W3A16" else {8})
    for transform in matrices:
        with torch.no_grad():
            transform.matrix.copy_(torch.randn_like(transform.matrix))
        for epoch in range(epochs):
            transform.set_epoch(epoch, epochs)
            expected = transform.matrix * naive_mask(transform.matrix.shape[-1], epoch, epochs, 0.3)
            assert torch.equal(transform.effective(), expected)
    assert epochs == 1 or torch.equal(naive_mask(8, 0, epochs, 0.3), torch.eye(8))


class Watcher(Listener):
    """Keeps the plans that the engine trains and looks at them at the end of every epoch."""

    def __init__(self) -> None:
        self.plans: list[BlockPlan] = []
        self.bands: list[tuple[int, int, int]] = []  # block, epoch, width of the band that has left zero

    def watch(self, lane: Lane) -> Lane:
        planner, plans = lane.planner, self.plans

        class Spy:
            needs: Needs = planner.needs

            def plan(self, view: BlockView) -> BlockPlan:
                plans.append(planner.plan(view))
                return plans[-1]

        return replace(lane, planner=Spy())

    def epoch(self, lane: str, index: int, epoch: int, epochs: int, loss: float) -> None:
        matrix = next(t for t in self.plans[-1].transforms if t.site.name == "value_out").matrix.detach()
        width = matrix.shape[-1]
        distance = (torch.arange(width)[:, None] - torch.arange(width)[None, :]).abs()
        self.bands.append((index, epoch, int(distance[(matrix != 0).any(0)].max()) + 1))


@pytest.mark.parametrize("gradual", [True, False], ids=["gradual", "at once"])
def test_training_moves_what_the_band_of_the_epoch_holds_and_nothing_else(
    tiny_llama, tokens, gradual
) -> None:
    epochs, width, watcher = 4, 8, Watcher()
    lane = watcher.watch(make_lane(tiny_llama, "affinequant", "W4A4", epochs=epochs, gradual=gradual))
    reconstruct_lanes(tiny_llama, tokens[:2], [lane], watcher)
    bands = [(width - 1) * e // (epochs - 1) + 1 if gradual else width for e in range(epochs)]
    assert bands == ([1, 3, 5, 8] if gradual else [8] * 4)
    assert watcher.bands == [(block, e, bands[e]) for block in range(2) for e in range(epochs)]


def test_the_folded_matrix_is_the_last_epochs_effective_one(tiny_llama, tokens) -> None:
    result = quantized(tiny_llama, tokens[:2], "W3A16", epochs=3, sf=0.2)
    for i, block in enumerate(blocks_of(tiny_llama)):
        state = result.state(i)
        for site, norm, role in (("attn_in", "attn_norm", "k"), ("mlp_in", "mlp_norm", "gate")):
            effective = state.learned[f"{site}.matrix"][0].double() * naive_mask(32, 2, 3, 0.2).double()
            assert (
                float((effective - effective.diag().diag()).abs().max()) > 1e-4
            )  # off-diagonals were learned
            assert torch.allclose(
                state.rest.norm_matrix[norm].double(), torch.linalg.inv(effective), atol=1e-5
            )
            weight = block.get_submodule(spec_of(tiny_llama).linears[role]).weight.detach().double()
            step, folded = state.linears[role].scale.double(), weight @ effective.T
            deviation = (state.linears[role].dequantize().double() - folded).abs()
            clipped = (folded.abs() > 0.9 * folded.abs().amax(1, keepdim=True)).double() * 0.2 * folded.abs()
            if role == "gate":  # query_key changes k once more
                assert bool((deviation < 0.6 * step + clipped).all())
        assert torch.equal(state.rest.norm_weight["attn_norm"], block.input_layernorm.weight)


# --------------------------------------------------------------------------------------- switches


def test_no_let_is_clipping_alone(tiny_llama, tokens) -> None:
    method = resolved(spec_of(tiny_llama), "W4A4", let=False)
    assert not method.needs.activation_stats
    plan = planned(tiny_llama, tokens, "W4A4", let=False)
    assert not plan.transforms and plan.clipping is not None and plan.training is not None
    options = {"epochs": 2, "let": False}
    lanes = [make_lane(tiny_llama, method, "W4A4", **options) for method in ("affinequant", "omniquant")]
    assert not differences(*reconstruct_lanes(tiny_llama, tokens[:2], lanes))  # where the two papers coincide


def test_no_lwc_rounds_over_the_full_ranges(tiny_llama, tokens) -> None:
    plan = planned(tiny_llama, tokens, "W4A4", lwc=False)
    assert plan.clipping is None and plan.transforms and plan.training is not None
    result = quantized(tiny_llama, tokens[:2], "W3A16", lwc=False, epochs=1)
    assert not any(name.startswith("clipping") for name in result.state(0).learned)
    down, weight = result.state(0).linears["down"], blocks_of(tiny_llama)[0].mlp.down_proj.weight.detach()
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    assert torch.equal(down.scale[:, 0], ((high - low) / 7).half())


def test_with_both_off_it_is_rtn(tiny_llama, tokens) -> None:
    off = make_lane(tiny_llama, "affinequant", "W3A4", lwc=False, let=False)
    assert off.planner.plan(view_of(tiny_llama, tokens, "W3A4")).training is None
    one, other = reconstruct_lanes(tiny_llama, tokens[:2], [off, make_lane(tiny_llama, "rtn", "W3A4")])
    assert not differences(one, other)


def test_without_ln_matrix_and_shift_everything_folds(tiny_llama, tokens) -> None:
    free = quantized(tiny_llama, tokens[:2], "W3A16", use_ln_matrix=False, shift=False, epochs=1)
    for i in range(len(free)):
        state = free.state(i)
        assert all(matrix is None for matrix in state.rest.norm_matrix.values())
        assert all(bias is None for bias in (*state.rest.bias.values(), *state.rest.norm_bias.values()))
        assert all(t.foldable and t.stored_bits == 0 for t in state.transforms)


def test_ln_matrix_and_shift_cost_what_they_keep(tiny_llama, tokens) -> None:
    (result,) = reconstruct_lanes(
        tiny_llama, tokens[:2], [make_lane(tiny_llama, "affinequant", "W3A16", epochs=1)]
    )
    state, hidden, kv, mlp = result.state(0), 32, 16, 64
    at_run_time = 16 * (hidden * hidden + hidden)  # the matrix after the norm and the norm's new bias
    assert {t.site: (t.stored_bits, t.foldable) for t in state.transforms} == {
        "attn_in": (at_run_time, False),
        "mlp_in": (at_run_time, False),
        "value_out": (0, True),
        "query_key": (0, True),
    }
    integers = sum(linear.stored_bits for linear in state.linears.values())
    assert state.weight_bits == integers + 16 * (
        hidden + kv + kv + hidden + mlp + mlp
    )  # biases of q k v o gate up
    kept = [*state.rest.norm_matrix.values(), *state.rest.norm_bias.values(), *state.rest.bias.values()]
    assert (
        16 * sum(t.numel() for t in kept if t is not None) == 2 * at_run_time + state.weight_bits - integers
    )


@pytest.mark.parametrize(("truncate", "small"), [("diagonal", 1e-4), ("all", 1e-2)])
def test_truncate_keeps_the_diagonal_or_every_moved_entry_from_zero(
    tiny_llama, tokens, truncate, small
) -> None:
    transform = next(
        t for t in planned(tiny_llama, tokens, "W3A16", truncate=truncate).transforms if t.kind == "matrix"
    )
    with torch.no_grad():
        transform.matrix[0, 0, 0], transform.matrix[0, 1, 1] = 1e-5, -1e-5
        transform.matrix[0, 0, 5], transform.matrix[0, 5, 0] = 1e-4, -1e-4
    transform.guard_()
    matrix = transform.matrix.detach()[0]
    assert matrix[0, 0] == torch.tensor(1e-2) and matrix[1, 1] == torch.tensor(-1e-2)
    assert matrix[0, 5] == torch.tensor(small) and matrix[5, 0] == torch.tensor(-small)
    assert matrix[0, 6] == 0  # exact zeros stay


def test_the_published_form_is_noted_in_the_row(tiny_llama, tiny_opt) -> None:
    scheme, spec = Scheme.parse("W4A4"), spec_of(tiny_llama)
    assert AffineQuant.published_form == {"query_key": "published", "truncate": "all"}
    notes = resolved(spec, "W4A4", **AffineQuant.published_form).notes(scheme, spec)
    assert len(notes) == 1 and "does not preserve the function under RoPE" in notes[0]
    assert not resolved(spec, "W4A4").notes(scheme, spec)
    assert not resolved(spec, "W4A4", let=False, query_key="published").notes(scheme, spec)
    without_rope = spec_of(tiny_opt)
    assert not resolved(without_rope, "W4A4", query_key="published").notes(scheme, without_rope)
    (note,) = resolved(spec, "W3A16").notes(Scheme.parse("W3A16"), spec)
    assert "hidden×hidden product after each norm" in note


def test_a_published_transform_is_recorded_as_not_preserving_the_function(tiny_llama, tokens) -> None:
    result = quantized(tiny_llama, tokens[:2], "W4A4", query_key="published", epochs=1)
    for records in result.transforms:
        by_site = {record.site: record for record in records}
        assert not by_site["query_key"].function_preserving and "RoPE" in by_site["query_key"].note
        assert all(r.function_preserving and r.note is None for r in records if r.site != "query_key")


def test_one_epoch_uses_the_full_band_and_works(tiny_llama, tokens) -> None:
    result = quantized(tiny_llama, tokens[:2], "W3A16", epochs=1)
    for i, record in enumerate(result.records):
        assert len(record.losses) == 1 and record.losses[0] > 0
        matrix = result.state(i).learned["attn_in.matrix"][0]
        assert matrix[0, -1] != 0 and matrix[-1, 0] != 0
        assert record.extras["condition.attn_in"] >= 1


def test_affine_reaches_a_lower_training_loss_than_diagonals(tiny_opt, tokens) -> None:
    """The claim of the paper: the larger family of transformations fits better."""
    options = {"epochs": 8, "alpha": 0.5, "shift": True, "let": True, "aug_loss": False}
    lanes = [
        make_lane(tiny_opt, "omniquant", "W3A16", **options),
        make_lane(tiny_opt, "affinequant", "W3A16", **options, sf=1.0),
    ]
    diagonal, affine = reconstruct_lanes(tiny_opt, tokens, lanes)
    assert affine.records[0].losses[-1] < diagonal.records[0].losses[-1]
    assert affine.records[0].losses[-1] < affine.records[0].losses[0]


@pytest.mark.parametrize(
    ("name", "given", "idle"),
    [
        ("affinequant", {"let": False, "use_matrix": True}, ["use_matrix"]),
        (
            "affinequant+gptq",
            {"let": False, "use_ln_matrix": True, "shift": True},
            ["use_ln_matrix", "shift"],
        ),
        ("affinequant", {"let": False, "aug_loss": True}, []),
        ("affinequant", {"let": False, "use_matrix": False}, []),
        ("affinequant", {"use_matrix": True}, []),
    ],
    ids=["a form", "two, composed", "the loss", "off", "with let"],
)
def test_options_that_have_nothing_to_do_without_the_transformation_are_named(name, given, idle) -> None:
    settings = [Setting(None, option, value, f"--{option}") for option, value in given.items()]
    _, remarks = apply_settings([MethodRequest(name=name)], settings, published=False)
    assert remarks == [f"{name}: {option} has nothing to do while let is off" for option in idle]
