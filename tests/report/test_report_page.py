"""The page: what it says, that nothing in it is taken for markup, and that it loads nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from report_samples import METHODS, make_record

from isthmus.report import _draw_lines, check_record, draw_line
from isthmus.report._draw_lines import barrier_picture, loss_picture
from isthmus.report._format import label, moved_share, number, percent, shorten, with_error
from isthmus.report._page import headline, page


class Outline(HTMLParser):
    """Collect tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        opened = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def html_of(record: dict[str, Any]) -> str:
    return page(check_record(record), [])


def words_of(record: dict[str, Any]) -> str:
    return re.sub(r"\s+", " ", Outline(html_of(record)).text)


def shift_barrier(record: dict[str, Any], method: str, barrier: float) -> None:
    record["methods"][method]["barrier"] = record["methods"][method]["line"]["test"]["barrier"] = barrier


def test_every_section_is_there_and_every_tag_is_closed() -> None:
    outline = Outline(html_of(make_record()))
    assert not outline.open
    ids = {attributes.get("id") for tag, attributes in outline.tags if tag == "section"}
    assert ids == {"compared", "methods", "figures", "symmetry", "limits", "settings"}
    assert [tag for tag, _ in outline.tags].count("h1") == 1


def test_the_page_names_what_was_compared() -> None:
    words = words_of(make_record())
    for expected in (
        "MLP 64-512-512-512-10",
        "563,722 parameters",
        "The straight line between the two networks costs 1.131 nats per example without relabelling",
        "without relabelling and 0.027 after.",
        "The lowest barrier is that of the method “correlation”",
        "3.1×10⁻¹⁶",
        "passed",
        "layers.1.weight",
        "axis 0: offset 0, stride 1, 512 units",
        "reaches an input of the model",
        "aten.linear.default",
        "A permutation that was not found is no proof that there is none",
        "2.13.0",
        '"learning_rate": 0.05',
        "2026-11-23T14:32:12+00:00",
        "98.11 %",
        "ensemble accuracy",
    ):
        assert expected in words, expected


def test_every_method_has_a_row_with_its_numbers() -> None:
    record = make_record()
    html = html_of(record)
    rows = re.findall(r"<tr.*?</tr>", html.split('id="methods"')[1].split("<details>")[0], flags=re.S)
    assert len(rows) == 1 + len(METHODS)
    for method, row in zip(METHODS, rows[1:], strict=True):
        assert label(method) in row
        assert f"{record['methods'][method]['barrier']:.3f} ± " in row
    assert [row.count("lowest") for row in rows] == [0, 0, 0, 0, 0, 0, 1]


def test_a_method_is_also_called_what_users_type() -> None:
    html = html_of(make_record())
    assert '<code class="under">weights-incoming</code>' in html
    assert '<code class="under">weights</code>' in html
    assert '<code class="under">none</code>' not in html
    assert '<code class="under">correlation</code>' not in html


def test_what_methods_have_to_say_is_told_once() -> None:
    record = make_record()
    assert "never vary:" not in words_of(record)
    for name in ("activations", "correlation"):
        record["methods"][name]["notes"] = ["fc: 2 units of A never vary: A [1, <5>]"]
    words = words_of(record)
    assert words.count("fc: 2 units of A never vary: A [1, <5>] (activations, correlation)") == 1
    assert "1 note, such as" in words


def test_only_relabellings_have_a_status() -> None:
    html = html_of(make_record())
    assert html.count('<td class="whole">–</td>') == 1
    assert html.count('<td class="whole">') == len(make_record()["methods"])


def test_settings_that_say_nothing_are_left_out() -> None:
    record = make_record()
    record["settings"] = {"note": "", "refresh": None, "seed": 0}
    words = words_of(record)
    assert "refreshnone seed0" in words
    assert "note" not in words[words.index("Settings and versions") :]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    html = html_of(make_record())
    assert "://" not in html
    for tag, attributes in Outline(html).tags:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in html
    assert "@import" not in html


NASTY = "<script>alert('x')</script> & \"q\" $\\bad{$ {{ 7 * 7 }}"


def test_names_are_never_markup() -> None:
    record = make_record((3,))
    record["network"]["name"] = NASTY
    record["settings"] = {NASTY: NASTY, "deep": {"x": [NASTY]}}
    record["versions"]["machine"] = NASTY
    record["symmetry"]["pinned"][0] |= {"tensor": NASTY, "reason": NASTY, "operator": NASTY, "module": NASTY}
    record["symmetry"]["groups"][0]["slots"][0] = {"tensor": NASTY, "axis": 0, "index": NASTY}
    record["methods"]["weights"]["status"] = NASTY
    record["methods"][NASTY] = record["methods"]["weights"]
    outline = Outline(html_of(record))
    assert not outline.open
    assert "script" not in [tag for tag, _ in outline.tags]
    assert outline.text.count(NASTY) >= 10


def test_a_failed_verification_is_said_aloud() -> None:
    record = make_record((3,))
    record["symmetry"]["verification"]["max_relative_error"] = 0.5
    words = words_of(record)
    assert "failed, so the numbers on this page compare different functions" in words
    assert "passed" not in words


def test_headline_without_any_relabelling() -> None:
    record = make_record((3,))
    record["methods"] = {"none": record["methods"]["none"]}
    words = words_of(record)
    assert "costs 1.131 nats per example without relabelling; no relabelling was tried." in words
    assert "lowest" not in words.split("How to read")[0]


def test_headline_when_nothing_helps() -> None:
    record = make_record((3,))
    for method in METHODS[1:]:
        shift_barrier(record, method, 2.0)
    sentence = headline(check_record(record)).sentence
    assert sentence.endswith("no relabelling tried here lowers that: the best leaves 2.000.")


def test_headline_when_there_is_no_barrier() -> None:
    record = make_record((3,))
    shift_barrier(record, "none", 0.0)
    sentence = headline(check_record(record)).sentence
    assert sentence.startswith("The straight line between the two networks has no barrier to remove")


def test_headline_leaves_out_what_is_unknown() -> None:
    record = make_record((3,))
    record["methods"]["correlation"]["verification_error"] = None
    record["methods"]["correlation"]["moved"] = {}
    explanation = headline(check_record(record)).explanation
    assert explanation.endswith("“correlation”.")


def test_a_network_that_cannot_move_has_a_page() -> None:
    record = make_record(())
    record["symmetry"]["pinned"] = []
    words = words_of(record)
    assert "0 groups of axes can be permuted together" in words
    assert "No axis is pinned." in words


def test_long_lists_start_closed() -> None:
    record = make_record((3,))
    record["symmetry"]["pinned"] *= 10
    record["symmetry"]["groups"][0]["slots"] *= 10
    html = html_of(record)
    assert "<details open>" not in html
    assert "30 axes cannot move" in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.2345, "1.234"),
        (-1.5, "−1.500"),
        (0.0004, "4.0×10⁻⁴"),
        (-2.5e-7, "−2.5×10⁻⁷"),
        (12345.6, "12,345.600"),
        (3e7, "3.0×10⁷"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_small_words() -> None:
    assert with_error(1.0, None) == "1.000"
    assert with_error(1.0, 0.25) == "1.000 ± 0.250"
    assert percent(None) == "–"
    assert percent(0.5, 1) == "50.0\N{NO-BREAK SPACE}%"
    assert label("weights-incoming") == "incoming weights"
    assert label("my own") == "my own"
    assert shorten("a.b") == "a.b"
    assert shorten("x" * 30 + ".weight", 10) == "…xx.weight"


def test_moved_share_weighs_groups_by_their_size() -> None:
    record = check_record(make_record((6, 2)))
    assert moved_share(record, {"layers.0": 1.0, "layers.1": 0.0}) == pytest.approx(0.75)
    assert moved_share(record, {}) is None


def test_the_unit_is_that_of_the_record() -> None:
    record = make_record()
    assert "1.131 nats per example without" in words_of(record)
    record["unit"] = "squared error"
    words = words_of(record)
    assert "costs 1.131 (squared error) without relabelling" in words
    assert "barrier (squared error)" in words
    assert "loss (squared error)" in words
    assert "nats" not in words
    for picture in (loss_picture(check_record(record)), barrier_picture(check_record(record))):
        assert "squared error" in picture.panels[0].alt
        assert "nats" not in picture.panels[0].alt + picture.caption


@pytest.mark.parametrize(("unit", "shown"), [(None, "nats per example"), ("hinge_$loss$", r"hinge_\$loss\$")])
def test_a_line_alone_is_drawn_in_its_unit(
    unit: str | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[str] = []
    monkeypatch.setattr(_draw_lines, "tidy", lambda axes, title, x, y, **rest: labels.append(y))
    curve = make_record()["methods"]["none"]["line"]["test"]
    curves = {"test": {**curve, "ts": curve["t"], "accuracy": None}}
    assert draw_line(curves, "none") if unit is None else draw_line(curves, "none", unit)
    assert labels == [f"loss ({shown})"]
