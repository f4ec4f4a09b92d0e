"""The small BERT and T5 that stand in for the hub's: the same at each build, with tokenizers of their kinds."""

from __future__ import annotations

from pathlib import Path

from rella.models import identify
from rella.textctr.small import save_bert, save_t5, wordpieces
from tests.textctr.small_models import corpus


def test_a_build_repeats_to_the_bit(tmp_path: Path) -> None:
    """Weights, tokenizer and configuration: their digest is part of the keys of everything that they compute."""
    for save in (save_bert, save_t5):
        digests = {identify(str(save(tmp_path / f"{save.__name__}-{n}", corpus()))).digest for n in range(3)}
        assert len(digests) == 1, save.__name__


def test_letters_are_pieces_and_no_special_tokens() -> None:
    made = wordpieces([*corpus(), "amelie étoile 10° Heat"], 300, 128)
    assert made.all_special_tokens == ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
    pieces = made.tokenize("Étoiles (1995), 9°")
    # Unaccented, in lower case, put together from pieces; the letters typed here occur in the texts.
    assert "".join(p.removeprefix("##") for p in pieces) == "etoiles(1995),9°"
    assert pieces[-2:] == ["9", "##°"]
    ids = made("a user")["input_ids"]
    assert made.convert_ids_to_tokens([ids[0], ids[-1]]) == ["[CLS]", "[SEP]"]
    assert made.decode(ids, skip_special_tokens=True) == "a user", "letters are skipped as special tokens"
