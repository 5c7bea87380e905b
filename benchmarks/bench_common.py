"""What the benchmarks' command lines share: which machine they run on, and how options are read."""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

from device.schema import SlimpiError, check_id


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


def at_least(minimum: int) -> Callable[[str], int]:
    """For argparse: a whole number that is not less."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return parse
