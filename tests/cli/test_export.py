"""`qbench export` and `qbench run --export`: a row becomes a certified folder, or one sentence says why not."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from qbench.cli import main
from qbench.config import RunConfig
from qbench.models.loading import load_model
from qbench.results import Result, ResultStore
from tests import model_folders


def qbench(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def here(tmp_path, build_tiny):
    """Arguments of a run on a tiny model and text of its own, and its results folder."""
    model = model_folders.save(build_tiny("llama", num_key_value_heads=4), tmp_path / "tiny")
    (tmp_path / "calibration.txt").write_text(model_folders.text(600, seed=1))
    (tmp_path / "evaluation.txt").write_text(model_folders.text(300, seed=2))
    arguments = ["run", "--model", model, "--calib-dataset", tmp_path / "calibration.txt", "--nsamples", 2]
    arguments += ["--seqlen", 32, "--eval", f"own={tmp_path / 'evaluation.txt'}", "-o", tmp_path / "results"]
    return arguments, tmp_path / "results"


def test_a_row_is_exported_certified_and_scored_again(here, tmp_path) -> None:
    arguments, results = here
    code, _, errors = qbench(*arguments, "--method", "rtn", "--scheme", "W4A16g16-sym")
    assert code == 0, errors
    code, out, errors = qbench("export", results, "--format", "gptq", "--format", "fake")
    assert code == 0, errors
    folder = results / "exports" / "gptq" / "tiny-RTN-W4A16-g16-sym"
    assert f"{folder} (gptq): verified: dequantized ✓" in out
    assert {
        "config.json",
        "model.safetensors",
        "qbench.json",
        "recipe.yaml",
        "certificate.json",
        "README.md",
    } <= {path.name for path in folder.iterdir()}
    (row,) = [r for r in ResultStore(results).load_all() if not r.is_baseline]
    assert [c.format for c in row.certificates] == ["gptq", "fake"]
    assert "exported as gptq: verified: dequantized ✓" in row.notes
    stored = json.loads((folder / "certificate.json").read_text())
    assert stored == row.certificates[0].model_dump(mode="json")
    assert Result.from_json((folder / "qbench.json").read_text()).metrics == row.metrics
    recipe = RunConfig.model_validate(__import__("yaml").safe_load((folder / "recipe.yaml").read_text()))
    assert (recipe.methods[0].name, recipe.schemes) == ("rtn", ["W4A16g16-sym"])
    card = (folder / "README.md").read_text()
    metric, full = row.metrics["own/perplexity"], ResultStore(results).load_all()[0].metrics["own/perplexity"]
    assert f"| {full.value:.4f} | {metric.value:.4f} | {full.value / metric.value:.2%} |" in card
    assert "| dequantized | float32 | verified |" in card
    # loaded by name, the folder gives the table's number
    assert load_model(str(folder)).packed == "gptq v1, weights 4 bits"
    again = tmp_path / "again"
    code, out, errors = qbench("export", results, "--format", "gptq", "-o", again, "--max-shard-gib", 1e-5)
    assert code == 0, errors
    assert len(list((again / folder.name).glob("*.safetensors"))) > 1
    (row,) = [r for r in ResultStore(results).load_all() if not r.is_baseline]
    assert [c.format for c in row.certificates] == ["fake", "gptq"]


def test_a_run_exports_its_rows(here) -> None:
    arguments, results = here
    code, out, errors = qbench(
        *arguments,
        "--method",
        "rtn",
        "--scheme",
        "W4A16g16",
        "--export",
        "awq",
        "--export",
        "compressed-tensors",
    )
    assert code == 0, errors
    name = "tiny-RTN-W4A16-g16"
    assert sorted(path.parent.name for path in (results / "exports").rglob(name)) == [
        "awq",
        "compressed-tensors",
    ]
    assert "exported as awq: verified: dequantized ✓" in out.replace("\n", " ")


def test_what_runtimes_leave_out_of_a_row_is_said_before_it_is_made(here) -> None:
    arguments, _ = here
    code, _, errors = qbench(
        *arguments, "--method", "rtn", "--scheme", "W8A8", "--export", "compressed-tensors"
    )
    assert code == 0, errors
    said = " ".join(errors.split())
    assert "they compute W8A8KV16; choose that scheme for a row that equals its export" in said
    assert said.index("W8A8KV16") < said.index("done")


def test_what_no_format_holds_is_refused_before_calibration(here) -> None:
    arguments, results = here
    code, out, errors = qbench(
        *arguments, "--method", "affinequant", "--scheme", "W4A16g16", "--export", "gptq"
    )
    assert code == 2 and out == ""
    assert "full matrices remain after the norms at run time" in errors
    assert not results.exists()


def test_what_the_refusal_advises_is_enough(here) -> None:
    arguments, _ = here
    request = [
        *arguments,
        "--method",
        "affinequant",
        "--scheme",
        "W4A16g16",
        "--epochs",
        1,
        "--export",
        "gptq",
    ]
    code, _, errors = qbench(*request)
    options = re.findall(r"--no-[a-z-]+", errors)
    assert code == 2 and options
    code, _, errors = qbench(*request, *options)
    assert code == 0, errors


def test_a_folder_that_was_changed_is_found_out(here) -> None:
    arguments, results = here
    assert qbench(*arguments, "--method", "rtn", "--scheme", "W4A16g16")[0] == 0
    check = ["export", results, "--format", "gptq", "--check"]
    code, _, errors = qbench(*check)
    assert code == 2 and "There is no export" in errors and not (results / "exports").exists()
    assert qbench(*check[:-1])[0] == 0
    (weights,) = (results / "exports").rglob("model.safetensors")
    assert qbench(*check)[0] == 0
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.qzeros"))
    tensors[name][1, 0] += 1  # the zero point of output channel 0 in group 1
    save_file(tensors, weights, metadata={"format": "pt"})
    before = weights.read_bytes()
    code, out, errors = qbench(*check)
    where = "FAILED at layers.1.down_proj (output channel 0, group 1) (dequantized)"
    assert code == 3 and where in errors and where in out
    (row,) = [r for r in ResultStore(results).load_all() if not r.is_baseline]
    assert not row.certificates[0].verified and f"exported as gptq: {where}" in row.notes
    assert json.loads((weights.parent / "certificate.json").read_text()) == row.certificates[0].model_dump(
        mode="json"
    )
    assert weights.read_bytes() == before
    for name, words in (
        ("config.json", "Cannot read"),
        ("qbench.json", "whose export this is cannot be told"),
    ):
        whole = (weights.parent / name).read_text()
        (weights.parent / name).write_text("{")
        code, _, errors = qbench(*check)
        assert code == 2 and words in errors.splitlines()[-1] and name in errors
        (weights.parent / name).write_text(whole)
    assert qbench(*check[:-1])[0] == 0  # written anew
    assert qbench(*check)[0] == 0


def test_a_folder_without_rows_is_refused(tmp_path) -> None:
    code, _, errors = qbench("export", tmp_path, "--format", "gptq")
    assert code == 2 and "holds no quantized row" in errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--method", "rtn"], "Several rows match", id="several"),
        pytest.param(["--method", "gptq"], "No quantized row matches", id="none"),
        pytest.param(["--row", "ffffffff"], "No quantized row matches", id="no such id"),
        pytest.param(["--scheme", "W4A16", "--runtime", "gptqmodel"], "Write NAME=PYTHON", id="runtime"),
    ],
)
def test_a_selection_that_is_not_one_row_is_refused(here, options, words) -> None:
    arguments, results = here
    assert qbench(*arguments, "--method", "rtn", "--scheme", "W4A16", "--scheme", "W3A16")[0] == 0
    code, _, errors = qbench("export", results, "--format", "gptq", *options)
    assert code == 2
    assert words in errors
    assert not (results / "exports").exists()


def test_a_missing_checkpoint_is_said_so(here) -> None:
    import shutil

    arguments, results = here
    assert qbench(*arguments, "--method", "rtn", "--scheme", "W4A16")[0] == 0
    shutil.rmtree(results / "checkpoints")
    code, _, errors = qbench("export", results, "--format", "gptq")
    assert code == 2 and "without its finished blocks there is nothing to export" in errors
    code, _, errors = qbench("export", results / "nowhere", "--format", "gptq")
    assert code == 2 and "There is no results folder" in errors


def test_rows_that_would_share_a_folder_are_refused(here) -> None:
    arguments, _ = here
    code, _, errors = qbench(
        *arguments, "--method", "rtn", "--scheme", "W4A16", "--export", "gptq", "--seeds", 2
    )
    assert code == 2 and "Several rows would be exported to tiny-RTN-W4A16." in errors
