"""Bad input through the jobs' own entry: one screen that names file, row or key and the remedy; nothing finished."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rella.artifacts import list_artifacts
from rella.dist.jobs import main, prepare_job, reit_job
from rella.storage import Storage

USERS = "".join(f"{u}::F::25::7::0\n" for u in range(1, 5))
MOVIES = "".join(f"{m}::Movie {m} (1990)::Drama\n" for m in range(1, 11))
RATINGS = "".join(f"{u}::{m}::{1 + (u + m) % 5}::{1000 * m + u}\n" for u in range(1, 5) for m in range(1, 11))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    for name, text in {"users.dat": USERS, "movies.dat": MOVIES, "ratings.dat": RATINGS}.items():
        (folder / name).write_text(text, encoding="latin-1")
    return folder


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a job that must fail; return what it says on standard error."""

    def fail(job: str, *flags: str, status: int = 1, done: tuple[str, ...] = ()) -> str:
        storage = tmp_path / "storage"
        action = {"prepare": prepare_job, "reit": reit_job}[job]
        try:
            code = main(job, "A job.", action, [*flags, "--storage", str(storage)])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        said = capsys.readouterr()
        assert code == status
        assert "Traceback" not in said.err
        assert len(said.err.strip().splitlines()) <= 20
        if said.out.strip():
            assert not said.out.strip().splitlines()[-1].startswith("{"), "no figures of a run that failed"
        finished = {a.path.split("/")[1] for a in list_artifacts(Storage(str(storage))) if a.is_complete()}
        assert finished == set(done)
        return said.err

    return fail


def test_a_missing_file(run: Callable[..., str], raw: Path) -> None:
    (raw / "movies.dat").unlink()
    said = run("prepare", "--dataset", "ml-1m", "--raw-dir", str(raw))
    assert "movies.dat: the file is missing" in said
    assert "--raw-dir" in said
    assert "no such file or folder" in run("prepare", "--dataset", "ml-1m", "--raw-dir", str(raw / "absent"))


def test_a_truncated_zip(run: Callable[..., str], raw: Path, tmp_path: Path) -> None:
    archive = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for file in raw.iterdir():
            opened.write(file, f"ml-1m/{file.name}")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    said = run("prepare", "--dataset", "ml-1m", "--raw-dir", str(archive))
    assert "truncated or damaged zip archive" in said
    assert "download it again" in said


def test_a_wrong_checksum(run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = tmp_path / "cache" / "rella" / "raw" / "ml-1m.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"x" * 5_917_549)
    said = run("prepare", "--dataset", "ml-1m")
    assert "has the MD5 " in said
    assert "instead of c4d9eecfca2ab87c1945afe126590906" in said
    assert str(archive) in said


def test_a_malformed_row(run: Callable[..., str], raw: Path) -> None:
    lines = RATINGS.splitlines()
    lines[16] = "2::7::five::100"
    (raw / "ratings.dat").write_text("\n".join(lines))
    said = run("prepare", "--dataset", "ml-1m", "--raw-dir", str(raw))
    assert "ratings.dat, row 17: " in said
    assert "'2::7::five::100'" in said


def test_a_rating_of_an_unknown_item(run: Callable[..., str], raw: Path, tmp_path: Path) -> None:
    (raw / "ratings.dat").write_text(RATINGS + "1::4711::5::1\n")
    said = run("prepare", "--dataset", "ml-1m", "--raw-dir", str(raw))
    assert "ratings.dat, row 41: movie 4711 is not in movies.dat" in said
    assert "--data.strict false" in said
    flags = ["--dataset", "ml-1m", "--raw-dir", str(raw), "--storage", str(tmp_path / "other")]
    assert main("prepare", "A job.", prepare_job, [*flags, "--data.strict", "false"]) == 0


def test_rows_that_are_left_out_are_counted(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "ratings.dat").write_text(RATINGS + "1::4711::5::1\n")
    flags = ["--dataset", "ml-1m", "--raw-dir", str(raw), "--storage", str(tmp_path / "other")]
    assert main("prepare", "A job.", prepare_job, [*flags, "--data.strict", "false"]) == 0
    assert "left out: 1 ratings of unknown movies" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--data.positive-abov", "3"], "--data.positive_abov 3; did you mean data.positive_above?"),
        (["--config", "{file}"], "own.yaml: Group 'tune' does not accept option 'learning_rat'; did you mean tune."),
        (["--dataset", "netflix"], "netflix"),
        (["--preset", "ml-1m-n1"], "ml-1m-n1"),
    ],
)
def test_an_unknown_key(run: Callable[..., str], tmp_path: Path, flags: list[str], key: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("tune: {learning_rat: 1.0}\n")
    said = run("prepare", *(f.format(file=file) for f in flags), status=1 if "netflix" in flags else 2)
    assert key in said


@pytest.mark.parametrize("flag", ["--k", "--score.k"])
def test_k_of_0(run: Callable[..., str], flag: str) -> None:
    said = run("reit", flag, "0")
    assert f"{flag[2:]} 0: a prompt shows at least 1 behaviour" in said
    assert f"give {flag} 1 or more" in said


def test_more_shots_than_samples(run: Callable[..., str]) -> None:
    said = run("reit", "--shots", "99999", "--data.sample-users", "20", done=("prepare",))
    assert "--shots 99999: the train split has" in said
    assert "or `all`" in said
    said = run("reit", "--test-rows", "99999", "--shots", "8", "--data.sample-users", "20", done=("prepare",))
    assert "--test-rows 99999: the test split has" in said


def test_all_labels_equal(run: Callable[..., str]) -> None:
    said = run("reit", "--data.positive-above", "9", "--shots", "8", "--data.sample-users", "20")
    assert "samples have the label 0, there is nothing to tell apart" in said
    assert "--data.positive-above" in said


def test_all_labels_of_a_split_equal(run: Callable[..., str], tmp_path: Path) -> None:
    """Both labels are there, but not in the part that is trained on."""
    described = own(tmp_path)
    rows = [f"u{u},{i},{i},{5 if i > 6 else 0}" for i in range(9) for u in range(3)]
    (tmp_path / "plays.csv").write_text("\n".join(["who,what,when,n", *rows]))
    flags = ["--shots", "4", "--data.split", "[1, 1, 1]"]
    said = run("reit", "--dataset", str(described), *flags, done=("prepare",))
    assert "--shots: all 7 samples of the train split have the label 0" in said


def test_an_empty_validation_split(run: Callable[..., str]) -> None:
    flags = ["--data.split", "[8, 0, 1]", "--shots", "8", "--data.sample-users", "20"]
    said = run("reit", *flags, done=("prepare",))
    assert "--tune.select-on: the valid split is empty; give it a share with --data.split" in said


def test_a_wording_that_names_what_the_data_do_not_have(run: Callable[..., str]) -> None:
    flags = ["--prompt.template", "bookcrossing", "--shots", "8", "--data.sample-users", "20", "--test-rows", "9"]
    said = run("reit", *flags, done=("prepare",))
    assert "data set sample: wording.user has {location}; it may use {age}, {gender}, {occupation}, {zipcode}" in said


def test_yes_is_two_tokens(run: Callable[..., str], tmp_path: Path) -> None:
    """A tokenizer that knows letters only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rella.lm.small_llama import Shape, new_model, save

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    save(new_model(Shape(hidden=16, layers=1, heads=2, intermediate=16), tokenizer), tokenizer, tmp_path / "letters")
    flags = ["--shots", "8", "--data.sample-users", "20", "--test-rows", "9"]
    said = run("reit", "--model", str(tmp_path / "letters"), *flags, done=("prepare",))
    assert "'Yes' is not one token behind wrapper 'vicuna'" in said
    assert "try another wrapper" in said


def own(tmp_path: Path, **changes: str) -> Path:
    """Write a small data set with its YAML and return that."""
    files = {
        "plays.csv": "who,what,when,n\n" + "".join(f"u{u},{i},{i},{(u + i) % 4}\n" for u in range(3) for i in range(9)),
        "songs.csv": "id,name\n" + "".join(f"{i},Song {i}\n" for i in range(9)),
        "own.yaml": "name: own\n"
        "interactions: {file: plays.csv, user: who, item: what, time: when, rating: n}\n"
        "items: {file: songs.csv, id: id, title: name}\n"
        "settings: {data: {positive_above: 1, min_history: 2}}\n",
    }
    for name, text in (files | changes).items():
        (tmp_path / name).write_text(text)
    return tmp_path / "own.yaml"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("own.yaml", "item: what", "itm: what", "does not accept option 'itm'; did you mean item"),
        ("own.yaml", "settings", "wordng: {user: x}\nsettings", "did you mean wording"),
        ("own.yaml", "settings", "wording: {user: 'a {b'}\nsettings", "own.yaml: wording.user: template 'a {b'"),
        ("own.yaml", "min_history: 2", "min_history: two", "own.yaml: settings: configuration: "),
        ("own.yaml", "rating: n", "rating: stars", "plays.csv: no column 'stars'; there are who, what, when, n"),
        ("own.yaml", ", rating: n", "", "every sample would have the same label"),
        ("own.yaml", "name: own", "name: Own Data", "name 'Own Data' must be lower-case"),
        ("own.yaml", "name: own", "name: ml-1m", "none of sample, ml-1m"),
        ("own.yaml", "plays.csv", "gone.csv", "gone.csv: the file is missing"),
        (
            "own.yaml",
            "positive_above",
            "positive_abov",
            "settings: configuration: there is no field 'data.positive_abov'; --help lists them; did you mean data.pos",
        ),
        ("own.yaml", "settings", "wording: {item: 'By {artist}'}\nsettings", "wording.item has {artist}; it may use"),
        ("own.yaml", "name: own\n", "name: [own\n", "own.yaml: not YAML"),
        ("plays.csv", "u1,4,4,1\n", "u1,4,4\n", "Expected 4 columns, got 3"),
        ("plays.csv", "u1,4,4,1\n", "u1,4,4,many\n", "plays.csv, row 15: column 'n' is 'many', which is no number"),
        ("plays.csv", "u1,4,4,1\n", "u1,4,4,\n", "plays.csv, row 15: column 'n' is empty"),
        ("plays.csv", "u1,4,4,1\n", "u1,4,,1\n", "plays.csv, row 15: column 'when' is empty"),
        ("plays.csv", "u1,4,4,1\n", "u1,,4,1\n", "plays.csv, row 15: column 'what' is empty"),
        ("plays.csv", "u1,4,4,1\n", "u1,77,4,1\n", "plays.csv, row 15: item '77' is not in the table of items"),
        (
            "plays.csv",
            "u1,4,4,1\n",
            "u1,4,noon,1\n",
            "plays.csv, row 15: column 'when' is 'noon', which is no number or",
        ),
        ("songs.csv", "3,Song 3\n", "2,Song 3\n", "songs.csv, row 5: item '2' appears for the second time"),
    ],
)
def test_own_data_that_is_not_right(
    run: Callable[..., str], tmp_path: Path, file: str, old: str, new: str, said: str
) -> None:
    described = own(tmp_path)
    text = (tmp_path / file).read_text()
    assert text.count(old) == 1
    (tmp_path / file).write_text(text.replace(old, new))
    assert said in run("prepare", "--dataset", str(described))


def test_another_separator(run: Callable[..., str], tmp_path: Path) -> None:
    described = own(tmp_path)
    songs = tmp_path / "songs.csv"
    songs.write_text(songs.read_text().replace(",", ";"))
    said = run("prepare", "--dataset", str(described))
    assert "songs.csv: the header 'id;name' is one column; .csv files are separated by commas" in said


def test_the_description_is_missing(run: Callable[..., str], tmp_path: Path) -> None:
    assert "there is no such file" in run("prepare", "--dataset", str(tmp_path / "absent.yaml"))


def test_own_data_that_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", str(own(tmp_path)), "--storage", str(tmp_path / "storage")]
    assert main("prepare", "A job.", prepare_job, flags) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["dataset"], figures["users"], figures["items"], figures["samples"]) == ("own", 3, 9, 21)
