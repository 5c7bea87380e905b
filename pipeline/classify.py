"""Classify texts on a device as they come: the model is loaded once there, each text is answered at once.

The other end is device/classify.py, a child process here or over ssh. It listens to its standard input alone, opens no
port and ends with the link.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from device.records import SlimpiError, decode, encode_line, write_remedy
from device.schema import Artifact, Prediction, Ready, Stream
from device.words import Text
from pipeline import board, deploy, fit, remote, transport
from pipeline.hosts import LOCAL, Host
from pipeline.progress import Progressor
from pipeline.remote import Device
from pipeline.store import Places, load_artifact

PROGRAM = "device.classify"
MAX_LINE_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16
_FEED_PATIENCE_S = 5.0


def classify(
    host: Host,
    folder: Path,
    texts: Iterable[Text],
    places: Places,
    *,
    threads: int = 0,
    force: bool = False,
    progress: Progressor | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[Prediction]:
    """Classify texts with the artifact in `folder` on `host`: one Prediction a text, in their order, as they come.

    `texts` is read in a thread, once the model is loaded there, and no further ahead than a pipe holds. threads 0 =
    half of this machine's cores, all of a board's. force: do not ask whether it fits the device's memory. Closing the
    iterator ends the program on the device. SlimpiError if the artifact is no classifier, the device cannot be reached,
    lacks the memory or is measuring, or a link breaks; errors of `texts`
    come after the predictions of what was read before.
    """
    artifact = load_artifact(folder)
    if (artifact.kind, artifact.task) != ("onnx", "classifier"):
        raise SlimpiError(f"{artifact.name} is a {artifact.kind} {artifact.task}, not a classifier. Choose another.")
    if host.is_local:
        asked = threads or max(1, (os.cpu_count() or 1) // 2)
        stream = Stream(artifact=artifact, artifact_dir=str(folder.resolve()), threads=asked)
        return _answers(LOCAL, [sys.executable, "-m", PROGRAM], stream, texts, cancel)
    return _classify_there(
        host, folder, artifact, texts, places, threads, force, progress or Progressor(), cancel or threading.Event()
    )


def _classify_there(
    host: Host,
    folder: Path,
    artifact: Artifact,
    texts: Iterable[Text],
    places: Places,
    threads: int,
    force: bool,
    progress: Progressor,
    cancel: threading.Event,
) -> Iterator[Prediction]:
    """The artifact is sent if the device lacks it; a file damaged there is sent again, once."""
    with remote.attach(host, progress, cancel) as device:
        wheels, unpacked_bytes = board.wheels(device, places)
        goods = [*wheels, *(remote.goods_of(folder / f.path, f, "artifact") for f in artifact.files)]
        seen = remote.status(device, goods)
        deploy.refuse_if_busy(device, seen, set())
        needed = fit.classifier_footprint(artifact, "classify", n_texts=1)
        if not force:
            fit.check(host.name, artifact, [needed], seen.mem_available_bytes)
        remote.supply(device, goods, seen, unpacked_bytes)
        site = board.site(device, wheels, unpacked_bytes)
        asked = threads or (1 if host.emulated else device.contact.cores)
        for attempt in (1, 2):
            there = remote.place(device, f"artifacts/{artifact.id}", artifact.files)
            stream = Stream(artifact=artifact, artifact_dir=there, threads=asked)
            try:
                yield from _answers(device.host, _argv(device, site), stream, texts, cancel)
                return
            except NotReadyError as error:
                if attempt == 2 or not remote.replace_damaged(device, artifact.name, goods, str(error)):
                    raise


def _argv(device: Device, site: list[str]) -> list[str]:
    """Python there with nothing importable but what was sent."""
    paths = os.pathsep.join([device.code_path, *site])
    safe = [f"PYTHONPATH={paths}", "PYTHONSAFEPATH=1", "PYTHONNOUSERSITE=1"]
    return ["env", *safe, device.host.python, "-m", PROGRAM]


class NotReadyError(SlimpiError):
    """The program ended before it had read a text."""


def _answers(
    host: Host, argv: list[str], stream: Stream, texts: Iterable[Text], cancel: threading.Event | None
) -> Iterator[Prediction]:
    reader, writer = os.pipe()
    feed = _Feed(writer, stream, texts)
    feed.start()
    try:
        with os.fdopen(reader, "rb") as source, closing(transport.stream(host, argv, source, cancel)) as lines:
            n_said, code, errors = yield from _decoded(host, lines, feed)
    finally:
        was_ready = feed.abandon()
    last = remote.printable(errors.splitlines()[-1]) if errors else f"exit code {code}"
    if not was_ready:
        said = last.removeprefix("slimpi classify: ")
        raise NotReadyError(f"{host.name}: {said}")
    if code == transport.LINK_FAILED and not host.is_local:
        raise SlimpiError(f"the link to {host.name} broke after {n_said} texts: {last} Run it again with the rest.")
    if code:
        raise SlimpiError(f"{host.name} stopped after {n_said} texts: {last.removeprefix('slimpi classify: ')}")
    feed.finish()


def _decoded(host: Host, lines: transport.Lines, feed: _Feed) -> Generator[Prediction, None, tuple[int, int, str]]:
    """Predictions from lines, in their order; then how many there were, the exit code and the end of stderr."""
    n_said = 0
    while True:
        try:
            line = next(lines)
        except StopIteration as end:
            return (n_said, *end.value)
        if not line.endswith(b"\n"):
            continue  # cut off with the link
        if not feed.ready.is_set():
            decode(line, Ready, f"what {host.name} says")
            feed.ready.set()
            continue
        said = decode(line, Prediction, f"what {host.name} says of text {n_said}")
        if said.index != n_said:
            raise SlimpiError(f"{host.name} answers text {said.index}, expected {n_said}. Run it again.")
        n_said += 1
        yield said


class _Feed(threading.Thread):
    """Writes the request, waits until the model is loaded, then writes each text as it comes. A daemon: it may wait
    for input that never comes when the program ends."""

    def __init__(self, writer: int, stream: Stream, texts: Iterable[Text]) -> None:
        super().__init__(daemon=True)
        self.ready = threading.Event()
        self._out, self._stream, self._texts = os.fdopen(writer, "wb", buffering=0), stream, texts
        self._problem: SlimpiError | None = None
        self._complete = self._abandoned = False

    def run(self) -> None:
        try:
            with self._out:
                _write_all(self._out.fileno(), encode_line(self._stream))
                self.ready.wait()
                for text in () if self._abandoned else self._texts:
                    _write_all(self._out.fileno(), msgspec.json.encode(text) + b"\n")
            self._complete = True
        except BrokenPipeError:  # the program is gone; its exit code says why
            return
        except SlimpiError as error:
            self._problem = error

    def abandon(self) -> bool:
        """Call when the program has ended: if it never was ready, no text is taken. Whether it was."""
        was_ready = self.ready.is_set()
        self._abandoned = not was_ready
        self.ready.set()
        return was_ready

    def finish(self) -> None:
        """Call when the program ended well, which it does when its input ends: raises what ended the texts early."""
        self.join(_FEED_PATIENCE_S)
        if self._problem:
            raise self._problem
        if not self._complete:
            raise RuntimeError("the texts ended early, see the traceback above")


def classify_stdin(host: Host, folder: Path, places: Places, threads: int, force: bool, progress: Progressor) -> None:
    """From standard input to standard output, line by line, until it ends. SlimpiError after Ctrl-C, too.

    BrokenPipeError if nobody reads the output any more.
    """
    n_said = 0
    try:
        texts = read_texts(0)
        answers = classify(host, folder, texts, places, threads=threads, force=force, progress=progress)
        with closing(answers) as said:  # type: ignore[type-var]
            for prediction in said:
                n_said += 1  # before it is written: who has read the line may interrupt at once
                _write_all(1, encode_line(prediction))
    except transport.Interrupted as error:
        raise SlimpiError(f"interrupted; {n_said} texts were classified.") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SlimpiError(f"cannot write to standard output: {error.strerror}. {write_remedy(error)}") from error


def _write_all(descriptor: int, data: bytes) -> None:
    """Unbuffered: what a closed pipe refused must not be tried again at exit."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read_texts(descriptor: int) -> Iterator[Text]:
    """One text a line, as lines come. Read with read(2): a thread that waits in Python's own buffer blocks its exit."""
    pending = b""
    number = 0
    while chunk := _read(descriptor):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            number += 1
            yield parse_line(number, line)
        if len(pending) > MAX_LINE_BYTES:
            raise SlimpiError(f"line {number + 1} has over {MAX_LINE_BYTES} bytes. Send one text a line.")
    if pending:
        yield parse_line(number + 1, pending)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _CHUNK_BYTES)
    except OSError as error:
        raise SlimpiError(f"cannot read the texts: {error.strerror}. Give them on standard input.") from error


class _Row(msgspec.Struct, frozen=True):
    """A text in JSON; other fields are left alone."""

    text: str
    keyword: str | None = None


def parse_line(number: int, line: bytes) -> Text:
    """A JSON object with `text` and perhaps `keyword`; anything that is no JSON object is the text itself, an empty
    line an empty text. SlimpiError if it is not UTF-8, or an object of another shape."""
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    line = line.removesuffix(b"\r")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SlimpiError(f"line {number} is not UTF-8: {error.reason}. Convert the input first (iconv).") from error
    if not text.lstrip().startswith("{"):
        return Text(text)
    try:
        row = msgspec.json.decode(line, type=_Row)
    except msgspec.ValidationError as error:
        raise SlimpiError(
            f'line {number} is a JSON object but not {{"text": "...", "keyword": "..."}}: {error}. Mend the line.'
        ) from error
    except msgspec.DecodeError:  # a tweet that begins with a brace
        return Text(text)
    return Text(row.text, row.keyword or "")
