"""Every sentence the language model reads, as pure functions from a row to a string.

Figures 9 and 10 of the paper (samples without and with SUBR) share one wording: only the behaviours differ.
Figures 4 and 11 describe an item. The chat wrapper (§4.1.4, D.1.2: Vicuna's for every backbone) is a separate step.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rella.config import PromptConfig
from rella.errors import InputError
from rella.wording import Wording, fill

YES, NO = "Yes", "No"
"""The binary key answer words of §2.2; Eq. 2 compares their logits."""

UNTITLED = "untitled"
"""Shown where a title has no visible character."""

_MARKS = re.compile(r"\*{3,}")


def answer_text(label: int | bool) -> str:
    """Return the trained answer, `"Yes."` for label 1 and `"No."` for label 0 (§2.2, without an end token)."""
    return f"{YES}." if label else f"{NO}."


def rating_text(wording: Wording, rating: float) -> str:
    """Return a rating as the data set writes it, e.g. `"4 stars"` or `"4.0 stars"`; 'star' when it is at most 1."""
    number = f"{rating:.{wording.decimals}f}"
    return number if wording.unit is None else f"{number} {wording.unit[rating > 1]}"


def behaviour_list(wording: Wording, names: Sequence[str], ratings: Sequence[float]) -> str:
    """Return the numbered behaviours as Python's `repr` of a list, oldest first (Figures 9 and 10).

    `repr` puts double quotes around a title with an apostrophe, as in the authors' data, and escapes what could end
    the list early (quotes, line breaks), so that no title can break the prompt's structure.

    Raises:
        InputError: the two sequences differ in length.
    """
    shown = (
        fill(wording.behaviour, {"name": name, "rating": rating_text(wording, rating)})
        for name, rating in zip(names, ratings, strict=True)
    )
    return repr([f"{n}. {text}" for n, text in enumerate(shown)])


def one_line(text: str) -> str:
    """Return `text` with every line break and control character as a blank and runs of blanks collapsed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def inline(text: str) -> str:
    """Return `text` for a place inside a line: on one line, and without a run of the stars that mark the target."""
    return _MARKS.sub("**", one_line(text))


def profile_words(wording: Wording, profile: Mapping[str, str]) -> dict[str, str]:
    """Return what sentences about a user may name: profile fields, on one line, and words that follow from them.

    Raises:
        InputError: a profile value for which the wording has no words.
    """
    values = {name: inline(value) for name, value in profile.items()}
    for name, by_value in wording.words.items():
        found = by_value.get(profile[name])
        if found is None:
            raise InputError(f"{name} {profile[name]!r}: this wording knows {sorted(by_value)}")
        values |= found
    return values


def prompt_text(
    wording: Wording,
    profile: Mapping[str, str],
    names: Sequence[str],
    ratings: Sequence[float],
    target: str,
    retrieved: bool = False,
) -> str:
    """Return x^text of §2.2: profile, behaviours (chronological), question, note and instruction.

    Args:
        wording: of the data set.
        profile: the user's fields as text, e.g. `{"gender": "female", "age": "35-44", "occupation": "writer"}`.
        names: what the K behaviours' items are called, oldest first.
        ratings: their K ratings.
        target: what the target item is called.
        retrieved: whether the behaviours were retrieved (SUBR); only a `retrieved_note` makes a difference.

    Raises:
        InputError: a profile value for which the wording has no words.
    """
    words = profile_words(wording, profile)
    lines = [
        fill(wording.user, words),
        fill(wording.lead, words),
        behaviour_list(wording, names, ratings),
        fill(wording.question, {**words, "name": inline(target)}),
        wording.retrieved_note if retrieved and wording.retrieved_note is not None else wording.note,
        wording.instruction,
    ]
    return "\n".join(line for line in lines if line)


def item_text(wording: Wording, item: Mapping[str, str]) -> str:
    """Return the descriptive text of an item (Figures 4 and 11) from its fields, lists joined with commas."""
    return fill(wording.item, {name: inline(value) for name, value in item.items()})


@dataclass(frozen=True)
class Display:
    """How a field's text is made fit to be shown, the same for prompts and item texts."""

    chars: int = 500
    """Longer texts are cut and end in `…`."""
    unescape: bool = True
    """Whether `&amp;` and `\\"`, as BookCrossing's dump has them, become `&` and `"`."""
    special: tuple[str, ...] = ()
    """Texts that the tokenizer takes for tokens of their own; in a title they are taken apart by a blank."""

    def __call__(self, text: str) -> str:
        """Return the text as it is shown; never empty."""
        if self.unescape and ("&" in text or "\\" in text):
            text = html.unescape(text.replace('\\"', '"'))
        text = one_line(text)
        for token in self.special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        if len(text) > self.chars:
            text = text[: self.chars - 1].rstrip() + "…"
        return text or UNTITLED


def shown_fields(row: Mapping[str, object], display: Display) -> dict[str, str]:
    """Return an item's fields as text: lists joined with commas, null as `unknown`, each made fit to be shown."""
    return {name: display(_as_text(value)) for name, value in row.items()}


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "unknown" if value is None else str(value)


def names_of(wording: Wording, columns: Mapping[str, Sequence[object]], display: Display) -> list[str]:
    """Return what each item is called in prompts, from the items' columns."""
    if wording.name == "{title}":
        return [display(str(title)) for title in columns["title"]]
    rows = zip(*columns.values(), strict=True)
    return [fill(wording.name, shown_fields(dict(zip(columns, row, strict=True)), display)) for row in rows]


_PRONOUNS = {
    "female": {"She": "She", "she": "she", "Her": "Her"},
    "male": {"She": "He", "she": "he", "Her": "His"},
}

ML_1M = Wording(
    user="The user is a {gender}. {Her} job is {occupation}. {Her} age is {age}.",
    lead="{She} watched the following movies in order in the past, and rated them:",
    question="Based on the movies {she} has watched, deduce if {she} will like the movie ***{name}***.",
    note="Note that more stars the user rated the movie, the more the user liked the movie.",
    item="Here is a movie. Its title is {title}. The movie's genre is {genre}.",
    words={"gender": _PRONOUNS},
)

ML_25M = Wording(
    lead="The user watched the following movies in the past, and rated them:",
    question="Based on the movies the user has watched, deduce if the user will like the movie ***{name}***.",
    note="Note that more stars the user rated the movie, the user liked the movie more.",
    item="Here is a movie. Its title is {title}. The movie's genre is {genre}.",
    decimals=1,
)

BOOKCROSSING = Wording(
    user="The user's location is {location}. The user's age is {age}.",
    lead="The user read the following books in the past and rated them:",
    question="Based on the books the user has read, deduce if the user will like the book ***{name}***.",
    note="Note that more stars the user rated the book, the user liked the book more.",
    item="Here is a book. Its title is {title}. ISBN of the book is {item_id}. The author of the book is {author}. "
    "The publication year of the book is {year}. Its publisher is {publisher}.",
)

WORDINGS: dict[str, Wording] = {"sample": ML_1M, "ml-1m": ML_1M, "ml-25m": ML_25M, "bookcrossing": BOOKCROSSING}
"""By data set (Figures 4, 9, 10 and 11); `sample` is worded like MovieLens-1M."""

_LIKED = "Note that more stars the user rated the movie, the user liked the movie more."
_LIKE = "Note that more stars the user rated the movie, the user like the movie more."

VARIANTS: dict[tuple[str, str], tuple[str, str | None]] = {
    ("ml-1m", "figure2"): (_LIKE, None),
    # The authors' code words this sentence in two ways, so that a sample and its retrieved twin differ in it.
    ("ml-1m", "authors"): (_LIKED, ML_1M.note),
}
"""(wording, variant) → its note, and that of retrieved prompts; elsewhere the paper's Figures 9 and 10 are all."""


def wording_for(name: str, config: PromptConfig, own: Wording | None = None) -> Wording:
    """Return the wording of a data set under the options of `config`.

    Args:
        name: of the data set.
        config: `template` other than `auto` names another data set's wording.
        own: the wording of a data set that a file describes.

    Raises:
        InputError: no wording has that name.
    """
    name = name if config.template == "auto" else config.template
    if name in WORDINGS:
        wording = WORDINGS[name]
    elif own is not None:
        wording = own
    else:
        raise InputError(f"prompt.template: no wording {name!r}; there are {sorted(WORDINGS)}")
    base = "ml-1m" if name == "sample" else name
    if (base, config.variant) in VARIANTS:
        note, of_retrieved = VARIANTS[base, config.variant]
        wording = replace(wording, note=note, retrieved_note=of_retrieved)
    if config.genre == "all":
        wording = replace(wording, item=wording.item.replace("{genre}", "{genres}"))
    if not config.isbn:
        wording = replace(wording, item=wording.item.replace("ISBN of the book is {item_id}. ", ""))
    return wording


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
    """Return a chat wrapper by name; `native`, the model's own, is `rella.lm.chat.native_wrapper`.

    Raises:
        InputError: no wrapper has that name.
    """
    if name not in WRAPPERS:
        raise InputError(f"no chat wrapper {name!r}; there are {sorted(WRAPPERS)}")
    return WRAPPERS[name]
