"""A packed model computes what its finished blocks say, and generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qbench.deploy.backends import BACKENDS
from qbench.deploy.packed import finished, pack, rounded
from qbench.engine import attention
from qbench.engine.checkpoint import Checkpoint
from qbench.engine.prepare import PreparedBlock
from qbench.engine.state import BlockState
from qbench.errors import ConfigError, DataError, UnsupportedSchemeError
from qbench.evals.generation import generate
from qbench.scheme import Scheme
from tests.blocks import blocks_of, relative
from tests.tiny_runs import make_lane, naive_logits, reconstruct_lanes, spec_of


def packed(model: torch.nn.Module, states: list[BlockState], backend: str, scheme: str) -> torch.nn.Module:
    """Replace the blocks in place."""
    model.set_attn_implementation("sdpa")
    blocks, spec = blocks_of(model), spec_of(model)
    for i, state in enumerate(states):
        blocks[i] = pack(blocks[i], spec, state, BACKENDS.load(backend)(), Scheme.parse(scheme))
    return model


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@torch.no_grad()
def test_packed_model_computes_the_finished_blocks(build_tiny, tokens, family: str, backend: str) -> None:
    """Learned biases, folded norms and the matrices behind norms included."""
    model = build_tiny(family)
    with torch.enable_grad():
        (result,) = reconstruct_lanes(
            model, tokens[:3], [make_lane(model, "affinequant", "W4A16g32", epochs=1)]
        )
    assert any(m is not None for m in result.state(0).rest.norm_matrix.values())
    expected = naive_logits(model, result, tokens[:2])
    found = packed(model, [result.state(i) for i in range(2)], backend, "W4A16g32")(tokens[:2]).logits
    assert relative(found, expected) < 1e-5


@torch.no_grad()
def test_packed_model_quantizes_the_inputs_of_its_linears_only(tiny_llama, tokens) -> None:
    scheme, spec = Scheme.parse("W4A6"), spec_of(tiny_llama)
    states = [rounded(block, spec, scheme) for block in blocks_of(tiny_llama)]
    tiny_llama.set_attn_implementation(attention.register())
    dense = list(blocks_of(tiny_llama))
    for i, state in enumerate(states):
        state.rest.weight = {}
        prepared = PreparedBlock(dense[i], spec).load(state.tensors("cpu"))
        prepared.quantize_operands(scheme)
        setattr(prepared.block.get_submodule(spec.attention), attention.ATTRIBUTE, None)
        blocks_of(tiny_llama)[i] = prepared
    expected = tiny_llama(tokens[:2]).logits
    for i, block in enumerate(dense):
        blocks_of(tiny_llama)[i] = block
    found = packed(tiny_llama, states, "torch", "W4A6")(tokens[:2]).logits
    assert relative(found, expected) < 1e-5


def test_dense_weights_leave_with_their_block(tiny_llama) -> None:
    spec, scheme = spec_of(tiny_llama), Scheme.parse("W4A16g32")
    states = [rounded(block, spec, scheme) for block in blocks_of(tiny_llama)]
    model = packed(tiny_llama, states, "torch", str(scheme))
    inside = [t for block in blocks_of(model) for t in (*block.parameters(), *block.buffers())]
    assert all(t.dim() < 2 or t.dtype == torch.uint8 or t.shape[-1] == 2 for t in inside)


def test_generation_of_a_packed_model(tiny_llama) -> None:
    spec, scheme = spec_of(tiny_llama), Scheme.parse("W8A8")
    states = [rounded(block, spec, scheme) for block in blocks_of(tiny_llama)]
    model = packed(tiny_llama, states, "torch", "W8A8")
    ticks = iter(float(i * i) for i in range(100))  # between two looks at the clock: 1, 3, 5 … seconds
    found = generate(model, batch=2, prompt_tokens=8, new_tokens=4, clock=lambda: next(ticks))
    assert found.prefill_s == 5.0  # the median of 1, 5 and 9 seconds
    assert found.step_s == (17.0 + 21.0) / 2  # of 13, 17, 21 and 25
    assert found.graphed_step_s is None and found.peak_bytes is None


@pytest.fixture
def checkpoint(tiny_llama, tokens, tmp_path) -> Path:
    lane = make_lane(tiny_llama, "rtn", "W4A16g32", Checkpoint(tmp_path / "rtn-W4A16g32-0123", "k"))
    reconstruct_lanes(tiny_llama, tokens[:2], [lane])
    return tmp_path / "rtn-W4A16g32-0123"


def test_blocks_of_a_finished_run(tiny_llama, checkpoint: Path) -> None:
    load = finished(checkpoint, 2, Scheme.parse("W4A16g32"))
    expected = rounded(blocks_of(tiny_llama)[1], spec_of(tiny_llama), Scheme.parse("W4A16g32"))
    assert all(
        torch.equal(load(1).linears[role].codes, expected.linears[role].codes) for role in expected.linears
    )


@pytest.mark.parametrize(
    ("scheme", "n_blocks", "words"),
    [
        ("W3A16g32", 2, "its q has 4 bits in groups of 32"),
        ("W4A16", 2, "was not made with W4A16"),
        ("W4A16g32-sym", 2, "was not made with"),
        ("W4A16g32", 4, "holds 2 blocks and the model has 4"),
    ],
    ids=["bits", "groups", "symmetry", "blocks"],
)
def test_another_scheme_or_model_is_refused(checkpoint: Path, scheme: str, n_blocks: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        finished(checkpoint, n_blocks, Scheme.parse(scheme))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint folder"):
        finished(tmp_path, 2, Scheme.parse("W4A16"))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        finished(tmp_path, 2, Scheme.parse("W4A16"))


def test_a_linear_that_the_backend_cannot_do_is_refused(tiny_llama) -> None:
    scheme = Scheme.parse("W4A16g16")
    state = rounded(blocks_of(tiny_llama)[0], spec_of(tiny_llama), scheme)
    with pytest.raises(UnsupportedSchemeError, match="groups of 32, 64, 128 or 256"):
        pack(blocks_of(tiny_llama)[0], spec_of(tiny_llama), state, BACKENDS.load("torch")(), scheme)
