"""MovieLens-1M's reader: quirks on small files, the paper's counts on the real ones."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rella.data.files import locate
from rella.data.movielens import AGES, FILES, OCCUPATIONS, read_ml1m
from rella.data.raw import RawDataset, field_count, field_vocabularies
from rella.prompts import WORDINGS, prompt_text
from rella.schemas import ITEMS, check

REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "ml-1m"

USERS = ["2::M::56::16::70072", "1::F::1::10::48067-2117"]
MOVIES = [
    "10::Misérables, Les (1995)::Drama|Musical",
    "3::Devil's Own, The (1997)::Action|Thriller",
    "7::Never Rated (1990)::Comedy",
    "40::NEL\x85inside (1999)::Comedy",
]
RATINGS = ["2::3::5::100", "1::40::1::90", "1::10::3::978300760"]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def files(users=USERS, movies=MOVIES, ratings=RATINGS, end="\n", folder="") -> Path:
        target = tmp_path / folder
        target.mkdir(parents=True, exist_ok=True)
        for name, lines in (("users", users), ("movies", movies), ("ratings", ratings)):
            (target / f"{name}.dat").write_bytes("".join(line + end for line in lines).encode("latin-1"))
        return tmp_path

    return files


def read(path: Path, strict: bool = True) -> RawDataset:
    return read_ml1m(locate("ml-1m", FILES, path), strict)


def assert_small(raw: RawDataset) -> None:
    assert raw.users.to_pylist() == [
        {
            "user": 0,
            "user_id": "1",
            "gender": "female",
            "age": "Under 18",
            "occupation": "K-12 student",
            "zipcode": "48067-2117",
        },
        {
            "user": 1,
            "user_id": "2",
            "gender": "male",
            "age": "56+",
            "occupation": "self-employed",
            "zipcode": "70072",
        },
    ]
    assert raw.items.to_pylist() == [
        {
            "item": 0,
            "item_id": "3",
            "title": "Devil's Own, The (1997)",
            "genre": "Action",
            "genres": ["Action", "Thriller"],
        },
        {
            "item": 1,
            "item_id": "10",
            "title": "Misérables, Les (1995)",
            "genre": "Drama",
            "genres": ["Drama", "Musical"],
        },
        {"item": 2, "item_id": "40", "title": "NEL\x85inside (1999)", "genre": "Comedy", "genres": ["Comedy"]},
    ]
    assert raw.user.tolist() == [1, 0, 0]
    assert raw.item.tolist() == [0, 2, 1]
    assert raw.rating.tolist() == [5.0, 1.0, 3.0]
    assert raw.timestamp.tolist() == [100, 90, 978300760]
    assert raw.rated
    assert raw.label is None
    assert raw.split is None
    assert raw.dropped == {}
    assert list(raw.fields)[3:] == ["Job", "Zipcode", "Movie ID", "Movie title", "Movie genre"]
    assert [a.dtype for a in (raw.user, raw.item, raw.rating, raw.timestamp)] == ["int32", "int32", "float32", "int64"]


def test_ids_are_numbered_in_numeric_order_and_only_rated_movies_stay(write: Write) -> None:
    assert_small(read(write()))


def test_windows_line_ends(write: Write) -> None:
    assert_small(read(write(end="\r\n")))


def test_without_a_final_newline(write: Write) -> None:
    folder = write()
    for file in folder.glob("*.dat"):
        file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert_small(read(folder))


def test_a_folder_that_holds_the_archives_folder(write: Write) -> None:
    assert_small(read(write(folder="ml-1m")))


@pytest.mark.parametrize("inside", ["ml-1m/", ""])
def test_the_archive_and_a_folder_with_it(write: Write, tmp_path: Path, inside: str) -> None:
    folder = write(folder="plain") / "plain"
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "ml-1m.zip", "w") as archive:
        for file in folder.glob("*.dat"):
            archive.write(file, f"{inside}{file.name}")
    assert_small(read(tmp_path / "zipped" / "ml-1m.zip"))
    assert_small(read(tmp_path / "zipped"))


def test_column_types(write: Write) -> None:
    raw = read(write())
    check(raw.items, ITEMS, "items")
    assert raw.items.schema.field("genres").type == pa.list_(pa.string())
    assert raw.users.column_names == ["user", "user_id", "gender", "age", "occupation", "zipcode"]
    assert raw.users.schema.field("user").type == pa.int32()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ratings": [*RATINGS, "1::3::4"]},
            r"ratings\.dat, row 4: 3 columns instead of 4 .*'1::3::4'.*original files",
        ),
        ({"ratings": ["1::3::4::5::6", *RATINGS]}, r"ratings\.dat, row 1: 5 columns instead of 4"),
        ({"ratings": [RATINGS[0], "", *RATINGS]}, r"ratings\.dat, row 2: 1 columns instead of 4"),
        ({"ratings": [*RATINGS, "1::3::4.5::9"]}, r"ratings\.dat, row 4: a column is not an integer.*4\.5"),
        ({"ratings": [*RATINGS, "1::3::::9"]}, r"ratings\.dat, row 4: a column is not an integer"),
        ({"ratings": [*RATINGS, "1::3::4::99999999999999999999"]}, r"ratings\.dat, row 4: a column is not an integer"),
        ({"ratings": [*RATINGS, "1::3::6::9"]}, r"ratings\.dat, row 4: rating 6 is not in 1\.\.5"),
        ({"ratings": [*RATINGS, "1::3::0::9"]}, r"ratings\.dat, row 4: rating 0 is not in 1\.\.5"),
        (
            {"ratings": [*RATINGS, "1::11::3::9"]},
            r"ratings\.dat, row 4: movie 11 is not in movies\.dat.*--data\.strict false",
        ),
        ({"ratings": [*RATINGS, "1::999999::3::9"]}, r"ratings\.dat, row 4: movie 999999 is not in movies\.dat"),
        ({"ratings": [RATINGS[0], "3::3::3::9"]}, r"ratings\.dat, row 2: user 3 is not in users\.dat"),
        ({"ratings": []}, r"ratings\.dat: the file has no rating"),
        ({"users": [*USERS, "3::X::25::1::1"]}, r"users\.dat, row 3: gender 'X' is none of \['F', 'M'\]"),
        ({"users": [*USERS, "3::M::26::1::1"]}, r"users\.dat, row 3: age '26' is none of"),
        ({"users": [*USERS, "3::M::25::21::1"]}, r"users\.dat, row 3: occupation '21' is none of"),
        ({"users": [*USERS, "3::M::25::1"]}, r"users\.dat, row 3: 4 columns instead of 5"),
        ({"users": [*USERS, "2::M::25::1::1"]}, r"users\.dat, row 3: user 2 appears for the second time"),
        ({"users": [*USERS, "b::M::25::1::1"]}, r"users\.dat, row 3: user 'b' is not an integer"),
        ({"movies": ["5::A::B::C", *MOVIES]}, r"movies\.dat, row 1: 4 columns instead of 3"),
        ({"movies": [*MOVIES, "50::Title::"]}, r"movies\.dat, row 5: an empty genre"),
    ],
)
def test_a_malformed_row_is_named(write: Write, change: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(**change))


def test_ratings_of_unknown_users_and_movies_are_counted_where_they_are_allowed(write: Write) -> None:
    ratings = [*RATINGS, "1::11::3::9", "3::3::3::9", "3::11::3::9", "1::999999::3::9"]
    folder = write(ratings=ratings)
    raw = read(folder, strict=False)
    # A rating that lacks both is counted once.
    assert raw.dropped == {"ratings of unknown users": 2, "ratings of unknown movies": 2}
    assert raw.user.tolist() == [1, 0, 0]
    assert raw.item.tolist() == [0, 2, 1]
    assert raw.items["item_id"].to_pylist() == ["3", "10", "40"]
    with pytest.raises(ValueError, match=r"ratings\.dat, row 5: user 3 is not in users\.dat"):
        read(folder)
    assert read(write(), strict=False).dropped == {}


def test_a_malformed_row_is_an_error_even_where_unknown_ids_are_allowed(write: Write) -> None:
    with pytest.raises(ValueError, match=r"ratings\.dat, row 4: rating 6"):
        read(write(ratings=[*RATINGS, "1::3::6::9"]), strict=False)
    with pytest.raises(ValueError, match=r"ratings\.dat: no rating has a user of users\.dat and a movie"):
        read(write(ratings=["1::11::3::9", "9::3::3::9"]), strict=False)


def test_an_empty_title_stays_empty(write: Write) -> None:
    raw = read(write(movies=["3::::Action", *MOVIES[:1], *MOVIES[2:]]))
    assert raw.items["title"].to_pylist()[0] == ""


def test_missing_files_are_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"neither users\.dat, movies\.dat, ratings\.dat nor ml-1m/ nor ml-1m\.zip"
    ):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read(tmp_path / "absent.zip")
    folder = write()
    (folder / "movies.dat").unlink()
    with pytest.raises(FileNotFoundError, match=r"movies\.dat: the file is missing"):
        read(folder)
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::1::1::1")
    with pytest.raises(FileNotFoundError, match=r"no users\.dat in the archive"):
        read(tmp_path / "some.zip")


def test_a_broken_archive(write: Write, tmp_path: Path) -> None:
    archive = tmp_path / "ml-1m.zip"
    archive.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="truncated or damaged zip archive"):
        read(archive)
    folder = write(folder="plain") / "plain"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in folder.glob("*.dat"):
            packed.write(file, file.name)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged zip archive"):
        read(archive)
    at = whole.index(b"1::40::1::90")
    archive.write_bytes(whole[:at] + b"2" + whole[at + 1 :])
    with pytest.raises(ValueError, match="truncated or damaged zip archive"):
        read(archive)


def test_profiles_fit_the_prompts_wording(write: Write) -> None:
    profile = read(write()).users.drop_columns(["user"]).to_pylist()[0]
    first_line = prompt_text(WORDINGS["ml-1m"], profile, ["A (1990)"], [4.0], "B (1991)").splitlines()[0]
    assert first_line == "The user is a female. Her job is K-12 student. Her age is Under 18."
    assert {"35-44", "Under 18", "56+"} <= set(AGES.values())
    assert {"sales/marketing", "college/grad student", "other"} <= set(OCCUPATIONS)


@pytest.fixture(scope="module")
def real() -> RawDataset:
    if not (REAL / "ratings.dat").is_file():
        pytest.skip("the MovieLens-1M files are not in ../shared/data/ml-1m")
    return read(REAL)


def test_the_papers_vocabularies(real: RawDataset) -> None:
    sizes = field_vocabularies(real)
    assert sizes == {
        "User ID": 6040,
        "Gender": 2,
        "Age": 7,
        "Job": 21,
        "Zipcode": 3439,
        "Movie ID": 3706,
        "Movie title": 3706,
        "Movie genre": 18,
        "Rating": 5,
    }
    assert list(sizes) == [*real.fields, "Rating"]
    assert sum(sizes.values()) == 16_944
    assert field_count(real) == 8 + 2
    assert real.dropped == {}


def test_the_real_ratings(real: RawDataset) -> None:
    assert len(real.rating) == 1_000_209
    assert np.bincount(real.rating.astype(int)).tolist() == [0, 56174, 107557, 261197, 348971, 226310]
    # The file's first row is 1::1193::5::978300760.
    assert real.users["user_id"][int(real.user[0])].as_py() == "1"
    assert real.items["title"][int(real.item[0])].as_py() == "One Flew Over the Cuckoo's Nest (1975)"
    assert int(real.timestamp[0]) == 978300760
    assert "Misérables, Les (1995)" in real.items["title"].to_pylist()
    for name in ("user", "item"):
        ids = [int(value) for value in getattr(real, f"{name}s")[f"{name}_id"].to_pylist()]
        assert ids == sorted(ids)
