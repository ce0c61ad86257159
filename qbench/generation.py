"""Whole models that generate with packed weights: how much of a kernel's gain is left where it is used.

`bench` times linears by themselves, from cold caches and behind a gate. Here one model at a time is on the device, as
transformers runs it: each row makes its own, packs it block by block, generates, and lets go of it. A row that cannot
be made becomes a sentence and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qbench.deploy.backends.layer import Backend, dtype_name
from qbench.deploy.packed import finished, pack, rounded
from qbench.errors import ConfigError, kind_and_first_line
from qbench.evals.generation import Generation, generate
from qbench.latency import Speed
from qbench.models.loading import architecture_for, load_model
from qbench.quant.grid import check_group_size
from qbench.scheme import Scheme

SEED = 0  # of a model with random weights


@dataclass(frozen=True)
class Generating:
    """What whole models are asked to do.

    Attributes:
        batch: Sequences at once.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Steps after the prompt.
        checkpoint: Folder of a finished lane; without one, weights are rounded to nearest on the spot.
    """

    batch: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 64
    checkpoint: str | None = None


def speeds(
    name: str,
    make: Callable[[torch.dtype], Any],
    schemes: Sequence[Scheme],
    backends: Mapping[str, Backend],
    device: str,
    work: Generating,
    done: Sequence[Speed] = (),
) -> Iterable[Speed | str]:
    """Generation with the model as it is, once per type, then packed in every way.

    Args:
        name: For the records.
        make: Gives the dense model of a type, on the device; called anew for each row, which then owns it.
        schemes: Formats.
        backends: Those that work here.
        device: `cpu` or `cuda`.
        work: What is generated.
        done: Rows of an earlier report: not measured again.

    Yields:
        Rows as they are found, or a sentence for a row that could not be made.
    """
    known = {
        (s.model, s.backend, s.scheme, s.dtype, s.batch, s.prompt_tokens, s.new_tokens, s.checkpoint)
        for s in done
    }
    lane = Path(work.checkpoint).name if work.checkpoint is not None else None
    for backend_name, backend in backends.items():
        dtype = backend.dtypes(device)[0]
        for scheme in (None, *schemes):
            row = ("none", "W16A16") if scheme is None else (backend_name, str(scheme))
            of_row = None if scheme is None else lane
            key = (name, *row, dtype_name(dtype), work.batch, work.prompt_tokens, work.new_tokens, of_row)
            if key in known:
                continue
            known.add(key)
            model = None
            try:
                model = make(dtype)
                if scheme is not None:
                    _pack_model(model, scheme, backend, work.checkpoint)
                torch.cuda.empty_cache()
                found = generate(model, work.batch, work.prompt_tokens, work.new_tokens)
                yield _speed(key, found, model)
            except ConfigError as error:
                yield f"{name}, {row[1]} by {row[0]}: {error}"
            except Exception as error:  # other people's kernels: whatever they raise belongs into the report
                yield f"{name}, {row[1]} by {row[0]}: {kind_and_first_line(error)}"
            del model
            torch.cuda.empty_cache()


def _pack_model(model: Any, scheme: Scheme, backend: Backend, checkpoint: str | None) -> None:
    """Replace every block by its packed form, each dense one leaving memory before the next is packed."""
    architecture = architecture_for(model.config)
    blocks = model.get_submodule(architecture.blocks)
    spec = architecture.block_spec(blocks[0], model.config)
    check_group_size(scheme.group_size, {role: width for role, (_, width) in spec.shapes.items()})
    state = finished(checkpoint, len(blocks), scheme) if checkpoint is not None else None
    for i in range(len(blocks)):
        with torch.no_grad():
            found = rounded(blocks[i], spec, scheme) if state is None else state(i)
            blocks[i] = pack(blocks[i], spec, found, backend, scheme)


def _speed(key: tuple, found: Generation, model: Any) -> Speed:
    name, backend, scheme, dtype, batch, prompt_tokens, new_tokens, checkpoint = key
    tensors = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
        if t.numel()
    }
    notes = list(found.notes)
    if backend != "none":
        notes.append("codes of a finished run" if checkpoint else "rounded to nearest")
    return Speed(
        model=name,
        backend=backend,
        scheme=scheme,
        dtype=dtype,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens_per_s=batch * prompt_tokens / found.prefill_s,
        decode_tokens_per_s=batch / found.step_s,
        graphed_tokens_per_s=batch / found.graphed_step_s if found.graphed_step_s else None,
        weight_bytes=sum(tensors.values()),
        peak_bytes=found.peak_bytes,
        checkpoint=checkpoint,
        notes=notes,
    )


def random_model(config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model of a configuration with random weights, made on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def loaded_model(name: str, dtype: torch.dtype, device: str) -> Any:
    """A model's own weights, on the device."""
    return load_model(name, dtype=dtype_name(dtype)).model.to(device)
