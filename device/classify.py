"""`python -m device.classify`: texts in, labels out, for as long as texts come. No port, nothing kept.

stdin: a schema.Stream, then a words.Text, one JSON line each. stdout: a schema.Ready when every file's hash was checked
and the model is loaded, then a schema.Prediction a text, in order, each written at once. Texts are classified one by
one, as the tweets task times them: dynamic quantization would make a batch give other logits. It ends with its input.
Exit code 0, or 1 after one line on stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from device.agent import verify
from device.classifier import OnnxClassifier
from device.records import Record, SlimpiError, decode, encode_line
from device.runtimes import Logits
from device.schema import Prediction, Ready, Stream
from device.tasks import check_classifier
from device.words import Text
from device.worker import claim_stdout, die_first

EXIT_INTERRUPTED = 130


def run(lines: BinaryIO) -> Iterator[Record]:
    """What is said to these lines. SlimpiError if a line is not what it should be, or the artifact is damaged."""
    stream = decode(lines.readline(), Stream, "the request on stdin")
    check_classifier(stream.artifact)
    folder = Path(stream.artifact_dir)
    for file in stream.artifact.files:
        verify(folder, file)
    os.environ["RAYON_NUM_THREADS"] = str(stream.threads)  # read when the tokenizers' pool starts
    with OnnxClassifier(folder, stream.artifact, stream.threads) as model:
        labels = stream.artifact.labels or [str(i) for i in range(model.n_labels)]
        yield Ready(labels=labels)
        for index, line in enumerate(lines):
            text = decode(line, Text, f"text {index}")
            yield predict(index, *model.judge(text), labels)


def predict(index: int, logits: Logits, distance: float | None, labels: list[str]) -> Prediction:
    """logits (n_labels,)."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    shares = (weights / weights.sum()).tolist()
    return Prediction(
        index=index,
        label=labels[int(logits.argmax())],
        probabilities=dict(zip(labels, shares, strict=True)),
        distance=distance,
    )


def main() -> int:
    die_first()
    out = claim_stdout()
    try:
        for said in run(sys.stdin.buffer):
            out.write(encode_line(said))
            out.flush()
    except SlimpiError as error:
        sys.stderr.write(f"slimpi classify: {' '.join(str(error).split())}\n")
        return 1
    except BrokenPipeError:  # whoever listened is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # or Python complains again when it flushes at exit
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
