"""Mixed bits for classifiers: a chromosome of bits, one gene a matrix, found by a genetic algorithm.

As in the disaster-tweets report: uniform quantization, bits 1...8 or 32 (left as it is) for each matrix, fitness =
validation loss + bits / 32 + a penalty for accuracy below a floor (plan_search.penalized_fitness). The graph is that of
`INT8-dynamic` with fewer levels in its codes, so that candidates are measured as they would be shipped; on disk a code
takes a byte however few bits it needs, which is why there are two sizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from device.records import SlimpiError, write_atomic
from pipeline.export.onnx_lossless import log_softmax
from pipeline.export.onnx_observe import Calibration, in_batches, logits_of
from pipeline.export.onnx_rewrite import Float32, Rewriter, UInt8, quantize_u8
from pipeline.plan_search import GeneticSettings, Space, genetic, penalized_fitness
from pipeline.progress import Tick, quiet
from pipeline.store import digest

FULL = 32
LEVELS = (1, 2, 3, 4, 6, 8, FULL)

Bits = Mapping[str, int]


@dataclass(frozen=True)
class MixedBits:
    """The best chromosome {matrix: bits}, its fitness, and what it takes: theoretically (codes at their bits, the rest
    as stored) and on disk."""

    bits: dict[str, int]
    fitness: float
    history: list[float]
    n_evaluated: int
    mean_bits: float
    theoretical_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class Validation:
    """Texts with their labels, in the order of `texts`."""

    texts: Calibration
    targets: npt.NDArray[np.int64]

    def score(self, model: onnx.ModelProto) -> tuple[float, float]:
        """(mean cross-entropy in nats, accuracy)."""
        logits = logits_of(model, self.texts)
        targets = self.targets[in_batches(self.texts)]
        loss = -log_softmax(logits)[np.arange(len(targets)), targets].mean()
        return float(loss), float((logits.argmax(axis=1) == targets).mean())


def matrices(model: onnx.ModelProto) -> dict[str, int]:
    """{name: weights} of what has a gene: the constant matrices of products and lookups."""
    rewriter = _MixedBits(_copy(model).graph, {})
    rewriter.run()
    return rewriter.met


def with_bits(model: onnx.ModelProto, bits: Bits) -> onnx.ModelProto:
    """A copy of the fp32 `model` with its matrices in `bits`; what is not named stays fp32."""
    quantized = _copy(model)
    rewriter = _MixedBits(quantized.graph, bits)
    rewriter.run()
    if unknown := set(bits) - rewriter.met.keys():
        raise SlimpiError(f"`{min(unknown)}` is no matrix of this encoder. Name those of `matrices`.")
    onnx.checker.check_model(quantized)
    return quantized


def search(
    model: onnx.ModelProto,
    validation: Validation,
    settings: GeneticSettings,
    *,
    seed: int,
    state: Path,
    accuracy_floor: float,
    levels: Sequence[int] = LEVELS,
    tick: Tick = quiet,
) -> MixedBits:
    """The chromosome of least fitness; `state` keeps every candidate measured, so that a search that was ended goes on
    to the very answer it would have had. SlimpiError if `state` is another search's."""
    counts = matrices(model)
    space = Space({name: {f"{b:02d}": n * b for b in levels} for name, n in counts.items()})
    weights = hashlib.sha256(model.SerializeToString()).hexdigest()
    key = digest([weights, validation.texts.sha256(), validation.targets.tolist(), accuracy_floor, list(levels), seed])
    known = _load(state, key)

    def fitness(formats: Mapping[str, str]) -> float:
        bits = {name: int(kind) for name, kind in formats.items()}
        genome = ",".join(formats.values())
        if genome not in known:
            loss, accuracy = validation.score(with_bits(model, bits))
            known[genome] = penalized_fitness(
                loss, mean_bits(counts, bits), accuracy, max_bits=FULL, accuracy_floor=accuracy_floor
            )
            write_atomic(state, json.dumps({"search": key, "known": known}).encode())
        tick(len(known), settings.population * settings.generations, f"candidates, best {min(known.values()):.4f}")
        return known[genome]

    start = [dict.fromkeys(counts, f"{b:02d}") for b in (8, 4) if b in levels]
    found = genetic(space, fitness, settings, seed, start)
    bits = {name: int(kind) for name, kind in found.formats.items()}
    stored = len(with_bits(model, bits).SerializeToString())
    spared = sum(n * (8 - bits[name]) for name, n in counts.items() if bits[name] < 8) // 8
    return MixedBits(bits, found.fitness, found.history, len(known), mean_bits(counts, bits), stored - spared, stored)


def mean_bits(counts: Mapping[str, int], bits: Bits) -> float:
    """Bits a weight of the matrices, codes alone."""
    return sum(n * bits.get(name, FULL) for name, n in counts.items()) / sum(counts.values())


def quantize_bits(weight: Float32, axis: int, bits: int) -> tuple[UInt8, Float32, UInt8]:
    """As `quantize_u8` with 2^bits levels; one bit is a sign times the mean |w| (Rastegari et al. 2016, eq. 6)."""
    if bits > 1:
        return quantize_u8(weight, axis, bits)
    scale = np.abs(weight).mean(axis=1 - axis, keepdims=True).astype(np.float32)
    scale[scale == 0] = 1.0
    return np.where(weight < 0, 0, 2).astype(np.uint8), scale, np.ones_like(scale, np.uint8)


class _MixedBits(Rewriter):
    def __init__(self, graph: onnx.GraphProto, bits: Bits) -> None:
        super().__init__(graph)
        self.bits = bits
        self.met: dict[str, int] = {}

    def product(self, node: onnx.NodeProto) -> None:
        if self.quantizes(node.input[1]):
            super().product(node)
        else:
            self.nodes.append(node)

    def lookup(self, node: onnx.NodeProto) -> None:
        if self.quantizes(node.input[0]):
            super().lookup(node)
        else:
            self.nodes.append(node)

    def quantizes(self, name: str) -> bool:
        self.met[name] = int(np.prod(self.weights[name].dims)) if name not in self.met else self.met[name]
        return self.bits.get(name, FULL) != FULL

    def codes(self, name: str, weight: Float32, axis: int) -> tuple[UInt8, Float32, UInt8]:
        return quantize_bits(weight, axis, self.bits[name])


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def _load(path: Path, key: str) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
        search_of, known = found["search"], {str(k): float(v) for k, v in found["known"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SlimpiError(f"{path} is not a search's state: {error}. Remove it to start anew.") from error
    if search_of != key:
        raise SlimpiError(f"{path} is the state of another search (model, rows, levels or seed). Remove it.")
    return known
