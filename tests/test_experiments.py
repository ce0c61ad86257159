"""Every file in experiments/ is a request that can be run as it stands, and the papers' are what the recipes say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from qbench.cells import expand, read_sweep
from qbench.config import read_config, read_mapping
from qbench.methods import METHODS
from qbench.models.loading import describe_model
from qbench.reports.published import cells, find
from qbench.reports.recipes import recipe

REPO = Path(__file__).resolve().parents[1]
FILES = sorted((REPO / "experiments").rglob("*.yaml"))
PAPERS = [path for path in FILES if path.parent.name == "papers"]


def script() -> object:
    spec = importlib.util.spec_from_file_location("paper_sweeps", REPO / "scripts/paper_sweeps.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_can_be_read_and_done(path: Path) -> None:
    content = read_mapping(path)
    sweep = {"cells", "models", "include", "exclude", "executor"} & set(content) or isinstance(
        content.get("seeds"), list
    )
    configs = [cell.config for cell in expand(read_sweep(path))] if sweep else [read_config(path)]
    for config in configs:
        described = describe_model("tiny-opt" if "opt" in config.model else "tiny-llama")
        for request in config.methods:
            method = METHODS.load(request.name).model_validate(request.options)
            for scheme in config.parsed_schemes:
                method.resolve(scheme, described.spec).check(scheme, described.spec)


def test_the_papers_files_are_what_the_script_writes() -> None:
    written = script().sweeps()  # type: ignore[attr-defined]
    assert {path.name: path.read_text() for path in PAPERS} == written


def test_every_published_cell_that_qbench_can_make_is_in_a_file() -> None:
    asked = set()
    for path in PAPERS:
        for cell in expand(read_sweep(path)):
            config = cell.config
            options = sorted(map(str, cell.request.options.items()))
            asked.add(
                (config.model, cell.request.name, str(cell.scheme), *options, config.calibration.dataset)
            )
    for published in cells():
        of = recipe(published)
        if of.method in (None, "full-precision"):
            continue
        options = sorted(map(str, of.options.items()))
        assert (of.model, of.method, of.scheme, *options, of.calibration["dataset"]) in asked, published


def test_a_file_asks_for_exactly_what_parity_asks_for() -> None:
    from qbench.parity import Changes, plan

    sweep = read_sweep(REPO / "experiments/papers/affinequant-table-3.yaml")
    of_sweep = {cell.config.hash() for cell in expand(sweep)}
    chosen = [c for c in find("AffineQuant Table 3") if c.dataset == "c4" or c.dataset == "wikitext2"]
    passes, _ = plan(chosen, Changes(), {"output": "results", "seeds": 1}, METHODS.names())
    of_parity = {
        each.config.alone(request, scheme).hash() for each in passes for request, scheme in each.rows.values()
    }
    assert of_parity == of_sweep
