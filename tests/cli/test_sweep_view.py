"""The view of a sweep: plain lines for a log, a table in a terminal."""

from __future__ import annotations

import io

import pytest
from fake_results import make_result

from qbench.cells import expand, read_sweep
from qbench.cli.sweep_view import LiveSweepView, SweepView, watching
from qbench.executors import Job


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def play(view: SweepView, clock: Clock) -> None:
    """Three cells: one done, one failed, one in the middle of its second block."""
    cells = expand(read_sweep(None, {"methods": ["rtn", "omniquant", "affinequant"], "schemes": ["W4A4"]}))
    job = Job(tuple(cells))
    view.begin(cells)
    view.said(job, {"event": "stage", "name": "load", "detail": "tiny-llama"})
    view.said(job, {"event": "blocks", "total": 4, "lanes": [cell.label for cell in cells]})
    clock.now = 2.0
    for index in range(2):
        view.said(job, {"event": "block_start", "lane": "affinequant W4A4", "index": index, "resumed": False})
        epoch = {"index": index, "epoch": 0, "epochs": 20, "loss": 0.5}
        view.said(job, {"event": "epoch", "lane": "affinequant W4A4", **epoch})
        if index == 0:
            record = {"index": 0, "seconds": 3.0, "accumulated_error": 0.25}
            view.said(job, {"event": "block_end", "lane": "affinequant W4A4", "record": record})
    view.said(
        job, {"event": "evaluating", "lane": "full-precision", "done": 1, "total": 2}
    )  # no cell of ours
    view.said(job, {"event": "note", "text": "1 rows are being computed by another process: waiting for it"})
    view.settled(cells[0], "done", "", make_result("rtn"))
    view.settled(cells[1], "failed", "block 0: The loss became nan", None)
    view.tick()


def test_plain_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    with SweepView(stream, clock) as view:
        play(view, clock)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["[    0s] 3 cells", "[    0s] load tiny-llama"]
    assert lines[2] == "[  2.0s] affinequant W4A4  block 1/4  error 0.25"
    assert lines[3].startswith("[  2.0s] note: 1 rows are being computed")
    assert lines[4].startswith("[  2.0s] (1/3) done: rtn W4A4  wikitext2 perplexity 2")
    assert lines[5] == "[  2.0s] (2/3) FAILED: omniquant W4A4  block 0: The loss became nan"
    assert len(lines) == 6


def test_the_table_says_what_every_cell_does() -> None:
    stream, clock = io.StringIO(), Clock()
    with LiveSweepView(stream, clock, width=100, height=40, force_terminal=True, color_system=None) as view:
        play(view, clock)
        view.console.print(view.table())
        shown = stream.getvalue()
    assert "▸ affinequant W4A4 ━━━" in shown and "3.0s" in shown
    assert "block 2/4  epoch 1/20  loss 0.5" in shown
    assert "✓ rtn W4A4" in shown and "✗ omniquant W4A4" in shown
    assert "2/3 cells" in shown and "load tiny-llama" in shown


def test_a_table_that_does_not_fit_shows_what_is_running_and_counts_the_rest() -> None:
    stream, clock = io.StringIO(), Clock()
    view = LiveSweepView(stream, clock, width=100, height=9, force_terminal=True, color_system=None)
    schemes = [f"W{bits}A{other}" for bits in (2, 3, 4, 5, 6) for other in (4, 6, 8)]
    cells = expand(read_sweep(None, {"methods": ["rtn"], "schemes": schemes}))
    view.begin(cells)
    job = Job(tuple(cells))
    view.said(job, {"event": "block_start", "lane": cells[-1].label, "index": 0, "resumed": False})
    view.console.print(view.table())
    shown = stream.getvalue()
    assert "▸ rtn W6A8" in shown and "0/15 cells (11 not shown)" in shown
    view.console.print(view.table(whole=True))
    assert all(cell.label in stream.getvalue() for cell in cells)


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log"])
def test_the_form_follows_the_stream(terminal: bool) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    with watching(stream) as view:
        assert isinstance(view, LiveSweepView) is terminal
