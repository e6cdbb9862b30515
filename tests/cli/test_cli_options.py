"""Every command and option: environment variables, completion, help, exit codes, one line for each failure."""

import inspect
import json
import os
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import tiny
import typer
from click.testing import Result
from histories import plant, planted_vector, sequence_on_disk, write_rows
from typer.testing import CliRunner

from gravlens import __version__
from gravlens.cli import app, output
from gravlens.cli.output import BUILT_IN

HEAVY = {"torch", "transformers", "transformer_lens", "matplotlib", "pandas", "scipy"}
ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {"sequence": "S.toml", "what": "prompts", "folder": "states", "data": "d.jsonl", "out": "o"}
EXAMPLES = [{"prompt": prompt, "answer": "done"} for prompt in tiny.PROMPTS]


def leaves(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, under its words."""
    for name, inner in command.commands.items():
        yield from leaves(inner, *path, name) if hasattr(inner, "commands") else [((*path, name), inner)]


COMMANDS = dict(leaves(typer.main.get_command(app)))
OPTIONS = [
    (words, param)
    for words, leaf in COMMANDS.items()
    for param in leaf.params
    if param.param_type_name == "option" and param.name not in BUILT_IN
]
each_command = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
each_option = pytest.mark.parametrize(
    ("words", "param"), OPTIONS, ids=[f"{' '.join(words)} --{param.name}" for words, param in OPTIONS]
)


def gravlens(*arguments: Any) -> Result:
    return CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def failed(result: Result, *said: str, code: int = 2) -> None:
    """One line on stderr that says all of it and what to do, nothing on stdout, no traceback."""
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit | None) and result.stdout == ""
    last = result.stderr.splitlines()[-1] if result.stderr else ""
    assert last.startswith("gravlens: ") and "Try: " in last and "Traceback" not in result.stderr
    assert result.stderr.count("gravlens: ") == 1 and all(text in last for text in said), last


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A witness that is the anchor moved at layer 1, a run half of the way back, prompts and data."""
    folder = tmp_path_factory.mktemp("history")
    anchor = tiny.gpt2()
    shares = {"witness": 1.0, "anchor": 0.0, "ft/checkpoint-5": 0.5}
    sequence_on_disk(folder, {name: plant(anchor, share * planted_vector(), 1) for name, share in shares.items()})
    write_rows(folder / "data.jsonl", EXAMPLES)
    return folder


# -- environment variables ---------------------------------------------------------------------------------------------


def kind_of(leaf: Any, name: str) -> Any:
    """The type of a command's parameter, by its function."""
    hint = typing.get_type_hints(inspect.unwrap(leaf.callback))[name]
    if get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    return hint


def told(hint: Any) -> tuple[str, Any]:
    """A value for an environment variable of a type, and what it means."""
    if get_origin(hint) is Literal:
        choice = get_args(hint)[-1]
        return choice, choice
    values: dict[Any, tuple[str, Any]] = {
        bool: ("1", True),
        int: ("3", 3),
        float: ("0.25", 0.25),
        str: ("two words", "two words"),
        Path: ("some/where", Path("some/where")),
        list[int]: ("3 12", [3, 12]),
        list[str]: ("I am sorry, no|Never", ["I am sorry, no", "Never"]),
    }
    return values[hint]


def heard(words: tuple[str, ...], *arguments: str, given: str = "") -> dict[str, Any]:
    """What a command's function is called with; what it needs beside `given` is on the command line."""
    root = typer.main.get_command(app)
    leaf = dict(leaves(root))[words]
    needed = [param for param in leaf.params if param.required and param.name != given]
    line = [
        [REQUIRED[param.name]] if param.param_type_name == "argument" else [param.opts[0], REQUIRED[param.name]]
        for param in needed
    ]
    seen: dict[str, Any] = {}
    leaf.callback = lambda **values: seen.update(values)
    root.main(
        [*words, *(word for part in line for word in part), *arguments], prog_name="gravlens", standalone_mode=False
    )
    return seen


@each_option
def test_an_environment_variable_acts_as_its_option(
    words: tuple[str, ...], param: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "_".join(["GRAVLENS", *words, param.opts[0].removeprefix("--").replace("-", "_")]).upper()
    text, meant = told(kind_of(COMMANDS[words], param.name))
    if not param.required:
        assert heard(words)[param.name] != meant, "a value that shows nothing"
    monkeypatch.setenv(name, text)
    assert heard(words, given=param.name)[param.name] == meant
    assert f"[env var: {name}]" in gravlens(*words, "--help").output


def test_the_command_line_wins_and_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAVLENS_LOCATE_DTYPE", "bf16")
    assert heard(("locate",), "--dtype", "fp16")["dtype"] == "fp16" and heard(("locate",))["dtype"] == "bf16"
    monkeypatch.setenv("GRAVLENS_LOCATE_DTYPE", "")
    assert heard(("locate",))["dtype"] == "float32"
    assert heard(("ablate",), "--openings", "a|b", "--openings", "c")["openings"] == ["a|b", "c"]


def test_a_wrong_value_names_the_variable_that_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAVLENS_LOCATE_LAYER", "twelve")
    failed(gravlens("locate", "S.toml"), "--layer", "GRAVLENS_LOCATE_LAYER", "locate --help")


def test_variables_that_only_look_like_options_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUILT_IN:
        monkeypatch.setenv(f"GRAVLENS_{name.upper()}", "1")
    result = gravlens("report", "nowhere")
    failed(result, "results.json does not exist")
    assert "GRAVLENS_VERSION" not in gravlens("--help").output


# -- help, version, completion -----------------------------------------------------------------------------------------


@each_command
def test_help_fits_a_narrow_terminal_and_ends_with_an_example(words: tuple[str, ...]) -> None:
    shown = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, [*words, "--help"])
    assert shown.exit_code == 0 and max(map(len, shown.output.splitlines())) <= 80
    assert "…" not in shown.output, "nothing is cut short"
    example = " ".join(shown.output.split("Example: ")[1].split())
    assert example.startswith(f"gravlens {' '.join(words)}")
    given, leaf = re.findall(r"--[a-z-]+", example), COMMANDS[words]
    assert set(given) <= {opt for param in leaf.params for opt in param.opts}, "an example of options that there are"


@each_command
def test_every_option_explains_itself(words: tuple[str, ...]) -> None:
    for param in COMMANDS[words].params:
        assert param.help and param.help[-1] in ".)", param.name


def test_one_name_means_one_thing() -> None:
    kinds: dict[str, set[str]] = {}
    for words, param in OPTIONS:
        kinds.setdefault(param.opts[0], set()).add(str(kind_of(COMMANDS[words], param.name)))
    assert {name: kind for name, kind in kinds.items() if len(kind) > 1} == {}
    wanted = {"--json": len(COMMANDS), "--layer": 6, "--out": 6, "--device": 5, "--dtype": 5, "--prompts": 5}
    found = {name: sum(param.opts[0] == name for _, param in OPTIONS) for name in wanted}
    assert found == wanted


def test_version() -> None:
    result = gravlens("--version")
    assert (result.exit_code, result.stdout) == (0, f"gravlens {__version__}\n")


def python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRAVLENS_")}
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=ROOT, env={**environment, **variables}, capture_output=True, text=True, check=False
    )


def test_help_and_completion_load_nothing_heavy() -> None:
    """Or a tab would take seconds."""
    code = (
        "import json, sys, typer\nfrom gravlens.cli import app\n"
        f"for words in {[list(words) for words in COMMANDS]!r}:\n"
        "    typer.main.get_command(app).main([*words, '--help'], standalone_mode=False)\n"
        "print('\\n' + json.dumps(sorted(sys.modules)))"
    )
    loaded = json.loads(python("-c", code).stdout.splitlines()[-1])
    assert "gravlens.cli.interventions" in loaded and HEAVY.isdisjoint(loaded)


def test_completion_is_shown_and_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # the parent process need not be a shell
    shown = gravlens("--show-completion", "bash")
    assert shown.exit_code == 0 and "complete -o default" in shown.stdout and "_GRAVLENS_COMPLETE" in shown.stdout
    installed = python("-m", "gravlens.cli", "--install-completion", "bash", HOME=str(tmp_path))
    assert installed.returncode == 0 and list(tmp_path.rglob("gravlens*")), installed.stderr


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("gravlens tr", {"trajectory"}),
        ("gravlens locate --d", {"--dtype", "--device"}),
        ("gravlens store p", {"prune"}),
        ("gravlens block --kind c", {"clamp"}),
    ],
)
def test_commands_options_and_choices_are_completed(line: str, completed: set[str]) -> None:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    found = CliRunner().invoke(app, env={"_GRAVLENS_COMPLETE": "complete_bash", **words})
    assert set(found.stdout.split()) == completed


# -- docs/cli.md -------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def section(words: tuple[str, ...]) -> str:
    """What the page says of a command."""
    return PAGE.split(f"\n## `gravlens {' '.join(words)}`\n")[1].split("\n## ")[0]


def documented(words: tuple[str, ...], param: Any) -> str:
    """A parameter's row as it should stand on the page."""
    hint = kind_of(COMMANDS[words], param.name)
    value = "|".join(get_args(hint)) if get_origin(hint) is Literal else param.metavar or ""
    names = ", ".join(param.opts) if param.param_type_name == "option" else ""
    default = param.default if isinstance(param.default, list) else [param.default]
    shown = ", ".join(
        f"{one:g}" if isinstance(one, float) else str(one) for one in default if not (one is None or one is False)
    )
    cells = [f"`{f'{names} {value}'.strip()}`", "required" if param.required else shown, param.help]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@each_command
def test_the_page_has_every_command_with_every_option_and_no_other(words: tuple[str, ...]) -> None:
    wanted = [documented(words, param) for param in COMMANDS[words].params if param.name not in BUILT_IN]
    found = [line for line in section(words).splitlines() if line.startswith("| `")]
    assert found == wanted, "\n".join(wanted)


def test_the_page_has_no_command_that_there_is_not() -> None:
    assert re.findall(r"^## `gravlens (.*)`$", PAGE, re.MULTILINE) == [" ".join(words) for words in COMMANDS]


def test_the_exit_codes_of_the_page_are_those_of_the_command_line() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert codes == {0, output.CHECK_FAILED, output.BAD_INPUT, output.INTERRUPTED}


# -- failures ----------------------------------------------------------------------------------------------------------

OF_A_SEQUENCE = ["inspect", "plan", "locate", "trajectory", "ablate", "block"]


def asked_of(command: str, folder: Path, *more: Any) -> Result:
    """A command on a folder's SEQUENCE.toml, with what it needs."""
    needed = ["--data", folder / "data.jsonl", "--out", folder / "new"] if command == "block" else []
    return gravlens(command, folder / "SEQUENCE.toml", *needed, *more)


@pytest.mark.parametrize(("option", "given"), [("--layer", "two"), ("--keep", "-3")])
def test_a_wrong_number_is_shown(option: str, given: str, tmp_path: Path) -> None:
    failed(asked_of("trajectory", tmp_path, option, given), option, f"{given!r} should be")


@pytest.mark.parametrize("command", OF_A_SEQUENCE)
def test_a_sequence_that_is_none_is_one_line(command: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "data.jsonl", EXAMPLES)
    failed(asked_of(command, tmp_path), "SEQUENCE.toml", "There is no file")
    (tmp_path / "SEQUENCE.toml").mkdir()
    failed(asked_of(command, tmp_path), "SEQUENCE.toml", "Is a directory")
    (tmp_path / "SEQUENCE.toml").rmdir()
    (tmp_path / "SEQUENCE.toml").write_text("witness = [\n")
    failed(asked_of(command, tmp_path), "SEQUENCE.toml", "not valid TOML")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["plan", "locate", "trajectory", "ablate", "block"])
def test_a_layer_that_is_not_there_is_one_line(command: str, history: Path) -> None:
    failed(asked_of(command, history, "--layer", "3"), "Layer 3", "0 to 2")
    assert not (history / "new").exists()


@pytest.mark.parametrize("command", ["ablate", "block", "trajectory", "locate", "reproduce"])
def test_an_out_that_cannot_be_written_is_refused_before_any_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEQUENCE.toml is not even there."""
    (tmp_path / "file").write_text("")
    needed: list[Any] = {"reproduce": [], "block": ["S.toml", "--data", "d"]}.get(command, ["S.toml"])
    failed(gravlens(command, *needed, "--out", tmp_path / "file" / "below"), f"{tmp_path / 'file'} is not a folder")
    if command in ("trajectory", "locate"):
        failed(gravlens(command, *needed, "--out", tmp_path), "is a folder")
    else:
        failed(gravlens(command, *needed, "--out", tmp_path / "file"), "is not a folder")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    failed(gravlens(command, *needed, "--out", tmp_path / "new"), "is not writable")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_is_said_as_it_is(tmp_path: Path) -> None:
    failed(gravlens("locate", tmp_path / "[/red]" / ":bomb:.toml"), "[/red]/:bomb:.toml")


def test_both_kinds_of_layers_are_one_line(history: Path) -> None:
    failed(asked_of("ablate", history, "--layer", "1", "--all-layers"), "Both --layer and --all-layers")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "projection", "--strength", "3"], "--strength"),
        (["--kind", "clamp", "--margin", "0.1"], "--margin"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data", "."], "is a folder"),
        (["--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--layer", "0"], "undefined at layer 0"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "float3"], "float3"),
    ],
)
def test_block_checks_before_it_trains(options: list[str], said: str, history: Path) -> None:
    failed(asked_of("block", history, *options), said)
    assert not (history / "new").exists()


def test_words_that_the_vocabulary_lacks_are_one_line(history: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "words.jsonl", [{"prompt": "zyzzyva", "answer": "done"}] * 4)
    for command in ("ablate", "trajectory", "locate"):
        failed(asked_of(command, history, "--prompts", tmp_path / "words.jsonl"), "cannot encode", "zyzzyva")
    write_rows(tmp_path / "words.jsonl", [{"prompt": EXAMPLES[0]["prompt"], "answer": "zyzzyva"}] * 4)
    out = ["--out", tmp_path / "new", "--data", tmp_path / "words.jsonl"]
    failed(asked_of("block", history, *out), "cannot encode", "zyzzyva")
    failed(asked_of("ablate", history, "--openings", "zyzzyva"), "cannot write 'zyzzyva'", "--openings")


@pytest.mark.parametrize("content", ["{", "[]", '{"claims": 3}', '{"claims": [{"a": 1}]}', '{"alignment": [1]}'])
def test_a_results_file_that_is_none_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    failed(gravlens("report", tmp_path), "results.json", "gravlens reproduce --out")


def test_an_empty_folder_for_an_anchor_is_one_line(history: Path, tmp_path: Path) -> None:
    text = (history / "SEQUENCE.toml").read_text().partition("[runs]")[0]
    (tmp_path / "anchor").mkdir()
    for name in ("witness", "probes.jsonl", "held_out.jsonl"):
        (tmp_path / name).symlink_to(history / name)
    (tmp_path / "SEQUENCE.toml").write_text(text)
    failed(asked_of("locate", tmp_path), "no tokenizer and no config.json")


def test_plan_refuses_half_a_machine_and_odd_positions(history: Path) -> None:
    failed(asked_of("plan", history, "--disk-gbps", "2"), "--peak-flops")
    for odd in ("middle", "--2", "3", "²"):
        failed(asked_of("plan", history, f"--positions={odd}"))


@pytest.mark.parametrize(
    ("words", "module", "name"),
    [
        (["reproduce"], "gravlens.studies.audit", "audit"),
        (["fetch", "smollm2"], "gravlens.organisms.fetch", "fetch_smollm2"),
        (["report"], "gravlens.reporting.page", "write_report"),
        (["inspect", "S.toml"], "gravlens.studies.inspection", "inspect_sequence"),
        (["plan", "S.toml"], "gravlens.activations.cost", "plan_reading"),
        (["locate", "S.toml"], "gravlens.studies.inputs", "ends"),
        (["trajectory", "S.toml"], "gravlens", "cache_residuals"),
        (["ablate", "S.toml"], "gravlens.studies.ablation", "ablate_vrev"),
        (["block", "S.toml", "--data", "data.jsonl", "--out", "o"], "gravlens.studies.paired", "block_beside"),
        (["store", "list", "."], "gravlens.activations.store", "list_store"),
        (["store", "verify", "."], "gravlens.activations.store", "verify_store"),
        (["store", "prune", "."], "gravlens.activations.store", "check_store"),
    ],
)
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Interrupted"),
        (OSError(28, "No space left on device", "some/where"), 2, "some/where: No space left on device"),
        (OSError("no such\nmodel"), 2, "no such model"),
    ],
    ids=["interrupted", "full", "plain"],
)
def test_an_interruption_or_a_full_disk_is_one_line(
    words: list[str], module: str, name: str, error: BaseException, code: int, said: str,
    history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def interrupt(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(import_module(module), name, interrupt)
    words = [str(history / "SEQUENCE.toml") if word == "S.toml" else word for word in words]
    words = [str(history / word) if word == "data.jsonl" else word for word in words]
    failed(gravlens(*words), said, code=code)


def test_ctrl_c_ends_a_process_with_one_line_and_130() -> None:
    """The process interrupts itself at work; its handler is set first, since a background job inherits SIG_IGN."""
    code = (
        "import signal, types\nfrom gravlens import activations\nfrom gravlens.cli import app\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "work = lambda folder: signal.raise_signal(signal.SIGINT)\n"
        "activations.store = types.SimpleNamespace(verify_store=work)\n"
        "app(['store', 'verify', 'states'], prog_name='gravlens')"
    )
    process = python("-c", code)
    assert process.returncode == 130 and process.stdout == ""
    assert process.stderr.splitlines()[-1].startswith("gravlens: Interrupted") and "Traceback" not in process.stderr


def test_a_bug_is_no_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(import_module("gravlens.reporting.page"), "write_report", broken)
    result = gravlens("report")
    assert isinstance(result.exception, RuntimeError) and result.exit_code == 1


# -- JSON --------------------------------------------------------------------------------------------------------------


def parsed(result: Result) -> Any:
    """JSON alone on stdout, without NaN."""
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_of_what_a_history_holds(history: Path, tmp_path: Path) -> None:
    listed = parsed(asked_of("inspect", history, "--json"))
    assert [row["role"] for row in listed] == ["witness", "anchor", "seed0"] and listed[1]["cosine"] is None
    assert parsed(asked_of("plan", history, "--json", "--peak-flops", "1e12", "--disk-gbps", "1"))["checkpoints"] == 3
    out = tmp_path / "v.safetensors"
    result = asked_of("locate", history, "--json", "--out", out)
    vs = parsed(result)
    assert [row["layer"] for row in vs] == [0, 1, 2] and vs[1]["distance"] == pytest.approx(3, rel=1e-4)
    assert vs[0]["reliability"] is None and "noise" in vs[0]["undefined"] and vs[1]["undefined"] is None
    assert f"written to {out}" in result.stderr and out.exists()
    at = parsed(asked_of("locate", history, "--json", "--layer", "2", "--layer", "1"))
    assert [row["layer"] for row in at] == [1, 2] and at[0] == pytest.approx(vs[1])
    other = parsed(asked_of("locate", history, "--json", "--prompts", history / "held_out.jsonl"))
    assert other[1]["prompts"] != vs[1]["prompts"]


def test_json_of_a_trajectory_and_its_layers(history: Path, tmp_path: Path) -> None:
    result = asked_of("trajectory", history, "--json", "--out", tmp_path / "t.csv")
    (row,) = parsed(result)["runs"]
    assert (row["run"], row["step"]) == ("seed0", 5) and parsed(result)["prompts"] == "held_out"
    assert f"written to {tmp_path / 't.csv'}" in result.stderr
    (one,) = parsed(asked_of("trajectory", history, "--json", "--layer", "1"))["runs"]
    assert one["fraction"] == pytest.approx(0.5, abs=1e-3), "planted at layer 1"
    (same,) = parsed(asked_of("trajectory", history, "--json", "--prompts", history / "data.jsonl"))["runs"]
    assert same["fraction"] == pytest.approx(row["fraction"]), "the same prompts as held_out's"
    given = parsed(asked_of("trajectory", history, "--json", "--mean", "--prompts", history / "probes.jsonl"))
    (mean,) = given["mean"]
    assert given["prompts"] == "given" and (mean["step"], mean["fraction_count"]) == (5, 1)
    assert mean["fraction_sem"] is None and mean["fraction_mean"] == given["runs"][0]["fraction"]
    assert mean["fraction_mean"] != pytest.approx(row["fraction"])


def test_json_and_exit_codes_of_a_store(history: Path, tmp_path: Path) -> None:
    states = tmp_path / "states"
    assert asked_of("trajectory", history, "--store", states).exit_code == 0
    listed = parsed(gravlens("store", "list", states, "--json"))
    assert len(listed) == 4 and listed[-1]["prompts"] is None and all(row["used"] for row in listed)
    assert parsed(gravlens("store", "verify", states, "--json")) == {"corrupt": [], "unreadable": []}
    one = next((states / "states").rglob("*.safetensors"))
    one.write_bytes(one.read_bytes()[:-1] + b"?")
    broken = gravlens("store", "verify", states, "--json")
    assert broken.exit_code == 1 and json.loads(broken.stdout) == {"corrupt": [str(one)], "unreadable": []}
    assert gravlens("store", "verify", states).exit_code == 1
    dry = parsed(gravlens("store", "prune", states, "--dry-run", "--json"))
    assert str(one) in dry["files"] and dry["deleted"] is False and one.exists()
    assert parsed(gravlens("store", "prune", states, "--json")) == {**dry, "deleted": True} and not one.exists()
    failed(gravlens("store", "verify", tmp_path / "nowhere"), "nowhere")


def test_json_of_results_and_of_what_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = {"organism": "mine", "level": 2, "statement": "So.", "setting": "α.", "capped_by": "closure", "demands": []}
    claim |= {"sentence": "So. α."}
    (tmp_path / "results.json").write_text(json.dumps({"claims": [claim]}))
    assert parsed(gravlens("report", tmp_path, "--json")) == {
        "page": str(tmp_path / "report.html"),
        "claims": [claim],
    }
    results = {"claims": [claim], "closure": float("nan")}
    monkeypatch.setattr(import_module("gravlens.studies.audit"), "audit", lambda *_, **__: results)
    made = gravlens("reproduce", "--json", "--out", tmp_path)
    assert parsed(made) == {**results, "closure": None} and "report.html" in made.stderr
    monkeypatch.setattr(import_module("gravlens.organisms.fetch"), "fetch_smollm2", lambda: tmp_path)
    assert parsed(gravlens("fetch", "smollm2", "--json")) == {"model": str(tmp_path)}


# -- columns of prompt files -------------------------------------------------------------------------------------------


def test_a_column_is_the_same_as_a_file_of_its_prompts(history: Path, tmp_path: Path) -> None:
    texts = list(tiny.PROMPTS)[:4]
    write_rows(tmp_path / "plain.jsonl", [{"prompt": text} for text in texts])
    write_rows(tmp_path / "asked.jsonl", [{"prompt": "get the sponge", "asked": text} for text in texts])
    for command, more in (("plan", []), ("locate", ["--layer", "1"]), ("trajectory", ["--layer", "1"])):
        wanted = asked_of(command, history, *more, "--prompts", tmp_path / "plain.jsonl", "--json")
        found = asked_of(command, history, *more, "--prompts", tmp_path / "asked.jsonl", "--column", "asked", "--json")
        other = asked_of(command, history, *more, "--prompts", tmp_path / "asked.jsonl", "--json")
        assert wanted.exit_code == found.exit_code == 0, found.output
        if command != "plan":  # measured times differ
            assert json.loads(found.stdout) == json.loads(wanted.stdout) != json.loads(other.stdout)


@pytest.mark.parametrize("command", ["plan", "locate", "trajectory", "ablate", "block"])
def test_a_column_that_names_nothing_is_one_line(command: str, history: Path) -> None:
    failed(asked_of(command, history, "--column", "asked"), "--column asked", "--prompts")
    more = ["--prompts", history / "data.jsonl", "--column", "nowhere"]
    failed(asked_of(command, history, *more), "no column 'nowhere'", "prompt, answer")
    assert not (history / "new").exists()


@pytest.mark.parametrize(("columns", "said"), [("a,b,c", "--data-columns a,b,c"), ("a,b", "no column 'a' and no 'b'")])
def test_wrong_columns_of_training_data_are_one_line(columns: str, said: str, history: Path) -> None:
    failed(asked_of("block", history, "--data-columns", columns), said)
    assert not (history / "new").exists()
