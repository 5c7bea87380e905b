"""Cleaning on the host: the device's steps, and those that need more than it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from device.records import SlimpiError
from device.text import HASHTAG, STEPS


def segment_hashtags(text: str) -> str:
    """#californiawildfire -> california wildfire, by how often words follow each other (wordsegment; Norvig 2009,
    "Natural language corpus data"). Tags of mixed case are left to the step `hashtags`, others keep their case."""
    return HASHTAG.sub(lambda tag: f" {_segmented(tag[1])} " if _one_case(tag[1]) else tag[0], text)


def _one_case(tag: str) -> bool:
    return tag.isascii() and tag.isalpha() and (tag.islower() or tag.isupper())


@cache
def _segmented(tag: str) -> str:
    words = _segmenter()(tag.lower())
    return " ".join(word.upper() if tag.isupper() else word for word in words)


@cache
def _segmenter() -> Callable[[str], list[str]]:
    import wordsegment

    wordsegment.load()  # a second, some hundred MB
    segment: Callable[[str], list[str]] = wordsegment.segment
    return segment


HOST_STEPS: dict[str, Callable[[str], str]] = {"segment": segment_hashtags}
"""Steps for studies on the host: a words.json that names one is refused. What is worth it goes to device/text.py."""

ALL_STEPS = {**STEPS, **HOST_STEPS}


def clean(text: str, steps: Sequence[str]) -> str:
    """device.text.clean with the host's steps too. SlimpiError for an unknown step."""
    if unknown := [step for step in steps if step not in ALL_STEPS]:
        raise SlimpiError(f"unknown cleaning step {unknown[0]!r}. Known: {', '.join(ALL_STEPS)}.")
    for step in steps:
        text = ALL_STEPS[step](text)
    return " ".join(text.split())
