"""Encoders as ONNX: exported in fp32 with optimum, then rewritten to dynamic INT8 (calibrated forms: onnx_int8.py).

`INT8-dynamic` is ONNX's dynamic scheme: DynamicQuantizeLinear on the activations (uint8, one scale a tensor),
MatMulInteger with uint8 weights (one scale and zero point a column), embeddings in uint8 (a scale and zero
point a row). Weights are uint8 and not int8 because u8 x s8 products saturate on x86 without VNNI, which
would make the host's accuracy another than the device's. LayerNorm, softmax, GELU and biases stay fp32.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from device.records import SlimpiError, write_atomic
from pipeline.encoders import Encoder, load_encoder, quiet_transformers
from pipeline.export import onnx_int8, onnx_nbits, onnx_xlnet
from pipeline.export.onnx_observe import Calibration, Observed
from pipeline.export.onnx_one_token import keep_one_token
from pipeline.export.onnx_rewrite import LOW, SCALE, ZERO_POINT, Rewriter
from pipeline.export.onnx_sizes import dims_of, fix_sizes, rename_inputs, symbolic_dims_of
from pipeline.export.onnx_static import DIVISOR, KEPT_INDEX, KEPT_ROWS
from pipeline.progress import Tick, quiet

OPSET = 18
ENCODER_TASKS = ("text-classification", "feature-extraction")
MAX_PROTOBUF_BYTES = 2**31 - 2**20
EXPORT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class OnnxSummary:
    """What a file holds, read from it: {weight: type}, parameters, and bits a parameter with all overheads.

    notes and facts: what choosing the form had to say, for the manifest.
    """

    types: dict[str, str]
    n_weights: int
    n_linear_weights: int
    bits_per_weight: float
    bits_per_linear_weight: float
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def export_encoder(model_dir: Path, out_dir: Path, labels: list[str], max_tokens: int) -> Path:
    """Write out_dir/model.onnx (fp32, batch and sequence axes dynamic) and out_dir/tokenizer.json.

    Inputs are those of the model among input_ids, attention_mask and token_type_ids, int64 (batch, sequence);
    the output is logits, float32 (batch, n_labels). The tokenizer neither pads nor truncates. The file is run
    and compared with the model. Raises SlimpiError for what `load_encoder` refuses, a head that is not in the
    checkpoint, an architecture optimum cannot export, or an export that computes something else.
    """
    encoder = load_encoder(model_dir, labels, max_tokens)
    if encoder.fresh:
        raise SlimpiError(
            f"{model_dir} has no trained head for {len(labels)} labels: {', '.join(encoder.fresh)} would be random. "
            "Train one (recipe table [head]) or name the labels it was trained for."
        )
    n_bytes = sum(p.numel() for p in encoder.model.parameters()) * 4
    if n_bytes > MAX_PROTOBUF_BYTES:
        raise SlimpiError(f"{model_dir} has {n_bytes} bytes of fp32 weights; an ONNX file holds less than 2 GiB.")
    out_dir.mkdir(parents=True, exist_ok=True)
    model = exported(encoder.model)
    data = model.SerializeToString()
    _compare(data, encoder, max_tokens)
    write_atomic(out_dir / "tokenizer.json", bare_tokenizer(encoder.tokenizer))
    write_atomic(out_dir / "model.onnx", data)
    return out_dir / "model.onnx"


def make_variant(
    base: Path,
    out_dir: Path,
    variant: str,
    calibration: Calibration | None = None,
    tick: Tick = quiet,
    seen: dict[str, Observed] | None = None,
) -> OnnxSummary:
    """Write `variant` of the fp32 file `base` to out_dir/model.onnx, with what reads its texts (INPUT_FILES).

    `seen` keeps what was observed on the calibration text for the next variant of the same base.
    SlimpiError for an unknown variant, one that must be calibrated and is not, or a file that has no such form.
    """
    check_variant(variant)
    readers = input_files(base.parent)
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in readers:
        write_atomic(out_dir / path.name, path.read_bytes())
    out = out_dir / "model.onnx"
    if spec := onnx_int8.parse(variant):
        if calibration is None:
            raise SlimpiError(f"{variant} needs a calibration text. Name one in the recipe's [calibration].")
        quantized = onnx_int8.quantize(_fresh(base), spec, calibration, seen=seen, tick=tick)
        write_atomic(out, quantized.model.SerializeToString())
        return replace(describe_onnx(out), notes=quantized.notes, facts=quantized.facts)
    if blockwise := onnx_nbits.parse(variant):
        onnx_nbits.quantize_blockwise(_load(base), out, *blockwise)
    else:
        ONNX_VARIANTS[variant](base, out)
    return describe_onnx(out)


INPUT_FILES = ("tokenizer.json", "words.json")
"""What turns texts into the inputs of a graph; a classifier has one of them or both."""


def input_files(folder: Path) -> list[Path]:
    """Those of INPUT_FILES that the folder has. SlimpiError if it has none."""
    found = [folder / name for name in INPUT_FILES if (folder / name).is_file()]
    if not found:
        raise SlimpiError(f"{folder} has neither of {', '.join(INPUT_FILES)}. Export the classifier again.")
    return found


def check_variant(variant: str) -> None:
    if variant not in ONNX_VARIANTS and onnx_nbits.parse(variant) is None and onnx_int8.parse(variant) is None:
        raise SlimpiError(
            f"unknown ONNX variant {variant!r}. Known: {', '.join(ONNX_VARIANTS)}, {onnx_nbits.help_text()}, and "
            f"{onnx_int8.help_text()}."
        )


def needs_calibration(variant: str) -> bool:
    return onnx_int8.parse(variant) is not None


def copy_fp32(fp32: Path, out: Path) -> Path:
    write_atomic(out, _load(fp32).SerializeToString())
    return out


def quantize_dynamic(fp32: Path, out: Path) -> Path:
    """Rewrite every MatMul, Gemm and Gather with a constant fp32 matrix to its dynamic INT8 form (module docstring).

    Raises SlimpiError if nothing can be rewritten, the file is quantized already, or a weight is used in two ways.
    """
    model = _fresh(fp32)
    rewriter = Rewriter(model.graph)
    rewriter.run()
    if not rewriter.rewritten:
        raise SlimpiError(f"{fp32} has no constant fp32 matrices to quantize. Start from the FP32 export.")
    onnx.checker.check_model(model)
    write_atomic(out, model.SerializeToString())
    return out


def _fresh(fp32: Path) -> onnx.ModelProto:
    model = _load(fp32)
    if any(node.op_type in ("MatMulInteger", "DequantizeLinear") for node in model.graph.node):
        raise SlimpiError(f"{fp32} is quantized already. Start from the FP32 export.")
    return model


ONNX_VARIANTS: dict[str, Callable[[Path, Path], Path]] = {
    "FP32": copy_fp32,
    "INT8-dynamic": quantize_dynamic,
}


def describe_onnx(path: Path, except_linear: Sequence[str] = ()) -> OnnxSummary:
    """Types and sizes of the weights in `path`; those of except_linear do not count as linear layers.

    A weight is an fp32 initializer of rank >= 1 or an 8-bit one; index tensors and scalars of the graph are not.
    Its scales, zero points, divisors and rows kept in fp32 count as its bits. Linear weights are the
    right operands of matrix products.
    """
    graph = _load(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    blocks = {n.input[1]: {a.name: a.i for a in n.attribute} for n in graph.node if n.op_type == "MatMulNBits"}
    codes = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    operands = [n.input[1] for n in graph.node if n.op_type in ("MatMul", "Gemm", "MatMulInteger")]
    linear = ({codes.get(name, name) for name in operands} | blocks.keys()) - set(except_linear)
    types: dict[str, str] = {}
    n_weights = n_linear = bits = linear_bits = 0
    for name, tensor in tensors.items():
        kind = _TYPE_NAMES.get(tensor.data_type)
        if kind is None or not tensor.dims or _is_overhead(name, tensors):
            continue
        own_bits = _bits(tensor) + sum(_bits(tensors[name + s]) for s in _OVERHEADS if name + s in tensors)
        count = int(np.prod(tensor.dims))
        if block := blocks.get(name):
            width = 8 if name + LOW in tensors else block["bits"]
            count, kind = block["N"] * block["K"], f"INT{width}_G{block['block_size']}"
        types[name] = kind
        n_weights, bits = n_weights + count, bits + own_bits
        if name in linear:
            n_linear, linear_bits = n_linear + count, linear_bits + own_bits
    if not n_weights:
        raise SlimpiError(f"{path} has no weights. Name an exported classifier.")
    return OnnxSummary(types, n_weights, n_linear, bits / n_weights, linear_bits / n_linear if n_linear else 0.0)


_OVERHEADS = (SCALE, LOW, LOW + ZERO_POINT, ZERO_POINT, DIVISOR, KEPT_ROWS, KEPT_INDEX)
_TYPE_NAMES = {TensorProto.FLOAT: "FP32", TensorProto.UINT8: "U8", TensorProto.INT8: "S8"}


def _is_overhead(name: str, tensors: dict[str, TensorProto]) -> bool:
    return any(name.endswith(s) and name.removesuffix(s) in tensors for s in _OVERHEADS)


def _bits(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims)) * numpy_helper.to_array(tensor).dtype.itemsize * 8


def _load(path: Path) -> onnx.ModelProto:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise SlimpiError(f"{path} is not an ONNX file ({error}). Export the encoder again.") from error
    if not model.graph.node:
        raise SlimpiError(f"{path} is not an ONNX file: it has no graph. Export the encoder again.")
    if any(tensor.external_data for tensor in model.graph.initializer):
        raise SlimpiError(f"{path} keeps weights in other files. Save it as one file.")
    return model


# Export.


def exported(model: Any, task: str = "text-classification", remedy: str = "Use another encoder.") -> onnx.ModelProto:
    """A transformers model as optimum exports it for a task ("feature-extraction" of a body,
    "text-generation-with-past" with a cache), weights under their own names. A classifier's last layer is computed for
    the token that its head reads. SlimpiError if optimum cannot."""
    from optimum.exporters.onnx import onnx_export_from_model

    with tempfile.TemporaryDirectory(prefix="slimpi-onnx-") as scratch, to_stderr(), quiet_transformers():
        config = model.config
        config._name_or_path = scratch  # optimum copies what it finds at that path; there is nothing
        try:
            onnx_export_from_model(
                model,
                Path(scratch),
                task=task,
                opset=OPSET,
                do_validation=False,
                custom_onnx_configs=onnx_xlnet.export_configs(config, task) if config.model_type == "xlnet" else None,
            )
        except (ValueError, KeyError, NotImplementedError) as error:
            raise SlimpiError(f"optimum cannot export a {config.model_type} for {task}: {error}. {remedy}") from error
        found = onnx.load(Path(scratch) / "model.onnx")
    onnx_xlnet.plain_products(found.graph)
    fix_sizes(found, (dims_of if task in ENCODER_TASKS else symbolic_dims_of)(found))
    if task == "text-classification":
        keep_one_token(found)
    name_weights(found, model.state_dict())
    return found


@contextlib.contextmanager
def to_stderr() -> Any:
    """Exporters print and warn of things that `_compare` checks; stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def name_weights(model: onnx.ModelProto, parameters: dict[str, Any]) -> None:
    """Give transposed weights, which exporters number (`onnx::MatMul_746`), their parameter's name back."""
    names = {p.numpy().T.tobytes(): name for name, p in parameters.items() if p.ndim == 2}
    renamed = {}
    for tensor in model.graph.initializer:
        if tensor.name not in parameters and len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT:
            name = names.pop(numpy_helper.to_array(tensor).tobytes(), None)
            if name:
                renamed[tensor.name] = tensor.name = name
    rename_inputs(model.graph, renamed)


def _compare(data: bytes, encoder: Encoder, max_tokens: int) -> None:
    """Run the export on random tokens, one text alone and a padded batch, against the model."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(data, one_thread(), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    rng = np.random.default_rng(0)
    for batch, length in ((1, max_tokens), (3, max(3, max_tokens // 2))):
        mask = (np.arange(length) < np.linspace(length, 2, batch)[:, None]).astype(np.int64)
        mask = mask[:, ::-1].copy() if encoder.tokenizer.padding_side == "left" else mask
        ids = rng.integers(0, encoder.model.config.vocab_size, (batch, length))
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        feed = {name: feed[name] for name in names}
        with torch.inference_mode():
            expected = encoder.model(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits.numpy()
        worst = float(np.abs(session.run(["logits"], feed)[0] - expected).max())
        if not worst <= EXPORT_TOLERANCE * max(1.0, float(np.abs(expected).max())):
            kind = encoder.model.config.model_type
            raise SlimpiError(f"the ONNX export of this {kind} is off by {worst:.3g}. Use another encoder.")


def one_thread() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def bare_tokenizer(tokenizer: Any) -> bytes:
    """tokenizer.json without truncation or padding, but for its side and token where that is the left: the device cuts
    at max_tokens and pads to its batch."""
    import tokenizers

    bare = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare.no_padding()
    bare.no_truncation()
    if tokenizer.padding_side == "left":
        bare.enable_padding(
            direction="left",
            pad_id=tokenizer.pad_token_id,
            pad_token=tokenizer.pad_token,
            pad_type_id=tokenizer.pad_token_type_id,
        )
    return str(bare.to_str(pretty=True)).encode()
