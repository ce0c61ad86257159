import inspect
import io
import re
import sys

import pytest
from fake_results import make_result

from qbench.cli.progress import Estimate, LiveProgress, PlainProgress, listening, memory_text
from qbench.engine.progress import Listener
from qbench.errors import NumericalError
from qbench.results import BlockRecord

LANES = ["rtn W4A4", "affinequant W4A4"]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record(index: int, seconds: float = 2.0, **fields) -> BlockRecord:
    return BlockRecord(index=index, seconds=seconds, **fields)


def play(listener: Listener, clock: Clock, blocks: int = 2) -> None:
    """A small run: load, two lanes over the blocks, evaluation, one row."""
    listener.stage("load", "tiny-llama")
    listener.blocks(blocks, LANES)
    for index in range(blocks):
        listener.block_start(LANES[0], index, resumed=index == 0)
        listener.block_end(LANES[0], record(index, 0.1, accumulated_error=0.25))
        listener.block_start(LANES[1], index, resumed=False)
        for epoch in range(4):
            clock.now += 0.5
            listener.epoch(LANES[1], index, epoch, 4, 0.2 / (epoch + 1))
        notes = ["fell back to float32"] if index == 1 else []
        listener.block_end(LANES[1], record(index, losses=[0.2, 0.05], accumulated_error=0.125, notes=notes))
    listener.stage("evaluate", "wikitext2")
    for done in (8, 16):
        clock.now += 1
        listener.evaluating("affinequant W4A4", done, 16)
    listener.note("attention logits overflow float16")
    listener.row(make_result("affinequant"))
    for outcome in ("done", "stored", "failed"):
        listener.cell("affinequant W4A4", outcome)


def test_every_event_of_the_listener_is_shown() -> None:
    events = {
        name for name, _ in inspect.getmembers(Listener, inspect.isfunction) if not name.startswith("_")
    }
    blocks = {"blocks", "block_start", "epoch", "block_end"}
    assert events == blocks | {"stage", "evaluating", "note", "row", "cell"}
    for shown in (PlainProgress, LiveProgress):
        for name in events:
            ours, theirs = getattr(shown, name), getattr(Listener, name)
            assert ours is not theirs, f"{shown.__name__}.{name}"
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_what_became_of_a_row_is_said_unless_the_row_says_it() -> None:
    clock, stream = Clock(), io.StringIO()
    play(PlainProgress(stream, clock), clock)
    said = [line[9:] for line in stream.getvalue().splitlines()[-2:]]
    assert said == ["stored earlier: affinequant W4A4", "failed: affinequant W4A4"]


def test_plain_lines() -> None:
    clock, stream = Clock(), io.StringIO()
    play(PlainProgress(stream, clock), clock)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[    0s] load  tiny-llama"
    assert lines[1] == "[    0s] block 1/2  rtn W4A4  resumed"
    assert re.fullmatch(
        r"\[  2\.0s\] block 1/2  affinequant W4A4  loss 0\.2 -> 0\.05  error 0\.125  2\.0s  left —  \d+\.\d GiB",
        lines[2],
    )
    assert "block 2/2  rtn W4A4  error 0.25  0.1s  left 2.0s" in lines[3]
    assert "left 0s" in lines[4]
    assert lines[5] == "[  4.0s]   note: fell back to float32"
    assert lines[7:9] == [
        "[  5.0s] evaluate affinequant W4A4  8/16",
        "[  6.0s] evaluate affinequant W4A4  16/16",
    ]
    assert lines[9] == "[  6.0s] note: attention logits overflow float16"
    assert re.fullmatch(r"\[  6\.0s\] done: affinequant W4A4  wikitext2 perplexity \d+\.\d\d", lines[10])
    assert len(lines) == 13


def test_a_long_evaluation_does_not_flood_a_log() -> None:
    clock, stream = Clock(), io.StringIO()
    plain = PlainProgress(stream, clock)
    for done in range(1, 1001):
        clock.now += 0.1
        plain.evaluating("fp", done, 1000)
    lines = stream.getvalue().splitlines()
    assert 9 <= len(lines) <= 12 and lines[-1].endswith("1000/1000")


def test_remaining_time_is_per_lane() -> None:
    estimate = Estimate()
    estimate.begin(4, LANES)
    assert estimate.remaining(0) is None
    estimate.start(LANES[0], 0)
    estimate.end(LANES[0], 0.1, resumed=False)
    assert estimate.remaining(0) is None  # nothing is known of the slow lane
    estimate.start(LANES[1], 0)
    estimate.share = 0.25
    assert estimate.remaining(5) == pytest.approx(3 * 0.1 + 4 * 20 - 5)
    estimate.end(LANES[1], 30, resumed=False)
    assert estimate.remaining(30) == pytest.approx(3 * 0.1 + 3 * 30)
    estimate.start(LANES[0], 30)
    assert estimate.remaining(40) == pytest.approx(2 * 0.1 + 0.0 + 3 * 30, abs=0.11)
    assert estimate.finished == 2


def test_a_running_block_counts_by_its_epochs() -> None:
    clock = Clock()
    plain = PlainProgress(io.StringIO(), clock)
    plain.blocks(1, ["a"])
    plain.block_start("a", 0, False)
    clock.now += 5
    plain.epoch("a", 0, 0, 4, 0.1)
    assert plain.estimate.finished == 0.25 and plain.remaining == "15.0s"


def test_resumed_blocks_do_not_make_the_rest_look_fast() -> None:
    estimate = Estimate()
    estimate.begin(3, ["a"])
    estimate.start("a", 0)
    estimate.end("a", 0.01, resumed=True)
    assert estimate.remaining(0) is None
    estimate.start("a", 0)
    estimate.end("a", 10, resumed=False)
    assert estimate.remaining(10) == 10
    estimate.start("a", 10)
    estimate.end("a", 10, resumed=False)
    assert estimate.remaining(20) == 0


def live(width: int, clock: Clock) -> tuple[LiveProgress, io.StringIO]:
    stream = io.StringIO()
    return LiveProgress(stream, clock, force_terminal=True, width=width, color_system=None), stream


@pytest.mark.parametrize("width", [120, 80, 60])
def test_live_shows_blocks_epochs_loss_time_and_memory(width: int) -> None:
    clock = Clock()
    progress, stream = live(width, clock)
    with progress:
        progress.stage("load", "tiny-llama")
        progress.blocks(4, LANES)
        progress.block_start(LANES[1], 0, False)
        clock.now += 10
        progress.epoch(LANES[1], 0, 4, 20, 0.0123)
        progress.progress.refresh()
        frame = progress.progress.get_renderable()
        progress.progress.console.print(frame)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    for piece in ("1/4", "affinequant W4A4", "epoch 5/20", "loss 0.0123", "10.0s", "GiB"):
        assert piece in " ".join(text.split()), piece


def test_live_time_passes_between_events() -> None:
    clock = Clock()
    progress, stream = live(100, clock)
    with progress:
        progress.blocks(2, ["a"])
        progress.block_start("a", 0, False)
        progress.block_end("a", record(0, 60.0))
        progress.block_start("a", 1, False)
        clock.now += 20
        progress.progress.refresh()
    assert "20.0s  left 40.0s" in stream.getvalue()


def test_live_prints_rows_and_notes_above_and_leaves_the_terminal_usable() -> None:
    clock = Clock()
    progress, stream = live(100, clock)
    with progress:
        play(progress, clock)
    text = stream.getvalue()
    assert "done: affinequant W4A4" in text and "note: attention logits overflow float16" in text
    assert "block 2 affinequant W4A4: fell back to float32" in text
    assert text.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in text[-40:]  # the cursor is back


def test_an_error_stops_the_live_display_first() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with pytest.raises(NumericalError), listening(stream) as listener:
        assert isinstance(listener, LiveProgress)
        listener.blocks(2, LANES)
        raise NumericalError("diverged")
    assert not listener.progress.live.is_started


def test_a_log_gets_plain_lines() -> None:
    with listening(io.StringIO()) as listener:
        assert isinstance(listener, PlainProgress)


def test_memory_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    with_psutil = memory_text()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert re.fullmatch(r"\d+\.\d GiB", memory_text().partition(",")[0])
    assert float(memory_text().split()[0]) >= float(with_psutil.split()[0]) - 0.1


def test_reading_weights_draws_no_bars(tmp_path, build_tiny, capfd) -> None:
    from transformers import AutoModelForCausalLM

    build_tiny("llama").save_pretrained(tmp_path / "model")
    with listening(io.StringIO()):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "Loading weights" not in capfd.readouterr().err
