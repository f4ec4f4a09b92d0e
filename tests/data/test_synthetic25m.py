"""The synthetic MovieLens-25M: exact figures, nested sub-samples, files that the reader takes."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import resource
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rella.data import synthetic25m
from rella.data.facts import PAPER
from rella.data.files import locate
from rella.data.movielens25m import FILES, read_ml25m
from rella.data.raw import RawDataset, field_vocabularies
from rella.data.synthetic25m import (
    GENRES,
    NO_GENRES,
    Ratings,
    Shape,
    cached_ml25m,
    main,
    ml25m_shape,
    movie_rows,
    write_ml25m,
)
from rella.data.synthetic25m_shape import EXACT_BELOW, item_counts, user_sizes
from rella.errors import InputError, StorageError

SMALL = Shape(
    ratings=18_000,
    users=300,
    longest=250,
    items=800,
    listed=900,
    largest_id=3_000,
    popularity=((1, 200), (20, 110), (100, 60), (400, 12), (700, 2), (800, 1)),
    twins=7,
)


@pytest.fixture(scope="module")
def small() -> Ratings:
    return ml25m_shape(3, shape=SMALL)


@pytest.fixture(scope="module")
def movies() -> list[tuple[int, str, str]]:
    return movie_rows()


def read(folder: Path) -> RawDataset:
    return read_ml25m(locate("ml-25m", FILES, folder))


def digest(ratings: Ratings) -> str:
    total = hashlib.sha256()
    for name in ("user_id", "movie_id", "offsets", "item", "half_stars", "timestamp"):
        total.update(getattr(ratings, name).tobytes())
    return total.hexdigest()


def of_users(ratings: Ratings, wanted: set[int]) -> dict[int, tuple[list[int], ...]]:
    """Rows of some users, by their ids."""
    cuts = zip(ratings.user_id.tolist(), ratings.offsets[:-1], ratings.offsets[1:], strict=True)
    columns = (ratings.movie_id[ratings.item], ratings.half_stars, ratings.timestamp)
    return {user: tuple(c[a:b].tolist() for c in columns) for user, a, b in cuts if user in wanted}


@pytest.mark.parametrize("seed", [3, 4])
def test_numbers_and_bounds_are_exact(seed: int) -> None:
    found = ml25m_shape(seed, shape=SMALL)
    sizes, counts = np.diff(found.offsets), np.bincount(found.item)
    assert found.user_id.tolist() == list(range(1, SMALL.users + 1))
    assert (len(found.item), len(found.movie_id), len(counts)) == (SMALL.ratings, SMALL.items, SMALL.items)
    assert (sizes.min(), sizes.max(), counts.min()) == (SMALL.shortest, SMALL.longest, 1)
    assert found.pairs == sum(n * (n - 1) // 2 for n in sizes.tolist())


def test_columns_have_the_agreed_types(small: Ratings) -> None:
    names = ("user_id", "movie_id", "offsets", "item", "half_stars", "timestamp")
    assert [getattr(small, n).dtype for n in names] == [np.int64, np.int32, np.int64, np.int32, np.int8, np.int64]


def test_items_are_rated_as_often_as_the_curve_says(small: Ratings) -> None:
    wanted, found = item_counts(SMALL), np.sort(np.bincount(small.item))[::-1]
    assert wanted.sum() == found.sum() == SMALL.ratings
    for rank, count in SMALL.popularity[1:-1]:
        assert wanted[rank - 1] in (count, count + 1)
        assert wanted[rank] <= count
    rare = wanted < EXACT_BELOW
    assert Counter(found[found < 16].tolist()) == Counter(wanted[wanted < 16].tolist())
    assert np.abs(found[~rare] / wanted[~rare] - 1.0).mean() < 0.05
    assert abs(found[0] - wanted[0]) < 20


def test_nobody_rates_an_item_twice_and_rows_are_ordered(small: Ratings) -> None:
    user = np.repeat(small.user_id, np.diff(small.offsets))
    assert (np.diff(user * len(small.movie_id) + small.item) > 0).all()
    assert (np.diff(small.movie_id) > 0).all()


def test_stars_are_distributed_as_the_originals(small: Ratings) -> None:
    share = np.bincount(small.half_stars, minlength=11) / SMALL.ratings
    assert share[0] == 0
    assert share[1:].min() > 0.005
    assert share.argmax() == 8
    assert 3.4 < small.half_stars.mean() / 2 < 3.7


def test_times_come_in_sessions(small: Ratings) -> None:
    assert small.timestamp.min() > 788_918_400  # 1995
    assert small.timestamp.max() < 1_577_836_800  # 2020
    gaps = np.concatenate([np.diff(np.sort(part)) for part in np.split(small.timestamp, small.offsets[1:-1])])
    assert 0.5 < (gaps == 0).mean() < 0.75
    assert 0.9 < (gaps < 60).mean() < 1.0


def test_sub_samples_are_nested_and_keep_their_users_ratings(small: Ratings) -> None:
    few, more = (ml25m_shape(3, users=n, shape=SMALL) for n in (40, 120))
    assert (len(few.user_id), len(more.user_id)) == (40, 120)
    assert set(few.user_id.tolist()) < set(more.user_id.tolist())
    for part, whole in ((few, more), (more, small), (few, small)):
        users = set(part.user_id.tolist())
        assert of_users(part, users) == of_users(whole, users)
    assert few.user_id.tolist() != list(range(1, 41))


def test_a_seed_decides_everything(small: Ratings) -> None:
    assert digest(small) == "a71fc10cc1c31a3d519d7ccaddc1d74ffa0aaab321d71d02aa77d3758fc26b5d"
    assert digest(ml25m_shape(3, shape=SMALL)) == digest(small)
    other = ml25m_shape(4, shape=SMALL)
    for name in ("movie_id", "offsets", "item", "half_stars", "timestamp"):
        assert not np.array_equal(getattr(other, name), getattr(small, name)), name


def test_the_original_size_is_the_default() -> None:
    sizes, counts = user_sizes(Shape()), item_counts(Shape())
    assert sizes.sum() == counts.sum() == 25_000_095
    assert (len(sizes), sizes.min(), sizes.max(), len(counts)) == (162_541, 20, 32_202, 59_047)
    assert [int((counts >= n).sum()) for n in (10_000, 1_000, 100, 10, 2, 1)] == [
        590,
        3790,
        10_300,
        24_300,
        48_547,
        59_047,
    ]


def test_the_reader_takes_the_files_of_a_sub_sample(tmp_path: Path) -> None:
    folder = write_ml25m(tmp_path / "a" / "ml-25m", seed=3, users=100, shape=SMALL)
    assert sorted(path.name for path in folder.parent.rglob("*")) == ["ml-25m", *FILES]
    drawn, raw = ml25m_shape(3, users=100, shape=SMALL), read(folder)
    movie = drawn.movie_id[drawn.item]
    assert raw.users.column("user_id").to_pylist() == [str(user) for user in drawn.user_id]
    assert raw.items.column("item_id").to_pylist() == [str(i) for i in np.unique(movie)]
    assert np.array_equal(np.unique(movie)[raw.item], movie)
    assert np.array_equal(np.bincount(raw.user), np.diff(drawn.offsets))
    assert np.array_equal(raw.rating * 2, drawn.half_stars)
    assert np.array_equal(raw.timestamp, drawn.timestamp)
    listed = {str(number): (title, genres.split("|")) for number, title, genres in movie_rows(3, SMALL)}
    for row in raw.items.to_pylist():
        assert (row["title"], row["genres"]) == listed[row["item_id"]]


def test_the_files_look_like_the_original(tmp_path: Path) -> None:
    folder = write_ml25m(tmp_path / "ml-25m", seed=3, users=100, shape=SMALL)
    head, *lines = (folder / "ratings.csv").read_text().splitlines()
    assert head == "userId,movieId,rating,timestamp"
    assert all(re.fullmatch(r"\d+,\d+,(?:0\.5|[1-4]\.[05]|5\.0),\d{9,10}", line) for line in lines)
    text = (folder / "movies.csv").read_bytes().decode("utf-8")
    assert "\r" not in text
    head, *lines = text.removesuffix("\n").split("\n")
    assert head == "movieId,title,genres"
    assert len(lines) == SMALL.listed
    assert any(re.fullmatch(r'\d+,"""\w+ \w+"" and the \w+ \(\d{4}\)",.+', line) for line in lines)
    assert any(re.fullmatch(r'\d+,"\w+ \w+, The \(\d{4}\)",.+', line) for line in lines)
    assert list(csv.reader(lines)) == [[str(n), title, genres] for n, title, genres in movie_rows(3, SMALL)]


def test_blocks_do_not_change_what_is_written(small: Ratings) -> None:
    files = []
    for rows in (1, 500, 1 << 20):
        files.append(io.BytesIO())
        synthetic25m._write_ratings(files[-1], small, rows)
    assert files[0].getvalue() == files[1].getvalue() == files[2].getvalue()
    assert files[0].getvalue().count(b"\n") == SMALL.ratings + 1


def test_movies_have_every_awkward_form(movies: list[tuple[int, str, str]]) -> None:
    ids, titles, genres = zip(*movies, strict=True)
    assert len(ids) == 62_423
    assert list(ids) == sorted(set(ids))
    assert 200_000 < ids[-1] <= 209_171
    assert len(set(titles)) == 62_423 - 89
    assert all(re.fullmatch(r".+ \((?:19[1-9]\d|20[01]\d)\)", title) for title in titles)
    for form in (r"\w+ \w+, The \(", r'"\w+ \w+" ', r"(?:É|é)", r"\w+ 2 \(", r"\w+ 3, The \(", r"'s ", r": "):
        assert sum(bool(re.search(form, title)) for title in titles) > 20, form
    split = [text.split("|") for text in genres]
    assert {row[0] for row in split} == {*GENRES, NO_GENRES}
    assert all(row == sorted(set(row), key=list(GENRES).index) for row in split if row != [NO_GENRES])
    assert {len(row) for row in split} == {1, 2, 3, 4, 5}
    assert 0.06 < genres.count(NO_GENRES) / len(genres) < 0.1


def test_series_go_on_in_later_years(movies: list[tuple[int, str, str]]) -> None:
    years: dict[str, list[int]] = {}
    parts = (re.fullmatch(r"([\w ]+?) (\d+) \((\d{4})\)", title) for _, title, _ in movies)
    for part in sorted((p for p in parts if p), key=lambda p: int(p[2])):
        years.setdefault(part[1], []).append(int(part[3]))
    assert len(years) > 100
    assert max(map(len, years.values())) > 3
    # Two movies may start series with the same name; their parts are then in no order.
    assert sum(found == sorted(found) for found in years.values()) > 0.9 * len(years)


def test_a_taken_folder_is_refused_and_an_empty_one_used(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    folder = write_ml25m(tmp_path / "there", seed=3, users=5, shape=SMALL)
    with pytest.raises(InputError, match="there is something already"):
        write_ml25m(folder, seed=3, users=5, shape=SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="there is something already"):
        write_ml25m(tmp_path / "file", seed=3, users=5, shape=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic25m, "_write_ratings", full)
    with pytest.raises(StorageError, match="No space left"):
        write_ml25m(tmp_path / "ml-25m", seed=3, users=5, shape=SMALL)
    assert not list(tmp_path.iterdir())


def test_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cached_ml25m(3, 20, SMALL)
    assert first.parent == tmp_path / "rella" / "synthetic"
    assert len(read(first).users) == 20
    others = [cached_ml25m(4, 20, SMALL), cached_ml25m(3, 30, SMALL), cached_ml25m(3, 20, replace(SMALL, twins=5))]
    monkeypatch.setattr(synthetic25m, "write_ml25m", None)
    assert cached_ml25m(3, 20, SMALL) == first
    assert len({first, *others}) == 4


def test_a_second_process_that_makes_the_same_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    once = synthetic25m._write_ratings

    def meanwhile(*arguments: object) -> None:
        monkeypatch.setattr(synthetic25m, "_write_ratings", once)
        cached_ml25m(3, 20, SMALL)
        once(*arguments)

    monkeypatch.setattr(synthetic25m, "_write_ratings", meanwhile)
    folder = cached_ml25m(3, 20, SMALL)
    assert list(folder.parent.iterdir()) == [folder]
    assert len(read(folder).users) == 20


def test_the_command_writes_and_tells_each_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "ml-25m"), "--users", "5", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 5
    assert all(re.match(r" *\d+\.\d s  \w", line) for line in lines)
    assert len(read(tmp_path / "ml-25m").users) == 5
    assert main(["--out", str(tmp_path / "ml-25m")]) == 1
    assert "there is something already" in capsys.readouterr().err


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--out DIR", "--seed N", "--users N", "162,541"))


@pytest.mark.parametrize(("users", "seed"), [(0, 3), (-1, 3), (301, 3), (5, -1)])
def test_wrong_numbers_are_refused(users: int, seed: int) -> None:
    with pytest.raises(InputError, match="users: there are 1 to 300" if seed >= 0 else "a seed is 0 or larger"):
        ml25m_shape(seed, users, SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratings": 5_999}, "no such data set, see users"),
        ({"longest": 800}, "see longest"),
        ({"listed": 799}, "see listed"),
        ({"popularity": ((1, 200), (799, 1))}, "see popularity"),
        ({"popularity": ((1, 301), (800, 1))}, "see popularity"),
        ({"twins": 401}, "see twins"),
        ({"stars": (50.0, 50.0)}, "see stars"),
        ({"ratings": 40_000}, "the popularity curve gives 14647 to 21223 ratings"),
        ({"ratings": 6_100}, "300 users cannot have 6100 ratings"),
    ],
)
def test_shapes_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ml25m_shape(3, shape=replace(SMALL, **change))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_full_size_is_that_of_the_original(tmp_path: Path) -> None:
    """`pytest -s` shows time, memory and pairs."""
    started = time.perf_counter()
    folder = write_ml25m(tmp_path / "ml-25m", note=lambda step: print(step, flush=True))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    raw = read(folder)
    shutil.rmtree(folder)  # pytest would keep its 650 MB
    sizes, counts = np.bincount(raw.user), np.bincount(raw.item)
    pairs = int((sizes * (sizes - 1) // 2).sum())
    print(f"{seconds:.1f} s, at most {peak:.2f} GiB, {pairs:,} pairs")
    assert (len(raw.rating), len(sizes), len(counts)) == (25_000_095, 162_541, 59_047)
    assert (sizes.min(), sizes.max(), counts.min()) == (20, 32_202, 1)
    assert 70 <= np.median(sizes) <= 83
    assert sizes.std() == pytest.approx(268, rel=0.02)
    assert pairs == pytest.approx(7.8e9, rel=0.01)
    assert counts.max() == pytest.approx(81_000, abs=1_500)
    for least, items in ((10_000, 590), (1_000, 3_790), (100, 10_300), (10, 24_300)):
        assert (counts >= least).sum() == pytest.approx(items, rel=0.05), least
    assert (counts == 1).sum() == 10_500
    assert (np.diff(raw.user.astype(np.int64) * len(counts) + raw.item) > 0).all()
    assert sum(field_vocabularies(raw).values()) == PAPER["ml-25m"]["features"]
    share = np.bincount((raw.rating * 2).astype(np.int64)) / len(raw.rating)
    assert share[1:] * 100 == pytest.approx(Shape().stars, abs=0.3)
    assert float(raw.rating.mean(dtype=np.float64)) == pytest.approx(3.53, abs=0.02)
    assert seconds < 90
    assert peak < 4
