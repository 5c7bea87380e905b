"""slimpi classify: lines in, one JSON line each out, at once and in order; here and over a real ssh."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sshd
from fakes import TWEETS, artifact, write_classifier, write_llama, write_word_classifier
from hypothesis import given
from hypothesis import strategies as st
from jobs import REPO

from device import classify as device_classify
from device.classifier import OnnxClassifier
from device.records import SlimpiError, encode_line
from device.schema import Prediction, Ready, Stream
from device.words import Text
from pipeline import classify, transport
from pipeline.classify import parse_line, read_texts
from pipeline.hosts import LOCAL
from pipeline.progress import Progressor
from pipeline.store import Places, write_manifest

TEXTS = [Text(text) for text, _ in TWEETS]
SLIMPI = [sys.executable, "-m", "pipeline.cli"]
PATIENCE_S = 60.0


def make(places: Places, name: str = "fake-1", words: bool = False) -> Path:
    folder = places.artifacts / name
    folder.mkdir(parents=True)
    if words:
        write_word_classifier(folder)
    else:
        write_classifier(folder)
    write_manifest(folder, artifact(folder, "onnx", id=name, name=name))
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def folder(places: Places) -> Path:
    return make(places)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    with sshd.serve(tmp_path_factory.mktemp("ssh") / "server") as server:
        yield server


def expected(folder: Path, texts: list[Text]) -> list[Prediction]:
    made = artifact(folder, "onnx")
    with OnnxClassifier(folder, made, 1) as model:
        logits = np.concatenate([model.logits([text]) for text in texts]).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return [
        Prediction(
            index=i,
            label=made.labels[int(row.argmax())],
            probabilities=dict(zip(made.labels, row.tolist(), strict=True)),
        )
        for i, row in enumerate(shares)
    ]


def assert_same(got: list[Prediction], wanted: list[Prediction]) -> None:
    assert [(p.index, p.label) for p in got] == [(p.index, p.label) for p in wanted]
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.probabilities == pytest.approx(theirs.probabilities, rel=1e-6)


def quiet() -> Progressor:
    return Progressor(plain=True)


# The lines


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"fire!", Text("fire!")),
        (b"", Text("")),
        (b" two  words\r", Text(" two  words")),
        (b'{"text": "a", "keyword": "fire"}', Text("a", "fire")),
        (b' {"id": 7, "text": "\\u00e9", "keyword": null}', Text("\u00e9")),
        (b"{fire} is lit", Text("{fire} is lit")),
        (b'["text"]', Text('["text"]')),
        ("\u2028\U0001f525\x85\0".encode(), Text("\u2028\U0001f525\x85\0")),
    ],
)
def test_a_line_is_a_text_or_an_object(line: bytes, text: Text) -> None:
    assert parse_line(3, line) == text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"\xff", "line 3 is not UTF-8"),
        (b"{}", "line 3 is a JSON object but not"),
        (b'{"text": 1}', "line 3 is a JSON object but not"),
        (b'{"text": "a", "keyword": ["b"]}', "line 3 is a JSON object but not"),
    ],
)
def test_bad_lines_are_told_by_number(line: bytes, told: str) -> None:
    with pytest.raises(SlimpiError) as caught:
        parse_line(3, line)
    assert told in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_text() -> None:
    assert parse_line(1, b"\xef\xbb\xbfa") == Text("a")


@given(st.binary(max_size=200))
def test_any_bytes_give_texts_or_one_error(data: bytes) -> None:
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        try:
            found = list(read_texts(source.fileno()))
        except SlimpiError:
            return
    assert len(found) == len(data.split(b"\n")) - (not data or data.endswith(b"\n"))


def test_texts_are_read_as_they_come_however_they_are_cut() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as source:
        texts = read_texts(source.fileno())
        os.write(writer, b"first\nsec")
        assert next(texts) == Text("first")
        os.write(writer, b"ond\nlast")
        assert next(texts) == Text("second")
        os.close(writer)
        assert list(texts) == [Text("last")]


def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "MAX_LINE_BYTES", 100)
    reader, writer = os.pipe()
    os.write(writer, b"ok\n" + b"x" * 101)
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        texts = read_texts(source.fileno())
        assert next(texts) == Text("ok")
        with pytest.raises(SlimpiError, match="line 2 has over 100 bytes"):
            next(texts)


# The device's end


def talk(stream: Stream | bytes, *texts: bytes) -> list[Any]:
    head = encode_line(stream) if isinstance(stream, Stream) else stream
    return list(device_classify.run(io.BytesIO(head + b"".join(text + b"\n" for text in texts))))


def test_the_program_says_ready_then_answers(folder: Path) -> None:
    stream = Stream(artifact=artifact(folder, "onnx"), artifact_dir=str(folder), threads=1)
    ready, *said = talk(stream, b'{"text": "fire"}', b'{"text": "", "keyword": "x"}')
    assert ready == Ready(labels=["no", "yes"])
    assert_same(said, expected(folder, [Text("fire"), Text("")]))
    assert all(sum(p.probabilities.values()) == pytest.approx(1.0) for p in said)
    unnamed = artifact(folder, "onnx", labels=[])
    assert talk(Stream(artifact=unnamed, artifact_dir=str(folder), threads=1))[0] == Ready(labels=["0", "1"])


@pytest.mark.parametrize("line", [b"fire", b'{"keyword": "a"}', b"\xff"])
def test_the_program_takes_no_other_lines(folder: Path, line: bytes) -> None:
    stream = Stream(artifact=artifact(folder, "onnx"), artifact_dir=str(folder), threads=1)
    with pytest.raises(SlimpiError, match="text 0 is not a valid Text"):
        talk(stream, line)
    with pytest.raises(SlimpiError, match="the request on stdin is not a valid Stream"):
        talk(b"{}\n")


def test_probabilities_are_a_softmax_of_large_logits_too() -> None:
    said = device_classify.predict(0, np.array([1000.0, 1001.0], np.float32), None, ["a", "b"])
    assert said.label == "b"
    assert said.probabilities == pytest.approx({"a": 1 / (1 + np.e), "b": np.e / (1 + np.e)})


# Here


def test_all_texts_are_answered_in_order(folder: Path, places: Places) -> None:
    assert_same(list(classify.classify(LOCAL, folder, TEXTS * 3, places, threads=1)), expected(folder, TEXTS * 3))
    assert list(classify.classify(LOCAL, folder, [], places, threads=1)) == []


def test_keywords_reach_the_model(places: Places) -> None:
    folder = make(places, "words-1", words=True)
    texts = [Text("fire", keyword) for keyword in ("", "fire", "car crash")]
    got = list(classify.classify(LOCAL, folder, texts, places, threads=1))
    assert_same(got, expected(folder, texts))
    assert len({tuple(p.probabilities.values()) for p in got}) == 3


def test_an_endless_source_may_be_left(folder: Path, places: Places) -> None:
    said = classify.classify(LOCAL, folder, repeat(Text("fire")), places, threads=1)
    assert [p.index for p in islice(said, 5)] == [0, 1, 2, 3, 4]
    children = psutil.Process().children(recursive=True)
    said.close()  # type: ignore[attr-defined]
    assert children
    _, alive = psutil.wait_procs(children, PATIENCE_S)
    assert not alive


def test_an_error_of_the_texts_comes_after_what_was_read(folder: Path, places: Places) -> None:
    def texts() -> Iterator[Text]:
        yield from TEXTS
        raise SlimpiError("line 8 is bad")

    said = classify.classify(LOCAL, folder, texts(), places, threads=1)
    assert_same(list(islice(said, len(TEXTS))), expected(folder, TEXTS))
    with pytest.raises(SlimpiError, match="line 8 is bad"):
        next(said)


def test_a_damaged_or_unfit_artifact_is_refused_before_a_text_is_read(tmp_path: Path) -> None:
    def texts() -> Iterator[Text]:
        taken.append(1)
        yield Text("fire")

    taken: list[int] = []
    there = Places(tmp_path)
    folder = make(there)
    with (folder / "model.onnx").open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(SlimpiError, match=r"local: .*model.onnx has \d+ bytes, expected"):
        list(classify.classify(LOCAL, folder, texts(), there))
    language = there.artifacts / "lm"
    language.mkdir()
    write_llama(language / "model.gguf")
    write_manifest(language, artifact(language, "gguf"))
    with pytest.raises(SlimpiError, match="is a gguf lm, not a classifier"):
        list(classify.classify(LOCAL, language, texts(), there))
    assert not taken


READY = encode_line(Ready(labels=["no", "yes"]))
STRANGE: dict[str, tuple[list[bytes], int, str, str]] = {
    # what a device says, its exit code, its stderr: what the user is told
    "garbage": ([b"hello\n"], 0, "", "what local says is not a valid Ready"),
    "garbage later": ([READY, b"hello\n"], 0, "", "what local says of text 0 is not a valid Prediction"),
    "another text": (
        [READY, encode_line(Prediction(index=5, label="no", probabilities={}))],
        0,
        "",
        "local answers text 5, expected 0",
    ),
    "not ready": ([], 1, "a line\nslimpi classify: no \x1b[2Jmodel", "local: no  [2Jmodel"),
    "stopped": ([READY, b'{"index":0'], -9, "", "local stopped after 0 texts: exit code -9"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_answers_are_one_error(
    name: str, folder: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, code, errors, told = STRANGE[name]

    def stream(*arguments: Any) -> Any:
        yield from lines
        return code, errors

    monkeypatch.setattr(transport, "stream", stream)
    with pytest.raises(SlimpiError) as caught:
        list(classify.classify(LOCAL, folder, TEXTS, places))
    assert told in str(caught.value)


# Over ssh


def test_over_ssh_the_answers_are_the_same_and_only_what_is_damaged_is_sent_again(
    folder: Path, places: Places, box: sshd.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = expected(folder, TEXTS)
    assert_same(list(classify.classify(box.host, folder, TEXTS, places, threads=1, progress=quiet())), wanted)
    files = {file.path: box.home / "store" / file.sha256 for file in artifact(folder, "onnx").files}
    assert set((box.home / "store").iterdir()) == set(files.values())
    inode = files["model.onnx"].stat().st_ino
    placed = box.home / "artifacts" / "fake-1" / "tokenizer.json"
    data = placed.read_bytes()
    placed.chmod(0o644)
    placed.write_bytes(data.replace(b"harbour", b"harbor "))
    assert_same(list(classify.classify(box.host, folder, TEXTS, places, progress=quiet())), wanted)
    assert "1 file(s) of fake-1 were damaged on the device and are sent again" in capsys.readouterr().err
    assert files["model.onnx"].stat().st_ino == inode
    assert placed.read_bytes() == data
    assert not list((box.home / "jobs").iterdir())


def test_a_broken_link_is_told_with_what_was_answered(folder: Path, places: Places, box: sshd.Server) -> None:
    said = classify.classify(box.host, folder, repeat(Text("fire")), places, threads=1, progress=quiet())
    assert next(said).index == 0
    assert box.cut()
    with pytest.raises(SlimpiError, match=r"the link to box broke after \d+ texts"):
        list(said)
    assert not _programs(box)


def _programs(box: sshd.Server) -> list[psutil.Process]:
    """What still runs of the device's program a moment later; it ends when it notices that its link is gone."""
    deadline_s = time.monotonic() + PATIENCE_S
    found = _listed(box)
    while found and time.monotonic() < deadline_s:
        time.sleep(0.1)
        found = _listed(box)
    return found


def _listed(box: sshd.Server) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            path = process.environ().get("PYTHONPATH", "")
            if process.cmdline()[-1:] == ["device.classify"] and path.startswith(str(box.home)):
                found.append(process)
    return found


# The command


def command(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*SLIMPI, "classify", str(folder), "--threads", "1", "--plain", *options],
        cwd=REPO,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def line_of(process: subprocess.Popen[bytes]) -> Any:
    """The next line of stdout, which must come while stdin is still open."""
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
    assert ready, "no line came"
    return json.loads(process.stdout.readline())


def test_each_line_is_answered_before_the_next_comes_until_the_end(folder: Path) -> None:
    wanted = expected(folder, TEXTS)
    with command(folder) as process:
        assert process.stdin and process.stderr
        for i, text in enumerate(TEXTS[:3]):
            line = json.dumps({"text": text.text}) if i % 2 else text.text
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            said = line_of(process)
            assert (said["index"], said["label"]) == (i, wanted[i].label)
        process.stdin.close()
        assert (process.wait(PATIENCE_S), process.stderr.read()) == (0, b"")


def test_ctrl_c_ends_it_with_one_line(folder: Path) -> None:
    with command(folder) as process:
        assert process.stdin and process.stderr
        process.stdin.write(b"fire\n")
        process.stdin.flush()
        assert line_of(process)["index"] == 0
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 1
        assert process.stderr.read() == b"slimpi: interrupted; 1 texts were classified.\n"
    assert children
    _, alive = psutil.wait_procs(children, PATIENCE_S)
    assert not alive


def test_a_reader_that_leaves_ends_it_quietly(folder: Path) -> None:
    with command(folder) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"fire\nsmoke\n")
        process.stdin.flush()
        line_of(process)
        line_of(process)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"more\n" * 1000)
            process.stdin.close()
        assert (process.wait(PATIENCE_S), process.stderr.read()) == (1, b"")


def test_a_bad_line_ends_it_after_the_good_ones(folder: Path) -> None:
    with command(folder) as process:
        out, errors = process.communicate(b'fire\n{"text": 1}\nsmoke\n', PATIENCE_S)
    assert [json.loads(line)["index"] for line in out.splitlines()] == [0]
    assert process.returncode == 1
    assert errors.startswith(b"slimpi: line 2 is a JSON object but not")
    assert errors.count(b"\n") == 1


def test_ctrl_c_over_ssh_leaves_nothing_running(folder: Path, box: sshd.Server, tmp_path: Path) -> None:
    """The command line as the user calls it, but for the Python of the "device": an x86 box has its packages."""
    program = (
        "import sys; from pathlib import Path; from pipeline import cli, hosts; "
        f"hosts.ssh_host = lambda name, config=None: hosts.Host({box.host.name!r}, {box.host.destination!r}, "
        f"{box.host.ssh_options!r}, python={box.host.python!r}, home={box.host.home!r}, site_provided=True); cli.main()"
    )
    argv = [sys.executable, "-c", program, "classify", str(folder), "--on", "box", "--threads", "1", "--plain"]
    with subprocess.Popen(
        argv, cwd=REPO, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stderr
        process.stdin.write(b"fire\n")
        process.stdin.flush()
        assert line_of(process)["index"] == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 1
        assert process.stderr.read().splitlines()[-1] == b"slimpi: interrupted; 1 texts were classified."
    assert not _programs(box)
