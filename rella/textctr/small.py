"""A small BERT and a small T5 from configurations, with tokenizers of their kinds trained on some texts.

What stands in for the hub's models where a run is to take minutes on two cores, and in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import punctuation
from typing import Any

from rella.config import Experiment
from rella.data.questions import Catalogue, questions
from rella.data.samples import assemble
from rella.data.selection import choose, split_ids
from rella.data.sources import Source
from rella.prompts import Display
from rella.textctr.texts import FieldTexts, PromptText


def wordpieces(texts: Sequence[str], size: int, longest: int) -> Any:  # noqa: ANN401 - transformers is untyped here
    """BERT's kind: lower case, pieces of words, [CLS] first and [SEP] last; the same at each build."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

    def tokenizer_of(model: Any) -> Any:  # noqa: ANN401
        made = Tokenizer(model)
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return made

    draft = tokenizer_of(models.WordPiece(unk_token="[UNK]"))
    letters = sorted({c for text in texts for c in draft.normalizer.normalize_str(text) if not c.isspace()})
    # The trainer numbers letters inside words in the order of a hash table, and pairs as frequent by those numbers:
    # all letters named beforehand, in order, have numbers of their own.
    known = [*special, *letters, *(f"##{c}" for c in letters if c not in punctuation)]
    draft.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=known, show_progress=False)
    )
    # Anew from its pieces: the letters are no special tokens.
    made = tokenizer_of(models.WordPiece(draft.get_vocab(), unk_token="[UNK]"))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    tokens = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=made, **tokens, model_max_length=longest)


def pieces_with_end(texts: Sequence[str], size: int, longest: int) -> Any:  # noqa: ANN401 - transformers is untyped here
    """T5's kind: a blank before every word, </s> behind every text, nothing in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=longest
    )


def save_bert(
    folder: Path,
    texts: Sequence[str],
    vocabulary: int = 300,
    positions: int = 128,
    width: int = 32,
    spread: float = 0.2,
) -> Path:
    """Write a masked LM as the hub's bert-base-uncased is one; weights of large spread, so that mistakes show."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.set_num_threads(1)
    tokenizer = wordpieces(texts, vocabulary, positions)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=positions,
        initializer_range=spread,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_t5(folder: Path, texts: Sequence[str], vocabulary: int = 500, longest: int = 512, width: int = 32) -> Path:
    """Write a T5 as the hub's t5-base is one."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.set_num_threads(1)
    tokenizer = pieces_with_end(texts, vocabulary, longest)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        initializer_factor=1.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts_of(experiment: Experiment, samples: int = 300) -> list[str]:
    """What the baselines read of a data set: every user and item, and some training samples as rows and as prompts."""
    source = Source.of(experiment)
    raw, wording = source.load(experiment.data), source.wording(experiment)
    tables = assemble(raw, experiment.data)
    parts = (tables.users, tables.items, tables.histories())
    fields = FieldTexts.from_tables(*parts, raw.fields, wording, Display())
    catalogue = Catalogue.from_tables(*parts, wording, Display())
    chosen = choose(tables.samples, split_ids(tables.samples, "train")[:samples])
    asked = [PromptText(q, wording).text() for q in questions(catalogue, chosen, "recent", None, experiment.k)]
    rows = [
        fields.row_text(int(user), int(item), int(end), None, experiment.k).text()
        for user, item, end in zip(chosen.user, chosen.item, chosen.end, strict=True)
    ]
    return [*fields.users, *fields.items, *rows, *asked, *("yes no" for _ in range(20))]
