"""A small BERT and a small T5 with tokenizers of their kinds, made once a session, and a data set of three users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rella.data.tables import Histories
from rella.models import ModelIdentity, identify
from rella.prompts import ML_1M, Display
from rella.textctr.small import save_bert, save_t5
from rella.textctr.texts import FieldTexts
from tests.textctr.small_models import TITLES, corpus

FIELDS = {
    "User ID": "users.user_id",
    "Gender": "users.gender",
    "Movie ID": "items.item_id",
    "Movie title": "items.title",
    "Movie genre": "items.genre",
}


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("text models") / "small-bert", corpus())


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("text models") / "small-t5", corpus())


@pytest.fixture(scope="session")
def bert(bert_folder: Path) -> ModelIdentity:
    return identify(str(bert_folder))


@pytest.fixture(scope="session")
def t5(t5_folder: Path) -> ModelIdentity:
    return identify(str(t5_folder))


@pytest.fixture(scope="session")
def bert_tokenizer(bert: ModelIdentity) -> Any:
    from rella.lm.loading import load_tokenizer

    return load_tokenizer(bert)


@pytest.fixture(scope="session")
def t5_tokenizer(t5: ModelIdentity) -> Any:
    from rella.lm.loading import load_tokenizer

    return load_tokenizer(t5)


def small_tables(titles: Sequence[str] = TITLES) -> tuple[pa.Table, pa.Table, Histories]:
    """Three users with 0, 2 and 5 behaviours."""
    users = pa.table({"user": [0, 1, 2], "user_id": ["7", "8", "9"], "gender": ["female", "male", None]})
    genres = ["Crime", "Horror", "Romance", "Animation", "Comedy"]
    items = pa.table(
        {"item": list(range(5)), "item_id": [f"m{n}" for n in range(5)], "title": list(titles), "genre": genres}
    )
    histories = Histories(
        np.array([0, 0, 2, 7]),
        np.array([0, 1, 4, 3, 2, 1, 0], dtype=np.int32),
        np.array([4, 1, 2, 3, 4, 5, 1], dtype=np.float32),
    )
    return users, items, histories


@pytest.fixture
def texts() -> FieldTexts:
    return FieldTexts.from_tables(*small_tables(), FIELDS, ML_1M, Display())
