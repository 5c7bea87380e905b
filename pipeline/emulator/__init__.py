"""An emulated Raspberry Pi 4 (Cortex-A72, ARMv8.0-A) at two depths; docs/emulator.md says what each one proves.

- `user_rootfs`, `run_user`: one arm64 program at a time through QEMU's user emulation; seconds, no boot.
- `build`, `boot`, `status`, `shut_down`, `cut_power`: a whole Debian machine reached by ssh.
"""

from pipeline.emulator.image import Image, build
from pipeline.emulator.machine import ALIAS, Running, boot, cut_power, shut_down, status
from pipeline.emulator.rootfs import run_user, user_rootfs

__all__ = [
    "ALIAS",
    "Image",
    "Running",
    "boot",
    "build",
    "cut_power",
    "run_user",
    "shut_down",
    "status",
    "user_rootfs",
]
