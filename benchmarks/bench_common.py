"""What the benchmarks' command lines share: machine, options, where results go, and how they end."""

from __future__ import annotations

import argparse
import functools
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from device.records import Record, SlimpiError, check_id
from pipeline.store import Places


class Main(Protocol):
    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def default_machine() -> str:
    """CPU and core count, since host names say nothing: `amd-epyc-7763-2-cores`."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {os.cpu_count()} cores".lower()).strip("-")


def check_machine(name: str) -> None:
    try:
        check_id(name)
    except ValueError as error:
        raise SlimpiError(f"--machine: {error}. Use letters, digits, dots and dashes.") from error


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Here(Record, frozen=True, kw_only=True):
    """The machine that the figures of a file of results were taken on. Benches add what else they depend on."""

    machine: str
    cpu: str
    cores: int
    kernel: str
    python: str
    start_time: str


def here(machine: str, start_time: str) -> dict[str, Any]:
    """The fields of `Here`."""
    return {
        "machine": machine,
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "start_time": start_time,
    }


def at_least(minimum: int) -> Callable[[str], int]:
    """For argparse: a whole number that is not less."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return parse


def output_options(parser: argparse.ArgumentParser, file: str) -> None:
    """--machine and --out, which `result_path` reads."""
    parser.add_argument("--machine", default=default_machine(), help="folder under the results (default %(default)s)")
    parser.add_argument("--out", type=Path, help=f"file to write instead of benchmarks/results/<machine>/{file}")


def result_path(options: argparse.Namespace, where: Places, file: str) -> Path:
    check_machine(options.machine)
    out: Path = options.out or where.results / options.machine / file
    return out


def command(name: str, interrupted: str) -> Callable[[Main], Main]:
    """A benchmark's main, which ends with one line and exit code 1 for a SlimpiError, and for Ctrl-C; `interrupted` is
    what it says then: what is kept, and how to go on."""

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def call(argv: Sequence[str] | None = None) -> int:
            try:
                return main(argv)
            except SlimpiError as error:
                print(f"{name}: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print(f"{name}: interrupted. {interrupted}", file=sys.stderr)
            return 1

        return call

    return decorate
