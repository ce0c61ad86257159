"""Verdicts: is a published number reproduced, off by how much, or not comparable, and why.

The full-precision row decides first. If our full-precision model does not score what the paper says of its own, then
text, tokenizer or protocol differ, and nothing can be said about a method. The same row tells which variant a table
means where it does not say (C4 or C4-new, acc or acc_norm): the one whose full-precision value is the published one.

Then the difference is held against what two runs of the same recipe differ by. With several calibration seeds of ours
that is measured: one further run lies within t · s · sqrt(1 + 1/n) of their mean (a prediction interval). With one it
is taken from what users of the authors' own code reported when they ran it again: 6.10 for a published 6.03 (OmniQuant
issue 95, LLaMA-2-7B W3A16g128, 1.1%) and 11.58 for 11.26 (issue 60, LLaMA-7B W4A4, 2.9%). Rounding of the printed
number and of half-precision losses (0.1%) is added in squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qbench.errors import ConfigError
from qbench.reports.published import AVERAGE, FULL_PRECISION, Published, full_precision
from qbench.reports.recipes import TASKS
from qbench.results import Metric, Result

Status = Literal["reproduced", "off", "not comparable"]
EVALUATION = 0.001  # relative: the authors' losses are rounded to half precision, window by window
RERUN = {True: 0.011, False: 0.029}  # relative, by "weight-only": see above
SAME_MODEL = 0.005  # relative difference of full precision up to which text and tokenizer are the same
SAME_QUESTIONS = 0.006  # of accuracies: six questions in a thousand answered otherwise by another kernel


@dataclass(frozen=True)
class Verdict:
    """What became of one published cell.

    Attributes:
        value: Ours in the table's unit, the mean over seeds; None where it could not be computed.
        relative: value / published - 1, with its 95% interval.
        full_precision: Ours and the published one, where both are there.
        variant: Which of our metrics it is compared with.
        reason: Why it is not comparable, or what the noise is.
    """

    cell: Published
    status: Status
    value: float | None = None
    relative: float | None = None
    low: float | None = None
    high: float | None = None
    full_precision: tuple[float, float] | None = None
    variant: str = ""
    reason: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """The verdict in a few words."""
        if self.status == "reproduced":
            return "reproduced within noise"
        if (
            self.status == "off"
            and self.relative is not None
            and self.low is not None
            and self.high is not None
        ):
            return f"off by {self.relative:+.1%} [{self.low:+.1%}, {self.high:+.1%}]"
        return f"not comparable: {self.reason}"


def judge(
    cell: Published,
    rows: Sequence[Result],
    baseline: Result | None,
    blockers: Sequence[str] = (),
    remarks: Sequence[str] = (),
    stand_in: str | None = None,
) -> Verdict:
    """Hold our measurement against a published cell.

    Args:
        cell: What was published.
        rows: Our rows of its recipe, one per calibration seed; the full-precision row for a full-precision cell.
        baseline: Our full-precision row.
        blockers: Reasons for which the two cannot be compared at all, such as another model in its place. Everything
            is computed all the same.
        remarks: What the source leaves open; passed on.
        stand_in: Folder that was taken for the model. Full precision tells whether it holds the model's weights.
    """
    reference = cell if cell.method == FULL_PRECISION else full_precision(cell)
    variant, own_reference = _variant(cell, reference, baseline)
    if math.isnan(cell.value):
        blockers = [*blockers, "the table has no number here: the method broke down"]
    values = [value for row in rows if (value := _value(row.metrics, variant)) is not None]
    pair = None if reference is None or own_reference is None else (own_reference, reference.value)
    if not values:
        reason = "; ".join(blockers) or f"no row has {cell.dataset} {cell.metric}"
        return Verdict(cell, "not comparable", full_precision=pair, reason=reason, remarks=tuple(remarks))
    value = _mean(values, cell)
    if not math.isfinite(value):
        relative, low, high, noise = math.inf, math.inf, math.inf, "the model collapsed"
    else:
        relative = value / cell.value - 1
        half, noise = _noise(cell, values, rows, variant)
        low, high = (
            ((1 + relative) * math.exp(-half) - 1, (1 + relative) * math.exp(half) - 1)
            if cell.metric == "ppl"
            else (relative - half, relative + half)
        )
    differs = _why_not(cell, reference, own_reference)
    if stand_in is not None and differs:
        differs = [f"{stand_in} is a stand-in for {cell.hub_name}"]
    if cell.method == FULL_PRECISION and stand_in is None:
        differs = []  # that it differs is the verdict itself
    why = [*differs, *blockers]
    status: Status = "not comparable" if why else "reproduced" if low <= 0 <= high else "off"
    return Verdict(
        cell, status, value, relative, low, high, pair, variant, "; ".join(why) or noise, tuple(remarks)
    )


def _variant(
    cell: Published, reference: Published | None, baseline: Result | None
) -> tuple[str, float | None]:
    """The metric that the cell means, and our full-precision value on it: the nearest to the published one."""
    candidates = _candidates(cell)
    own = {
        name: value
        for name in candidates
        if baseline is not None and (value := _value(baseline.metrics, name)) is not None
    }
    if not own:
        return candidates[0], None
    if reference is None:
        return next(iter(own.items()))
    wanted = reference.value
    return min(own.items(), key=lambda item: abs(item[1] - wanted))


def _candidates(cell: Published) -> list[str]:
    if cell.metric == "ppl":
        names = ["c4", "c4_new"] if cell.dataset == "c4" else [cell.dataset]
        return [f"{name}/perplexity" for name in names]
    if cell.metric == "acc":
        return [f"{cell.dataset}/acc", f"{cell.dataset}/acc_norm"]
    raise ConfigError(f"Published cells have the metrics ppl and acc, not {cell.metric!r}.")


def _value(metrics: Mapping[str, Metric], key: str) -> float | None:
    """Our value in the table's unit: accuracies in percent, their average over the six tasks."""
    dataset, _, name = key.rpartition("/")
    if dataset == AVERAGE:
        parts = [metrics.get(f"{task}/{name}") or metrics.get(f"{task}/acc") for task in TASKS]
        there = [part.value for part in parts if part is not None]
        return 100 * math.fsum(there) / len(TASKS) if len(there) == len(TASKS) else None
    metric = metrics.get(key)
    return None if metric is None else metric.value if name == "perplexity" else 100 * metric.value


def _mean(values: Sequence[float], cell: Published) -> float:
    """Over seeds; of perplexities the geometric mean, that of their losses."""
    if cell.metric == "ppl" and all(value > 0 and math.isfinite(value) for value in values):
        return math.exp(math.fsum(map(math.log, values)) / len(values))
    return math.fsum(values) / len(values)


def _why_not(cell: Published, reference: Published | None, own: float | None) -> list[str]:
    """What full precision says against a comparison."""
    if reference is None:
        return ["no full-precision value was published, so text and tokenizer cannot be checked"]
    if own is None:
        return ["full precision was not measured, so text and tokenizer cannot be checked"]
    off = own / reference.value - 1
    near = SAME_MODEL if cell.metric == "ppl" else 100 * SAME_QUESTIONS / reference.value
    if abs(off) <= near + reference.rounding / reference.value:
        return []
    return [
        f"full precision already differs, {own:.4g} for a published {reference.printed} ({off:+.1%}): "
        "another text, tokenizer or protocol"
    ]


def _noise(
    cell: Published, values: Sequence[float], rows: Sequence[Result], variant: str
) -> tuple[float, str]:
    """Half width of the relative difference's 95% interval, and what it is made of."""
    parts = [cell.rounding / cell.value]
    if cell.metric == "ppl":
        parts.append(EVALUATION)
    said = "noise: rounding"
    if cell.method in (FULL_PRECISION, "RTN"):
        if cell.metric == "acc":
            parts.append(100 * SAME_QUESTIONS / cell.value)
    elif len(values) > 1:
        parts.append(_prediction(values, cell))
        said += f", and the spread of {len(values)} calibration seeds"
    elif cell.metric == "ppl":
        rerun = RERUN[cell.scheme.partition("A")[2].startswith("16")]
        parts.append(rerun)
        said += f", and {rerun:.1%} by which reruns of the authors' code differ; give --seeds to measure it"
    else:
        metric = rows[0].metrics.get(variant)
        n = metric.n if metric is not None else sum(rows[0].metrics[f"{t}/acc"].n for t in TASKS)
        share = values[0] / 100
        parts.append(1.96 * math.sqrt(max(share * (1 - share), 0.0) / n) * 100 / cell.value)
        said += ", and the questions' own sampling; give --seeds to measure that of runs"
    return math.sqrt(math.fsum(part**2 for part in parts)), said


def _prediction(values: Sequence[float], cell: Published) -> float:
    """Half width of the interval in which one further run lies, relative."""
    from scipy import special

    logs = [math.log(value) if cell.metric == "ppl" else value / cell.value for value in values]
    mean = math.fsum(logs) / len(logs)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in logs) / (len(logs) - 1))
    return float(special.stdtrit(len(logs) - 1, 0.975)) * spread * math.sqrt(1 + 1 / len(logs))
