"""Facts that are true of every method, checked on two small random models: what `qbench check METHOD` prints.

A plugin that passes computes what the table assumes: identity at 16 bits, codes on the grid, determinism, exact
resume, lanes that do not influence each other, declared transforms that do preserve the function, and errors no
larger than rounding's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbench.engine import attention
from qbench.engine.activations import Observer
from qbench.engine.capture import block_inputs, move
from qbench.engine.checkpoint import Checkpoint
from qbench.engine.hidden import HiddenStates
from qbench.engine.lane import Lane, LaneResult
from qbench.engine.plan import BlockView
from qbench.engine.prepare import PreparedBlock, block_tensors
from qbench.engine.probe import Probe
from qbench.engine.reconstruct import reconstruct
from qbench.engine.settings import EngineSettings
from qbench.errors import QbenchError, UnsupportedSchemeError
from qbench.methods import METHODS
from qbench.methods.base import Method
from qbench.models.base import Architecture, BlockSpec
from qbench.models.loading import architecture_for
from qbench.quant.grid import Grid
from qbench.quant.uniform import QuantizedWeight
from qbench.scheme import Scheme
from qbench.transforms.transform import apply_all, fold

WINDOWS, SEQ_LEN, VOCAB = 6, 24, 96
SHORT = {"epochs": 3, "iterations": 12}  # options that say how long a method learns
SCHEMES = ("W4A4", "W3A16g16")
TOLERANCE = 1e-9


class Fact(NamedTuple):
    """One checked fact."""

    fact: str
    passed: bool
    detail: str


@dataclass
class _Subject:
    """A small random model with activation outliers, and its description."""

    model: nn.Module
    architecture: Architecture

    @cached_property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_submodule(self.architecture.blocks)  # type: ignore[return-value]

    @cached_property
    def spec(self) -> BlockSpec:
        return self.architecture.block_spec(self.blocks[0], self.model.config)

    @cached_property
    def ids(self) -> Tensor:
        return torch.randint(VOCAB, (WINDOWS, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def check(name: str) -> list[Fact]:
    """Check every fact for one registered method, installed plugins included.

    Raises:
        ConfigError: If there is no such method.
    """
    cls: type[Method] = METHODS.load(name)
    facts = []
    for fact, test in _FACTS:
        try:
            detail = test(cls)
            facts.append(Fact(fact, True, detail))
        except _Failed as failure:
            facts.append(Fact(fact, False, str(failure)))
        except Exception as error:
            facts.append(Fact(fact, False, f"{type(error).__name__}: {error}"))
    return facts


class _Failed(Exception):
    """A fact that does not hold."""


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _Failed(what)


def _subjects() -> Iterator[_Subject]:
    """LLaMA with grouped-query attention, and OPT."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    common["max_position_embeddings"] = 64
    builders: list[Callable[[], nn.Module]] = [
        lambda: LlamaForCausalLM(LlamaConfig(**common, intermediate_size=48, num_key_value_heads=2)),
        lambda: OPTForCausalLM(OPTConfig(**common, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)),
    ]
    for build in builders:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = build().eval().requires_grad_(False)
        model.set_attn_implementation(attention.register())  # type: ignore[operator]
        subject = _Subject(model, architecture_for(model.config))
        for block in subject.blocks:  # outliers, as large models have them
            for path in subject.spec.norms.values():
                block.get_submodule(path).weight[3] *= 20
        yield subject


def _method(cls: type[Method], scheme: Scheme, subject: _Subject) -> Method:
    """The method as a user gets it, learning for a short time."""
    options = {name: value for name, value in SHORT.items() if name in cls.model_fields}
    return cls(**options).resolve(scheme, subject.spec)


def _run(cls: type[Method], subject: _Subject, *schemes: str, folder: Path | None = None) -> list[LaneResult]:
    lanes = []
    for text in schemes:
        scheme = Scheme.parse(text)
        method = _method(cls, scheme, subject)
        checkpoint = Checkpoint(folder / text, cls.name) if folder is not None else None
        lanes.append(Lane(f"{cls.name} {text}", method, scheme, checkpoint))
    settings = EngineSettings(device=torch.device("cpu"), placement="cpu")
    results = reconstruct(subject.model, list(subject.blocks), subject.spec, lanes, subject.ids, settings)
    for result in results:
        if result.error is not None:
            raise _Failed(str(result.error))
    return results


def _codes(result: LaneResult) -> list[Tensor]:
    tensors = []
    for i in range(len(result)):
        state = result.state(i)
        for linear in state.linears.values():
            if isinstance(linear, QuantizedWeight):
                tensors += [linear.codes, linear.scale, linear.zero_point]
            else:
                tensors.append(linear)
        rest = state.rest
        for group in (rest.bias, rest.norm_weight, rest.norm_bias, rest.norm_matrix):
            tensors += [t for t in group.values() if t is not None]
    return tensors


def _same(a: LaneResult, b: LaneResult) -> bool:
    ours, theirs = _codes(a), _codes(b)
    return len(ours) == len(theirs) and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def _identity(cls: type[Method]) -> str:
    for subject in _subjects():
        (result,) = _run(cls, subject, "W16A16")
        for i, block in enumerate(subject.blocks):
            tensors = result.state(i).tensors("cpu")
            for role, path in subject.spec.linears.items():
                same = torch.equal(tensors.weight[role], block.get_submodule(path).weight)
                _require(same, f"{subject.architecture.name} block {i}: {path} changed at W16A16")
    return "W16A16 leaves every weight as it was"


def _on_grid(cls: type[Method]) -> str:
    for subject in _subjects():
        for result in _run(cls, subject, *SCHEMES):
            scheme = result.lane.scheme
            for i in range(len(result)):
                for role, linear in result.state(i).linears.items():
                    where = f"{subject.architecture.name} {scheme} block {i} {role}"
                    _require(isinstance(linear, QuantizedWeight), f"{where}: no integer codes")
                    assert isinstance(linear, QuantizedWeight)
                    asked = (scheme.wbits, scheme.symmetric, scheme.group_size)
                    used = (linear.grid.bits, linear.grid.symmetric, linear.grid.group_size)
                    _require(
                        used == asked, f"{where}: (bits, symmetric, group size) {used} instead of {asked}"
                    )
                    _require(
                        int(linear.codes.max()) < 2**scheme.wbits,
                        f"{where}: a code exceeds {scheme.wbits} bits",
                    )
                    values = linear.grid.split(linear.dequantize())
                    most = max(len(group.unique()) for group in values.flatten(0, 1))
                    _require(most <= 2**scheme.wbits, f"{where}: {most} values in a group")
    return f"{', '.join(SCHEMES)}: integer codes, at most 2^bits values per group"


def _deterministic(cls: type[Method]) -> str:
    for subject in _subjects():
        first, second = (_run(cls, subject, "W4A4")[0] for _ in range(2))
        _require(_same(first, second), f"{subject.architecture.name}: two runs of one seed differ")
    return "two runs give the same codes bit for bit"


def _lanes(cls: type[Method]) -> str:
    for subject in _subjects():
        together = _run(cls, subject, *SCHEMES)
        for scheme, result in zip(SCHEMES, together, strict=True):
            (alone,) = _run(cls, subject, scheme)
            _require(
                _same(result, alone), f"{subject.architecture.name} {scheme}: differs from a run of its own"
            )
    return "two lanes in one pass give the codes of two runs"


def _resume(cls: type[Method]) -> str:
    subject = next(_subjects())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (whole,) = _run(cls, subject, "W4A4", folder=folder)
        expected = _codes(whole)
        checkpoint = Checkpoint(folder / "W4A4", cls.name)
        checkpoint.truncate(1)
        (resumed,) = _run(cls, subject, "W4A4", folder=folder)
        same = all(torch.equal(x, y) for x, y in zip(expected, _codes(resumed), strict=True))
        _require(same, "the second block differs after resuming behind the first")
    return "resumed behind block 0: the same codes bit for bit"


def _model_untouched(cls: type[Method]) -> str:
    for subject in _subjects():
        model = subject.model
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        _run(cls, subject, "W4A4")
        after = model.state_dict()
        _require(list(after) == list(before), "the state dict has other keys")
        changed = [
            n for n in before if not torch.equal(before[n], after[n]) or before[n].dtype != after[n].dtype
        ]
        _require(not changed, f"changed: {', '.join(changed)}")
        _require(not any(p.requires_grad for p in model.parameters()), "a parameter requires a gradient")
        hooks = [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
        _require(not hooks, f"hooks left on {', '.join(hooks)}")
    return "no hooks, gradients, new keys or changed tensors"


def _transforms(cls: type[Method]) -> str:
    worst, seen = 0.0, 0
    for subject in _subjects():
        ((hidden, kwargs), *_) = block_inputs(subject.model, subject.blocks[0], subject.ids[:1])
        cpu = torch.device("cpu")
        settings = EngineSettings(device=cpu, placement="cpu")
        states, single_kwargs = HiddenStates((1, *hidden.shape[1:]), cpu, "cpu"), kwargs
        states.write(0, hidden)
        hidden, kwargs = hidden.double(), move(kwargs, cpu, torch.float64)
        for text in SCHEMES:
            scheme = Scheme.parse(text)
            block, spec = subject.blocks[0], subject.spec
            prepared = PreparedBlock(block, spec).double()
            base = block_tensors(block, spec, cpu, torch.float64)
            observer = Observer(prepared, SEQ_LEN)
            with observer, torch.no_grad():
                expected = prepared.load(base)(hidden, **kwargs)
            grid = Grid(scheme.wbits, scheme.symmetric, scheme.group_size)
            single = base.map(lambda t: t.float())
            probe = Probe(PreparedBlock(block, spec), single, states, single_kwargs, settings)
            view = BlockView(0, 2, spec, scheme, grid, single, observer.stats, probe)
            plan = _method(cls, scheme, subject).plan(view)
            generator = torch.Generator().manual_seed(3)
            for transform in (t.double() for t in plan.transforms):
                seen += 1
                with torch.no_grad():
                    for p in transform.parameters():  # somewhere training could have gone
                        p += 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    for tensors in (apply_all(base, [transform]), fold(base, [transform])):
                        out = prepared.load(tensors)(hidden, **kwargs)
                        error = float((out - expected).abs().max() / expected.abs().max())
                        if transform.function_preserving:
                            worst = max(worst, error)
                            what = (
                                f"{subject.architecture.name} {text} {transform.site.name} {transform.kind}"
                            )
                            _require(
                                error < TOLERANCE,
                                f"{what}: declared function-preserving, moves the block by {error:.1e}",
                            )
    return f"{seen} transforms, largest deviation {worst:.1e}" if seen else "no transforms"


def _not_above_rtn(cls: type[Method]) -> str:
    rtn: type[Method] = METHODS.load("rtn")
    ratios = []
    for subject in _subjects():
        (result,), (rounded,) = _run(cls, subject, "W4A4"), _run(rtn, subject, "W4A4")
        error, floor = (r.records[-1].accumulated_error or 0.0 for r in (result, rounded))
        ratios.append(error / floor)
        _require(
            error <= 1.001 * floor, f"{subject.architecture.name} W4A4: error {error:.4g}, RTN {floor:.4g}"
        )
    return "last block's accumulated error over RTN's: " + ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _options(cls: type[Method]) -> str:
    method = _method(cls, Scheme.parse("W4A4"), next(_subjects()))
    again = cls(**method.model_dump(mode="json"))
    _require(again == method, f"{method.model_dump()} comes back as {again.model_dump()}")
    _require(cls.model_config.get("frozen") is True, "options can be changed after they were checked")
    undocumented = [n for n, f in cls.model_fields.items() if not f.description]
    _require(not undocumented, f"options without a description: {', '.join(undocumented)}")
    try:
        cls(**{"no_such_option": 1})
    except ValueError:
        return "options survive a round trip; unknown ones are refused"
    raise _Failed("an unknown option is accepted")


def _refuses(cls: type[Method]) -> str:
    subject = next(_subjects())
    scheme = Scheme.parse("W4A16g20")
    try:
        _method(cls, scheme, subject).check(scheme, subject.spec)
    except UnsupportedSchemeError as error:
        missing = [
            p
            for r, p in subject.spec.linears.items()
            if subject.spec.shapes[r][1] % 20 and p not in str(error)
        ]
        _require(not missing, f"the refusal does not name {', '.join(missing)}")
        return "a group size that does not divide is refused, naming every linear"
    except QbenchError as error:
        raise _Failed(f"refused with {type(error).__name__} instead of UnsupportedSchemeError") from error
    raise _Failed("a group size that does not divide is accepted")


_FACTS: list[tuple[str, Callable[[type[Method]], str]]] = [
    ("options are a frozen, documented model", _options),
    ("unsupported schemes are refused early", _refuses),
    ("16 bits is the identity", _identity),
    ("weights lie on their grid", _on_grid),
    ("same seed, same codes", _deterministic),
    ("lanes do not influence each other", _lanes),
    ("a resumed run is the same run", _resume),
    ("the model is left as it was", _model_untouched),
    ("transforms preserve the function", _transforms),
    ("error is not above RTN's", _not_above_rtn),
]
