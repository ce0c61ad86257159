"""Write a lane as a folder that transformers and other runtimes load: configuration, sharded safetensors, tokenizer.

A folder appears whole or not at all: everything is written beside it under another name and renamed at the end. What
quantization does not touch keeps the narrowest type that holds it exactly (an fp16 checkpoint's embeddings stay fp16),
and what folding computed stays float32, so that the folder is the model that was measured.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qbench.deploy.formats import Format
from qbench.deploy.residue import switches
from qbench.engine.lane import LaneResult
from qbench.errors import ConfigError
from qbench.models.loading import LoadedModel
from qbench.quant.uniform import QuantizedWeight
from qbench.results import require_writable
from qbench.scheme import Scheme

MAX_SHARD_BYTES = 5 * 10**9
RECORD = "qbench.json"  # marks a folder as an export of ours, which may be replaced by a newer one
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def folder_name(model: str, method: str, scheme: Scheme) -> str:
    """`Llama-2-7b-AffineQuant-W4A16-g128`, in the habit of model hubs."""
    written = re.sub(r"(?<=\d)g(?=\d)", "-g", str(scheme))
    return _UNSAFE.sub("-", f"{model.rstrip('/').rpartition('/')[2]}-{method}-{written}")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` when the context ends well, and is gone otherwise.

    Raises:
        ConfigError: If the target exists and is not an export of ours, or cannot be written.
    """
    require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.writing")
    old = draft.with_suffix(".old")
    draft.mkdir()
    try:
        yield draft
        if target.exists():
            os.rename(target, old)
        os.rename(draft, target)
    finally:
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


def require_replaceable(target: Path, row_id: str | None = None) -> None:
    """Refuse to write over anything but an earlier export, and of the same row if one is given.

    Raises:
        ConfigError: Names the folder.
    """
    require_writable(target.parent)
    if row_id is not None and (target / RECORD).exists():
        try:
            held = json.loads((target / RECORD).read_text())["qbench"]["id"]
        except (OSError, ValueError, LookupError, TypeError):
            raise ConfigError(
                f"{str(target / RECORD)!r} is not readable, so whose export this is cannot be told. Remove the folder, "
                "or choose another."
            ) from None
        if held != row_id:
            raise ConfigError(
                f"{str(target)!r} holds the export of another row ({held[:12]}). Choose another folder, or remove it."
            )
    if (
        target.exists()
        and not (target / RECORD).exists()
        and not (target.is_dir() and not any(target.iterdir()))
    ):
        raise ConfigError(
            f"{str(target)!r} exists and is no export of qbench: choose another folder or move it away."
        )


def write_model(
    loaded: LoadedModel,
    result: LaneResult,
    format_: Format,
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write configuration, weights and tokenizer of a finished lane.

    Args:
        loaded: The full-precision model; unchanged.
        result: Its finished blocks, without anything that `residue.obstacle` names.
        format_: Settled on these weights.
        folder: Exists.
        max_shard_bytes: Of one safetensors file.
    """
    states = [result.state(i).rest for i in range(len(result))]
    switched = switches(loaded, states)
    scheme = result.lane.scheme
    settings = format_.quantization_config(scheme)
    (folder / "config.json").write_text(_configuration(loaded, format_, settings, switched))
    if format_.name == "gptq":  # AutoGPTQ does not load without this copy
        (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2))
    if getattr(loaded.model, "generation_config", None) is not None:
        loaded.model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    shards = _Shards(folder, max_shard_bytes)
    # AutoGPTQ leaves both of two tied tensors at zero if one is missing
    for name, tensor in unquantized(loaded, every=format_.name == "gptq").items():
        shards.add(name, _narrowest(tensor, format_).clone())
    for i, tensors in enumerate(states):
        prefix = f"{loaded.architecture.blocks}.{i}"
        for role, linear in result.state(i).linears.items():
            path = f"{prefix}.{loaded.spec.linears[role]}"
            if isinstance(linear, QuantizedWeight):
                for name, tensor in format_.tensors(linear).items():
                    shards.add(f"{path}.{name}", tensor)
            else:
                shards.add(f"{path}.weight", linear.float())
            bias = tensors.bias[role]
            if bias is None and any(role in loaded.architecture.bias_options[s] for s in switched):
                bias = torch.zeros(loaded.spec.shapes[role][0])
            if bias is not None:
                shards.add(f"{path}.bias", _narrowest(bias, format_))
        for norm, path in loaded.spec.norms.items():
            shards.add(f"{prefix}.{path}.weight", _narrowest(tensors.norm_weight[norm], format_))
            if (norm_bias := tensors.norm_bias[norm]) is not None:
                shards.add(f"{prefix}.{path}.bias", _narrowest(norm_bias, format_))
    shards.finish()


def _configuration(
    loaded: LoadedModel, format_: Format, settings: Mapping[str, Any] | None, switched: list[str]
) -> str:
    """config.json, in the words of transformers 5 and of transformers 4."""
    config = copy.deepcopy(loaded.model.config)
    for switch in switched:
        setattr(config, switch, True)
    if format_.dtype is not None:
        config.dtype = format_.dtype
    content = json.loads(config.to_json_string(use_diff=True))
    # transformers 4 takes a missing rope_theta for 10000 without a word, and knows dtype as torch_dtype
    rope = dict(content.get("rope_parameters") or {})
    if "rope_theta" in rope:
        content["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            content["rope_scaling"] = rope
    if "dtype" in content:
        content["torch_dtype"] = content["dtype"]
    if settings is not None:
        content["quantization_config"] = settings
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def unquantized(loaded: LoadedModel, every: bool = False) -> dict[str, Tensor]:
    """Everything outside the blocks' linears and norms; of tied tensors the first, or every one."""
    blocks = loaded.architecture.blocks
    replaced = tuple(
        f"{blocks}.{i}.{path}."
        for i in range(len(loaded.blocks))
        for path in (*loaded.spec.linears.values(), *loaded.spec.norms.values())
    )
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in loaded.model.state_dict().items():
        if name.startswith(replaced) or (tensor.data_ptr() in seen and not every):
            continue
        seen.add(tensor.data_ptr())
        found[name] = tensor
    return found


def _narrowest(tensor: Tensor, format_: Format) -> Tensor:
    """The tensor in the narrowest type that holds it exactly; float32 in a folder of float32 weights."""
    if format_.dtype != "float32":
        for dtype in (torch.float16, torch.bfloat16):
            narrow = tensor.to(dtype)
            if torch.equal(narrow.float(), tensor.float()):
                return narrow.contiguous()
    return tensor.float().contiguous()


class _Shards:
    """Safetensors files of bounded size, named and indexed as transformers expects."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, Tensor] = {}
        self.names: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; writes a file when the next would be too large."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and self._pending_bytes() + size > self.max_bytes:
            self._write()
        self.pending[name] = tensor.detach().cpu().contiguous()
        self.total += size

    def _pending_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.pending.values())

    def _write(self) -> None:
        path = self.folder / f"shard-{len(self.names)}"
        save_file(self.pending, path, {"format": "pt"})
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self.names.append(list(self.pending))
        self.pending = {}

    def finish(self) -> None:
        """Write the rest, then give every file its final name."""
        self._write()
        count = len(self.names)
        if count == 1:
            os.rename(self.folder / "shard-0", self.folder / "model.safetensors")
            return
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, file in enumerate(files):
            os.rename(self.folder / f"shard-{i}", self.folder / file)
        weight_map = {name: file for names, file in zip(self.names, files, strict=True) for name in names}
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
