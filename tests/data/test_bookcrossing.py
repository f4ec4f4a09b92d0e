"""BookCrossing's reader: the dump's quirks on small files, facts on the real ones."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rella.data.bookcrossing import COUNTRIES, FILES, age_bucket, country, read_bookcrossing
from rella.data.files import locate
from rella.data.raw import RawDataset, field_count, field_vocabularies
from rella.schemas import ITEMS, check

REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "bookcrossing"

USERS = [
    '"User-ID";"Location";"Age"',
    '"10";"la coruña, \\"n/a\\", españa";"26"',
    '"2";"nyc, new york, usa";NULL',
    '"7";"cernusco s\n, milan, italy";"200"',
]
BOOKS = [
    '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S";"Image-URL-M";"Image-URL-L"',
    '"034545104X";"Flesh; \\"Tones\\"";"M. J. Rose &amp; Co";"2002";"Ballantine\tBooks\t";"http://x/a.jpg";"";""',
    '"0x";"Œuvres \x81 café";"N/A";"0";"n/a";"";"";""',
    '"0 4234";"Blank in the ISBN";"Nobody";"1999";"None";"";"";""',
    '"B00009EF82";"";"\\"Pseudonym\\"";"20033";"";"";"";""',
]
RATINGS = [
    '"User-ID";"ISBN";"Book-Rating"',
    '"2";"034545104X";"0"',
    '"10";"B00009EF82";"10"',
    '"10";"034545104X";"7"',
]

Write = Callable[..., Path]


def encode(text: str) -> bytes:
    """cp1252, with the bytes that it leaves undefined."""
    return b"".join(c.encode("latin-1") if "\x80" <= c < "\xa0" else c.encode("cp1252") for c in text)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def files(users=USERS, books=BOOKS, ratings=RATINGS, end="\n", folder="") -> Path:
        target = tmp_path / folder
        target.mkdir(parents=True, exist_ok=True)
        for name, lines in zip(FILES, (users, books, ratings), strict=True):
            (target / name).write_bytes(encode("".join(line + end for line in lines)))
        return tmp_path

    return files


def read(path: Path, strict: bool = False) -> RawDataset:
    return read_bookcrossing(locate("bookcrossing", FILES, path, "BX-CSV-Dump.zip"), strict)


def assert_small(raw: RawDataset) -> None:
    assert raw.users.to_pylist() == [
        {"user": 0, "user_id": "2", "location": "USA", "age": "unknown"},
        {"user": 1, "user_id": "7", "location": "Italy", "age": "unknown"},
        {"user": 2, "user_id": "10", "location": "Spain", "age": "25-29"},
    ]
    assert raw.items.to_pylist() == [
        {
            "item": 0,
            "item_id": "034545104X",
            "title": 'Flesh; \\"Tones\\"',
            "author": "M. J. Rose &amp; Co",
            "year": "2002",
            "publisher": "Ballantine\tBooks",
        },
        {
            "item": 1,
            "item_id": "0x",
            "title": "Œuvres \x81 café",
            "author": "unknown",
            "year": "unknown",
            "publisher": "unknown",
        },
        {
            "item": 2,
            "item_id": "B00009EF82",
            "title": "",
            "author": '\\"Pseudonym\\"',
            "year": "unknown",
            "publisher": "",
        },
    ]
    assert raw.user.tolist() == [0, 2, 2]
    assert raw.item.tolist() == [0, 2, 0]
    assert raw.rating.tolist() == [0.0, 10.0, 7.0]
    assert raw.timestamp.tolist() == [0, 1, 2]
    assert [a.dtype for a in (raw.user, raw.item, raw.rating, raw.timestamp)] == ["int32", "int32", "float32", "int64"]
    assert raw.rated
    assert raw.dropped == {"books whose ISBN is not letters and digits": 1}


def test_users_by_number_books_and_ratings_in_file_order(write: Write) -> None:
    assert_small(read(write()))
    assert_small(read(write(), strict=True))


def test_windows_line_ends(write: Write) -> None:
    assert_small(read(write(end="\r\n")))


def test_without_a_final_newline(write: Write) -> None:
    folder = write()
    for file in folder.glob("*.csv"):
        file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert_small(read(folder))


def test_books_without_image_addresses(write: Write) -> None:
    assert_small(read(write(books=[re.sub(r'(;"[^"]*"){3}$', "", line) for line in BOOKS])))


@pytest.mark.parametrize("inside", ["bookcrossing/", ""])
def test_the_archive_and_folders_around_it(write: Write, tmp_path: Path, inside: str) -> None:
    folder = write(folder="plain") / "plain"
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "BX-CSV-Dump.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.glob("*.csv"):
            archive.write(file, f"{inside}{file.name}")
    assert_small(read(tmp_path / "zipped" / "BX-CSV-Dump.zip"))
    assert_small(read(tmp_path / "zipped"))
    assert_small(read(write(folder="bookcrossing")))


def test_column_types_and_fields(write: Write) -> None:
    raw = read(write())
    check(raw.items, ITEMS, "items")
    assert raw.users.schema.field("user").type == pa.int32()
    for table in (raw.users, raw.items):
        assert not any(table.schema.field(name).nullable for name in table.column_names)
    assert field_vocabularies(raw) == {
        "User ID": 3,
        "Location": 3,
        "Age": 2,
        "ISBN": 3,
        "Book title": 3,
        "Author": 3,
        "Publication year": 2,
        "Publisher": 3,
        "Rating": 3,
    }
    assert field_count(raw) == 8 + 2


def test_every_byte_is_read_as_a_character_of_its_own(write: Write) -> None:
    every = bytes(byte for byte in range(0x80, 0x100))
    folder = write(books=[*BOOKS, '"9";"@";"A";"2000";"P";"";"";""'])
    file = folder / "BX-Books.csv"
    file.write_bytes(file.read_bytes().replace(b"@", every))
    title = read(folder).items["title"].to_pylist()[-1]
    assert len(set(title)) == 128
    assert title[:2] == "€\x81"
    assert [c for c in title if "\x80" <= c < "\xa0"] == ["\x81", "\x8d", "\x8f", "\x90", "\x9d"]


def test_odd_fields(write: Write) -> None:
    books = [
        *BOOKS[:1],
        '"1";"\\"Quoted\\"";NULL;NULL;NULL;"";"";""',
        '"2";NULL;"Null";"NULL";"NULL";"";"";""',
        '"\t3\t";"a;NULL;b";"c:\\";"1999";"two\nlines";"";"";""',
        '"0b";"A";"N/a ";"1999";"N/A";"";"";""',
        '"0B";"A";"A";"1999";"B";"";"";""',
    ]
    ratings = [*RATINGS[:1], '"2";"\t3";"1"', '"2";"0b";"2"', '"2";"0B";"3"', '"2";"\\3\\";"4"', '"2";NULL;"5"']
    raw = read(write(books=books, ratings=ratings))
    columns = ("item_id", "title", "author", "year", "publisher")
    assert [tuple(row[name] for name in columns) for row in raw.items.to_pylist()] == [
        ("1", '\\"Quoted\\"', "unknown", "unknown", "unknown"),
        ("2", "", "Null", "NULL", "NULL"),
        ("3", "a;NULL;b", "c:\\", "1999", "two\nlines"),
        ("0b", "A", "N/a ", "1999", "unknown"),
        ("0B", "A", "A", "1999", "B"),
    ]
    assert raw.item.tolist() == [2, 3, 4]
    assert raw.timestamp.tolist() == [0, 1, 2]
    assert raw.dropped == {"ratings of unknown books": 2}


def test_unknown_users_and_books(write: Write) -> None:
    ratings = [*RATINGS[:2], '"2";"no such";"1"', '"5";"0x";"1"', '"5";"no such";"1"', '"2";"0 4234";"1"', *RATINGS[2:]]
    folder = write(ratings=ratings)
    raw = read(folder)
    # A rating that lacks both is counted once; so is that of a book whose ISBN is no ISBN.
    assert raw.dropped == {
        "books whose ISBN is not letters and digits": 1,
        "ratings of unknown users": 2,
        "ratings of unknown books": 2,
    }
    assert raw.user.tolist() == [0, 2, 2]
    assert raw.timestamp.tolist() == [0, 5, 6]
    with pytest.raises(
        ValueError, match=r"Book-Ratings\.csv, row 4: the user is not in BX-Users\.csv.*5.*data\.strict"
    ):
        read(folder, strict=True)
    with pytest.raises(ValueError, match=r"Book-Ratings\.csv, row 3: the book is not in BX-Books\.csv: .*no such"):
        read(write(ratings=ratings[:3]), strict=True)
    with pytest.raises(ValueError, match=r"no rating has a user of BX-Users\.csv and a book of BX-Books\.csv"):
        read(write(ratings=[RATINGS[0], ratings[2]]))


def test_the_first_of_two_rows_with_one_id_counts(write: Write) -> None:
    users = [*USERS, '"2";"paris, , france";"30"', '"02";"rome, , italy";"30"']
    books = [*BOOKS, '"0x";"Again";"A";"2000";"P";"";"";""']
    raw = read(write(users=users, books=books))
    assert raw.dropped == {
        "users listed a second time": 2,
        "books whose ISBN is not letters and digits": 1,
        "books listed a second time": 1,
    }
    assert_small(
        RawDataset(
            raw.users,
            raw.items,
            raw.user,
            raw.item,
            raw.rating,
            raw.timestamp,
            dropped={"books whose ISBN is not letters and digits": 1},
        )
    )
    # Row 6: the line break inside the third user's location is a line of the file.
    with pytest.raises(
        ValueError, match=r"Users\.csv, row 6: user 2 appears for the second time: .*paris.*data\.strict"
    ):
        read(write(users=users), strict=True)
    with pytest.raises(ValueError, match=r"Books\.csv, row 6: book 0x appears for the second time: .*Again"):
        read(write(books=books), strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ratings": [*RATINGS, '"2";"0x"']},
            r"Ratings\.csv, row 5: 2 columns in double quotes instead of 3 \(User.*: '\"2\";\"0x\"'.*original files",
        ),
        ({"ratings": [*RATINGS[:2], '"2";"0x";"1";"1"', *RATINGS]}, r"Ratings\.csv, row 3: 4 columns"),
        ({"ratings": [*RATINGS[:2], "2;0x;1", *RATINGS[2:]]}, r"Ratings\.csv, row 3: 1 columns .*'2;0x;1'"),
        ({"ratings": [RATINGS[0], "2;0x;1", *RATINGS[2:]]}, r"Ratings\.csv, row 2: 1 columns .*'2;0x;1'"),
        ({"ratings": [*RATINGS, "2;0x;1"]}, r"Ratings\.csv, row 5: 1 columns .*'2;0x;1'"),
        ({"ratings": [*RATINGS, '"2";"0x";"1']}, r"Ratings\.csv, row 5: 3 columns in double quotes.*\"1'"),
        ({"ratings": [*RATINGS[:2], '"2";"0', *RATINGS[2:]]}, r"Ratings\.csv, row 3: 2 columns .*'\"2\";\"0'"),
        ({"ratings": [*RATINGS[:2], "", *RATINGS[2:]]}, r"Ratings\.csv, row 3: 1 columns in double quotes.*''"),
        ({"ratings": [*RATINGS, '"2";"0x";"4.5"']}, r"Ratings\.csv, row 5: Book-Rating '4\.5' is not an integer"),
        ({"ratings": [*RATINGS, '"2";"0x";NULL']}, r"row 5: Book-Rating 'NULL' is not an integer: '.*0x\";NULL'"),
        ({"ratings": [*RATINGS, '"2";"0x";"-1"']}, r"Ratings\.csv, row 5: Book-Rating '-1' is not an integer"),
        ({"ratings": [*RATINGS, '"2";"0x";"11"']}, r"Ratings\.csv, row 5: Book-Rating 11 is not in 0\.\.10: .*0x"),
        ({"ratings": [*RATINGS, '"b";"0x";"1"']}, r"Ratings\.csv, row 5: User-ID 'b' is not an integer"),
        ({"ratings": RATINGS[:1]}, r"Ratings\.csv: the file has no row"),
        ({"ratings": []}, r"Ratings\.csv, row 1: the header User-ID;ISBN;Book-Rating is missing"),
        ({"ratings": RATINGS[1:]}, r"Ratings\.csv, row 1: the header .*'\"2\";\"034545104X\";\"0\"'"),
        ({"users": [*USERS, '"3";"a, b, usa";"old"']}, r"Users\.csv, row 6: Age is neither an integer nor NULL: .*old"),
        ({"users": [*USERS, '"3";"a, b, usa"']}, r"Users\.csv, row 6: 2 columns in double quotes instead of 3"),
        ({"users": [*USERS, '"x";"a, b, usa";NULL']}, r"Users\.csv, row 6: User-ID 'x' is not .*: '.*usa\";NULL'"),
        ({"users": [*USERS, '"3";"cut off']}, r"Users\.csv, row 6: 2 columns .*cut off"),
        ({"users": ["User;Place;Age", *USERS[1:]]}, r"Users\.csv, row 1: the header User-ID;Location;Age is missing"),
        ({"books": [*BOOKS, '"5";"T";"A";"1999";"P"']}, r"Books\.csv, row 6: 5 columns in double quotes instead of 8"),
        ({"books": [BOOKS[0].replace("Author", "Writer"), *BOOKS[1:]]}, r"Books\.csv, row 1: the header ISBN;Book-"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_malformed_row_is_named(write: Write, change: dict[str, list[str]], message: str, end: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(**change, end=end))


def test_missing_files_are_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither BX-Users\.csv, .* nor bookcrossing/ nor BX-CSV-Dump\.zip"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read(tmp_path / "absent.zip")
    folder = write()
    (folder / "BX-Books.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"BX-Books\.csv: the file is missing"):
        read(folder)
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("BX-Users.csv", USERS[0])
    with pytest.raises(FileNotFoundError, match=r"no BX-Books\.csv in the archive"):
        read(tmp_path / "some.zip")


def test_a_broken_archive(write: Write, tmp_path: Path) -> None:
    folder = write(folder="plain") / "plain"
    archive = tmp_path / "BX-CSV-Dump.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in FILES:
            packed.write(folder / name, name)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged zip archive"):
        read(archive)
    archive.write_bytes(whole.replace(b'"10";"B00009EF82";"10"', b'"10";"B00009EF82";"11"'))
    with pytest.raises(ValueError, match="truncated or damaged zip archive"):
        read(archive)


@pytest.mark.parametrize(
    ("age", "bucket"),
    [
        (None, "unknown"),
        (0, "unknown"),
        (4, "unknown"),
        (5, "under 18"),
        (17, "under 18"),
        (18, "18-24"),
        (24, "18-24"),
        (25, "25-29"),
        (34, "30-34"),
        (55, "55-59"),
        (59, "55-59"),
        (60, "60+"),
        (100, "60+"),
        (101, "unknown"),
    ],
)
def test_age_buckets(age: int | None, bucket: str) -> None:
    assert age_bucket(age) == bucket


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("nyc, new york, usa", "USA"),
        ("nyc, new york, us", "USA"),
        ("nyc, new york, u.s.a.", "USA"),
        ("lithia, florida, u.s>", "USA"),
        ("x, y, good old u.s.a.!", "USA"),
        ("leeds, yorkshire, u k", "UK"),
        ("london, england, uk", "UK"),
        ("london, england, united kingdom", "United Kingdom"),
        ("frederiksted, virgin islands, u.s. virgin islands", "U.S. Virgin Islands"),
        ("vitoria, álava,", "Spain"),
        ("barcelona, catalunya, catalunya spain", "Spain"),
        ("madrid, madrid, espaã±a", "Spain"),
        ("madrid, madrid, espaï¿½a", "Spain"),
        ("malaga, andalucia, espaã?â±a", "Spain"),
        ("roma, lazio, l`italia", "Italy"),
        ("puebla, puebla, méxico", "Mexico"),
        ("abidjan, , côte d", "Ivory Coast"),
        ("abidjan, x, cote d`ivoire", "Ivory Coast"),
        ("curitiba, _ yukon, _ brasil", "Brazil"),
        ("guangzhou, guangdong, öð¹ú", "China"),
        ("yangzhou, jiangsu, people`s republic of china", "China"),
        ("athens, attiki, greece (=hellas)", "Greece"),
        ("stuttgart, baden-württemberg,", "Germany"),
        ("world, wide, we`re global!", "Global"),
        ("wherever, somewhere, heaven.", "Heaven"),
        ("lawrenceville", "Lawrenceville"),
        ("cernusco s\n, milan, italy", "Italy"),
        ("", "unknown"),
        ("a, b, ", "unknown"),
        ("a, b, x", "unknown"),
        ("lisbon, \\" + '"n/a\\",', "unknown"),
        ("a, b, n/a - on the road", "unknown"),
        ("shanghai, shanghai, &#20013;&#22269;", "unknown"),
        ("a, b, ?tajerska", "unknown"),
        ("a, b, who@home", "unknown"),
        ("a, capsule corporation hq, *", "unknown"),
        ("a, b, žluťoučký", "unknown"),
        ("tokyo, tokyo, 日本", "unknown"),
    ],
)
def test_countries(location: str, name: str) -> None:
    assert country(location) == name


def test_no_spelling_stands_for_two_countries() -> None:
    table = json.loads(COUNTRIES.read_text("utf-8"))
    spellings = [text.lower() for texts in table["spellings"].values() for text in texts]
    assert len(spellings) == len(set(spellings))
    readable = re.compile(r"[A-Za-z0-9 \-.&/()]+")
    assert all(readable.fullmatch(name) for part in ("spellings", "containing") for name in table[part])
    assert all(country(f"a, b, {text}") == name for name, texts in table["spellings"].items() for text in texts)


@pytest.fixture(scope="module")
def real() -> RawDataset:
    if not (REAL / "BX-Users.csv").is_file():
        pytest.skip("the BookCrossing files are not in ../shared/data/bookcrossing")
    return read(REAL)


def test_the_papers_users(real: RawDataset) -> None:
    sizes = field_vocabularies(real)
    assert list(sizes) == [*real.fields, "Rating"]
    assert (sizes["User ID"], sizes["Location"], sizes["Age"], sizes["Rating"]) == (278_858, 922, 11, 11)
    assert real.users["user_id"].to_pylist() == [str(n) for n in range(1, 278_859)]
    names = real.users["location"].unique().to_pylist()
    assert all(re.fullmatch(r"[A-Za-z0-9 \-.&/()]+", name) for name in names)


def test_the_real_books_and_ratings(real: RawDataset) -> None:
    bad = real.dropped.get("books whose ISBN is not letters and digits", 0)
    assert real.items.num_rows == 33_211 - bad
    assert len(real.rating) + real.dropped["ratings of unknown books"] == 138_103
    assert set(real.dropped) <= {"books whose ISBN is not letters and digits", "ratings of unknown books"}
    assert int((np.bincount(real.user) > 5).sum()) == 1_728
    assert (np.diff(real.timestamp) > 0).all()


def test_the_real_files_as_a_plain_parser_reads_them(real: RawDataset) -> None:
    users, books, ratings = ((REAL / name).read_bytes().decode("cp1252").replace("\r\n", "\n") for name in FILES)

    found = re.findall(r'^"(\d+)";"((?:[^"\\]|\\.)*)";(?:"(\d+)"|NULL)$', users, re.M)
    assert len(found) == 278_858
    assert real.users["location"].to_pylist() == [country(place) for _, place, _ in found]
    assert real.users["age"].to_pylist() == [age_bucket(int(age) if age else None) for _, _, age in found]

    quoted = r'"((?:[^"\\]|\\.)*)"'
    rows = re.findall(rf"^{';'.join([quoted] * 8)}$", books, re.M)[1:]
    assert len(rows) == 33_211
    assert real.items["item_id"].to_pylist() == [row[0] for row in rows]
    assert real.items["title"].to_pylist() == [row[1] for row in rows]
    authors = ["unknown" if row[2].lower() == "n/a" else row[2] for row in rows]
    assert real.items["author"].to_pylist() == authors
    assert real.items["year"].to_pylist() == [row[3] if len(row[3]) == 4 else "unknown" for row in rows]
    assert real.items["publisher"].to_pylist() == ["unknown" if row[4].lower() == "n/a" else row[4] for row in rows]

    item_of = {row[0]: item for item, row in enumerate(rows)}
    triples = re.findall(r'^"(\d+)";"(.*)";"(\d+)"$', ratings, re.M)
    assert len(triples) == 138_103
    listed = [(int(user) - 1, item_of[isbn], int(stars)) for user, isbn, stars in triples if isbn in item_of]
    assert np.array_equal(np.stack([real.user, real.item, real.rating.astype(int)], axis=1), np.array(listed))
