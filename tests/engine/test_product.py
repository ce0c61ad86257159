"""A training step's products are those of `functional.linear`; without gradients they come from it, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qbench.engine import product

SHAPES = [
    pytest.param((2, 5, 24), 17, True, id="windows with bias"),
    pytest.param((33, 24), 40, False, id="rows without"),
    pytest.param((1, 3, 24), 1, True, id="one output"),
]


def operands(shape: tuple[int, ...], out: int, bias: bool) -> list[Tensor | None]:
    """x, weight, bias with gradients; x strided, as attention leaves it."""
    x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    leaves = [x, torch.randn(out, shape[-1]), torch.randn(out) if bias else None]
    return [None if t is None else t.detach().requires_grad_() for t in leaves]


@pytest.mark.parametrize(("shape", "out", "bias"), SHAPES)
def test_values_and_gradients_are_those_of_float64(shape, out: int, bias: bool) -> None:
    leaves = operands(shape, out, bias)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    upstream = torch.randn(*shape[:-1], out)
    found, expected = product.linear(*leaves), functional.linear(*wide)
    assert torch.allclose(found, expected.float(), rtol=1e-5, atol=1e-5)
    found.backward(upstream)
    expected.backward(upstream.double())
    for one, other in zip(leaves, wide, strict=True):
        assert one is None or torch.allclose(one.grad, other.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learned", [0, 1, 2], ids=["input", "weight", "bias"])
def test_only_what_is_asked_for_gets_a_gradient(learned: int) -> None:
    leaves = operands((2, 5, 24), 17, True)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == learned)
    product.linear(*leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == learned for i in range(3)]


def test_without_gradients_and_in_other_types_it_is_the_models_own_product() -> None:
    x, weight, bias = (t.detach() for t in operands((2, 5, 24), 17, True))
    with torch.no_grad():
        assert torch.equal(product.linear(x, weight, bias), functional.linear(x, weight, bias))
    x, weight, bias = x.double(), weight.double().requires_grad_(), bias.double()
    assert torch.equal(product.linear(x, weight, bias), functional.linear(x, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product.linear(x.float(), weight.float(), None).dtype == torch.bfloat16


def test_a_build_without_onednn_takes_torchs_own(monkeypatch) -> None:
    monkeypatch.setattr(product, "_has_onednn", lambda: False)
    leaves = operands((2, 5, 24), 17, True)
    assert torch.equal(product.linear(*leaves), functional.linear(*leaves))
