"""Export one finished lane: refuse early, write the folder, read it back everywhere, and certify what it computes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from qbench.deploy.card import model_card
from qbench.deploy.certificate import (
    TOLERANCES,
    Probe,
    Reference,
    check_dequantized,
    check_runtime,
    departure_in_half,
    perplexity,
    reference,
    runtimes_at_hand,
    scheme_in,
)
from qbench.deploy.folder import (
    MAX_SHARD_BYTES,
    RECORD,
    appearing,
    folder_name,
    require_replaceable,
    write_model,
)
from qbench.deploy.formats import FORMATS, Format, attention_note
from qbench.deploy.residue import obstacle, rehearse
from qbench.engine.lane import Lane, LaneResult
from qbench.engine.settings import EngineSettings
from qbench.engine.state import BlockState
from qbench.errors import ConfigError, UnsupportedSchemeError
from qbench.models.loading import LoadedModel
from qbench.quant.uniform import QuantizedWeight
from qbench.results import Certificate, Result
from qbench.scheme import Scheme

CERTIFICATE, RECIPE = "certificate.json", "recipe.yaml"
BOOKKEEPING = ("g_idx", "weight_shape")
PACKED_PARTS = (
    "qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_zero_point", "weight"
)  # fmt: skip


@dataclass(frozen=True)
class ExportRequest:
    """What to write and where to try it.

    Attributes:
        format: Name in `FORMATS`.
        folder: Parent of the folder that is written.
        runtimes: Runtime to Python executable, besides those installed here.
        max_shard_bytes: Of one safetensors file.
        write: False to certify the folder that is there as it is.
    """

    format: str
    folder: Path
    runtimes: Mapping[str, str] = field(default_factory=dict)
    max_shard_bytes: int = MAX_SHARD_BYTES
    write: bool = True


def foresee(
    loaded: LoadedModel, lanes: Sequence[Lane], formats: Sequence[str], zero_in_range: bool
) -> list[str]:
    """Refuse, before calibration, what a format will not be able to hold.

    Returns:
        Sentences on what it will hold and its runtimes compute otherwise than the row.

    Raises:
        ConfigError: An unknown format.
        UnsupportedSchemeError: One sentence per lane and format, with the option to change.
    """
    known = [FORMATS.load(name) for name in formats]
    problems, notes = [], []
    for lane in lanes if known else ():
        state = rehearse(loaded, lane)
        for format_ in known:
            states = [] if state is None else [state]
            if (why := refusal(loaded, format_, lane.scheme, zero_in_range, states)) is not None:
                problems.append(f"{lane.name} cannot be exported as {format_.name}: {why}.")
            elif format_.quantizes_inputs and lane.scheme.attention_bits != (16, 16):
                notes.append(
                    f"{lane.name} as {format_.name}: {attention_note(lane.scheme)}; choose that scheme for a row that "
                    "equals its export"
                )
    if problems:
        raise UnsupportedSchemeError(" ".join(problems))
    return notes


def refusal(
    loaded: LoadedModel, format_: Format, scheme: Scheme, zero_in_range: bool, states: Sequence[BlockState]
) -> str | None:
    """Why a format cannot hold finished blocks (or rehearsed ones), or None."""
    if (why := format_.refuse(scheme, loaded.spec, zero_in_range)) is not None:
        return why
    weights = [w for state in states for w in state.linears.values()]
    if format_.quantization_config(scheme) is not None and any(
        isinstance(w, QuantizedWeight) and w.grid.qmax >= 2**w.grid.bits for w in weights
    ):
        return (
            f"a bit-balanced grid has a level more than {scheme.wbits} bits hold (--no-bit-balance, "
            "or --format fake)"
        )
    return obstacle(loaded, [state.rest for state in states])


def export(
    loaded: LoadedModel,
    result: LaneResult,
    settings: EngineSettings,
    row: Result,
    baseline: Result | None,
    label: str,
    request: ExportRequest,
    probe: Probe,
    recipe: str,
) -> Certificate:
    """Write one lane as a folder and certify it, or certify again the folder that is there.

    Args:
        loaded: The full-precision model with the engine's attention; unchanged.
        result: The lane's finished blocks.
        settings: For the grids of run-time operands.
        row: The lane's record, stored in the folder.
        baseline: The full-precision record, for the card's recovery table.
        label: The method as a folder's name has it: AffineQuant.
        request: Format, place, runtimes.
        probe: Tokens on which the folder is compared.
        recipe: The resolved configuration, as YAML.

    Returns:
        The certificate, also in the folder.

    Raises:
        UnsupportedSchemeError: If the format cannot hold the lane.
        ConfigError: If the place is taken by something else, holds nothing to certify, or a runtime does not exist.
    """
    scheme = result.lane.scheme
    format_: Format = FORMATS.load(request.format)
    states = [result.state(i) for i in range(len(result))]
    if (why := refusal(loaded, format_, scheme, settings.zero_in_range, states)) is not None:
        raise UnsupportedSchemeError(f"{row.method} {scheme} cannot be exported as {format_.name}: {why}.")
    del states
    format_ = format_.settle(scheme, _weights(result))
    tried, left = runtimes_at_hand(format_, request.runtimes)
    target = request.folder / folder_name(loaded.name, label, scheme)
    require_replaceable(target, row.id)
    if not request.write and not (target / RECORD).exists():
        raise ConfigError(f"There is no export {str(target)!r} to certify. Leave --check out to write it.")
    computed = scheme_in(format_, scheme)
    expected = reference(loaded, result, settings, probe, computed)
    rounding = format_.rounding(scheme)
    by_runtimes = (
        expected if rounding is None else reference(loaded, result, settings, probe, computed, rounding)
    )
    with appearing(target) if request.write else nullcontext(target) as draft:
        if request.write:
            write_model(loaded, result, format_, draft, request.max_shard_bytes)
            (draft / RECORD).write_text(row.to_json() + "\n")
            (draft / RECIPE).write_text(recipe)
        checks = [check_dequantized(loaded, result, format_, draft, probe, expected)]
        notes = format_.notes(scheme)
        dtype = "auto" if format_.name in ("gptq", "awq") else "float32"  # kernels of the former want half
        if (
            format_.name != "fake"
            and (why := half_precision_note(draft, probe, expected, format_)) is not None
        ):
            notes.append(why)
            dtype = "float32"
        for name, python in tried.items():
            checks.append(
                check_runtime(name, python, loaded, result, draft, probe, by_runtimes, rounding, dtype)
            )
        certificate = Certificate(
            format=format_.name,
            folder=target.name,
            probe=probe.text,
            tokens=probe.fingerprint,
            reference_perplexity=perplexity(expected.logits, probe.ids),
            row_perplexity=expected.row_perplexity,
            bytes=account(draft, loaded, row.bits_per_weight),
            checks=checks,
            not_tried=left,
            notes=notes,
        )
        (draft / CERTIFICATE).write_text(json.dumps(certificate.model_dump(mode="json"), indent=1) + "\n")
        (draft / "README.md").write_text(model_card(row, baseline, label, certificate, loaded.name))
    return certificate


def half_precision_note(folder: Path, probe: Probe, expected: Reference, format_: Format) -> str | None:
    """A sentence where the model does not bear float16, whoever computes it; None where it does."""
    departure = departure_in_half(folder, probe, expected)
    if departure <= TOLERANCES["float16"].kl:
        return None
    size = f"a KL of {departure:.1e} nats per token" if math.isfinite(departure) else "not even finite logits"
    advice = _WIDENING.get(format_.name, "load it with dtype=torch.float32")
    return f"in float16 this model is not itself ({size} against float32, with the same weights): {advice}"


# GPTQModel's kernel that is right for asymmetric weights on a CPU takes float16 alone on loading; a configuration that
# says float32 would make it choose one that is wrong. So the folder says float16, and the cast comes after.
_WIDENING = {
    "gptq": "load it in float16 (GPTQModel: backend=BACKEND.TORCH) and then call torch.nn.Module.float(model), which "
    "leaves no more than the kernels' weights in half precision",
    "awq": "load it in float16 and then call torch.nn.Module.float(model)",
}


def _weights(result: LaneResult) -> Iterator[QuantizedWeight]:
    for i in range(len(result)):
        yield from (w for w in result.state(i).linears.values() if isinstance(w, QuantizedWeight))


def account(folder: Path, loaded: LoadedModel, bits_per_weight: float | None) -> dict[str, int]:
    """Bytes of a folder's tensors by what they are.

    Args:
        folder: Written.
        loaded: The full-precision model: biases that it has not count with the weights, as in the table.
        bits_per_weight: The table's, from which `expected` follows.
    """
    blocks, spec = loaded.architecture.blocks, loaded.spec
    role_of = {
        f"{blocks}.{i}.{path}": role for i in range(len(loaded.blocks)) for role, path in spec.linears.items()
    }
    sizes = dict.fromkeys(("weights", "bookkeeping", "norms_and_biases", "embeddings_and_head"), 0)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                module, _, part = name.rpartition(".")
                part_of = file.get_slice(name)
                size = math.prod(part_of.get_shape()) * _BYTES[part_of.get_dtype()]
                if module in role_of and part in BOOKKEEPING:
                    sizes["bookkeeping"] += size
                elif module in role_of and (part in PACKED_PARTS or role_of[module] not in spec.biased):
                    sizes["weights"] += size
                elif name.startswith(f"{blocks}."):
                    sizes["norms_and_biases"] += size
                else:
                    sizes["embeddings_and_head"] += size
    sizes["files"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if bits_per_weight is not None:
        sizes["expected"] = round(bits_per_weight * spec.n_weights * len(loaded.blocks) / 8)
    return sizes


_BYTES = {"I8": 1, "U8": 1, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
