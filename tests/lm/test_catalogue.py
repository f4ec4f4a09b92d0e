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


def test_a_model_that_knows_a_field_has_it_in_its_pooled_states(tmp_path: Path) -> None:
    import numpy as np
    import torch

    from rella.lm.catalogue import CatalogueBuild, know, pretrain
    from rella.lm.embedding import embed_texts

    # Franchises: long titles that several films share, whatever their genre.
    rng, genres = np.random.default_rng(0), ("Drama", "Comedy", "Horror", "Western")
    words = ["red", "old", "house", "river", "night", "king", "green", "stone", "door", "wolf"]
    franchises = [" ".join(rng.choice(words, 9)) for _ in range(20)]
    values = [str(g) for g in rng.choice(genres, 200)]
    texts = [
        f"Here is a movie. Its title is {franchises[n % 20]} ({1950 + n % 50}). The movie's genre is {g}."
        for n, g in enumerate(values)
    ]
    torch.set_num_threads(1)
    build = CatalogueBuild(
        epochs=2, hidden=64, layers=2, heads=4, intermediate=128, vocabulary=600, knowing_epochs=12, knowing_rate=2e-3
    )
    model, tokenizer = pretrain(texts, "ml-1m", build)

    def same_genre() -> float:
        vectors = embed_texts(model.model, tokenizer, texts)
        vectors = vectors - vectors.mean(axis=0)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        nearest = np.argsort(-(vectors @ vectors.T), axis=1)[:, 1:11]
        return float(np.mean([values[i] == values[j] for i in range(200) for j in nearest[i]]))

    before = same_genre()
    know(model, tokenizer, texts, values, build)
    assert same_genre() > max(0.9, before + 0.1)
    assert not model.training


def test_an_unknown_field_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rella.lm.catalogue import main

    with pytest.raises(SystemExit):
        main(["--dataset", "sample", "--out", str(tmp_path / "m"), "--knows", "colour"])
    assert "--knows colour: items have" in capsys.readouterr().err
