"""Which tensor gets which format: plans resolved to exact names, and the exact bytes of the file they make.

A plan is decided over tables (shapes, errors, sizes), without a model. Budgets become one number, the bytes that
the tensors to be chosen for may take; `pipeline.plan_milp` and `pipeline.plan_search` choose under it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import gguf

from device.records import SlimpiError
from device.schema import Fallback
from pipeline.export import llama_quantize
from pipeline.fit import largest_file_bytes
from pipeline.formats import FORMATS, Format
from pipeline.gguf_file import read_gguf

Sizes = dict[str, dict[str, int]]
"""Bytes of each tensor in each of its formats."""

EMBEDDINGS, OUTPUT = "token_embd.weight", "output.weight"
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT

# Matrices that llama.cpp keeps in float (llama-quant.cpp, tensor_allows_quantization): norms, and what routes experts.
KEPT = ("*_norm.weight", "*.ffn_gate_inp.weight")

# Where a row is no whole number of blocks: the next format to try (llama-quant.cpp, tensor_type_fallback).
NARROWER = {
    "IQ1_S": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_NL": "F16",
    "Q4_0": "F16",
    "Q4_1": "F16",
    "Q5_0": "F16",
    "Q5_1": "F16",
    "Q8_0": "F16",
}


@dataclass(frozen=True)
class Base:
    """The float GGUF that plans are for: row-major shape and format of every tensor, bytes before the first one.

    Whoever writes a file with other keys than the base's has other metadata: replace `metadata_bytes` then.
    """

    shapes: Mapping[str, tuple[int, ...]]
    formats: Mapping[str, str]
    metadata_bytes: int

    @property
    def matrices(self) -> list[str]:
        """Tensors that a plan decides about; the others keep their format."""
        return [name for name, shape in self.shapes.items() if _is_matrix(name, shape)]

    @property
    def linear(self) -> list[str]:
        """Matrices inside decoder blocks: what "linear layers" means in bits per weight."""
        return [name for name in self.matrices if name.startswith("blk.")]


@dataclass(frozen=True)
class Plan:
    """{exact tensor name: format name} of every tensor of a file, and what did not get the format it was meant to."""

    formats: Mapping[str, str]
    fallbacks: tuple[Fallback, ...] = ()


def read_base(path: Path) -> Base:
    """The base of a GGUF file; SlimpiError if it is none."""
    tensors = read_gguf(path).tensors
    if not tensors:
        raise SlimpiError(f"{path} has no tensors. Convert the model again.")
    return Base(
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        formats={name: tensor.type.name for name, tensor in tensors.items()},
        metadata_bytes=min(tensor.offset for tensor in tensors.values()),
    )


def resolve(base: Base, rules: Mapping[str, str]) -> Plan:
    """A plan from {pattern: format}; patterns are shell-style, and a later one overrides those before it.

    SlimpiError for an unknown format, a pattern that is no matrix's, a matrix that no pattern matches.
    """
    asked: dict[str, str] = {}
    for pattern, kind in rules.items():
        _format(pattern, kind)
        matched = [name for name in base.matrices if fnmatchcase(name, pattern)]
        if not matched:
            raise SlimpiError(f"`{pattern}` is the name of no matrix of this model. {_examples(base)}")
        asked |= dict.fromkeys(matched, kind)
    missing = [name for name in base.matrices if name not in asked]
    if missing:
        raise SlimpiError(f"no rule says which format {missing[0]} gets ({len(missing)} in all). Add a rule for `*`.")
    return explicit(base, asked)


def uniform(base: Base, kind: str, *, embeddings: str, output: str, overrides: Mapping[str, str] | None = None) -> Plan:
    """`kind` for the matrices of the blocks. Tied models have no output matrix: their embeddings get `output`."""
    rules = {"*": kind}
    if OUTPUT in base.shapes:
        rules |= {EMBEDDINGS: embeddings, OUTPUT: output}
    else:
        rules |= {EMBEDDINGS: output}
    return resolve(base, {**rules, **(overrides or {})})


def mix(path: Path, variant: str, imatrix: Path | None) -> Plan:
    """One of llama-quantize's own mixes (llama_quantize.VARIANTS) as a plan, fallbacks included, from its dry run
    on the float GGUF at `path`."""
    planned = llama_quantize.planned_types(path, variant, imatrix)
    return Plan(planned.types, tuple(planned.fallbacks))


def explicit(base: Base, asked: Mapping[str, str]) -> Plan:
    """A plan from exact names: matrices without one keep the base's format; formats that do not fit fall back.

    SlimpiError for unknown names and formats, and for tensors that are no matrices.
    """
    _check_names(base, asked)
    formats, fallbacks = dict(base.formats), []
    for name, kind in asked.items():
        formats[name], fallback = fitting(name, base.shapes[name][-1], kind)
        fallbacks += [fallback] if fallback else []
    return Plan(formats, tuple(fallbacks))


def fitting(name: str, columns: int, asked: str) -> tuple[str, Fallback | None]:
    """`asked`, or the first format of its chain in NARROWER whose blocks divide the columns, and the record of it."""
    got = asked
    while columns % _format(name, got).block_size:
        if got not in NARROWER:
            raise SlimpiError(f"{name} has {columns} columns: {asked} does not divide them and nothing replaces {got}.")
        got = NARROWER[got]
    if got == asked:
        return got, None
    reason = f"{columns} columns are not divisible by {_format(name, asked).block_size}"
    return got, Fallback(tensor=name, asked=asked, got=got, reason=reason)


def loadable(base: Base, plan: Plan) -> Plan:
    """The plan with formats that no runtime stores replaced by the GGUF format with codes nearest in bits per weight
    (the larger of two as near) whose blocks fit, each recorded as a fallback."""
    formats, fallbacks = dict(plan.formats), list(plan.fallbacks)
    for name, asked in plan.formats.items():
        kind = _format(name, asked)
        if kind.ggml_type is not None:
            continue
        fits = [f for f in FORMATS.values() if f.ggml_type and f.codes and base.shapes[name][-1] % f.block_size == 0]
        if not fits:
            raise SlimpiError(f"{name} has {base.shapes[name][-1]} columns, no GGUF format fits. Keep it in F16.")
        best = min(fits, key=lambda f: (abs(f.bits_per_weight - kind.bits_per_weight), -f.bits_per_weight))
        formats[name] = best.name
        fallbacks.append(Fallback(tensor=name, asked=asked, got=best.name, reason=f"no runtime stores {asked}"))
    return Plan(formats, tuple(fallbacks))


def tensor_bytes(name: str, shape: tuple[int, ...], kind: str, *, padded: bool = True) -> int:
    """Bytes of a tensor's blocks; with the padding up to the next tensor in the file if `padded`."""
    weights, found = math.prod(shape), _format(name, kind)
    if shape[-1] % found.block_size:
        raise SlimpiError(f"{name} has {shape[-1]} columns, which {kind}'s blocks of {found.block_size} do not divide.")
    exact = math.ceil(weights * found.bits_per_weight / 8 - 1e-6)
    return -(-exact // ALIGNMENT) * ALIGNMENT if padded else exact


def file_bytes(base: Base, plan: Plan) -> int:
    """Bytes of the whole file the plan makes: metadata, and every tensor padded."""
    _check_complete(base, plan)
    return base.metadata_bytes + sum(tensor_bytes(name, base.shapes[name], kind) for name, kind in plan.formats.items())


def linear_bits_per_weight(base: Base, plan: Plan) -> float:
    """Mean bits per weight over the linear layers, scales included."""
    _check_complete(base, plan)
    n_bytes = sum(tensor_bytes(name, base.shapes[name], plan.formats[name], padded=False) for name in base.linear)
    return 8 * n_bytes / _weights(base, base.linear)


def sizes(base: Base, choices: Mapping[str, Iterable[str]], *, padded: bool = True) -> Sizes:
    """Bytes of each tensor in each format it may get; padded for budgets over the file, not for bits per weight.

    SlimpiError for unknown names, and for a format whose blocks do not fit: leave it out of that tensor's choices.
    """
    _check_names(base, choices)
    return {
        name: {kind: tensor_bytes(name, base.shapes[name], kind, padded=padded) for kind in kinds}
        for name, kinds in choices.items()
    }


def choices(base: Base, tensors: Iterable[str], kinds: Iterable[str]) -> dict[str, list[str]]:
    """For each tensor those of the formats whose blocks fit its columns; SlimpiError where none does."""
    wanted = list(kinds)
    found = {}
    for name in tensors:
        found[name] = [k for k in wanted if base.shapes[name][-1] % _format(name, k).block_size == 0]
        if not found[name]:
            raise SlimpiError(f"{name} has {base.shapes[name][-1]} columns: none of {', '.join(wanted)} divides them.")
    return found


def bits_budget(base: Base, bits: float) -> int:
    """Bytes (not padded) for the linear layers at `bits` per weight."""
    return math.floor(bits * _weights(base, base.linear) / 8 + 1e-9)


def file_budget(base: Base, fixed: Plan, chosen: Iterable[str], limit_bytes: int) -> int:
    """Bytes (padded) left for the tensors `chosen` in a file of limit_bytes whose other tensors are as in `fixed`.

    SlimpiError if the others alone are larger.
    """
    others = Plan({name: kind for name, kind in fixed.formats.items() if name not in set(chosen)})
    taken = base.metadata_bytes + sum(tensor_bytes(n, base.shapes[n], kind) for n, kind in others.formats.items())
    if taken > limit_bytes:
        raise SlimpiError(
            f"{limit_bytes} bytes do not hold the metadata and the {len(others.formats)} tensors with a fixed format, "
            f"{taken} bytes. Allow more, or give the embeddings and the output a smaller format."
        )
    return limit_bytes - taken


def memory_limit(path: Path, n_ctx: int, available_bytes: int) -> int:
    """The largest file that decodes with a context of n_ctx tokens in available_bytes, by `pipeline.fit`'s model."""
    header = read_gguf(path)
    return largest_file_bytes(header.keys, header.tensors[EMBEDDINGS].shape[0], n_ctx, available_bytes)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    kept = any(fnmatchcase(name, pattern) for pattern in KEPT)
    return len(shape) > 1 and name.endswith(".weight") and not kept


def _weights(base: Base, names: Iterable[str]) -> int:
    return sum(math.prod(base.shapes[name]) for name in names)


def _format(name: str, kind: str) -> Format:
    if kind not in FORMATS:
        raise SlimpiError(f"{name} is to get the unknown format {kind!r}. Known: {', '.join(FORMATS)}.")
    return FORMATS[kind]


def _check_names(base: Base, names: Iterable[str]) -> None:
    matrices = set(base.matrices)
    for name in names:
        if name not in base.shapes:
            raise SlimpiError(f"{name} is no tensor of this model. {_examples(base)}")
        if name not in matrices:
            raise SlimpiError(f"{name} is no matrix: it stays {base.formats[name]}. Leave it out of the plan.")


def _check_complete(base: Base, plan: Plan) -> None:
    unlike = base.shapes.keys() ^ plan.formats.keys()
    if unlike:
        raise SlimpiError(f"the plan is for another model: {min(unlike)} is in one of them only. Plan for this model.")


def _examples(base: Base) -> str:
    return f"It has {', '.join(base.matrices[:3])} and {max(0, len(base.matrices) - 3)} more."
