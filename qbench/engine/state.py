"""BlockState: everything a method leaves behind for one block. Integers are the truth, the rest is derived."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qbench.errors import DataError
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight
from qbench.results import BlockRecord, TransformRecord
from qbench.transforms.tensors import BlockTensors

FORMAT = 1


@dataclass
class BlockState:
    """One finished block of one lane.

    Attributes:
        linears: Integers by role, or a float weight where the scheme leaves weights at 16 bits.
        rest: Biases and norms after folding (its `weight` is empty).
        learned: Parameters as trained, by name, for analysis and for writing the authors' format.
        record: Losses, errors, seconds, notes.
        transforms: What each transform is and costs.
        new_biases: Linears that got a bias which the model does not have.
    """

    linears: dict[str, QuantizedWeight | Tensor]
    rest: BlockTensors
    learned: dict[str, Tensor] = field(default_factory=dict)
    record: BlockRecord | None = None
    transforms: list[TransformRecord] = field(default_factory=list)
    new_biases: tuple[str, ...] = ()

    def tensors(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> BlockTensors:
        """The block's tensors with weights derived from the integers, ready for a prepared block."""
        tensors = self.rest.map(lambda t: t.to(device, dtype))
        for role, linear in self.linears.items():
            if isinstance(linear, QuantizedWeight):
                tensors.weight[role] = linear.to(device).dequantize(torch.float32).to(dtype)
            else:
                tensors.weight[role] = linear.to(device, dtype)
        return tensors

    def cpu(self) -> BlockState:
        """The same in main memory: the device holds one block, however many are finished."""
        return replace(
            self,
            linears={role: linear.to("cpu") for role, linear in self.linears.items()},
            rest=self.rest.map(lambda t: t.cpu()),
            learned={name: tensor.cpu() for name, tensor in self.learned.items()},
        )

    @property
    def weight_bits(self) -> int:
        """Stored bits of codes, scales and zero points (16 per untouched weight) and of new biases."""
        weights = sum(
            linear.stored_bits if isinstance(linear, QuantizedWeight) else 16 * linear.numel()
            for linear in self.linears.values()
        )
        biases = [bias for role in self.new_biases if (bias := self.rest.bias[role]) is not None]
        return weights + 16 * sum(bias.numel() for bias in biases)

    def update_digest(self, digest: Any) -> None:
        """Feed the integers, scales and zero points, by role, to a hash."""
        for role in sorted(self.linears):
            linear = self.linears[role]
            parts = (
                (linear.codes, linear.scale, linear.zero_point)
                if isinstance(linear, QuantizedWeight)
                else (linear,)
            )
            digest.update(role.encode())
            for part in parts:
                digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        flat: dict[str, Tensor] = {}
        grids: dict[str, Any] = {}
        for role, linear in self.linears.items():
            if isinstance(linear, QuantizedWeight):
                flat[f"linear.{role}.codes"] = linear.codes
                flat[f"linear.{role}.scale"] = linear.scale
                flat[f"linear.{role}.zero_point"] = linear.zero_point
                grids[role] = asdict(linear.grid)
            else:
                flat[f"linear.{role}.weight"] = linear
        for group in ("bias", "norm_weight", "norm_bias", "norm_matrix"):
            for name, tensor in getattr(self.rest, group).items():
                if tensor is not None:
                    flat[f"{group}.{name}"] = tensor
        flat |= {f"learned.{name}": tensor for name, tensor in self.learned.items()}
        meta = {
            "format": FORMAT,
            "grids": grids,
            "roles": list(self.linears),
            "norms": list(self.rest.norm_weight),
            "record": self.record.model_dump() if self.record else None,
            "transforms": [t.model_dump() for t in self.transforms],
            "new_biases": list(self.new_biases),
        }
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in flat.items()}, path, {"qbench": json.dumps(meta)}
        )

    @classmethod
    def load(cls, path: Path) -> BlockState:
        """Read what `save` wrote.

        Raises:
            DataError: If the file is missing, damaged or of another format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("qbench", "{}"))
                flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(
                f"Cannot read checkpoint file {path}: {error}. Delete it, or use --restart."
            ) from error
        if meta.get("format") != FORMAT:
            raise DataError(
                f"Checkpoint file {path} has format {meta.get('format')}, this version reads {FORMAT}. Use --restart."
            )
        linears: dict[str, QuantizedWeight | Tensor] = {}
        for role in meta["roles"]:
            if role in meta["grids"]:
                grid = Grid(**meta["grids"][role])
                codes, scale, zero = (
                    flat[f"linear.{role}.{part}"] for part in ("codes", "scale", "zero_point")
                )
                linears[role] = QuantizedWeight(codes, scale, zero, grid)
            else:
                linears[role] = flat[f"linear.{role}.weight"]
        rest = BlockTensors(
            bias={role: flat.get(f"bias.{role}") for role in meta["roles"]},
            norm_weight={norm: flat[f"norm_weight.{norm}"] for norm in meta["norms"]},
            norm_bias={norm: flat.get(f"norm_bias.{norm}") for norm in meta["norms"]},
            norm_matrix={norm: flat.get(f"norm_matrix.{norm}") for norm in meta["norms"]},
        )
        prefix = "learned."
        return cls(
            linears=linears,
            rest=rest,
            learned={k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)},
            record=BlockRecord(**meta["record"]) if meta["record"] else None,
            transforms=[TransformRecord(**t) for t in meta["transforms"]],
            new_biases=tuple(meta["new_biases"]),
        )
