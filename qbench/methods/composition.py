"""Composition: `affinequant+gptq` is a method like any other, put together from methods that know nothing of it.

Transforms in the order of the parts, then the last part's rounding rule. A learned part trains with rounding to
nearest in the loop, then the last part rounds the folded weights, over the learned ranges where there are any.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from pydantic import create_model, model_validator

from qbench.engine.plan import BlockPlan, BlockView, Needs
from qbench.errors import ConfigError
from qbench.methods import METHODS
from qbench.methods.base import Method
from qbench.models.base import BlockSpec
from qbench.scheme import Scheme


@functools.cache
def compose(name: str) -> type[Method]:
    """The class of a composition, the same one each time.

    Args:
        name: Names of methods joined by `+`.

    Raises:
        ConfigError: If a part is unknown, or the parts do not make one quantization.
    """
    if not all(name.split("+")):
        raise ConfigError(f"Method {name!r} has an empty part. Join names by +, such as smoothquant+gptq.")
    parts = tuple(METHODS.load(part) for part in name.split("+"))
    _require_order(name, parts)
    count = Counter(field for part in parts for field in part.model_fields)
    names = {
        (part.name, field): field if count[field] == 1 else f"{part.name}.{field}"
        for part in parts
        for field in part.model_fields
    }
    fields: dict[str, Any] = {
        names[part.name, field]: (info.annotation, info)
        for part in parts
        for field, info in part.model_fields.items()
    }
    composed = create_model(
        "+".join(part.__name__ for part in parts),
        __base__=Composition,
        __doc__=f"{' and '.join(part.name for part in parts[:-1])}, rounded by {parts[-1].name}.",
        **fields,
    )
    composed.name = name
    composed.paper = " ".join(part.paper for part in parts if part.paper)
    composed.learns = any(part.learns for part in parts)
    composed.published_form = {
        names[part.name, option]: value for part in parts for option, value in part.published_form.items()
    }
    composed.part_classes, composed.field_names = parts, names
    return composed


def _require_order(name: str, parts: Sequence[type[Method]]) -> None:
    names = [part.name for part in parts]
    rounding = ", ".join(METHODS.rounding_rules())
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ConfigError(f"Method {name!r} names {twice} twice; each part may stand once.")
    if not parts[-1].rounds:
        raise ConfigError(
            f"Method {name!r} ends with {names[-1]}, which is no rounding rule. "
            f"Write transforms first and one rounding rule last: {rounding}."
        )
    misplaced = [part.name for part in parts[:-1] if part.rounds]
    if misplaced:
        raise ConfigError(
            f"Method {name!r} has a second rounding rule, {misplaced[0]}, before {names[-1]}. A weight is rounded "
            f"once: keep one of {rounding}, as the last part."
        )
    early = [part.name for part in parts[:-2] if part.learns]
    if early:
        raise ConfigError(
            f"Method {name!r} has {early[0]}, which is learned, before {names[-2]}, which must know what it learned. "
            "Put the learned part right before the rounding rule."
        )


class Composition(Method):
    """Several methods' plans in one. Subclasses are made by `compose`."""

    part_classes: ClassVar[tuple[type[Method], ...]] = ()
    field_names: ClassVar[dict[tuple[str, str], str]] = {}
    """(part, its option) → field here: the option's own name, with the part's in front where two parts have it."""

    @model_validator(mode="before")
    @classmethod
    def _full_names(cls, data: Any) -> Any:
        """Accept `gptq.act_order` also where `act_order` alone would do."""
        if not isinstance(data, dict):
            return data
        full = {cls.full_name(name): value for name, value in data.items()}
        if len(full) < len(data):
            raise ValueError(f"an option is given twice, alone and with its method's name: {', '.join(data)}")
        return full

    @classmethod
    def full_name(cls, option: str) -> str:
        """The field that an option means when it is written with its part's name in front; otherwise itself."""
        part, _, name = option.rpartition(".")
        return cls.field_names.get((part, name), option)

    @model_validator(mode="after")
    def _valid_parts(self) -> Self:
        self._parts()
        return self

    def _parts(self) -> list[Method]:
        """The parts with their options; what was not set here is not set there."""
        return [
            part(
                **{
                    field: getattr(self, full)
                    for (owner, field), full in self.field_names.items()
                    if owner == part.name and full in self.model_fields_set
                }
            )
            for part in self.part_classes
        ]

    @property
    def needs(self) -> Needs:
        """What any part needs."""
        return Needs(activation_stats=any(part.needs.activation_stats for part in self._parts()))

    def resolve(self, scheme: Scheme, spec: BlockSpec) -> Self:
        """See `Method`."""
        resolved = [part.resolve(scheme, spec) for part in self._parts()]
        return self.model_copy(
            update={
                self.field_names[part.name, field]: getattr(part, field)
                for part in resolved
                for field in part.model_fields_set
            }
        )

    def check(self, scheme: Scheme, spec: BlockSpec) -> None:
        """See `Method`."""
        for part in self._parts():
            part.check(scheme, spec)

    def notes(self, scheme: Scheme, spec: BlockSpec) -> list[str]:
        """See `Method`."""
        return [note for part in self._parts() for note in part.notes(scheme, spec)]

    def plan(self, view: BlockView) -> BlockPlan:
        """Each part plans on the block as the transforms before it leave it; a later clipping replaces an earlier."""
        whole = BlockPlan()
        parts = self._parts()
        for i, part in enumerate(parts):
            plan = part.plan(view)
            if not part.learns:
                for transform in plan.transforms:
                    transform.requires_grad_(False)
            whole.transforms += plan.transforms
            whole.clipping = plan.clipping or whole.clipping
            whole.training = plan.training or whole.training
            whole.rounding = plan.rounding
            whole.notes += plan.notes
            whole.grid = plan.grid or whole.grid
            if plan.transforms and plan.training is None and i + 1 < len(parts):
                rest = parts[i + 1 :]
                view = view.after(plan.transforms, stats=any(p.needs.activation_stats for p in rest))
        return whole

    @classmethod
    def presets(cls) -> dict[str, str]:
        """See `Method`."""
        return {
            f"{part.name}: {scheme}": recipe
            for part in cls.part_classes
            for scheme, recipe in part.presets().items()
        }
