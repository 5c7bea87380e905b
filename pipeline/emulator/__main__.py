"""`python -m pipeline.emulator up|down|status|ssh-config|install-deps`: the emulated Pi from a shell or a Makefile."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import psutil

from device.records import SlimpiError
from pipeline.emulator import host
from pipeline.emulator.image import build
from pipeline.emulator.machine import LIFETIME_H, Running, boot, shut_down, ssh, status
from pipeline.progress import Progressor
from pipeline.store import places


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        sys.stdout.write(_run(options))
    except SlimpiError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def _run(options: argparse.Namespace) -> str:
    if options.command == "install-deps":
        return f"installed: {' '.join(host.install_packages()) or 'nothing was missing'}\n"
    state_dir: Path = options.cache / "run"
    if options.command == "up":
        progress = Progressor()
        image = build(options.cache, progress, options.apt_sources)
        with progress.step("boot the emulated Pi"):
            running = boot(
                image, state_dir, options.memory_mib, options.cpus, fresh=options.fresh, lifetime_h=options.hours
            )
        return _describe(running)
    found = status(state_dir)
    if options.command == "down":
        if found is None:
            return "not running\n"
        return "powered off\n" if shut_down(found) else "ended: it did not power off by itself\n"
    if found is None:
        raise SlimpiError(f"no emulated Pi runs from {options.cache}. Start it: make pi-emulator.")
    return found.ssh_config.read_text(encoding="utf-8") if options.command == "ssh-config" else _describe(found)


def _describe(running: Running) -> str:
    rss_mib = psutil.Process(running.pid).memory_info().rss / 2**20
    said = ssh(running, ["uname", "-srm"]).stdout.decode().strip()
    return (
        f"{running.host}: {said}, port {running.port} on loopback, QEMU process {running.pid}, {rss_mib:.0f} MiB\n"
        f"ssh -F {running.ssh_config} {running.host}\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.emulator", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "status", "ssh-config", "install-deps"])
    parser.add_argument(
        "--cache", type=Path, default=places().artifacts / ".emulator", help="images and the running state"
    )
    parser.add_argument("--apt-sources", type=Path, help="a .list or .sources file instead of this machine's own")
    parser.add_argument("--memory-mib", type=int, default=4096, help="the guest's memory")
    parser.add_argument("--cpus", type=int, default=4)
    parser.add_argument("--fresh", action="store_true", help="forget what the guest wrote in earlier boots")
    parser.add_argument("--hours", type=float, default=LIFETIME_H, help="end it after this long, come what may")
    return parser


if __name__ == "__main__":
    sys.exit(main())
