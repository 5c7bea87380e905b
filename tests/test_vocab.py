"""Tokenizers: Hugging Face, llama.cpp and slimpi's own rebuilt one give the same tokens for the same text."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from device.records import SlimpiError
from pipeline.checkpoint import Checkpoint, held, load
from pipeline.export.gguf import export_gguf
from pipeline.gguf_file import read_gguf
from pipeline.vocab import CONTROL, UNUSED, USER_DEFINED, Vocabulary, find_pre_tokenizer, read_steps
from pipeline.vocab_folder import read_vocabulary
from tests.llama_cpp_side import llama_tokens
from tests.real_models import real_gguf
from tests.tiny_models import PROSE, TINY, save_tiny, train_bpe, train_sentencepiece

AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "tabs\tand\r\nline\n\n\nbreaks\n",
    "It's we'll I'D they'Re 'tis 'S",
    "1 12 123 1234 12345 3.14159 1,000,000 ٣٤ ²",
    "naïve café Zürich ÅNGSTRÖM straße",
    "日本語のテキスト 한국어 русский العربية हिन्दी",
    "emoji 👍🏽👩‍👩‍👧 and \u200b zero width \u00a0 nbsp \u3000 wide",
    "code: if (x==1) { return a[i]->b; } // ###",
    "http://t.co/abc123 @user #tag &amp; ... !!! ?!",
    "a" * 300,
    "<|begin|> special <|end|> <bos> <unused> ▁▁ meta",
]


def real_lines(data_dir: Path) -> list[str]:
    """500 tweets and 500 lines of WikiText, as they are."""
    with (data_dir / "tweets" / "train.csv").open(newline="", encoding="utf-8") as handle:
        tweets = [row["text"] for row in csv.DictReader(handle)][:500]
    wiki = (data_dir / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8").split("\n")
    lines = tweets + [line for line in wiki if line.strip()][:500]
    assert len(lines) == 1000
    return lines


def vocab_file(vocab: Vocabulary, folder: Path) -> Path:
    """A GGUF with this vocabulary and nearly no model, for llama.cpp to tokenize with."""
    import torch

    from pipeline.architectures import tensor_shapes
    from pipeline.checkpoint import _complete

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = _complete("llama", {**sizes, "num_key_value_heads": 1, "vocab_size": len(vocab.tokens)})
    shapes = tensor_shapes("llama", config)
    tensors = {name: held(name, torch.zeros(shape)) for name, shape in shapes.items()}
    export_gguf(Checkpoint("llama", config, tensors, vocab, "vocabulary"), folder / "v.gguf", "F16")
    return folder / "v.gguf"


def folder_with(tmp_path: Path, document: tokenizers.Tokenizer, **settings: object) -> Path:
    document.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def differing(lines: list[str], one: list[list[int]], other: list[list[int]]) -> list[str]:
    return [line for line, a, b in zip(lines, one, other, strict=True) if a != b]


@pytest.mark.parametrize("pre", ["llama-bpe", "smaug-bpe", "qwen2", "smollm", "gpt-2"])
def test_bpe_equals_hugging_face_in_llama_cpp(pre: str, tmp_path: Path, data_dir: Path) -> None:
    theirs = train_bpe(pre, 1500)
    vocab, _ = read_vocabulary(folder_with(tmp_path, theirs), {"vocab_size": 1500})
    assert vocab.get("pre") == pre
    lines = AWKWARD + real_lines(data_dir)
    expected = [e.ids for e in theirs.encode_batch(lines, add_special_tokens=False)]
    rebuilt = [e.ids for e in vocab.to_tokenizers().encode_batch(lines, add_special_tokens=False)]
    assert differing(lines, expected, llama_tokens(vocab_file(vocab, tmp_path), lines, tmp_path)) == []
    assert differing(lines, expected, rebuilt) == []


@pytest.mark.parametrize("prefix", [False, True], ids=["gemma-like", "llama2-like"])
def test_sentencepiece_equals_its_own_library(prefix: bool, tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(1500, prefix))
    vocab, notes = read_vocabulary(tmp_path, {"vocab_size": 1600})
    assert notes == []
    assert vocab.get("add_space_prefix") is prefix
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    lines = [line for line in AWKWARD if "<" not in line] + real_lines(data_dir)
    expected = [library.encode(line) for line in lines]
    rebuilt = [e.ids for e in vocab.to_tokenizers().encode_batch(lines, add_special_tokens=False)]
    assert differing(lines, expected, llama_tokens(vocab_file(vocab, tmp_path), lines, tmp_path)) == []
    assert differing(lines, expected, rebuilt) == []


def test_sentencepiece_from_tokenizer_json_alone(tmp_path: Path, data_dir: Path) -> None:
    """Without tokenizer.model the scores come from the merges' order and give the same tokens."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.model").write_bytes(train_sentencepiece(1500))
    original, _ = read_vocabulary(tmp_path / "a", {"vocab_size": 1500})
    (tmp_path / "b").mkdir()
    folder = folder_with(tmp_path / "b", original.to_tokenizers())
    vocab, _ = read_vocabulary(folder, {"vocab_size": 1500})
    assert vocab.get("scores") != original.get("scores")
    lines = real_lines(data_dir)
    first = llama_tokens(vocab_file(original, tmp_path), lines, tmp_path)
    assert differing(lines, first, llama_tokens(vocab_file(vocab, tmp_path), lines, tmp_path)) == []


def test_added_tokens_specials_and_fillers(tmp_path: Path) -> None:
    theirs = train_bpe("qwen2", 400)
    theirs.add_special_tokens(["<|im_end|>"])
    theirs.add_tokens(["<tool_call>", "<|fim|>"])
    settings = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|end|>", "chat_template": "{{ x }}"}
    folder = folder_with(tmp_path, theirs, **settings)
    vocab, notes = read_vocabulary(folder, {"vocab_size": 405, "bos_token_id": 0})
    types = vocab.get("token_type")
    by_text = {token: types[i] for i, token in enumerate(vocab.tokens)}
    assert by_text["<|im_end|>"] == by_text["<|fim|>"] == CONTROL
    assert by_text["<tool_call>"] == USER_DEFINED
    assert (vocab.tokens[404], types[404]) == ("[PAD404]", UNUSED)
    specials = [vocab.special(name) for name in ("eos", "padding", "bos")]
    assert specials == ["<|im_end|>", "<|end|>", "<|begin|>"]
    assert vocab.keys["tokenizer.chat_template"] == "{{ x }}"
    assert any("NFC" in note for note in notes)
    text = "a<tool_call>b<|im_end|>c<|fim|>"
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert llama_tokens(vocab_file(vocab, tmp_path), [text], tmp_path) == [expected]
    shorter, notes = read_vocabulary(folder, {"vocab_size": 401})
    assert len(shorter.tokens) == 401
    assert any("2 tokens from id 401 have no embedding" in note for note in notes)


def test_of_named_chat_templates_the_default_is_kept(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = folder_with(tmp_path, train_bpe("gpt-2", 300), chat_template=templates)
    vocab, _ = read_vocabulary(folder, {"vocab_size": 300})
    assert vocab.keys["tokenizer.chat_template"] == "D"


def test_bos_is_added_as_the_tokenizer_adds_it(tmp_path: Path) -> None:
    """Seen on the tokenizer itself, and the same in Hugging Face, the rebuilt one and llama.cpp."""
    theirs = train_bpe("llama-bpe", 400)
    plain, _ = read_vocabulary(folder_with(tmp_path, theirs, bos_token="<|begin|>"), {"vocab_size": 400})
    assert plain.get("add_bos_token") is False
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    vocab, _ = read_vocabulary(folder_with(tmp_path, theirs, bos_token="<|begin|>"), {"vocab_size": 400})
    assert (vocab.get("add_bos_token"), vocab.get("add_eos_token")) == (True, False)
    for known, tokenizer in ((plain, plain.to_tokenizers()), (vocab, theirs), (vocab, vocab.to_tokenizers())):
        expected = tokenizer.encode("Hello there").ids
        assert llama_tokens(vocab_file(known, tmp_path), ["Hello there"], tmp_path, add_special=True) == [expected]


def test_unknown_splitting_is_named(tmp_path: Path) -> None:
    theirs = train_bpe("gpt-2", 400)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\d+|\w+"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(SlimpiError, match=r"\\\\d\+\|\\\\w\+"):
        read_vocabulary(folder_with(tmp_path, theirs), {"vocab_size": 400})


def test_near_misses_of_a_known_splitting_are_not_taken_for_it() -> None:
    document = json.loads(train_bpe("smollm", 300).to_str())["pre_tokenizer"]
    assert find_pre_tokenizer(read_steps(document), False) == "smollm"
    document["pretokenizers"][0]["individual_digits"] = False
    with pytest.raises(SlimpiError, match="Digits"):
        find_pre_tokenizer(read_steps(document), False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": "{"}, "not valid JSON"),
        ({"tokenizer.json": '{"model": {"type": "Unigram"}}'}, "Unigram"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "neither byte-level"),
        ({"tokenizer.model": "garbage" * 9}, "not a readable SentencePiece"),
    ],
)
def test_bad_tokenizers(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SlimpiError, match=message):
        read_vocabulary(tmp_path, {"vocab_size": 10})


def test_unigram_sentencepiece_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        input=str(PROSE), model_prefix=str(tmp_path / "tokenizer"), model_type="unigram", vocab_size=300, minloglevel=2
    )
    with pytest.raises(SlimpiError, match="type 1, not BPE"):
        read_vocabulary(tmp_path, {"vocab_size": 300})


def test_sha256_counts_what_tokenizes_and_nothing_else(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    vocab = load(tmp_path).vocab
    assert len(vocab.tokens) == TINY["qwen2"]["vocab_size"]
    renamed = Vocabulary({**vocab.keys, "tokenizer.chat_template": "other", "tokenizer.ggml.padding_token_id": 3})
    assert renamed.sha256() == vocab.sha256()
    for change in ({"add_bos_token": True}, {"pre": "gpt-2"}, {"merges": vocab.get("merges")[:-1]}):
        keys = {**vocab.keys, **{f"tokenizer.ggml.{k}": v for k, v in change.items()}}
        assert Vocabulary(keys).sha256() != vocab.sha256()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-coder", "gemma3"])
def test_real_vocabularies(name: str, tmp_path: Path, data_dir: Path) -> None:
    """1,000 real lines under the rebuilt Hugging Face tokenizer and llama.cpp, special tokens parsed by both."""
    vocab = Vocabulary(read_gguf(real_gguf(name, tmp_path)).keys)
    lines = AWKWARD + real_lines(data_dir)
    ours = [e.ids for e in vocab.to_tokenizers().encode_batch(lines, add_special_tokens=False)]
    assert differing(lines, ours, llama_tokens(vocab_file(vocab, tmp_path), lines, tmp_path)) == []


@pytest.mark.slow
def test_qwen_rebuilt_equals_transformers_own(tmp_path: Path, data_dir: Path) -> None:
    """An independent oracle: transformers rebuilds Qwen2's tokenizer from the GGUF with its own code."""
    from transformers import AutoTokenizer

    path = real_gguf("qwen2.5-coder", tmp_path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = Vocabulary(read_gguf(path).keys).to_tokenizers()
    lines = real_lines(data_dir)
    one = [e.ids for e in ours.encode_batch(lines, add_special_tokens=False)]
    assert differing(lines, one, theirs(lines, add_special_tokens=False)["input_ids"]) == []
