"""Sweep files: what they expand to, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qbench.cells import expand, idle_exclusions, labels, passes, read_sweep
from qbench.config import RunConfig
from qbench.errors import ConfigError
from qbench.runner import every_row


@pytest.fixture
def sweep(tmp_path):
    """Writes files and reads the first of them: `sweep({"methods": …}, common={…})`."""

    def write(content: dict, overrides: dict | None = None, **others: dict):
        for name, text in {"main": content, **others}.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(text))
        return read_sweep(tmp_path / "main.yaml", overrides)

    return write


GRID = {"methods": ["rtn", "smoothquant"], "schemes": ["w4a4", "W3A16"]}


def pairs(cells) -> list[tuple[str, str]]:
    return [(cell.request.name, str(cell.scheme)) for cell in cells]


def test_a_grid_is_every_combination(sweep) -> None:
    cells = expand(sweep(GRID | {"models": ["a", {"name": "b", "revision": "r"}], "seeds": [5, 7]}))
    assert len(cells) == 16
    assert pairs(cells[:4]) == [
        ("rtn", "W4A4"),
        ("smoothquant", "W4A4"),
        ("rtn", "W3A16"),
        ("smoothquant", "W3A16"),
    ]
    assert [(c.config.model, c.config.revision, c.config.calibration.seed) for c in cells[::4]] == [
        ("a", None, 5), ("a", None, 7), ("b", "r", 5), ("b", "r", 7),
    ]  # fmt: skip
    assert [len(group) for group in passes(cells)] == [4, 4, 4, 4]


def test_a_cell_asks_for_what_a_run_asks_for(sweep) -> None:
    """The same hash, so that a sweep and a run find each other's rows."""
    run = RunConfig.model_validate(
        GRID | {"model": "a", "calibration": {"n_samples": 4}, "compute": {"threads": 1}}
    )
    cells = expand(sweep(GRID | {"model": "a", "calibration": {"n_samples": 4}, "compute": {"threads": 1}}))
    assert [cell.config for cell in cells] == [run.alone(w.request, w.scheme) for w in every_row(run)]


def test_a_list_of_cells_with_settings_of_their_own(sweep) -> None:
    cells = expand(
        sweep({
            "calibration": {"n_samples": 8, "seed": 1},
            "cells": [
                {"method": "rtn", "scheme": "W4A4"},
                {"method": "omniquant", "options": {"epochs": 3}, "scheme": "w2a16g64", "seed": 9, "model": "b",
                 "calibration": {"n_samples": 4}, "compute": {"batch_size": 2}},
            ],
        })
    )  # fmt: skip
    one, other = (cell.config for cell in cells)
    assert (one.model, one.calibration.n_samples, one.calibration.seed, one.compute.batch_size) == (
        "tiny-llama",
        8,
        1,
        1,
    )
    assert (other.model, other.calibration.n_samples, other.calibration.seed) == ("b", 4, 9)
    assert other.schemes == ["W2A16g64"] and other.compute.batch_size == 2
    assert other.methods[0].options == {"epochs": 3}
    assert len(passes(cells)) == 2


def test_a_grid_and_a_list_and_no_cell_twice(sweep) -> None:
    cells = expand(
        sweep(GRID | {"cells": [{"method": "rtn", "scheme": "W4A4"}, {"method": "rtn", "scheme": "W8A8"}]})
    )
    assert len(cells) == 5 and pairs(cells)[-1] == ("rtn", "W8A8")


def test_cells_left_out_of_the_grid(sweep) -> None:
    assert pairs(expand(sweep(GRID | {"exclude": [{"method": "rtn", "scheme": "w3a16"}]}))) == [
        ("rtn", "W4A4"), ("smoothquant", "W4A4"), ("smoothquant", "W3A16"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="exclude leaves out every cell"):
        expand(sweep(GRID | {"exclude": [{"method": "rtn"}, {"method": "smoothquant"}]}))


def test_an_exclusion_that_leaves_nothing_out_is_found(sweep) -> None:
    exclude = [
        {"method": "rtn"},
        {"method": "rtm"},
        {"scheme": "W2A16"},
        {"method": "rtn", "model": "other"},
        {},
    ]
    assert idle_exclusions(sweep(GRID | {"exclude": exclude})) == exclude[1:]


def test_a_number_of_seeds_counts_from_the_seed(sweep) -> None:
    assert sweep(GRID | {"seeds": 3}).seeds == [2, 3, 4]
    assert sweep(GRID | {"seeds": 2, "calibration": {"seed": 7}}).seeds == [7, 8]


def test_an_included_file_lies_under_the_one_that_includes_it(sweep, tmp_path) -> None:
    common = GRID | {
        "calibration": {"n_samples": 4, "seed": 1},
        "cells": [{"method": "rtn", "scheme": "W6A6"}],
    }
    main = {
        "include": "common.yaml",
        "schemes": ["W8A8"],
        "calibration": {"seed": 3},
        "cells": [{"method": "rtn", "scheme": "W2A16"}],
    }
    merged = sweep(main, {"calibration": {"seq_len": 64}, "output": "elsewhere"}, common=common)
    assert (merged.calibration.n_samples, merged.calibration.seed, merged.calibration.seq_len) == (4, 3, 64)
    assert merged.schemes == ["W8A8"] and [m.name for m in merged.methods] == ["rtn", "smoothquant"]
    assert [cell.scheme for cell in merged.cells] == ["W6A6", "W2A16"] and merged.output == "elsewhere"


def test_a_file_that_includes_itself_is_refused(sweep) -> None:
    with pytest.raises(ConfigError, match="includes itself by way of main"):
        sweep({"include": "other.yaml"}, other={"include": ["main.yaml"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "nothing to compute: give methods and schemes, or cells"),
        ({"methods": ["rtn"]}, "methods without schemes: a grid needs both"),
        ({"schemes": ["W4A4"]}, "schemes without methods"),
        (GRID | {"schemes": ["W4B4"]}, "Cannot read scheme 'W4B4'"),
        (GRID | {"sceds": 3}, "unknown key 'sceds'. Did you mean 'seeds'"),
        (GRID | {"seeds": 0}, "at least one is needed"),
        (GRID | {"model": "a", "models": ["b"]}, "model and models say the same thing"),
        (GRID | {"include": 3}, "include in"),
        (GRID | {"include": "absent.yaml"}, "absent.yaml"),
        (GRID | {"calibration": {"n_samples": 0}, "output": ""}, "calibration.n_samples=0"),
        ({"cells": [{"method": "rtn"}]}, "cells.0.scheme is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_sweep_that_cannot_be_read_says_why(sweep, content: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(sweep(content))
    assert message in str(caught.value)


def test_every_problem_is_said_at_once(sweep) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(GRID | {"calibration": {"n_samples": 0}, "output": "", "exectuor": {}})
    assert all(part in str(caught.value) for part in ("n_samples=0", "output=''", "'exectuor'"))
    cells = [
        {"method": "rtn", "scheme": "W4"},
        {"method": "rtn", "scheme": "W4A4", "compute": {"batch_sise": 1}},
    ]
    with pytest.raises(ConfigError) as caught:
        expand(sweep({"cells": cells}))
    assert "cells.0 (rtn W4)" in str(caught.value) and "Did you mean 'batch_size'" in str(caught.value)


def test_labels_say_what_sets_cells_apart_and_no_more(sweep) -> None:
    def names(**content: object) -> list[str]:
        return [cell.label for cell in expand(sweep(content))]

    omni = [
        {"name": "omniquant", "options": {"epochs": 1}},
        {"name": "omniquant", "options": {"epochs": 2, "let": False}},
    ]
    assert names(methods=["rtn", *omni], schemes=["W4A4"]) == [
        "rtn W4A4",
        "omniquant W4A4 epochs=1",
        "omniquant W4A4 epochs=2",
    ]
    assert names(methods=["rtn"], schemes=["W4A4"], models=["x/a", "b"], seeds=2) == [
        "a: rtn W4A4 seed=2", "a: rtn W4A4 seed=3", "b: rtn W4A4 seed=2", "b: rtn W4A4 seed=3",
    ]  # fmt: skip


def test_labels_are_unique_whatever_differs() -> None:
    base = RunConfig.model_validate({"methods": ["rtn"], "schemes": ["W4A4"]})
    configs = [base, base.model_copy(update={"revision": "x"}), base.at_seed(9)]
    configs.append(base.model_copy(update={"compute": base.compute.model_copy(update={"batch_size": 4})}))
    assert len(set(labels(configs))) == 4


def test_a_runs_file_is_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: a\nrevision: r\nmethods: [rtn]\nschemes: [W4A4]\n")
    (cell,) = expand(read_sweep(tmp_path / "run.yaml"))
    assert (cell.config.model, cell.config.revision) == ("a", "r")
    (other,) = expand(read_sweep(tmp_path / "run.yaml", {"models": [{"name": "b"}]}))
    assert (other.config.model, other.config.revision) == ("b", None)
