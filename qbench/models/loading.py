"""Load a causal language model by hub name, local folder or embedded name, and describe it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from qbench.errors import ConfigError, DataError, QbenchError, UnsupportedSchemeError, first_line, suggest
from qbench.models import ARCHITECTURES
from qbench.models.base import Architecture, BlockSpec
from qbench.models.extra_biases import apply_extra_biases
from qbench.models.packed import READABLE, PackedFolder, packed_settings
from qbench.provenance import WEIGHT_FILES

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ("tiny-llama", "tiny-opt")


@dataclass
class LoadedModel:
    """A model on the CPU with its tokenizer and description.

    Attributes:
        name: As asked for.
        model: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        architecture: The description that matched its `model_type`.
        spec: The description read off its first block.
        max_seq_len: Longest sequence it takes.
        location: Folder it was read from, or the hub name.
        packed: Format and bits of a folder of packed integers, whose dequantized weights the model has; else None.
    """

    name: str
    model: Any
    tokenizer: Any
    architecture: Architecture
    spec: BlockSpec
    max_seq_len: int
    location: str
    packed: str | None = None

    @property
    def blocks(self) -> nn.ModuleList:
        """Decoder layers in order."""
        return self.model.get_submodule(self.architecture.blocks)

    @property
    def n_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())


@dataclass
class ScorableModel:
    """Any causal language model that transformers loads, quantized by whomever; enough to measure it.

    Attributes:
        blocks: Decoder layers where the architecture is known, else empty.
        quantization: The configuration's `quantization_config`, None for ordinary weights.
    """

    name: str
    model: Any
    tokenizer: Any
    blocks: nn.ModuleList
    max_seq_len: int
    location: str
    quantization: dict[str, Any] | None


def resolve_location(name: str) -> str:
    """Folder of an embedded model, an existing local folder, or the hub name unchanged.

    Raises:
        ConfigError: If the name looks like a path and nothing is there.
    """
    if name in EMBEDDED:
        return str(ASSETS / name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise DataError(f"Model folder {name} has no config.json: is it a saved transformers model?")
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" not in name
    if looks_local and name not in ("gpt2",):
        raise ConfigError(
            f"No model {name!r}: not a folder here and not an embedded model.{suggest(name, EMBEDDED)} "
            f"Embedded: {', '.join(EMBEDDED)}; otherwise give a folder or a hub name such as facebook/opt-125m."
        )
    return name


def architecture_for(config: Any) -> Architecture:
    """The description of a model type.

    Raises:
        UnsupportedSchemeError: Lists what is supported, or says why this variant is not.
    """
    for key in ARCHITECTURES.names():
        architecture: Architecture = ARCHITECTURES.load(key)
        if config.model_type in architecture.model_types:
            if (reason := architecture.refuse(config)) is not None:
                raise UnsupportedSchemeError(f"{reason}.")
            kinds = sorted(set(getattr(config, "layer_types", None) or ()))
            if len(kinds) > 1:
                raise UnsupportedSchemeError(
                    f"This {config.model_type} model mixes {' and '.join(kinds)} layers; qbench supports one kind "
                    "throughout, since all blocks share the mask that the first one gets."
                )
            return architecture
    raise UnsupportedSchemeError(
        f"Model type {config.model_type!r} is not supported. Supported: {', '.join(ARCHITECTURES.names())}. "
        "Adding one is a description of tens of lines (qbench/models/llama.py)."
    )


def choose_dtype(asked: str, n_parameters: int, on_gpu: bool) -> torch.dtype:
    """Precision a model is loaded and evaluated in: float32 on a CPU and up to 10⁹ parameters, else bfloat16.

    float16 is never chosen by itself: attention logits of some models leave its range.
    """
    if asked != "auto":
        return getattr(torch, asked)
    return torch.bfloat16 if on_gpu and n_parameters > 10**9 else torch.float32


@dataclass(frozen=True)
class _Source:
    """A model that is found and whose weights are not read yet; `arguments` go to each of transformers' readers."""

    name: str
    location: str
    config: Any
    arguments: dict[str, Any]

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.location, **self.arguments)

    def model(
        self, packed: PackedFolder | None, dtype: str, on_gpu: bool, **placement: Any
    ) -> tuple[Any, list[str]]:
        """The model, and the names of weights that it has no place for; `packed` integers dequantized."""
        from transformers import AutoModelForCausalLM

        if packed is not None:
            model, report = packed.load(self.config, choose_dtype(dtype, packed.n_parameters, on_gpu))
        else:
            with _unreported():
                model, report = AutoModelForCausalLM.from_pretrained(
                    self.location, dtype="auto", output_loading_info=True, **placement, **self.arguments
                )
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would go on with random weights in their place
            raise DataError(f"Model {self.name!r} lacks {len(missing)} of its weights (first: {missing[0]}).")
        return model, sorted(report["unexpected_keys"])

    def described(
        self, model: Any, tokenizer: Any, architecture: Architecture, packed: PackedFolder | None = None
    ) -> LoadedModel:
        """The model with what is read off its first block."""
        return LoadedModel(
            name=self.name,
            model=model,
            tokenizer=tokenizer,
            architecture=architecture,
            spec=architecture.block_spec(model.get_submodule(architecture.blocks)[0], self.config),
            max_seq_len=self.config.max_position_embeddings,
            location=self.location,
            packed=None if packed is None else packed.summary,
        )


def _find(name: str, revision: str | None, trust_remote_code: bool) -> _Source:
    """Where a model lies, and its configuration."""
    from transformers import AutoConfig

    location = resolve_location(name)
    arguments = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _readable(name):
        return _Source(name, location, AutoConfig.from_pretrained(location, **arguments), arguments)


def describe_model(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> LoadedModel:
    """A model without its weights, on torch's meta device: enough to check a request, in a second and no memory.

    Raises:
        ConfigError: Unknown name.
        DataError: Unreadable files, or no weights beside them.
        UnsupportedSchemeError: A model type without a description.
    """
    from transformers import AutoModelForCausalLM

    source = _find(name, revision, trust_remote_code)
    with _readable(name):
        architecture = architecture_for(source.config)
        tokenizer = source.tokenizer()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(source.config, trust_remote_code=trust_remote_code)
    folder = Path(source.location)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        raise DataError(
            f"Cannot load model {name!r}: no weights in its folder ({' or '.join(WEIGHT_FILES)})."
        )
    return source.described(model, tokenizer, architecture)


@contextmanager
def _unreported() -> Iterator[None]:
    """Hold back transformers' report of missing and left-over weights: qbench refuses the first, and applies biases."""

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever transformers raises over a model's files into one sentence."""
    try:
        yield
    except QbenchError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise DataError(
            f"Cannot load model {name!r}: {first_line(error)}. Give a folder saved by save_pretrained, or a "
            "hub name that can be reached from here."
        ) from error


def load_model(
    name: str,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    on_gpu: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load model and tokenizer to the CPU; a folder of packed integers (GPTQ, AWQ, compressed-tensors) dequantized.

    Args:
        name: Hub name, folder, `tiny-llama` or `tiny-opt`.
        revision: Branch, tag or commit of a hub model.
        dtype: `auto` or a torch dtype's name, see `choose_dtype`.
        on_gpu: Whether evaluation will run on a GPU.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ConfigError: Unknown name.
        DataError: Unreadable files, weights that are not finite.
        UnsupportedSchemeError: A model type without a description.
    """
    source = _find(name, revision, trust_remote_code)
    with _readable(name):
        architecture = architecture_for(source.config)
        packed = _packed(source.location, revision, source.config)
        model, unexpected = source.model(packed, dtype, on_gpu)
        tokenizer = source.tokenizer()
        applied = apply_extra_biases(model, architecture, unexpected, source.location, revision)
    if left := sorted(set(unexpected) - set(applied)):
        logging.getLogger(__name__).warning(
            "model %s: %d of its weights have no place in it (first: %s)", name, len(left), left[0]
        )
    model = model.eval().requires_grad_(False)
    model = model.to(choose_dtype(dtype, sum(p.numel() for p in model.parameters()), on_gpu))
    _require_finite(model, name)
    return source.described(model, tokenizer, architecture, packed)


def _require_finite(model: nn.Module, name: str) -> None:
    for parameter_name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise DataError(f"Model {name!r} has weights that are not finite (first: {parameter_name}).")


def _quant_method(quantization: Any) -> str | None:
    """Name of a format, from a configuration's mapping or object."""
    found = quantization if isinstance(quantization, dict) else vars(quantization)
    return getattr(found.get("quant_method"), "value", found.get("quant_method"))


def _packed(location: str, revision: str | None, config: Any) -> PackedFolder | None:
    """The folder of packed integers that a name stands for, or None for an ordinary model."""
    if not Path(location).is_dir():
        if getattr(config, "quantization_config", None) is None:
            return None
        from huggingface_hub import snapshot_download

        location = snapshot_download(location, revision=revision, allow_patterns=["*.safetensors", "*.json"])
    return None if packed_settings(location) is None else PackedFolder(location)


def load_as_is(
    name: str,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    device: torch.device,
    trust_remote_code: bool = False,
) -> ScorableModel:
    """Load any causal language model as transformers has it; weights that are quantized stay as they are.

    Integers of GPTQ, AWQ and compressed-tensors are dequantized exactly (`PackedFolder`), which needs none of their
    packages and depends on none of their kernels; other quantized formats run as transformers runs them.

    Args:
        name: Hub name, folder, `tiny-llama` or `tiny-opt`.
        revision: Branch, tag or commit of a hub model.
        dtype: Of ordinary weights, see `choose_dtype`; a quantized checkpoint keeps its own.
        device: Where it will run; quantized weights are loaded there at once, others to the CPU.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ConfigError: Unknown name.
        DataError: Unreadable files, or a package that the format needs is missing.
    """
    source = _find(name, revision, trust_remote_code)
    location, config = source.location, source.config
    on_gpu = device.type == "cuda"
    quantization = getattr(config, "quantization_config", None)
    known = quantization is not None and _quant_method(quantization) in READABLE
    with _readable(name):
        packed = _packed(location, revision, config) if known else None
        placed = {} if quantization is None else {"device_map": {"": device}}
        model, unexpected = source.model(packed, dtype, on_gpu, **placed)
        tokenizer = source.tokenizer()
    if packed is not None:
        quantization = packed.settings
    try:
        architecture = architecture_for(config)
        blocks = model.get_submodule(architecture.blocks)
    except (
        UnsupportedSchemeError
    ):  # only needed for extra biases, and where the model does not fit the device
        architecture, blocks = None, nn.ModuleList()
    if quantization is None and architecture is not None:
        with _readable(name):
            apply_extra_biases(model, architecture, unexpected, location, revision)
    model = model.eval().requires_grad_(False)
    if quantization is None:
        model = model.to(choose_dtype(dtype, sum(p.numel() for p in model.parameters()), on_gpu))
        _require_finite(model, name)
    elif not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
    max_seq_len = next((limit for limit in limits if limit is not None), tokenizer.model_max_length)
    return ScorableModel(name, model, tokenizer, blocks, int(max_seq_len), location, quantization)
