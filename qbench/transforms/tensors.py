"""BlockTensors: the tensors of one block by role, as transforms read and replace them.

The same rewrite functions run in float32 with gradients (training), and in float64 without (the final fold), so
what is trained is what is folded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class BlockTensors:
    """Weights, biases and what transforms add to the norms.

    Attributes:
        weight: [out, in] by linear role.
        bias: [out] by linear role, None where there is none.
        norm_weight: [hidden] by norm name.
        norm_bias: [hidden] by norm name; None on an RMSNorm that has not been shifted.
        norm_matrix: [hidden, hidden] multiplied onto the norm's output from the right at run time, or None.
        row_scale: Factor of a weight's rows [out] by linear role, where one has not been multiplied in yet.
        column_scale: Factor of a weight's columns [in] likewise. Fake quantization takes both on its way
            (`quant.fake`); everybody else calls `settle` first.
    """

    weight: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor | None] = field(default_factory=dict)
    norm_weight: dict[str, Tensor] = field(default_factory=dict)
    norm_bias: dict[str, Tensor | None] = field(default_factory=dict)
    norm_matrix: dict[str, Tensor | None] = field(default_factory=dict)
    row_scale: dict[str, Tensor] = field(default_factory=dict)
    column_scale: dict[str, Tensor] = field(default_factory=dict)

    def copy(self) -> BlockTensors:
        """Another set of dictionaries over the same tensors."""
        return self.map(lambda tensor: tensor)

    def map(self, change: Callable[[Tensor], Tensor]) -> BlockTensors:
        """Apply `change` to every tensor."""

        def mapped(group: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
            return {name: None if tensor is None else change(tensor) for name, tensor in group.items()}

        return BlockTensors(
            weight=mapped(self.weight),  # type: ignore[arg-type]
            bias=mapped(self.bias),
            norm_weight=mapped(self.norm_weight),  # type: ignore[arg-type]
            norm_bias=mapped(self.norm_bias),
            norm_matrix=mapped(self.norm_matrix),
            row_scale=mapped(self.row_scale),  # type: ignore[arg-type]
            column_scale=mapped(self.column_scale),  # type: ignore[arg-type]
        )

    def scale_rows(self, role: str, factor: Tensor) -> None:
        """W ← diag(factor)·W, later."""
        old = self.row_scale.get(role)
        self.row_scale[role] = factor if old is None else old * factor

    def scale_columns(self, role: str, factor: Tensor) -> None:
        """W ← W·diag(factor), later."""
        old = self.column_scale.get(role)
        self.column_scale[role] = factor if old is None else old * factor

    def settle_rows(self, role: str) -> None:
        """Multiply a pending factor of the rows into the weight."""
        if role in self.row_scale:
            self.weight[role] = self.weight[role] * self.row_scale.pop(role).unsqueeze(-1)

    def settle_columns(self, role: str) -> None:
        """Multiply a pending factor of the columns into the weight."""
        if role in self.column_scale:
            self.weight[role] = self.weight[role] * self.column_scale.pop(role)

    def settle(self) -> BlockTensors:
        """Multiply every pending factor in; returns itself."""
        for role in self.weight:
            self.settle_rows(role)
            self.settle_columns(role)
        return self

    def times(self, role: str, vector: Tensor) -> Tensor:
        """W·vector, pending factors included."""
        if role in self.column_scale:
            vector = vector * self.column_scale[role]
        product = self.weight[role] @ vector
        return product * self.row_scale[role] if role in self.row_scale else product

    def add_bias(self, role: str, term: Tensor) -> None:
        """Add to a linear's bias, creating it where there was none."""
        old = self.bias[role]
        self.bias[role] = term if old is None else old + term

    def add_norm_bias(self, norm: str, term: Tensor) -> None:
        """Add to a norm's bias, creating it on an RMSNorm."""
        old = self.norm_bias[norm]
        self.norm_bias[norm] = term if old is None else old + term
