"""Language models in ONNX on the emulated Cortex-A72 and on this machine: prefill, then one token after the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from arm64_system import arm64_root
from tiny_models import save_tiny

from pipeline import isa, wheelhouse
from pipeline.build import build
from pipeline.emulator.rootfs import PYTHON, run_user
from pipeline.progress import Progressor
from pipeline.recipes import Golden, Recipe
from pipeline.store import Places, places

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parent.parent
SIDE = Path(__file__).with_name("onnx_language_side.py")
VARIANTS = ["FP32", "RTN-INT4_G32", "HQQ-INT4_G16_ZP", "RTN-INT8_G32", "RTN-INT8_G16_ZP"]


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """{machine: {variant: logits (n, n_vocab)}}"""
    home = tmp_path_factory.mktemp("home")
    save_tiny("llama-tied", home / "hf", torch.bfloat16)
    recipe = Recipe(
        name="tiny",
        source=f"path:{home / 'hf'}",
        export="onnx-lm",
        variants=VARIANTS,
        golden=Golden(n=4, n_tokens=16),
    )
    built = build(recipe, Places(home), Progressor(plain=True))
    folders = {name: [home / name / variant for variant in VARIANTS] for name in ("a72", "host")}
    for places_of in folders.values():
        for source, target in zip(built, places_of, strict=True):
            shutil.copytree(source, target)
    tokens = home / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(3, 512, 24, dtype=np.int32))
    cache = os.environ.get("SLIMPI_WHEELHOUSE_CACHE") or places().artifacts / ".wheelhouse"
    house = wheelhouse.assemble(Path(cache), "3.11", (2, 36))
    with isa.laid_out(house.paths) as env:
        env = {**env, "PYTHONPATH": f"{env['PYTHONPATH']}:{REPO}"}
        argv = [PYTHON, str(SIDE), str(tokens), *map(str, folders["a72"])]
        done = run_user(arm64_root(), argv, env, timeout_s=900)
    assert done.returncode == 0, done.stderr[-800:]
    argv = [sys.executable, str(SIDE), str(tokens), *map(str, folders["host"])]
    subprocess.run(argv, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)})
    return {name: {f.name: np.load(f / "logits.npy") for f in of} for name, of in folders.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_device_computes_what_this_machine_computes(logits: dict[str, dict[str, np.ndarray]], variant: str) -> None:
    """Activations stay in fp32 on both, so that only the order of sums differs."""
    a72, host = logits["a72"][variant], logits["host"][variant]
    assert a72.shape == host.shape == (24, 512)
    found = float(np.sqrt(np.mean((a72 - host) ** 2)) / host.std())
    print(f"{variant}: {found:.2e}")
    assert found < 1e-4


def test_another_variant_is_outside_the_bound(logits: dict[str, dict[str, np.ndarray]]) -> None:
    a72, host = logits["a72"]["FP32"], logits["host"]["RTN-INT8_G32"]
    assert float(np.sqrt(np.mean((a72 - host) ** 2)) / host.std()) > 1e-3
