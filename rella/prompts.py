"""Every sentence the language model reads, as pure functions from a row to a string.

Figures 9 and 10 of the paper (samples without and with SUBR) share one wording: only the behaviours differ.
Figures 4 and 11 describe an item. The chat wrapper (§4.1.4, D.1.2: Vicuna's for every backbone) is a separate step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

YES, NO = "Yes", "No"
"""The binary key answer words of §2.2; Eq. 2 compares their logits."""


def answer_text(label: int | bool) -> str:
    """Return the trained answer, `"Yes."` for label 1 and `"No."` for label 0 (§2.2, without an end token)."""
    return f"{YES}." if label else f"{NO}."


def integer_stars(rating: float) -> str:
    """Return a rating as in MovieLens-1M and BookCrossing, e.g. `"4 stars"`; 'star' when it is at most 1."""
    return f"{round(rating)} {'star' if rating <= 1 else 'stars'}"


def decimal_stars(rating: float) -> str:
    """Return a rating as in MovieLens-25M, e.g. `"4.0 stars"`; 'star' when it is at most 1."""
    return f"{rating:.1f} {'star' if rating <= 1 else 'stars'}"


def behaviour_list(titles: Sequence[str], ratings: Sequence[float], stars: Callable[[float], str]) -> str:
    """Return the numbered behaviours as Python's `repr` of a list, oldest first (Figures 9 and 10).

    `repr` puts double quotes around a title with an apostrophe, as in the authors' data, and escapes what could end
    the list early (quotes, line breaks), so that no title can break the prompt's structure.

    Raises:
        ValueError: the two sequences differ in length.
    """
    return repr([f"{n}. {title} ({stars(r)})" for n, (title, r) in enumerate(zip(titles, ratings, strict=True))])


def one_line(text: str) -> str:
    """Return `text` with every line break and control character as a blank and runs of blanks collapsed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@dataclass(frozen=True)
class PromptTemplate:
    """The wording of one data set: who the user is, what the behaviours are, how an item is described."""

    name: str
    user: Callable[[Mapping[str, str]], str]
    """profile fields → the first line, or an empty string where the data set has no profile."""
    lead: Callable[[Mapping[str, str]], str]
    """profile fields → the line above the behaviours."""
    question: Callable[[Mapping[str, str], str], str]
    """(profile fields, target title) → the question."""
    note: str
    """What the stars mean."""
    item: Callable[[Mapping[str, str]], str]
    """item fields → the descriptive text of Figures 4 and 11."""
    stars: Callable[[float], str] = integer_stars
    instruction: str = "You should ONLY tell me yes or no."

    def prompt(self, profile: Mapping[str, str], titles: Sequence[str], ratings: Sequence[float], target: str) -> str:
        """Return x^text of §2.2: profile, behaviours (chronological), question, note and instruction.

        Args:
            profile: the user's fields as text, e.g. `{"gender": "female", "age": "35-44", "occupation": "writer"}`.
            titles: K behaviours' titles, oldest first.
            ratings: their K ratings in stars.
            target: the target item's title.
        """
        lines = [
            self.user(profile),
            self.lead(profile),
            behaviour_list(titles, ratings, self.stars),
            self.question(profile, one_line(target)),
            self.note,
            self.instruction,
        ]
        return "\n".join(line for line in lines if line)


_PRONOUNS = {"female": ("She", "Her", "she"), "male": ("He", "His", "he")}


def _pronouns(profile: Mapping[str, str]) -> tuple[str, str, str]:
    gender = profile["gender"]
    if gender not in _PRONOUNS:
        raise ValueError(f"gender {gender!r}: the MovieLens-1M wording knows {sorted(_PRONOUNS)}")
    return _PRONOUNS[gender]


def _ml1m_user(profile: Mapping[str, str]) -> str:
    _, possessive, _ = _pronouns(profile)
    return (
        f"The user is a {profile['gender']}. {possessive} job is {profile['occupation']}. "
        f"{possessive} age is {profile['age']}."
    )


def _ml1m_lead(profile: Mapping[str, str]) -> str:
    return f"{_pronouns(profile)[0]} watched the following movies in order in the past, and rated them:"


def _ml1m_question(profile: Mapping[str, str], title: str) -> str:
    they = _pronouns(profile)[2]
    return f"Based on the movies {they} has watched, deduce if {they} will like the movie ***{title}***."


def movie_text(item: Mapping[str, str]) -> str:
    """Return the descriptive text of a movie (Figures 4 and 11): its title and first listed genre."""
    return f"Here is a movie. Its title is {one_line(item['title'])}. The movie's genre is {item['genre']}."


ML_1M = PromptTemplate(
    name="ml-1m",
    user=_ml1m_user,
    lead=_ml1m_lead,
    question=_ml1m_question,
    note="Note that more stars the user rated the movie, the more the user liked the movie.",
    item=movie_text,
)

TEMPLATES: dict[str, PromptTemplate] = {"ml-1m": ML_1M, "sample": ML_1M}
"""By data set; `sample` is worded like MovieLens-1M."""


def template_for(dataset: str) -> PromptTemplate:
    """Return the wording of `dataset`.

    Raises:
        ValueError: no template has that name.
    """
    if dataset not in TEMPLATES:
        raise ValueError(f"no prompt template for data set {dataset!r}; there are {sorted(TEMPLATES)}")
    return TEMPLATES[dataset]


@dataclass(frozen=True)
class ChatWrapper:
    """A conversation template around the prompt. The answer follows `after` behind `separator`."""

    name: str
    before: str
    after: str
    separator: str = " "
    """Between the wrapped prompt and the answer. It stays out of the prompt: alone at a prompt's end a blank becomes a
    token of its own in some tokenizers and moves the answer away from the position that was trained."""

    def wrap(self, prompt: str) -> str:
        """Return the text that the model reads up to (not including) the answer."""
        return f"{self.before}{prompt}{self.after}"


WRAPPERS: dict[str, ChatWrapper] = {
    "vicuna": ChatWrapper(
        name="vicuna",
        before="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: ",
        after=" ASSISTANT:",
    ),
    "plain": ChatWrapper(name="plain", before="", after="\n"),
}
"""`vicuna` is v1.1 and v1.3's; `plain` is for base models without a conversation format."""


def wrapper_for(name: str) -> ChatWrapper:
    """Return a chat wrapper by name.

    Raises:
        ValueError: no wrapper has that name.
    """
    if name not in WRAPPERS:
        raise ValueError(f"no chat wrapper {name!r}; there are {sorted(WRAPPERS)}")
    return WRAPPERS[name]
