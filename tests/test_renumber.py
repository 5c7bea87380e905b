"""Encoders in one ensemble whose tokenizers number the same pieces differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tiny_encoders import save_encoder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from toy_tweets import ODD, OTHERS, WORDS, save_toy_encoder, toy_settings, toy_tweets, write_vectors
from transformers import PreTrainedTokenizerFast

from device.schema import SlimpiError
from pipeline.export.onnx import bare_tokenizer, one_thread
from pipeline.sources import hash_path
from pipeline.tweets.classifiers.renumber import new_ids
from pipeline.tweets.decide import feeds_of, train_decider

PIECES = [*WORDS[1], "!", *reversed(OTHERS), *WORDS[0]]


def save_other_encoder(folder: Path, normalizer: Any = None, pieces: list[str] = PIECES) -> None:
    """An MPNet whose tokenizer knows the toy words under other numbers, and its special tokens under other names."""
    save_encoder("mpnet", folder, seed=3)
    known = ["[PAD]", "[SEP]", *pieces, "[CLS]", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizer or normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("renumber")
    write_vectors(folder / "vectors.txt")
    save_toy_encoder("bert", folder / "bert")
    save_other_encoder(folder / "mpnet")
    return folder


def text_of(folder: Path) -> str:
    return bare_tokenizer(PreTrainedTokenizerFast.from_pretrained(folder)).decode()


def test_a_text_gets_the_other_tokenizers_own_ids(places: Path) -> None:
    old, new = text_of(places / "bert"), text_of(places / "mpnet")
    for one, two in ((old, new), (new, old)):
        ids = new_ids(one, two)
        before, after = Tokenizer.from_str(one), Tokenizer.from_str(two)
        for tweet in [*toy_tweets(30), *ODD]:
            assert ids[before.encode(tweet.text).ids].tolist() == after.encode(tweet.text).ids
    assert new_ids(old, new)[1] == 0  # padding, which no text holds


def test_an_ensemble_of_two_numberings_computes_what_its_members_do(places: Path) -> None:
    short = toy_settings("transformer", places / "vectors.txt") | {"epochs": 3}
    other = {"source": f"path:{places / 'mpnet'}", "sha256": hash_path(places / "mpnet")}
    members = [{"classifier": "transformer", "settings": short}, {"classifier": "transformer", "settings": short}]
    decider = train_decider(
        "ensemble",
        {"members": [members[0], members[1] | other]},
        toy_tweets(),
        places / "bert",
        places / "cache",
        places / "work",
    )
    decider.export(places / "made")
    tweets = [*toy_tweets(12, seed=7), *ODD]
    session = onnxruntime.InferenceSession(str(places / "made" / "model.onnx"), one_thread())
    feeds = feeds_of(None, decider.model.tokenizer, decider.model.max_tokens, tweets)
    found = session.run(["logits"], {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    np.testing.assert_allclose(found, decider.logits(tweets), atol=1e-3)
    assert json.loads((places / "made" / "tokenizer.json").read_text())["model"]["vocab"]["<s>"] == 0
    mpnet = decider.model.members[1]
    assert np.abs(mpnet.log_odds(tweets) - decider.model.members[0].log_odds(tweets)).max() > 0.01


@pytest.mark.parametrize(
    ("normalizer", "pieces"),
    [(normalizers.BertNormalizer(lowercase=False), PIECES), (None, PIECES[:-1]), (None, [*PIECES, "12"])],
)
def test_tokenizers_that_cut_otherwise_are_refused(
    places: Path, tmp_path: Path, normalizer: Any, pieces: list[str]
) -> None:
    """Another normalizer; a piece that one lacks; one more, which a text with it would show."""
    save_other_encoder(tmp_path / "mpnet", normalizer, pieces)
    with pytest.raises(SlimpiError, match="cut texts differently"):
        new_ids(text_of(places / "bert"), text_of(tmp_path / "mpnet"))
