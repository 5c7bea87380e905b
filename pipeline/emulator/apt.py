"""Where this machine gets Debian packages: its own apt configuration, turned into sources for the guest's release."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from device.records import SlimpiError

SUITES = {"3.11": "bookworm", "3.13": "trixie"}
"""The Debian release, as Raspberry Pi OS takes it, by its Python."""

GUEST_SUITE = SUITES["3.11"]

APT_FOLDER = Path("/etc/apt")
POCKETS = ("", "-updates", "-security")
_DEBIAN_SUITES = frozenset(
    {"oldoldstable", "oldstable", "stable", "testing", "unstable", "sid"}
    | {"bullseye", "bookworm", "trixie", "forky", "duke"}
)
# apt settings about reaching a mirror (proxies, expired snapshots), which hold for the guest's archive as well.
_ACCESS_OPTION = re.compile(r'^Acquire::(?:(?:https?|ftp)::|Check-|Retries|ForceIPv)[^"]*"[^"]+";$')


@dataclass(frozen=True)
class Source:
    """One line of apt's sources. `signed_by` is a keyring path, a fingerprint or an armoured key, as apt takes it."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""
    trusted: str = ""


def parse_one_line(text: str) -> list[Source]:
    """The classic format, `deb [options] uri suite component...` (sources.list(5)); deb-src lines are left out."""
    found = []
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        match = re.match(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s*)?(?P<rest>\S.*)$", line)
        if not match:
            continue
        words = match["rest"].split()
        if len(words) < 2:
            continue
        options = dict(pair.partition("=")[::2] for pair in shlex.split(match["options"] or ""))
        found.append(
            Source(words[0], words[1], tuple(words[2:]), options.get("signed-by", ""), options.get("trusted", ""))
        )
    return found


def parse_deb822(text: str) -> list[Source]:
    """The stanza format (sources.list(5)): one Source for each URI and suite; disabled stanzas are left out."""
    found = []
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields = _fields(stanza)
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        components = tuple(fields.get("components", "").split())
        for uri in fields.get("uris", "").split():
            found += [
                Source(uri, suite, components, fields.get("signed-by", ""), fields.get("trusted", ""))
                for suite in fields.get("suites", "").split()
            ]
    return found


def _fields(stanza: str) -> dict[str, str]:
    """Field name in lower case -> value; continuation lines keep their line breaks (an armoured key needs them)."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1] in (" ", "\t"):
            fields[name] = f"{fields.get(name, '')}\n{line}"
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def for_guest(sources: Iterable[Source], suite: str = GUEST_SUITE) -> list[Source]:
    """The Debian ones among `sources`, moved to the guest's release, `main` only, without duplicates.

    A trixie machine's mirror serves bookworm too; Ubuntu's does not, so its sources drop out.
    """
    wanted: dict[Source, None] = {}
    for source in sources:
        release, dash, pocket = source.suite.partition("-")
        if release not in _DEBIAN_SUITES or dash + pocket not in POCKETS or "main" not in source.components:
            continue
        wanted[replace(source, suite=f"{suite}{dash}{pocket}", components=("main",))] = None
    return list(wanted)


def read_sources(folder: Path = APT_FOLDER, only: Path | None = None, suite: str = GUEST_SUITE) -> list[Source]:
    """This machine's sources for the guest's release `suite`; from the one file `only` if given.

    Raises SlimpiError if no Debian archive is among them.
    """
    paths = [only] if only else [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    found: list[Source] = []
    for path in paths:
        if path.suffix not in (".list", ".sources") or (path != only and not path.is_file()):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SlimpiError(f"cannot read the apt sources in {path}: {error}. Fix or remove the file.") from error
        found += parse_deb822(text) if path.suffix == ".sources" else parse_one_line(text)
    usable = for_guest(found, suite)
    if not any(source.suite == suite for source in usable):
        raise SlimpiError(
            f"no Debian archive with {suite}'s `main` among the apt sources in {only or folder} "
            f"({len(found)} read). Name a file that has one (.list or .sources) with --apt-sources."
        )
    return usable


def render(sources: Sequence[Source]) -> str:
    """Sources as deb822 text."""
    stanzas = []
    for source in sources:
        lines = ["Types: deb", f"URIs: {source.uri}", f"Suites: {source.suite}"]
        lines.append(f"Components: {' '.join(source.components)}")
        lines += [f"Signed-By: {source.signed_by}"] if source.signed_by else []
        lines += [f"Trusted: {source.trusted}"] if source.trusted else []
        stanzas.append("\n".join(lines) + "\n")
    return "\n".join(stanzas)


def access_options() -> list[str]:
    """This machine's apt settings for reaching its mirrors, as mmdebstrap's --aptopt takes them."""
    done = subprocess.run(["apt-config", "dump"], capture_output=True, text=True)  # noqa: S607 (apt's own place)
    if done.returncode != 0:
        raise SlimpiError(f"apt-config ended with {done.returncode}: {done.stderr.strip()}. Repair apt's settings.")
    return select_access_options(done.stdout)


def select_access_options(dump: str) -> list[str]:
    return [line for line in dump.splitlines() if _ACCESS_OPTION.match(line)]
