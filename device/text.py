"""Cleaning of tweets and their numeric features: pure functions on strings, the same on the host and the device.

STEPS and NUMBERS are the two registries. A classifier's artifact names the steps it was trained with, in order.
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Callable, Collection, Sequence

URL = re.compile(r"https?://\S+|\bwww\.\S+", re.IGNORECASE)
MENTION = re.compile(r"(?<!\w)@\w+")
HASHTAG = re.compile(r"(?<!\w)#(\w+)")
NUMBER = re.compile(r"(?<![^\W_])\d+(?:[.,:]\d+)*")
ELONGATED = re.compile(r"\b\w*?([^\W\d_])\1{2,}\w*")
WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_LONG_RUN = re.compile(r"([^\W\d_])\1{2,}")
_END_RUN = re.compile(r"([^\W\d_])\1+$")
_NOT_WORD = re.compile(r"[^\w\s]|_")
_PUNCTUATION = frozenset(string.punctuation)


def unescape(text: str) -> str:
    """HTML entities, twice encoded ones too (&amp;amp;), and compatibility forms of letters."""
    return unicodedata.normalize("NFKC", html.unescape(html.unescape(text)))


def drop_urls(text: str) -> str:
    return URL.sub(" ", text)


def drop_mentions(text: str) -> str:
    return MENTION.sub(" ", text)


def drop_numbers(text: str) -> str:
    return NUMBER.sub(" ", text)


def shorten_elongated(text: str) -> str:
    """Hellllloo -> Hello, cooool -> cool: in a word with a letter three times in a row, runs of three and more become
    two, English's longest, and the run it ends with becomes one. Digits stay."""
    return ELONGATED.sub(lambda word: _END_RUN.sub(r"\1", _LONG_RUN.sub(r"\1\1", word[0])), text)


def split_hashtags(text: str) -> str:
    """#CaliforniaWildFire -> California Wild Fire, by its capitals, numbers and underscores, in any script; a tag of
    one case keeps its word."""
    return HASHTAG.sub(lambda tag: f" {_split_humps(tag[1])} ", text)


def _split_humps(tag: str) -> str:
    """BBCNews2015_live -> BBC News 2015 live. A character's own case decides, so that letters beyond ASCII stay."""
    out = ""
    for i, c in enumerate(tag):
        before, after = tag[i - 1 : i], tag[i + 1 : i + 2]
        hump = c.isupper() and (before.islower() or (before.isupper() and after.islower()))
        number = bool(before) and c.isdecimal() != before.isdecimal()
        out += " " if c == "_" else f" {c}" if hump or number else c
    return out


def drop_punctuation(text: str) -> str:
    return _NOT_WORD.sub(" ", text)


def lower(text: str) -> str:
    return text.lower()


STEPS: dict[str, Callable[[str], str]] = {
    "unescape": unescape,
    "urls": drop_urls,
    "mentions": drop_mentions,
    "hashtags": split_hashtags,
    "elongated": shorten_elongated,
    "numbers": drop_numbers,
    "punctuation": drop_punctuation,
    "lower": lower,
}


def clean(text: str, steps: Sequence[str]) -> str:
    """The named STEPS in the given order, white space collapsed. KeyError for an unknown step: check before."""
    for step in steps:
        text = STEPS[step](text)
    return " ".join(text.split())


def split_words(text: str, stopwords: Collection[str] = ()) -> list[str]:
    """Words (letters, digits, apostrophes inside) and single other characters, without the stopwords."""
    return [word for word in WORD.findall(text) if word.lower() not in stopwords]


def punctuation_count(text: str) -> float:
    return float(sum(character in _PUNCTUATION for character in text))


def mean_word_length(text: str) -> float:
    """Characters a white-space separated word, 0 for an empty text."""
    words = text.split()
    return sum(map(len, words)) / len(words) if words else 0.0


def word_count(text: str) -> float:
    return float(len(text.split()))


def mention_count(text: str) -> float:
    return float(len(MENTION.findall(text)))


def hashtag_count(text: str) -> float:
    return float(len(HASHTAG.findall(text)))


NUMBERS: dict[str, Callable[[str], float]] = {
    "word_count": word_count,
    "mention_count": mention_count,
    "hashtag_count": hashtag_count,
    "punctuation_count": punctuation_count,
    "mean_word_length": mean_word_length,
}
"""Numeric features, computed on the text as it came, before any cleaning."""
