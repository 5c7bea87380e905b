"""Task profile: the products are right in every format, and times are divided and told apart as promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
from fakes import World
from jobs import profile as profile_task
from jobs import run
from test_tasks import take

from device import profile
from device.ggml import WEIGHT_TYPES, Backend, Products, Weights
from device.records import SlimpiError
from device.results import Sample
from device.schema import Product, Profile
from pipeline import fit

# Kernels round activations to 8 bits, F16's and BF16's to theirs.
LARGEST_ERROR = 0.02


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def backend() -> Any:
    with Backend(1) as found:
        yield found


def samples(messages: list[Any], series: str) -> list[Sample]:
    return [m for m in messages if isinstance(m, Sample) and m.series == series]


# Their grids take llama.cpp tens of seconds to make.
SLOW = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in WEIGHT_TYPES]
)
def test_every_format_is_multiplied_rightly(backend: Backend, kind: str) -> None:
    weights = Weights(kind, 96, 512)
    with Products(backend, weights, 2, 3) as products:
        products.compute()
        assert products.relative_error() < (1e-6 if kind == "F32" else LARGEST_ERROR)
        assert products.buffer


def test_types_are_ggufs_own(backend: Backend) -> None:
    """Numbers as in files, and the library's names for them."""
    for name, number in WEIGHT_TYPES.items():
        assert gguf.GGMLQuantizationType[name] == number
        assert backend.ggml.ggml_type_name(number).decode().upper() == name


def test_a_wrong_product_shows(backend: Backend) -> None:
    """The error is of the product that was computed: before one there is none, other weights are far off."""
    weights = Weights("Q8_0", 64, 256)
    with Products(backend, weights, 2, 1) as products:
        products.compute()
        right = products.relative_error()
        weights.sample[::2] *= 1.5
        assert products.relative_error() > 20 * right


def test_rows_repeat_the_sample() -> None:
    weights = Weights("Q8_0", 150, 32)
    rows = weights.data().reshape(150, -1)
    assert (rows[64:128] == rows[:64]).all()
    assert (rows[128:] == rows[:22]).all()
    assert len({row.tobytes() for row in rows}) == 64
    assert weights.n_bytes == 150 * 34


def test_repacked_weights_are_used_where_llama_cpp_would(backend: Backend) -> None:
    """24 rows suit the repacked kernels (8 at a time), 9 do not; F32 is never repacked."""
    names = {}
    for kind, rows in [("Q4_0", 24), ("Q4_0", 9), ("F32", 24)]:
        with Products(backend, Weights(kind, rows, 32), 1, 1) as products:
            names[kind, rows] = products.buffer
    assert names["Q4_0", 9] == names["F32", 24] == "CPU"
    extra = len(backend.buffer_types()) > 1
    assert names["Q4_0", 24] == ("CPU_REPACK" if extra else "CPU")


@pytest.mark.parametrize(
    ("kind", "columns", "says"),
    [
        ("Q9_Z", 256, "no format 'Q9_Z' for weights. Known: F32"),
        ("Q8_K", 256, "no format 'Q8_K'"),
        ("Q4_K", 288, "288 columns are not divisible by Q4_K's blocks of 256"),
    ],
)
def test_formats_that_cannot_be_are_refused(kind: str, columns: int, says: str) -> None:
    with pytest.raises(SlimpiError, match=says):
        Weights(kind, 8, columns)


class FakeProducts:
    """Takes 1000 ns a compute() on a clock of its own; relative_error tells which matrix it is of."""

    now_ns = n_computed = 0
    made: list[tuple[str, int, int]]

    def __init__(self, backend: Any, weights: Weights, copies: int, n_tokens: int) -> None:
        self.weights = weights
        FakeProducts.made.append((weights.kind, copies, n_tokens))

    def __enter__(self) -> FakeProducts:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def compute(self) -> None:
        FakeProducts.now_ns += 1000
        FakeProducts.n_computed += 1

    def relative_error(self) -> float:
        return self.weights.columns / 1000


@pytest.fixture
def fake_products(monkeypatch: pytest.MonkeyPatch) -> type[FakeProducts]:
    FakeProducts.made = []
    FakeProducts.n_computed = 0
    monkeypatch.setattr(profile, "Products", FakeProducts)
    monkeypatch.setattr(profile.time, "perf_counter_ns", lambda: FakeProducts.now_ns)
    return FakeProducts


def test_samples_are_the_time_a_weight(world: World, fake_products: type[FakeProducts]) -> None:
    task = profile_task(n_tokens=2, warmup=2, repetitions=3)
    job = world.job("gguf", [task])
    messages = take(job)
    assert messages[0].total == len(messages) - 1 == 4 * 5 + 4
    times, errors = samples(messages, "ns_per_weight"), samples(messages, "product_error")
    assert [s.index for s in times] == list(range(20))
    assert [s.warmup for s in times] == [True] * 8 + [False] * 12
    # 1 MiB over (18 bytes a block of 32 weights, and 4 bytes a result), in whole matrices
    q4_0, f16 = 24 * 18 + 24 * 8, 24 * 32 * 2 + 24 * 8
    expected = [2**20 // q4_0 + 1, 2**20 // f16 + 1]
    assert [n for _, n, _ in fake_products.made[:2]] == [min(1024, n) for n in expected]
    assert fake_products.made[2:4] == [("Q4_0", 14, 2), ("F16", 4, 2)]
    assert fake_products.n_computed == 2 * 20, "one pass before the clock starts, one timed"
    assert times[0].value == pytest.approx(1000 / (1024 * 24 * 32))
    assert times[6].value == pytest.approx(1000 / (14 * 512 * 256))
    assert [(s.index, s.value) for s in errors] == [(0, 0.032), (1, 0.032), (2, 0.256), (3, 0.256)]


def test_measurements_tell_format_and_shape(world: World, fake_products: type[FakeProducts]) -> None:
    task = profile_task(repetitions=2)
    job = world.job("gguf", [task], threads=3)
    taken: dict[str, list[Sample]] = {}
    for message in take(job)[1:]:
        assert isinstance(message, Sample)
        taken.setdefault(message.series, []).append(message)
    for sample in (numbered := taken["ns_per_weight"]):
        numbered[sample.index] = msgspec.structs.replace(sample, value=float(sample.index))
    found = profile.summarize_profile(task, taken, job)
    kinds = [(m.conditions["format"], m.conditions["rows"], m.conditions["columns"]) for m in found[::2]]
    assert kinds == [("Q4_0", 24, 32), ("F16", 24, 32), ("Q4_0", 512, 256), ("F16", 512, 256)]
    assert [m.warmup for m in found[::2]] == [[0.0], [1.0], [2.0], [3.0]]
    assert [m.samples for m in found[::2]] == [[4.0, 8.0], [5.0, 9.0], [6.0, 10.0], [7.0, 11.0]]
    assert {m.metric for m in found[::2]} == {"ns_per_weight"}
    assert [m.samples for m in found[1::2]] == [[0.032], [0.032], [0.256], [0.256]]
    assert {m.conditions["threads"] for m in found} == {3}


@pytest.mark.parametrize(("n_done", "n_errors"), [(0, 0), (2, 3), (3, 3), (4, 4), (7, 4), (15, 4)])
def test_resumes_at_the_round_it_was_in(
    world: World, fake_products: type[FakeProducts], n_done: int, n_errors: int
) -> None:
    """What the worker lets through (index >= done) is exactly what is missing; warm-ups are run again."""
    job = world.job("gguf", [profile_task(warmup=1, repetitions=3)])
    done = {"ns_per_weight": n_done, "product_error": n_errors}
    sent = [m for m in take(job, done) if isinstance(m, Sample) and m.index >= done[m.series]]
    assert [s.index for s in sent if s.series == "ns_per_weight"] == list(range(n_done, 16))
    assert [s.index for s in sent if s.series == "product_error"] == list(range(n_errors, 4))
    warm = [kind for kind, _, _ in fake_products.made[:4]]
    assert warm == ["Q4_0", "F16", "Q4_0", "F16"]


def test_nothing_runs_when_all_is_there(world: World, fake_products: type[FakeProducts]) -> None:
    job = world.job("gguf", [profile_task(warmup=1, repetitions=3)])
    assert len(take(job, {"ns_per_weight": 16, "product_error": 4})) == 1
    assert fake_products.made == []


def test_through_the_agent(world: World) -> None:
    report, _ = run(world.job("gguf", [profile_task(repetitions=3)], work_dir=str(world.root / "agent")))
    (result,) = report.results
    assert result.status == "ok", result.error
    times = [m for m in result.measurements if m.metric == "ns_per_weight"]
    assert [len(m.samples) for m in times] == [3] * 4
    assert all(0 < value < 1000 for m in times for value in m.samples)
    assert all(m.samples[0] < LARGEST_ERROR for m in result.measurements if m.metric == "product_error")


def test_an_unknown_format_fails_the_task_not_the_process(world: World) -> None:
    report, _ = run(
        world.job(
            "gguf",
            [profile_task(products=[*profile_task().products, Product(format="Q4_9", rows=8, columns=32)])],
            work_dir=str(world.root / "bad"),
        )
    )
    assert report.results[0].status == "failed"
    assert "no format 'Q4_9'" in report.results[0].error


@pytest.mark.slow
def test_several_threads_compute_the_same() -> None:
    weights = Weights("Q4_K", 512, 1024)
    errors = []
    for threads in (1, 2):
        with Backend(threads) as found, Products(found, weights, 4, 1) as products:
            products.compute()
            errors.append(products.relative_error())
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_predicted_memory_covers_working_set_and_largest_matrix(world: World) -> None:
    task = profile_task(products=[Product(format="Q8_0", rows=100_000, columns=1024)])
    job = world.job("gguf", [task])
    (found,) = fit.footprints(job.artifact, Path(job.artifact_dir), [task])
    assert found.task == "profile"
    assert found.total_bytes > 2 * 100_000 * 1024
    small = profile_task(working_set_mib=64)
    (found,) = fit.footprints(job.artifact, Path(job.artifact_dir), [small])
    assert 64 * fit.MIB < found.total_bytes - fit.LLAMA_BASE_BYTES < 66 * fit.MIB


@pytest.mark.parametrize("changes", [{"products": []}, {"n_tokens": 0}, {"working_set_mib": 0}])
def test_empty_tables_are_refused_by_the_schema(changes: dict[str, Any]) -> None:
    plain = msgspec.to_builtins(profile_task()) | changes
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(plain, Profile)


def test_results_that_memory_cannot_hold_end_in_an_error(backend: Backend) -> None:
    with pytest.raises(SlimpiError, match="no memory for matrices"):
        Products(backend, Weights("Q8_0", 2**24, 2**13), 2**10, 1)
