"""Every GGUF variant on the emulated Cortex-A72 and on this machine, from the same file: do the kernels agree?

The bound is on the root mean square difference of the logits over their spread. Activations are rounded to 8 bits on
both machines but not alike, so equality is not to be had; a wrong block of weights or scale is far outside the bound.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from arm64_system import arm64_root
from fakes import LlamaShape, write_llama

from pipeline import calibrate, isa, wheelhouse
from pipeline.calibrate import Importance
from pipeline.checkpoint import load
from pipeline.emulator.rootfs import PYTHON, run_user
from pipeline.export.gguf import export_gguf, read_gguf_types
from pipeline.export.llama_quantize import VARIANTS, quantize_gguf
from pipeline.gguf_file import read_gguf
from pipeline.prune.cut import Cut, LayerCut, apply, dims_of
from pipeline.store import places

pytestmark = pytest.mark.slow

WIDE = LlamaShape(dim=256, ffn=512)  # K-quants and IQ types fit: nothing falls back
N_TOKENS = 24
MAX_DIFFERENCE = 0.03
_DECI = "deci-"
UNEVEN = tuple(_DECI + kind for kind in ("F32", "Q8_0", "Q4_K_M"))
"""A pruned model whose layers differ, in some types."""
EXACT = {"F32": 1e-5, "F16": 5e-3, "BF16": 5e-3}  # x86 and Arm round activations to 16 bits at other places
SIDE = Path(__file__).with_name("llama_cpp_side.py")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Folders with NAME.npy and NAME.plain.npy of every variant: `a72` and `host`; `files` has the models."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("files", "a72", "host")}
    base, matrix = folders["files"] / "base.gguf", folders["files"] / "matrix.npz"
    write_llama(base, WIDE)
    rng = np.random.default_rng(0)
    columns = {
        name: rng.uniform(0.1, 4.0, WIDE.ffn if "ffn_down" in name else WIDE.dim).astype(np.float32)
        for name, _, n_elements, _ in read_gguf_types(base)
        if name.startswith("blk.") and n_elements > WIDE.ffn
    }
    calibrate._save(matrix, Importance(columns, 1024, 512, "made up"))
    for variant in VARIANTS:
        quantize_gguf(base, folders["a72"] / f"{variant}.gguf", variant, matrix, 1, None)
        (folders["host"] / f"{variant}.gguf").symlink_to(folders["a72"] / f"{variant}.gguf")
    _write_uneven(base, folders["files"] / "uneven.gguf")
    for name in UNEVEN:
        kind = name.removeprefix(_DECI)
        quantize_gguf(folders["files"] / "uneven.gguf", folders["a72"] / f"{name}.gguf", kind, None, 1, None)
        (folders["host"] / f"{name}.gguf").symlink_to(folders["a72"] / f"{name}.gguf")
    tokens = folders["files"] / "tokens.npy"
    np.save(tokens, rng.integers(3, 259, N_TOKENS).astype(np.int32))
    cache = os.environ.get("SLIMPI_WHEELHOUSE_CACHE") or places().artifacts / ".wheelhouse"
    house = wheelhouse.assemble(Path(cache), "3.11", (2, 36))
    argv = ["many", str(tokens)]
    with isa.laid_out(house.paths) as env:
        done = run_user(arm64_root(), [PYTHON, str(SIDE), *argv, str(folders["a72"])], env, timeout_s=1800)
    assert done.returncode == 0, done.stderr[-800:]
    subprocess.run(
        [sys.executable, str(SIDE), *argv, str(folders["host"])], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    yield folders


def _write_uneven(base: Path, out: Path) -> None:
    """The model with a layer narrowed and the other's MLP gone, as llama.cpp's deci."""
    model = load(base)
    whole = dims_of(model).whole
    first, second, *rest = whole.layers
    narrow = LayerCut(first.groups[:1], first.channels[:256])
    export_gguf(apply(model, Cut((narrow, LayerCut(second.groups, ()), *rest))), out, "F32")
    assert read_gguf(out).keys["general.architecture"] == "deci"


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Root mean square of the difference over the standard deviation of `theirs`."""
    return float(np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std())


@pytest.mark.parametrize("variant", [*VARIANTS, *UNEVEN])
def test_the_device_computes_what_this_machine_computes(machines: dict[str, Path], variant: str) -> None:
    a72, host = (np.load(machines[name] / f"{variant}.npy") for name in ("a72", "host"))
    found = difference(a72, host)
    print(f"{variant}: {found:.2e}, top-1 {np.mean(a72.argmax(1) == host.argmax(1)):.3f}")
    assert found < EXACT.get(variant.removeprefix(_DECI), MAX_DIFFERENCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_repacking_changes_nothing_on_the_device(machines: dict[str, Path], variant: str) -> None:
    """llama.cpp repacks Q4_0, IQ4_NL and K-quants only where it has kernels for it: on a Cortex-A72 it has none."""
    packed, plain = (np.load(machines["a72"] / f"{variant}.{kind}") for kind in ("npy", "plain.npy"))
    np.testing.assert_array_equal(packed, plain)


def test_another_variant_is_outside_the_bound(machines: dict[str, Path]) -> None:
    """Negative control: what the bound would catch. Four-bit types differ by far more than machines do."""
    a72 = np.load(machines["a72"] / "Q4_0.npy")
    for variant in ("Q4_1", "IQ4_NL", "Q4_K_M", "F16"):
        assert difference(a72, np.load(machines["host"] / f"{variant}.npy")) > 2 * MAX_DIFFERENCE, variant
