"""Terminals without Unicode, without width, or that are closed: no message ends in a traceback."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer
from histories import sequence_on_disk
from typer.testing import CliRunner

from gravlens.cli import app

GROUP: Any = typer.main.get_command(app)
COMMANDS = [[], *([name] for name in GROUP.commands), *(["store", name] for name in GROUP.commands["store"].commands)]
RUN = "réunion–1"  # a run's name beyond ASCII and Latin-1


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return history_in(tmp_path_factory.mktemp("terminals"))


def history_in(folder: Path) -> Path:
    """A history with a run of that name."""
    models = {"witness": tiny.llama(0), "anchor": tiny.llama(1), "ft/checkpoint-1": tiny.llama(2)}
    path = sequence_on_disk(folder, models) / "SEQUENCE.toml"
    path.write_text(path.read_text().replace("seed0", f'"{RUN}"'), encoding="utf-8")
    return path


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_other_letters_where_a_terminal_lacks_them(words: list[str], charset: str) -> None:
    found = CliRunner(charset=charset).invoke(app, [*words, "--help"])
    assert found.exit_code == 0 and "Usage" in found.output, found.exception


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", ["inspect", "trajectory", "plan", "locate"])
def test_results_are_shown_in_any_charset(command: str, charset: str, history: Path) -> None:
    found = CliRunner(charset=charset).invoke(app, [command, str(history)])
    assert found.exit_code == 0, found.exception
    shown = RUN if charset == "utf-8" else RUN.encode(charset, "backslashreplace").decode(charset)
    assert command in ("locate", "plan") or shown in found.output.replace("\n", "")


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_errors_are_shown_in_any_charset(charset: str) -> None:
    found = CliRunner(charset=charset).invoke(app, ["locate", f"{RUN}.toml"])
    assert found.exit_code == 2 and r"\u2013" in found.stderr, found.exception


@pytest.mark.parametrize("columns", ["1", "20"])
@pytest.mark.parametrize("command", ["--help", "inspect", "trajectory", "locate"])
def test_a_terminal_may_be_narrow(command: str, columns: str, history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words = [command] if command == "--help" else [command, str(history)]
    assert CliRunner().invoke(app, words).exit_code == 0


POSIX = {"LANG": "C", "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def process(words: list[str], **environment: str) -> "subprocess.Popen[bytes]":
    """A command as a process of its own, whose output is piped."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONIOENCODING", "PYTHONUTF8")}
    command = [sys.executable, "-m", "gravlens.cli", *words]
    return subprocess.Popen(
        command, env={**kept, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "ascii:strict"}, POSIX])
def test_a_process_in_an_ascii_locale_shows_its_help(environment: dict[str, str]) -> None:
    said, failed = process(["block", "--help"], **environment).communicate(timeout=60)
    assert b"Usage" in said and said.isascii() and failed == b""


def test_a_reader_that_closes_the_pipe_ends_a_command_in_silence(history: Path) -> None:
    for words in (["--help"], ["inspect", str(history)]):
        running = process(words)
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()  # as `| true` does, before anything is written
        told = running.stderr.read().decode()
        running.stderr.close()
        running.wait(timeout=60)
        assert "Traceback" not in told and "Error" not in told and "gravlens:" not in told, told
