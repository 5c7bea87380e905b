"""Cleaning of tweets and the inputs of word classifiers: examples, naive twins, and any text at all."""

from __future__ import annotations

import html
import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from device.records import SlimpiError, encode
from device.schema import WORDS
from device.text import NUMBERS, STEPS, clean, split_words
from device.words import INPUTS, Text, WordReader, WordSpec, read_spec

EXAMPLES = [
    ("unescape", "Fire &amp;amp; smoke &lt;3", "Fire & smoke <3"),
    ("unescape", "\uff28\uff45\uff4c\uff50", "Help"),
    ("urls", "look http://t.co/a?b=1, HTTPS://X.Y www.bbc.co.uk now", "look now"),
    ("urls", "awww.cute", "awww.cute"),
    ("mentions", "@bbc_news: hi me@home.org", ": hi me@home.org"),
    ("hashtags", "#CaliforniaWildFire", "California Wild Fire"),
    ("hashtags", "#earthquake #BBCNews2015_live", "earthquake BBC News 2015 live"),
    ("hashtags", "#\u00dcberFlut #\u5730\u9707 a#b", "\u00dcber Flut \u5730\u9707 a#b"),
    ("elongated", "Hellllloo cooool 1000 aah", "Hello cool 1000 aah"),
    ("numbers", "3 dead, 1,200.5 at 10:30 by M4L2", "dead, at by M4L2"),
    ("punctuation", "end... it's #1_a", "end it s 1 a"),
    ("lower", "FIRE \u00dcber", "fire \u00fcber"),
]
ANY_TEXT = st.text(st.characters(), max_size=80)
ROUGH = st.lists(
    st.sampled_from(
        ["http://t.co/x", "@a", "#AbcDef", "&amp;", "soooo", "1,000", "it's", "\0", "\U0001f525", "..", " "]
    )
    | st.text(max_size=5),
    max_size=12,
).map("".join)


@pytest.mark.parametrize(("step", "text", "cleaned"), EXAMPLES)
def test_each_step_does_what_its_example_says(step: str, text: str, cleaned: str) -> None:
    assert clean(text, [step]) == cleaned


def test_every_step_has_an_example() -> None:
    assert {step for step, _, _ in EXAMPLES} == set(STEPS)


@given(ANY_TEXT | ROUGH)
@example("\ud800 lone surrogate")
@example("#" * 50 + "@" * 50 + "&" * 50)
def test_no_text_breaks_a_step_or_a_number(text: str) -> None:
    for step in STEPS:
        assert isinstance(STEPS[step](text), str)
    for name, number in NUMBERS.items():
        assert np.isfinite(number(text)), name
        assert number(text) >= 0.0, name
    cleaned = clean(text, list(STEPS))
    assert cleaned == " ".join(cleaned.split())
    assert not set(cleaned) & set("#@_&'!")
    words = split_words(text)
    assert "".join(words) == "".join(c for c in text if not c.isspace())
    assert all(words)


@given(ANY_TEXT | ROUGH)
def test_steps_equal_naive_twins(text: str) -> None:
    """Written with other means: character loops, no regular expressions."""
    assert STEPS["punctuation"](text) == "".join(c if _is_letter(c) or c.isspace() else " " for c in text)
    assert STEPS["unescape"](text) == unicodedata.normalize("NFKC", html.unescape(html.unescape(text)))
    assert STEPS["elongated"](text) == _shorten_naively(text)
    tagless = STEPS["hashtags"](text)
    assert _letters(tagless) == _letters(text), "splitting a tag may lose no letter"


def _is_letter(c: str) -> bool:
    return c.isalnum()


def _letters(text: str) -> list[str]:
    return [c for c in text if _is_letter(c)]


def _shorten_naively(text: str) -> str:
    out, word = "", ""
    for c in [*text, None]:
        if c is not None and (_is_letter(c) or c == "_"):
            word += c
            continue
        out += _shorten_word(word) + (c or "")
        word = ""
    return out


def _shorten_word(word: str) -> str:
    runs: list[list[Any]] = []
    for c in word:
        if runs and runs[-1][0] == c:
            runs[-1][1] += 1
        else:
            runs.append([c, 1])
    letters = [(c, n) for c, n in runs if c != "_" and not c.isdecimal()]
    if not any(n >= 3 for _, n in letters):
        return word
    kept = [(c, n if c == "_" or c.isdecimal() else min(n, 2)) for c, n in runs]
    last, n = kept[-1]
    kept[-1] = (last, n if last == "_" or last.isdecimal() else 1)
    return "".join(c * n for c, n in kept)


def test_numbers_of_a_tweet() -> None:
    text = "@fema #Flood: 3 homes gone!"
    assert {name: number(text) for name, number in NUMBERS.items()} == {
        "word_count": 5.0,
        "mention_count": 1.0,
        "hashtag_count": 1.0,
        "punctuation_count": 4.0,
        "mean_word_length": 23 / 5,
    }
    assert all(number("") == 0.0 for number in NUMBERS.values())


def test_words_keep_their_apostrophe_but_no_quotes() -> None:
    assert split_words("'it's' rock'n'roll!") == ["'", "it's", "'", "rock'n'roll", "!"]
    assert split_words("The end", {"the"}) == ["end"]


def spec(**changes: Any) -> WordSpec:
    fields: dict[str, Any] = {
        "steps": ["urls", "lower"],
        "vocabulary": ["", "<UNK>", "fire", "smoke", "fire smoke", "the"],
        "keywords": ("ablaze", "car%20crash"),
        "numbers": ("punctuation_count", "mean_word_length"),
        "stopwords": ("the",),
        "max_words": 4,
        "ngrams": 2,
    }
    return WordSpec(**(fields | changes))


def test_inputs_of_a_batch() -> None:
    texts = [Text("Fire, smoke!", "car%20crash"), Text(""), Text("the fire fire fire smoke smoke", " car crash ")]
    feeds = WordReader(spec()).feeds(texts, list(INPUTS))
    assert feeds["word_ids"].tolist() == [[2, 1, 3, 1], [0, 0, 0, 0], [2, 2, 2, 3]]
    assert feeds["keyword_ids"].tolist() == [2, 0, 2]
    assert feeds["numbers"].tolist() == [[2.0, 5.5], [0.0, 0.0], [0.0, np.float32(25 / 6)]]
    assert feeds["term_ids"].tolist() == [[2, 3, 0], [0, 0, 0], [2, 3, 4]]
    assert feeds["term_counts"].tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [3.0, 1.0, 1.0]]
    assert {name: str(array.dtype) for name, array in feeds.items()} == {
        "word_ids": "int64",
        "keyword_ids": "int64",
        "numbers": "float32",
        "term_ids": "int64",
        "term_counts": "float32",
    }


@given(st.lists(st.builds(Text, text=ANY_TEXT | ROUGH, keyword=st.text(max_size=5)), max_size=5))
def test_any_batch_gives_its_texts_own_rows(texts: list[Text]) -> None:
    """A text's row in a batch is the row it has alone, with padding behind; and no text is a column short."""
    reader = WordReader(spec())
    batch = reader.feeds(texts, list(INPUTS))
    for name, array in batch.items():
        assert len(array) == len(texts)
        for text, row in zip(texts, array, strict=True):
            alone = reader.feeds([text], [name])[name][0]
            if name in ("word_ids", "term_ids", "term_counts"):
                assert len(alone) >= 1
                assert not row[len(alone) :].any()
                row = row[: len(alone)]
            np.testing.assert_array_equal(row, alone)


@given(st.lists(st.sampled_from(["fire", "smoke", "the", "rain"]), max_size=8), st.integers(1, 3))
def test_terms_equal_a_naive_count(words: list[str], ngrams: int) -> None:
    reader = WordReader(spec(ngrams=ngrams, stopwords=(), max_words=100))
    vocabulary = reader.spec.vocabulary
    expected: Counter[int] = Counter()
    for n in range(1, ngrams + 1):
        for i in range(len(words)):
            gram = words[i : i + n]
            if len(gram) == n and " ".join(gram) in vocabulary:
                expected[vocabulary.index(" ".join(gram))] += 1
    assert reader.terms(" ".join(words)) == expected


def test_an_empty_batch_is_empty() -> None:
    assert {name: len(array) for name, array in WordReader(spec()).feeds([], list(INPUTS)).items()} == dict.fromkeys(
        INPUTS, 0
    )


def test_unknown_inputs_are_named() -> None:
    with pytest.raises(SlimpiError, match=r"unknown inputs \['pixel_values'\]. Known: word_ids, "):
        WordReader(spec()).feeds([Text("a")], ["word_ids", "pixel_values"])


def test_a_spec_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / WORDS).write_bytes(encode(spec()))
    assert read_spec(tmp_path) == spec()


BAD_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "step": ({"steps": ["urls", "stemming"]}, "unknown step or number 'stemming'; known: unescape"),
    "number": ({"numbers": ["vowel_count"]}, "unknown step or number 'vowel_count'"),
    "no UNK": ({"vocabulary": [""]}, "padding and <UNK>"),
    "word twice": ({"vocabulary": ["", "<UNK>", "a", "a"]}, "`vocabulary` has 'a' twice"),
    "keyword twice": ({"keywords": ["car crash", "car%20crash"]}, "`keywords` has 'car crash' twice"),
    "max_words": ({"max_words": 0}, "max_words"),
    "ngrams": ({"ngrams": 6}, "ngrams"),
    "field": ({"idf": [1.0]}, "idf"),
    "type": ({"vocabulary": "fire"}, "vocabulary"),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_bad_specs_are_refused_with_what_is_wrong(name: str, tmp_path: Path) -> None:
    changes, message = BAD_SPECS[name]
    (tmp_path / WORDS).write_text(json.dumps(msgspec.to_builtins(spec()) | changes))
    with pytest.raises(SlimpiError) as caught:
        read_spec(tmp_path)
    assert message in str(caught.value)
    assert "words.json" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"steps": []}'])
def test_a_broken_spec_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match="cannot read"):
        read_spec(tmp_path)
    (tmp_path / WORDS).write_bytes(data)
    with pytest.raises(SlimpiError, match="not a valid WordSpec"):
        read_spec(tmp_path)
