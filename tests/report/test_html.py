"""The page: what is in it, by parsing it; how it behaves, in Chromium where there is one."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from rella.report import html, svg
from rella.report.contents import Chart, Column, HeatRow, Point, Report, Row, Section, Series, Table, Value
from rella.report.markdown import plain
from tests.report import chromium
from tests.report.example import (
    ATTENTION,
    CALIBRATION,
    HOSTILE,
    LENGTHS,
    PATH,
    REPORT,
    SHORT,
    SHOTS,
    TABLE2,
    TABLE3,
)

VOID = {"meta", "link", "br"}


@dataclasses.dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    children: list[Node | str] = dataclasses.field(default_factory=list)

    def all(self, tag: str = "", **attributes: str) -> list[Node]:
        """Return the elements below: by tag, by attributes, `class_` by one of the classes."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if child.matches(tag, attributes):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def matches(self, tag: str, attributes: dict[str, str]) -> bool:
        wanted = dict(attributes)
        kind = wanted.pop("class_", None)
        return (
            tag in ("", self.tag)
            and (kind is None or kind in (self.attributes.get("class") or "").split())
            and all(self.attributes.get(key.replace("_", "-")) == value for key, value in wanted.items())
        )

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Node("", {})
        self.stack = [self.root]
        self.feed(page)
        self.close()
        assert self.stack == [self.root], "an element is not closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        node = Node(tag, dict(attrs))
        self.stack[-1].children.append(node)
        if tag not in VOID:
            self.stack.append(node)

    def handle_endtag(self, tag):
        assert self.stack.pop().tag == tag, f"{tag} closes something else"

    def handle_data(self, data):
        self.stack[-1].children.append(data)


def parse(*blocks: object, **changes: object) -> Node:
    report = Report("T", "", (), (Section("S", "", blocks),), **changes)
    return Tree(html.page(report)).root


@pytest.fixture(scope="module")
def text() -> str:
    return html.page(REPORT)


@pytest.fixture(scope="module")
def root(text) -> Node:
    return Tree(text).root


def test_everything_has_its_place(root):
    assert len(root.all("table", class_="sortable")) == 2
    assert len(root.all("svg", class_="chart")) == 3
    assert len(root.all("div", class_="heatrow")) == sum(len(heat.rows) for heat in (ATTENTION, SHORT))
    assert [h.text for h in root.all("h3")] == [block.title for block in REPORT.blocks]
    assert [h.text for h in root.all("main")[0].all("h2")] == [*(s.title for s in REPORT.sections), "Artifacts"]
    assert root.all("h1")[0].text == root.all("title")[0].text == REPORT.title
    facts = root.all("dl", class_="facts")[0]
    assert [(d.all("dt")[0].text, d.all("dd")[0].text) for d in facts.all("div")] == list(REPORT.facts)
    assert PATH in [code.text for code in root.all("code")]


def test_the_contents_lead_to_all_parts_and_anchors_differ(root):
    anchors = [node.attributes["id"] for node in root.all() if "id" in node.attributes]
    assert len(anchors) == len(set(anchors))
    links = [a.attributes["href"] for a in root.all("nav")[0].all("a")]
    assert len(links) == len(REPORT.sections) + len(REPORT.blocks) + 1
    assert {link.removeprefix("#") for link in links} <= set(anchors)


def test_blocks_of_one_name_have_anchors_of_their_own():
    root = parse(TABLE3, TABLE3, SHORT)
    ids = [figure.attributes["id"] for figure in root.all("figure")]
    assert ids == ["table3", "table3-2", "figure8b"]


def test_every_number_is_there(root):
    said = root.all("main")[0].text
    for table in (TABLE2, TABLE3):
        for row in table.rows:
            for column in table.columns:
                if isinstance(cell := row.cells.get(column.key), Value):
                    wanted = [cell.value, cell.spread, cell.paper, *cell.seeds]
                    for number in (n for n in wanted if n is not None):
                        assert format(number, column.form) in said
    for chart in (SHOTS, LENGTHS, CALIBRATION):
        for series in chart.series:
            for point in (*series.points, *series.paper):
                assert plain(point.y) in said
    tips = [cell.attributes["title"] for cell in root.all("li", class_="cell")]
    rows = [*ATTENTION.rows, *SHORT.rows]
    assert tips == [f"{n}\n{plain(v)}" for row in rows for n, v in zip(row.labels, row.values, strict=True)]


def test_nothing_of_the_report_becomes_markup(root, text):
    assert len(root.all("script")) == 1
    assert not root.all("img")
    assert "<script>alert" not in text
    assert not [name for node in root.all() for name in node.attributes if name.startswith("on")]
    # Title, caption, row, series, heat row, label, fact, artifact: all shown as they are.
    assert root.all("main")[0].text.count(HOSTILE) >= 8
    assert any(HOSTILE in (node.attributes.get("title") or "") for node in root.all("li"))


def test_nothing_is_loaded(root, text):
    assert not re.search(r"https?://", text.replace("http://www.w3.org/", ""))
    for node in root.all():
        for name in ("src", "srcset", "href", "xlink:href", "action"):
            # A folder of this machine opens when a reader asks for it.
            kinds = ("#", "data:,", "file:///") if node.tag == "a" else ("#", "data:,")
            assert (node.attributes.get(name) or "#").startswith(kinds)
    style = root.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style
    policy = root.all("meta", http_equiv="Content-Security-Policy")[0].attributes["content"]
    assert policy.startswith("default-src 'none'")


def test_heads_say_how_they_sort_and_cells_hold_the_number_itself(root):
    table = root.all("table", class_="sortable")[0]
    heads = table.all("thead")[0].all("th")
    assert [h.attributes["data-sort"] for h in heads] == ["text", *["number"] * 5, "text"]
    assert {h.attributes["aria-sort"] for h in heads} == {"none"}
    assert [h.attributes.get("data-better") for h in heads[:4]] == [None, "high", "low", "high"]
    first = table.all("tbody")[0].all("tr")[1].all("td")
    assert first[0].attributes["data-value"] == "0.7842"
    assert first[4].attributes["data-value"] == "70000.0"


def cells(root: Node, row: int) -> list[Node]:
    return [tr for tr in root.all("tr") if tr.all("td")][row].all("td")


def test_a_cell_holds_spread_paper_and_difference():
    column = Column("a", "A", form=".2f")
    row = Row("r", {"a": Value(0.5, spread=0.012, paper=0.75, star=True)})
    root = parse(Table("t", "T", "", (column, Column("b", "B")), (row,)))
    cell, empty = cells(root, 0)
    assert cell.all("span")[0].text == "0.50"
    assert cell.all("small", class_="spread")[0].text == "±0.01"
    paper = cell.all("small", class_="paper")[0]
    assert paper.text == "paper 0.75 −0.25"
    assert paper.all(class_="difference")[0].text == "−0.25"
    assert cell.all("sup", class_="star")
    assert empty.text == "–"
    assert empty.matches("td", {"class_": "empty"})


@pytest.mark.parametrize(
    ("better", "values", "ranked", "expected"),
    [
        ("high", (1.0, 3.0, 2.0), (True, True, True), "-bu"),
        ("low", (1.0, 3.0, 2.0), (True, True, True), "b-u"),
        (None, (1.0, 3.0, 2.0), (True, True, True), "---"),
        ("high", (1.0, 3.0, 2.0), (True, False, True), "u-b"),
        ("high", (3.0, 3.0, 2.0), (True, True, True), "bbu"),
        ("high", (3.0, 2.0, 2.0), (True, True, True), "buu"),
        # They print the same.
        ("high", (3.0001, 3.0, 2.0), (True, True, True), "bbu"),
        ("high", (3.0, float("nan"), 2.0), (True, True, True), "b-u"),
        # Nothing to be better than.
        ("high", (3.0, 4.0, 2.0), (True, False, False), "---"),
        # As good as the best, but it takes no part.
        ("high", (3.0, 3.0, 2.0), (True, False, True), "b-u"),
    ],
)
def test_best_and_second_best(better, values, ranked, expected):
    rows = [Row(f"r{n}", {"a": Value(v)}, ranked=r) for n, (v, r) in enumerate(zip(values, ranked, strict=True))]
    root = parse(Table("t", "T", "", (Column("a", "A", better, ".2f"),), rows))
    signs = [tr.all("td")[0] for tr in root.all("tr") if tr.all("td")]
    assert "".join("b" if td.all("b") else "u" if td.all("u") else "-" for td in signs) == expected


def test_groups_stand_together_in_the_order_they_appear():
    rows = [Row(t, {}, group) for t, group in (("a", "one"), ("b", "two"), ("c", "one"), ("d", ""))]
    root = parse(Table("t", "T", "", (Column("a", "A"),), rows))
    bodies = root.all("tbody")
    assert [[th.text for th in body.all("th")] for body in bodies] == [["one", "a", "c"], ["two", "b"], ["d"]]
    assert [h.attributes["colspan"] for h in root.all("th", scope="rowgroup")] == ["2", "2"]


def test_charts_draw_points_whiskers_paper_and_guides(root):
    shots, lengths, calibration = root.all("svg", class_="chart")
    paper = [point for series in SHOTS.series for point in series.paper]
    own = [point for series in SHOTS.series for point in series.points]
    marks = shots.all("g", class_="mark")
    assert len(marks) == len(own) + len(paper)
    assert len(shots.all("g", class_="paper")) == len(paper)
    assert len(shots.all("path", class_="whisker")) == sum(bool(p.spread) for p in own)
    assert len(shots.all("polyline", class_="paper")) == 1
    assert len(shots.all("polyline", class_="dashed")) == 1
    assert len(shots.all("line", class_="level")) == 1
    assert len(calibration.all("line", class_="diagonal")) == 1
    assert len(lengths.all("polyline", class_="solid")) == len(LENGTHS.series)
    titles = [mark.all("title")[0].text for mark in marks]
    assert "ReLLa\nN 256, AUC 0.7197 ±0.0021\n256 rows" in titles
    assert "ReLLa, paper\nN 256, AUC 0.7181" in titles
    # One stop of the tab key a chart; arrows go on from there.
    assert [mark.attributes["tabindex"] for mark in marks] == ["0", *["-1"] * (len(marks) - 1)]


def test_curves_of_one_colour_have_different_markers(root):
    samples = root.all("ul", class_="legend")[1].all("g", class_="dot")
    looks = {(s.attributes["class"], s.all("path")[0].attributes["d"]) for s in samples}
    assert len(looks) == len(LENGTHS.series)


def test_a_logarithmic_axis_has_ticks_at_the_data_in_equal_steps():
    across, _ = svg.axes(SHOTS)
    assert [label for _, label in across.ticks] == ["0", "64", "256", "1,024", "4,096", "16,384", "65,536"]
    places = [across.share(x) for x in (0, 64, 256, 1024)]
    assert places[3] - places[2] == pytest.approx(places[2] - places[1])
    assert 0 < places[0] < places[1]


def test_everything_drawn_lies_within_the_drawing(root):
    for chart in root.all("svg", class_="chart"):
        for mark in chart.all("g", class_="mark"):
            x, y = map(float, re.findall(r"[\d.]+", mark.attributes["transform"]))
            assert 0 < x < svg.WIDTH
            assert svg.TOP <= y <= svg.HEIGHT - svg.BOTTOM
        for whisker in chart.all("path", class_="whisker"):
            high, low = map(float, re.match(r"M[\d.]+,([\d.]+)V([\d.]+)", whisker.attributes["d"]).groups())
            assert svg.TOP <= high < low <= svg.HEIGHT - svg.BOTTOM


@pytest.mark.parametrize(
    "points",
    [
        [],
        [Point(1, 0.5)],
        [Point(0, 0), Point(0, 0)],
        [Point(1, float("nan")), Point(2, 0.5)],
        [Point(1, float("inf"))],
        [Point(-3, -1e9), Point(4, 1e9)],
        [Point(1e-7, 1e-9), Point(2e-7, 3e-9)],
        [Point(-1, 2), Point(0, 3)],
    ],
)
@pytest.mark.parametrize("log_x", [False, True])
def test_odd_points_are_drawn_or_left_out(points, log_x):
    root = parse(Chart("c", "C", "", "x", "y", (Series("s", points),), log_x=log_x))
    assert len(root.all("g", class_="mark")) == len(svg.finite(points))
    assert bool(root.all("p", class_="empty")) == (not svg.finite(points))


def test_heat_goes_from_yellow_to_green_by_row():
    row = HeatRow("r", ["a", "b", "c"], [0.0, 5.0, float("nan")])
    assert html.shares(row) == [0, 1, 0]
    assert html.shares(HeatRow("r", ["a"], [0.0])) == [0]
    assert html.shade(0) == html.SCALE[0]
    assert html.shade(1) == html.shade(2) == html.SCALE[-1]
    assert sum(html.shade(0.4)) > sum(html.shade(0.6)) > sum(html.shade(0.9))


def test_an_empty_report_is_a_page():
    root = Tree(html.page(Report("T", "", (), ()))).root
    assert root.all("h1")[0].text == "T"
    assert not root.all("section")


def test_the_same_report_is_the_same_page(text):
    assert html.page(REPORT) == text


needs_chromium = pytest.mark.skipif(chromium.find() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def saved(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium.Browser(chromium.find()) as opened:
        yield opened


@needs_chromium
@pytest.mark.parametrize("width", chromium.SIZES)
@pytest.mark.parametrize("theme", chromium.THEMES)
def test_the_page_neither_overflows_nor_complains(browser, saved, width, theme):
    assert chromium.check(browser, saved, width, theme) == []


@needs_chromium
def test_the_check_finds_what_is_wrong(tmp_path):
    page = tmp_path / "bad.html"
    wide = '<div style="width: 3000px">wide</div>'
    page.write_text(f'<button id="theme"></button>{wide}<script>console.error("no"); nothing.there;</script>')
    done = subprocess.run([sys.executable, chromium.__file__, str(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert len(done.stdout.splitlines()) == 4
    for part in ("3008 px wide", "console", "exception"):
        assert part in done.stdout


COLUMN = """[...document.querySelectorAll("#table2 tbody")[0].rows].map((row) => row.cells[0].innerText)"""
CLICK = """(() => { const head = document.querySelectorAll("#table2 thead th")[%d];
  head.querySelector("button").click(); return head.getAttribute("aria-sort"); })()"""


@needs_chromium
def test_tables_sort_within_their_groups_and_back(browser, saved):
    browser.open(saved, 1280, "light")
    before = browser.evaluate(COLUMN)
    assert before == ["Full-shot", "DeepFM", "AutoInt", "SIM"]
    assert browser.evaluate(CLICK % 1) == "descending"
    assert browser.evaluate(COLUMN) == ["Full-shot", "SIM", "DeepFM", "AutoInt"]
    assert browser.evaluate(CLICK % 0) == "ascending"
    assert browser.evaluate(COLUMN) == ["Full-shot", "AutoInt", "DeepFM", "SIM"]
    assert browser.evaluate(CLICK % 0) == "descending"
    assert browser.evaluate(CLICK % 0) == "none"
    assert browser.evaluate(COLUMN) == before
    # Where less is better, the least comes first.
    assert browser.evaluate(CLICK % 2) == "ascending"


@needs_chromium
@pytest.mark.parametrize("theme", chromium.THEMES)
def test_the_button_turns_the_theme(browser, saved, theme):
    ground = "getComputedStyle(document.body).backgroundColor"
    browser.open(saved, 1280, theme)
    before = browser.evaluate(ground)
    assert browser.evaluate(f'document.getElementById("theme").click(), {ground}') != before
    assert browser.evaluate(f'document.getElementById("theme").click(), localStorage.clear(), {ground}') == before


@needs_chromium
def test_marks_tell_their_numbers_to_mouse_and_keyboard(browser, saved):
    browser.open(saved, 375, "dark")
    tip = 'document.getElementById("tip").hidden ? "" : document.getElementById("tip").textContent'
    assert browser.evaluate(tip) == ""
    browser.evaluate('document.querySelector("#figure8b .cell").focus({ preventScroll: true })')
    assert browser.evaluate(tip) == "Toy Story (1995)\n0"
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    assert browser.evaluate(tip) == "M*A*S*H (1970)\n0.1000"
    browser.evaluate("document.activeElement.blur()")
    assert browser.evaluate(tip) == ""
    over = 'document.querySelector("#calibration .mark").dispatchEvent(new PointerEvent("pointerenter"))'
    assert browser.evaluate(f"{over}, {tip}").startswith("ReLLa\nMean prediction 0.0500")


def test_artifacts_of_this_machine_open_from_the_page() -> None:
    places = [("scores", "/data/my storage/x-0123"), ("adapter", "s3://bucket/y-4567")]
    root = parse(artifacts=places)
    (section,) = root.all("section", id="artifacts")
    assert [(a.attributes["href"], a.text) for a in section.all("a")] == [
        ("file:///data/my%20storage/x-0123", "/data/my storage/x-0123")
    ]
    assert "s3://bucket/y-4567" in section.text
