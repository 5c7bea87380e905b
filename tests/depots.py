"""A device's depot as the host uses it: a program, one JSON object in, one out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
from fakes import TEXT, World, artifact
from jobs import REPO

from device.records import encode
from device.schema import Dataset, Job, Perplexity, describe_file

DEPOT = [sys.executable, str(REPO / "device" / "depot.py")]


class Depot:
    """One device's folder and the program that keeps it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {**os.environ, "SLIMPI_DEVICE_HOME": str(home)}

    def run(self, command: str, **request: Any) -> subprocess.CompletedProcess[bytes]:
        data = json.dumps(request).encode()
        return subprocess.run([*DEPOT, command], input=data, capture_output=True, env=self.environment, timeout=60)

    def __call__(self, command: str, **request: Any) -> Any:
        done = self.run(command, **request)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
        return json.loads(done.stdout)

    def refused(self, command: str, **request: Any) -> str:
        done = self.run(command, **request)
        assert (done.returncode, done.stdout) == (1, b"")
        text = done.stderr.decode()
        assert text.startswith("slimpi depot: ") and text.count("\n") == 1
        return text

    def send(self, data: bytes, whole: bool = True) -> tuple[str, int]:
        """Put a file's bytes where uploads land, and admit them."""
        digest = hashlib.sha256(data).hexdigest()
        (self.home / "incoming").mkdir(parents=True, exist_ok=True)
        (self.home / "incoming" / digest).write_bytes(data)
        if whole:
            assert self("admit", files=[[digest, len(data)]])["admitted"] == [digest]
        return digest, len(data)

    def follow(self, job_id: str, offset: int = 0) -> tuple[bytes, dict[str, Any]]:
        done = self.run("follow", job=job_id, offset=offset)
        assert done.returncode == 0, done.stderr.decode()
        *lines, last = done.stdout.splitlines(keepends=True)
        return b"".join(line for line in lines if b'"follow"' not in line), json.loads(last)

    def job(self, tmp_path: Path, repeat: int = 4, n_ctx: int = 32) -> Job:
        """A perplexity job on the tiny llama, every file through the store."""
        world = World.make(tmp_path / "world")
        text = (TEXT * repeat).encode()
        manifest = artifact(world.root / "lm", "gguf")
        model = (world.root / "lm" / "model.gguf").read_bytes()
        self.send(model)
        digest, size = self.send(text)
        listed = [msgspec.to_builtins(file) for file in manifest.files]
        folder = self("place", folder="artifacts/fake-1", files=listed)["path"]
        data = self("place", folder="data", files=[{"path": "text.txt", "sha256": digest, "size_bytes": size}])["path"]
        dataset = Dataset(name="text", file=describe_file(Path(data), "text.txt"))
        home = self("status")["home"]
        return world.job(
            "gguf",
            [Perplexity(dataset=dataset, n_ctx=n_ctx)],
            artifact_dir=folder,
            data_dir=data,
            work_dir=f"{home}/jobs/job-1/work",
        )

    def start(self, job: Job, again: bool = False) -> str:
        return str(self("start", job=json.loads(encode(job)), pythonpath=[], again=again)["state"])


def processes_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != "zombie" and process.environ().get("SLIMPI_DEVICE_HOME") == str(home):
                found.append(process)
    return found


def in_folder(home: Path) -> Iterator[Depot]:
    """A depot; whatever still runs in the end is stopped."""
    there = Depot(home)
    yield there
    if there.home.exists():
        there("stop", job=None)
