"""Vocabularies in GGUF's terms, and back to a Hugging Face tokenizer.

llama.cpp names a way of splitting text before byte-pair merges ("pre"); Hugging Face writes it out in
tokenizer.json. PRE_TOKENIZERS is the bridge, in both directions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import tokenizers

from device.records import SlimpiError
from pipeline.gguf_file import Value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types; SentencePiece numbers its own the same way."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Step = tuple[str | bool, ...]
_BYTES_ONLY: Step = ("ByteLevel", False, False)
_BYTES_AND_REGEX: Step = ("ByteLevel", False, True)


def _split(regex: str) -> Step:
    return ("Split", regex, "Isolated", False)


@dataclass(frozen=True)
class PreTokenizer:
    """What a llama.cpp "pre" stands for.

    `steps` as `read_steps` gives them: ("Split", regex, behavior, invert), ("Digits", individual) or
    ("ByteLevel", add_prefix_space, use_regex). `add_bos` is llama.cpp's choice where a GGUF says nothing.
    """

    steps: tuple[Step, ...]
    ignore_merges: bool = False
    add_bos: bool = False


PRE_TOKENIZERS = {
    "llama-bpe": PreTokenizer((_split(_SPLIT % r"\p{N}{1,3}"), _BYTES_ONLY), ignore_merges=True, add_bos=True),
    "smaug-bpe": PreTokenizer((_split(_SPLIT % r"\p{N}{1,3}"), _BYTES_ONLY)),
    "qwen2": PreTokenizer((_split(_SPLIT % r"\p{N}"), _BYTES_ONLY)),
    "smollm": PreTokenizer((("Digits", True), _BYTES_AND_REGEX)),
    "gpt-2": PreTokenizer((_BYTES_AND_REGEX,)),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}

_TOKENIZING_KEYS = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF keys ("tokenizer.*"), either taken over from a GGUF or made from a Hugging Face folder."""

    keys: dict[str, Value]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of "tokenizer.ggml.{name}"."""
        return self.keys.get(f"tokenizer.ggml.{name}", default)

    @property
    def tokens(self) -> list[str]:
        return self.get("tokens")

    @property
    def kind(self) -> str:
        """GGUF's tokenizer model: "gpt2" is byte-level BPE, "llama" is SentencePiece."""
        return self.get("model", "")

    def sha256(self) -> str:
        """Hash of everything that decides how text becomes tokens; names, templates and padding do not count."""
        chosen = {name: self.get(name) for name in _TOKENIZING_KEYS}
        return hashlib.sha256(json.dumps(chosen, ensure_ascii=False).encode()).hexdigest()

    def special(self, name: str) -> str | None:
        """Text of the bos, eos, padding or unknown token, or None."""
        index = self.get(f"{name}_token_id")
        return self.tokens[index] if isinstance(index, int) and 0 <= index < len(self.tokens) else None

    def to_tokenizers(self) -> tokenizers.Tokenizer:
        """The same tokenizer for Hugging Face's library. SlimpiError for kinds other than BPE and SentencePiece."""
        make = {"gpt2": _bpe_json, "llama": _sentencepiece_json}.get(self.kind)
        if make is None:
            raise SlimpiError(f"tokenizer model {self.kind!r} cannot be rebuilt. Supported: gpt2 (BPE), llama (SPM).")
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(self),
            "post_processor": _post_processor(self),
            **make(self),
        }
        return tokenizers.Tokenizer.from_str(json.dumps(document, ensure_ascii=False))

    def tokenizer_config(self) -> dict[str, Any]:
        """Content of tokenizer_config.json beside the tokenizer.json of `to_tokenizers`."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000_000,
        }
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            if (text := self.special(key)) is not None:
                config[f"{name}_token"] = text
        if template := self.keys.get("tokenizer.chat_template"):
            config["chat_template"] = template
        return config


def pre_tokenizer(vocab: Vocabulary) -> PreTokenizer:
    """The table's entry for a BPE vocabulary; SlimpiError names an unknown one."""
    name = vocab.get("pre", "")
    if _ALIASES.get(name, name) not in PRE_TOKENIZERS:
        raise SlimpiError(f"pre-tokenizer {name!r} is not known. Known: {', '.join([*PRE_TOKENIZERS, *_ALIASES])}.")
    return PRE_TOKENIZERS[_ALIASES.get(name, name)]


def find_pre_tokenizer(steps: tuple[Step, ...], ignore_merges: bool) -> str:
    """The "pre" whose splitting is exactly this; SlimpiError shows an unknown one."""
    for name, known in PRE_TOKENIZERS.items():
        if known.steps == steps and known.ignore_merges == ignore_merges:
            return name
    raise SlimpiError(
        f"the tokenizer splits text in a way slimpi has no llama.cpp name for: {steps}, ignore_merges={ignore_merges}. "
        f"Known: {', '.join(PRE_TOKENIZERS)} (pipeline/vocab.py)."
    )


def read_steps(node: dict | None) -> tuple[Step, ...]:
    """A tokenizer.json's pre_tokenizer as plain steps, in order."""
    if node is None:
        return ()
    kind = node.get("type", "?")
    if kind == "Sequence":
        return tuple(step for part in node["pretokenizers"] for step in read_steps(part))
    if kind == "Split":
        pattern = node["pattern"]
        regex = pattern["Regex"] if "Regex" in pattern else "literal " + pattern.get("String", "?")
        return (("Split", regex, node["behavior"], node["invert"]),)
    if kind == "Digits":
        return ((kind, node["individual_digits"]),)
    if kind == "ByteLevel":
        return ((kind, node["add_prefix_space"], node.get("use_regex", True)),)
    return ((kind,),)


def _step_json(step: Step) -> dict[str, Any]:
    if step[0] == "Split":
        return {"type": "Split", "pattern": {"Regex": step[1]}, "behavior": step[2], "invert": step[3]}
    if step[0] == "Digits":
        return {"type": "Digits", "individual_digits": step[1]}
    return {"type": "ByteLevel", "add_prefix_space": step[1], "trim_offsets": True, "use_regex": step[2]}


def _ids(vocab: Vocabulary) -> dict[str, int]:
    """Token -> id, without the fillers of rows that no token has."""
    types = vocab.get("token_type") or [NORMAL] * len(vocab.tokens)
    pairs = enumerate(zip(vocab.tokens, types, strict=True))
    return {token: i for i, (token, kind) in pairs if not (kind == UNUSED and token == filler(i))}


def filler(index: int) -> str:
    """The text of an embedding row that no token has, as llama.cpp's converter writes it."""
    return f"[PAD{index}]"


def _added_tokens(vocab: Vocabulary) -> list[dict[str, Any]]:
    kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    types = vocab.get("token_type") or []
    return [
        {"id": i, "content": vocab.tokens[i], "special": kinds[kind], **flags}
        for i, kind in enumerate(types)
        if kind in kinds
    ]


def _post_processor(vocab: Vocabulary) -> dict[str, Any] | None:
    """Adds BOS and EOS where llama.cpp would."""
    default_bos = pre_tokenizer(vocab).add_bos if vocab.kind == "gpt2" else True
    bos = vocab.special("bos") if vocab.get("add_bos_token", default_bos) else None
    eos = vocab.special("eos") if vocab.get("add_eos_token", False) else None
    if bos is None and eos is None:
        return None
    before = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos is not None else []
    after = [{"SpecialToken": {"id": eos, "type_id": 0}}] if eos is not None else []
    specials = {t: {"id": t, "ids": [vocab.tokens.index(t)], "tokens": [t]} for t in (bos, eos) if t is not None}
    return {
        "type": "TemplateProcessing",
        "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after],
        "pair": [*before, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}, *after],
        "special_tokens": specials,
    }


def _bpe_json(vocab: Vocabulary) -> dict[str, Any]:
    pre = pre_tokenizer(vocab)
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_step_json(step) for step in pre.steps]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": _ids(vocab),
            "merges": [merge.split(" ", 1) for merge in vocab.get("merges", [])],
            "ignore_merges": pre.ignore_merges,
            "byte_fallback": False,
            "fuse_unk": False,
        },
    }


def _sentencepiece_json(vocab: Vocabulary) -> dict[str, Any]:
    """SentencePiece BPE as Hugging Face writes it: spaces become the meta symbol, merges are read off the scores."""
    prefix = bool(vocab.get("add_space_prefix", True))
    to_meta: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, to_meta] if prefix else [to_meta]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    ids = _ids(vocab)
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": _merges_of_scores(ids, vocab.get("scores")),
            "unk_token": vocab.special("unknown"),
            "byte_fallback": True,
            "fuse_unk": True,
        },
    }


def _merges_of_scores(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of every token into two tokens; SentencePiece merges the pair whose whole scores highest."""
    found = [
        (-scores[index], ids[token[:cut]], ids[token[cut:]], token[:cut], token[cut:])
        for token, index in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(left, right) for _, _, _, left, right in sorted(found)]
