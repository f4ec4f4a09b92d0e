"""The report as Markdown."""

from __future__ import annotations

import re

import pytest

from rella.report import markdown
from rella.report.contents import Chart, Heat, HeatRow, Point, Report, Row, Section, Series, Table, Value
from tests.report.example import ATTENTION, COLUMNS, HOSTILE, PATH, REPORT, SHOTS, TABLE2


@pytest.fixture(scope="module")
def text() -> str:
    return markdown.text(REPORT)


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every pipe table."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def of(*blocks) -> str:
    return markdown.text(Report("T", "", (), (Section("S", "", blocks),)))


def test_every_block_is_there(text):
    headings = [line for line in text.splitlines() if line.startswith("### ")]
    assert headings == [f"### {block.title}" for block in REPORT.blocks]
    images = re.findall(r"!\[[^\]]*\]\((.*?)\)", text)
    assert images == [f"figures/{block.name}.svg" for block in REPORT.blocks if not isinstance(block, Table)]
    assert f"`{PATH}`" in text


def test_tables_are_as_wide_as_their_heads(text):
    # Facts, two tables, seeds, three charts, two heat maps.
    found = tables(text)
    assert len(found) == 9
    for table in found:
        assert {len(line) for line in table} == {len(table[0])}
        assert all(set(cell) <= set("-:") for cell in table[1])


def test_cells(text):
    lines = {line[0]: line for line in tables(text)[1]}
    assert lines["ReLLa (few-shot)"][1] == r"**0.8033**\* ±0.0011<br><sub>paper 0.8012, +0.0021</sub>"
    assert lines["SIM"][2] == "<ins>0.5448</ins> ±0.0009<br><sub>paper 0.5482, −0.0034</sub>"
    assert lines["SIM"][4] == "–"
    assert lines["**Zero-shot**"][1:] == [""] * len(COLUMNS)
    # It takes no part: nothing is marked.
    assert not re.search(r"\*\*|<ins>", "".join(lines["Vicuna-7B, zero-shot"][1:]))


def test_hostile_titles_stay_text(text):
    assert "<script" not in text
    assert "<img" not in text
    escaped = r"""&lt;script&gt;alert(1)&lt;/script&gt; &amp; "double" 'single' \| pipe \`tick\` \$5 and \$6"""
    assert text.count(escaped) > 8
    assert HOSTILE not in text


@pytest.mark.parametrize("words", ["# no heading", "- no list", "1. no list", "2) no list", "+ no", "=== no"])
def test_text_begins_no_list_or_heading(words):
    report = Report("T", words, (), (Section("S", words, (Table("t", "T", words, (), (), (words,)),)),))
    for line in markdown.text(report).splitlines():
        assert not line.removeprefix("- ").startswith(words)


def test_charts_have_a_column_a_curve_where_they_share_x():
    header, lines = markdown.points(SHOTS)
    assert header == ["N", "ReLLa", "ReLLa, paper", "SIM", "Vicuna"]
    assert len(lines) == 7
    assert lines[2] == ["256", "0.7197 ±0.0021 (256 rows)", "0.7181", "0.6683", "0.6944"]
    assert lines[0][2:] == ["–", "–", "–"]


def test_charts_have_a_line_a_point_where_they_do_not():
    curves = (Series("a", [Point(1, 2), Point(2, 3)]), Series("b", [Point(1.5, 2), Point(2.5, 3)]))
    header, lines = markdown.points(Chart("c", "C", "", "x", "y", curves))
    assert header == ["Curve", "x", "y"]
    assert lines == [["a", "1", "2"], ["a", "2", "3"], ["b", "1.500", "2"], ["b", "2.500", "3"]]


def test_heat_maps_list_the_ten_largest_of_each_row():
    table = tables(of(ATTENTION))[0][2:]
    assert len(table) == 10 * len(ATTENTION.rows)
    expected = sorted(ATTENTION.rows[0].values, reverse=True)[:10]
    assert [line[2] for line in table[:10]] == [markdown.plain(value) for value in expected]
    assert len(tables(of(Heat("h", "H", "", (HeatRow("r", ["a"], [1.0]),))))[0][2:]) == 1


def test_numbers():
    assert markdown.number(-0.5, ".1f") == "−0.5"
    assert markdown.signed(0.00001, ".4f") == markdown.signed(-0.00001, ".4f") == "+0.0000"
    assert markdown.signed(-0.0123, ".1%") == "−1.2%"
    shown = [markdown.plain(v) for v in (0, -3, 12345, 0.79, 5.25, 132.53, 98765.4, 0.000012, float("nan"))]
    assert shown == ["0", "−3", "12,345", "0.7900", "5.250", "132.5", "98,765", "1.2e−05", "nan"]


def test_places_with_ticks_stay_code():
    report = Report("T", "", (), (), (("a", "b`c``d"),))
    assert "``` b`c``d ```" in markdown.text(report)


def test_seeds_are_listed():
    table = Table("t", "T", "", COLUMNS[:1], (Row("a|b", {"auc": Value(0.5, seeds=(0.4, 0.6))}),))
    assert tables(of(table))[1][2] == [r"a\|b", "AUC", "0.4000, 0.6000"]
    assert "By training seed" not in of(TABLE2)
