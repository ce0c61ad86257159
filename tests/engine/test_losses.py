"""Losses against the same formulas written token by token in Python's doubles."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from qbench.engine.losses import (
    attention_divergence,
    distribution_correction,
    mse,
    mse_with_auxiliary,
    published_attention_divergence,
    total,
)
from qbench.engine.plan import LossInputs

WINDOWS, TOKENS, HIDDEN = 3, 5, 7


def maps(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Causal attention maps averaged over two heads: rows sum to 1, zeros above the diagonal."""
    logits = 3 * torch.randn(WINDOWS, 2, TOKENS, TOKENS, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(TOKENS, TOKENS).tril().bool()
    return logits.double().masked_fill(~mask, -torch.inf).softmax(-1).mean(1).to(dtype)


@pytest.fixture
def inputs() -> LossInputs:
    target = torch.randn(WINDOWS, TOKENS, HIDDEN)
    output, other = (target + 0.3 * torch.randn_like(target) for _ in range(2))
    return LossInputs(output, target, other, maps(1), maps(2))


def naive_cosine(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


@pytest.mark.parametrize("loss", [mse, mse_with_auxiliary])
def test_squared_errors_and_their_gradients_are_torchs(inputs: LossInputs, loss) -> None:
    output = inputs.output.double().requires_grad_()
    targets = [inputs.target.double(), inputs.same_input_target.double()][: 1 + (loss is mse_with_auxiliary)]
    found = loss(LossInputs(output, inputs.target.double(), inputs.same_input_target.double()))
    expected = sum(torch.nn.functional.mse_loss(output, target) for target in targets)
    assert torch.allclose(found, expected, rtol=1e-12)
    (one,), (other,) = (torch.autograd.grad(0.7 * value, output) for value in (found, expected))
    assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("loss", [mse, mse_with_auxiliary])
def test_half_precision_outputs_are_compared_in_the_targets_type(inputs: LossInputs, loss) -> None:
    half = inputs.output.bfloat16().requires_grad_()
    wide = half.detach().float().requires_grad_()
    found, expected = (loss(LossInputs(o, inputs.target, inputs.same_input_target)) for o in (half, wide))
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    (one,), (other,) = (torch.autograd.grad(*pair) for pair in ((found, half), (expected, wide)))
    assert one.dtype == torch.bfloat16 and torch.equal(one, other.bfloat16())


FUSED = """
import torch
from qbench.engine import losses_triton
losses_triton.BLOCK = 64  # several programs, the last one ragged
for dtype in (torch.float32, torch.bfloat16):
    for second in (None, torch.randn(3, 5, 17)):
        output, target = torch.randn(3, 5, 17).to(dtype), torch.randn(3, 5, 17)
        total, difference = losses_triton.squared_errors(output, target, second)
        targets = [target] if second is None else [target, second]
        wanted = sum(output.double() - t.double() for t in targets)
        assert torch.allclose(difference.double(), wanted, atol=1e-5), difference
        squares = sum((output.double() - t.double()).square().sum() for t in targets)
        assert abs(float(total) / float(squares) - 1) < 1e-5, total
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (extra `triton`)"
)
def test_the_fused_kernel_agrees() -> None:
    """By Triton's interpreter, which must be chosen before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", FUSED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [mse, mse_with_auxiliary])
def test_a_gpu_gives_the_loss_and_gradient_of_the_cpu(loss) -> None:
    output, target, second = (torch.randn(2, 300, 70) for _ in range(3))
    found = []
    for device in ("cpu", "cuda"):
        leaf = output.to(device).requires_grad_()
        value = loss(LossInputs(leaf, target.to(device), second.to(device)))
        found.append((value.cpu(), torch.autograd.grad(value, leaf)[0].cpu()))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-9)


def test_the_correction_loss_is_two_squared_errors_less_two_logarithms(inputs: LossInputs) -> None:
    expected = 0.0
    for target in (inputs.target, inputs.same_input_target):
        difference = (inputs.output - target).double()
        expected += float((difference * difference).sum()) / difference.numel()
        for window in range(WINDOWS):
            cosines = [
                naive_cosine(inputs.output[window, t].tolist(), target[window, t].tolist())
                for t in range(TOKENS)
            ]
            expected -= math.log(abs(math.fsum(cosines) / TOKENS)) / WINDOWS
    assert float(distribution_correction(inputs)) == pytest.approx(expected, rel=1e-5)


def test_the_correction_loss_of_a_perfect_block_is_zero(inputs: LossInputs) -> None:
    perfect = LossInputs(inputs.target, inputs.target, inputs.target)
    assert float(distribution_correction(perfect)) == pytest.approx(0, abs=1e-6)


def test_parts_of_a_batch_give_the_loss_of_the_whole(inputs: LossInputs) -> None:
    for loss in (distribution_correction, attention_divergence, published_attention_divergence):
        parts = 0.0
        for part in (slice(0, 1), slice(1, 3)):
            given = LossInputs(*(getattr(inputs, name)[part] for name in vars(inputs)))
            parts += float(loss(given)) * (part.stop - part.start) / WINDOWS
        assert parts == pytest.approx(float(loss(inputs)), rel=1e-5)


def test_the_divergence_of_maps_is_both_directions_of_kl_per_row(inputs: LossInputs) -> None:
    expected = 0.0
    for window in range(WINDOWS):
        for query in range(TOKENS):
            p, q = (m[window, query].tolist() for m in (inputs.attention, inputs.attention_target))
            for one, other in ((p, q), (q, p)):
                expected += math.fsum(
                    a * math.log(a / b) for a, b in zip(one, other, strict=True) if a > 0 or b > 0
                )
    assert float(attention_divergence(inputs)) == pytest.approx(expected / (WINDOWS * TOKENS), rel=1e-9)


def test_the_published_form_takes_a_second_softmax_and_averages_over_every_position(
    inputs: LossInputs,
) -> None:
    expected = 0.0
    for one, other in (
        (inputs.attention, inputs.attention_target),
        (inputs.attention_target, inputs.attention),
    ):
        sum_ = 0.0
        for window in range(WINDOWS):
            for query in range(TOKENS):
                a, b = ([math.exp(v) for v in m[window, query].tolist()] for m in (one, other))
                a, b = [v / math.fsum(a) for v in a], [v / math.fsum(b) for v in b]
                sum_ += math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
        expected += abs(sum_ / (WINDOWS * TOKENS * TOKENS))
    found = float(published_attention_divergence(inputs))
    assert found == pytest.approx(expected, rel=1e-9)
    assert found < 0.1 * float(attention_divergence(inputs))


@pytest.mark.parametrize("loss", [attention_divergence, published_attention_divergence])
def test_equal_maps_do_not_diverge_and_exact_zeros_stay_finite(loss) -> None:
    sharp = torch.eye(TOKENS).expand(WINDOWS, -1, -1).clone().requires_grad_()
    empty = torch.zeros(0)
    assert float(loss(LossInputs(empty, empty, None, sharp.detach(), sharp.detach()))) == pytest.approx(
        0, abs=1e-7
    )
    value = loss(LossInputs(empty, empty, None, sharp, maps(3, torch.float32)))
    value.backward()
    assert bool(value.isfinite()) and bool(sharp.grad.isfinite().all())


def test_losses_add_up(inputs: LossInputs) -> None:
    both = total(mse, attention_divergence)(inputs)
    assert torch.equal(both, mse(inputs) + attention_divergence(inputs))
    assert torch.equal(total(mse_with_auxiliary)(inputs), mse_with_auxiliary(inputs))
