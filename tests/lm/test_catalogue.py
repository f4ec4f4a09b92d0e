from __future__ import annotations

from pathlib import Path

import pytest


def test_a_model_of_a_catalogue_is_built_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from rella.lm.catalogue import CatalogueBuild, main
    from rella.lm.loading import answers_for, load_base, load_tokenizer
    from rella.models import identify
    from rella.prompts import WRAPPERS

    folder = tmp_path / "model"
    main(["--dataset", "sample", "--out", str(folder), "--epochs", "2"])
    assert "622 sentences read" in capsys.readouterr().out
    identity = identify(str(folder))
    assert identity.hidden_size == CatalogueBuild.hidden
    tokenizer = load_tokenizer(identity)
    assert len(set(answers_for(tokenizer, WRAPPERS["vicuna"]).pair)) == 2
    base = load_base(identity, "float32", torch.device("cpu"))
    # Two epochs are enough to expect a genre where the sentence names one, and not the first title's word.
    ids = tokenizer(
        "Here is a movie. Its title is Anything (1999). The movie's genre is", return_tensors="pt"
    ).input_ids
    genres = [tokenizer.encode(f" {g}", add_special_tokens=False)[0] for g in ("Horror", "Comedy", "Western")]
    with torch.no_grad():
        share = base(input_ids=ids).logits[0, -1].softmax(-1)[genres].sum()
    assert float(share) > 10 * len(genres) / len(tokenizer)
