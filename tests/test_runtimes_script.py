"""The export page shows what experiments/exports.json holds, and those figures keep what the page promises."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import runtimes


def test_the_page_is_what_render_makes(tmp_path, monkeypatch) -> None:
    page = runtimes.PAGE.read_text()
    monkeypatch.setattr(runtimes, "PAGE", Path(shutil.copy(runtimes.PAGE, tmp_path / "export.md")))
    runtimes.render()
    assert runtimes.PAGE.read_text() == page


def test_every_folder_dequantizes_to_its_row_and_takes_its_bytes() -> None:
    exports = json.loads(runtimes.DATA.read_text())["exports"]
    assert (
        len(exports) == 17
    )  # two models × (three weight-only rows × two formats + two W8A8 rows), and one AWQ folder
    for export in exports:
        own = export["certificate"]["checks"][0]
        assert (own["runtime"], own["verified"], own["top1_agreement"]) == ("dequantized", True, 1)
        assert own["kl_mean"] < 1e-6
        if export["scheme"] != "W8A8":  # whose row also quantizes attention
            assert export["reloaded"] == pytest.approx(export["perplexity"], rel=1e-3)
        size = export["certificate"]["bytes"]
        assert size["weights"] == pytest.approx(size["expected"], rel=0.02)
        rest = size["norms_and_biases"] + size["embeddings_and_head"]
        assert size["files"] == pytest.approx(size["expected"] + rest, rel=0.02)
