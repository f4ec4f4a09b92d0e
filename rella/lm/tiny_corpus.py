"""What the stand-in model reads in pre-training: texts about the catalogue and other users' behaviours.

The users are `pretraining_dataset`'s: none of them, and none of their ratings, is in the data set `sample`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rella.data.raw import RawDataset
from rella.data.synthetic import Catalogue, catalogue
from rella.data.synthetic_words import AGES, GENRES, OCCUPATIONS
from rella.prompts import ML_1M, WRAPPERS, answer_text, behaviour_list, item_text, profile_words, prompt_text
from rella.wording import fill

Ints = npt.NDArray[np.int64]

Text = tuple[str, list[int]]
"""A text and the items it names, in the order in which it names them."""


@dataclass(frozen=True)
class Mixture:
    """How much of the questions the model gets to see; the knobs of how good it is before any tuning."""

    items: float = 0.12
    """Share of texts about the catalogue; the rest are behaviour lists."""
    questions: float = 0.5
    """Share of behaviour lists that end in a question and its answer."""
    exact: float = 0.3
    """Share of the questions in the very words of `rella.prompts`."""
    wrong: float = 0.12
    """Share of the answers that are drawn at random."""
    habit: float = 0.55
    """Share of the answers that follow the last behaviour of the list instead of the user's taste. Language models lean
    on what they read last; it makes this one rank worse than it could, and tuning can unlearn it."""
    related: float = 0.8
    """Share of the questions whose target comes from the genres of the list."""
    genres: int = 7
    """Most genres in one list."""


class Corpus:
    """Draws pre-training texts; the same generator state gives the same texts."""

    def __init__(self, data: RawDataset, mixture: Mixture) -> None:
        """Index `data`, whose rows are by user and then time."""
        self.mixture = mixture
        self.movies: Catalogue = catalogue()
        self.titles: list[str] = self.movies.items.column("title").to_pylist()
        self.item = data.item.astype(np.int64)
        self.rating = data.rating.astype(np.int64)
        self.genre = self.movies.genre[self.item]
        self.first = np.searchsorted(data.user, np.arange(data.users.num_rows + 1))
        columns = data.users.select(["gender", "age", "occupation"]).to_pylist()
        self.profiles: list[dict[str, str]] = columns

    def texts(self, rng: np.random.Generator, count: int, k: int) -> list[Text]:
        """Return `count` texts of one kind and about one length: lists of `k` behaviours, or about the catalogue."""
        if rng.random() < self.mixture.items:
            return [self.about_items(rng, max(1, k // 2)) for _ in range(count)]
        return [self.behaviours(rng, k) for _ in range(count)]

    def about_items(self, rng: np.random.Generator, count: int) -> Text:
        """Return `count` statements about movies, one a line."""
        lines = [self._statement(rng) for _ in range(count)]
        return "\n".join(text for text, _ in lines), [item for _, items in lines for item in items]

    def _statement(self, rng: np.random.Generator) -> Text:
        item = int(rng.integers(len(self.titles)))
        title, genre = self.titles[item], GENRES[self.movies.genre[item]]
        kind = rng.random()
        if kind < 0.6:
            return item_text(ML_1M, {"title": title, "genre": genre}), [item]
        if kind < 0.65:
            return f"The movie ***{title}*** is of the genre {genre}.", [item]
        franchise = self.movies.franchise
        if kind < 0.75 and franchise[item] >= 0:
            other = int(rng.choice(np.flatnonzero(franchise == franchise[item])))
            return f"The movies {title} and {self.titles[other]} belong to the same series.", [item, other]
        other = int(rng.choice(np.flatnonzero(self.movies.genre == self.movies.genre[item])))
        return f"The movies {title} and {self.titles[other]} are both of the genre {genre}.", [item, other]

    def behaviours(self, rng: np.random.Generator, k: int) -> Text:
        """Return one user's `k` behaviours in the words of a prompt, with or without a question at the end."""
        user = int(rng.integers(len(self.profiles)))
        profile = self.profiles[user]
        rows = self._rows(rng, user, k + 1)
        target = int(rows[rng.integers(len(rows))])
        if rng.random() >= self.mixture.related:
            target = int(rng.integers(self.first[user], self.first[user + 1]))
        listed = rows[rows != target][:k]
        titles = [self.titles[i] for i in self.item[listed]]
        ratings = self.rating[listed].tolist()
        if rng.random() >= self.mixture.questions:
            words = profile_words(ML_1M, profile)
            lines = [fill(ML_1M.user, words), fill(ML_1M.lead, words), behaviour_list(ML_1M, titles, ratings)]
            return "\n".join(lines[int(rng.choice(3, p=(0.2, 0.2, 0.6))) :]), self.item[listed].tolist()
        liked = bool(self.rating[target] >= 4)
        source = rng.random()
        if source < self.mixture.habit:
            liked = ratings[-1] >= 4
        elif source < self.mixture.habit + self.mixture.wrong:
            liked = bool(rng.random() < 0.5)
        question = self._question(rng, profile, titles, ratings, self.titles[self.item[target]])
        return question + answer_text(liked), [*self.item[listed].tolist(), int(self.item[target])]

    def _rows(self, rng: np.random.Generator, user: int, count: int) -> Ints:
        """Return `count` of the user's behaviours in order of time, from few genres so that some of them agree."""
        history = np.arange(self.first[user], self.first[user + 1])
        kept = rng.permutation(len(GENRES))[: int(rng.integers(2, max(2, min(count - 1, self.mixture.genres)) + 1))]
        some = history[np.isin(self.genre[history], kept)]
        if len(some) < count:
            some = history
        rows: Ints = np.sort(rng.permutation(some)[:count])
        return rows

    def _question(
        self, rng: np.random.Generator, profile: dict[str, str], titles: list[str], ratings: list[int], target: str
    ) -> str:
        """Return the text up to the blank before the answer: the exact prompt, or one in other words."""
        wrapper = WRAPPERS["vicuna" if rng.random() < 0.7 else "plain"]
        if rng.random() < self.mixture.exact:
            return wrapper.wrap(prompt_text(ML_1M, profile, titles, ratings, target)) + wrapper.separator
        they = "she" if profile["gender"] == "female" else "he"
        asked = (
            f"Will {they} like the movie {target}?",
            f"Is {target} a movie for the user?",
            f"Should the movie ***{target}*** be recommended?",
        )[int(rng.integers(3))]
        lead = fill(ML_1M.lead, profile_words(ML_1M, profile))
        lines = [lead, behaviour_list(ML_1M, titles, ratings), asked]
        return wrapper.wrap("\n".join(lines)) + wrapper.separator


def tokenizer_texts(data: RawDataset, seed: int = 0) -> list[str]:
    """Return texts for the tokenizer: every title and profile value several times, and prompts of each kind."""
    rng = np.random.default_rng([seed, 5])
    corpus = Corpus(data, Mixture())
    texts = [corpus.behaviours(rng, k)[0] for k in (4, 8, 16, 30) for _ in range(400)]
    for title in corpus.titles:
        texts += [f" {title}", title, f"***{title}***."]
    texts += [f" {value}." for value in (*AGES, *OCCUPATIONS, *GENRES) for _ in range(20)]
    texts += [f"['{n}.', '{n}.\", '{n}.', \"{n}.\", \"{n}." for n in range(61) for _ in range(5)]
    return [*texts, *(corpus.about_items(rng, 8)[0] for _ in range(400))]
