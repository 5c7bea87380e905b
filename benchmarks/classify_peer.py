"""A peer's process: tokenize and classify texts one by one with ONNX Runtime alone, as its documentation shows.

`python benchmarks/classify_peer.py` reads one JSON object on stdin (class Asked) and writes one (class Timed). The
tokenizer is the one slimpi's artifact has, in the same library: what differs is the file, and padding if asked for.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import msgspec
import numpy as np


class Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    tokenizer: str
    texts: list[str]
    threads: int
    max_tokens: int
    pad_to: int = 0
    warmup: int = 8


class Timed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    samples_ns: list[int]
    cpu_ns: list[int]
    n_positions: int
    predicted: list[int]


def run(asked: Asked) -> Timed:
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = asked.threads, 1
    session = onnxruntime.InferenceSession(asked.model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    tokenizer = Tokenizer.from_file(asked.tokenizer)
    tokenizer.enable_truncation(asked.max_tokens)
    if asked.pad_to:
        pad_id = tokenizer.token_to_id("[PAD]")
        tokenizer.enable_padding(length=asked.pad_to, pad_id=pad_id, pad_token="[PAD]")
    else:
        tokenizer.no_padding()

    def classify(text: str) -> tuple[int, Any]:
        encoding = tokenizer.encode(text)
        columns = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
        }
        feeds = {name: np.array([columns[name]], dtype=np.int64) for name in names}
        return len(encoding.ids), session.run(["logits"], feeds)[0]

    for i in range(asked.warmup):
        classify(asked.texts[i % len(asked.texts)])
    samples_ns, cpu_ns, predicted, n_positions = [], [], [], 0
    for text in asked.texts:
        begin_ns, begin_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        n, logits = classify(text)
        cpu_ns.append(time.process_time_ns() - begin_cpu_ns)
        samples_ns.append(time.perf_counter_ns() - begin_ns)
        n_positions += n
        predicted.append(int(logits[0].argmax()))
    return Timed(samples_ns=samples_ns, cpu_ns=cpu_ns, n_positions=n_positions, predicted=predicted)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(run(msgspec.json.decode(sys.stdin.buffer.read(), type=Asked))))
