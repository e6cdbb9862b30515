"""The page of the first minutes is made of real runs: its script replaces outputs, and nothing else."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from gravlens.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/first_minutes.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_minutes", ROOT / "docs/first_minutes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["first_minutes"] = module
    spec.loader.exec_module(module)
    return module


def test_outputs_and_the_total_are_replaced_and_nothing_else(recorder: ModuleType) -> None:
    asked: list[str] = []

    def run(command: str) -> object:
        asked.append(command)
        return recorder.Ran("new\n", 60.0, 30.0)

    page = (
        "a\n```text\n$ pip install x\nold\n```\nb\n```text\n$ gravlens inspect\nold\nold\n```\n"
        "<!-- total -->\nold\n<!-- end -->\n```toml\nc = 1\n```\n"
    )
    found = recorder.renewed(page, run, installed=True, machine=lambda: "a machine")
    assert asked == ["gravlens inspect"]  # what is installed keeps its output
    assert found == (
        "a\n```text\n$ pip install x\nold\n```\nb\n```text\n$ gravlens inspect\nnew\n```\n<!-- total -->\n"
        "**1 minutes in all** after installing, 0.5 minutes of processor time: a machine.\n<!-- end -->\n"
        "```toml\nc = 1\n```\n"
    )
    recorder.renewed(page, run, installed=False, machine=lambda: "")
    assert asked[1:] == ["pip install x", "gravlens inspect"]


def test_a_command_is_run_in_its_folder_and_told_with_its_time(recorder: ModuleType, tmp_path: Path) -> None:
    ran = recorder.in_shell(tmp_path, {"PATH": "/usr/bin:/bin"})("pwd -P; echo $PWD/a; exit 3")
    assert re.search(r"\na\n\(0 s, 0 s of processor time, exit code 3\)\n$", ran.output)


def test_its_commands_exist_with_their_options() -> None:
    lines = [line for line in re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE) if line.startswith("gravlens ")]
    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert len(lines) >= 5
    for line in lines:
        _, name, *words = line.split()
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert [word for word in words if word.startswith("--") and word not in known] == []
