"""Ablation: what each switch of a method contributes, and what it costs, measured in one sweep.

The switches are read off the method's own option model, so a new method has an ablation without a line here: every
yes/no option, every option with named choices, and every number whose field declares `alternatives`. Three designs:

* leave-one-out: the method as its presets have it, then once per switch with that switch alone changed;
* one-at-a-time: with every yes/no switch that is on turned off, then each turned on alone; one whose field declares
  that it `acts_with` another (a form of the transformation, with the transformation) is turned on beside that one, and
  compared with that one alone;
* factorial: a two-level fractional factorial, columns of a Hadamard matrix and the same once more with all signs turned
  (foldover). Main effects are then free of each other and of all two-switch interactions (resolution IV; Box & Hunter,
  Technometrics 3, 1961, 311-351); the number of runs is twice the next power of two above the number of switches.

An effect is the mean difference of the windows' losses in nats, paired window by window and seed by seed, with its 95%
interval, which with several seeds counts their spread (`reports.stats`); Holm's correction over the switches decides
what is said of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from qbench.cells import Cell
from qbench.config import MethodRequest, RunConfig
from qbench.errors import ConfigError, NumericalError, unknown_name
from qbench.reports import plot
from qbench.reports.stats import LEVEL, Interval, Scores, holm, interval_of
from qbench.results import Result

Design = Literal["leave-one-out", "one-at-a-time", "factorial"]
REFERENCE = "reference"


@dataclass(frozen=True)
class Switch:
    """One option with the value it has and the one it is changed to.

    Attributes:
        component: A yes/no option, which can be taken out and put in; others have two equally good values.
        acts_with: The yes/no option without which this one has nothing to do.
    """

    option: str
    value: Any
    other: Any
    component: bool
    acts_with: str | None = None

    @property
    def name(self) -> str:
        """As tables call it: the option and the value it is changed to."""
        return f"{self.option}={_written(self.other)}"


@dataclass(frozen=True)
class Variant:
    """One run of an ablation: which switches are set to their other value.

    Attributes:
        n_samples: Calibration windows, where their number is what is changed.
        against: Name of the run that it is compared with.
    """

    name: str
    options: Mapping[str, Any]
    changed: tuple[str, ...]
    n_samples: int | None = None
    against: str = REFERENCE


@dataclass(frozen=True)
class Effect:
    """What one switch does.

    Attributes:
        nats: Mean loss with the change minus without; below zero the change helps.
        verdict: `helps`, `hurts`, `undecided`, or `nothing changes` where all integers are equal.
        seed_std: Of the effect from calibration seed to seed; None with one seed.
        seconds: Time of quantization with the change minus without; likewise bits and memory.
        row: Id of the changed row; None for a factorial, which has many.
    """

    switch: str
    perplexity: float | None
    nats: float
    half_width: float | None
    p_adjusted: float | None
    verdict: str
    seed_std: float | None
    seconds: float
    bits_per_weight: float
    peak_bytes: float
    row: str | None = None


@dataclass(frozen=True)
class Ablation:
    """All effects at one scheme.

    Attributes:
        base: What the reference is, in words.
        perplexity: Of the reference.
        failed: Variants that broke down, with their error.
    """

    method: str
    scheme: str
    design: str
    metric: str
    base: str
    perplexity: float
    seconds: float
    n_windows: int
    seeds: list[int]
    effects: list[Effect]
    failed: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def as_svg(ablation: Ablation) -> str:
    """The effects with their intervals as a plot, worst change on top; what has no interval is left out.

    Empty where nothing is left.
    """

    def percent(nats: float) -> float:
        return 100 * math.expm1(min(nats, 50))

    bars = [
        plot.Effect(e.switch, percent(e.nats), percent(e.nats - half), percent(e.nats + half))
        for e in sorted(ablation.effects, key=lambda e: -e.nats)
        if (half := e.half_width) is not None and math.isfinite(half) and math.isfinite(e.nats)
    ]
    title = f"change of {ablation.metric.replace('/', ' ')}, %"
    return plot.standalone(plot.effects(bars, title)) if bars else ""


def switches(method: BaseModel, only: Sequence[str] = ()) -> list[Switch]:
    """The switches of a method, its presets resolved, in the order of its fields.

    Args:
        method: With the values that the reference has.
        only: Names of options; all if empty.

    Raises:
        ConfigError: If an option is unknown or is no switch.
    """
    found: list[Switch] = []
    fields = type(method).model_fields
    for name, info in fields.items():
        value = getattr(method, name)
        kinds = [k for k in _alternatives(info.annotation) if k is not type(None)]
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        declared, acts_with = extra.get("alternatives"), extra.get("acts_with")
        if kinds == [bool]:
            beside = str(acts_with) if acts_with is not None else None
            found.append(Switch(name, value, not value, component=True, acts_with=beside))
        elif declared is not None:
            assert isinstance(declared, list)
            found += [Switch(name, value, other, component=False) for other in declared if other != value]
        elif kinds and get_origin(kinds[0]) is Literal:
            found += [
                Switch(name, value, other, component=False) for other in get_args(kinds[0]) if other != value
            ]
    for name in only:
        if name not in fields:
            raise unknown_name("switch", name, {switch.option for switch in found})
        if not any(switch.option == name for switch in found):
            raise ConfigError(
                f"Option {name} is no switch: neither yes/no nor one with named choices, and its field declares no "
                f"alternatives. Switches: {', '.join(dict.fromkeys(s.option for s in found))}."
            )
    return [switch for switch in found if not only or switch.option in only]


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    import types

    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def variants(found: Sequence[Switch], design: Design, samples: Sequence[int] = ()) -> list[Variant]:
    """The runs of a design, the reference first.

    Args:
        found: The switches.
        design: Which combinations of them.
        samples: Of leave-one-out: numbers of calibration windows to try as well.

    Raises:
        ConfigError: If there is nothing to change.
    """
    if samples and design != "leave-one-out":
        raise ConfigError(f"--samples is for leave-one-out; {design} changes the method's own options only.")
    if not found and not samples:
        raise ConfigError(
            "There is nothing to ablate: this method has no switch, that is no yes/no option, none with named choices "
            "and no number with declared alternatives. See its options with `qbench methods NAME`."
        )
    if design == "leave-one-out":
        return [
            Variant(REFERENCE, {}, ()),
            *(Variant(s.name, {s.option: s.other}, (s.name,)) for s in found),
            *(Variant(f"n_samples={n}", {}, (f"n_samples={n}",), n) for n in samples),
        ]
    if design == "one-at-a-time":
        parts = [switch for switch in found if switch.component and switch.value is True]
        if not parts:
            raise ConfigError("No yes/no switch of this method is on: one-at-a-time has nothing to turn on.")
        off = {switch.option: False for switch in parts}
        made = [Variant(REFERENCE, off, ())]
        acts_with = {switch.option: switch.acts_with for switch in parts}
        for s in parts:
            beside: list[str] = []  # the nearest first
            while (other := acts_with[beside[-1] if beside else s.option]) in off:
                beside.append(str(other))
            against, name = f"{beside[0]}=true" if beside else REFERENCE, f"{s.option}=true"
            made.append(
                Variant(name, off | dict.fromkeys([s.option, *beside], True), (name,), against=against)
            )
        return made
    two_level = list({switch.option: switch for switch in reversed(found)}.values())[::-1]
    made = []
    for i, row in enumerate(foldover(len(two_level))):
        changed = [switch for switch, sign in zip(two_level, row, strict=True) if sign < 0]
        name = REFERENCE if not changed else f"run {i}"
        made.append(Variant(name, {s.option: s.other for s in changed}, tuple(s.name for s in changed)))
    return sorted(made, key=lambda variant: variant.name != REFERENCE)


def foldover(n: int) -> list[list[int]]:
    """Signs of a two-level design of resolution IV for n switches: a row per run, its first all +1."""
    from scipy.linalg import hadamard

    size = 1 << n.bit_length() if n & (n + 1) else n + 1  # the smallest power of two above n
    columns = hadamard(size)[:, 1 : n + 1]
    return [[int(x) for x in row] for row in [*columns, *(-columns)]]


def cells(
    config: RunConfig, request: MethodRequest, scheme: str, runs: Sequence[Variant], seeds: Sequence[int]
) -> dict[tuple[str, int], Cell]:
    """A cell for every variant and seed."""
    made = {}
    for variant in runs:
        options = {**request.options, **variant.options}
        alone = config.alone(MethodRequest(name=request.name, options=options), scheme)
        if variant.n_samples is not None:
            section = alone.calibration.model_copy(update={"n_samples": variant.n_samples})
            alone = alone.model_copy(update={"calibration": section})
        for seed in seeds:
            label = f"{request.name} {scheme} {variant.name}" + (f" seed={seed}" if len(seeds) > 1 else "")
            made[variant.name, seed] = Cell(label, alone.at_seed(seed))
    return made


def analyse(
    method: str,
    scheme: str,
    design: Design,
    found: Sequence[Switch],
    runs: Sequence[Variant],
    rows: Mapping[tuple[str, int], Result],
    seeds: Sequence[int],
    failed: Mapping[str, str] | None = None,
) -> Ablation:
    """Effects from finished rows.

    Args:
        method: Its name.
        scheme: Its scheme.
        design: How the runs were chosen.
        found: The switches.
        runs: The variants, the reference first.
        rows: Variant and seed to row; a variant that broke down is missing.
        seeds: Calibration seeds.
        failed: Variant to error.

    Raises:
        NumericalError: If the reference broke down, or a run of a factorial, which needs all of them.
    """
    lost = {variant.name for variant in runs if any((variant.name, seed) not in rows for seed in seeds)}
    if REFERENCE in lost or (design == "factorial" and lost):
        raise NumericalError(
            f"{method} {scheme}: {', '.join(sorted(lost))} broke down, and the effects cannot be told without. "
            + " ".join((failed or {}).values())
        )
    reference = [rows[REFERENCE, seed] for seed in seeds]
    metric = next(key for key, m in reference[0].metrics.items() if m.items)
    contrasts: list[tuple[str, list[tuple[list[Result], list[Result]]]]] = []
    changed = dict.fromkeys(name for variant in runs for name in variant.changed)
    order = [switch.name for switch in found if switch.name in changed]
    against = {name: run.against for run in runs for name in run.changed}
    for name in dict.fromkeys([*order, *changed]):
        if design == "factorial":
            pairs = [
                (
                    [rows[v.name, seed] for v in runs if name in v.changed],
                    [rows[v.name, seed] for v in runs if name not in v.changed],
                )
                for seed in seeds
            ]
        elif name in lost or against[name] in lost:
            continue
        else:
            pairs = [([rows[name, seed]], [rows[against[name], seed]]) for seed in seeds]
        contrasts.append((name, pairs))
    intervals = [_interval(pairs, metric, seeds) for _, pairs in contrasts]
    adjusted = holm([1.0 if i is None else i.p_value for i in intervals])
    effects = [
        _effect(name, pairs, metric, interval, p, design)
        for (name, pairs), interval, p in zip(contrasts, intervals, adjusted, strict=True)
    ]
    base = {
        "leave-one-out": "the method with its presets",
        "one-at-a-time": "every yes/no switch off: "
        + ", ".join(runs[0].options)
        + "".join(
            f"; for {', '.join(sorted(n for n, a in against.items() if a == other))}: {other}"
            for other in dict.fromkeys(against.values())
            if other != REFERENCE
        ),
        "factorial": f"the method with its presets; an effect is the mean of the {len(runs) // 2} runs with the "
        f"change minus that of the {len(runs) // 2} without",
    }[design]
    return Ablation(
        method, scheme, design, metric, base,
        perplexity=math.fsum(row.metrics[metric].value for row in reference) / len(reference),
        seconds=math.fsum(row.cost.seconds for row in reference) / len(reference),
        n_windows=reference[0].metrics[metric].n,
        seeds=list(seeds), effects=effects, failed={k: v for k, v in (failed or {}).items()},
    )  # fmt: skip


Pairs = Sequence[tuple[list[Result], list[Result]]]


def _mean_items(rows: Sequence[Result], metric: str) -> list[float]:
    columns = zip(*(row.metrics[metric].items or [] for row in rows), strict=True)
    return [math.fsum(column) / len(rows) for column in columns]


def _differences(pair: tuple[list[Result], list[Result]], metric: str) -> list[float]:
    return [a - b for a, b in zip(_mean_items(pair[0], metric), _mean_items(pair[1], metric), strict=True)]


def _interval(pairs: Pairs, metric: str, seeds: Sequence[int]) -> Interval | None:
    """Of the mean difference over windows and seeds."""
    by_seed = tuple(_differences(pair, metric) for pair in pairs)
    return interval_of(Scores((by_seed,), seeds=tuple(seeds)))


def _effect(
    name: str, pairs: Pairs, metric: str, interval: Interval | None, p: float, design: Design
) -> Effect:
    by_seed = [math.fsum(d) / len(d) for d in (_differences(pair, metric) for pair in pairs)]
    nats = math.fsum(by_seed) / len(by_seed)
    changed = [row for pair in pairs for row in pair[0]]
    same = design != "factorial" and all(
        a.codes is not None and a.codes == b.codes
        for left, right in pairs
        for a, b in zip(left, right, strict=True)
    )
    sure = interval is not None and p < 1 - LEVEL
    spread = (
        math.sqrt(math.fsum((x - nats) ** 2 for x in by_seed) / (len(by_seed) - 1))
        if len(by_seed) > 1
        else None
    )

    def gap(value: Any) -> float:
        sides = [[value(row) for pair in pairs for row in pair[side]] for side in (0, 1)]
        return math.fsum(sides[0]) / len(sides[0]) - math.fsum(sides[1]) / len(sides[1])

    return Effect(
        switch=name,
        perplexity=None
        if design == "factorial"
        else math.fsum(row.metrics[metric].value for row in changed) / len(changed),
        nats=nats,
        half_width=None if interval is None else interval.half_width,
        p_adjusted=p,
        verdict="nothing changes" if same else "undecided" if not sure else "helps" if nats < 0 else "hurts",
        seed_std=spread,
        seconds=gap(lambda row: row.cost.seconds),
        bits_per_weight=gap(lambda row: row.bits_per_weight or 0.0),
        peak_bytes=gap(lambda row: float(row.cost.peak_gpu_bytes or 0)),
        row=None if design == "factorial" else changed[0].id,
    )
