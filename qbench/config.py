"""RunConfig: everything that a run is asked to do, read from YAML or the command line, checked once, hashed.

Defaults and help texts live here and nowhere else; the command line takes its `--help` from the descriptions.
What is *found out* during a run (a device, a dtype, a window length) is not written back here but into the result.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from qbench.errors import ConfigError, suggest
from qbench.scheme import Scheme

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Name = Annotated[str, Field(min_length=1)]
Model = TypeVar("Model", bound=BaseModel)

# Where a run's files lie and whether it starts over changes no number: these stay out of the hash.
PLACES = {"output", "save_dir", "export", "save_act_scales", "resume", "restart"}


def _canonical(schemes: list[str]) -> list[str]:
    return list(dict.fromkeys(str(Scheme.parse(scheme)) for scheme in schemes))


Schemes = Annotated[list[str], AfterValidator(_canonical)]  # each once, as `Scheme` writes it


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrationConfig(_Section):
    """The token windows that a method may look at."""

    dataset: Name = Field(
        "auto",
        description="Calibration text: a dataset's name, a file or a folder. auto: wikitext2, or for the embedded "
        "models the standard library's text.",
    )
    n_samples: int | None = Field(
        None, ge=1, description="Calibration windows. Default: 128; embedded models 16."
    )
    seq_len: int | None = Field(
        None, ge=2, description="Tokens per window. Default: 2048, or the model's limit if that is smaller."
    )
    seed: int = Field(2, ge=0, description="Seed of the calibration windows and of everything random.")
    act_scales: Name | None = Field(
        None,
        description="Largest inputs per channel from this act_scales file (.pt) instead of those observed.",
    )
    act_shifts: Name | None = Field(
        None, description="Centres per channel from this act_shifts file (.pt) instead of those observed."
    )


class EvalConfig(_Section):
    """What the finished models are measured on."""

    datasets: list[Name] = Field(
        ["auto"],
        min_length=1,
        description="Perplexity on a dataset: NAME, PATH or NAME=PATH; repeatable. auto: the calibration source's "
        "evaluation split; in `qbench eval` wikitext2, or for the embedded models stdlib.",
    )
    seq_len: int | None = Field(
        None,
        ge=2,
        description="Tokens per evaluation window. Default: as for calibration; for embedded models and in `qbench "
        "eval` 2048, or the model's limit if that is smaller.",
    )
    limit: int | None = Field(
        None, ge=1, description="Score only the first windows of each text and items of each task."
    )
    tasks: list[Name] = Field(
        [],
        description="Zero-shot tasks: names of lm-eval's, paper6 (the published six), mmlu, stdlib (needs no files), "
        "or local files as NAME=PATH; repeatable, or joined by commas.",
    )
    limit_items: int | None = Field(
        None, ge=1, description="Score only the first items of each task. Default: as --limit."
    )
    fewshot: int | None = Field(
        None,
        ge=0,
        description="Worked examples in each task's prompts. Default: what the task says, else none.",
    )
    word_perplexity: bool = Field(
        False, description="Also perplexity per word, as lm-eval's wikitext task computes it."
    )
    fidelity: bool = Field(False, description="Also KL divergence from full precision and top-1 agreement.")
    generate: int = Field(
        0, ge=0, description="Also compare greedy continuations of this many tokens with full precision."
    )
    batch_size: int = Field(
        0, ge=0, description="Windows per evaluation pass; 0: about 2k tokens on a CPU, 16k on a GPU."
    )

    @model_validator(mode="after")
    def _of_tasks(self) -> Self:
        for name in ("limit_items", "fewshot"):
            if getattr(self, name) is not None and not self.tasks:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is about tasks: name some with --tasks, or leave it out."
                )
        return self


class ComputeConfig(_Section):
    """Where and in which precision the work runs."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    model_dtype: Dtype = Field("auto", description="Precision in which the model is loaded and evaluated.")
    autocast: Dtype = Field("auto", description="Precision of the products while blocks are fitted.")
    batch_size: int = Field(1, ge=1, description="Samples per optimizer step.")
    micro_batch: int | None = Field(
        None, ge=1, description="Samples per forward pass within a step. Default: all of the step."
    )
    hidden_states: Literal["auto", "device", "cpu", "disk"] = Field(
        "auto", description="Where the blocks' inputs are kept."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads. Default: all cores.")
    allow_fallback: bool = Field(
        False, description="Where a method breaks down on a block, use its fallback and note it in the row."
    )

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Self:
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ConfigError(
                f"micro_batch={self.micro_batch} is more than the {self.batch_size} of a step (--batch-size)."
            )
        return self

    @field_validator("device")
    @classmethod
    def _is_device(cls, device: str) -> str:
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is None:
            raise ValueError("choose auto, cpu, cuda or cuda:N")
        return device


class QuantizerConfig(_Section):
    """Two readings of the quantizer in which the authors' code and packed formats differ."""

    zero_in_range: bool = Field(
        True, description="Widen every range to contain 0, as packed formats need. false: the published form."
    )
    attention_granularity: Literal["per_head", "per_token", "published"] = Field(
        "per_head",
        description="Ranges of q, k and v: one per token and head, or one per token over all heads; "
        "published: per token on OPT, per head on LLaMA, as the authors' code has it.",
    )


class MethodRequest(_Section):
    """One method and the options that were set by hand; the rest comes from its presets."""

    name: Name = Field(description="A method, see `qbench methods`.")
    options: dict[str, Any] = Field({}, description="Option to value, see `qbench methods NAME`.")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


class RunConfig(_Section):
    """One run: methods × schemes on one model."""

    model: Name = Field("tiny-llama", description="A hub name, a local folder, or an embedded model.")
    revision: Name | None = Field(None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    methods: list[MethodRequest] = Field(
        [MethodRequest(name="affinequant")], min_length=1, description="Methods to compare; repeatable."
    )
    schemes: Schemes = Field(
        ["W4A4"], min_length=1, description="Bit widths such as W4A16g128 or W4A4; repeatable."
    )
    calibration: CalibrationConfig = CalibrationConfig()
    evals: EvalConfig = EvalConfig()
    seeds: int = Field(
        1, ge=1, description="Repeat with this many calibration seeds: --seed, --seed + 1, and so on."
    )
    compute: ComputeConfig = ComputeConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    output: Name = Field("results", description="Folder of the result records.")
    save_dir: Name | None = Field(
        None,
        description="Write each quantized model to a folder in here; fake-quantized unless export says more.",
    )
    export: list[Literal["gptq", "compressed-tensors", "awq", "fake"]] = Field(
        [],
        description="Write each quantized model in this format, certified, to save_dir or OUTPUT/exports; repeatable.",
    )
    save_act_scales: Name | None = Field(
        None, description="Also write the observed channel ranges: act_scales and act_shifts in this folder."
    )
    resume: Name | None = Field(
        None,
        description="Continue from the checkpoints in this folder; or evaluate the parameters in this file (.pth) "
        "of the authors' OmniQuant or AffineQuant.",
    )
    restart: bool = Field(False, description="Ignore earlier checkpoints and results.")

    @model_validator(mode="wrap")
    @classmethod
    def _one_sentence(cls, data: Any, handler: Any) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise _as_config_error(error, cls, "the run's configuration") from None

    @field_validator("methods")
    @classmethod
    def _once_each(cls, methods: list[MethodRequest]) -> list[MethodRequest]:
        return [request for i, request in enumerate(methods) if request not in methods[:i]]

    @model_validator(mode="after")
    def _resume_or_restart(self) -> Self:
        if self.resume is not None and self.restart:
            raise ConfigError("resume and restart contradict each other: choose one.")
        return self

    @property
    def parsed_schemes(self) -> list[Scheme]:
        """The schemes as values."""
        return [Scheme.parse(scheme) for scheme in self.schemes]

    def alone(self, method: MethodRequest, scheme: str) -> RunConfig:
        """The request of one of its rows: what a record keeps, and what is hashed to name a cell."""
        return self.model_copy(update={"methods": [method], "schemes": [scheme], "seeds": 1})

    def at_seed(self, seed: int) -> RunConfig:
        """The same request with one calibration seed."""
        return self.model_copy(
            update={"calibration": self.calibration.model_copy(update={"seed": seed}), "seeds": 1}
        )

    def canonical(self) -> str:
        """JSON with sorted keys and all defaults: equal for equal requests, however they were written."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def hash(self) -> str:
        """SHA-256 of the canonical form without `PLACES`."""
        data = self.model_dump(mode="json", exclude=PLACES)
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved configuration, one section a line; itself a valid configuration file."""
        return yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110
        )


class ScoreConfig(_Section):
    """A model to measure as it is."""

    model: Name = Field(description="A hub name, a local folder, or an embedded model.")
    revision: Name | None = Field(None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    fidelity_to: Name | None = Field(
        None,
        description="The full-precision model it was made from: scored too, and compared with.",
    )
    evals: EvalConfig = EvalConfig()
    compute: ComputeConfig = ComputeConfig()
    output: Name = Field("results", description="Folder of the result records.")
    restart: bool = Field(False, description="Ignore earlier measurements of the full-precision model.")


def validated(model: type[Model], data: Mapping[str, Any], what: str) -> Model:
    """Build a model from untrusted data, such as a method from the options of a request.

    Args:
        model: The pydantic model that knows the fields.
        data: Field to value; strings are converted by the model.
        what: Whose fields these are, as the error says it: "method affinequant".

    Raises:
        ConfigError: One sentence with every problem, and suggestions for unknown names.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise _as_config_error(error, model, what) from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that must hold key-value pairs, no key twice.

    Raises:
        ConfigError: If it is missing, unreadable, not YAML or something else than key-value pairs.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read configuration file {str(path)!r}: {_reason(error)}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"Configuration file {str(path)!r} is not valid YAML: {_reason(error)}.") from None
    if data is not None and not isinstance(data, dict):
        raise ConfigError(
            f"Configuration file {str(path)!r} holds a {type(data).__name__}; write `key: value` lines."
        )
    return data or {}


def read_config(path: str | Path) -> RunConfig:
    """Read a run's configuration from YAML; what the file leaves out has its default."""
    return RunConfig.model_validate(read_mapping(path))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win in silence; a configuration that says two things is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return (getattr(error, "strerror", None) or str(error)).replace("\n", " ")


def _as_config_error(error: ValidationError, model: type[BaseModel], what: str) -> ConfigError:
    problems = list(dict.fromkeys(_problem(details, model) for details in error.errors()))
    return ConfigError(f"In {what}: {'; '.join(problems)}.")


def _problem(details: ErrorDetails, model: type[BaseModel]) -> str:
    location = details["loc"]
    path = ".".join(str(part) for part in location)
    if details["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"unknown key {path!r}.{suggest(str(location[-1]), known)} Known: {', '.join(known) or 'none'}"
    if details["type"] == "missing":
        return f"{path} is missing"
    message = details["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{path}={details['input']!r:.80} is refused: {message}" if path else message


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the nested model to which an error's location leads."""
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:  # an index into a list of the models that the annotation names
            continue
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next(
            (kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), model
        )
    return list(model.model_fields)
