"""The docs tell the truth: docs/cli.md is the --help text, and README names only commands and files that exist.

`UPDATE_DOCS=1 pytest tests/test_docs.py` rewrites docs/cli.md.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pipeline.cli import app

REPO = Path(__file__).parent.parent
CLI = REPO / "docs" / "cli.md"
README = (REPO / "README.md").read_text(encoding="utf-8")


def help_text(*command: str) -> str:
    environment = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="slimpi", env=environment, terminal_width=100)
    assert result.exit_code == 0
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def commands() -> list[str]:
    """Commands and, behind their group, those of a group: `tweets`, `tweets explore`."""
    found = []
    for name, command in sorted(get_command(app).commands.items()):  # type: ignore[attr-defined]
        found += [name, *(f"{name} {inner}" for inner in sorted(getattr(command, "commands", {})))]
    return found


def test_cli_page_is_the_help_text() -> None:
    parts = ["# slimpi's commands", "", "Generated from `--help`; a test compares them.", ""]
    for command in [[], *(name.split() for name in commands())]:
        parts += [f"## slimpi {' '.join(command)}".rstrip(), "", "```", help_text(*command), "```", ""]
    page = "\n".join(parts)
    if os.environ.get("UPDATE_DOCS") == "1":
        CLI.parent.mkdir(exist_ok=True)
        CLI.write_text(page, encoding="utf-8")
    assert CLI.read_text(encoding="utf-8") == page


def readme_command_lines() -> list[list[str]]:
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("slimpi ")]


@pytest.mark.parametrize("line", readme_command_lines(), ids=" ".join)
def test_readme_commands_exist_with_their_options(line: list[str]) -> None:
    command = line[1:3] if " ".join(line[1:3]) in commands() else line[1:2]
    assert " ".join(command) in commands()
    shown = help_text(*command)
    for word in line[2:]:
        if word.startswith("--"):
            assert word in shown


def test_readme_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert named
    assert named <= targets


def test_readme_files_exist() -> None:
    named = set(re.findall(r"`((?:pipeline|device|models|docs|benchmarks)/[\w./-]+\.(?:py|md|toml|json))`", README))
    assert named
    for name in named:
        assert (REPO / name).exists(), name


PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([\w./-]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
