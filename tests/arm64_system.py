"""The arm64 system that slow tests run the Pi's code in."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from device.records import SlimpiError
from pipeline.emulator import user_rootfs
from pipeline.progress import Progressor
from pipeline.store import places


@cache
def arm64_root(python: str = "3.11") -> Path:
    """The emulator's own tree with this Python, made if need be (or, for 3.11, the one that $SLIMPI_ARM64_ROOT names);
    where there can be none the test skips (fails under CI)."""
    if (named := os.environ.get("SLIMPI_ARM64_ROOT")) and python == "3.11":
        return Path(named)
    try:
        return user_rootfs(places().artifacts / ".emulator", Progressor(plain=True), python=python)
    except SlimpiError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no arm64 system: {error}")
        pytest.skip(f"no arm64 system: {error}")
