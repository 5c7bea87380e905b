"""A checkpoint: config, vocabulary and tensors under their Hugging Face names, read only when asked for.

`load` takes a Hugging Face folder (safetensors) or a GGUF file (dequantized tensor by tensor); `save` writes a
folder that transformers loads. No file is mapped: memory holds what was asked for and nothing else.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from device.records import SlimpiError, sha256_file
from pipeline.architectures import (
    ARCHITECTURES,
    ROPE_FACTORS,
    Architecture,
    Config,
    architecture,
    gguf_names,
    model_type_of,
    norm_offset,
    row_order,
    tensor_shapes,
)
from pipeline.gguf_file import GgufFile, GgufTensor, add_keys, is_gguf, read_gguf
from pipeline.gguf_keys import check_config, config_from_keys
from pipeline.safetensors_file import StoredTensor, read_safetensors, write_safetensors
from pipeline.vocab import Vocabulary
from pipeline.vocab_folder import read_vocabulary

CHUNK_BYTES = 32 << 20
"""Tensors are streamed in row chunks of about this size."""

SHARD_BYTES = 4 << 30
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_VOCABULARY_FILE = "vocabulary.gguf"
_TOKENIZER_HASH = "slimpi.tokenizer_json_sha256"


@dataclass(frozen=True)
class Tensor:
    """A tensor that is read on demand. `read_rows(start, stop)` gives rows of the first dimension as `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], torch.Tensor] = field(repr=False)

    def read(self) -> torch.Tensor:
        return self.read_rows(0, self.shape[0])

    def chunks(self) -> Iterator[torch.Tensor]:
        """The tensor in row chunks of about CHUNK_BYTES."""
        step = max(1, CHUNK_BYTES // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            yield self.read_rows(start, min(start + step, self.shape[0]))

    def reordered(self, name: str, order: np.ndarray) -> Tensor:
        """This tensor with its rows in another order: new[i] = old[order[i]]."""

        def read_rows(start: int, stop: int) -> torch.Tensor:
            wanted = order[start:stop]
            first = int(wanted.min())
            return self.read_rows(first, int(wanted.max()) + 1)[torch.from_numpy(wanted - first)]

        return Tensor(name, self.shape, self.dtype, read_rows)

    def shifted(self, name: str, by: float) -> Tensor:
        """This tensor plus a constant, in float32."""
        return Tensor(name, self.shape, torch.float32, lambda start, stop: self.read_rows(start, stop).float() + by)

    def renamed(self, name: str) -> Tensor:
        return Tensor(name, self.shape, self.dtype, self.read_rows)


def held(name: str, tensor: torch.Tensor) -> Tensor:
    """A tensor that is already in memory."""
    return Tensor(name, tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop])


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model. `architecture` is config.json's model_type. Tied embeddings list no lm_head."""

    architecture: str
    config: Config
    tensors: dict[str, Tensor]
    vocab: Vocabulary
    origin: str
    notes: list[str] = field(default_factory=list)


def load(path: Path) -> Checkpoint:
    """Open a Hugging Face folder or a GGUF file. Reads headers only.

    SlimpiError on damaged or missing files, an unsupported architecture, a config that llama.cpp would run
    differently, and tensors that are missing, unknown or of another shape than the config says.
    """
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise SlimpiError(f"{path} is neither a folder nor a file. Check the path.")
    if not is_gguf(path):
        raise SlimpiError(f"{path} is not a checkpoint: give a Hugging Face folder or a .gguf file.")
    return _load_gguf(path)


def _load_folder(folder: Path) -> Checkpoint:
    raw = _read_json(folder / "config.json")
    model_type, config = _text_config(raw)
    arch = architecture(model_type)
    if "quantization_config" in raw:
        raise SlimpiError(f"{folder} is already quantized (config.json's quantization_config). Use its original.")
    config = _complete(model_type, config)
    check_config(model_type, config)
    stored, notes = _known_tensors(arch, config, _stored_tensors(folder))
    tensors = {}
    for name, shape in tensor_shapes(model_type, config).items():
        tensor = _expected(folder, stored, name, shape)
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise SlimpiError(f"{folder}: {name} is {tensor.dtype}; weights must be float32, float16 or bfloat16.")
        tensors[name] = Tensor(name, shape, tensor.dtype, tensor.read_rows)
    _refuse_unknown(folder, set(stored) - set(tensors))
    vocab, more = _folder_vocabulary(folder, config)
    return Checkpoint(model_type, config, tensors, vocab, str(folder), notes + more)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SlimpiError(f"cannot read {path}: {error.strerror}. A checkpoint folder needs it.") from error
    except ValueError as error:
        raise SlimpiError(f"{path} is not valid JSON ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise SlimpiError(f"{path} does not hold a JSON object. Fetch it again.")
    return content


def _text_config(raw: Config) -> tuple[str, Config]:
    """The language model's part of a config.json; a multimodal gemma3 holds a gemma3_text."""
    if raw.get("model_type") != "gemma3":
        return str(raw.get("model_type", "none")), raw
    tied = raw.get("tie_word_embeddings", True)
    return "gemma3_text", {"tie_word_embeddings": tied, **raw.get("text_config", {}), "model_type": "gemma3_text"}


def _complete(model_type: str, config: Config) -> Config:
    """config.json with transformers' own defaults filled in, and transformers 5's rope_parameters in 4's terms."""
    from transformers import AutoConfig

    config = dict(config)
    rope = config.pop("rope_parameters", None)
    if isinstance(rope, dict) and rope:
        whole = rope.get("full_attention", rope)
        config.setdefault("rope_theta", whole.get("rope_theta"))
        config.setdefault("rope_scaling", None if whole.get("rope_type") == "default" else whole)
        if "sliding_attention" in rope:
            config.setdefault("rope_local_base_freq", rope["sliding_attention"].get("rope_theta"))
    arch = ARCHITECTURES[model_type]
    ours = {key: config[key] for key in (*arch.per_layer, *arch.optional_tensors) if key in config}
    apart = ("model_type", "transformers_version", *arch.per_layer)
    known = {key: value for key, value in config.items() if key not in apart}
    try:
        full = AutoConfig.for_model(arch.defaults_of or model_type, **known).to_dict()
        if config.get("head_dim") is None and arch.per_layer:
            raise SlimpiError(f"the config.json of this {model_type} lacks head_dim. Give the size of a head.")
        if full.get("head_dim") is None:
            full["head_dim"] = full["hidden_size"] // full["num_attention_heads"]
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise SlimpiError(f"the config.json of this {model_type} is not valid: {error}.") from error
    full = {key: value for key, value in full.items() if not key.startswith("_") and key not in arch.per_layer}
    flags = dict.fromkeys(arch.optional_tensors, False)
    return {**flags, **full, **ours, "model_type": model_type, "architectures": [arch.hf_class]}


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder's safetensors files; its index decides which files where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise SlimpiError(f"{folder} lacks the shard {name} that its index names. Fetch it again.")
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
    if not names:
        raise SlimpiError(f"{folder} holds no .safetensors file. Pickled weights are never loaded: convert them first.")
    found: dict[str, StoredTensor] = {}
    for name in names:
        shard = read_safetensors(folder / name)
        if twice := set(found) & set(shard):
            raise SlimpiError(f"{folder}: tensor {min(twice)} is in two files. Keep one.")
        found |= shard
    return found


def _known_tensors(
    arch: Architecture, config: Config, stored: dict[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors under the text model's names, without the ignored ones; notes say what was left out."""
    kept, ignored = {}, Counter[str]()
    for name, tensor in stored.items():
        pattern = next((p for p in arch.ignored if fnmatch.fnmatchcase(name, p)), None)
        if pattern is not None:
            ignored[pattern] += 1
            continue
        for old, new in arch.renamed:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        kept[name] = tensor
    notes = [f"{count} tensors left out: {pattern}" for pattern, count in ignored.items()]
    if config["tie_word_embeddings"] and kept.pop("lm_head.weight", None):
        notes.append("lm_head.weight left out: config.json ties it to the embeddings")
    return kept, notes


def _expected(origin: Path, stored: dict[str, Any], name: str, shape: tuple[int, ...], label: str = "") -> Any:
    tensor = stored.get(name)
    if tensor is None:
        raise SlimpiError(f"{origin} lacks the tensor {label or name}. Its config or its files are incomplete.")
    if tuple(tensor.shape) != shape:
        raise SlimpiError(f"{origin}: {label or name} is {list(tensor.shape)}, its config says {list(shape)}.")
    return tensor


def _refuse_unknown(origin: Path, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
        raise SlimpiError(f"{origin} has {len(names)} tensors that its architecture does not know: {shown}.")


def _folder_vocabulary(folder: Path, config: Config) -> tuple[Vocabulary, list[str]]:
    """The exact vocabulary if slimpi saved this folder, what Hugging Face's files say otherwise."""
    saved = folder / _VOCABULARY_FILE
    if not saved.is_file():
        return read_vocabulary(folder, config)
    keys = dict(read_gguf(saved).keys)
    if keys.pop(_TOKENIZER_HASH, "") != sha256_file(folder / "tokenizer.json"):
        raise SlimpiError(f"{folder}/tokenizer.json changed since it was saved. To use it delete {_VOCABULARY_FILE}.")
    return Vocabulary({key: value for key, value in keys.items() if key.startswith("tokenizer.")}), []


def _load_gguf(path: Path) -> Checkpoint:
    file = read_gguf(path)
    model_type = model_type_of(str(file.keys.get("general.architecture", "")))
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None:
        raise SlimpiError(f"{path} lacks the tensor token_embd.weight: a vocabulary or an adapter is not a model.")
    factors = file.tensors.get(ROPE_FACTORS)
    divisors = None if factors is None else _dequantized(factors, 0, 1).numpy()[0]
    config = config_from_keys(file.keys, file.tensors, embeddings.shape[0], divisors)
    check_config(model_type, config)
    shapes = tensor_shapes(model_type, config)
    names = gguf_names(model_type, list(shapes), config["num_hidden_layers"])
    tensors = {}
    for name, shape in shapes.items():
        stored = _expected(path, file.tensors, names[name], shape)
        tensors[name] = _as_hugging_face(model_type, config, name, stored)
    _refuse_unknown(path, set(file.tensors) - set(names.values()) - {ROPE_FACTORS})
    vocab = Vocabulary({key: value for key, value in file.keys.items() if key.startswith("tokenizer.")})
    if not isinstance(vocab.get("tokens"), list) or len(vocab.tokens) != embeddings.shape[0]:
        raise SlimpiError(f"{path}: its vocabulary does not fit its {embeddings.shape[0]} embeddings.")
    return Checkpoint(model_type, config, tensors, vocab, str(path), _quantization_note(file))


def _quantization_note(file: GgufFile) -> list[str]:
    """What the weights were before they were dequantized: the type most of them have."""
    sizes = Counter[str]()
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.type.name] += tensor.n_elements
    main = sizes.most_common(1)[0][0]
    return [] if main in ("F32", "F16", "BF16") else [f"dequantized from {main}"]


def _as_hugging_face(model_type: str, config: Config, name: str, stored: GgufTensor) -> Tensor:
    """A GGUF tensor under its Hugging Face name: rows back in their order, norms without their offset."""
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored.type.name, torch.float32)
    if len(stored.shape) == 1:
        tensor = Tensor(name, stored.shape, dtype, lambda start, stop: _dequantized(stored, 0, 1)[0, start:stop])
    else:
        tensor = Tensor(name, stored.shape, dtype, lambda start, stop: _dequantized(stored, start, stop))
    if (order := row_order(model_type, config, name)) is not None:
        return tensor.reordered(name, np.argsort(order))
    if offset := norm_offset(model_type, name):
        return tensor.shifted(name, -offset)
    return tensor


def _dequantized(stored: GgufTensor, start: int, stop: int) -> torch.Tensor:
    """Rows of a GGUF tensor: float16 and bfloat16 as stored, every other type as float32 by the gguf package."""
    rows = stored.read_rows(start, stop)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if stored.type.name in kinds:
        return torch.from_numpy(rows).view(kinds[stored.type.name])
    try:
        return torch.from_numpy(gguf.quants.dequantize(rows, stored.type))
    except NotImplementedError as error:
        raise SlimpiError(f"{stored.path}: {stored.name} has type {stored.type.name}, which cannot be read.") from error


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a Hugging Face folder: config, safetensors shards, tokenizer. Whole or not at all; never over another.

    vocabulary.gguf beside them keeps the exact GGUF vocabulary, which tokenizer.json alone cannot.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SlimpiError(f"{folder} already exists. Choose another place or remove it.")
    needed = sum(math.prod(t.shape) * t.dtype.itemsize for t in checkpoint.tensors.values()) + (64 << 20)
    require_space(folder, needed)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            partial = Path(scratch) / "content"
            partial.mkdir()
            _save_tensors(checkpoint, partial)
            _save_config(checkpoint, partial)
            _save_vocabulary(checkpoint.vocab, partial)
            partial.replace(folder)
    except OSError as error:
        raise SlimpiError(f"cannot write {folder}: {error.strerror}. Free some space or fix permissions.") from error


def require_space(target: Path, needed_bytes: int) -> None:
    """SlimpiError, with both figures, if the disk under `target` has less than `needed_bytes` left."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise SlimpiError(f"cannot write to {target.parent}: {error.strerror}.") from error
    if free < needed_bytes:
        raise SlimpiError(f"{target} needs {needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. Free some space.")


def _save_tensors(checkpoint: Checkpoint, folder: Path) -> None:
    shards: list[list[Tensor]] = [[]]
    filled = total = 0
    for tensor in checkpoint.tensors.values():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        total += size
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, [(t.name, t.shape, t.dtype, t.chunks()) for t in shard])
        weight_map |= {t.name: name for t in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _save_config(checkpoint: Checkpoint, folder: Path) -> None:
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values())
    config = {**checkpoint.config, "model_type": checkpoint.architecture, "dtype": dtypes.most_common(1)[0][0]}
    for name in ("bos", "eos", "pad"):
        config[f"{name}_token_id"] = checkpoint.vocab.get("padding_token_id" if name == "pad" else f"{name}_token_id")
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))


def _save_vocabulary(vocab: Vocabulary, folder: Path) -> None:
    text = vocab.to_tokenizers().to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(vocab.tokenizer_config(), indent=1))
    writer = gguf.GGUFWriter(None, "vocabulary")
    add_keys(writer, {_TOKENIZER_HASH: hashlib.sha256(text.encode()).hexdigest(), **vocab.keys})
    writer.write_header_to_file(path=folder / _VOCABULARY_FILE)
    writer.write_kv_data_to_file()
    writer.close()
