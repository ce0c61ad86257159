"""Finished blocks with every kind of content, for tests of files."""

from __future__ import annotations

import torch

from qbench.engine.state import BlockState
from qbench.quant.grid import Grid
from qbench.quant.uniform import extremes, round_to_nearest
from qbench.results import BlockRecord, TransformRecord
from qbench.transforms.tensors import BlockTensors


def block_state(seed: int = 0, *, quantized: bool = True) -> BlockState:
    """A block of two linears and two norms: a bias missing here, a norm matrix there."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {"q": random(8, 16), "down": random(16, 8)}
    grids = {"q": Grid(4, group_size=8), "down": Grid(3, symmetric=True, zero_in_range=False)}
    linears = {
        role: round_to_nearest(w, *extremes(w, grids[role]), grids[role]) for role, w in weights.items()
    }
    return BlockState(
        linears=linears if quantized else weights,
        rest=BlockTensors(
            bias={"q": random(8), "down": None},
            norm_weight={"attn_norm": random(16), "mlp_norm": random(16)},
            norm_bias={"attn_norm": None, "mlp_norm": random(16)},
            norm_matrix={"attn_norm": random(16, 16), "mlp_norm": None},
        ),
        learned={"value_out.scale": random(2, 8), "clipping.upper.q": random(8, 2)},
        record=BlockRecord(
            index=seed, seconds=1.5, losses=[0.5, 0.25], local_error=1e-3, accumulated_error=2e-3,
            notes=["a note"], extras={"condition.attn_in": 3.5},
        ),
        transforms=[
            TransformRecord(
                site="attn_in", kind="matrix", foldable=False, function_preserving=True, stored_bits=4096,
                flops_per_token=512, note=None,
            )
        ],
    )  # fmt: skip


def same_state(one: BlockState, other: BlockState) -> bool:
    """Bit for bit, types and absences included."""

    def flat(state: BlockState) -> dict[str, object]:
        parts: dict[str, object] = {"record": state.record, "transforms": state.transforms}
        for role, linear in state.linears.items():
            if isinstance(linear, torch.Tensor):
                parts[role] = linear
            else:
                parts |= {f"{role}.{name}": value for name, value in vars(linear).items()}
        for group in ("weight", "bias", "norm_weight", "norm_bias", "norm_matrix"):
            parts |= {f"{group}.{name}": value for name, value in getattr(state.rest, group).items()}
        return parts | {f"learned.{name}": value for name, value in state.learned.items()}

    first, second = flat(one), flat(other)
    if first.keys() != second.keys():
        return False
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            found = second[name]
            if (
                not isinstance(found, torch.Tensor)
                or found.dtype != value.dtype
                or not torch.equal(found, value)
            ):
                return False
        elif value != second[name]:
            return False
    return True
