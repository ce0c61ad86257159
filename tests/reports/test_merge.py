"""Merging stores: one rule for conflicts, whatever the order, and no version is ever lost."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from fake_results import make_result, make_run

from qbench.errors import ConfigError, DataError
from qbench.reports.merge import SUPERSEDED, merge
from qbench.results import Result, ResultStore

OLD, NEW = "2026-01-01T00:00:00.000+00:00", "2026-02-01T00:00:00.000+00:00"


def version(created: str = OLD, seconds: float = 1.0, **changes: object) -> Result:
    row = make_result("rtn", **changes)  # type: ignore[arg-type]
    return row.model_copy(
        update={"created": created, "cost": row.cost.model_copy(update={"seconds": seconds})}
    )


def store(folder: Path, *rows: Result) -> Path:
    for row in rows:
        ResultStore(folder).save(row)
    return folder


def everything(folder: Path) -> list[str]:
    """Content of all records, those that stand and those that were superseded."""
    rows = ResultStore(folder).load_all()
    if (folder / SUPERSEDED).is_dir():
        rows += ResultStore(folder / SUPERSEDED).load_all()
    return sorted(row.to_json() for row in rows)


def test_rows_of_both_stores_are_in_the_merged_one(tmp_path: Path) -> None:
    run = make_run()
    a, b = store(tmp_path / "a", *run[:6]), store(tmp_path / "b", *run[4:])
    merged = merge([a, b], tmp_path / "c")
    assert {row.id for row in ResultStore(tmp_path / "c").load_all()} == {row.id for row in run}
    assert merged.conflicts == () and len(merged.results) == len(run)
    assert not (tmp_path / "c" / SUPERSEDED).exists()


def test_the_newest_version_stands_and_the_others_are_kept_in_any_order(tmp_path: Path) -> None:
    rows = [version(OLD, 1.0), version(NEW, 2.0), version(NEW, 3.0), version(OLD, 4.0, extra=0.2)]
    folders = [store(tmp_path / str(i), row) for i, row in enumerate(rows)]
    found = set()
    for i, order in enumerate(itertools.permutations(folders)):
        target = tmp_path / f"merged{i}"
        merged = merge(order, target)
        (standing,) = ResultStore(target).load_all()
        assert standing.created == NEW
        found.add(standing.to_json())
        assert everything(target) == sorted(row.to_json() for row in rows)
        assert len(merged.conflicts[0].versions) == 4 and merged.conflicts[0].difference > 0
    assert len(found) == 1, "of equally new versions the same one stands whatever the order"


def test_what_measured_the_same_is_told_from_what_did_not(tmp_path: Path) -> None:
    a, b = store(tmp_path / "a", version(OLD, 1.0)), store(tmp_path / "b", version(NEW, 2.0))
    assert merge([a, b], tmp_path / "c").conflicts[0].difference == 0
    c = store(tmp_path / "d", version(OLD, 1.0, metrics={}))
    assert merge([a, c], tmp_path / "e").conflicts[0].difference == float("inf")


def test_merging_again_and_in_steps_changes_nothing(tmp_path: Path) -> None:
    rows = [version(OLD, 1.0), version(NEW, 2.0), version(NEW, 3.0)]
    a, b, c = (store(tmp_path / name, row) for name, row in zip("abc", rows, strict=True))
    merge([a, b, c], tmp_path / "at_once")
    merge([c, a], tmp_path / "steps")
    merge([b], tmp_path / "steps")
    merge([tmp_path / "steps", tmp_path / "steps"], tmp_path / "steps")
    assert everything(tmp_path / "steps") == everything(tmp_path / "at_once")
    stands = [ResultStore(tmp_path / name).load_all()[0].to_json() for name in ("steps", "at_once")]
    assert stands[0] == stands[1]


def test_a_damaged_or_missing_source_writes_nothing(tmp_path: Path) -> None:
    a, b = store(tmp_path / "a", version()), store(tmp_path / "b", version(NEW))
    path = next(b.glob("*.json"))
    path.write_text(path.read_text()[:200])
    for broken in (b, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=broken.name):
            merge([a, broken], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_nothing_to_merge_and_a_file_as_target_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no results"):
        merge([tmp_path / "empty"], tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        merge([store(tmp_path / "a", version())], tmp_path / "file")


def test_the_command_says_what_happened(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from qbench.cli import main

    a, b = store(tmp_path / "a", version(OLD)), store(tmp_path / "b", version(NEW, extra=0.3))
    done = CliRunner().invoke(main, ["merge", str(a), str(b), "-o", str(tmp_path / "c")])
    assert done.exit_code == 0 and "1 rows in" in done.stdout and SUPERSEDED in done.stdout
    assert "% apart" in done.stderr and NEW[:19] in done.stderr
    assert CliRunner().invoke(main, ["merge", str(a)]).exit_code == 2
