"""The stand-in model's tokenizer: byte-level BPE, with the prompts' fixed sentences as single tokens.

Long fixed sentences are what makes a prompt long; as one token each they cost the small model nothing, and a prompt
with eight behaviours has about 80 tokens. Any other text still encodes, byte by byte if it must.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rella.errors import InputError
from rella.prompts import ML_1M, NO, WRAPPERS, YES, item_text, profile_words
from rella.wording import fill

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

_PIECES = (
    r" \(\d{4}\)"  # a year with its brackets
    r"| \(\d stars?\)"  # a rating with its brackets
    r"""|\[?['"](?:, ['"])?\d+\."""  # from the end of one behaviour to the number of the next
    r"""|['"]\]"""
    r"|'s\b"
    r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\n|\s+(?!\S)|\s"
)


def fixed_sentences() -> list[str]:
    """Return the parts of wrapped MovieLens-1M prompts that never change, longest first."""
    mark = "@@"
    found = {WRAPPERS["vicuna"].before, WRAPPERS["vicuna"].after, ML_1M.note + "\n" + ML_1M.instruction}
    for gender in ("female", "male"):
        words = profile_words(ML_1M, {"gender": gender, "age": mark, "occupation": mark})
        # Without the last blank, so that the next word looks as it does in the middle of a sentence.
        found.update(part.rstrip() for part in fill(ML_1M.user, words).split(mark) if len(part) > 1)
        found.add(fill(ML_1M.lead, words))
        found.add(fill(ML_1M.question, {**words, "name": mark}).split(mark)[0])
    found.update(
        part.rstrip() for part in item_text(ML_1M, {"title": mark, "genre": mark}).split(mark) if len(part) > 1
    )
    return sorted(found, key=lambda text: (-len(text), text))


def train_tokenizer(corpus: Iterable[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Return a tokenizer learned from `corpus`, with bos added to every text as Llama's does.

    Args:
        corpus: texts that hold every word which shall be one token.
        vocabulary: tokens in all, special tokens and fixed sentences included.

    Raises:
        InputError: " Yes" or " No" did not become one token, so Eq. 2 could not be read off one position.
    """
    sentences = fixed_sentences()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(sentences),
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in sentences])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    for word in (YES, NO):
        if len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) != 1:
            raise InputError(f"' {word}' is more than one token: the corpus lacks it or the vocabulary is too small")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=2048
    )
