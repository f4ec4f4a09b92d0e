"""How one data set is put into words: templates with `{placeholders}`, plain data that keys hold and files spell out.

Placeholders of `user`, `lead` and `question` are the user's profile fields and the extra words of `words`; `question`
also knows `{name}`, the target. Placeholders of `name` and `item` are the item's fields (`{title}`, `{item_id}`, ...).
`behaviour` knows `{name}` and `{rating}`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from rella.errors import InputError

Words = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Profile field → its value → placeholder → text, e.g. the pronouns that go with a gender."""


@dataclass(frozen=True)
class Wording:
    """The sentences of one data set (Appendix A of the paper)."""

    user: str = ""
    """First line: who the user is; empty where there is no profile."""
    lead: str = "The user chose the following items in the past, and rated them:"
    """The line above the behaviours."""
    behaviour: str = "{name} ({rating})"
    """One entry of the list of behaviours; without `{rating}` where there are no ratings."""
    question: str = "Based on the items the user has chosen, deduce if the user will like the item ***{name}***."
    """The question about the target."""
    note: str = "Note that more stars the user rated the item, the user liked the item more."
    """What the ratings mean; may be empty."""
    retrieved_note: str | None = None
    """The note of prompts with retrieved behaviours where it differs, as in the authors' MovieLens-1M code."""
    instruction: str = "You should ONLY tell me yes or no."
    """The last line."""
    item: str = "Here is an item. Its title is {title}."
    """The descriptive text that is embedded (Figures 4 and 11)."""
    name: str = "{title}"
    """What an item is called among the behaviours and in the question."""
    unit: tuple[str, str] | None = ("star", "stars")
    """The word behind a rating of at most 1, and behind a larger one; None for the number alone."""
    decimals: int = 0
    """Digits behind the point of a rating."""
    words: Words = field(default_factory=dict)
    """Extra placeholders that follow from a profile field's value."""


def placeholders(template: str) -> frozenset[str]:
    """Return the names between braces.

    Raises:
        InputError: unbalanced braces, or more than a plain name between them.
    """
    return frozenset(name for _, name in pieces(template) if name is not None)


@lru_cache(maxsize=256)
def pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """Return a template as (literal text, name of the placeholder behind it or None).

    Only `{name}` is a placeholder: no attributes, indices, conversions or formats, so that a template from a file can
    reach nothing but the fields it names. `{{` and `}}` are braces.

    Raises:
        InputError: unbalanced braces, or more than a plain name between them.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}") from error
    for _, name, spec, conversion in parsed:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise InputError(f"template {template!r}: {{{name}}} is not a plain name; write {{field}}")
    return tuple((text, name) for text, name, _, _ in parsed)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return the template with its placeholders replaced; braces in the values stay as they are.

    Raises:
        KeyError: a placeholder without a value.
    """
    return "".join(text if name is None else text + values[name] for text, name in pieces(template))


def check_wording(
    wording: Wording, profile: Mapping[str, Iterable[str] | None], item_fields: Iterable[str], where: str
) -> None:
    """Verify that every placeholder names a field that the data set has, and that `words` knows its values.

    Args:
        wording: the sentences.
        profile: profile field → its values, None where they are not known or many.
        item_fields: names of the items' fields.
        where: the file or data set, for messages.

    Raises:
        InputError: names the template, the placeholder and what there is, or the value without words.
    """
    extra = {word for by_value in wording.words.values() for found in by_value.values() for word in found}
    user = {*profile, *extra}
    known: dict[str, set[str]] = {
        "user": user,
        "lead": user,
        "question": {*user, "name"},
        "behaviour": {"name", "rating"},
        "item": set(item_fields),
        "name": set(item_fields),
        "note": set(),
        "retrieved_note": set(),
        "instruction": set(),
    }
    for template, names in known.items():
        try:
            odd = placeholders(getattr(wording, template) or "") - names
        except ValueError as error:
            raise InputError(f"{where}: wording.{template}: {error}") from error
        if odd:
            raise InputError(
                f"{where}: wording.{template} has {{{min(odd)}}}; it may use "
                f"{', '.join(sorted(f'{{{n}}}' for n in names)) or 'no placeholder'}"
            )
    _check_words(wording, profile, where)


def _check_words(wording: Wording, profile: Mapping[str, Iterable[str] | None], where: str) -> None:
    """Verify that `words` is about profile fields, knows their values, and has for each what the sentences use."""
    unknown = set(wording.words) - set(profile)
    if unknown:
        raise InputError(f"{where}: wording.words has {min(unknown)!r}, which is no user field ({sorted(profile)})")
    used = {name for template in (wording.user, wording.lead, wording.question) for name in placeholders(template)}
    for name, by_value in wording.words.items():
        without = set(profile[name] or ()) - set(by_value)
        if without:
            raise InputError(
                f"{where}: wording.words.{name} has no entry for {min(without)!r}, which users have "
                f"({sorted(by_value)} have one; an empty cell is 'unknown'); add it, or choose another wording with "
                "--prompt.template"
            )
        of_field = {word for found in by_value.values() for word in found}
        for value, found in by_value.items():
            lacking = (used & of_field) - set(found)
            if lacking:
                raise InputError(f"{where}: wording.words.{name}.{value} lacks {min(lacking)!r}, which a sentence uses")


def item_part(wording: Wording) -> dict[str, Any]:
    """Return what decides an item's text, for the key of its embedding."""
    return {"item": wording.item}


def prompt_part(wording: Wording) -> dict[str, Any]:
    """Return what decides a prompt's text, for the keys of tuning and scoring."""
    return {name: value for name, value in asdict(wording).items() if name != "item"}
