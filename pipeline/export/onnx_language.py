"""Causal language models as ONNX with a key-value cache: exported in fp32, then rewritten with weights in blocks.

Exported by optimum. Two things are added: an input `first_logit`, so that only positions from there on get logits (a
prompt needs the last one's, scoring needs half of them), and the vocabulary's habits as metadata. The device's side is
device/onnx_language.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from device.records import SlimpiError, write_atomic
from pipeline.architectures import ARCHITECTURES
from pipeline.checkpoint import Checkpoint
from pipeline.export.onnx import MAX_PROTOBUF_BYTES, exported
from pipeline.export.onnx_nbits import DOMAIN, Blockwise
from pipeline.formats import QTensor
from pipeline.torch_model import in_transformers

EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
HABITS = "slimpi.vocabulary"
FIRST_LOGIT = "first_logit"
_END = np.iinfo(np.int64).max


def export_language(checkpoint: Checkpoint, out_dir: Path) -> Path:
    """Write out_dir/model.onnx (fp32) and tokenizer.json. The model is in memory as a whole.

    SlimpiError for more than 2 GiB of fp32 weights, which a file of this kind cannot hold, and for an architecture
    that optimum cannot export.
    """
    if ARCHITECTURES[checkpoint.architecture].per_layer:
        raise SlimpiError(
            f"{checkpoint.origin} has layers that differ ({checkpoint.architecture}): ONNX models have one cache shape "
            "for all layers. Export to gguf."
        )
    n_bytes = 4 * sum(int(np.prod(t.shape)) for t in checkpoint.tensors.values())
    if n_bytes > MAX_PROTOBUF_BYTES:
        raise SlimpiError(
            f"{n_bytes / 2**30:.1f} GiB of fp32 weights: an ONNX file holds less than 2 GiB. Export to gguf."
        )
    model = exported(in_transformers(checkpoint), "text-generation-with-past", "Export to gguf.")
    _slice_logits(model.graph)
    helper.set_model_props(model, {HABITS: json.dumps(habits(checkpoint))})
    out_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(out_dir / "tokenizer.json", str(checkpoint.vocab.to_tokenizers().to_str(pretty=True)).encode())
    write_atomic(out_dir / "model.onnx", model.SerializeToString())
    return out_dir / "model.onnx"


def habits(checkpoint: Checkpoint) -> dict[str, object]:
    """device/onnx_language.py's Habits of this vocabulary, and the cache's shape."""
    config, vocab = checkpoint.config, checkpoint.vocab
    heads = config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "n_vocab": checkpoint.tensors[EMBEDDINGS].shape[0],
        "add_bos": bool(vocab.get("add_bos_token")),
        "add_eos": bool(vocab.get("add_eos_token")),
        "bos": int(vocab.get("bos_token_id") or 0),
        "cache": [heads, size],
    }


def onnx_shape(path: Path) -> tuple[int, int]:
    """(size of the vocabulary, values of the cache a token) of a file that `export_language` began."""
    model = onnx.load(path)
    found = json.loads(next(entry.value for entry in model.metadata_props if entry.key == HABITS))
    heads, size = found["cache"]
    n_caches = sum(value.name.startswith("past_key_values.") for value in model.graph.input)
    return found["n_vocab"], n_caches * heads * size


def _slice_logits(graph: onnx.GraphProto) -> None:
    """Hidden states from position `first_logit` on, before the product with the output matrix."""
    head = _output_product(graph)
    hidden, kept = head.input[0], f"{head.input[0]}.kept"
    for name, value in (("slimpi.end", _END), ("slimpi.positions", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    cut = helper.make_node("Slice", [hidden, FIRST_LOGIT, "slimpi.end", "slimpi.positions"], [kept], name="first_logit")
    head.input[0] = kept
    graph.node.insert(list(graph.node).index(head), cut)
    graph.input.append(helper.make_tensor_value_info(FIRST_LOGIT, TensorProto.INT64, [1]))
    (logits,) = (value for value in graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "n_logits"
    del graph.value_info[:]


def _output_product(graph: onnx.GraphProto) -> onnx.NodeProto:
    """The product with the output matrix; a tied one is the embeddings, transposed by a node."""
    made = {node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] == EMBEDDINGS}
    (head,) = (node for node in graph.node if node.op_type == "MatMul" and node.input[1] in made | {OUTPUT})
    return head


def _untie(graph: onnx.GraphProto) -> None:
    """A matrix of its own for the output: codes in blocks are another thing than rows to look up."""
    head = _output_product(graph)
    if head.input[1] == OUTPUT:
        return
    (transpose,) = (node for node in graph.node if node.output[0] == head.input[1])
    (table,) = (tensor for tensor in graph.initializer if tensor.name == EMBEDDINGS)
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(table).T), OUTPUT))
    head.input[1] = OUTPUT
    graph.node.remove(transpose)


def write_blocks(
    base: Path, out: Path, codes: Mapping[str, QTensor], vectors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> Path:
    """The model at `base` with the named matrices in blocks and the embeddings' rows in 8 bits, to `out`.

    codes: by Hugging Face name, (outputs, inputs). vectors: {name: (before, after)} that a method changed; a norm
    whose gain has an offset is a constant of its own in the graph, so it is found by what it holds.
    """
    model = onnx.load(base)
    _untie(model.graph)
    _change_vectors(model.graph, vectors)
    rewriter = Blockwise(model.graph, lambda name, w: codes.get(name))
    rewriter.run()
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    write_atomic(out.with_name("tokenizer.json"), base.with_name("tokenizer.json").read_bytes())
    write_atomic(out, model.SerializeToString())
    return out


def _change_vectors(graph: onnx.GraphProto, vectors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    held: dict[bytes, list[onnx.TensorProto]] = {}
    for tensor in graph.initializer:
        if len(tensor.dims) == 1 and tensor.data_type == TensorProto.FLOAT:
            held.setdefault(numpy_helper.to_array(tensor).tobytes(), []).append(tensor)
    for name, (before, after) in vectors.items():
        found = held.get(before.float().numpy().tobytes(), [])
        named = [tensor for tensor in found if tensor.name == name] or found
        if len(named) != 1:
            raise SlimpiError(
                f"{name} is held by {len(named)} tensors of the graph, so that what a method folds into it has no "
                "one place. Take a method that folds nothing."
            )
        named[0].CopyFrom(numpy_helper.from_array(after.float().numpy(), named[0].name))
