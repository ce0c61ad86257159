"""CPU speed of the quantizer core and of the engine's step, in groups; `make bench`. Nothing asserts a time.

The floor of each group is the plainest operation that touches the same data: a copy for fake quantization, a product
of the same shape for a transform.
"""

from __future__ import annotations

import pytest
import torch

from qbench.deploy.backends import BACKENDS
from qbench.deploy.backends.layer import build
from qbench.engine import product
from qbench.quant import fake
from qbench.quant.grid import Grid
from qbench.quant.uniform import extremes, round_to_nearest
from qbench.reports.comparison import compare
from qbench.results import ResultStore
from qbench.scheme import Scheme
from qbench.transforms.maps import Blocks, WarmInverse, inverse
from tests.fake_results import make_run

pytest.importorskip("pytest_benchmark")
ROWS, WIDTH = 640, 256


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(2)


def _weight() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.benchmark(group="fake quantization of 640×256, forward and backward")
@pytest.mark.parametrize("how", ["floor: copy", "closed form", "recorded operations"])
def test_fake_quantize(benchmark, how: str) -> None:
    weight = _weight().requires_grad_()
    upper, lower = (torch.full((ROWS, 1), 4.0, requires_grad=True) for _ in range(2))
    grid = Grid(4)

    def step() -> None:
        if how == "floor: copy":
            weight.clone().sum().backward()
        elif how == "closed form":
            fake.fake_quantize(weight, grid, upper, lower).sum().backward()
        else:
            fake.reference(weight, grid, upper, lower).sum().backward()

    benchmark(step)


@pytest.mark.benchmark(group="a linear of 640×256 on 256 tokens, forward and backward")
@pytest.mark.parametrize("how", ["floor: torch's own", "a training step's"])
def test_linear(benchmark, how: str) -> None:
    """The floor is what the step would take from torch's BLAS; below it where oneDNN is the faster one."""
    weight, x = _weight().requires_grad_(), torch.randn(256, WIDTH, requires_grad=True)
    upstream = torch.ones(256, ROWS)
    multiply = torch.nn.functional.linear if how.startswith("floor") else product.linear

    benchmark(lambda: torch.autograd.grad(multiply(x, weight, None), (x, weight), upstream))


@pytest.mark.benchmark(group="inverse of 256×256")
@pytest.mark.parametrize("how", ["floor: one product", "factorization", "warm-started"])
def test_inverse(benchmark, how: str) -> None:
    matrix = torch.eye(WIDTH) + 0.01 * torch.randn(
        1, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)
    )
    warm = WarmInverse(matrix, 1)
    calls = {
        "floor: one product": lambda: matrix @ matrix,
        "factorization": lambda: inverse(matrix),
        "warm-started": lambda: inverse(matrix, warm),
    }
    benchmark(calls[how])


@pytest.mark.benchmark(group="a transform on 640×256")
@pytest.mark.parametrize("groups", [1, 4], ids=["full matrix", "four heads"])
def test_apply_rows(benchmark, groups: int) -> None:
    width = WIDTH // groups
    matrix = torch.eye(width).expand(groups, -1, -1) + 0.01
    blocks = Blocks.of(matrix)
    benchmark(blocks.apply_rows, _weight())


KERNELS = {
    "floor: bfloat16": None, "W4A16g128": "W4A16g128", "W3A16g128 in 4 bits": "W3A16g128", "W8A16": "W8A16",
    "W8A8": "W8A8", "W4A4 in int8": "W4A4",
}  # fmt: skip


@pytest.mark.benchmark(group="a packed linear of 1024×1024, one token (qbench bench has the protocol)")
@pytest.mark.parametrize("name", KERNELS)
def test_packed_linear(benchmark, name: str) -> None:
    scheme = Scheme.parse(KERNELS[name] or "W8A16")
    grid = Grid(scheme.wbits, scheme.symmetric, scheme.group_size)
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    if KERNELS[name] is None:
        benchmark(torch.nn.functional.linear, x, weight.bfloat16())
        return
    packed = round_to_nearest(weight, *extremes(weight, grid), grid)
    benchmark(build(BACKENDS.load("torch")(), packed, scheme.abits), x)


@pytest.mark.benchmark(group="a table of 1,000 records, from the folder to text")
@pytest.mark.parametrize("how", ["floor: read the records", "read, compare, draw"])
def test_table(benchmark, how: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Asked for: under 5 s. Perplexities on three texts and four tasks of 400 questions."""
    folder = tmp_path_factory.mktemp("store")
    for model in range(28):
        for row in make_run(
            ("W4A4", "W3A16", "W2A16", "W6A6", "W8A8", "W2A8", "W3A3", "W4A8", "W4A16"), tasks=7
        ):
            own = row.model_copy(update={"model": f"model-{model}", "id": f"{model:012d}{row.id[12:]}"})
            (folder / f"{model}-{row.id[:12]}.json").write_text(own.to_json())
    store = ResultStore(folder)
    assert len(store.load_all()) == 28 * 37

    def table() -> None:
        results = store.load_all()
        if how != "floor: read the records":
            compare(results).render("table", 100)

    benchmark.pedantic(table, rounds=3)
