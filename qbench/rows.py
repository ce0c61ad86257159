"""One row of a pass: its method with every preset resolved, what identifies it, its measurement, its record.

The full-precision row is made here too. What a row shares with the others of its pass is in `circumstances`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qbench import provenance
from qbench.circumstances import Circumstances
from qbench.config import PLACES, MethodRequest, RunConfig
from qbench.engine.install import quantized
from qbench.engine.lane import Lane, LaneResult
from qbench.errors import UnsupportedSchemeError
from qbench.evals.memory import peak_cpu_bytes, stored_memory
from qbench.evaluate import (
    Progress,
    Scores,
    baseline_cache,
    cache_scores,
    cached_scores,
    reference_folder,
    score,
    write_references,
)
from qbench.methods.base import Method
from qbench.models.loading import LoadedModel
from qbench.results import BASELINE, Cost, Result, recovery
from qbench.scheme import Scheme


@dataclass(frozen=True)
class Wanted:
    """One row that a pass is asked for.

    Attributes:
        label: Unique within the pass; the name of its lane.
    """

    label: str
    request: MethodRequest
    scheme: str


@dataclass(eq=False)
class PassCell:
    """One row on its way: the request, and the method with its presets resolved."""

    label: str
    request: MethodRequest
    method: Method
    scheme: Scheme
    aliases: list[str] = field(default_factory=list)  # other requests that come to the same row

    @property
    def options(self) -> dict[str, Any]:
        """Every option, as the record keeps it."""
        return self.method.model_dump(mode="json")


def resolved_cells(
    wanted: Sequence[Wanted], methods: Sequence[Method], loaded: LoadedModel
) -> list[PassCell]:
    """Resolve presets and refuse what cannot be done, all offences at once."""
    cells, problems = [], []
    for w, method in zip(wanted, methods, strict=True):
        scheme = Scheme.parse(w.scheme)
        resolved = method.resolve(scheme, loaded.spec)
        try:
            resolved.check(scheme, loaded.spec)
        except UnsupportedSchemeError as error:
            problems.append(f"{method.name} at {scheme}: {error}")
        cells.append(PassCell(w.label, w.request, resolved, scheme))
    if problems:
        distinct = {problem.split(": ", 1)[1]: problem for problem in problems}
        raise UnsupportedSchemeError(" ".join(distinct.values()))
    # Two requests can come to the same when their presets are resolved: the first stands for both.
    distinct_cells: dict[str, PassCell] = {}
    for cell in cells:
        first = distinct_cells.setdefault(repr((cell.method.name, cell.scheme, cell.options)), cell)
        if first is not cell:
            first.aliases.append(cell.label)
    return list(distinct_cells.values())


def stored_row(common: Circumstances, cell: PassCell) -> Result | None:
    """The row of an earlier run, if nothing has to be done for it again."""
    config = common.config
    if config.restart or config.save_act_scales is not None:
        return None
    row = common.store.find(_row_id(common, cell.method.name, cell.scheme, cell.options, trained=True))
    return row if row is not None and _same_code(row) else None


def _same_code(row: Result) -> bool:
    """Whether the code that decides the codes is what made this row: after a change, rows are made again."""
    return row.provenance.get("code") == provenance.code_fingerprint()


def baseline_is_known(common: Circumstances) -> bool:
    """Whether the full-precision model need not be evaluated."""
    return not common.config.restart and cached_scores(_baseline_cache(common)) is not None


def baseline(common: Circumstances) -> Result:
    """Row of the full-precision model; its measurements are cached by content."""
    scheme, restart = Scheme(16, 16), common.config.restart
    cache, references = _baseline_cache(common), _references(common)
    loaded, device = common.loaded, common.settings.device
    if references is not None:
        progress = _progress(common, BASELINE)
        write_references(loaded.model, loaded.blocks, common.suite, device, references, progress, restart)
    row = _baseline_row(common)
    if row is not None and not restart and _same_code(row):
        return row
    started = time.perf_counter()
    common.listener.stage("evaluate", BASELINE)
    scores = None if restart else cached_scores(cache)
    if scores is None:
        scores = evaluate(common, BASELINE)
        cache_scores(cache, scores)
    cost = Cost(
        seconds=0.0, peak_cpu_bytes=peak_cpu_bytes(), stages={"evaluate": time.perf_counter() - started}
    )
    request = common.config.model_copy(update={"methods": [], "schemes": [], "seeds": 1})
    return _record(common, request, BASELINE, scheme, {}, scores, 16.0, cost, [], None)


def _baseline_row(common: Circumstances) -> Result | None:
    """The full-precision row, once it is in the store."""
    return common.store.find(_row_id(common, BASELINE, Scheme(16, 16), {}, trained=False))


def _baseline_cache(common: Circumstances) -> Path:
    return baseline_cache(common.store.folder, common.fields, common.settings.device)


def measure(common: Circumstances, lane: Lane, cell: PassCell, result: LaneResult) -> Result:
    """Evaluate one finished lane and record its row."""
    loaded, settings, method = common.loaded, common.settings, cell.method
    common.listener.stage("evaluate", lane.name)
    started = time.perf_counter()
    with quantized(loaded.model, loaded.blocks, loaded.spec, result, settings):
        scores = evaluate(common, lane.name)
    evaluated = time.perf_counter() - started
    said = (
        [] if lane.scheme.is_identity else method.notes(lane.scheme, loaded.spec)
    )  # W16A16 is left untouched
    notes = [*said, *result.notes, *common.notes]
    trained = any(record.losses for record in result.records)
    if trained and (settings.device.type == "cuda" or settings.autocast is not None):
        notes.append(f"blocks fitted with {settings.arithmetic} products")
    extra_bits = sum(t.stored_bits for block in result.transforms for t in block)
    n_weights = loaded.spec.n_weights * len(result)
    cost = Cost(
        seconds=result.seconds,
        peak_gpu_bytes=result.peak_gpu_bytes,
        peak_cpu_bytes=peak_cpu_bytes(),
        stages={"quantize": result.seconds, "evaluate": evaluated},
        evaluation_peak_gpu_bytes=scores.peak_gpu_bytes,
    )
    bits = (result.weight_bits + extra_bits) / n_weights
    request = common.config.alone(cell.request, str(cell.scheme))
    return _record(common, request, method.name, lane.scheme, cell.options, scores, bits, cost, notes, result)


def evaluate(common: Circumstances, label: str) -> Scores:
    """Score the model as it is now."""
    return score(
        common.loaded.model,
        common.loaded.blocks,
        common.suite,
        common.settings.device,
        _progress(common, label),
        None if label == BASELINE else _references(common),
    )


def _progress(common: Circumstances, label: str) -> Progress:
    return lambda what, done, total: common.listener.evaluating(f"{label}, {what}", done, total)


def _references(common: Circumstances) -> Path | None:
    return reference_folder(common.store.folder, common.fields, common.suite, common.settings.device)


def _row_id(
    common: Circumstances, method: str, scheme: Scheme, options: Mapping[str, Any], trained: bool
) -> str:
    """Hash of what a row means."""
    identity = {
        "contract": common.contract,
        "method": method,
        "options": dict(options),
        "scheme": str(scheme),
        # Nothing of the full-precision row depends on these: with several seeds it is still one record.
        "batch_size": common.config.compute.batch_size if trained else None,
        "calibration": provenance.calibration_fingerprint(common.fields) if trained else None,
    }
    return provenance.sha256_json(identity)


def _record(
    common: Circumstances,
    request: RunConfig,
    method: str,
    scheme: Scheme,
    options: Mapping[str, Any],
    scores: Scores,
    bits: float,
    cost: Cost,
    notes: list[str],
    result: LaneResult | None,
) -> Result:
    loaded = common.loaded
    baseline = None if result is None else _baseline_row(common)
    n_linear = loaded.spec.n_weights * len(loaded.blocks)
    memory = stored_memory(
        loaded.model,
        n_linear * bits / 8,
        n_linear,
        cache_bits=scheme.attention_bits[1],
        tokens=loaded.max_seq_len,
        simulated=result is not None,
        **scores.peaks,
    )
    row = Result(
        id=_row_id(common, method, scheme, options, trained=result is not None),
        model=common.config.model,
        model_fingerprint=common.fields["model"],
        revision=common.config.revision,
        method=method,
        scheme=str(scheme),
        options=dict(options),
        metrics=scores.metrics,
        bits_per_weight=bits,
        cost=cost,
        contract=common.contract,
        contract_fields=common.fields,
        notes=list(dict.fromkeys(notes)),
        transforms=result.transforms[0] if result is not None and result.transforms else [],
        blocks=result.records if result is not None else [],
        config=request.model_dump(mode="json", exclude=PLACES),  # where files lie changes no number
        provenance=provenance.environment(),
        calibration={
            **common.fields["calibration"],
            **({"overlap": common.overlap} if result is not None else {}),
        },
        recovery=recovery(scores.metrics, baseline.metrics if baseline else scores.metrics),
        memory=memory,
        generations=scores.generations,
        codes=result.codes if result is not None else None,
        checkpoint=None
        if result is None or result.lane.checkpoint is None
        else result.lane.checkpoint.folder.name,
    )
    common.store.save(row)
    return row
