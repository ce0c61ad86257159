"""act_scales and act_shifts: what is written is what is observed, and what is read takes its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from qbench.cli import main
from qbench.engine import attention
from qbench.engine.channel_files import ChannelFiles, read_channels, write_channels
from qbench.engine.reconstruct import reconstruct
from qbench.engine.settings import EngineSettings
from qbench.errors import ConfigError, DataError
from qbench.results import ResultStore
from tests import model_folders
from tests.blocks import blocks_of
from tests.tiny_runs import linear_inputs, make_lane, spec_of

PATHS = {"llama": "model.layers", "opt": "model.decoder.layers"}


def observed(model: nn.Module, tokens: Tensor, files: ChannelFiles, **options):
    model.set_attn_implementation(attention.register())
    lane = make_lane(model, "smoothquant", "W4A4", **options)
    settings = EngineSettings(device=torch.device("cpu"), placement="cpu")
    (result,) = reconstruct(
        model, list(blocks_of(model)), spec_of(model), [lane], tokens, settings, files=files
    )
    return result


def write(model: nn.Module, tokens: Tensor, folder: Path, family: str) -> list[Path]:
    files = ChannelFiles(keep=True)
    observed(model, tokens, files)
    return write_channels(folder, "tiny", files, spec_of(model), PATHS[family])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_files_hold_what_reaches_every_linear_under_its_module_name(
    build_tiny, tokens, tmp_path, family
) -> None:
    model = build_tiny(family)
    scales, shifts = write(model, tokens, tmp_path, family)
    assert (scales, shifts) == (tmp_path / "act_scales" / "tiny.pt", tmp_path / "act_shifts" / "tiny.pt")
    found, centres = torch.load(scales, weights_only=True), torch.load(shifts, weights_only=True)
    modules = dict(model.named_modules())
    for index, inputs in enumerate(linear_inputs(model, tokens)):
        for role, x in inputs.items():
            name = f"{PATHS[family]}.{index}.{spec_of(model).linears[role]}"
            assert isinstance(modules[name], nn.Linear)
            assert torch.allclose(found[name], x.abs().amax((0, 1)), rtol=1e-4)
            centre = (x[0].amax(0) + x[0].amin(0)) / 2
            for window in x[1:]:
                centre = 0.99 * centre + 0.01 * (window.amax(0) + window.amin(0)) / 2
            assert torch.allclose(centres[name], centre, rtol=1e-4, atol=1e-5)
    assert len(found) == len(centres) == 2 * len(spec_of(model).linears)


def test_what_is_read_takes_the_place_of_what_is_observed(tiny_opt, tokens, tmp_path) -> None:
    (scales, _), spec = write(tiny_opt, tokens, tmp_path, "opt"), spec_of(tiny_opt)
    plain = observed(tiny_opt, tokens, ChannelFiles())
    same = observed(tiny_opt, tokens, ChannelFiles(read_channels(str(scales), spec, PATHS["opt"])))
    norm = plain.state(1).rest.norm_weight["mlp_norm"]
    assert torch.equal(same.state(1).rest.norm_weight["mlp_norm"], norm)
    doubled = {name: 4 * values for name, values in torch.load(scales, weights_only=True).items()}
    torch.save(doubled, scales)
    changed = observed(
        tiny_opt, tokens, ChannelFiles(read_channels(str(scales), spec, PATHS["opt"])), alpha=0.5
    )
    # the scale is a^½ / w^½, and the norm's weight is divided by it
    assert torch.allclose(changed.state(1).rest.norm_weight["mlp_norm"], norm / 2, rtol=1e-5)


class Harmless:
    """An object that no file should bring along."""


QUERY = "model.decoder.layers.1.self_attn.q_proj"
BAD = [
    pytest.param(lambda d: d.pop(QUERY), f"lacks {QUERY}", id="missing"),
    pytest.param(
        lambda d: d.update({QUERY: torch.ones(31)}), r"shape \[31\], this model needs \[32\]", id="shape"
    ),
    pytest.param(lambda d: d.update({QUERY: torch.full((32,), torch.inf)}), "not finite", id="infinite"),
    pytest.param(
        lambda d: d.update({QUERY.replace("1", "7"): torch.ones(32)}), "names block 7", id="another model"
    ),
    pytest.param(lambda d: d.update({QUERY: Harmless()}), "Python objects", id="pickled object"),
    pytest.param(lambda d: d.update({QUERY: 3.0}), "no dictionary of tensors", id="number"),
]


@pytest.mark.parametrize(("change", "word"), BAD)
def test_a_file_that_does_not_fit_is_refused(tiny_opt, tokens, tmp_path, change, word) -> None:
    scales, _ = write(tiny_opt, tokens, tmp_path, "opt")
    content = torch.load(scales, weights_only=True)
    change(content)
    torch.save(content, scales)
    with pytest.raises(DataError, match=word) as refusal:
        read_channels(str(scales), spec_of(tiny_opt), PATHS["opt"])
    assert "tiny.pt" in str(refusal.value)
    scales.write_text("hi")
    with pytest.raises(DataError, match=r"was not written by torch\.save, or is damaged"):
        read_channels(str(scales), spec_of(tiny_opt), PATHS["opt"])
    with pytest.raises(ConfigError, match="Cannot read channel file"):
        read_channels(str(tmp_path / "absent.pt"), spec_of(tiny_opt), PATHS["opt"])


def test_the_command_line_writes_and_reads_them(tiny_opt, tmp_path) -> None:
    folder = model_folders.save(tiny_opt, tmp_path / "tiny")
    for name, words in (("calibration", 600), ("evaluation", 200)):
        (tmp_path / f"{name}.txt").write_text(model_folders.text(words, seed=words))
    base = [
        "run", "--model", str(folder), "--method", "smoothquant", "--scheme", "W4A4", "--nsamples", "3", "--seqlen",
        "32", "--calib-dataset", str(tmp_path / "calibration.txt"), "--eval", f"own={tmp_path / 'evaluation.txt'}",
        "--output", str(tmp_path / "results"),
    ]  # fmt: skip
    for _ in range(2):  # the second time from finished blocks, which nothing is observed of
        written = CliRunner().invoke(main, [*base, "--save-act-scales", str(tmp_path / "ranges")])
        assert written.exit_code == 0, written.output
        (scales,) = (tmp_path / "ranges" / "act_scales").glob("*.pt")
        assert (tmp_path / "ranges" / "act_shifts" / scales.name).is_file()
        kept = torch.load(scales, weights_only=True)
        scales.unlink() if _ == 0 else None
    torch.save({name: 2 * values for name, values in kept.items()}, scales)
    read = CliRunner().invoke(main, [*base, "--act-scales", str(scales)])
    assert read.exit_code == 0, read.output
    rows = [row for row in ResultStore(tmp_path / "results").load_all() if not row.is_baseline]
    assert len(rows) == 2 and rows[0].contract != rows[1].contract
    assert rows[0].metrics["own/perplexity"].value != rows[1].metrics["own/perplexity"].value
    refused = CliRunner().invoke(main, [*base, "--act-shifts", str(tmp_path / "calibration.txt")])
    assert refused.exit_code == 2 and "calibration.txt" in refused.output
