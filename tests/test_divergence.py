"""KL divergence to a reference: against float64 twins, and against llama-perplexity --kl-divergence."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
import real_exports
import reference
import reference_divergence as twin
from fakes import TEXT, LlamaShape, World, artifact, llama_weights, write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import run

from device import logits_file
from device.divergence import score_row
from device.language import n_scored
from device.logits_file import CUT_NATS, LOGITS_NAME, LogitsFile, decode_row, encode_row
from device.records import SlimpiError
from device.results import Measurement, Sample, TaskResult
from device.schema import Dataset, Divergence, Job, Perplexity, RecordLogits, Task
from device.tasks import TASKS
from device.wire import Request, Started
from pipeline.export.llama_quantize import quantize_gguf

N_CTX, N_CHUNKS = 32, 3


pytestmark = pytest.mark.usefixtures("quick_facts")


def record_task(world: World) -> RecordLogits:
    return RecordLogits(dataset=world.dataset("text.txt"), n_ctx=N_CTX, n_chunks=N_CHUNKS)


def recorded(world: World) -> Dataset:
    """The world's model recorded through the agent; the file lies in the data folder."""
    job = world.job("gguf", [record_task(world)], id="record", work_dir=str(world.root / "recording"))
    result = run(job)[0].results[0]
    assert result.status == "ok", result.error
    (world.root / "recording" / LOGITS_NAME).rename(world.root / "data" / LOGITS_NAME)
    return world.dataset(LOGITS_NAME)


def divergence_task(world: World, logits: Dataset, **changes: object) -> Divergence:
    task = Divergence(
        dataset=logits,
        n_ctx=N_CTX,
        n_chunks=N_CHUNKS,
        corpus="text.txt",
        corpus_sha256=world.dataset("text.txt").file.sha256,
        reference="fake-1",
    )
    return msgspec.structs.replace(task, **changes)


def other_model(world: World, seed: int = 1) -> Job:
    """A job for another model of the same vocabulary, without tasks yet."""
    folder = world.root / f"other-{seed}"
    folder.mkdir(exist_ok=True)
    write_llama(folder / "model.gguf", seed=seed)
    job = world.job("gguf", [], artifact=artifact(folder, "gguf", id=f"other-{seed}"), artifact_dir=str(folder))
    return msgspec.structs.replace(job, id=f"job-{seed}", work_dir=str(world.root / f"work-{seed}"))


def result_of(job: Job, task: Task) -> TaskResult:
    return run(msgspec.structs.replace(job, tasks=[task]))[0].results[0]


def measured(job: Job, task: Task) -> dict[str, Measurement]:
    result = result_of(job, task)
    assert result.status == "ok", result.error
    return {m.metric: m for m in result.measurements}


def take(job: Job, task: Task, done: dict[str, int] | None = None) -> list[Started | Sample]:
    """Run a task in this process."""
    job = msgspec.structs.replace(job, tasks=[task])
    Path(job.work_dir).mkdir(exist_ok=True)
    return list(TASKS[type(task)].run(Request(job=job, index=0, done=done or {}, agent_pid=0), task))


def twin_logits(world: World, seed: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Tokens and float64 logits of each chunk, from the weights alone; the vocabulary puts BOS first."""
    with LogitsFile(world.root / "data" / LOGITS_NAME) as file:
        chunks = file.tokens.tolist()
    weights = llama_weights(LlamaShape(), seed)
    return chunks, [reference.llama_logits(weights, LlamaShape(), [1, *chunk[1:]]) for chunk in chunks]


def test_divergence_equals_the_float64_twin(world: World) -> None:
    """Two random models, several nats apart; both run with an F16 KV cache here, which moves logits by 0.01."""
    found = measured(other_model(world), divergence_task(world, recorded(world)))
    chunks, base = twin_logits(world, 0)
    _, ours = twin_logits(world, 1)
    klds, differences, tops, nlls = [], [], [], []
    for chunk, base_rows, rows in zip(chunks, base, ours, strict=True):
        for at in range(N_CTX // 2, N_CTX - 1):
            p, q, target = twin.log_softmax(base_rows[at]), twin.log_softmax(rows[at]), chunk[at + 1]
            klds.append(twin.divergence(p, q))
            nlls.append(-q[target])
            differences.append(-q[target] - min(-p[target], 16.0 + max(p) * -1))  # the file ends 16 nats below its top
            tops.append(float(p.index(max(p)) == q.index(max(q))))
    assert found["kld"].n == len(klds) == N_CHUNKS * n_scored(N_CTX)
    assert found["kld"].samples == pytest.approx(klds, abs=0.02, rel=0.01)
    assert min(klds) > 0.1
    assert found["nll_difference"].samples == pytest.approx(differences, abs=0.05)
    assert found["same_top"].samples == pytest.approx(np.reshape(tops, (N_CHUNKS, -1)).mean(axis=1))
    assert found["divergence_nll"].samples == pytest.approx(np.reshape(nlls, (N_CHUNKS, -1)).mean(axis=1), abs=0.01)


def test_divergence_from_itself_is_rounding_only(world: World) -> None:
    found = measured(world.job("gguf", []), divergence_task(world, recorded(world)))
    assert abs(found["kld"].mean) < 1e-5
    assert max(map(abs, found["kld"].samples)) < 1e-4
    assert found["same_top"].samples == [1.0] * N_CHUNKS
    assert sorted(map(abs, found["nll_difference"].samples))[-2] < 2e-4
    assert found["nll_difference"].samples[29] == pytest.approx(0.3215, abs=1e-3)  # a target 16.32 nats below its top


def test_the_recording_is_readable_as_llama_perplexitys(world: World) -> None:
    """Header, tokens and rows where its reader expects them; every probability within the 16-bit rounding."""
    logits = recorded(world)
    header, rows = twin.read_rows(world.root / "data" / LOGITS_NAME, n_scored(N_CTX))
    assert header == [N_CTX, 272, N_CHUNKS]
    _, base = twin_logits(world, 0)
    for chunk, expected in zip(rows, base, strict=True):
        for position, row in enumerate(chunk):
            exact = twin.log_softmax(expected[N_CTX // 2 + position])
            cut = max(exact) - CUT_NATS
            assert row == pytest.approx([max(x, cut) for x in exact], abs=0.05)
    assert logits.file.size_bytes > 20 + 4 * N_CTX * N_CHUNKS + N_CHUNKS * n_scored(N_CTX) * 2 * (4 + 272)


def test_recording_also_gives_the_references_perplexity(world: World) -> None:
    text = world.dataset("text.txt")
    plain = measured(world.job("gguf", []), Perplexity(dataset=text, n_ctx=N_CTX, n_chunks=N_CHUNKS))["nll"]
    job = world.job("gguf", [], id="record", work_dir=str(world.root / "recording"))
    nll = measured(job, record_task(world))["nll"]
    assert nll.samples == pytest.approx(plain.samples, rel=1e-12)
    assert nll.conditions == plain.conditions


@settings(deadline=None, max_examples=200)
@given(
    st.integers(2, 301),
    st.sampled_from([0.0, 1e-3, 0.5, 3.0, 20.0]),
    st.sampled_from([0.0, -300.0, 1000.0]),
    st.integers(0, 10**6),
)
def test_rows_keep_log_probabilities_within_half_a_step(n: int, spread: float, shift: float, seed: int) -> None:
    row = (np.random.default_rng(seed).standard_normal(n) * spread + shift).astype(np.float32)
    words = np.full(4 + n + n % 2, 0xABCD, dtype=np.uint16)  # what an earlier row left there
    encode_row(row, words)
    got = decode_row(words, n).astype(np.float64)
    exact = np.array(twin.log_softmax(row.tolist()))
    span = min(CUT_NATS, exact.max() - exact.min())
    inside = exact > exact.max() - CUT_NATS
    noise = 4e-7 * (16 + abs(shift) + exact.max() - exact.min())
    np.testing.assert_allclose(got[inside], exact[inside], atol=span / 65535 / 2 + noise)
    assert (got[~inside] <= -CUT_NATS + noise).all()
    assert got.argmax() == row.argmax()
    assert (words[4 + n :] == 0).all()


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 200), st.sampled_from([0.5, 3.0, 12.0]), st.sampled_from([0.0, 0.1, 5.0]), st.integers(0, 10**6))
def test_score_equals_the_twin_on_the_files_own_probabilities(n: int, spread: float, apart: float, seed: int) -> None:
    """No rounding between the two: the twin reads the same 16-bit codes."""
    rng = np.random.default_rng(seed)
    base = (rng.standard_normal(n) * spread).astype(np.float32)
    row = base + (rng.standard_normal(n) * apart).astype(np.float32)
    words = np.zeros(4 + n + n % 2, dtype=np.uint16)
    encode_row(base, words)
    scale, floor = (float(x) for x in words[:4].view(np.float32))
    log_p = [scale * int(code) + floor for code in words[4 : 4 + n]]
    log_q = twin.log_softmax(row.tolist())
    target = int(rng.integers(n))
    score = score_row(words, row, target)
    assert score.kld == pytest.approx(twin.divergence(log_p, log_q), rel=1e-5, abs=1e-5)
    assert score.nll == pytest.approx(-log_q[target], rel=1e-5, abs=1e-5)
    assert score.nll_reference == pytest.approx(-log_p[target], rel=1e-5, abs=1e-5)
    assert score.same_top == (int(words[4 : 4 + n].argmax()) == int(row.argmax()))


def test_tokens_the_model_excludes_count_only_where_the_reference_has_them() -> None:
    """-inf where the reference has exp(-16) or less is left out; elsewhere the divergence is infinite."""
    base = np.array([5.0, 4.0, -40.0], dtype=np.float32)
    words = np.zeros(8, dtype=np.uint16)
    encode_row(base, words)
    with np.errstate(all="raise"):
        assert score_row(words, np.array([5.0, 4.0, -np.inf], dtype=np.float32), 0).kld == pytest.approx(0.0, abs=1e-5)
        assert score_row(words, np.array([5.0, -np.inf, -40.0], dtype=np.float32), 0).kld == math.inf


@pytest.mark.parametrize("done", [0, 1, 14, 15, 16, 44, 45])
def test_divergence_resumes_at_the_first_chunk_that_lacks_a_token(world: World, done: int) -> None:
    task, job = divergence_task(world, recorded(world)), other_model(world)
    whole = take(job, task)
    count = n_scored(N_CTX)
    chunk = done // count
    counts = {"kld": min(done + 1, N_CHUNKS * count), "nll_difference": done, "nll": chunk, "same_top": chunk}
    assert take(job, task, counts) == [whole[0], *whole[1 + chunk * 2 * (count + 1) :]]


def test_an_interrupted_recording_goes_on_and_ends_the_same(world: World) -> None:
    whole = (world.root / "data" / recorded(world).file.path).read_bytes()
    job = world.job("gguf", [record_task(world)], work_dir=str(world.root / "again"))
    (world.root / "again").mkdir()
    partial = world.root / "again" / f".{LOGITS_NAME}.partial"
    chunk_bytes = n_scored(N_CTX) * 2 * (4 + 272)
    header = 20 + 4 * N_CTX * N_CHUNKS
    for kept, journaled, expected in (
        (header + 2 * chunk_bytes + 5, 2, [2]),  # torn third chunk
        (header + 2 * chunk_bytes, 1, [1, 2]),  # on disk, but its sample is not
        (header + chunk_bytes - 1, 2, [0, 1, 2]),  # the journal knows more than the file
        (header - 1, 2, [0, 1, 2]),
        (header + 3 * chunk_bytes, 3, []),  # only the trailer is missing
    ):
        partial.write_bytes(whole[:kept])
        samples = [m.index for m in take(job, job.tasks[0], {"nll": journaled}) if isinstance(m, Sample)]
        assert samples == expected
        assert (world.root / "again" / LOGITS_NAME).read_bytes() == whole
        assert not partial.exists()
    partial.write_bytes(b"x" * len(whole))  # of another text
    take(job, job.tasks[0], {"nll": 2})
    assert (world.root / "again" / LOGITS_NAME).read_bytes() == whole


def test_a_recording_that_does_not_fit_the_disk_is_refused_before_it_starts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10_000

    monkeypatch.setattr(logits_file.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(SlimpiError, match=r"has 0 MB free, 0 MB are needed for 3 chunks"):
        take(world.job("gguf", []), record_task(world))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_ctx": 64}, "n_ctx 32, other-1 needs 64"),
        ({"n_chunks": 4}, "has 3 chunks, 4 are asked for"),
        ({"corpus_sha256": "f" * 64}, "corpus_sha256"),
        ({"reference": "somebody"}, "has reference fake-1, other-1 needs somebody"),
    ],
)
def test_another_recording_than_the_task_says_is_refused(
    world: World, changes: dict[str, object], message: str
) -> None:
    result = result_of(other_model(world), divergence_task(world, recorded(world), **changes))
    assert result.status == "failed"
    assert message in result.error


def test_another_tokenizer_is_refused(world: World) -> None:
    job = other_model(world)
    changed = msgspec.structs.replace(job.artifact, tokenizer_sha256="1" * 64)
    job = msgspec.structs.replace(job, artifact=changed)
    result = result_of(job, divergence_task(world, recorded(world)))
    assert "has tokenizer_sha256 000" in result.error


@pytest.mark.parametrize("damage", ["text", "no trailer", "trailer", "short", "header", "empty"])
def test_damaged_recordings_are_refused(world: World, damage: str) -> None:
    path = world.root / "data" / recorded(world).file.path
    data = path.read_bytes()
    at = data.rindex(b'{"schema"')
    broken = {
        "text": TEXT.encode(),
        "no trailer": data[:at],
        "trailer": data[:at] + data[at:].replace(b'"n_ctx":32', b'"n_ctx":64'),
        "short": data[:500] + data[501:],
        "header": data[:8] + b"\x07" + data[9:],
        "empty": b"",
    }[damage]
    path.write_bytes(broken)
    with pytest.raises(SlimpiError, match="Record it again"):
        LogitsFile(path)


def test_logits_that_are_no_numbers_are_an_error(world: World) -> None:
    task = divergence_task(world, recorded(world))
    weights = llama_weights(LlamaShape(), 1)
    weights["output_norm.weight"] = np.full(LlamaShape().dim, np.nan, dtype=np.float32)
    folder = world.root / "other-1"
    folder.mkdir()
    write_llama(folder / "model.gguf", weights=weights)
    job = world.job("gguf", [], artifact=artifact(folder, "gguf"), artifact_dir=str(folder))
    for broken in (task, record_task(world)):
        result = result_of(msgspec.structs.replace(job, work_dir=f"{folder}/{type(broken).__name__}"), broken)
        assert result.status == "failed"
        assert "no numbers" in result.error


def test_memory_stays_bounded_by_one_row_of_the_file(world: World) -> None:
    """Rows are read one at a time: nothing as large as a chunk is asked of the file."""
    path = world.root / "data" / recorded(world).file.path
    with LogitsFile(path) as file:
        row = file.row(2, n_scored(N_CTX) - 1)
        assert row.nbytes == 2 * (4 + 272)
        assert row.tobytes() == path.read_bytes()[: path.read_bytes().rindex(b'{"schema"')][-row.nbytes :]


# The real thing: SmolLM2, the same files, the same llama.cpp.

_STATS = {
    "kld": r"Mean +KLD: +(\S+) ± +(\S+)",
    "max": r"Maximum KLD: +(\S+)",
    "99": r"99\.0% +KLD: +(\S+)",
    "median": r"Median +KLD: +(\S+)",
    "ratio": r"Mean ln\(PPL\(Q\)/PPL\(base\)\) +: +(\S+) ± +(\S+)",
    "ppl": r"Mean PPL\(Q\) +: +(\S+) ± +(\S+)",
    "same_top": r"Same top p: +(\S+) ± +(\S+) %",
}


def llama_perplexity(model: Path, text: Path, *options: object) -> str:
    """One chunk a batch, as slimpi evaluates them."""
    argv = [
        real_exports.peer("llama-perplexity"),
        "-m",
        model,
        "-f",
        text,
        "-c",
        512,
        "-b",
        512,
        "-t",
        1,
        "--chunks",
        4,
    ]
    done = subprocess.run([*map(str, argv), *map(str, options)], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> World:
    """SmolLM2 in F32 as the world's model, in Q3_K_M in folder q3, and WikiText-2 test as its text."""
    real_exports.peer("llama-perplexity")
    world = World.make(tmp_path_factory.mktemp("real"))
    (world.root / "q3").mkdir()
    quantize_gguf(real_exports.source("smollm2-135m"), world.root / "lm" / "model.gguf", "F32", None, 1, None)
    quantize_gguf(world.root / "lm" / "model.gguf", world.root / "q3" / "model.gguf", "Q3_K_M", None, 1, None)
    (world.root / "data" / "text.txt").write_bytes((data_dir / "wikitext-2" / "wiki.test.raw").read_bytes())
    return world


@pytest.mark.slow
def test_equals_llama_perplexity_on_a_real_model(real: World) -> None:
    """llama-perplexity reads our recording; its statistics over it are ours; it would have made the same one."""
    text, q3 = real.root / "data" / "text.txt", real.root / "q3"
    record = RecordLogits(dataset=real.dataset("text.txt"), n_chunks=4)
    nll = measured(real.job("gguf", [], id="r", work_dir=str(real.root / "recording"), timeout_s=600), record)["nll"]
    ours = (real.root / "recording" / LOGITS_NAME).replace(real.root / "data" / LOGITS_NAME)
    theirs = real.root / "theirs.logits"
    said = llama_perplexity(real.root / "lm" / "model.gguf", text, "--save-all-logits", theirs)
    final = re.search(r"Final estimate: PPL = (\S+)", said)
    assert final
    assert math.exp(nll.mean) == pytest.approx(float(final[1]), abs=2e-4)
    _assert_same_recording(ours, theirs)

    task = divergence_task(real, real.dataset(LOGITS_NAME), n_ctx=512, n_chunks=4)
    job = real.job("gguf", [], artifact=artifact(q3, "gguf", id="q3"), artifact_dir=str(q3), timeout_s=600)
    found = measured(job, task)
    said = llama_perplexity(q3 / "model.gguf", text, "--kl-divergence-base", ours, "--kl-divergence")
    stats = {name: re.search(pattern, said) for name, pattern in _STATS.items()}
    assert all(stats.values()), said[-3000:]
    wanted = {name: [float(x) for x in match.groups()] for name, match in stats.items() if match}
    kld, ratio, top = found["kld"], found["nll_difference"], found["same_top"].mean
    assert wanted["kld"][0] > 0.05, "a trivial case would prove nothing"
    assert [kld.mean, kld.stderr] == pytest.approx(wanted["kld"], abs=2e-6)  # they print six digits
    assert [ratio.mean, ratio.stderr] == pytest.approx(wanted["ratio"], abs=2e-6)
    assert [max(kld.samples)] == pytest.approx(wanted["max"], abs=1e-5)
    assert [float(np.median(kld.samples))] == pytest.approx(wanted["median"], abs=2e-6)
    assert [twin.percentile(kld.samples, 0.99)] == pytest.approx(wanted["99"], abs=1e-5)
    assert 100 * top == pytest.approx(wanted["same_top"][0], abs=1e-3)
    assert math.exp(found["divergence_nll"].mean) == pytest.approx(wanted["ppl"][0], rel=1e-6)


def _assert_same_recording(ours: Path, theirs: Path) -> None:
    """Byte for byte, but for codes on the edge between two: libm and numpy round an exponential differently."""
    size = theirs.stat().st_size
    a = np.fromfile(ours, dtype="<u2", count=size // 2)
    b = np.fromfile(theirs, dtype="<u2")
    header = (20 + 4 * 512 * 4) // 2
    assert (a[:header] == b[:header]).all()
    rows_a, rows_b = (x[header:].reshape(4 * 255, -1) for x in (a, b))
    assert np.abs(rows_a[:, 4:].astype(int) - rows_b[:, 4:].astype(int)).max() <= 1
    assert (rows_a[:, 4:] != rows_b[:, 4:]).mean() < 1e-3
    np.testing.assert_allclose(
        rows_a[:, :4].copy().view(np.float32), rows_b[:, :4].copy().view(np.float32), rtol=1e-6, atol=1e-6
    )
