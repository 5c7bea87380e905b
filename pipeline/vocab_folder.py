"""Read a Hugging Face folder's tokenizer into GGUF's terms: byte-level BPE, or SentencePiece BPE."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from device.records import SlimpiError
from pipeline.gguf_file import Value
from pipeline.vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    filler,
    find_pre_tokenizer,
    read_steps,
)

_META = "▁"
_FILLER_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_UNMARKED_SPECIALS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_ADDS_BOS_BY_CONFIG = ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer")
_SPM_BPE = 2


def read_vocabulary(folder: Path, config: dict[str, Any]) -> tuple[Vocabulary, list[str]]:
    """The folder's vocabulary padded to config["vocab_size"] rows, and notes on what differs in llama.cpp.

    tokenizer.model is preferred for its scores; tokenizer.json otherwise. SlimpiError on anything unknown.
    """
    notes: list[str] = []
    document = _json(folder / "tokenizer.json")
    settings = _json(folder / "tokenizer_config.json") or {}
    model = (document or {}).get("model", {})
    if (folder / "tokenizer.model").is_file() and model.get("type", "BPE") == "BPE" and not _byte_level(document):
        keys = _sentencepiece((folder / "tokenizer.model").read_bytes(), folder)
    elif document is None:
        raise SlimpiError(f"{folder} has neither tokenizer.json nor tokenizer.model. Save the tokenizer there.")
    elif model.get("type") != "BPE":
        raise SlimpiError(f"{folder}/tokenizer.json holds a {model.get('type')} model. Only BPE is supported.")
    elif _byte_level(document):
        keys = _byte_level_bpe(document, notes)
    elif model.get("byte_fallback"):
        keys = _converted_sentencepiece(document)
    else:
        raise SlimpiError(f"{folder}/tokenizer.json is neither byte-level BPE nor SentencePiece BPE.")
    _add_tokens(keys, _added(document, settings), config["vocab_size"], notes)
    _add_specials(keys, document, settings, config)
    template = settings.get("chat_template") or _text(folder / "chat_template.jinja")
    if isinstance(template, list):
        template = {named.get("name"): named.get("template") for named in template}.get("default")
    if isinstance(template, str):
        keys["tokenizer.chat_template"] = template
    return Vocabulary(keys), notes


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise SlimpiError(f"{path} is not valid JSON ({error}). Fetch it again.") from error


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise SlimpiError(f"cannot read {path}: {error}.") from error


def _byte_level(document: dict | None) -> bool:
    return document is not None and any(s[0] == "ByteLevel" for s in read_steps(document.get("pre_tokenizer")))


def _byte_level_bpe(document: dict, notes: list[str]) -> dict[str, Value]:
    model = document["model"]
    pre = find_pre_tokenizer(read_steps(document["pre_tokenizer"]), bool(model.get("ignore_merges")))
    normalizer = document.get("normalizer")
    if normalizer and normalizer.get("type") != "NFC":
        raise SlimpiError(f"the tokenizer normalizes text by {normalizer}, which llama.cpp does not do.")
    if normalizer:
        notes.append("tokenizer: text is normalized to NFC in Hugging Face, not in llama.cpp")
    ids = model["vocab"]
    tokens = [filler(i) for i in range(max(ids.values()) + 1)]
    types = [UNUSED] * len(tokens)
    for token, i in ids.items():
        tokens[i], types[i] = token, NORMAL
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [_merge(m) for m in model["merges"]],
    }


def _merge(merge: str | list[str]) -> str:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or any(" " in part for part in parts):
        raise SlimpiError(f"the tokenizer's merge {merge!r} is no pair of byte-level tokens.")
    return " ".join(parts)


def _converted_sentencepiece(document: dict) -> dict[str, Value]:
    """A SentencePiece vocabulary that only tokenizer.json kept: a token scores by its first merge's rank."""
    model = document["model"]
    ids: dict[str, int] = model["vocab"]
    n_merges = len(model["merges"])
    rank: dict[str, int] = {}
    for i, merge in enumerate(model["merges"]):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), i)
    tokens = [filler(i) for i in range(max(ids.values()) + 1)]
    types, scores = [UNUSED] * len(tokens), [_FILLER_SCORE] * len(tokens)
    for token, i in ids.items():
        tokens[i], types[i] = token, BYTE if _is_byte(token) else NORMAL
        scores[i] = float(-rank.get(token, n_merges))
    if model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = UNKNOWN
    prepends = "Prepend" in json.dumps(document.get("normalizer"))
    metaspace = document.get("pre_tokenizer") or {}
    prepends = prepends or (metaspace.get("type") == "Metaspace" and metaspace.get("prepend_scheme") != "never")
    return _spm_keys(tokens, scores, types, prepends)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _spm_keys(tokens: list[str], scores: list[float], types: list[int], prefix: bool) -> dict[str, Value]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _sentencepiece(data: bytes, folder: Path) -> dict[str, Value]:
    """A tokenizer.model (sentencepiece_model.proto): pieces, trainer's model type, and whether a space is prefixed."""
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    model_type, prefix = 1, True
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                tokens.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0])
                types.append(piece.get(3, NORMAL))
            elif number == 2:
                model_type = dict(_fields(value)).get(3, 1)
            elif number == 3:
                prefix = bool(dict(_fields(value)).get(3, 1))
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise SlimpiError(f"{folder}/tokenizer.model is not a readable SentencePiece model. Fetch it again.") from error
    if model_type != _SPM_BPE:
        raise SlimpiError(f"{folder}/tokenizer.model is a SentencePiece model of type {model_type}, not BPE (2).")
    # llama.cpp looks these up in the text as it is, before spaces become meta symbols.
    spaced = [t.replace(_META, " ") if kind == USER_DEFINED else t for t, kind in zip(tokens, types, strict=True)]
    return _spm_keys(spaced, scores, types, prefix)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """A protobuf message's (field number, value): int for varints, bytes for the rest. IndexError if cut off."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(wire) or varint()
        if wire not in (1, 2, 5) or at + length > len(data):
            raise IndexError(at)
        yield tag >> 3, data[at : at + length]
        at += length


def _added(document: dict | None, settings: dict) -> dict[int, dict[str, Any]]:
    """Added tokens by id; tokenizer.json and tokenizer_config.json say the same where both exist."""
    found = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    return found | {token["id"]: token for token in (document or {}).get("added_tokens", [])}


def _add_tokens(keys: dict[str, Any], added: dict[int, dict[str, Any]], vocab_size: int, notes: list[str]) -> None:
    """Enter the added tokens and make the vocabulary exactly `vocab_size` long."""
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    scores = keys.get("tokenizer.ggml.scores", [])
    beyond = sorted({*range(vocab_size, len(tokens)), *(i for i in added if i >= vocab_size)})
    if beyond:
        notes.append(f"tokenizer: {len(beyond)} tokens from id {beyond[0]} have no embedding and are left out")
    for column in (tokens, types, scores):
        del column[vocab_size:]
    for i in range(len(tokens), vocab_size):
        tokens.append(filler(i))
        types.append(UNUSED)
        if keys["tokenizer.ggml.model"] == "llama":
            scores.append(_FILLER_SCORE)
    for i, token in added.items():
        if i >= vocab_size:
            continue
        text = token["content"]
        if types[i] not in (UNKNOWN, BYTE):
            types[i] = CONTROL if token.get("special") or _looks_special(text) else USER_DEFINED
        tokens[i] = text.replace(_META, " ") if types[i] == USER_DEFINED else text
        if scores:
            scores[i] = _ADDED_SCORE


def _looks_special(text: str) -> bool:
    """Control tokens that some checkpoints forget to mark as special; the same rule as llama.cpp's converter."""
    shapes = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))  # noqa: RUF001
    return text in _UNMARKED_SPECIALS or any(text.startswith(a) and text.endswith(b) for a, b in shapes)


def _add_specials(keys: dict[str, Any], document: dict | None, settings: dict, config: dict[str, Any]) -> None:
    """Ids of the special tokens, and whether BOS and EOS are added as the tokenizer itself would add them."""
    index = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        entry = settings.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        fallback = config.get(f"{name}_token_id")
        fallback = fallback[0] if isinstance(fallback, list) and fallback else fallback
        found = index.get(text, fallback) if isinstance(text, str) else fallback
        if isinstance(found, int) and 0 <= found < len(index):
            keys[f"tokenizer.ggml.{key}_token_id"] = found
    adds = _adds(keys, document, settings)
    keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"] = adds


def _adds(keys: dict[str, Any], document: dict | None, settings: dict) -> tuple[bool, bool]:
    """(adds BOS, adds EOS), seen on one encoded letter where a tokenizer.json exists."""
    bos, eos = (keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    found = (keys["tokenizer.ggml.model"] == "llama", False)
    if document is not None:
        try:
            ids = tokenizers.Tokenizer.from_str(json.dumps(document)).encode("a").ids
        except Exception as error:  # the library raises nothing narrower
            raise SlimpiError(f"tokenizer.json does not load: {error}.") from error
        found = (bool(ids) and ids[0] == bos, bool(ids) and ids[-1] == eos)
    if settings.get("tokenizer_class", "").removesuffix("Fast") in _ADDS_BOS_BY_CONFIG:
        return settings.get("add_bos_token", found[0]), settings.get("add_eos_token", found[1])
    return found
