"""Artifacts appear whole or not at all, and are named by input, recipe and code."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from device.records import SlimpiError
from pipeline import store
from pipeline.store import artifact_id, build_lock, digest, find_artifact, stage, whole_folder


def test_failed_block_leaves_nothing(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt, SlimpiError, RuntimeError):
        with pytest.raises(error), whole_folder(tmp_path / "a") as folder:
            (folder / "half").write_bytes(b"x" * 100)
            raise error
        assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match=r"No space left.*Free some space"), whole_folder(tmp_path / "a") as folder:
        (folder / "half").write_bytes(b"x")
        raise OSError(28, os.strerror(28))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_build_do_not_leak_into_the_next(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "old").write_bytes(b"x")
    with whole_folder(tmp_path / "a") as folder:
        (folder / "new").write_bytes(b"y")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]


def test_stage_is_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    calls: list[int] = []
    said: list[str] = []

    def make(folder: Path) -> None:
        calls.append(1)
        (folder / "data").write_bytes(b"right")

    first = stage(tmp_path, "s", ["key"], make, said.append)
    assert stage(tmp_path, "s", ["key"], make, said.append) == first
    assert len(calls) == 1
    assert not said
    (first / "data").write_bytes(b"wrong")
    stage(tmp_path, "s", ["key"], make, said.append)
    assert len(calls) == 2
    assert "sha256" in said[0]
    assert (first / "data").read_bytes() == b"right"
    assert stage(tmp_path, "s", ["other key"], make, said.append) != first


def test_id_depends_on_every_part_of_the_key_and_on_code(monkeypatch: pytest.MonkeyPatch) -> None:
    base = artifact_id("m-q4_0", [{"a": 1}, "Q4_0"])
    assert base == artifact_id("m-q4_0", [{"a": 1}, "Q4_0"])
    assert base != artifact_id("m-q4_0", [{"a": 2}, "Q4_0"])
    monkeypatch.setattr("pipeline.store.tool_versions", lambda: {"slimpi-code": "changed"})
    assert base != artifact_id("m-q4_0", [{"a": 1}, "Q4_0"])


def _imported(root: Path, module: Path) -> set[Path]:
    """Modules of the package in `root` that `module` imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    parts = [root.parent.joinpath(*name.split(".")) for name in names if name.split(".")[0] == root.name]
    return {path for part in parts for path in (part.with_suffix(".py"), part / "__init__.py") if path.is_file()}


def test_code_that_exporters_use_is_part_of_an_artifact_s_id() -> None:
    root = Path(store.__file__).parent
    found, todo = set[Path](), [root / "exporters.py"]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += _imported(root, module)
    assert root / "export" / "llama_quantize.py" in found
    used = {path.relative_to(root).as_posix() for path in found}
    assert used & store._NOT_BUILDING == {"progress.py", "locks.py"}  # they only show, and wait
    assert all((root / name).is_file() for name in store._NOT_BUILDING)


def test_digest_ignores_key_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_only_one_build_at_a_time(tmp_path: Path) -> None:
    with build_lock(tmp_path), pytest.raises(SlimpiError, match="another slimpi build"), build_lock(tmp_path):
        pass


def test_unknown_artifact_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match=r"no artifact 'nope'.*none.*slimpi build"):
        find_artifact(tmp_path, "nope")
