"""Parameter files in the authors' layout: what a run writes is what another run reads, and nothing else is read."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from qbench.cli import main
from qbench.engine.lane import LaneResult
from qbench.errors import ConfigError, DataError
from qbench.methods import authors
from qbench.methods.affinequant import AffineQuant
from qbench.methods.omniquant import OmniQuant
from qbench.quant.uniform import QuantizedWeight
from qbench.results import ResultStore
from qbench.scheme import Scheme
from tests import model_folders
from tests.blocks import blocks_of
from tests.tiny_runs import make_lane, reconstruct_lanes, spec_of

HIDDEN = 32


def write(result: LaneResult, spec, path: Path, sf: float | None = None) -> str:
    blocks = {i: authors.as_authors_write(result.state(i).learned, spec, sf) for i in range(len(result))}
    torch.save(blocks, path)
    return str(path)


def same_codes(one: LaneResult, other: LaneResult) -> float:
    """Share of equal codes over the model."""
    equal = total = 0
    for i in range(len(one)):
        for role, linear in one.state(i).linears.items():
            found = other.state(i).linears[role]
            assert isinstance(linear, QuantizedWeight) and isinstance(found, QuantizedWeight)
            equal += int((linear.codes == found.codes).sum())
            total += linear.codes.numel()
    return equal / total


RUNS = [
    ("omniquant", "llama", "W4A4", {}),
    ("omniquant", "llama", "W4A4", {"query_key": "published"}),
    ("omniquant", "llama", "W3A16g16", {}),
    ("omniquant", "opt", "W4A4", {}),
    ("affinequant", "llama", "W4A4", {}),
    ("affinequant", "llama", "W4A4", {"query_key": "published", "truncate": "all"}),
    ("affinequant", "llama", "W3A16g16", {}),
    ("affinequant", "opt", "W4A4", {}),
    ("affinequant", "opt", "W3A16", {"sf": 0.5}),
]


@pytest.mark.parametrize(
    ("method", "family", "scheme", "options"),
    RUNS,
    ids=lambda value: "-".join(value) if value == {} else str(value),
)
def test_what_a_run_writes_computes_the_same_when_it_is_read(
    build_tiny, tokens, tmp_path, method, family, scheme, options
) -> None:
    model = build_tiny(family, **({"num_key_value_heads": 4} if family == "llama" else {}))
    lane = make_lane(model, method, scheme, epochs=2, **options)
    (trained,) = reconstruct_lanes(model, tokens, [lane])
    sf = getattr(lane.planner, "sf", None)
    file = write(trained, spec_of(model), tmp_path / "parameters.pth", sf)
    given = {"sf": sf} if sf is not None else {}
    again = make_lane(model, method, scheme, parameters=file, **given)
    (read,) = reconstruct_lanes(model, tokens, [again])
    assert same_codes(trained, read) > 0.9999  # rotations go through a division and a product
    for one, other in zip(trained.records, read.records, strict=True):
        assert other.accumulated_error == pytest.approx(one.accumulated_error, rel=1e-3)
        assert other.losses == []  # not trained
    assert [t.kind for t in read.transforms[0]] == [t.kind for t in trained.transforms[0]]
    preserving = [t.function_preserving for t in trained.transforms[0]]
    assert [t.function_preserving for t in read.transforms[0]] == preserving


def test_names_and_shapes_are_those_of_the_authors(build_tiny, tokens) -> None:
    """State dictionaries as both programs save them, for a LLaMA of H = 32 with heads of 8 and an MLP of 64."""
    model = build_tiny("llama", num_key_value_heads=4)
    lanes = [
        make_lane(model, "omniquant", "W4A4", epochs=1),
        make_lane(model, "affinequant", "W3A16g16", epochs=1),
    ]
    diagonal, matrix = reconstruct_lanes(model, tokens, lanes)
    written = authors.as_authors_write(diagonal.state(0).learned, spec_of(model))
    assert {n: tuple(t.shape) for n, t in written.items() if "smooth" in n} == {
        **{f"{p}_smooth_scale": (HIDDEN,) for p in ("qkv", "fc1", "out", "qkt")},
        **{f"{p}_smooth_shift": (HIDDEN,) for p in ("qkv", "fc1", "out")},
    }
    factor = "weight_quantizer.upbound_factor"
    assert written[f"self_attn.q_proj.{factor}"].shape == (32, 1)
    assert written[f"mlp.up_proj.{factor}"].shape == (64, 1)
    assert len([n for n in written if n.endswith("bound_factor")]) == 14
    written = authors.as_authors_write(matrix.state(0).learned, spec_of(model))
    assert written["qkv_smooth_scale"].shape == written["out_smooth_scale"].shape == (HIDDEN, HIDDEN)
    heads = torch.block_diag(*[torch.ones(8, 8)] * 4)
    assert bool((written["out_smooth_scale"][heads == 0] == 0).all())
    assert written["qkt_smooth_scale"].shape == (HIDDEN,)
    assert written[f"mlp.down_proj.{factor}"].shape == (32 * 64 // 16, 1)


def example(model, group: int | None = None) -> dict[int, dict[str, Tensor]]:
    """A file's content with the parameters of OmniQuant away from where they start."""
    spec = spec_of(model)
    blocks = {}
    for index in range(len(blocks_of(model))):
        blocks[index] = {f"{p}_smooth_scale": 0.5 + torch.rand(HIDDEN) for p in ("qkv", "fc1", "out", "qkt")}
        for role, linear in spec.linears.items():
            rows, columns = spec.shapes[role]
            size = rows * columns // (group or columns)
            for name in ("upbound_factor", "lowbound_factor"):
                blocks[index][f"{linear}.weight_quantizer.{name}"] = 2 + torch.rand(size, 1)
    return blocks


def test_what_the_file_says_is_what_is_computed(tiny_opt, tokens, tmp_path) -> None:
    """Clipping and scales of one block, applied by hand: OPT's fc1 behind its norm, and its codes."""
    blocks = example(tiny_opt)
    torch.save(blocks, tmp_path / "p.pth")
    lane = make_lane(tiny_opt, "omniquant", "W4A16", parameters=str(tmp_path / "p.pth"))
    (result,) = reconstruct_lanes(tiny_opt, tokens, [lane])
    for index, block in enumerate(blocks_of(tiny_opt)):
        scale, state = blocks[index]["fc1_smooth_scale"], result.state(index)
        assert torch.allclose(state.rest.norm_weight["mlp_norm"], block.final_layer_norm.weight / scale)
        weight = (block.fc1.weight.double() * scale.double()).detach()
        up, low = (
            blocks[index][f"fc1.weight_quantizer.{n}"].double().sigmoid()
            for n in ("upbound_factor", "lowbound_factor")
        )
        top, bottom = weight.amax(1, keepdim=True) * up, weight.amin(1, keepdim=True) * low
        step = ((top - bottom) / 15).half().double()
        codes = (torch.round(weight / step) + torch.round(-bottom / step)).clamp(0, 15)
        assert (state.linears["fc1"].codes == codes).float().mean() > 0.999


class Harmless:
    """An object that no file should bring along."""


def changed(model, change) -> dict:
    blocks = example(model)
    change(blocks)
    return blocks


def put(block: int, name: str, value):
    def change(blocks: dict) -> None:
        blocks[block][name] = value

    return change


BAD = [
    pytest.param(
        put(1, "out_smooth_scale", torch.ones(31)),
        r"block 1: out_smooth_scale has shape \[31\].*\[32\]",
        id="shape",
    ),
    pytest.param(
        put(0, "q.weight_quantizer.upbound_factor", torch.ones(32, 1)),
        "block 0: unknown parameter",
        id="name",
    ),
    pytest.param(
        put(0, "self_attn.q_proj.weight_quantizer.upbound_factor", torch.ones(64, 1)),
        r"\[64, 1\], this model",
        id="groups",
    ),
    pytest.param(lambda b: b.pop(1), "has 1 blocks, the model 2: block 1 is missing", id="last block"),
    pytest.param(lambda b: b.pop(0), "lacks block 0", id="first block"),
    pytest.param(lambda b: b.update({2: b[1]}), "has 3 blocks, the model 2", id="a block too many"),
    pytest.param(lambda b: b[1].pop("fc1_smooth_scale"), "fc1_smooth_scale is in one of", id="missing name"),
    pytest.param(
        lambda b: [x.pop("fc1.weight_quantizer.lowbound_factor") for x in b.values()],
        "lacks fc1.*every linear",
        id="one factor",
    ),
    pytest.param(
        put(0, "qkv_smooth_scale", torch.full((HIDDEN,), torch.nan)),
        "qkv_smooth_scale: not all",
        id="not finite",
    ),
    pytest.param(
        put(0, "qkv_smooth_scale", Harmless()), "Python objects besides tensors", id="pickled object"
    ),
    pytest.param(put(0, "qkv_smooth_scale", 3.0), "block 0 is no dictionary of tensors", id="a number"),
    pytest.param(
        lambda b: [x.clear() for x in b.values()],
        "holds no parameters: its blocks are empty",
        id="empty blocks",
    ),
    pytest.param(
        lambda b: [
            x.update(fc1_smooth_shift=torch.ones(HIDDEN)) or x.pop("fc1_smooth_scale") for x in b.values()
        ],
        "has fc1_smooth_shift but lacks fc1_smooth_scale",
        id="shift without scale",
    ),
    pytest.param(
        put(1, "qkv_smooth_scale", torch.zeros(HIDDEN)), "qkv_smooth_scale has zeros on its", id="no inverse"
    ),
    pytest.param(
        put(0, "out_smooth_scale", torch.eye(HIDDEN) + torch.eye(HIDDEN).roll(8, 0)),
        "out_smooth_scale has entries that join heads",
        id="heads joined",
    ),
    pytest.param(
        lambda b: [b.clear(), b.update(model="x")], "no dictionary of blocks", id="another dictionary"
    ),
]


@pytest.mark.parametrize(("change", "word"), BAD)
def test_a_file_that_does_not_fit_is_refused_with_its_name(tiny_opt, tmp_path, change, word) -> None:
    file = tmp_path / "omni_parameters.pth"
    torch.save(changed(tiny_opt, change), file)
    spec, scheme = spec_of(tiny_opt), Scheme.parse("W4A16")
    with pytest.raises(DataError, match=word) as refusal:
        OmniQuant(parameters=str(file)).resolve(scheme, spec).check(scheme, spec)
    assert str(file) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [b"no parameters", b"hi\n", b"", b"\xda%\xff", pickle.dumps({0: {}}, protocol=4), "half"],
    ids=["text", "short text", "empty", "bytes", "another pickle", "half a file"],
)
def test_other_files_are_refused_in_one_sentence(tiny_opt, tmp_path, content) -> None:
    file = tmp_path / "other.pth"
    if content == "half":
        torch.save(example(tiny_opt), file)
        content = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(content)
    spec, scheme = spec_of(tiny_opt), Scheme.parse("W4A16")
    with pytest.raises(DataError, match=r"other\.pth") as refusal:
        OmniQuant(parameters=str(file)).resolve(scheme, spec).check(scheme, spec)
    assert "\n" not in str(refusal.value) and ".." not in str(refusal.value).replace(str(file), "")


def test_a_file_that_is_not_there_is_said_to_be_missing(tiny_opt, tmp_path) -> None:
    spec, scheme = spec_of(tiny_opt), Scheme.parse("W4A16")
    with pytest.raises(ConfigError, match="No such file"):
        OmniQuant(parameters=str(tmp_path / "absent.pth")).resolve(scheme, spec)


def test_matrices_need_their_stability_factor_and_their_method(tiny_opt, tmp_path) -> None:
    blocks = example(tiny_opt)
    for block in blocks.values():
        block["qkv_smooth_scale"] = torch.eye(HIDDEN)
    torch.save(blocks, tmp_path / "p.pth")
    file, spec, scheme = str(tmp_path / "p.pth"), spec_of(tiny_opt), Scheme.parse("W4A16")
    with pytest.raises(ConfigError, match="Give --sf"):
        AffineQuant(parameters=file).resolve(scheme, spec)
    method = AffineQuant(parameters=file, sf=0.1).resolve(scheme, spec)
    method.check(scheme, spec)
    assert "stability factor 0.1" in method.notes(scheme, spec)[0]
    with pytest.raises(DataError, match="--method affinequant"):
        OmniQuant(parameters=file).resolve(scheme, spec).check(scheme, spec)


def test_options_of_training_beside_a_file_are_refused(tiny_opt, tmp_path) -> None:
    """What the authors' command lines say of a file may stand; a request to train, which nothing would do, may not."""
    torch.save(example(tiny_opt), tmp_path / "p.pth")
    file, spec, scheme = str(tmp_path / "p.pth"), spec_of(tiny_opt), Scheme.parse("W4A16")
    AffineQuant(
        parameters=file, let=True, lwc=True, aug_loss=True, sf=0.1, query_key="published", truncate="all"
    ).resolve(scheme, spec).check(scheme, spec)
    with pytest.raises(ConfigError, match=r"nothing is trained: epochs=3, let_lr=0\.001 would be ignored"):
        OmniQuant(parameters=file, epochs=3, let_lr=1e-3).resolve(scheme, spec)
    with pytest.raises(ConfigError, match="let=False would be ignored"):
        AffineQuant(parameters=file, let=False).resolve(scheme, spec)


def test_grouped_query_attention_has_no_authors_layout(tiny_llama, tokens, tmp_path) -> None:
    torch.save(example(tiny_llama), tmp_path / "p.pth")
    spec, scheme = spec_of(tiny_llama), Scheme.parse("W4A16")
    with pytest.raises(DataError, match="shares key/value heads"):
        OmniQuant(parameters=str(tmp_path / "p.pth")).resolve(scheme, spec).check(scheme, spec)
    lane = make_lane(tiny_llama, "omniquant", "W4A4", epochs=1)
    (result,) = reconstruct_lanes(tiny_llama, tokens, [lane])
    with pytest.raises(ConfigError, match="shares key/value heads"):
        authors.as_authors_write(result.state(0).learned, spec)


def test_a_changed_file_is_another_row(tiny_opt, tmp_path) -> None:
    file, spec, scheme = tmp_path / "p.pth", spec_of(tiny_opt), Scheme.parse("W4A16")
    options = []
    for _ in range(2):
        torch.save(example(tiny_opt), file)
        options.append(OmniQuant(parameters=str(file)).resolve(scheme, spec).parameters)
    assert options[0] != options[1] and all(option.startswith(f"{file}#") for option in options)
    assert OmniQuant(parameters=options[1]).resolve(scheme, spec).parameters == options[1]


def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "write_authors_parameters.py"
    module_spec = importlib.util.spec_from_file_location("write_authors_parameters", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("method", ["omniquant", "affinequant"])
def test_from_a_run_through_the_script_to_the_same_perplexity(build_tiny, tmp_path, method, family) -> None:
    model = build_tiny(family, **({"num_key_value_heads": 4} if family == "llama" else {}))
    folder = model_folders.save(model, tmp_path / "model")
    for name, words in (("calibration", 600), ("evaluation", 200)):
        (tmp_path / f"{name}.txt").write_text(model_folders.text(words, seed=words))
    base = [
        "run", "--model", str(folder), "--method", method, "--scheme", "W4A4", "--nsamples", "3", "--seqlen", "32",
        "--calib-dataset", str(tmp_path / "calibration.txt"), "--eval", f"own={tmp_path / 'evaluation.txt'}",
        "--output", str(tmp_path / "results"),
    ]  # fmt: skip
    sf = ["--sf", "0.1"] if method == "affinequant" else []
    assert CliRunner().invoke(main, [*base, *sf, "--epochs", "1"]).exit_code == 0
    (checkpoint,) = (tmp_path / "results" / "checkpoints").glob(f"{method}-*")
    file = script().main([str(checkpoint), "--model", str(folder), *sf, "-o", str(tmp_path)])
    assert file.name == ("affine_parameters.pth" if sf else "omni_parameters.pth")
    done = CliRunner().invoke(main, [*base, *sf, "--resume", str(file)])
    assert done.exit_code == 0, done.output
    rows = [r for r in ResultStore(tmp_path / "results").load_all() if not r.is_baseline]
    trained, read = sorted(rows, key=lambda row: bool(row.options["parameters"]))
    key = "own/perplexity"
    assert read.metrics[key].value == pytest.approx(trained.metrics[key].value, rel=1e-5)
    assert any("not trained" in note for note in read.notes)

    refused = CliRunner().invoke(main, [*base, "--resume", str(tmp_path / "calibration.txt")])
    assert refused.exit_code == 2 and "calibration.txt" in refused.output
    (wrong := [*base])[4] = "rtn"
    refused = CliRunner().invoke(main, [*wrong, "--resume", str(file)])
    assert refused.exit_code == 2 and "--resume FILE is no option of rtn" in refused.output
