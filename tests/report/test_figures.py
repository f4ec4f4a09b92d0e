"""Figures as files."""

from __future__ import annotations

import builtins
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest

from rella.errors import MissingError
from rella.report import figures
from rella.report.contents import Chart, Heat, HeatRow, Point, Series, Table
from tests.report.example import CALIBRATION, HOSTILE, LENGTHS, REPORT, SHOTS

DRAWN = [block for block in REPORT.blocks if not isinstance(block, Table)]
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="no matplotlib here")


def words(path) -> list[str]:
    """Return the text of a drawing."""
    texts = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(node.itertext()).strip() for node in texts]


@needs_matplotlib
@pytest.mark.parametrize("block", DRAWN, ids=lambda block: block.name)
def test_files_are_there_and_the_same_each_time(block, tmp_path):
    first = figures.save(block, tmp_path / "a" / "deep")
    second = figures.save(block, tmp_path / "b")
    assert [path.name for path in first] == [f"{block.name}.svg", f"{block.name}.pdf"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    pdf = first[1].read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Subtype /Type3" not in pdf
    assert b"CreationDate" not in pdf
    assert block.title in words(first[0])


@needs_matplotlib
def test_charts_name_axes_curves_and_ticks(tmp_path):
    said = words(figures.save(SHOTS, tmp_path)[0])
    for word in ("N", "AUC", "ReLLa", "SIM", "Vicuna", "64", "65,536", "SIM, all rows (0.7922)"):
        assert word in said
    assert "the paper, in the same colour" in said
    assert "y = x" in words(figures.save(CALIBRATION, tmp_path)[0])


@needs_matplotlib
def test_hostile_titles_are_text(tmp_path):
    heat = Heat("h", HOSTILE, "", (HeatRow("$x$ & <b>", ["$5 or $6", "<i>"], [1, 2]),))
    said = words(figures.save(heat, tmp_path)[0])
    assert {HOSTILE, "$x$ & <b>", "$5 or $6", "<i>"} <= set(said)
    curve = Series("_hidden", [Point(1, 2), Point(2, 3)])
    said = words(figures.save(Chart("c", "映画 🎬", "", "x", "y", (curve,)), tmp_path)[0])
    assert "映画 🎬" in said
    assert "_hidden" in [word.strip("\u200b") for word in said]


@needs_matplotlib
def test_the_settings_of_the_user_change_nothing(tmp_path):
    import matplotlib

    first = figures.save(LENGTHS, tmp_path / "a")
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "lines.linewidth": 9}):
        second = figures.save(LENGTHS, tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 30
    assert first[0].read_bytes() == second[0].read_bytes()


@needs_matplotlib
@pytest.mark.parametrize(
    "block",
    [
        Chart("c", "C", "", "x", "y", ()),
        Chart("c", "C", "", "x", "y", (Series("s", ()), Series("t", [Point(1, float("nan"))]))),
        Chart("c", "C", "", "x", "y", (Series("s", ()), Series("t", [Point(1, 2)]))),
        Heat("h", "H", "", ()),
        Heat("h", "H", "", (HeatRow("r", (), ()),)),
        Heat("h", "H", "", (HeatRow("r", ("a",), (0.0,)),)),
    ],
)
def test_next_to_nothing_is_drawn(block, tmp_path):
    assert all(path.stat().st_size for path in figures.save(block, tmp_path))


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingError, match=r"pip install 'rella\[report\]'"):
        figures.save(SHOTS, tmp_path)
