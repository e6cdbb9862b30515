"""Each command on a narrow terminal, with long paths: the verdict first, no word broken, nothing past the edge."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from histories import history_on_disk
from rich.console import Console
from typer.testing import CliRunner

from gravlens import claims
from gravlens.activations.residuals import cache_residuals
from gravlens.cli import app, output, verdict
from gravlens.history.sequence import ModelSequence

WIDTH = 80
BORDERS = re.compile("[┏┓┗┛┡┩┠┨├┤└┘┌┐┳┻╇┴┬━─┃│╋┼]")
FIRST = {
    "inspect": "witness, anchor, 2 runs (seed0: steps 1, 5, 20; ",
    "plan": "about ",
    "locate": "v_rev is defined at 3 of 3 layers: longest at layer ",
    "trajectory": "seed0 moved ",
    "ablate": "refusal does",
    "block": "by step 2 the blocked run moved ",
    "audit": "What is there is ",
    "report": "Level 2 of 5. ",
    "store list": "0.",
    "store verify": "no corrupt files",
    "store prune": "2 files would be deleted",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("screen") / "experiments" / "a-study-of-reversion-with-a-long-name" / "checkpoints"
    found.mkdir(parents=True)
    history_on_disk(found)
    runs = "".join(f'seed{seed} = "ft/seed{seed}/checkpoint-*"\n' for seed in (0, 1))
    ends = 'witness = "base"\nanchor = "aligned"\nprobes = "probes.jsonl"\nheld_out = "held_out.jsonl"\n'
    (found / "SEQUENCE.toml").write_text(f"{ends}[runs]\n{runs}")
    history = ModelSequence.from_toml(found / "SEQUENCE.toml")
    for prompts in (history.probes, history.held_out):
        cache_residuals(history, prompts, store=found / "states")
    said = "Alignment with v_rev is observed beyond weight noise of the same size, " + "and more is said " * 9
    claim = {"organism": "mine", "level": 2, "statement": said, "setting": "α = .05.", "sentence": said, "demands": []}
    (found / "results.json").write_text(json.dumps({"claims": [claim]}))
    return found


def words_of(command: str, folder: Path) -> list[str]:
    own = {
        "plan": ["--peak-flops", "1e12", "--disk-gbps", "1"],
        "ablate": ["--n-random", "2"],
        "block": ["--data", folder / "data.jsonl", "--out", folder / "blocked", "--steps", "2", "--layer", "1"],
        "audit": ["--plan"],
        "store prune": ["--dry-run"],
    }.get(command, [])
    of = {"report": folder}.get(command, folder / ("states" if command.startswith("store") else "SEQUENCE.toml"))
    return [*command.split(), str(of), *map(str, own)]


def screen(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    """Lines of a command on a terminal of that width; 0: in a pipe."""
    for module in (output, verdict):
        monkeypatch.setattr(
            module, "console", Console(width=width or None, force_terminal=bool(width), no_color=True, emoji=False)
        )
    result = CliRunner().invoke(app, words_of(command, folder))
    assert result.exit_code == 0, (result.output, result.exception)
    return re.sub(r"\x1b\[[0-9;]*m", "", result.stdout).splitlines()


def is_end(word: str, paths: set[str]) -> bool:
    """Whether a word is `…` and the end of a path, cut at a separator, or the beginning of a digest."""
    if word.startswith("…/"):
        return any(path.endswith(word[1:]) for path in paths)
    return len(word) == 12 and any(re.fullmatch(r"[0-9a-f]{32,64}", path) and path.startswith(word) for path in paths)


@pytest.mark.parametrize("width", [WIDTH, 60])
@pytest.mark.parametrize("command", FIRST)
def test_the_verdict_comes_first_and_no_word_is_broken(
    command: str, width: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "audit":  # its times are measured anew by each call
        made = claims.planning.plan_audit([folder / "SEQUENCE.toml"], rng=np.random.default_rng(0))
        monkeypatch.setattr(claims.planning, "plan_audit", lambda *_, **__: made)
    shown, piped = (screen(command, folder, monkeypatch, at) for at in (width, 0))
    assert shown[0].startswith(FIRST[command]) and piped[0].startswith(FIRST[command]), shown[0]
    # a path that is longer than the screen is in one piece: it is there to be copied
    assert [line for line in shown if len(line) > width and str(folder) not in line] == [], "\n".join(shown)
    whole = {word for line in piped for word in BORDERS.sub(" ", line).split()}
    seen = {word for line in shown if not line.startswith("not shown") for word in BORDERS.sub(" ", line).split()}
    known = whole | set("not shown at this width, but in --json:".split())
    broken = {word for word in seen - known if not is_end(word, whole) and not _of_a_list(word)}
    assert broken == set(), "\n".join(shown)


@pytest.mark.parametrize("command", FIRST)
def test_the_help_has_full_lines(command: str) -> None:
    """No line of its prose ends although the next word had room."""
    told = CliRunner().invoke(app, [*command.split(), "--help"], terminal_width=WIDTH, env={"COLUMNS": str(WIDTH)})
    prose = [line.strip() for line in told.stdout.partition("╭")[0].splitlines()]
    assert "Usage:" in told.stdout and len(prose) > 4
    following = [(line, after.split()[0]) for line, after in pairwise(prose) if line and after]
    assert [line for line, word in following if len(line) + 1 + len(word) <= WIDTH - 3] == []


def _of_a_list(word: str) -> bool:
    return word.rstrip(",") in {
        "files",
        "states",
        "layers",
        "prompts",
        "used",
        "digest",
        "cosine",
        "ablated",
        "probes",
        "step",
    }


@pytest.mark.parametrize("command", ["inspect", "store list"])
def test_paths_keep_their_end_on_a_terminal_and_are_whole_in_a_pipe(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, piped = (screen(command, folder, monkeypatch, at) for at in (WIDTH, 0))
    assert sum("…/seed0/checkpoint-20 " in line or "…/ft/seed0/checkpoint-20 " in line for line in shown) == 1
    assert sum(f"{folder}/ft/seed0/checkpoint-20 " in line for line in piped) == 1
    assert not any("…" in line or "not shown" in line for line in piped)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def lines(width: int, *table: Any, **options: Any) -> list[str]:
        monkeypatch.setattr(output, "console", Console(width=width, force_terminal=True, no_color=True))
        output.print_table(*table, **options)
        return [line for line in capsys.readouterr().out.splitlines() if not re.match("[┏┡└]", line)]

    return lines


def test_numbers_and_units_stay_together(printed: Any) -> None:
    row = ("-0.14 [-0.32, +0.05]", "-0.38 to +0.14", "digests 0.002 s, opening 0.002 s, passes 18.4 kB", "0.2 ± 0.1")
    told = "\n".join(printed(60, ("difference [95 %]", "random directions", "time", "mean"), [row]))
    assert all(text in told for text in (row[0], row[1], "0.002 s", "18.4 kB", row[3])), told
    assert "difference" in told and "[95 %]" in told


def test_columns_of_least_worth_go_first_and_are_told(printed: Any) -> None:
    columns, row = ("run", "digest", "distance", "remark"), ("seed0", "0123456789ab", "12.5", "")
    assert "remark" not in "".join(printed(80, columns, [row], least=("digest", "remark"))), "an empty one"
    told = printed(30, columns, [row], least=("digest", "remark"))
    assert "0123456789ab" not in "".join(told) and "12.5" in "".join(told)
    assert " ".join(told[2:]) == "not shown at this width, but in --json: digest"
    assert "seed0" in "".join(printed(5, columns, [row])), "wider than the screen, and whole"


def test_an_error_is_wrapped_by_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "Layer 12 is out of range: this model has layers 0 to 4. Layers are whole numbers. Try: --layer 4, or another."
    )
    for terminal in (False, True):
        monkeypatch.setattr(output, "messages", Console(width=60, force_terminal=terminal, no_color=True, stderr=True))
        output.print_error(text)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err).splitlines()
        assert " ".join(lines) == f"gravlens: {text}" and (len(lines) > 1) == terminal
        assert not terminal or max(map(len, lines)) <= 60


def test_tiny_models_are_those_of_the_history(folder: Path) -> None:
    """The control of the tests above: there are paths to cut, and more layers than one."""
    assert len(str(folder)) > WIDTH - 30 and tiny.LAYERS == 3
