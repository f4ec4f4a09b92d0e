"""What the tests of this folder read."""

from __future__ import annotations

from rella.prompts import ML_1M, prompt_text

COLOURS = ("red", "green", "blue", "black")
TITLES = ("Heat (1995)", "Alien (1979)", "Amélie (2001)", "Up (2009)", "Big (1988)")


def corpus() -> list[str]:
    """What the tests of this folder read."""
    profile = {"gender": "female", "occupation": "writer", "age": "25-34"}
    texts = [prompt_text(ML_1M, profile, TITLES[:3], [1, 4, 5], title) for title in TITLES]
    texts += [f"User ID is {n}. Gender is male. Movie ID is {n}. Movie genre is Action. yes no" for n in range(20)]
    texts += [f"the user likes {a}. the item is {b}." for a in COLOURS for b in COLOURS]
    return [*texts, "History is Heat (1995) (4 stars), Alien (1979) (1 star). Movie title is Up (2009)."] * 3
