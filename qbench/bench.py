"""One kernel benchmark: shapes × batches × schemes × backends by the timing protocol.

The only place where backends and the timing protocol meet; whole models are in `generation`. A cell that fails is
recorded with its sentence and does not stop the others; cells are handed over round by round, so that an interrupted
benchmark keeps what it has and the same command continues it.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qbench import provenance
from qbench.deploy.backends import BACKENDS, gate
from qbench.deploy.backends.humming import int8_probe
from qbench.deploy.backends.layer import Backend, KernelLayer, Request, build, dtype_name
from qbench.errors import ConfigError, QbenchError, UnsupportedSchemeError, kind_and_first_line
from qbench.evals.latency import (
    Call,
    Protocol,
    TooSlowError,
    cache_bytes,
    interleaved,
    measure_ceilings,
    repeatable,
)
from qbench.latency import Ceilings, Cell, ShapeSet, Timing
from qbench.methods import METHODS
from qbench.models.shapes import describe
from qbench.quant import uniform
from qbench.quant.grid import Grid, check_group_size
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme


class DeviceLostError(QbenchError):
    """Nothing can run in this process any more: begin another one."""


# A norm's matrix is sampled near the identity, so that inputs keep their size.
MATRIX_NOISE = 0.01
SEED = 0
BROKEN_ROUND = "in this round"  # begins the message of cells of which nobody knows which one failed


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        shapes: (out, in) of each linear.
        after_norm: Those of them that read a norm and would have its matrix before them.
        batches: Tokens M.
        schemes: Formats.
        backends: Names, in the order in which they are worked off.
        matrix: Schemes that are also timed with a norm's full matrix before the linear.
    """

    shapes: Sequence[tuple[int, int]]
    after_norm: frozenset[tuple[int, int]]
    batches: Sequence[int]
    schemes: Sequence[Scheme]
    backends: Sequence[str]
    matrix: frozenset[Scheme] = frozenset()


@dataclass
class _Candidate:
    """One row being measured at one shape: its rotated layers and what they were made from."""

    scheme: Scheme
    matrix: bool
    dtype: torch.dtype
    weight: QuantizedWeight
    layers: list[KernelLayer]
    build_s: float
    cold: bool
    found: dict[str, Any] = field(default_factory=dict)
    passes: dict[str, Callable[[], list[float]]] = field(default_factory=dict)


def shapes_of(models: Iterable[ShapeSet]) -> tuple[list[tuple[int, int]], frozenset[tuple[int, int]]]:
    """Distinct shapes of several models, and those that read a norm."""
    models = list(models)
    shapes = list(dict.fromkeys(shape for model in models for shape in model.shapes))
    return shapes, frozenset().union(*(model.after_norm for model in models))


def require_groups(schemes: Iterable[Scheme], models: Iterable[ShapeSet]) -> None:
    """Refuse, before anything is measured, groups that do not divide the input width of a model's linears.

    Raises:
        UnsupportedSchemeError: Names the shapes of the first such scheme.
    """
    shapes, _ = shapes_of(models)
    for scheme in schemes:
        check_group_size(scheme.group_size, {f"{out}×{width}": width for out, width in shapes})


def load_backends(names: Sequence[str], device: str) -> tuple[dict[str, Backend], list[str]]:
    """Backends by name, and a sentence for each that cannot work here.

    Raises:
        ConfigError: For a name that does not exist, or if none of them can work here.
    """
    backends = {name: BACKENDS.load(name)() for name in names}
    reasons = {name: backend.unavailable(device) for name, backend in backends.items()}
    notes = [f"backend {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if len(notes) == len(names):
        raise ConfigError("; ".join(notes) + ". Choose another --backend or --device.")
    return {name: backend for name, backend in backends.items() if reasons[name] is None}, notes


def ceilings(backends: Mapping[str, Backend], device: str, protocol: Protocol) -> Ceilings:
    """The device's rates by torch's own operations; where humming is in use, by its int8 probe too, if that is higher.

    Where torch's own product stays below what the tensor cores can do, a share of its rate would exceed 100%.
    """
    try:
        found = measure_ceilings(device, protocol)
    except TooSlowError as error:
        raise ConfigError(
            f"The machine's own rates cannot be measured in --slow-seconds {protocol.limit_s:g}: {error}. Give more."
        ) from error
    if "humming" not in backends:
        return found
    try:
        probe = int8_probe()
    except Exception as error:  # see _pack
        return found.model_copy(
            update={"notes": [*found.notes, f"humming's int8 probe: {kind_and_first_line(error)}"]}
        )
    flops = {**found.flops, "int8": max(found.flops["int8"], probe)}
    return found.model_copy(update={"flops": flops, "notes": [*found.notes, "int8 by humming's probe"]})


def measure(
    work: Workload,
    backends: Mapping[str, Backend],
    device: str,
    protocol: Protocol,
    done: Sequence[Cell] = (),
    deadline: float | None = None,
) -> Iterable[list[Cell]]:
    """Time everything, a round (shape, backend, batch) at a time.

    Args:
        work: What.
        backends: Those that work here.
        device: `cpu` or `cuda`.
        protocol: How.
        done: Cells of an earlier report: not measured again.
        deadline: `time.monotonic()` after which no new round is begun.

    Yields:
        The cells of each round as they are found.
    """
    known = {cell.key for cell in done}
    cache = cache_bytes(device)
    for name, backend in backends.items():
        for shape in work.shapes:
            rows = [(scheme, False) for scheme in work.schemes]
            rows += [
                (scheme, True)
                for scheme in work.schemes
                if scheme in work.matrix and shape in work.after_norm
            ]
            left = {
                tokens: [row for row in rows if (*shape, tokens, name, str(row[0]), row[1]) not in known]
                for tokens in work.batches
            }  # fmt: skip
            wanted = [row for row in rows if any(row in rows_left for rows_left in left.values())]
            if not wanted or (deadline is not None and time.monotonic() > deadline):
                continue
            generator = torch.Generator(device).manual_seed(SEED)
            candidates: list[_Candidate] = []
            refused: list[Cell] = []
            for scheme, matrix in wanted:
                made = _pack(backend, shape, scheme, matrix, device, protocol, cache, generator, candidates)
                if isinstance(made, _Candidate):
                    candidates.append(made)
                else:
                    refused += [
                        made.model_copy(update={"tokens": t}) for t in work.batches if (scheme, matrix) in left[t]
                    ]  # fmt: skip
            if refused:
                yield refused
            _survives(device)
            _warm(candidates, [tokens for tokens in work.batches if left[tokens]])
            for tokens in work.batches:
                chosen = [c for c in candidates if (c.scheme, c.matrix) in left[tokens]]
                if chosen and not (deadline is not None and time.monotonic() > deadline):
                    yield _round(name, shape, tokens, chosen, device, protocol, cache, generator)
                    _survives(device)
            del candidates
            torch.cuda.empty_cache()


def _warm(candidates: Sequence[_Candidate], batches: Sequence[int]) -> None:
    """Compile the kernels of all rows side by side; what cannot be compiled says so when its row is gated."""
    layers = {id(c.layers[0]): c.layers[0] for c in candidates}.values()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for made in [pool.submit(layer.warm, tokens) for layer, tokens in itertools.product(layers, batches)]:
            made.exception()


def _survives(device: str) -> None:
    """Stop where a kernel has broken the process's CUDA context: from then on every call fails, whoever made it.

    Raises:
        DeviceLostError: Then; cells that were handed over stay, and the same command continues behind them.
    """
    if (reason := _broken(device)) is not None:
        raise DeviceLostError(
            f"A kernel broke this process's CUDA context ({reason}). Give the same command again: it continues behind "
            "the cell that failed."
        )


def _broken(device: str) -> str | None:
    if device != "cuda":
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return kind_and_first_line(error)
    return None


def random_weight(
    shape: tuple[int, int], scheme: Scheme, device: str, generator: torch.Generator
) -> QuantizedWeight:
    """RTN codes of a normal weight: a kernel's time does not depend on the values."""
    grid = Grid(scheme.wbits, scheme.symmetric, scheme.group_size)
    weight = torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5
    return uniform.round_to_nearest(weight, *uniform.extremes(weight, grid), grid)


def _pack(
    backend: Backend,
    shape: tuple[int, int],
    scheme: Scheme,
    matrix: bool,
    device: str,
    protocol: Protocol,
    cache: int,
    generator: torch.Generator,
    existing: Sequence[_Candidate],
) -> _Candidate | Cell:
    """Rotated layers of one row, or the cell (without a batch) that says why there are none."""
    dtype = backend.dtypes(device)[0]
    for other in existing:  # the same row, with a matrix before it: the layers are the same
        if other.scheme == scheme:
            return _Candidate(scheme, matrix, dtype, other.weight, other.layers, other.build_s, other.cold)
    empty = partial(
        Cell, out_features=shape[0], in_features=shape[1], tokens=0, backend=backend.name, scheme=str(scheme),
        dtype=dtype_name(dtype), norm_matrix=matrix,
    )  # fmt: skip
    if scheme.wbits >= 16:
        return empty(status="refused", message="16-bit weights are the baseline of every row")
    if scheme.group_size is not None and shape[1] % scheme.group_size:
        return empty(
            status="refused", message=f"groups of {scheme.group_size} do not divide {shape[1]} inputs"
        )
    grid = Grid(scheme.wbits, scheme.symmetric, scheme.group_size)
    if (reason := backend.refusal(Request(*shape, grid, scheme.abits, device, dtype))) is not None:
        return empty(status="refused", message=reason)
    started = time.perf_counter()
    try:
        weight = random_weight(shape, scheme, device, generator)
        layers = [build(backend, weight, scheme.abits, dtype)]
        count = protocol.copies(layers[0].packed_bytes, cache)
        layers += [build(backend, weight, scheme.abits, dtype) for _ in range(count - 1)]
    except UnsupportedSchemeError as error:
        return empty(status="refused", message=str(error))
    except Exception as error:  # other people's kernels: whatever they raise belongs into the table
        return empty(status="failed", message=kind_and_first_line(error))
    cold = count * layers[0].packed_bytes >= protocol.cache_factor * cache
    return _Candidate(scheme, matrix, dtype, weight, layers, time.perf_counter() - started, cold)


def _round(
    name: str,
    shape: tuple[int, int],
    tokens: int,
    candidates: Sequence[_Candidate],
    device: str,
    protocol: Protocol,
    cache: int,
    generator: torch.Generator,
) -> list[Cell]:
    """Gate and time all rows of one backend at one shape and batch, interleaved with the unquantized layer."""
    passes: dict[tuple, Callable[[], list[float]]] = {}
    inputs: dict[torch.dtype, Tensor] = {}
    failed: dict[int, dict[str, Any]] = {}
    for dtype in dict.fromkeys(candidate.dtype for candidate in candidates):
        inputs[dtype] = torch.randn(tokens, shape[1], generator=generator, device=device).to(dtype)
        count = protocol.copies(shape[0] * shape[1] * dtype.itemsize, cache)
        dense = [
            (torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5).to(dtype)
            for _ in range(count)
        ]
        calls = [partial(functional.linear, inputs[dtype], weight) for weight in dense]
        try:
            passes[("baseline", dtype)] = repeatable(calls, device, protocol)
        except Exception as error:  # see _pack
            outcome = {
                "status": "slow" if isinstance(error, TooSlowError) else "failed",
                "message": f"the unquantized layer: {kind_and_first_line(error)}",
            }
            return [_cell(name, shape, tokens, c, **outcome) for c in candidates]
    for i, candidate in enumerate(candidates):
        x = inputs[candidate.dtype]
        found = candidate.found = {}
        try:
            result = gate.check(candidate.layers[0], candidate.weight, x)
            found |= {"error": result.error, "worst_channel": result.worst_channel}
            if not result.passed:
                failed[i] = {"status": "wrong", "message": str(result)}
                continue
            found["peak_bytes"] = _peak(candidate.layers[0], x, device)
            calls, alone = _calls(candidate, x, shape, device, protocol, cache, generator)
            passes[("layer", i)] = repeatable(calls, device, protocol)
            if alone:
                passes[("product", i)] = repeatable(alone, device, protocol)
        except TooSlowError as error:
            failed[i] = {"status": "slow", "message": str(error)}
        except Exception as error:  # see _pack
            failed[i] = {"status": "failed", "message": kind_and_first_line(error)}
            if _broken(device) is not None:  # the others did not fail: they get another process
                return [_cell(name, shape, tokens, candidate, **failed[i])]
    passes = {key: value for key, value in passes.items() if key[0] == "baseline" or key[1] not in failed}
    timings: dict[tuple, Timing] = {}
    if any(key[0] == "layer" for key in passes):
        try:
            timings = interleaved(passes)  # type: ignore[arg-type,assignment]
        except Exception as error:  # see _pack
            reason = {"status": "failed", "message": f"{BROKEN_ROUND}: {kind_and_first_line(error)}"}
            failed = {i: failed.get(i, reason) for i in range(len(candidates))}
    cells = []
    for i, candidate in enumerate(candidates):
        outcome = failed.get(i) or {
            "status": "timed",
            "layer": timings[("layer", i)],
            "product": timings.get(("product", i)),
            "baseline": timings[("baseline", candidate.dtype)],
        }
        cells.append(_cell(name, shape, tokens, candidate, **outcome))
    return cells


def _calls(
    candidate: _Candidate,
    x: Tensor,
    shape: tuple[int, int],
    device: str,
    protocol: Protocol,
    cache: int,
    generator: torch.Generator,
) -> tuple[list[Call], list[Call]]:
    """Calls of the whole row, and of its product alone where the row needs more than the product."""
    layers = candidate.layers
    prepared = layers[0].prepare(x)
    alone: list[Call] = []
    if candidate.matrix or candidate.scheme.abits < 16:
        alone = [partial(layer.product, *prepared) for layer in layers]
    if not candidate.matrix:
        return [partial(layer, x) for layer in layers], alone
    width = shape[1]
    count = protocol.copies(width * width * candidate.dtype.itemsize, cache)
    noise = MATRIX_NOISE / width**0.5
    matrices = [
        (torch.eye(width, device=device) + noise * torch.randn(width, width, generator=generator, device=device))
        .to(candidate.dtype)
        for _ in range(count)
    ]  # fmt: skip

    def transformed(layer: KernelLayer, matrix: Tensor) -> Tensor:
        return layer(x @ matrix)

    return [partial(transformed, layer, matrices[i % count]) for i, layer in enumerate(layers)], alone


def _cell(name: str, shape: tuple[int, int], tokens: int, candidate: _Candidate, **outcome: Any) -> Cell:
    return Cell(
        out_features=shape[0],
        in_features=shape[1],
        tokens=tokens,
        backend=name,
        scheme=str(candidate.scheme),
        dtype=dtype_name(candidate.dtype),
        norm_matrix=candidate.matrix,
        arithmetic=candidate.layers[0].arithmetic,
        packed_bytes=candidate.layers[0].packed_bytes,
        build_s=candidate.build_s,
        cold=candidate.cold,
        **candidate.found,
        **outcome,
    )


def _peak(layer: KernelLayer, x: Tensor, device: str) -> int | None:
    """Device memory that one call takes on top of what is there."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def schemes_with_matrix(
    schemes: Sequence[Scheme], method: str | None, always: bool, configs: Sequence[Any]
) -> list[Scheme]:
    """Schemes whose rows need a full matrix after each norm: all if asked for, else as the method's preset says.

    Raises:
        ConfigError: For an unknown method.
        UnsupportedSchemeError: If the method cannot do a scheme on one of the models.
    """
    if always:
        return list(schemes)
    if method is None:
        return []
    planner = METHODS.load(method)()
    needing = []
    for config in configs:
        _, spec, _ = describe(config)
        for scheme in schemes:
            resolved = planner.resolve(scheme, spec)
            resolved.check(scheme, spec)
            if getattr(resolved, "use_ln_matrix", False) and scheme not in needing:
                needing.append(scheme)
    return needing


def environment() -> dict[str, Any]:
    """Versions that decide a kernel's time, and this package's commit."""
    names = ("torch", "triton", "humming-kernels", "gemlite")
    found = {name: _version(name) for name in names}
    return {
        "packages": {name: version for name, version in found.items() if version},
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": provenance.git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
