"""The page: complete, small, safe against what records say, and working in a real browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, find_browser
from fake_results import accuracy, baseline, make_result, make_run, perplexity, window_losses

from qbench.reports.leaderboard import sections
from qbench.reports.page import packed
from qbench.reports.report import render
from qbench.results import BlockRecord, Result, TransformRecord

EVIL = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"'&"


def with_everything(row: Result, model: str = "ref-llama-14m", n_blocks: int = 6) -> Result:
    """A row as a real run leaves it: blocks with training curves, transforms, provenance."""
    learned = row.method in ("omniquant", "affinequant")
    blocks = [
        BlockRecord(
            index=i,
            seconds=1.0,
            losses=[0.3 * 0.9**e + 0.01 * i for e in range(20)] if learned else [],
            local_error=0.01 + 0.001 * i,
            accumulated_error=0.01 * (1 + i),
        )
        for i in range(n_blocks)
    ]
    transform = TransformRecord(
        site="attn_in", kind="matrix", foldable=False, function_preserving=True, stored_bits=9
    )
    return row.model_copy(
        update={
            "id": hashlib.sha256(f"{row.id}{model}".encode()).hexdigest(),
            "model": model,
            "blocks": [] if row.is_baseline else blocks,
            "transforms": [transform] if learned else [],
            "provenance": {"python": "3.11", "packages": {"torch": "2.13.0"}},
            "calibration": {"dataset": "wikitext2", "seed": 2},
            "config": {"model": model, "compute": {"device": "cpu"}},
        }
    )


def page_of(rows: list[Result]) -> str:
    return render(sections(rows), "html")


def data_of(page: str) -> dict:
    return json.loads(
        unpacked(re.search(r'<script type="text/plain" id="data">(.*?)</script>', page, re.S)[1])
    )


@pytest.fixture(scope="module")
def thousand() -> list[Result]:
    """A store as large as any: ten models of 32 blocks, four methods, schemes and option settings enough, 8 metrics."""
    names = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
    tasks = {f"{name}/acc": accuracy(i, 0.6, f"{name} (0-shot)") for i, name in enumerate(names)}
    methods = ("rtn", "smoothquant", "omniquant", "affinequant")
    drawn = []
    for i in range(40):
        row = with_everything(make_result(methods[i % 4], extra=0.1 + 0.01 * i, seed=i), n_blocks=32)
        metrics = {**row.metrics, "c4/perplexity": row.metrics["wikitext2/perplexity"], **tasks}
        drawn.append(row.model_copy(update={"metrics": metrics}))
    return [
        drawn[i % 40].model_copy(
            update={
                "id": hashlib.sha256(str(i).encode()).hexdigest(),
                "model": f"org/model-{i % 10}",
                "method": methods[i // 10 % 4],
                "scheme": ("W4A4", "W3A16", "W4A16g128")[i // 40 % 3],
                "options": {"alpha": i // 120, "epochs": 20},
                "notes": ["a note of a row"] if i % 3 else [],
                "bits_per_weight": 3 + i % 7 / 10,
            }
        )
        for i in range(1000)
    ]


def unpacked(text: str) -> str:
    return gzip.decompress(base64.b64decode(text)).decode()


class Elements(HTMLParser):
    """Every element with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_in_the_page_points_elsewhere() -> None:
    page = page_of([with_everything(row) for row in make_run(tasks=7)])
    for tag, attributes in Elements(page).found:
        assert tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "data", "poster"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:,")), (tag, attributes)
    assert "default-src 'none'" in page and not re.search(r"url\((?!data)", page)


def test_what_records_say_is_text_and_nothing_else() -> None:
    row = make_result(EVIL, options={EVIL: EVIL, "__proto__": 1}, notes=[EVIL], contract_fields={EVIL: EVIL})
    row = row.model_copy(update={"model": EVIL, "provenance": {EVIL: EVIL}, "config": {EVIL: EVIL}})
    metric = perplexity(window_losses(1), EVIL)
    row = row.model_copy(update={"metrics": {f"{EVIL}/perplexity": metric}})
    block = BlockRecord(index=0, seconds=1, losses=[1.0, 0.5], local_error=0.1, accumulated_error=0.2)
    other = make_result(
        "b" + EVIL, model=EVIL, metrics=row.metrics, blocks=[block], contract_fields={EVIL: EVIL}
    )
    page = page_of([row, other])
    elements = Elements(page).found
    assert [tag for tag, _ in elements].count("script") == 2
    assert not any(tag == "img" or any(key.startswith("on") for key in attrs) for tag, attrs in elements)
    data = data_of(page)
    assert data["rows"][row.id]["notes"] == [EVIL] and data["rows"][row.id]["options"][EVIL] == EVIL


def test_packed_data_has_no_character_that_html_knows_and_no_nan() -> None:
    text = packed({"a": "</script><!--", "b": [math.inf, math.nan, -1.5], "c": {"d": 1e400}})
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    assert json.loads(unpacked(text)) == {"a": "</script><!--", "b": ["∞", "—", -1.5], "c": {"d": "∞"}}


def test_every_record_is_there_with_its_intervals_contract_and_notes() -> None:
    rows = [with_everything(row) for row in make_run(tasks=3)]
    page = page_of(rows)
    data = data_of(page)
    assert set(data["rows"]) == {row.id for row in rows}
    row = next(r for r in rows if r.method == "affinequant" and r.scheme == "W3A16")
    record = data["rows"][row.id]
    assert record["metrics"]["wikitext2/perplexity"]["text"].count("±") == 1
    assert "±" in record["metrics"]["wikitext2/perplexity"]["ratio"]
    assert record["contract"] == row.contract and row.contract in page
    assert any("full matrices" in note for note in record["notes"])
    assert len(record["blocks"]["accumulated"]) == 6 and len(record["blocks"]["losses"]) == 3
    assert {"affinequant", "omniquant", "smoothquant"} <= set(re.findall(r"@\w+\{(\w+):", data["bibtex"]))
    assert data["csv"].count("\n") == len(rows) + 1 and r"\toprule" in data["latex"]


def test_plots_are_there_when_there_is_something_to_plot() -> None:
    rows = [with_everything(row) for row in make_run()]
    titles = re.findall(r"<figcaption><b>(.*?)</b>", page_of(rows))
    assert titles == [
        "Quality against effective bits",
        "Block errors at W4A4",
        "Block errors at W3A16",
        "Training at W4A4",
        "Training at W3A16",
    ]
    bare = [make_result("rtn", bits_per_weight=None, metrics={}), baseline(metrics={})]
    assert "<figure>" not in page_of(bare)


def test_effects_of_single_options_have_intervals() -> None:
    base = {"lwc": True, "let": True, "epochs": 20}
    changes = [({}, 0.1), ({"lwc": False}, 0.2), ({"let": False}, 0.4), ({"lwc": False, "let": False}, 0.5)]
    rows = [
        make_result("affinequant", extra=extra, seed=i, options=base | change)
        for i, (change, extra) in enumerate(changes)
    ]
    page = page_of([baseline(), *rows])
    figure = re.search(r"Options of affinequant at W4A4.*?</figure>", page, re.S)
    assert figure is not None
    said = re.findall(r"<title>(lwc|let)=false: ([\d.]+) \[([\d.]+), ([\d.]+)\]", figure[0])
    assert [name for name, *_ in said] == ["let", "lwc"], "two options at once are no effect of one"
    for _, value, low, high in said:
        assert float(low) < float(value) < float(high)
    # Independent: exp of the mean difference of the losses.
    items = [row.metrics["wikitext2/perplexity"].items or [] for row in rows]
    difference = sum(a - b for a, b in zip(items[1], items[0], strict=True)) / len(items[0])
    assert float(said[1][1]) == pytest.approx(100 * (math.exp(difference) - 1), rel=1e-3)


@pytest.fixture(scope="module")
def large(thousand: list[Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 500 rows."""
    path = tmp_path_factory.mktemp("page") / "large.html"
    path.write_text(page_of(thousand[:500]), encoding="utf-8")
    return path


def test_500_rows_stay_under_3_megabytes(large: Path) -> None:
    assert large.stat().st_size < 3_000_000


def test_1000_rows_render_within_5_seconds(thousand: list[Result]) -> None:
    started = time.process_time()
    page_of(thousand)
    assert time.process_time() - started < 5


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("NO BROWSER: the page was not opened; install chromium or set QBENCH_BROWSER")
    with Browser(program) as running:
        yield running


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    rows = [with_everything(row) for row in make_run(tasks=7)]
    rows += [with_everything(row, "opt-125m") for row in make_run(("W4A4",))]
    path.write_text(page_of(rows), encoding="utf-8")
    return path


SHOWN = "[...document.querySelectorAll('#leaderboard tbody tr')].filter((r) => !r.hidden)"


def header(title: str) -> str:
    return (
        f"[...document.querySelectorAll('#leaderboard th button')].find((b) => b.textContent === '{title}')"
    )


def test_browser_sorts_both_ways_and_keeps_what_is_missing_last(browser: Browser, small: Path) -> None:
    browser.open(small)
    column = browser.run(f"Number({header('recovery %')}.dataset.column)")
    values = f"{SHOWN}.map((r) => r.cells[{column}].dataset.v)"
    for sign in (-1, 1):
        browser.run(f"{header('recovery %')}.click()")
        found = browser.run(values)
        numbers = [float(value) for value in found if value != ""]
        assert numbers == sorted(numbers, reverse=sign < 0) and len(numbers) == 12
        assert found[-2:] == ["", ""]
        word = "descending" if sign < 0 else "ascending"
        assert browser.run(f"{header('recovery %')}.parentElement.getAttribute('aria-sort')") == word
    browser.run(f"{header('method')}.click()")
    names = browser.run(f"{SHOWN}.map((r) => r.dataset.method)")
    assert names == sorted(names)
    assert browser.complaints == []


def test_browser_filters(browser: Browser, small: Path) -> None:
    browser.open(small)
    browser.run(
        "f = document.getElementById('find'); f.value = 'omni w3a16'; f.dispatchEvent(new Event('input'))"
    )
    assert browser.run(f"{SHOWN}.map((r) => [r.dataset.method, r.dataset.scheme])") == [
        ["omniquant", "W3A16"]
    ]
    assert browser.run("document.getElementById('count').textContent") == "1 of 14 rows"
    browser.run("f.value = ''; f.dispatchEvent(new Event('input'))")
    browser.run(
        "s = document.querySelector('[data-filter=model]'); s.value = 'opt-125m'; s.dispatchEvent(new Event('change'))"
    )
    assert len(browser.run(f"{SHOWN}.map((r) => 1)")) == 5
    browser.run("document.getElementById('front').click()")
    assert set(browser.run(f"{SHOWN}.map((r) => r.className)")) == {"front"}
    assert browser.complaints == []


def test_browser_opens_a_row_by_keyboard_and_goes_nowhere(browser: Browser, small: Path) -> None:
    browser.open(small)
    browser.run(f"{SHOWN}[1].querySelector('button.open').focus()")
    browser.key("Enter")
    assert browser.run("document.getElementById('record').open")
    text = browser.run("document.getElementById('record').innerText")
    for words in (
        "affinequant",
        "Measurements",
        "±",
        "Contract",
        "3f9a1c77",
        "Training loss",
        "attn_in",
        "torch",
    ):
        assert words in text, words
    browser.key("Escape")
    assert not browser.run("document.getElementById('record').open")
    browser.run(
        "document.querySelector('svg [data-row]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert browser.run("document.getElementById('record').open")
    assert browser.requests == [small.resolve().as_uri()] and browser.complaints == []


def test_browser_reaches_everything_with_the_tab_key(browser: Browser, small: Path) -> None:
    browser.open(small)
    reached = set()
    for _ in range(40):
        browser.key("Tab")
        name = "document.activeElement.id || document.activeElement.className || document.activeElement.textContent"
        reached.add(browser.run(name))
    assert {"CSV", "LaTeX", "BibTeX", "theme", "find", "front", "method", "open"} <= reached


def test_browser_downloads_what_the_buttons_promise(browser: Browser, small: Path) -> None:
    browser.open(small)
    browser.run(
        "saved = []; make = URL.createObjectURL; URL.createObjectURL = (b) => { saved.push(b.text()); return make(b) };"
        "HTMLAnchorElement.prototype.click = function () { saved.push(this.download) };"
        "document.querySelectorAll('[data-download]').forEach((b) => b.click());"
        "new Promise((done) => setInterval(() => saved.length === 6 && done(), 5))"
    )
    saved = browser.run("Promise.all(saved)")
    assert {text for text in saved if text.startswith("qbench.")} == {
        "qbench.csv",
        "qbench.tex",
        "qbench.bib",
    }
    for start in ("model,method,scheme", r"% \usepackage", "@"):
        assert any(text.startswith(start) for text in saved), start


def test_browser_fits_a_phone_in_light_and_dark(browser: Browser, small: Path) -> None:
    browser.open(small)
    try:
        browser.resize(390, 844)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        wide = browser.run(
            f"{SHOWN}.flatMap((r) => [...r.cells]).filter((c) => c.getBoundingClientRect().right > 390).length"
        )
        assert wide == 0
        ground = "getComputedStyle(document.body).backgroundColor"
        before = browser.run(ground)
        browser.run("document.getElementById('theme').click()")
        assert browser.run(ground) != before
        browser.run(f"{SHOWN}[2].click()")
        assert browser.run("document.getElementById('record').getBoundingClientRect().right") <= 390
        assert (
            browser.run("document.querySelector('#record header button').getBoundingClientRect().height") < 50
        )
        assert browser.run(f"getComputedStyle({SHOWN}[2].cells[0]).textAlign") == "left"
    finally:
        browser.run("localStorage.clear()")
        browser.resize(1280, 900)


def test_browser_runs_nothing_that_a_record_says(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "evil.html"
    rows = [make_result(EVIL, options={EVIL: EVIL}, notes=[EVIL]), make_result("b", notes=[EVIL])]
    path.write_text(page_of([row.model_copy(update={"model": EVIL}) for row in rows]), encoding="utf-8")
    browser.open(path)
    browser.run(f"{SHOWN}[0].click()")
    assert EVIL in browser.run("document.getElementById('record').innerText")
    assert browser.run("window.hacked === undefined")
    assert browser.requests == [path.resolve().as_uri()] and browser.complaints == []


def test_browser_sorts_500_rows_within_100_ms(browser: Browser, large: Path) -> None:
    browser.open(large)
    times = [
        browser.busy(f"document.querySelector('#leaderboard th button[data-column=\"{column}\"]').click()")
        for column in range(8)
    ]
    assert max(times) < 100, times  # sorted, and laid out again
    assert browser.run("document.querySelectorAll('#leaderboard tbody tr').length") == 500


def test_browser_shows_all_rows_to_whoever_scrolls_or_prints(browser: Browser, large: Path) -> None:
    browser.open(large)
    assert 60 <= len(browser.run(f"{SHOWN}.map((r) => 1)")) < 500
    browser.run("document.getElementById('more').click()")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert len(browser.run(f"{SHOWN}.map((r) => 1)")) == 500
    assert browser.run("document.getElementById('more').hidden")
