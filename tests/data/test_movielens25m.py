"""MovieLens-25M's reader: quirks on small files, facts on the real ones."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rella.data import movielens25m
from rella.data.files import locate
from rella.data.movielens25m import FILES, read_ml25m
from rella.data.raw import RawDataset, field_count, field_vocabularies
from rella.schemas import ITEMS, check

REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "ml-25m"

MOVIES = [
    "movieId,title,genres",
    "10,Never Rated (1990),Comedy",
    '9,"American President, The (1995)",Comedy|Drama|Romance',
    '100,"""Great Performances"" Cats (1998)",Musical',
    "20,Misérables\x85Les (1995),(no genres listed)",
]
RATINGS = [
    "userId,movieId,rating,timestamp",
    "7,100,0.5,1147880044",
    "7,9,3.5,1147868817",
    "12,9,5.0,90",
    "3,20,4,1574327703",
]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def files(movies=MOVIES, ratings=RATINGS, end="\n", folder="", start=b"", encoding="utf-8") -> Path:
        target = tmp_path / folder
        target.mkdir(parents=True, exist_ok=True)
        for name, lines in (("movies", movies), ("ratings", ratings)):
            text = "".join(line + end for line in lines)
            (target / f"{name}.csv").write_bytes(start + text.encode(encoding))
        return tmp_path

    return files


def read(path: Path, strict: bool = True) -> RawDataset:
    return read_ml25m(locate("ml-25m", FILES, path), strict)


def assert_small(raw: RawDataset) -> None:
    assert raw.users.to_pylist() == [
        {"user": 0, "user_id": "3"},
        {"user": 1, "user_id": "7"},
        {"user": 2, "user_id": "12"},
    ]
    assert raw.items.to_pylist() == [
        {
            "item": 0,
            "item_id": "9",
            "title": "American President, The (1995)",
            "genre": "Comedy",
            "genres": ["Comedy", "Drama", "Romance"],
        },
        {
            "item": 1,
            "item_id": "20",
            "title": "Misérables\x85Les (1995)",
            "genre": "(no genres listed)",
            "genres": ["(no genres listed)"],
        },
        {
            "item": 2,
            "item_id": "100",
            "title": '"Great Performances" Cats (1998)',
            "genre": "Musical",
            "genres": ["Musical"],
        },
    ]
    assert raw.user.tolist() == [1, 1, 2, 0]
    assert raw.item.tolist() == [2, 0, 0, 1]
    assert raw.rating.tolist() == [0.5, 3.5, 5.0, 4.0]
    assert raw.timestamp.tolist() == [1147880044, 1147868817, 90, 1574327703]
    assert [a.dtype for a in (raw.user, raw.item, raw.rating, raw.timestamp)] == ["int32", "int32", "float32", "int64"]
    assert raw.rated
    assert raw.dropped == {}


def test_ids_are_numbered_in_numeric_order_and_only_rated_movies_stay(write: Write) -> None:
    assert_small(read(write()))


def test_windows_line_ends(write: Write) -> None:
    assert_small(read(write(end="\r\n")))


def test_a_byte_order_mark(write: Write) -> None:
    assert_small(read(write(start=b"\xef\xbb\xbf")))


def test_blank_lines_and_no_final_newline(write: Write) -> None:
    folder = write(ratings=[*RATINGS[:2], "", *RATINGS[2:], ""], movies=[*MOVIES, ""])
    assert_small(read(folder))
    for file in folder.glob("*.csv"):
        file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert_small(read(folder))


@pytest.mark.parametrize("inside", ["ml-25m/", ""])
def test_the_archive_and_a_folder_with_it(write: Write, tmp_path: Path, inside: str) -> None:
    folder = write(folder="plain") / "plain"
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "ml-25m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.glob("*.csv"):
            archive.write(file, f"{inside}{file.name}")
    assert_small(read(tmp_path / "zipped" / "ml-25m.zip"))
    assert_small(read(tmp_path / "zipped"))
    assert_small(read(write(folder="ml-25m")))


def test_column_types_and_fields(write: Write) -> None:
    raw = read(write())
    check(raw.items, ITEMS, "items")
    assert raw.items.schema.field("genres").type == pa.list_(pa.string())
    assert raw.users.schema.field("user").type == pa.int32()
    assert not any(raw.items.schema.field(name).nullable for name in raw.items.column_names)
    assert field_vocabularies(raw) == {"User ID": 3, "Movie ID": 3, "Movie title": 3, "Movie genre": 3, "Rating": 4}
    assert field_count(raw) == 4 + 2


@pytest.mark.parametrize("level", [0.5 * n for n in range(1, 11)])
def test_every_half_star(write: Write, level: float) -> None:
    assert read(write(ratings=[RATINGS[0], f"1,9,{level},1"])).rating.tolist() == [level]


def test_an_empty_title_stays_empty(write: Write) -> None:
    assert read(write(movies=[*MOVIES[:2], "9,,Drama", *MOVIES[3:]])).items["title"].to_pylist()[0] == ""


def test_a_line_break_inside_a_title(write: Write) -> None:
    raw = read(write(movies=[*MOVIES[:2], '9,"Two\nlines",Drama', *MOVIES[3:]]))
    assert raw.items["title"].to_pylist()[0] == "Two\nlines"
    with pytest.raises(ValueError, match=r"movies\.csv, row 6: movieId 'x' is not"):
        read(write(movies=[*MOVIES[:2], '9,"Two\nlines",Drama', MOVIES[3], "x,T,Drama"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ratings": [*RATINGS, "1,9,4.0"]},
            r"ratings\.csv, row 6: 3 columns instead of 4 .*'1,9,4\.0'.*original files",
        ),
        ({"ratings": [*RATINGS[:2], "1,9,4.0,5,6", *RATINGS]}, r"ratings\.csv, row 3: 5 columns instead of 4"),
        ({"ratings": [*RATINGS[:2], "", "1,9,4.0,5,6"]}, r"ratings\.csv, row 4: 5 columns instead of 4"),
        ({"ratings": [*RATINGS, "1,9.5,4.0,9"]}, r"ratings\.csv, row 6: movieId '9\.5' is not an integer.*'1,9\.5,4"),
        ({"ratings": [*RATINGS, ",9,4.0,9"]}, r"ratings\.csv, row 6: userId '' is not an integer"),
        ({"ratings": [*RATINGS, "9999999999,9,4.0,9"]}, r"ratings\.csv, row 6: userId '9999999999' is not an integer"),
        ({"ratings": [*RATINGS, "1,9,4.0,now"]}, r"ratings\.csv, row 6: timestamp 'now' is not an integer"),
        ({"ratings": [*RATINGS, "1,9,,9"]}, r"ratings\.csv, row 6: rating '' is none of 0\.5, 1\.0"),
        (
            {"ratings": [*RATINGS, "1,9,4.2,9"]},
            r"ratings\.csv, row 6: rating '4\.2' is none of 0\.5, 1\.0.*'1,9,4\.2,9'",
        ),
        ({"ratings": [*RATINGS, "1,9,3.50000001,9"]}, r"ratings\.csv, row 6: rating '3\.50000001' is none of"),
        ({"ratings": [*RATINGS, "1,9,0.0,9"]}, r"ratings\.csv, row 6: rating '0\.0' is none of"),
        ({"ratings": [*RATINGS, "1,9,5.5,9"]}, r"ratings\.csv, row 6: rating '5\.5' is none of"),
        ({"ratings": [*RATINGS, "1,9,nan,9"]}, r"ratings\.csv, row 6: rating 'nan' is none of"),
        ({"ratings": [*RATINGS[:2], "", "1,11,3,9"]}, r"row 4: movie 11 is not in movies\.csv.*--data\.strict false"),
        ({"ratings": RATINGS[1:]}, r"ratings\.csv, row 1: the header userId,movieId,rating,timestamp is missing"),
        ({"ratings": ["user,item,stars,time", *RATINGS[1:]]}, r"row 1: the header userId.*'user,item,stars,time'"),
        ({"ratings": ["a,b", *RATINGS[1:]]}, r"ratings\.csv, row 1: the header userId.*'a,b'"),
        ({"ratings": []}, r"ratings\.csv, row 1: the header userId.* is missing"),
        ({"ratings": RATINGS[:1]}, r"ratings\.csv: the file has no rating"),
        ({"movies": MOVIES[1:]}, r"movies\.csv, row 1: the header movieId,title,genres is missing.*'10,Never"),
        ({"movies": []}, r"movies\.csv, row 1: the header movieId,title,genres is missing"),
        ({"movies": MOVIES[:1]}, r"movies\.csv: the file has no movie"),
        ({"movies": [*MOVIES, "9,Again,Drama"]}, r"movies\.csv, row 6: movie 9 appears for the second time: .*Again"),
        ({"movies": [*MOVIES, "5,A,B,C"]}, r"movies\.csv, row 6: 4 columns instead of 3 .*'A', 'B', 'C'"),
        ({"movies": [*MOVIES, "b,A,Drama"]}, r"movies\.csv, row 6: movieId 'b' is not an integer"),
        ({"movies": [*MOVIES, "5,A,Drama|"]}, r"movies\.csv, row 6: an empty genre in 'Drama\|'"),
        ({"movies": [*MOVIES[:4], '5,"A"b,Drama', MOVIES[4]]}, r"movies\.csv, row 5: .*expected after.*A\"b,Drama"),
        (
            {"movies": [*MOVIES[:4], '5,"A,Drama', MOVIES[4]]},
            r"movies\.csv, row 5: unexpected end of data.*5,\"A,Drama",
        ),
    ],
)
def test_a_malformed_row_is_named(write: Write, change: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(**change))


def test_text_in_another_encoding_is_named(write: Write) -> None:
    with pytest.raises(ValueError, match=r"movies\.csv, row 5: not UTF-8: b'20,Mis\\xe9rables"):
        read(write(encoding="latin-1"))


def test_ratings_of_unknown_movies_are_counted_where_they_are_allowed(write: Write) -> None:
    raw = read(write(ratings=[*RATINGS[:2], "99,11,3,9", "7,12,1.5,9", *RATINGS[2:]]), strict=False)
    assert raw.dropped == {"ratings of unknown movies": 2}
    # User 99 rated nothing else and is not there.
    assert_small(RawDataset(raw.users, raw.items, raw.user, raw.item, raw.rating, raw.timestamp))
    assert read(write(), strict=False).dropped == {}
    with pytest.raises(ValueError, match=r"ratings\.csv: no rating of a movie of movies\.csv"):
        read(write(ratings=[RATINGS[0], "1,11,3,9"]), strict=False)
    with pytest.raises(ValueError, match=r"row 6: rating '6' is none of"):
        read(write(ratings=[*RATINGS, "1,9,6,9"]), strict=False)


def test_a_bad_row_past_the_first_block_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens25m, "_BLOCK", 1 << 12)
    many = [f"{1 + n // 50},9,3.5,{1_000_000_000 + n}" for n in range(3_000)]
    raw = read(write(ratings=[RATINGS[0], *many]))
    assert len(raw.rating) == 3_000
    assert raw.users.num_rows == 60
    assert np.array_equal(raw.timestamp, np.arange(3_000) + 1_000_000_000)
    for bad, message in (("5,9,3.5", "3 columns"), ("5,9,3.6,1", r"rating '3\.6'"), ("5,8,3.5,1", "movie 8 is not")):
        with pytest.raises(ValueError, match=rf"ratings\.csv, row 2902: {message}"):
            read(write(ratings=[RATINGS[0], *many[:2_900], bad, *many[2_900:]]))


def test_missing_files_are_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither movies\.csv, ratings\.csv nor ml-25m/ nor ml-25m\.zip"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read(tmp_path / "absent.zip")
    folder = write()
    (folder / "movies.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"movies\.csv: the file is missing"):
        read(folder)
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("ml-25m/movies.csv", "movieId,title,genres\n")
    with pytest.raises(FileNotFoundError, match=r"no ratings\.csv in the archive"):
        read(tmp_path / "some.zip")


def test_a_broken_archive(write: Write, tmp_path: Path) -> None:
    many = [f"{1 + n},9,3.5,{n * 7919 % 1_000_003}" for n in range(100_000)]
    folder = write(ratings=[RATINGS[0], *many], folder="plain") / "plain"
    archive = tmp_path / "ml-25m.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in FILES:
            packed.write(folder / name, name)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged zip archive"):
        read(archive)
    # Damage that shows only while the ratings are streamed.
    at = len(whole) * 3 // 4
    archive.write_bytes(whole[:at] + bytes(64) + whole[at + 64 :])
    with pytest.raises(ValueError, match="truncated or damaged zip archive"):
        read(archive)


@pytest.fixture(scope="module")
def real() -> RawDataset:
    if not (REAL / "ratings.csv").is_file():
        pytest.skip("the MovieLens-25M files are not in ../shared/data/ml-25m")
    return read(REAL)


def test_the_real_catalogue_and_the_first_ratings(real: RawDataset) -> None:
    assert len(real.rating) == 100_000
    assert real.users["user_id"].to_pylist() == [str(n) for n in range(1, 758)]
    assert np.unique(real.rating).tolist() == [0.5 * n for n in range(1, 11)]
    assert real.dropped == {}
    # The file's first row is 1,296,5.0,1147880044.
    assert real.items["title"][int(real.item[0])].as_py() == "Pulp Fiction (1994)"
    assert real.items["genres"][int(real.item[0])].as_py() == ["Comedy", "Crime", "Drama", "Thriller"]
    assert (int(real.user[0]), float(real.rating[0]), int(real.timestamp[0])) == (0, 5.0, 1147880044)
    ids = [int(value) for value in real.items["item_id"].to_pylist()]
    assert ids == sorted(ids)
    assert np.bincount(real.item).min() >= 1
    sizes = field_vocabularies(real)
    assert list(sizes) == ["User ID", "Movie ID", "Movie title", "Movie genre", "Rating"]
    assert (sizes["User ID"], sizes["Rating"]) == (757, 10)
    assert sizes["Movie ID"] == real.items.num_rows


def test_the_real_ratings_as_python_reads_them(real: RawDataset) -> None:
    lines = (REAL / "ratings.csv").read_text().splitlines()[1:]
    table = np.array([line.split(",") for line in lines], dtype=np.float64)
    ids = {
        name: np.array(getattr(real, f"{name}s")[f"{name}_id"].to_pylist(), dtype=np.int64) for name in ("user", "item")
    }
    assert np.array_equal(ids["user"][real.user], table[:, 0])
    assert np.array_equal(ids["item"][real.item], table[:, 1])
    assert np.array_equal(real.rating, table[:, 2])
    assert np.array_equal(real.timestamp, table[:, 3])
