"""Records of kernel measurements and the arithmetic on them: ratios, claims, rooflines, break-even batches.

What `qbench bench` writes and every table is rendered from. Nothing here measures; nothing here imports torch. A layer
without a passed gate has no time, and a difference smaller than the baseline's distance from itself is no claim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FORMAT = 1
Status = Literal["timed", "wrong", "refused", "failed", "slow"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Timing(_Record):
    """Time of one call, from two passes of which the second runs in reversed order of all candidates (A B B A).

    Attributes:
        median_us: Over the samples of both passes.
        iqr_us: Distance of their quartiles.
        first_us: Median of the first pass.
        last_us: Median of the second.
        n_samples: Timed replays of a graph, or timed turns of a loop.
        calls_per_sample: Calls that one sample is the mean of.
    """

    median_us: float
    iqr_us: float
    first_us: float
    last_us: float
    n_samples: int
    calls_per_sample: int

    @property
    def spread(self) -> float:
        """A/A spread: how far the two passes of the same code lie apart, as a share of the median."""
        return abs(self.first_us - self.last_us) / self.median_us


class Cell(_Record):
    """One layer at one batch: a backend, a scheme, a shape, a number of tokens.

    Attributes:
        tokens: Rows of the input, the batch M.
        norm_matrix: A full hidden × hidden matrix is multiplied onto the input first, as after AffineQuant's norms.
        dtype: Of input, output and baseline.
        status: `timed`, or why there is no time: the gate (`wrong`), a refusal, an error, a call that is too `slow`.
        message: The sentence that belongs to a status other than `timed`.
        arithmetic: What really runs.
        error: Relative error against the exact product.
        worst_channel: See `deploy.backends.gate`.
        layer: With everything that the row needs at run time: quantization of the input, the norm's matrix.
        product: The product alone, where the row needs more than it.
        baseline: An unquantized layer of the same shape in `dtype`, in the same round.
        packed_bytes: Every buffer of the layer after packing.
        peak_bytes: Memory that one call takes on top of it, None where it cannot be measured.
        cold: Whether the rotated copies exceed the caches as the protocol demands.
        build_s: Seconds to pack all copies and to compile.
    """

    out_features: int
    in_features: int
    tokens: int
    backend: str
    scheme: str
    dtype: str
    norm_matrix: bool = False
    status: Status
    message: str | None = None
    arithmetic: str | None = None
    error: float | None = None
    worst_channel: float | None = None
    layer: Timing | None = None
    product: Timing | None = None
    baseline: Timing | None = None
    packed_bytes: int | None = None
    peak_bytes: int | None = None
    cold: bool | None = None
    build_s: float | None = None

    @property
    def key(self) -> tuple[int, int, int, str, str, bool]:
        """What the cell is, without what was found."""
        return (
            self.out_features, self.in_features, self.tokens, self.backend, self.scheme, self.norm_matrix
        )  # fmt: skip

    @property
    def ratio(self) -> float | None:
        """How many times faster than the baseline of the same round (below 1: slower)."""
        if self.layer is None or self.baseline is None:
            return None
        return self.baseline.median_us / self.layer.median_us

    @property
    def claim(self) -> Literal["faster", "slower", "no difference"] | None:
        """What may be said: no difference where it is within the spread of the baseline or the layer with itself."""
        if self.ratio is None or self.layer is None or self.baseline is None:
            return None
        if abs(self.ratio - 1) <= max(self.layer.spread, self.baseline.spread):
            return "no difference"
        return "faster" if self.ratio > 1 else "slower"


class Ceilings(_Record):
    """Rates measured on the device in the same run, by plain torch operations.

    Attributes:
        read_bytes_per_s: Reading memory that is in no cache.
        flops: Multiplications and additions per second of a large square product, by type of its operands.
        notes: How each was found where that is not obvious.
    """

    read_bytes_per_s: float
    flops: dict[str, float]
    notes: list[str] = []


class Speed(_Record):
    """Generation with a whole model.

    Attributes:
        model: Name, or the shapes that random weights have.
        backend: Or `none` for the model as it was given.
        prefill_tokens_per_s: Prompt tokens of all sequences over the time of one forward pass.
        decode_tokens_per_s: New tokens of all sequences over the median time of a step, called one by one.
        graphed_tokens_per_s: The same steps replayed as one CUDA graph each, None where that is not possible.
        weight_bytes: Parameters and buffers of the model.
        peak_bytes: Device memory at its highest, None on a CPU.
        checkpoint: Folder name of the finished lane whose codes were packed; None: rounded to nearest on the spot.
    """

    model: str
    backend: str
    scheme: str
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    graphed_tokens_per_s: float | None = None
    weight_bytes: int
    peak_bytes: int | None = None
    checkpoint: str | None = None
    notes: list[str] = []


class ShapeSet(_Record):
    """The linears of one block of a model.

    Attributes:
        name: Of the model.
        linears: (out, in) by role.
        norm_groups: Roles that read the same norm, and would share its matrix.
        n_blocks: Blocks of the model.
    """

    name: str
    linears: dict[str, tuple[int, int]]
    norm_groups: list[tuple[str, ...]]
    n_blocks: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Distinct (out, in), in order of the data flow."""
        return list(dict.fromkeys(self.linears.values()))

    @property
    def after_norm(self) -> set[tuple[int, int]]:
        """Shapes of the linears that read a norm."""
        return {self.linears[role] for group in self.norm_groups for role in group}


class Report(_Record):
    """Everything that one or more `qbench bench` on one device found."""

    format: int = FORMAT
    commands: list[str]
    device: str
    cache_bytes: int
    environment: dict[str, Any]
    protocol: dict[str, Any]
    models: list[ShapeSet] = []
    ceilings: Ceilings | None = None
    cells: list[Cell] = []
    speeds: list[Speed] = []
    notes: list[str] = []


def scheme_bytes(out_features: int, in_features: int, wbits: int, groups: int, symmetric: bool) -> float:
    """Smallest storage of a weight: codes, 16-bit scales, zero points of the codes' bits."""
    if wbits >= 16:
        return 2.0 * out_features * in_features
    per_group = 16 + (0 if symmetric else wbits)
    return (out_features * in_features * wbits + out_features * groups * per_group) / 8


def floor_us(
    out_features: int, in_features: int, tokens: int, weight_bytes: float, ceilings: Ceilings, operands: str
) -> float:
    """Time that no layer of this shape can beat at the measured rates: the longer of reading and multiplying.

    Args:
        out_features: Rows of the weight.
        in_features: Its columns.
        tokens: Rows of the input.
        weight_bytes: What has to be read of the weight (`scheme_bytes`).
        ceilings: Measured rates.
        operands: Type in which the product is computed, a key of `ceilings.flops`.
    """
    moved = weight_bytes + 2 * tokens * (in_features + out_features)
    work = 2 * tokens * in_features * out_features
    return 1e6 * max(moved / ceilings.read_bytes_per_s, work / ceilings.flops[operands])


def break_even(points: Sequence[tuple[int, float]]) -> str:
    """Batch up to which a layer is not slower than the baseline, from (tokens, times faster) at measured batches.

    Between two measured batches the crossing is interpolated, both axes logarithmic; `>` and `<` where all of them lie
    on one side.
    """
    points = sorted(points)
    if not points:
        return "—"
    if points[0][1] < 1:
        return f"<{points[0][0]}"
    for (m0, r0), (m1, r1) in itertools.pairwise(points):
        if r1 < 1:
            share = math.log(r0) / (math.log(r0) - math.log(r1))
            return f"≈{round(math.exp(math.log(m0) + share * (math.log(m1) - math.log(m0))))}"
    return f">{points[-1][0]}"
