"""The arm64 system that slow tests run the Pi's code in."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from device.schema import SlimpiError
from pipeline.emulator import user_rootfs
from pipeline.progress import Progressor
from pipeline.store import places


@cache
def arm64_root() -> Path:
    """$SLIMPI_ARM64_ROOT, or the emulator's own, made if need be; without either the test skips (fails under CI)."""
    if named := os.environ.get("SLIMPI_ARM64_ROOT"):
        return Path(named)
    try:
        return user_rootfs(places().artifacts / ".emulator", Progressor(plain=True))
    except SlimpiError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no arm64 system: {error}")
        pytest.skip(f"no arm64 system: {error}")
