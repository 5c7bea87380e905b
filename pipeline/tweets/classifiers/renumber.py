"""Encoders whose tokenizers cut texts alike but number the pieces differently, in one graph.

MPNet took BERT's pieces and put four of its own before them. The device reads a text with one tokenizer; a member with
another numbering finds its own ids by a lookup in the graph.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from device.schema import SlimpiError
from device.words import WordSpec
from pipeline.export.onnx_graph import Graph
from pipeline.tweets.classifiers.base import FloatArray, Trained
from pipeline.tweets.data import Tweet

IDS = "input_ids"
ALIKE = ("normalizer", "pre_tokenizer")
PROBES = (
    "",
    "a",
    "Unbelievable floods in Zwickau, 12,000 homes! #prayers \N{FIRE} caf\u00e9 http x \u6771\u4eac",
    "qzx",
)


@dataclass(frozen=True)
class Renumbered:
    """A classifier that reads ids of `tokenizer`, of which `ids` gives its own."""

    model: Trained
    tokenizer: str
    ids: npt.NDArray[np.int64]

    @property
    def spec(self) -> WordSpec | None:
        return self.model.spec

    @property
    def max_tokens(self) -> int:
        return self.model.max_tokens

    def log_odds(self, tweets: Sequence[Tweet]) -> FloatArray:
        return self.model.log_odds(tweets)

    def add_to(self, graph: Graph) -> str:
        own = graph.add("Gather", [graph.constant(self.ids), graph.input(IDS)], axis=0)
        first = len(graph.nodes)
        log_odds = self.model.add_to(graph)
        for node in graph.nodes[first:]:
            for place, name in enumerate(node.input):
                if name == IDS:
                    node.input[place] = own
        return log_odds


def renumbered(model: Trained, tokenizer: str) -> Trained:
    """The classifier as one that reads `tokenizer`. SlimpiError if its own tokenizer cuts texts in another way."""
    return model if model.tokenizer == tokenizer else Renumbered(model, tokenizer, new_ids(tokenizer, model.tokenizer))


def new_ids(old: str, new: str) -> npt.NDArray[np.int64]:
    """(n,): the id in the tokenizer.json `new` of each of the pieces of `old`, special ones by what they are for.
    SlimpiError if the two cut texts differently."""
    from tokenizers import Tokenizer

    parts = [json.loads(text) for text in (old, new)]
    before, after = (Tokenizer.from_str(text) for text in (old, new))
    names = after.get_vocab()
    roles = dict(zip(before.encode("").tokens, after.encode("").tokens, strict=False))
    # Special ones that the other lacks stand in no text but by name.
    unheard = {token["content"]: names.get(parts[1]["model"].get("unk_token"), -1) for token in _special(parts[0])}
    ids = np.full(max(before.get_vocab().values()) + 1, -1, np.int64)
    for piece, number in before.get_vocab().items():
        known = (names.get(roles.get(piece, piece)), names.get(_PARTNERS.get(piece, "")), unheard.get(piece))
        ids[number] = next((own for own in known if own is not None), -1)
    same = all(_plain(parts[0], key) == _plain(parts[1], key) for key in (*ALIKE, "model"))
    probed = all(ids[before.encode(text).ids].tolist() == after.encode(text).ids for text in PROBES)
    if (ids < 0).any() or not same or not probed:
        raise SlimpiError(
            "members have tokenizers that cut texts differently. Give them the same encoder, or encoders with the same "
            "pieces, such as BERT, MiniLM and MPNet."
        )
    return ids


_PARTNERS = {"[PAD]": "<pad>", "<pad>": "[PAD]", "[MASK]": "<mask>", "<mask>": "[MASK]"}


def _special(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return [token for token in tokenizer.get("added_tokens", []) if token.get("special")]


def _plain(tokenizer: dict[str, Any], key: str) -> Any:
    """A part of a tokenizer.json without its pieces, which are compared one by one."""
    part = tokenizer.get(key)
    return {k: v for k, v in part.items() if k != "vocab"} if key == "model" and isinstance(part, dict) else part
