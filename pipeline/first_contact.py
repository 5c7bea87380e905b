"""The first program a device runs, sent as text: `python3 -c THIS CODE_ID`. It must run on any Python from 3.6 on.

It says what the machine is, and whether the agent's code lies there unchanged; code that comes on stdin (a zip) is
kept under its hash. One JSON object on stdout; `error` in it if something failed.
"""

import hashlib
import io
import json
import os
import platform
import shutil
import sys
import time
import zipfile
from pathlib import Path

CPUFREQ = Path("/sys/devices/system/cpu/cpufreq")


def tree_id(files: list) -> str:
    """sha256 over (path, content) pairs in the order of their paths."""
    seen = hashlib.sha256()
    for path, content in sorted(files):
        seen.update(path.encode() + b"\0" + len(content).to_bytes(8, "big") + content)
    return seen.hexdigest()


def read_tree(folder: Path) -> list:
    """(path, content) of every file in the folder but what Python itself leaves there."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]


def keep(data: bytes, folder: Path, code_id: str) -> None:
    """Unpack a zip of the agent's code and put it in place whole. OSError if its tree is not `code_id`."""
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(str(scratch), ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            archive.extractall(str(scratch))
        if tree_id(read_tree(scratch)) != code_id:
            raise OSError("the agent's code arrived damaged")
        shutil.rmtree(str(folder), ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(str(scratch), ignore_errors=True)


def main(code_id: str) -> None:
    home = Path(os.environ.get("SLIMPI_DEVICE_HOME") or Path.home() / ".slimpi")
    folder = home / "code" / code_id
    error = ""
    try:
        data = sys.stdin.buffer.read()
        if data:
            keep(data, folder, code_id)
    except (OSError, zipfile.BadZipFile) as problem:
        error = str(problem)
    governors = sorted(CPUFREQ.glob("policy*/scaling_governor"))
    board = Path("/proc/device-tree/model")
    said = {
        "home": str(home),
        "code": folder.is_dir() and tree_id(read_tree(folder)) == code_id,
        "python": platform.python_version(),
        "glibc": platform.libc_ver()[1] if platform.libc_ver()[0] == "glibc" else "",
        "machine": platform.machine(),
        "board": board.read_text().strip("\0 \n") if board.exists() else "",
        "cores": os.cpu_count() or 1,
        "governors": {str(path): path.read_text().strip() for path in governors},
        "time_unix_s": time.time(),
        "error": error,
    }
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
