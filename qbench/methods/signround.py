"""SignRound: learn how each weight is rounded, by the sign of its gradient (the core of AutoRound).

Paper: Cheng et al. 2023, arXiv 2309.05516; reference intel/auto-round@b9f3d00. A rounding rule: it can stand behind any
transform (`smoothquant+signround`). We differ (docs/methods/signround.md has the reasons): a block keeps rounding to
nearest where that is better over all windows; the symmetric grid is qbench's own.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field

from qbench.engine.plan import BlockPlan, BlockView, LearnedRounding
from qbench.methods.base import Method
from qbench.models.base import BlockSpec
from qbench.scheme import Scheme

MANY_ITERATIONS = 1000  # from here on, weights of 3 bits and fewer are learned at twice the rate


class SignRound(Method):
    """Learned rounding offsets and range factors, by signed gradient descent on the block's error."""

    name: ClassVar[str] = "signround"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.05516"
    rounds: ClassVar[bool] = True

    iterations: int = Field(200, ge=1, description="Steps per block.")
    window_batch: int = Field(8, ge=1, description="Windows drawn for each step.")
    lr: float | None = Field(
        None,
        gt=0,
        description="First learning rate; decays to 0. Preset: 1/iterations; twice that from 1000 iterations for 2 and "
        "3 bits.",
    )
    range_lr: float | None = Field(
        None, ge=0, description="The same for the range factors; 0 leaves ranges alone. Preset: lr."
    )

    def resolve(self, scheme: Scheme, spec: BlockSpec) -> Self:
        """The rates of the authors' code."""
        doubled = self.iterations >= MANY_ITERATIONS and scheme.wbits <= 3
        lr = self.lr if self.lr is not None else (2.0 if doubled else 1.0) / self.iterations
        return self.model_copy(update={"lr": lr, "range_lr": lr if self.range_lr is None else self.range_lr})

    def plan(self, view: BlockView) -> BlockPlan:
        """See `Method`."""
        assert self.lr is not None and self.range_lr is not None
        return BlockPlan(rounding=LearnedRounding(self.iterations, self.lr, self.range_lr, self.window_batch))

    @classmethod
    def presets(cls) -> dict[str, str]:
        """See `Method`."""
        return {
            "every scheme": "200 iterations of 8 windows, lr 1/iterations",
            "AutoRound's best": "--set iterations=1000 --nsamples 512",
            "AutoRound's light": "--set iterations=50 --set lr=5e-3",
        }
