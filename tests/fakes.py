"""Tiny models that the real runtimes load: a random llama in GGUF and a random text classifier in ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from device.records import encode
from device.schema import Artifact, Dataset, Job, Task, describe_file
from device.words import WordSpec

TEXT = (
    "The kettle sang before the house was up. Rain had come in the night and gone again, and the yard held "
    "three small skies in its puddles; the cat walked round each of them with care. "
)
TWEETS = [
    ("Smoke over the harbour, sirens everywhere", 1),
    ("my phone battery is a disaster lol", 0),
    ("Bridge closed after the flood, stay away", 1),
    ("this burger is fire", 0),
    ('Wind took the "roof" off,\nwe are fine', 1),
    ("exam week is killing me", 0),
    ("Evacuating now, road is packed", 1),
]


@dataclass(frozen=True)
class LlamaShape:
    """Hyperparameters of a fake llama; the vocabulary is SentencePiece bytes, three specials and a few words."""

    layers: int = 2
    dim: int = 32
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 64
    eps: float = 1e-5
    rope_base: float = 10000.0
    add_bos: bool = True
    add_eos: bool = False


WORDS = ("▁the", "▁", "e", "t", "h", "th", "the", "▁t", "▁th", "▁a", "a", "n", "an")
N_VOCAB = 3 + 256 + len(WORDS)


def llama_weights(shape: LlamaShape, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights under their GGUF names, (out, in), q and k rows in llama.cpp's interleaved RoPE order."""
    rng = np.random.default_rng(seed)
    head = shape.dim // shape.heads

    def matrix(out: int, inp: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (rng.standard_normal((out, inp)) * scale / np.sqrt(inp)).astype(np.float32)

    def norm() -> NDArray[np.float32]:
        return rng.uniform(0.5, 1.5, shape.dim).astype(np.float32)

    weights = {"token_embd.weight": matrix(N_VOCAB, shape.dim, 4.0), "output_norm.weight": norm()}
    for i in range(shape.layers):
        weights |= {
            f"blk.{i}.attn_norm.weight": norm(),
            f"blk.{i}.attn_q.weight": matrix(shape.heads * head, shape.dim, 2.0),
            f"blk.{i}.attn_k.weight": matrix(shape.kv_heads * head, shape.dim, 2.0),
            f"blk.{i}.attn_v.weight": matrix(shape.kv_heads * head, shape.dim),
            f"blk.{i}.attn_output.weight": matrix(shape.dim, shape.heads * head),
            f"blk.{i}.ffn_norm.weight": norm(),
            f"blk.{i}.ffn_gate.weight": matrix(shape.ffn, shape.dim),
            f"blk.{i}.ffn_up.weight": matrix(shape.ffn, shape.dim),
            f"blk.{i}.ffn_down.weight": matrix(shape.dim, shape.ffn),
        }
    weights["output.weight"] = matrix(N_VOCAB, shape.dim, 3.0)
    return weights


def write_llama(
    path: Path, shape: LlamaShape | None = None, seed: int = 0, weights: dict[str, NDArray[np.float32]] | None = None
) -> None:
    """An F32 GGUF that llama.cpp loads, with a byte-fallback SentencePiece vocabulary."""
    shape = shape or LlamaShape()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.dim // shape.heads)
    writer.add_vocab_size(N_VOCAB)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS])
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(WORDS))])
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * len(WORDS)]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(shape.add_bos)
    writer.add_add_eos_token(shape.add_eos)
    for name, tensor in (weights or llama_weights(shape, seed)).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_classifier(folder: Path, n_labels: int = 2, seed: int = 0) -> None:
    """model.onnx (embedding, masked mean, linear) and tokenizer.json (words seen in TWEETS, [CLS] and [SEP])."""
    words = sorted({word for text, _ in TWEETS for word in text.lower().split()})
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=64)  # a fixed length, which the device must undo
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(seed)
    constants = {
        "embedding": rng.standard_normal((len(vocab), 8)).astype(np.float32),
        "head": rng.standard_normal((8, n_labels)).astype(np.float32),
        "axis": np.array([1], dtype=np.int64),
        "last": np.array([2], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["words"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["words", "wide"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "axis"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "axis"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "head"], ["logits"]),
    ]
    ids = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "t"]) for n in ("input_ids", "attention_mask")]
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", n_labels])
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "classifier", ids, [out], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")


VOCABULARY = ["", "<UNK>", "fire", "flood", "smoke", "the", "is", "a"]
KEYWORDS = ("fire", "car%20crash")


def write_word_classifier(folder: Path, tokens: bool = False, seed: int = 0) -> None:
    """model.onnx (mean word vector + keyword vector + numbers + counted terms, to two labels) and words.json; with
    `tokens` also the mean piece vector of `write_classifier`'s tokenizer: an ensemble."""
    if tokens:
        write_classifier(folder)
    spec = WordSpec(
        steps=["urls", "lower"], vocabulary=VOCABULARY, keywords=KEYWORDS, numbers=("punctuation_count",), max_words=8
    )
    (folder / "words.json").write_bytes(encode(spec))
    rng = np.random.default_rng(seed)
    constants = {
        "words": rng.standard_normal((len(VOCABULARY), 2)).astype(np.float32),
        "keywords": rng.standard_normal((len(KEYWORDS) + 1, 2)).astype(np.float32),
        "weight": rng.standard_normal((1, 2)).astype(np.float32),
        "pieces": rng.standard_normal((64, 2)).astype(np.float32),
        "axis": np.array([1], dtype=np.int64),
        "last": np.array([2], dtype=np.int64),
        "zero": np.array(0, dtype=np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["words", "word_ids"], ["vectors"]),
        node("Equal", ["word_ids", "zero"], ["padding"]),
        node("Not", ["padding"], ["real"]),
        node("Cast", ["real"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "last"], ["wide"]),
        node("Mul", ["vectors", "wide"], ["masked"]),
        node("ReduceSum", ["masked", "axis"], ["text"], keepdims=0),
        node("Gather", ["keywords", "keyword_ids"], ["keyword"]),
        node("MatMul", ["numbers", "weight"], ["number"]),
        node("Gather", ["words", "term_ids"], ["terms"]),
        node("Unsqueeze", ["term_counts", "last"], ["counts"]),
        node("Mul", ["terms", "counts"], ["counted"]),
        node("ReduceSum", ["counted", "axis"], ["term"], keepdims=0),
        node("Sum", ["text", "keyword", "number", "term", *(["piece"] if tokens else [])], ["logits"]),
    ]
    shapes = {
        "word_ids": (TensorProto.INT64, ["b", "w"]),
        "keyword_ids": (TensorProto.INT64, ["b"]),
        "numbers": (TensorProto.FLOAT, ["b", 1]),
        "term_ids": (TensorProto.INT64, ["b", "t"]),
        "term_counts": (TensorProto.FLOAT, ["b", "t"]),
    }
    if tokens:
        shapes |= {name: (TensorProto.INT64, ["b", "p"]) for name in ("input_ids", "attention_mask")}
        nodes[0:0] = [
            node("Gather", ["pieces", "input_ids"], ["every"]),
            node("Cast", ["attention_mask"], ["attended"], to=TensorProto.FLOAT),
            node("Unsqueeze", ["attended", "last"], ["attended_wide"]),
            node("Mul", ["every", "attended_wide"], ["kept"]),
            node("ReduceSum", ["kept", "axis"], ["piece"], keepdims=0),
        ]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in shapes.items()]
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 2])
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "words", inputs, [out], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")


def write_csv(
    path: Path, rows: list[tuple[str, Any]] | None = None, columns: tuple[str, str] = ("text", "target")
) -> None:
    quoted = ['"{}","{}"'.format(str(text).replace('"', '""'), label) for text, label in (rows or TWEETS)]
    path.write_text("\n".join([",".join(columns), *quoted]) + "\n", encoding="utf-8")


def artifact(folder: Path, kind: str, **changes: Any) -> Artifact:
    """The manifest of what lies in `folder`: model.gguf, or model.onnx and what its texts are read with."""
    readers = [name for name in ("tokenizer.json", "words.json") if (folder / name).exists()]
    names = ["model.gguf"] if kind == "gguf" else ["model.onnx", *readers]
    if changes.get("golden"):
        names.append(changes["golden"].file)
    fields: dict[str, Any] = {
        "id": "fake-1",
        "name": "fake",
        "model": "fake",
        "variant": "f32",
        "kind": kind,
        "task": "lm" if kind == "gguf" else "classifier",
        "entry": names[0],
        "files": [describe_file(folder, name) for name in names],
        "reference": True,
        "tokenizer_sha256": "0" * 64,
        "n_weights": 1,
        "n_linear_weights": 1,
        "bits_per_weight": 32.0,
        "bits_per_linear_weight": 32.0,
        "size_bytes": 1,
        "plan": {},
        "labels": [] if kind == "gguf" else ["no", "yes"],
        "max_tokens": 0 if kind == "gguf" else 16,
    }
    return Artifact(**(fields | changes))


@dataclass(frozen=True)
class World:
    """A device's folders with both fake models, a text and a table in them."""

    root: Path

    @staticmethod
    def make(root: Path, shape: LlamaShape | None = None) -> World:
        for name in ("lm", "classifier", "data"):
            (root / name).mkdir(parents=True)
        write_llama(root / "lm" / "model.gguf", shape)
        write_classifier(root / "classifier")
        (root / "data" / "text.txt").write_text(TEXT * 4, encoding="utf-8")
        write_csv(root / "data" / "tweets.csv")
        return World(root)

    def dataset(self, name: str) -> Dataset:
        return Dataset(name=name, file=describe_file(self.root / "data", name))

    def job(self, kind: str, tasks: list[Task], **changes: Any) -> Job:
        folder = self.root / ("lm" if kind == "gguf" else "classifier")
        fields: dict[str, Any] = {
            "id": "job-1",
            "artifact": artifact(folder, kind),
            "artifact_dir": str(folder),
            "data_dir": str(self.root / "data"),
            "work_dir": str(self.root / "work"),
            "tasks": tasks,
            "threads": 1,
            "provenance": "host",
            "timeout_s": 60,
        }
        return Job(**(fields | changes))
