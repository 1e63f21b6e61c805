"""The report in a real browser, at the width of a desktop and of a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from report_browser import Browser, find_chromium
from report_samples import make_arrays, make_record

from isthmus.report import write_report

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)

OVERFLOWING = """[...document.querySelectorAll('body *')].filter(e =>
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    && !e.closest('.scroll')).map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    record = make_record((64, 1))
    record["network"]["name"] = "package.module:a_factory_with_quite_a_long_name_and_no_place_to_break_it"
    record["symmetry"]["pinned"][0]["tensor"] = "features." * 20 + "weight"
    record["settings"]["path"] = "x" * 300
    paths = write_report(record, make_arrays(record), tmp_path_factory.mktemp("report"))
    return paths["report"].as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_opens_from_disk(browser: Browser, address: str, width: int, dark: bool) -> None:
    browser.open(address, width, 844, dark)
    browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.complaints() == []
    assert browser.requests() == [address]
    sizes = browser.evaluate("[...document.images].map(e => [e.complete, e.naturalWidth, e.clientWidth])")
    assert len(sizes) == 14
    assert all(complete and natural == 960 and shown > 250 for complete, natural, shown in sizes)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERFLOWING) == []
    assert (
        browser.evaluate("getComputedStyle(document.querySelector('.panels')).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert browser.evaluate("document.title").startswith("Isthmus report: package.module:")


def test_the_checks_above_can_fail(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><img src="missing.png">'
        '<script>console.error("oops")</script><p style="width: 2000px">wide',
        encoding="utf-8",
    )
    browser.open(page.as_uri(), 390, 844)
    assert any("oops" in complaint for complaint in browser.complaints())
    assert browser.requests() == [page.as_uri(), (tmp_path / "missing.png").as_uri()]
    assert browser.evaluate("document.images[0].naturalWidth") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
    assert len(browser.evaluate(OVERFLOWING)) == 1
