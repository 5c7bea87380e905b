"""The one-way doors of DESIGN.md, walked: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import write_llama

REPO = Path(__file__).resolve().parent.parent
RUNTIMES = {"llama_cpp", "onnxruntime"}
PURE = ("device.records", "device.results", "device.schema", "device.text", "device.words")
DEVICE_MAY = {"device", "msgspec", "numpy", "psutil", "tokenizers"} | RUNTIMES | sys.stdlib_module_names


def imported(path: Path) -> set[str]:
    """Every module a file imports, at any depth of it; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports from the root"
            assert node.module
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def files(room: str) -> list[Path]:
    found = sorted((REPO / room).rglob("*.py"))
    assert found, f"{room}/ has no Python files: is the walk looking in the right place?"
    return found


@pytest.mark.parametrize("path", files("device"), ids=lambda p: p.name)
def test_device_imports_only_what_the_pi_has(path: Path) -> None:
    assert roots(imported(path)) <= DEVICE_MAY
    if path.name != "runtimes.py":
        assert not roots(imported(path)) & RUNTIMES


@pytest.mark.parametrize("path", files("pipeline"), ids=lambda p: p.name)
def test_pipeline_knows_only_the_contract_of_device(path: Path) -> None:
    names = {name for name in imported(path) if name.split(".")[0] == "device"}
    outside = {name for name in names - {"device"} if not name.startswith(PURE)}
    assert not outside


@pytest.mark.parametrize("module", PURE)
def test_what_pipeline_knows_of_device_is_pure(module: str) -> None:
    names = imported(REPO / f"{module.replace('.', '/')}.py")
    assert not {name for name in names if name.startswith("device.") and not name.startswith(PURE)}
    assert not roots(names) & (RUNTIMES | {"tokenizers", "psutil"})


def test_the_walk_sees_forbidden_imports(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("def f():\n    from device import tasks\n    import torch.nn as nn\n")
    assert imported(probe) == {"device", "device.tasks", "torch.nn"}


def test_the_agent_loads_no_runtime_no_torch_and_nothing_of_pipeline() -> None:
    code = "import sys, device.agent, device.worker, device.tasks; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    loaded = roots(set(done.stdout.split()))
    assert "device" in loaded
    assert not loaded & {"torch", "transformers", "pipeline", "llama_cpp", "onnxruntime", "tokenizers", "onnx", "gguf"}


def test_a_worker_loads_no_torch_and_nothing_of_pipeline() -> None:
    code = (
        "import sys, device.worker, device.llama as r, llama_cpp, onnxruntime, tokenizers; r.llama_api();"
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert not roots(set(done.stdout.split())) & {"torch", "transformers", "pipeline", "gguf"}


def test_numpy_is_in_no_process_that_times_llama_cpp(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf")
    code = (
        "import sys, device.agent, device.worker, device.throughput\n"
        "from pathlib import Path\n"
        "from device.llama import LlamaModel\n"
        f"with LlamaModel(Path({str(tmp_path / 'model.gguf')!r}), 1) as model:\n"
        "    model.open_context(8)\n"
        "    model.run(model.random_batches(8, 8, seed=0))\n"
        "    model.next_token()\n"
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    loaded = roots(set(done.stdout.split()))
    assert {"device", "llama_cpp"} <= loaded
    assert not loaded & {"numpy", "onnxruntime", "tokenizers"}
