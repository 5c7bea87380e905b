"""The command line for devices: names, options and failures, each failure one line."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import remote_jobs
import sshd
from remote_jobs import make_artifact, text_file

from pipeline import cli, hosts
from pipeline.hosts import Host
from pipeline.store import Places

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def slimpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a command line in a home of its own: (exit code, stdout, stderr)."""
    monkeypatch.setenv("SLIMPI_HOME", str(tmp_path / "home"))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slimpi", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out, said.err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_artifact(Places(tmp_path / "home"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--on", "-oProxyCommand=touch x"], "is no host"),
        (["--on", "pi@no.such.host.invalid"], "cannot log in to pi@no.such.host.invalid"),
        (["--on", "pi", "--ssh-config", "/nonexistent"], "no ssh configuration /nonexistent"),
        (["--on", "local", "--governor", "performance"], "Add --sudo"),
        (["--on", "local", "--meter", "/nonexistent.csv"], "/nonexistent.csv is not a file"),
        (["--on", "local", "--meter", "no-such-meter"], "no-such-meter does not work"),
        (["--on", "local", "--on", "pi", "--meter", "x"], "reads one device's power"),
    ],
)
def test_failures_are_one_line(slimpi: Run, artifact: Path, arguments: list[str], told: str) -> None:
    code, out, errors = slimpi("bench", str(artifact), "--task", "perplexity", *arguments)
    assert (code, out) == (1, "")
    assert told in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("slimpi: ")


def test_local_has_no_store(slimpi: Run) -> None:
    for command in ("clean", "stop"):
        code, _, errors = slimpi(command, "local")
        assert code == 1
        assert "this machine" in errors


def test_a_variant_of_one_recipe_is_none_of_the_others(
    slimpi: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[str] | None] = {}

    def build(recipe: object, where: object, progress: object, threads: int, only: list[str] | None) -> list[Path]:
        asked[recipe.name] = only  # type: ignore[attr-defined]
        return []

    from pipeline import build as module

    monkeypatch.setattr(module, "build", build)
    for name, export, reference in (("lm", "gguf", "F16"), ("tweets", "onnx", "FP32")):
        (tmp_path / f"{name}.toml").write_text(
            f'name = "{name}"\nsource = "path:x"\nexport = "{export}"\nvariants = ["{reference}"]\n'
        )
    files = [str(tmp_path / "lm.toml"), str(tmp_path / "tweets.toml")]
    slimpi("build", *files, "--only", "Q4_0", "--only", "INT8-dynamic")
    assert asked == {"lm": ["Q4_0"], "tweets": ["INT8-dynamic"]}
    slimpi("build", *files, "--only", "Q4_0")
    assert asked == {"lm": ["Q4_0"], "tweets": ["FP32"]}
    slimpi("build", *files, "--only", "Q4_9")
    assert asked == {"lm": ["Q4_9"], "tweets": ["Q4_9"]}, "build itself refuses it by name"
    slimpi("build", *files)
    assert asked == {"lm": None, "tweets": None}


def test_bench_clean_and_a_second_device_that_is_lost(
    slimpi: Run, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command over ssh: a table for the device that works, one line and exit code 1 for the other."""
    text = text_file(tmp_path)
    with sshd.serve(tmp_path / "server") as server:
        config = server.host.ssh_options[1]

        def known(name: str, ssh_config: Path | None = None) -> Host:
            # An x86 "device" needs its Python and its packages named; a Pi gets both sent.
            return server.host if name == "box" else real(name, ssh_config)

        real = hosts.ssh_host
        monkeypatch.setattr(hosts, "ssh_host", known)
        options = [str(artifact), "--task", "perplexity", "--text", text, "--ssh-config", config]
        options += ["--n-ctx", str(remote_jobs.SHORT["n_ctx"]), "--n-chunks", "3", "--threads", "1"]
        code, out, errors = slimpi("bench", *options, "--on", "box", "--on", "lost.invalid")
        assert code == 1
        assert "F32" in out
        assert "lost.invalid" in errors.splitlines()[-1]
        code, out, errors = slimpi("bench", *options, "--on", "box")
        assert code == 0
        assert "bytes sent: artifact 0, wheels 0, data 0, code 0" in errors
        assert "measured before, replayed" in errors
        code, again, _ = slimpi("compare", str(tmp_path / "home" / "benchmarks" / "results" / "box"))
        assert (code, again) == (0, out)
        code, out, _ = slimpi("stop", "box", "--ssh-config", config)
        assert (code, out) == (0, "stopped: nothing was running\n")
        code, out, _ = slimpi("clean", "box", "--ssh-config", config)
        assert code == 0
        assert re.fullmatch(r"box: 0\.\d MB freed; left alone: code, jobs\n", out)
        assert list((server.home / "jobs").iterdir()), "what was measured stays"
        assert slimpi("clean", "box", "--all", "--ssh-config", config)[0] == 0
        assert not server.home.exists()
