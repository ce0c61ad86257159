"""A training step has the gradients that calculus gives it, in float64.

Independent references: finite differences of the straight-through surrogate (every rounding residual, zero point and
clamp frozen where it was), and plain autograd over `fake.reference`, which keeps one graph from the parameters to the
loss where the engine cuts it between weights and block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qbench.engine.attention import Maps
from qbench.engine.hidden import HiddenStates
from qbench.engine.losses import attention_divergence
from qbench.engine.optimize import exact_halves, fit, quantized_tensors
from qbench.engine.plan import BlockPlan, LossInputs, Training
from qbench.engine.prepare import PreparedBlock
from qbench.engine.settings import EngineSettings
from qbench.errors import NumericalError
from qbench.quant import fake
from qbench.quant.clipping import Clipping
from qbench.quant.grid import Grid
from qbench.scheme import Scheme
from qbench.transforms.maps import WarmInverse
from qbench.transforms.tensors import BlockTensors
from qbench.transforms.transform import (
    DiagonalTransform,
    MatrixTransform,
    RotationTransform,
    Transform,
    apply_all,
)
from tests.blocks import Case, build_case

CPU = torch.device("cpu")
WINDOWS = 4


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """The engine's buffers take torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def squared_error(inputs: LossInputs) -> Tensor:
    """The loss of the papers, without a cast to float32; with the auxiliary target if there is one."""
    loss = functional.mse_loss(inputs.output, inputs.target)
    if inputs.same_input_target is not None:
        loss = loss + functional.mse_loss(inputs.output, inputs.same_input_target)
    if inputs.attention is not None:
        loss = loss + attention_divergence(inputs)
    return loss


class Still(torch.optim.SGD):
    """Stands for the optimizer: keeps every step's gradients and changes nothing."""

    def __init__(self, groups: list[dict], **_: object) -> None:
        super().__init__(groups, lr=0.0)
        self.steps: list[list[Tensor | None]] = []
        Still.last = self

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        self.steps.append([None if p.grad is None else p.grad.clone() for p in params])


@pytest.fixture
def still(monkeypatch) -> type[Still]:
    monkeypatch.setattr(torch.optim, "AdamW", Still)
    return Still


@dataclass
class Problem:
    """A block, a plan with random parameters, and data that training could fit."""

    case: Case
    plan: BlockPlan
    grid: Grid
    scheme: Scheme
    inputs: Tensor
    target: Tensor
    same: Tensor | None
    maps: Tensor | None = None
    epochs: list[float] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        named = {f"{t.site.name}.{n}": p for t in self.plan.transforms for n, p in t.named_parameters()}
        return named | {f"clipping.{n}": p for n, p in (self.plan.clipping or nn.Module()).named_parameters()}

    def prepared(self) -> PreparedBlock:
        return self.case.prepared().double().quantize_operands(self.scheme)

    def fit(self, **settings: object) -> list[float]:
        def hidden(values: Tensor | None) -> HiddenStates | None:
            if values is None:
                return None
            states = HiddenStates(tuple(values.shape), CPU, "cpu", values.dtype)
            states.write(0, values)
            return states

        self.epochs = []
        arranged = EngineSettings(**({"device": CPU, "dtype": torch.get_default_dtype()} | settings))
        report = fit(
            self.prepared(), self.plan, self.case.tensors(), self.grid, hidden(self.inputs), hidden(self.target),
            hidden(self.same), self.case.kwargs, arranged, lambda epoch, epochs, loss: self.epochs.append(loss),
            hidden(self.maps),
        )  # fmt: skip
        return report.losses

    def loss(self, quantize: Callable[..., Tensor], windows: slice = slice(None)) -> Tensor:
        """The loss of one step written out, with `quantize` at every place where the engine quantizes."""
        tensors: BlockTensors = apply_all(self.case.tensors(), self.plan.transforms)
        if self.grid.bits < 16:
            for role, weight in tensors.weight.items():
                logits = self.plan.clipping.logits(role) if self.plan.clipping else (None, None)
                tensors.weight[role] = quantize(weight, self.grid, *logits)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qbench.engine.prepare.fake_quantize", quantize)
            patch.setattr("qbench.engine.attention.fake_quantize", quantize)
            maps = Maps() if self.maps is not None else None
            prepared = self.prepared().load(tensors).record_attention(maps)
            output = prepared(self.inputs[windows], **self.case.kwargs)
        same = None if self.same is None else self.same[windows]
        seen = (None, None) if maps is None else (maps.latest, self.maps[windows])
        return squared_error(LossInputs(output, self.target[windows], same, *seen))


@torch.no_grad()
def target_maps(case: Case) -> Tensor:
    """Attention maps of the full-precision block, [windows, tokens, tokens]."""
    found = Maps()
    case.prepared().double().load(case.tensors()).record_attention(found)(case.hidden, **case.kwargs)
    return found.latest


def random_transforms(case: Case) -> list[Transform]:
    """Every kind of map, at every site it is used at, away from where it starts."""
    spec, width = case.spec, case.spec.n_kv_heads * case.spec.head_dim
    transforms: list[Transform] = [
        MatrixTransform(
            spec, spec.site("attn_in"), 1 + 0.2 * torch.rand(32), 0.1 * torch.randn(32), stability_factor=0.5
        ),
        DiagonalTransform(spec, spec.site("mlp_in"), 1 + 0.2 * torch.rand(32), 0.1 * torch.randn(32)),
        MatrixTransform(
            spec,
            spec.site("value_out"),
            1 + 0.2 * torch.rand(width),
            0.1 * torch.randn(width),
            stability_factor=0.5,
        ),
        RotationTransform(spec, spec.site("query_key")),
    ]
    with torch.no_grad():
        for transform in transforms:
            for parameter in transform.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return [t.double() for t in transforms]


@pytest.fixture
def make(build_tiny, tokens) -> Callable[..., Problem]:
    def build(
        family: str = "opt",
        scheme: str = "W4A4",
        *,
        auxiliary: bool = False,
        maps: bool = False,
        epochs: int = 1,
    ) -> Problem:
        case = build_case(build_tiny, family, tokens[:WINDOWS])
        parsed = Scheme.parse(scheme)
        grid = Grid(parsed.wbits, parsed.symmetric, parsed.group_size)
        clipping = None
        if parsed.wbits < 16:
            clipping = Clipping(case.spec.shapes, grid).double()
            with torch.no_grad():  # from 1 to 4: ranges of 73 to 98 %
                for logit in clipping.parameters():
                    logit.copy_(1 + 3 * torch.rand_like(logit))
        training = Training(epochs, 5e-3, 1e-2, squared_error, auxiliary, maps)
        plan = BlockPlan(random_transforms(case), clipping, training=training)
        inputs = case.hidden + 0.02 * torch.randn_like(case.hidden)  # the quantized path's
        same = case.expected + 0.1 * torch.randn_like(case.expected) if auxiliary else None
        return Problem(
            case, plan, grid, parsed, inputs, case.expected, same, target_maps(case) if maps else None
        )

    return build


class Surrogate:
    """Straight-through quantization with rounding residuals, zero points and clamps frozen at the first pass."""

    def __init__(self) -> None:
        self.frozen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.call = 0

    def __call__(
        self, x: Tensor, grid: Grid, upper: Tensor | None = None, lower: Tensor | None = None, **_
    ) -> Tensor:
        groups = x.reshape(*x.shape[:-1], -1, grid.group_size or x.shape[-1])
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        if upper is not None:
            low, high = low / (1 + (-lower).exp()), high / (1 + (-upper).exp())
        if grid.symmetric:
            scale = torch.maximum(high, -low) / (2 ** (grid.bits - 1) - 1)
        else:
            scale = (high - low) / (2**grid.bits - 1)
        scale = scale[..., None]
        if self.call == len(self.frozen):
            zero = (
                torch.full_like(scale, 2 ** (grid.bits - 1))
                if grid.symmetric
                else (-low[..., None] / scale).round()
            )
            free = (groups / scale).round() + zero
            codes = free.clamp(0, 2**grid.bits - 1)
            inside = free == codes
            self.frozen.append((codes - zero, (groups / scale).round() - groups / scale, inside, zero))
        levels, residual, inside, _ = self.frozen[self.call]
        self.call += 1
        return (scale * torch.where(inside, groups / scale + residual, levels)).reshape(x.shape)

    def restart(self) -> Surrogate:
        self.call = 0
        return self


CASES = [
    pytest.param("W4A4", False, id="W4A4"),
    pytest.param("W4A4", True, id="W4A4 auxiliary"),
    pytest.param("W3A16g8", False, id="W3A16g8"),
    pytest.param("W4A8-sym", False, id="W4A8-sym"),
]


@pytest.mark.parametrize(("scheme", "auxiliary"), CASES)
def test_gradients_of_a_step_are_finite_differences_of_the_surrogate(make, still, scheme, auxiliary) -> None:
    problem: Problem = make(
        "opt", scheme, auxiliary=auxiliary
    )  # LayerNorm in float64; transformers' RMSNorm is not
    losses = problem.fit(batch_size=WINDOWS)
    gradients = dict(zip(problem.parameters, still.last.steps[0], strict=True))
    surrogate, step, checked = Surrogate(), 1e-6, set()
    with torch.no_grad():
        assert float(problem.loss(surrogate)) == pytest.approx(losses[0], rel=1e-12)
        for name, parameter in problem.parameters.items():
            flat, gradient = parameter.view(-1), gradients[name].reshape(-1)
            largest = gradient.abs().argsort(descending=True)[:3].tolist()
            for i in [*largest, *torch.randint(flat.numel(), (2,)).tolist()]:
                value, sides = flat[i].item(), []
                for sign in (1, -1):
                    flat[i] = value + sign * step
                    sides.append(float(problem.loss(surrogate.restart())))
                flat[i] = value
                difference = (sides[0] - sides[1]) / (2 * step)
                tolerance = 1e-5 * float(gradient.abs().max()) + 1e-9
                assert abs(float(gradient[i]) - difference) < tolerance, f"{name}[{i}]"
                checked.add(name)
    assert len(checked) == 8 + 2 * 6  # 3 maps, 3 shifts and a rotation's a and b; both logits of 6 linears


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize(("scheme", "auxiliary"), CASES)
def test_gradients_are_those_of_one_uncut_graph(make, still, family, scheme, auxiliary) -> None:
    problem: Problem = make(family, scheme, auxiliary=auxiliary)
    problem.fit(batch_size=WINDOWS)

    def reference(
        x: Tensor, grid: Grid, upper: Tensor | None = None, lower: Tensor | None = None, **_
    ) -> Tensor:
        return fake.reference(x, grid, upper, lower)

    parameters = problem.parameters
    expected = torch.autograd.grad(problem.loss(reference), list(parameters.values()))
    for name, found, wanted in zip(parameters, still.last.steps[0], expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max())), name
        assert float(wanted.abs().max()) > 0, name


def test_activations_alone_train_the_transforms(make, still) -> None:
    problem: Problem = make("opt", "W16A4")
    problem.fit(batch_size=WINDOWS)
    expected = torch.autograd.grad(
        problem.loss(lambda x, grid, **_: fake.reference(x, grid)), problem.parameters.values()
    )
    for name, found, wanted in zip(problem.parameters, still.last.steps[0], expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("scheme", ["W4A4", "W3A16g8"])
def test_gradients_through_attention_maps_are_those_of_one_uncut_graph(make, still, family, scheme) -> None:
    problem: Problem = make(family, scheme, auxiliary=True, maps=True)
    (loss,) = problem.fit(batch_size=WINDOWS)
    plain: Problem = make(family, scheme, auxiliary=True)

    def reference(x: Tensor, grid: Grid, u: Tensor | None = None, low: Tensor | None = None, **_) -> Tensor:
        return fake.reference(x, grid, u, low)

    parameters = problem.parameters
    expected = problem.loss(reference)
    assert (
        loss == pytest.approx(float(expected.detach()), rel=1e-9) and plain.fit(batch_size=WINDOWS)[0] < loss
    )
    problem.fit(batch_size=WINDOWS)
    gradients = torch.autograd.grad(problem.loss(reference), list(parameters.values()))
    for name, found, wanted in zip(parameters, still.last.steps[0], gradients, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max())), name


@pytest.mark.parametrize("maps", [False, True], ids=["outputs", "maps"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, WINDOWS, 9])
def test_micro_batches_agree_with_the_whole_batch(make, still, micro_batch, maps) -> None:
    problem: Problem = make("opt", "W4A4", auxiliary=True, maps=maps)
    whole = problem.fit(batch_size=WINDOWS)
    expected = still.last.steps[0]
    split = problem.fit(batch_size=WINDOWS, micro_batch=micro_batch)
    assert split == pytest.approx(whole, rel=1e-6)
    for found, wanted in zip(still.last.steps[0], expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("batch_size", [1, 2, 3, WINDOWS, 7])
def test_a_batch_size_need_not_divide_the_windows(make, still, batch_size) -> None:
    problem: Problem = make("opt", "W4A4", auxiliary=True)
    losses = problem.fit(batch_size=batch_size)
    parts = [slice(i, min(i + batch_size, WINDOWS)) for i in range(0, WINDOWS, batch_size)]
    assert len(still.last.steps) == len(parts)
    total = 0.0
    for part, found in zip(parts, still.last.steps, strict=True):
        loss = problem.loss(lambda x, grid, u=None, low=None, **_: fake.reference(x, grid, u, low), part)
        total += float(loss.detach()) * (part.stop - part.start)
        expected = torch.autograd.grad(loss, list(problem.parameters.values()))
        for name, one, other in zip(problem.parameters, found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max())), name
    assert (
        losses == problem.epochs == [pytest.approx(total / WINDOWS, rel=1e-9)]
    )  # a mean over windows, not over steps


def test_each_group_of_parameters_has_its_own_rate_and_no_weight_decay(make) -> None:
    problem: Problem = make("opt", "W4A4")
    before = {name: p.detach().clone() for name, p in problem.parameters.items()}
    problem.fit(batch_size=WINDOWS)
    for name, parameter in problem.parameters.items():
        moved = (parameter.detach() - before[name]).abs()
        # the first step of Adam is lr · g/(|g| + ε); where the gradient vanishes (off the band, clipped) nothing moves
        rate = 1e-2 if name.startswith("clipping") else 5e-3
        assert float(moved.max()) == pytest.approx(rate, rel=1e-2), name
        assert float(moved.max()) <= rate * (1 + 1e-9), name


def test_the_loss_falls_on_an_easy_problem(make) -> None:
    """8 bits whose ranges are cut to three quarters: opening them again removes nearly all of the error."""
    problem: Problem = make("opt", "W8A16")
    with torch.no_grad():
        for logit in problem.plan.clipping.parameters():
            logit.fill_(1.0)
    problem.plan.training = Training(15, 5e-3, 0.2, squared_error)
    problem.inputs = problem.case.hidden
    losses = problem.fit(batch_size=1)
    assert len(losses) == 15 and losses == problem.epochs
    assert losses[-1] < 0.1 * losses[0]


def test_parameters_are_guarded_before_every_step_and_the_mask_ends_full(make, still) -> None:
    problem: Problem = make("opt", "W4A4", epochs=3)
    matrix, diagonal = problem.plan.transforms[0], problem.plan.transforms[1]
    with torch.no_grad():
        diagonal.scale[0, 3], matrix.matrix[0, 5, 5] = -1e-4, 1e-4
    masks, set_epoch = [], matrix.set_epoch

    def spy(epoch: int, epochs: int) -> None:
        set_epoch(epoch, epochs)
        masks.append((epoch, epochs, int((matrix.mask != 0).sum())))

    matrix.set_epoch = spy
    problem.fit(batch_size=2)
    assert diagonal.scale[0, 3].item() == -1e-2 and matrix.matrix[0, 5, 5].item() == 1e-2
    assert masks[:3] == [(0, 3, 32), (1, 3, 32 * 32 - 16 * 17), (2, 3, 32 * 32)]  # bands of 1, 16 and 32
    assert masks[-1] == (2, 3, 32 * 32)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_loss_that_is_not_finite_names_epoch_and_step(make, still, bad) -> None:
    problem: Problem = make("opt", "W4A4", epochs=3)
    calls = 0

    def breaking(inputs: LossInputs) -> Tensor:
        nonlocal calls
        calls += 1
        return squared_error(inputs) * (bad if calls == 4 else 1.0)

    problem.plan.training = Training(3, 5e-3, 1e-2, breaking)
    with pytest.raises(NumericalError) as caught:
        problem.fit(batch_size=2)  # two steps in an epoch
    message = str(caught.value)
    assert re.search(rf"became {bad} in epoch 2 of 3, step 2 of 2", message)
    assert "--let-lr" in message and "float32" in message
    assert len(problem.epochs) == 1  # the bad epoch is not reported as done


def test_a_singular_matrix_is_reported_and_not_trained_on(make) -> None:
    problem: Problem = make("opt", "W4A4", epochs=2)
    matrix = problem.plan.transforms[0].matrix
    with torch.no_grad():
        matrix.zero_()
        matrix[0, 0, 0] = 1.0
    with pytest.raises(NumericalError, match="epoch 1 of 2, step 1 of 4"):
        problem.fit(batch_size=1)


# ----------------------------------------------------------------------------------------- warm-started inverses


@pytest.fixture
def seeded(make) -> Callable[..., Problem]:
    """The same problem each time."""

    def build(**options: object) -> Problem:
        torch.manual_seed(0)
        return make(**options)

    return build


def test_warm_started_inverses_give_the_losses_of_direct_ones(seeded) -> None:
    direct = seeded(epochs=3).fit(warm_inverse=False)
    problem = seeded(epochs=3)
    warm = problem.fit(warm_inverse=True)
    assert warm == pytest.approx(direct, rel=1e-4)
    assert warm != direct  # it did compute something else
    assert all(t.residual() is None for t in problem.plan.transforms)  # and ended with it


def test_an_epoch_that_newton_cannot_follow_is_repeated_with_direct_inverses(seeded, monkeypatch) -> None:
    direct = seeded(epochs=2).fit(warm_inverse=False)
    monkeypatch.setattr(WarmInverse, "LIMIT", 0.0)  # nothing is good enough
    assert seeded(epochs=2).fit(warm_inverse=True) == direct


def test_the_guard_runs_once_more_before_the_fold(make, still) -> None:
    problem = make()
    transform = problem.plan.transforms[0]
    seen = []
    guard = transform.guard_

    def watched() -> None:
        seen.append(len(still.last.steps) if hasattr(still, "last") else 0)
        guard()

    transform.guard_ = watched
    problem.fit()
    assert seen[-1] == len(still.last.steps) == WINDOWS  # after the last step, beside once before each
    assert len(seen) == WINDOWS + 1


@pytest.mark.parametrize("scheme", ["W4A4", "W3A16g8"])
def test_weights_read_in_half_precision_change_nothing(make, scheme) -> None:
    """Where they lose nothing by it and no transform has changed them; values and gradients, bit for bit."""
    torch.set_default_dtype(torch.float32)
    problem: Problem = make("llama", scheme)
    for part in (*problem.plan.transforms, problem.plan.clipping):
        part.float()
    base = problem.case.tensors().map(lambda t: t.bfloat16().float())
    base.weight["up"] = base.weight["up"] * 1.001  # needs its float32
    base.weight["gate"] = base.weight["gate"].half().float()
    halves = exact_halves(base.weight)
    assert (
        halves["down"].dtype == torch.bfloat16 and "up" not in halves and halves["gate"].dtype.itemsize == 2
    )
    assert all(torch.equal(half.float(), base.weight[role]) for role, half in halves.items())
    assert not exact_halves(
        {role: weight.double() for role, weight in base.weight.items()}
    )  # the reference's
    parameters = list(problem.parameters.values())
    found = []
    for given in (None, halves):
        weights = list(quantized_tensors(base, problem.plan, problem.grid, None, given).weight.values())
        assert {w.dtype for w in weights} == {torch.float32}
        gradients = torch.autograd.grad(sum(w.square().sum() for w in weights), parameters, allow_unused=True)
        found.append([*weights, *(g for g in gradients if g is not None)])
    assert len(found[0]) > 14
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_weights_quantized_in_one_call_are_what_each_alone_gives(make, monkeypatch, family) -> None:
    """Factors of columns that differ between sites keep weights of one width apart; rows have factors of their own."""
    problem: Problem = make(family)
    spec, width = problem.case.spec, problem.case.spec.n_kv_heads * problem.case.spec.head_dim
    plan = problem.plan
    plan.transforms = [
        DiagonalTransform(spec, spec.site(site), 0.5 + torch.rand(size), shift, paired=paired)
        for site, size, shift, paired in (
            ("attn_in", 32, torch.randn(32), False), ("mlp_in", 32, None, False),
            ("value_out", width, None, False), ("query_key", width, None, spec.rope),
        )
    ]  # fmt: skip
    calls, found = [], []

    def counted(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(len(x))
        return fake.fake_quantize(x, *args, **kwargs)

    monkeypatch.setattr("qbench.engine.optimize.fake_quantize", counted)
    for small in (fake.SMALL, 0):
        monkeypatch.setattr(fake, "SMALL", small)
        weights = quantized_tensors(problem.case.tensors(), plan, problem.grid).weight
        assert [w.shape for w in weights.values()] == [spec.shapes[role] for role in weights]
        leaves = [p for part in (*plan.transforms, plan.clipping) for p in part.parameters()]
        gradients = torch.autograd.grad(
            sum((i + 1) * w.square().sum() for i, w in enumerate(weights.values())), leaves, allow_unused=True
        )
        found.append([*weights.values(), *(g for g in gradients if g is not None)])
    assert len(calls) == 4 + len(spec.shapes)  # q k v, then o, gate up (fc1), down (fc2)
    for together, alone in zip(*found, strict=True):
        assert torch.allclose(together, alone, rtol=1e-12, atol=1e-12)
