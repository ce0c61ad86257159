"""Parameter files of the authors' OmniQuant and AffineQuant programs: read into a plan, written from a run.

Layout (OpenGVLab/OmniQuant@95fae1b, bytedance/AffineQuant@0f3ba93): a dictionary block index → name → tensor, saved by
torch.save. Scales are [H] or [H, H]; a matrix of heads is block-diagonal; what is saved of a matrix is the trained
parameter, before the gradual mask and its stability factor, which the file does not name. A clipping factor is a
column [out · groups, 1].
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.engine.plan import BlockPlan, BlockView
from qbench.engine.tensor_files import load_dictionary
from qbench.errors import ConfigError, DataError
from qbench.models.base import BlockSpec, Site
from qbench.quant.clipping import Clipping
from qbench.quant.grid import Grid
from qbench.scheme import Scheme
from qbench.transforms.transform import DiagonalTransform, MatrixTransform, RotationTransform, Transform

PREFIXES = {
    "attn_in": "qkv",
    "mlp_in": "fc1",
    "value_out": "out",
    "query_key": "qkt",
}  # of their names, by site
FACTORS = {"upper": "upbound_factor", "lower": "lowbound_factor"}
APPLICABLE = {
    "parameters",
    "sf",
    "query_key",
    "truncate",
}  # options beside a file: the rest is about training
Blocks = Sequence[Mapping[str, Tensor]]


def pinned(path: str) -> str:
    """`path#fingerprint`: what a method's option says of a file, so that a row means its content.

    Raises:
        ConfigError: If it cannot be read.
    """
    path = _split(path)[0]
    try:
        with Path(path).open("rb") as file:
            return f"{path}#{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise ConfigError(f"Cannot read parameter file {path!r}: {error.strerror}.") from error


def _split(path: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.*)#([0-9a-f]{16})", path, re.DOTALL)
    return (match[1], match[2]) if match else (path, "")


@functools.lru_cache(maxsize=1)  # every block of a pass asks for the same file
def read_parameters(pinned_path: str) -> Blocks:
    """The parameters of every block, in order.

    Args:
        pinned_path: A file of torch.save, as `pinned` writes it: a changed file is read again.

    Raises:
        DataError: If it holds anything but tensors in the layout of the module's docstring, blocks 0, 1, 2, ….
    """
    path = _split(pinned_path)[0]
    what = f"Parameter file {path!r}"
    data = load_dictionary(path, "Parameter file")
    if not all(isinstance(key, int) for key in data):
        raise DataError(f"{what} is no dictionary of blocks: expected 0: {{name: tensor}}, 1: ….")
    missing = sorted(set(range(max(data) + 1)) - set(data))
    if missing or min(data) < 0:
        raise DataError(f"{what} lacks block {missing[0] if missing else min(data)}: it has {sorted(data)}.")
    for index, block in data.items():
        if not isinstance(block, Mapping) or not all(isinstance(v, Tensor) for v in block.values()):
            raise DataError(f"{what}: block {index} is no dictionary of tensors.")
        for name, tensor in block.items():
            if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
                raise DataError(f"{what}: block {index}, {name}: not all values are finite numbers.")
    return [{name: tensor.detach().float() for name, tensor in data[i].items()} for i in range(len(data))]


def has_matrices(pinned_path: str) -> bool:
    """Whether any transform of a file is a matrix, so that a stability factor belongs to it."""
    return any(
        name.endswith("_smooth_scale") and tensor.dim() == 2
        for block in read_parameters(pinned_path)
        for name, tensor in block.items()
    )


def refuse_training(options: Mapping[str, Any]) -> None:
    """Refuse a request to train, beside a file whose parameters are taken as they are.

    Args:
        options: Those of the method that were given. A switch that is on says how the file was made, as in the
            authors' command lines, and is let pass.

    Raises:
        ConfigError: Names the options that would be done nothing about.
    """
    idle = sorted(
        name for name, value in options.items() if name not in APPLICABLE and value not in (True, None)
    )
    if idle:
        raise ConfigError(
            f"Parameter file {options['parameters']!r} is applied as it is, nothing is trained: "
            f"{', '.join(f'{name}={options[name]}' for name in idle)} would be ignored. Leave this out, or train "
            "without the file."
        )


def check_parameters(pinned_path: str, spec: BlockSpec, scheme: Scheme, *, matrices: bool = True) -> None:
    """Refuse a file that was not made for this model, group size and method.

    Args:
        pinned_path: See `pinned`.
        spec: The model's blocks.
        scheme: Decides the number of clipping factors.
        matrices: Whether the method has matrices.

    Raises:
        DataError: Names the first block and parameter that does not fit.
    """
    path, blocks = _split(pinned_path)[0], read_parameters(pinned_path)
    if len(blocks) != spec.n_blocks:
        raise DataError(
            f"Parameter file {path!r} has {len(blocks)} blocks, the model {spec.n_blocks}: "
            + (
                f"block {len(blocks)} is missing."
                if len(blocks) < spec.n_blocks
                else "it is another model's."
            )
        )
    grid = Grid(scheme.wbits, scheme.symmetric, scheme.group_size)
    known: dict[str, list[tuple[int, ...]]] = {}
    for site, prefix in PREFIXES.items():
        width = spec.shapes["o"][1] if site in ("value_out", "query_key") else spec.hidden_size
        known[f"{prefix}_smooth_scale"] = [(width,), (width, width)]
        if site != "query_key":
            known[f"{prefix}_smooth_shift"] = [(width,)]
    for role, linear in spec.linears.items():
        rows, columns = spec.shapes[role]
        for factor in FACTORS.values():
            known[f"{linear}.weight_quantizer.{factor}"] = [(rows * grid.n_groups(columns), 1)]
    first = set(blocks[0])
    for index, block in enumerate(blocks):
        where = f"Parameter file {path!r}, block {index}"
        for name, tensor in block.items():
            if name not in known:
                raise DataError(
                    f"{where}: unknown parameter {name!r}. Known for this model: {', '.join(known)}."
                )
            if tuple(tensor.shape) not in known[name]:
                wanted = " or ".join(str(list(shape)) for shape in known[name])
                raise DataError(
                    f"{where}: {name} has shape {list(tensor.shape)}, this model at {scheme} needs {wanted}."
                )
            if name.endswith("_smooth_scale"):
                _require_transform(where, name, tensor, spec)
        if set(block) != first:
            odd = sorted(set(block) ^ first)[0]
            raise DataError(f"{where}: {odd} is in one of this block and block 0, but not in both.")
    if not first:
        raise DataError(f"Parameter file {path!r} holds no parameters: its blocks are empty.")
    for prefix in PREFIXES.values():
        if f"{prefix}_smooth_shift" in first and f"{prefix}_smooth_scale" not in first:
            raise DataError(
                f"Parameter file {path!r} has {prefix}_smooth_shift but lacks {prefix}_smooth_scale."
            )
    factors = {name for name in known if name.endswith(tuple(FACTORS.values()))}
    if factors & first and not factors <= first:
        raise DataError(
            f"Parameter file {path!r} lacks {sorted(factors - first)[0]}: every linear needs both."
        )
    per_head = {"out_smooth_scale", "qkt_smooth_scale", "out_smooth_shift"} & first
    if spec.heads_per_group > 1 and per_head:
        raise DataError(
            f"Parameter file {path!r} has {sorted(per_head)[0]} for every query head; this model shares key/value "
            "heads among them, which the authors' layout cannot say."
        )
    if not matrices and has_matrices(pinned_path):
        raise DataError(
            f"Parameter file {path!r} holds matrices, which this method does not have. Read it with --method "
            "affinequant."
        )
    absent = [f"{PREFIXES[s]}_smooth_scale" for s in PREFIXES if s not in spec.sites]
    if found := sorted(set(absent) & first):
        raise DataError(f"Parameter file {path!r} has {found[0]}, a site that this model does not have.")


def _require_transform(where: str, name: str, tensor: Tensor, spec: BlockSpec) -> None:
    """Refuse what has no inverse here, and what would have to be left out."""
    matrix = tensor.dim() == 2
    if not bool((tensor.diagonal() if matrix else tensor).all()):
        raise DataError(f"{where}: {name} has zeros on its diagonal, which nothing can be divided by.")
    if matrix and name.startswith(("out_", "qkt_")):
        heads = (
            tensor[i : i + spec.head_dim, i : i + spec.head_dim] for i in range(0, len(tensor), spec.head_dim)
        )
        if not torch.equal(torch.block_diag(*heads), tensor):
            raise DataError(f"{where}: {name} has entries that join heads; expected one matrix per head.")


def plan_of(block: Mapping[str, Tensor], view: BlockView, stability_factor: float | None) -> BlockPlan:
    """The plan that computes what a block's parameters say, without training.

    Args:
        block: Checked by `check_parameters`.
        view: The block.
        stability_factor: Of the gradual mask at its last epoch; needed where there are matrices.
    """
    spec = view.spec
    transforms = []
    for name, prefix in PREFIXES.items():
        scale = block.get(f"{prefix}_smooth_scale")
        if scale is not None:
            shift = block.get(f"{prefix}_smooth_shift")
            if shift is not None and not bool(shift.any()):
                shift = None  # OmniQuant writes zeros where it learns none
            transforms.append(_transform(spec, spec.site(name), scale, shift, stability_factor))
    clipping = None
    if any(name.endswith(FACTORS["upper"]) for name in block) and view.grid.bits < 16:
        clipping = Clipping(spec.shapes, view.grid)
        with torch.no_grad():
            for role, linear in spec.linears.items():
                for logits, factor in ((clipping.upper, "upper"), (clipping.lower, "lower")):
                    stored = block[f"{linear}.weight_quantizer.{FACTORS[factor]}"]
                    logits[role].copy_(stored.reshape(logits[role].shape))
    return BlockPlan(transforms, clipping)


def _transform(
    spec: BlockSpec, site: Site, scale: Tensor, shift: Tensor | None, stability_factor: float | None
) -> Transform:
    if scale.dim() == 1:
        if site.kind == "query_key" and spec.rope and _pairs(scale, spec.head_dim):
            return DiagonalTransform(spec, site, scale, paired=True)
        return DiagonalTransform(spec, site, scale, shift)
    assert stability_factor is not None, "asked for by the method"
    groups = spec.n_heads if site.kind in ("value", "query_key") else 1
    size = scale.shape[0] // groups
    heads = torch.stack([scale[i : i + size, i : i + size] for i in range(0, scale.shape[0], size)])
    if site.kind == "query_key" and spec.rope and (rotation := _rotation(heads)) is not None:
        transform = RotationTransform(spec, site)
        with torch.no_grad():
            transform.a.copy_(rotation[0])
            transform.b.copy_(rotation[1] * stability_factor)
        return transform
    matrix = MatrixTransform(
        spec, site, scale.diagonal(), shift, stability_factor=stability_factor, gradual=False
    )
    with torch.no_grad():
        matrix.matrix.copy_(heads)
    return matrix


def _pairs(scale: Tensor, head_dim: int) -> bool:
    """Whether channels i and i + head_dim/2 of every head share their scale, which commutes with RoPE."""
    halves = scale.reshape(-1, 2, head_dim // 2)
    return torch.equal(halves[:, 0], halves[:, 1])


def _rotation(heads: Tensor) -> tuple[Tensor, Tensor] | None:
    """(a, b) of [[a, −b], [b, a]] per pair of channels, each [heads, head_dim/2]; None if the matrices are no such."""
    half = heads.shape[-1] // 2
    top_left, top_right = heads[:, :half, :half], heads[:, :half, half:]
    low_left, low_right = heads[:, half:, :half], heads[:, half:, half:]
    a, b = top_left.diagonal(dim1=-2, dim2=-1), low_left.diagonal(dim1=-2, dim2=-1)
    diagonal = torch.diag_embed(a), torch.diag_embed(b)
    same = (
        torch.equal(top_left, diagonal[0])
        and torch.equal(low_right, diagonal[0])
        and torch.equal(low_left, diagonal[1])
        and torch.equal(top_right, -diagonal[1])
    )
    return (a, b) if same else None


def as_authors_write(
    learned: Mapping[str, Tensor], spec: BlockSpec, stability_factor: float | None = None
) -> dict[str, Tensor]:
    """A block's learned parameters (`BlockState.learned`) under the authors' names and shapes.

    Args:
        learned: Of an `omniquant` or `affinequant` run.
        spec: The block.
        stability_factor: That of the run; needed for rotations, which their layout holds as masked matrices.

    Raises:
        ConfigError: For what their layout cannot hold.
    """
    if spec.heads_per_group > 1 and any(name.startswith(("value_out", "query_key")) for name in learned):
        raise ConfigError(
            "The authors' layout has one transform per query head: it cannot hold those of a model that shares "
            "key/value heads."
        )
    written: dict[str, Tensor] = {}
    rest = dict(learned)
    for site, prefix in PREFIXES.items():
        own = {n.removeprefix(f"{site}."): rest.pop(n) for n in learned if n.startswith(f"{site}.")}
        if not own:
            continue
        if "a" in own:
            if stability_factor is None:
                raise ConfigError(
                    "This run has rotations at query_key, which the authors' layout holds divided by the stability "
                    "factor. Give --sf, the one of the run."
                )
            a, b = torch.diag_embed(own["a"]), torch.diag_embed(own["b"] / stability_factor)
            heads = torch.cat((torch.cat((a, -b), -1), torch.cat((b, a), -1)), -2)
            written[f"{prefix}_smooth_scale"] = torch.block_diag(*heads)
        elif "matrix" in own:
            written[f"{prefix}_smooth_scale"] = torch.block_diag(*own["matrix"])
        elif "scale" in own:
            scale = own["scale"]
            if site == "query_key" and scale.shape[-1] < spec.head_dim:  # one of each pair
                scale = torch.cat((scale, scale), -1)
            written[f"{prefix}_smooth_scale"] = scale.reshape(-1)
        if site != "query_key":
            width = spec.shapes["v"][0] if site == "value_out" else spec.hidden_size
            written[f"{prefix}_smooth_shift"] = own.get("shift", torch.zeros(width))
    for name in list(rest):
        match = re.fullmatch(r"clipping\.(upper|lower)\.(\w+)", name)
        if match:
            linear = spec.linears[match[2]]
            written[f"{linear}.weight_quantizer.{FACTORS[match[1]]}"] = rest.pop(name).reshape(-1, 1)
    if rest:
        raise ConfigError(f"The authors' layout has no place for {', '.join(sorted(rest))}.")
    return {name: tensor.detach().float().contiguous() for name, tensor in written.items()}
