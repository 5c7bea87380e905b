"""Cleaning on the host: the device's steps, and those that need more than it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from device.schema import SlimpiError
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
"""Steps for studies on the host. A step that is worth its place belongs in device/text.py."""

ALL_STEPS = {**STEPS, **HOST_STEPS}


def clean(text: str, steps: Sequence[str]) -> str:
    """device.text.clean with the host's steps too. SlimpiError for an unknown step."""
    if unknown := [step for step in steps if step not in ALL_STEPS]:
        raise SlimpiError(f"unknown cleaning step {unknown[0]!r}. Known: {', '.join(ALL_STEPS)}.")
    for step in steps:
        text = ALL_STEPS[step](text)
    return " ".join(text.split())


def require_device_steps(steps: Sequence[str]) -> None:
    """SlimpiError for a step that the device lacks: an artifact with it would be read otherwise there."""
    if missing := [step for step in steps if step not in STEPS]:
        why = "runs on the host only" if missing[0] in HOST_STEPS else "is unknown"
        raise SlimpiError(
            f"cleaning step {missing[0]!r} {why}, the device has {', '.join(STEPS)}. Leave it out of an artifact."
        )
