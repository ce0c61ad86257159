"""The deploy-parity certificate: does an exported folder compute what the table says?

A folder is read back and held against the fake-quantized model on a fixed probe. qbench's own reader compares every
linear's dequantized weight bit for bit, in order, then everything else that is stored, then the logits. Runtimes are
other programs, perhaps in other Python environments (`runtime_worker.py`): each linear's response to a fixed input
names the first one that is wrong, block outputs name what is wrong between linears, logits give the figures.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from qbench import provenance
from qbench.deploy.folder import unquantized
from qbench.deploy.formats import Format
from qbench.engine import attention
from qbench.engine.install import quantized
from qbench.engine.lane import LaneResult
from qbench.engine.settings import EngineSettings
from qbench.errors import ConfigError, QbenchError
from qbench.models.loading import LoadedModel
from qbench.models.packed import PackedFolder, load_packed, packed_settings
from qbench.quant.uniform import QuantizedWeight
from qbench.results import RuntimeCheck
from qbench.scheme import Scheme

DEQUANTIZED = "dequantized"
# Runtime -> formats it reads -> packages it needs for each.
RUNTIMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "transformers": {
        "fake": (),
        "compressed-tensors": ("compressed_tensors",),
        "gptq": ("optimum", "gptqmodel"),
        "awq": ("gptqmodel",),
    },
    "gptqmodel": {"gptq": ("gptqmodel",), "awq": ("gptqmodel",)},
    "auto-gptq": {"gptq": ("auto_gptq",)},
}
MAX_TOKENS, MAX_WINDOW, MAX_LOGIT_BYTES = 2048, 512, 1 << 29
INPUT_ROWS = (
    16  # inputs per linear: enough that one wrong group of one row stands out of half-precision noise
)
TIMEOUT_S = 3600  # the first call of some runtimes compiles kernels


Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tolerance:
    """How far a runtime may be from the reference, by the type it computes in.

    Attributes:
        linear: Largest |difference| of a linear's response over its output channel's root mean square.
        block: Largest |difference| of a block's outputs over their root mean square: names where it begins, where no
            linear is wrong but the logits are.
        kl: Nats per token.
        perplexity: Relative.
    """

    linear: float
    block: float
    kl: float
    perplexity: float


# float32: rounding of sums in another order. Half precision: one unit in the last place (2^-11, 2^-8) times the some
# four standard deviations of the largest of thousands of values, with a factor of four in hand. One zero point off by
# one moves a row's response by a step times the sum of its group's inputs: over the response's root mean square that is
# about √(g/n) times step/rms(code), some 0.04 for a group of 128 among 11008 inputs at 4 bits, more for fewer inputs or
# bits, and the largest of 16 draws is twice that. Perplexity: the 0.1 % that a table's digits can show.
TOLERANCES = {
    "float32": Tolerance(linear=1e-4, block=1e-3, kl=1e-6, perplexity=1e-4),
    "float16": Tolerance(linear=1e-2, block=1e-1, kl=1e-3, perplexity=1e-3),
    "bfloat16": Tolerance(linear=4e-2, block=3e-1, kl=1e-2, perplexity=5e-3),
}


# Where inputs of linears are rounded at run time, a sum in another order tips a value to the next code now and then,
# later roundings follow, and two right answers end up apart by about what the rounding itself costs. Then the linears'
# responses are the sharp test (by dtype, as above), and the logits are held to these.
ROUNDED_KL, ROUNDED_PERPLEXITY = 1e-2, 5e-3


@dataclass(frozen=True)
class Probe:
    """Tokens that every runtime scores.

    Attributes:
        ids: [windows, tokens].
        text: What they are, in words.
    """

    ids: Tensor
    text: str

    @property
    def fingerprint(self) -> str:
        """Of the token ids."""
        return provenance.sha256_json(self.ids.tolist())


def choose_probe(ids: Tensor, name: str, vocabulary: int) -> Probe:
    """The beginning of a text's windows, as much as a comparison of all logits has room for."""
    length = min(ids.shape[1], MAX_WINDOW)
    windows = max(1, min(MAX_TOKENS, MAX_LOGIT_BYTES // (4 * vocabulary)) // length)
    kept = ids[:windows, :length].clone()
    return Probe(kept, f"{name}: first {length} tokens of the first {len(kept)} windows")


@dataclass
class Reference:
    """What the fake-quantized model computes.

    Attributes:
        logits: [windows, tokens, vocabulary], float32.
        blocks: Output of each block on the first window, [tokens, hidden].
        row_perplexity: On the probe, with everything quantized that the row quantizes.
    """

    logits: Tensor
    blocks: list[Tensor]
    row_perplexity: float


def reference(
    loaded: LoadedModel,
    result: LaneResult,
    settings: EngineSettings,
    probe: Probe,
    scheme: Scheme,
    rounding: Rounding | None = None,
) -> Reference:
    """Compute the reference, quantizing linears' inputs to `scheme.abits` and no attention operand.

    Args:
        loaded: The full-precision model; unchanged.
        result: The lane's finished blocks.
        settings: For the grids of the operands.
        probe: What to score.
        scheme: The lane's, with 16-bit activations where the format has none.
        rounding: How inputs are quantized, where runtimes do it in another order of operations than the table's row.
    """
    model: Any = loaded.model
    blocks: Any = loaded.blocks
    with quantized(model, blocks, loaded.spec, result, settings):
        row = None
        if rounding is not None or result.lane.scheme.attention_bits != (16, 16):
            row = perplexity(_logits(model, probe), probe.ids)
            for block in blocks:
                block.quantize_operands(None if rounding else scheme, settings.zero_in_range)
                setattr(block.block.get_submodule(loaded.spec.attention), attention.ATTRIBUTE, None)
        outputs: list[Tensor] = []
        handles = [
            block.register_forward_hook(
                lambda module, args, out: outputs.append(out.float().reshape(-1, out.shape[-1]))
            )
            for block in blocks
        ]
        if rounding is not None:
            handles += [
                linear.register_forward_pre_hook(lambda module, args: (rounding(args[0]), *args[1:]))
                for block in blocks
                for linear in block.linears.values()
            ]
        logits = _logits(model, probe)
        for handle in handles:
            handle.remove()
    return Reference(logits, outputs[: len(blocks)], perplexity(logits, probe.ids) if row is None else row)


@torch.no_grad()
def _logits(model: Any, probe: Probe) -> Tensor:
    """Window by window, as the worker does."""
    return torch.stack(
        [model(input_ids=window[None], use_cache=False).logits[0].float() for window in probe.ids]
    )


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """exp of the mean loss over predicted tokens."""
    losses = [
        functional.cross_entropy(window[:-1].double(), tokens[1:], reduction="sum").item()
        for window, tokens in zip(logits, ids, strict=True)
    ]
    mean = math.fsum(losses) / (ids.shape[0] * (ids.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


def figures(found: Tensor, expected: Tensor, ids: Tensor) -> dict[str, float]:
    """The certificate's figures: largest logit difference, KL, top-1 agreement, perplexity."""
    kl, same = 0.0, 0
    for window, goal in zip(found, expected, strict=True):
        p, q = goal.double().log_softmax(-1), window.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += int((window.argmax(-1) == goal.argmax(-1)).sum())
    n_tokens = ids.numel()
    return {
        "largest_logit_difference": float((found - expected).abs().max()),
        "kl_mean": max(kl, 0.0) / n_tokens,  # rounding can leave −1e-17
        "top1_agreement": same / n_tokens,
        "perplexity": perplexity(found, ids),
    }


def linear_name(index: int, path: str) -> str:
    """`layers.17.down_proj`."""
    return f"layers.{index}.{path.rpartition('.')[2]}"


def check_dequantized(
    loaded: LoadedModel, result: LaneResult, format_: Format, folder: Path, probe: Probe, expected: Reference
) -> RuntimeCheck:
    """Read the folder with qbench's own reader and compare everything that it stores, then what it computes."""
    name = "transformers" if format_.name == "fake" else DEQUANTIZED
    try:
        failed = _first_stored_difference(loaded, result, folder)
        model = _plain(folder) if format_.name == "fake" else load_packed(folder)
        found = _logits(model, probe)
    except QbenchError as error:
        return RuntimeCheck(runtime=name, verified=False, failed_at=f"reading: {error}", dtype="float32")
    return _verdict(name, "float32", {}, failed, found, expected, probe)


def _plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _first_stored_difference(loaded: LoadedModel, result: LaneResult, folder: Path) -> str | None:
    """The first linear, in order, whose stored integers do not give the lane's weight; then any other tensor."""
    stored = _Stored(folder)
    blocks = loaded.architecture.blocks
    for i in range(len(result)):
        for role, linear in result.state(i).linears.items():
            path = loaded.spec.linears[role]
            goal = linear.dequantize() if isinstance(linear, QuantizedWeight) else linear.float()
            found = stored.weight(f"{blocks}.{i}.{path}")
            if found.shape != goal.shape:
                return f"{linear_name(i, path)} (shape {tuple(found.shape)}, not {tuple(goal.shape)})"
            if not torch.equal(found, goal):
                return f"{linear_name(i, path)} ({_where(found, goal, linear)})"
    for name, tensor in _stored_as_is(loaded, result):
        kept = stored.plain(name)
        if kept is None or not torch.equal(kept.float(), tensor.float()):
            return name
    return None


def _where(found: Tensor, goal: Tensor, linear: QuantizedWeight | Tensor) -> str:
    row, column = (found != goal).nonzero()[0].tolist()
    if not isinstance(linear, QuantizedWeight):
        return f"output channel {row}, input channel {column}"
    return f"output channel {row}, group {column // (linear.grid.group_size or linear.codes.shape[1])}"


def _stored_as_is(loaded: LoadedModel, result: LaneResult) -> Iterator[tuple[str, Tensor]]:
    """Biases and norms of every block, then what lies outside the blocks."""
    spec, blocks = loaded.spec, loaded.architecture.blocks
    for i in range(len(result)):
        rest = result.state(i).rest
        for norm, path in spec.norms.items():
            yield f"{blocks}.{i}.{path}.weight", rest.norm_weight[norm]
            if (bias := rest.norm_bias[norm]) is not None:
                yield f"{blocks}.{i}.{path}.bias", bias
        for role, path in spec.linears.items():
            if (bias := rest.bias[role]) is not None:
                yield f"{blocks}.{i}.{path}.bias", bias
    yield from unquantized(loaded).items()


class _Stored:
    """Tensors of a folder by name, whether it is packed or not."""

    def __init__(self, folder: Path) -> None:
        self.packed = (
            PackedFolder(folder)
            if (folder / "config.json").exists() and packed_settings(folder) is not None
            else None
        )
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.files |= {name: path for name in file.keys()}  # noqa: SIM118 (not a dict)

    def plain(self, name: str) -> Tensor | None:
        if name not in self.files:
            return None
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def weight(self, module: str) -> Tensor:
        if self.packed is not None:
            return self.packed.linear(module).dequantize()
        weight = self.plain(f"{module}.weight")
        return torch.empty(0) if weight is None else weight.float()


def _verdict(
    runtime: str,
    dtype: str,
    versions: dict[str, str],
    failed: str | None,
    found: Tensor,
    expected: Reference,
    probe: Probe,
    rounds_inputs: bool = False,
) -> RuntimeCheck:
    """Figures, and what they fail at if no linear did."""
    limits = TOLERANCES[dtype]
    if rounds_inputs:
        limits = replace(limits, kl=ROUNDED_KL, perplexity=ROUNDED_PERPLEXITY)
    if not bool(found.isfinite().all()):
        return RuntimeCheck(
            runtime=runtime, verified=False, failed_at=failed or f"logits (not finite in {dtype})", dtype=dtype,
            versions=versions,
        )  # fmt: skip
    measured = figures(found, expected.logits, probe.ids)
    goal = perplexity(expected.logits, probe.ids)
    exact = dtype == "float32" and not rounds_inputs
    if failed is None and exact and measured["top1_agreement"] < 1:
        failed = f"logits (top-1 agreement {measured['top1_agreement']:.4%})"
    if failed is None and measured["kl_mean"] > limits.kl:
        failed = f"logits (KL {measured['kl_mean']:.2e}, allowed in {dtype} {limits.kl:.0e})"
    if failed is None and abs(measured["perplexity"] / goal - 1) > limits.perplexity:
        failed = f"logits (perplexity {measured['perplexity']:.4f}, reference {goal:.4f})"
    return RuntimeCheck(
        runtime=runtime, verified=failed is None, failed_at=failed, dtype=dtype, versions=versions, **measured
    )


@torch.no_grad()
def departure_in_half(folder: Path, probe: Probe, expected: Reference) -> float:
    """How far the dequantized model in plain float16 is from itself in float32: KL in nats per token, maybe infinite.

    What is lost here no folder can give back: some models' attention logits are too large for half precision.
    """
    ids = probe.ids[:1]  # a whole window: what is lost grows with its length
    found = load_packed(folder, torch.float16)(input_ids=ids, use_cache=False).logits.float()
    if not bool(found.isfinite().all()):
        return math.inf
    return figures(found, expected.logits[:1], ids)["kl_mean"]


def runtimes_at_hand(format_: Format, given: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Which runtimes can be tried on a folder.

    Args:
        format_: Settled.
        given: Runtime to Python executable, as asked for; others are tried in this Python if they are installed.

    Returns:
        (runtime -> Python executable, runtime -> why it is not tried).

    Raises:
        ConfigError: An unknown runtime or no such executable.
    """
    for name, python in given.items():
        if name not in RUNTIMES:
            raise ConfigError(f"Unknown runtime {name!r}. Known: {', '.join(RUNTIMES)}.")
        if not Path(python).exists():
            raise ConfigError(f"runtime {name}={python}: there is no such file. Give a Python executable.")
    tried, left = {}, {}
    for name, formats in RUNTIMES.items():
        if format_.name not in formats:
            if name in given:
                left[name] = f"does not read {format_.name}"
            continue
        if name == "auto-gptq" and getattr(format_, "version", 1) == 2:
            left[name] = "reads gptq_v2 as garbage"
        elif name in given:
            tried[name] = given[name]
        elif missing := [package for package in formats[format_.name] if not _installed(package)]:
            left[name] = (
                f"not installed here: {', '.join(missing)} (--runtime {name}=PYTHON for another environment)"
            )
        else:
            tried[name] = sys.executable
    if format_.name == "fake":  # `check_dequantized` is transformers itself
        tried.pop("transformers", None)
    return tried, left


def _installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of its name in the working directory cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def check_runtime(
    name: str,
    python: str,
    loaded: LoadedModel,
    result: LaneResult,
    folder: Path,
    probe: Probe,
    expected: Reference,
    rounding: Rounding | None,
    dtype: str,
) -> RuntimeCheck:
    """Load the folder in a runtime of another process and compare linears, blocks and logits.

    Args:
        name: Runtime.
        python: Executable in whose environment it is installed.
        loaded: The full-precision model.
        result: The lane.
        folder: The export.
        probe: Tokens.
        expected: Of `reference`, with the same rounding.
        rounding: How the format's runtimes quantize the inputs of linears.
        dtype: `float32`, or `auto`: kernels and everything else in half precision, as the folder says.
    """
    spec, blocks = loaded.spec, loaded.architecture.blocks
    paths = [
        (i, role, f"{blocks}.{i}.{path}") for i in range(len(result)) for role, path in spec.linears.items()
    ]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        width: torch.randn(INPUT_ROWS, width, generator=generator)
        for width in sorted({cols for _, cols in spec.shapes.values()})
    }
    with tempfile.TemporaryDirectory(prefix="qbench-runtime-") as temporary:
        place = Path(temporary)
        tensors = {"ids": probe.ids.contiguous()} | {f"input.{w}": x for w, x in inputs.items()}
        tensors |= {f"width.{path}": torch.tensor(spec.shapes[role][1]) for _, role, path in paths}
        save_file(tensors, place / "probe.safetensors")
        request = {
            "runtime": name,
            "folder": str(folder.resolve()),
            "dtype": dtype,
            "probe": str(place / "probe.safetensors"),
            "answer": str(place / "answer.safetensors"),
            "blocks": blocks,
            "linears": [path for _, _, path in paths],
            "threads": torch.get_num_threads(),
        }
        (place / "request.json").write_text(json.dumps(request))
        reply, error = _ask(python, place / "request.json")
        if error is not None:
            return RuntimeCheck(runtime=name, verified=False, failed_at=f"loading: {error}")
        answer = load_file(place / "answer.safetensors")
    limits = TOLERANCES[reply["dtype"]]
    failed = _first_wrong_linear(result, inputs, answer, paths, rounding, limits.linear)
    verdict = _verdict(
        name,
        reply["dtype"],
        reply["versions"],
        failed,
        answer["logits"],
        expected,
        probe,
        rounding is not None,
    )
    update: dict[str, Any] = {"note": reply.get("note")}
    if rounding is not None:
        update["reference_perplexity"] = perplexity(expected.logits, probe.ids)
    if not verdict.verified and failed is None:  # no linear is wrong, the logits are: where does it begin?
        for i, goal in enumerate(expected.blocks):
            off = _relative(answer[f"block.{i}"], goal)
            if not off <= limits.block:
                update["failed_at"] = f"layers.{i} (outputs differ by {off:.2g}; {verdict.failed_at})"
                break
    return verdict.model_copy(update=update)


def _ask(python: str, request: Path) -> tuple[dict[str, Any], str | None]:
    """Run the worker; its answer, or why there is none."""
    worker = Path(__file__).with_name("runtime_worker.py")
    try:
        # -I: neither this folder nor PYTHONPATH may shadow the other environment's packages
        done = subprocess.run(
            [python, "-I", str(worker), str(request)], capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, str(error)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {}, f"exit code {done.returncode}: {last}"
    reply = json.loads(lines[-1])
    return reply, reply.get("error")


def _first_wrong_linear(
    result: LaneResult,
    inputs: Mapping[int, Tensor],
    answer: Mapping[str, Tensor],
    paths: list[tuple[int, str, str]],
    rounding: Rounding | None,
    limit: float,
) -> str | None:
    """The first linear whose response to its input is not that of the lane's integers."""
    block, state = -1, None
    for i, role, path in paths:
        if i != block:
            block, state = i, result.state(i).tensors("cpu")
        assert state is not None
        x = inputs[state.weight[role].shape[1]]
        if rounding is not None:
            x = rounding(x)
        goal = functional.linear(x, state.weight[role], state.bias[role])
        if not (error := _by_channel(answer[f"linear.{path}"], goal)) <= limit:
            return f"{linear_name(i, path)} (response differs by {error:.2g})"
    return None


def _by_channel(found: Tensor, goal: Tensor) -> float:
    """Largest |difference| of [inputs, out] over its own channel's root mean square: channels differ by orders."""
    size = goal.square().mean(0).sqrt()
    return float(((found - goal).abs().amax(0) / size.clamp(min=1e-3 * float(size.mean()))).max())


def _relative(found: Tensor, goal: Tensor) -> float:
    """Largest |difference| over the root mean square; not a number if the found values are not."""
    return float((found - goal).abs().max() / goal.square().mean().sqrt())


def scheme_in(format_: Format, scheme: Scheme) -> Scheme:
    """The part of a scheme that a folder of this format makes its runtimes compute."""
    return replace(scheme, abits=scheme.abits if format_.quantizes_inputs else 16, kvbits=None)
