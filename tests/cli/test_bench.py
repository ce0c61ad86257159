"""`qbench bench` end to end on the embedded model with very short loops, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qbench import bench
from qbench.cli import main
from qbench.latency import Report

SHORT = ["--loop-seconds", "0.001", "--threads", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small cache, so that few copies are rotated, and no measurement of the machine's rates."""
    from qbench.latency import Ceilings

    rates = Ceilings(read_bytes_per_s=1e10, flops={"bfloat16": 1e11, "int8": 1e11})
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 2**18)
    monkeypatch.setattr(bench, "ceilings", lambda backends, device, protocol: rates)


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_times_the_embedded_model(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bench.json"
    request = [*SHORT, "--scheme", "W4A16g128", "--scheme", "W4A4", "--scheme", "W8A16g128", "--tokens", "1",
               "--tokens", "16", "--method", "affinequant", "-o", str(path)]  # fmt: skip
    text = invoke(*request, "--format", "markdown")
    assert "W4A16g128 torch + norm matrix" in text
    assert "int8 arithmetic: 4-bit weights and 4-bit inputs" in text
    assert "W8A16 takes one scale per output channel" in text
    report = Report.model_validate_json(path.read_text())
    found = {(cell.scheme, cell.norm_matrix, cell.status) for cell in report.cells}
    assert found == {
        ("W4A16g128", False, "timed"), ("W4A16g128", True, "timed"), ("W4A4", False, "timed"),
        ("W8A16g128", False, "refused"), ("W8A16g128", True, "refused"),
    }  # fmt: skip
    timed = [cell for cell in report.cells if cell.status == "timed"]
    assert len(timed) == 2 * (3 + 2 + 3)  # batches × (shapes; those after a norm, with the matrix; shapes)
    assert all(cell.product is not None for cell in timed if cell.scheme == "W4A4" or cell.norm_matrix)
    before = path.stat().st_mtime_ns, len(report.cells)
    invoke(*request)  # the same again: nothing is measured twice
    assert len(Report.model_validate_json(path.read_text()).cells) == before[1]
    invoke(*request, "--tokens", "3")  # more: is added
    assert {c.tokens for c in Report.model_validate_json(path.read_text()).cells} == {1, 3, 16}
    assert invoke("--render", "-o", str(path), "--format", "markdown").startswith(report.device)


def test_a_report_of_another_protocol_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    request = ["--scheme", "W8A16", "--tokens", "1", "-o", str(path)]
    invoke(*SHORT, *request)
    text = invoke(*SHORT, *request, "--loop-seconds", "0.002", code=2)
    assert "measured with another protocol" in text and "--restart" in text


def test_a_wrong_kernel_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qbench.deploy.backends.native import Int8Layer

    monkeypatch.setattr(Int8Layer, "product", lambda self, x: x.new_zeros(len(x), self.request.out_features))
    path = tmp_path / "bench.json"
    invoke(*SHORT, "--scheme", "W8A16", "--tokens", "2", "-o", str(path))
    cells = Report.model_validate_json(path.read_text()).cells
    assert {cell.status for cell in cells} == {"wrong"}
    assert all(cell.layer is None and cell.error == 1 for cell in cells)


def test_a_failing_kernel_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qbench.deploy.backends.native import Int8Layer

    def fail(self: object, x: object) -> None:
        raise RuntimeError("no kernel image\nsecond line")

    monkeypatch.setattr(Int8Layer, "product", fail)
    path = tmp_path / "bench.json"
    text = invoke(*SHORT, "--scheme", "W8A16", "--scheme", "W4A4", "--tokens", "2", "-o", str(path))
    assert "RuntimeError: no kernel image" in text
    status = {(cell.scheme, cell.status) for cell in Report.model_validate_json(path.read_text()).cells}
    assert status == {("W8A16", "failed"), ("W4A4", "timed")}


def test_a_kernel_that_breaks_the_process_loses_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qbench import bench
    from qbench.deploy.backends.native import Int8Layer

    broken = []

    def fail(self: object, x: object) -> None:
        broken.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    product = Int8Layer.product
    monkeypatch.setattr(bench, "_broken", lambda device: "AcceleratorError: illegal" if broken else None)
    monkeypatch.setattr(Int8Layer, "product", fail)
    path = tmp_path / "bench.json"
    request = [*SHORT, "--scheme", "W8A16", "--scheme", "W4A4", "--tokens", "2", "-o", str(path)]
    assert "continues behind the cell that failed" in invoke(*request, code=1)
    assert [(c.scheme, c.status) for c in Report.model_validate_json(path.read_text()).cells] == [
        ("W8A16", "failed")
    ]
    broken.clear()  # another process
    monkeypatch.setattr(Int8Layer, "product", product)
    invoke(*request)
    cells = Report.model_validate_json(path.read_text()).cells
    assert sum(cell.status == "failed" for cell in cells) == 1
    assert sum((cell.scheme, cell.status) == ("W4A4", "timed") for cell in cells) == len(cells) / 2


def test_time_limit_keeps_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    text = invoke(*SHORT, "--scheme", "W8A16", "--tokens", "2", "-o", str(path), "--max-minutes", "0.0000001")
    assert "the same command continues" in text
    assert json.loads(path.read_text())["cells"] == []


def test_generation_with_the_packed_model(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    request = [*SHORT, "--end-to-end", "--prompt-tokens", "8", "--new-tokens", "2", "--scheme", "W4A16g128",
               "--scheme", "W4A16g16", "-o", str(path)]  # fmt: skip
    text = invoke(*request, "--format", "markdown")
    assert "tiny-llama, W4A16g16 by torch: Backend torch: int4 kernels take groups" in text
    dense, packed = Report.model_validate_json(path.read_text()).speeds
    assert (dense.backend, packed.backend, packed.scheme) == ("none", "torch", "W4A16g128")
    assert packed.weight_bytes < 0.6 * dense.weight_bytes
    assert min(packed.prefill_tokens_per_s, packed.decode_tokens_per_s) > 0
    invoke(*request)
    assert len(Report.model_validate_json(path.read_text()).speeds) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "hummin"], "Did you mean 'humming'"),
        (["--backend", "humming"], "CUDA devices only. Choose another --backend"),
        (["--shapes", "llama-7"], "Did you mean 'llama-7b'"),
        (["--scheme", "int4"], "Cannot read scheme 'int4'"),
        (["--method", "affinequan"], "Did you mean 'affinequant'"),
        (["--method", "rtn", "--scheme", "W4A16g96"], "group_size=96 does not divide"),
        (["--model", "no-such-model"], "No model 'no-such-model'"),
        (["--tokens", "0"], "0 is not in the range"),
        (["--batch", "2"], "--batch belongs to --end-to-end"),
        (["--end-to-end", "--prompt-tokens", "5000"], "exceed the"),
        (["--end-to-end", "--checkpoint", "nowhere"], "belongs to one --model and one --scheme"),
        (["--end-to-end", "--checkpoint", "nowhere", "--scheme", "W4A16"], "no checkpoint folder"),
        (["--render"], "Cannot read the kernel report"),
        (["--scheme", "W4A16g100"], "does not divide the input width of 256×256 (256), 640×256 (256), 256×640 (640)"),
        (["--slow-seconds", "-1"], "-1.0 is not in the range x>0"),
    ],
    ids=[
        "backend",
        "no GPU",
        "shapes",
        "scheme",
        "method",
        "group",
        "model",
        "tokens",
        "batch",
        "positions",
        "two schemes",
        "checkpoint",
        "nothing to render",
        "group, no method",
        "slow",
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(arguments: list[str], words: str, tmp_path: Path) -> None:
    text = invoke(*arguments, "--device", "cpu", "-o", str(tmp_path / "bench.json"), code=2)
    assert words in text
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.parametrize("restart", [[], ["--restart"]], ids=["again", "restart"])
def test_an_output_that_can_hold_no_report_is_refused_before_any_work(
    tmp_path: Path, restart: list[str]
) -> None:
    text = invoke("-o", str(tmp_path), *restart, code=2)
    assert "is a folder. Name a file" in text
    (tmp_path / "notes.txt").write_text("mine")
    if not restart:
        assert "is no kernel report" in invoke("-o", str(tmp_path / "notes.txt"), code=2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_limit_too_short_for_the_machines_rates_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with the machine's rates
    text = invoke("--slow-seconds", "1e-9", "--device", "cpu", "-o", str(tmp_path / "b.json"), code=2)
    assert "rates cannot be measured in --slow-seconds 1e-09" in text


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "torch sees no CUDA device" in invoke("--device", "cuda", "-o", str(tmp_path / "b.json"), code=2)
