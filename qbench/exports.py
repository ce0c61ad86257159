"""From a row of a results folder to exported folders: find its finished blocks, rebuild the model, write, certify.

`qbench export` and `qbench run --export` both end here: a run exports its rows after they are recorded, from the same
checkpoints, so that an export that fails costs no calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from qbench.config import MethodRequest, RunConfig
from qbench.deploy.certificate import Probe, choose_probe
from qbench.deploy.export import ExportRequest, export
from qbench.deploy.folder import folder_name
from qbench.engine import attention
from qbench.engine.checkpoint import Checkpoint
from qbench.engine.lane import Lane, LaneResult
from qbench.engine.progress import Listener
from qbench.engine.settings import EngineSettings
from qbench.errors import ConfigError, DataError, UnsupportedSchemeError
from qbench.evaluate import model_fingerprint, scored_text
from qbench.methods import METHODS
from qbench.models.loading import LoadedModel, load_model
from qbench.results import Certificate, Result, ResultStore
from qbench.scheme import Scheme

Report = Callable[[str], None]


def select_row(
    store: ResultStore, row: str | None = None, method: str | None = None, scheme: str | None = None
) -> Result:
    """The one quantized row that a selection means.

    Args:
        store: A results folder.
        row: Beginning of a row's id.
        method: Keep rows of this method.
        scheme: Keep rows of this scheme.

    Raises:
        ConfigError: If none or several remain; lists them.
    """
    wanted = None if scheme is None else str(Scheme.parse(scheme))
    every = [r for r in store.load_all() if not r.is_baseline]
    found = [
        r
        for r in every
        if (row is None or r.id.startswith(row))
        and (method is None or r.method == method)
        and (wanted is None or r.scheme == wanted)
    ]
    if len(found) == 1:
        return found[0]
    if not every:
        raise ConfigError(
            f"{str(store.folder)!r} holds no quantized row. Give the output folder of a `qbench run`."
        )
    listed = "; ".join(f"--row {r.id[:12]} ({r.method} {r.scheme})" for r in (found or every))
    what = "Several rows match" if found else "No quantized row matches"
    raise ConfigError(f"{what} in {str(store.folder)!r}. Choose one: {listed}.")


def export_row(
    results: str | Path,
    row: Result,
    requests: Sequence[ExportRequest],
    loaded: LoadedModel | None = None,
    report: Report | None = None,
    checkpoints: str | Path | None = None,
) -> Result:
    """Export one row in one or more formats and keep the certificates in its record.

    Args:
        results: The folder that holds the row, and its checkpoint.
        row: A quantized row.
        requests: Formats, places, runtimes.
        loaded: Its full-precision model, if it is in memory; left unchanged.
        report: Told one sentence per export.
        checkpoints: Folder with `checkpoints/` in it, if it is not `results`: what the run resumed from.

    Returns:
        The row with its certificates, as stored.

    Raises:
        ConfigError: If the row's blocks or its model are not what they were.
        UnsupportedSchemeError: If a format cannot hold the row.
    """
    store = ResultStore(results)
    config = RunConfig.model_validate(row.config)
    scheme = Scheme.parse(row.scheme)
    finished = _finished(Path(checkpoints or results), row, scheme)
    if loaded is None:
        loaded = _load(config, row)
    if len(finished) != len(loaded.blocks):
        raise ConfigError(
            f"The checkpoint of {row.method} {row.scheme} holds {len(finished)} of {len(loaded.blocks)} blocks. "
            "Finish the run first: the same `qbench run` continues it."
        )
    if row.codes is not None and finished.codes != row.codes:
        raise DataError(
            f"The checkpoint {row.checkpoint} holds other integers than the row {row.id[:12]} was measured with. "
            "Run it again."
        )
    loaded.model.set_attn_implementation(attention.register())
    settings = _settings(row)
    probe = _probe(row, config, loaded)
    baseline = next(
        (r for r in store.load_all() if r.is_baseline and r.model_fingerprint == row.model_fingerprint
         and r.contract_fields.get("evaluation") == row.contract_fields.get("evaluation")),
        None,
    )  # fmt: skip
    for request in requests:
        certificate = export(
            loaded,
            finished,
            settings,
            row,
            baseline,
            label_of(row.method),
            request,
            probe,
            _recipe(config, row),
        )
        row = _with_certificate(row, certificate)
        store.save(row)
        if report is not None:
            report(f"{request.folder / certificate.folder} ({certificate.format}): {certificate.sentence()}")
    return row


def label_of(method: str) -> str:
    """A method as folder names have it: `affinequant+gptq` is AffineQuant-GPTQ."""
    return "-".join(METHODS.load(part).__name__ for part in method.split("+"))


def _finished(results: Path, row: Result, scheme: Scheme) -> LaneResult:
    """The row's blocks as its checkpoint has them."""
    folder = results / "checkpoints" / (row.checkpoint or "")
    if row.checkpoint is None or not (folder / "manifest.json").exists():
        raise ConfigError(
            f"{str(results)!r} has no checkpoint of {row.method} {row.scheme}: without its finished blocks there is "
            "nothing to export. Run it again with the same options."
        )
    checkpoint = Checkpoint.existing(folder)
    result = LaneResult(Lane(f"{row.method} {scheme}", _NoPlan(), scheme, checkpoint))
    for i in range(len(checkpoint)):
        result.add(i, checkpoint.load(i), fresh=False)
    return result


class _NoPlan:
    """Stands where a lane has its method: nothing is planned any more."""

    needs: Any = None

    def plan(self, view: Any) -> Any:
        raise AssertionError("finished blocks are not planned again")


def _load(config: RunConfig, row: Result) -> LoadedModel:
    loaded = load_model(
        config.model,
        config.revision,
        dtype=row.contract_fields.get("model_dtype", "float32"),
        trust_remote_code=config.trust_remote_code,
    )
    if model_fingerprint(loaded.model, loaded.location) != row.model_fingerprint:
        raise DataError(
            f"Model {config.model!r} is not the one that the row was made from: its content differs."
        )
    return loaded


def _settings(row: Result) -> EngineSettings:
    """What the row's run-time operands were quantized by, read off its contract."""
    operands = row.contract_fields.get("operands", {})
    granularity: Literal["per_head", "per_token"] = (
        "per_token" if "per_token" in operands.get("attention", "") else "per_head"
    )
    return EngineSettings(
        device=torch.device("cpu"),
        zero_in_range=operands.get("zero_in_range", True),
        attention_granularity=granularity,
    )


def _probe(row: Result, config: RunConfig, loaded: LoadedModel) -> Probe:
    """The beginning of the text that the row was evaluated on first."""
    calibration = row.contract_fields.get("calibration", {})
    spec = config.evals.datasets[0]
    if spec == "auto":
        chosen = config.calibration.dataset
        spec = chosen if chosen != "auto" else str(calibration.get("dataset", "stdlib"))
    length = min(512, loaded.max_seq_len)
    text = scored_text(spec, loaded.tokenizer, length)
    return choose_probe(text.windows.ids, text.name, loaded.model.config.vocab_size)


def _recipe(config: RunConfig, row: Result) -> str:
    """The run's configuration with this row's method and scheme alone, every option spelled out."""
    alone = config.model_copy(
        update={
            "methods": [MethodRequest(name=row.method, options=row.options)],
            "schemes": [row.scheme],
            "resume": None,
            "restart": False,
        }
    )
    return alone.to_yaml()


def _with_certificate(row: Result, certificate: Certificate) -> Result:
    """The row with a new certificate instead of an earlier one of the same format, and its sentence in the notes."""
    begins = f"exported as {certificate.format}: "
    kept = [c for c in row.certificates if c.format != certificate.format]
    notes = [note for note in row.notes if not note.startswith(begins)]
    return row.model_copy(
        update={
            "certificates": [*kept, certificate],
            "notes": [*notes, begins + certificate.sentence(), *certificate.notes],
        }
    )


def require_distinct(config: RunConfig, wanted: Sequence[Any]) -> None:
    """Refuse a request whose rows would be exported to one and the same folder.

    Raises:
        ConfigError: Names the folder.
    """
    if not config.export and config.save_dir is None:
        return
    names = [folder_name(config.model, label_of(w.request.name), Scheme.parse(w.scheme)) for w in wanted]
    twice = sorted({name for name in names if names.count(name) > 1}) or (
        names[:1] if config.seeds > 1 else []
    )
    if twice:
        raise ConfigError(
            f"Several rows would be exported to {twice[0]}. Leave --export and --save-dir out, and export one row with "
            "`qbench export RUN --row ID` afterwards."
        )


def export_all(
    config: RunConfig, rows: Sequence[Result], loaded: LoadedModel, listener: Listener
) -> list[Result]:
    """Export every quantized row of a run as its configuration asks; `save_dir` alone asks for plain folders.

    Raises:
        UnsupportedSchemeError: If a format cannot hold a row; with `save_dir` alone its notes say so instead.
    """
    names = config.export or (["fake"] if config.save_dir is not None else [])
    if not names:
        return list(rows)
    parent = Path(config.save_dir or Path(config.output) / "exports")
    requests = [ExportRequest(name, parent / name if config.export else parent) for name in names]
    finished = []
    for row in rows:
        if not row.is_baseline:
            listener.stage("export", f"{row.method} {row.scheme}")
            try:
                row = export_row(
                    config.output,
                    row,
                    requests,
                    loaded,
                    listener.note,
                    checkpoints=config.resume or config.output,
                )
            except UnsupportedSchemeError as error:
                if config.export:
                    raise
                row = row.model_copy(update={"notes": [*row.notes, f"not saved: {error}"]})
                ResultStore(config.output).save(row)
        finished.append(row)
    return finished
