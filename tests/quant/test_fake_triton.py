"""The fused kernels compute what the CPU path computes, run here by Triton's interpreter in a process of its own.

The interpreter must be chosen before Triton is imported, hence the process. Where Triton is not installed (it is an
extra, a gigabyte on disk) the test skips; on a GPU `tests/quant/test_fake.py` runs the compiled kernels.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

CHECK = """
import itertools, torch
from qbench.quant import fake, fake_triton
from qbench.quant.grid import Grid

generator = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(*shape, generator=generator)
checked = 0
cases = [
    (symmetric, *size, zero, 2 if symmetric == zero else 4, False)
    for symmetric, size, zero in itertools.product(
        (False, True), ((None, 24), (16, 48), (None, 75)), (False, True)
    )
] + [(False, 16, 48, zero, 2, True) for zero in (False, True)]  # bit-balanced
for symmetric, group, width, zero, bits, extra in cases:
    grid = Grid(bits, symmetric, group, zero, extra)
    x = random(5, width) + (0 if zero else 3)
    x[0, :4] = x[0, 4]          # ties
    x[1, 0] = x[1].max()
    if zero:
        x[2] = x[2].abs() + 0.1  # one sign only: the range is widened
    logits = [random(5, grid.n_groups(width)) + 2 for _ in range(2)]
    upstream = random(5, width)
    # several programs and chunks, the last ones ragged
    fake_triton.TILES_PER_PROGRAM, fake_triton.ELEMENTS_PER_TILE, fake_triton.CHUNK = 2, 32, 32
    scales = [random(5).abs() + 0.5, random(width).exp()]
    for clipping, row, column, want_x in (
        ([None, None], None, None, True), (logits, None, None, True), (logits, None, None, False),
        (logits, scales[0], None, False), (logits, None, scales[1], True),
        ([None, None], *scales, True), (logits, *scales, False),
    ):
        inputs = [t if t is None else t.clone().requires_grad_() for t in (x, row, column, *clipping)]
        inputs[0].requires_grad_(want_x)
        leaves = [t for t in inputs if t is not None and t.requires_grad]
        value = fake._ClosedForm.apply(*inputs, grid, torch.float32)
        gradients = torch.autograd.grad((value * upstream).sum(), leaves)
        found = fake._Fused.apply(*inputs, grid, torch.float32)
        found_gradients = torch.autograd.grad((found * upstream).sum(), leaves)
        for got, wanted in zip([found, *found_gradients], [value.detach(), *gradients], strict=True):
            error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
            assert error < 1e-4, (symmetric, group, width, zero, bits, float(error))
            checked += 1
print("checked", checked)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (extra `triton`)"
)
def test_the_kernels_agree_with_the_cpu_path() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["checked", str(14 * (2 + 4 + 3 + 4 + 5 + 4 + 5))]
