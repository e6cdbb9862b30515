"""The command line: errors are one message, help says what there is, and options become settings."""

import json
import re
import tomllib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import typer
from click.testing import Result
from histories import plant, planted_vector, write_rows
from typer.testing import CliRunner

import gravlens as gl
from gravlens.cli import app
from gravlens.cli.results import FIRST_REPORTED
from gravlens.directions.direction import Directions
from gravlens.organisms import pretrained as fetched
from gravlens.organisms.fetch import PromptFiles
from gravlens.organisms.pretrained import CHATML, Pretrained, inner_layers
from gravlens.organisms.refusal import RefusalOrganism
from gravlens.training.finetune import Recipe

COMMANDS = {
    "reproduce": (
        "--setting --quick --organisms --runs --out --model --harmful --harmless --workers --threads --full --json"
    ).split(),
    "fetch": ["smollm2", "prompts", "--json"],
    "report": ["--json"],
    "audit": (
        "--out --make --data --alignment-data --harmless --layer --runs --directions --steps --batch --learning-rate "
        "--lr --lora --openings --compliances --quick --full --plan --preregister --preregistration --workers "
        "--threads --json"
    ).split(),
    "inspect": ["--json"],
    "plan": "--prompts --column --layer --positions --device --dtype --workers --peak-flops --disk-gbps --json".split(),
    "locate": ["--layer", "--prompts", "--column", "--out", "--device", "--dtype", "--json"],
    "trajectory": "--layer --prompts --column --mean --out --figure --device --dtype --keep --store --json".split(),
    "ablate": (
        "--layer --all-layers --checkpoint --prompts --column --max-prompts --openings --compliances --n-random "
        "--twins --out --device --dtype --json"
    ).split(),
    "block": (
        "--data --data-columns --out --kind --strength --margin --layer --steps --batch --learning-rate --lr --lora "
        "--save-step --seed --only-blocked --prompts --column --device --dtype --json"
    ).split(),
    "store": [],
}


def gravlens(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *said: str) -> None:
    """One message on stderr that says all of it, nothing on stdout, no traceback, exit code 2."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit | None), "an error of gravlens got through"
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("gravlens: ") and result.stderr.count("\n") == 1
    assert "Try: " in result.stderr and all(text in result.stderr for text in said), result.stderr


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SEQUENCE.toml of a witness, an anchor that differs from layer 1 on, and a run half of the way back."""
    folder = tmp_path_factory.mktemp("history")
    anchor = tiny.gpt2()
    for name, share in {"base": 1.0, "aligned": 0.0, "ft/checkpoint-5": 0.5}.items():
        tiny.save(plant(anchor, share * planted_vector(), 1), folder / name)
    write_rows(folder / "probes.jsonl", [{"prompt": text} for text in tiny.PROMPTS])
    toml = 'witness = "base"\nanchor = "aligned"\nprobes = "probes.jsonl"\n[runs]\nseed0 = "ft/checkpoint-*"\n'
    (folder / "SEQUENCE.toml").write_text(toml)
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAVLENS_CACHE", str(tmp_path / "cache"))


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str) -> None:
    result = gravlens(command, "--help")
    assert result.exit_code == 0
    for option in COMMANDS[command]:
        assert option in result.output, option
    declared = {o for p in typer.main.get_command(app).commands[command].params for o in p.opts}  # pyright: ignore
    assert {option for option in declared if option.startswith("--")} <= {*COMMANDS[command], "--help"}


def test_help_names_every_command_and_is_shown_where_nothing_is_asked() -> None:
    for arguments in (["--help"], []):
        result = gravlens(*arguments)
        assert all(command in result.output for command in COMMANDS)
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)  # pyright: ignore


def test_the_entry_point_is_the_application() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["gravlens"].partition(":")
    assert getattr(import_module(module), name) is app


# -- plan --------------------------------------------------------------------------------------------------------------


def test_plan_tells_what_a_reading_costs_here_and_on_another_machine(history: Path) -> None:
    told = gravlens("plan", history / "SEQUENCE.toml")
    assert told.exit_code == 0 and all(word in told.stdout for word in ("3 × 6", "FLOP", "measured here", "digests"))
    named = [
        "--peak-flops",
        "1e12",
        "--disk-gbps",
        "1",
        "--workers",
        "3",
        "--layer",
        "0",
        "--layer",
        "2",
        "--positions",
        "-2",
    ]
    found = json.loads(gravlens("plan", history / "SEQUENCE.toml", "--json", *named).stdout)
    assert found["bytes_stored"] == 3 * 6 * 2 * tiny.WIDTH * 4 and found["machine"]["flops"] == 0.4e12
    assert found["workers"] == 3 and found["total"] == pytest.approx(sum(found["seconds"].values()))
    refused(gravlens("plan", history / "SEQUENCE.toml", "--peak-flops", "1e12"), "disk-gbps")
    refused(gravlens("plan", history / "SEQUENCE.toml", "--layer", "7"), "0 to 2")


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["locate", "inspect", "trajectory"])
@pytest.mark.parametrize(
    ("toml", "said"),
    [
        (None, ["There is no file", "SEQUENCE.toml"]),
        ("witness = ", ["SEQUENCE.toml", "not valid TOML"]),
        ("", ["witness", "anchor"]),
        ('witness = "nowhere"\nanchor = "nowhere"', ["nowhere", "does not exist"]),
        ('witness = "a"\nanchor = "a"\nruns = "a"', ['[runs]\\nseed0 = "ft/checkpoint-*"']),  # brackets are no markup
    ],
)
def test_a_bad_sequence_is_one_message(command: str, toml: str | None, said: list[str], tmp_path: Path) -> None:
    path = tmp_path / "SEQUENCE.toml"
    if toml is not None:
        path.write_text(toml)
    refused(gravlens(command, path), *said)


@pytest.mark.parametrize(("layer", "said"), [("3", "0 to 2"), ("-1", "0 to 2"), ("0", "undefined at layer 0")])
def test_a_layer_that_is_not_there_is_one_message(layer: str, said: str, history: Path) -> None:
    refused(gravlens("locate", history / "SEQUENCE.toml", "--layer", layer), said, layer)


def test_a_path_in_brackets_is_said_as_it_is(tmp_path: Path) -> None:
    refused(gravlens("locate", tmp_path / "[bold]" / "x.toml"), "[bold]")
    refused(gravlens("locate", tmp_path / "[/red]x.toml"), "[/red]x.toml")


def test_a_sequence_without_runs_has_no_trajectory(history: Path) -> None:
    toml = (history / "SEQUENCE.toml").read_text().partition("[runs]")[0]
    (history / "no_runs.toml").write_text(toml)
    refused(gravlens("trajectory", history / "no_runs.toml"), "no run")
    (history / "no_probes.toml").write_text(toml.replace("probes = ", "held_out = "))
    refused(gravlens("locate", history / "no_probes.toml"), "no probe prompts")


def test_a_real_model_wants_weights_and_prompts(tmp_path: Path, history: Path) -> None:
    refused(gravlens("reproduce", "--setting", "pretrained"), "No model", "gravlens fetch smollm2")
    asked = ["reproduce", "--setting", "pretrained", "--model", history / "base", "--out", tmp_path / "out"]
    refused(gravlens(*asked), "No prompts", "gravlens fetch prompts")
    refused(gravlens(*asked, "--harmful", history / "probes.jsonl"), "No prompts")
    gone = ["--harmful", tmp_path / "gone.jsonl", "--harmless", history / "probes.jsonl"]
    refused(gravlens(*asked, *gone), "gone.jsonl", "does not exist")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["reproduce", "--setting", "mystery"], ["fetch", "everything"], ["reproduce", "--organisms", "-1"], ["x"]],
)
def test_what_no_command_knows_is_a_usage_error(arguments: list[str]) -> None:
    result = gravlens(*arguments)
    refused(result, "--help")


# -- what the commands say ---------------------------------------------------------------------------------------------


def test_locate_shows_every_layer_and_writes_what_it_found(history: Path, tmp_path: Path) -> None:
    result = gravlens("locate", history / "SEQUENCE.toml", "--out", tmp_path / "[x].safetensors")
    assert result.exit_code == 0 and "noise" in result.stdout, result.output
    vs = Directions.load(tmp_path / "[x].safetensors")
    assert vs.layers == (0, 1, 2) and vs[1].distance == pytest.approx(3, rel=1e-4)
    assert float(vs[1].vector @ (planted_vector() / 3).numpy()) > 0.9999
    assert "3" in result.stdout and f"{vs[1].reliability:.3f}" in result.stdout
    assert "[x].safetensors" in result.stdout, "brackets are no markup"
    one = gravlens("locate", history / "SEQUENCE.toml", "--layer", "1", "--out", tmp_path / "one")
    assert one.exit_code == 0 and Directions.load(tmp_path / "one").layers == (1,) and "noise" not in one.stdout


def test_trajectory_shows_each_run_beside_random_drifts(history: Path) -> None:
    shown = gravlens("trajectory", history / "SEQUENCE.toml")
    assert shown.exit_code == 0 and "nan" not in shown.stdout and "±" not in shown.stdout
    told = json.loads(gravlens("trajectory", history / "SEQUENCE.toml", "--json").stdout)
    assert (told["layers"], told["prompts"], told["null"]) == ([1, 2], "given", "isotropic") and "mean" not in told
    (row,) = told["runs"]
    assert (row["run"], row["step"], row["judged"]) == ("seed0", 5, True)
    assert row["fraction"] == pytest.approx(0.5, abs=0.2) and row["above"] is (row["alignment"] > row["p99"])
    vectors = gl.locate_vrev(history / "SEQUENCE.toml").defined().vectors
    p99 = np.linalg.norm(vectors.mean(0)) * gl.nulls.isotropic_quantile(0.99, tiny.WIDTH)
    assert row["p99"] == pytest.approx(p99, rel=0.03), "one random drift for both layers, in closed form"
    numbers = " .* ".join(f"{row[name]:.3f}" for name in ("alignment", "p99", "fraction"))
    assert re.search(rf"seed0 .* 5 .* {numbers} ", shown.stdout)


def test_trajectory_averages_runs_on_request_and_only_where_their_steps_agree(history: Path, tmp_path: Path) -> None:
    text = (history / "SEQUENCE.toml").read_text()
    (history / "twice.toml").write_text(f'{text}seed1 = "ft/checkpoint-*"\n')
    found = gravlens("trajectory", history / "twice.toml", "--mean", "--figure", tmp_path / "runs.svg")
    assert found.exit_code == 0 and "mean ± SEM over runs" in found.stdout and "± 0.000" in found.stdout
    drawn = (tmp_path / "runs.svg").read_text()
    assert "mean ± SEM" in drawn and "runs.svg" in found.stdout
    plain = gravlens("trajectory", history / "twice.toml", "--json", "--figure", tmp_path / "plain.svg")
    assert [row["run"] for row in json.loads(plain.stdout)["runs"]] == ["seed0", "seed1"]
    named = (tmp_path / "plain.svg").read_text()
    assert "seed0" in named and "seed1" in named and "SEM" not in named and "p99" in named
    tiny.save(plant(tiny.gpt2(), 0.2 * planted_vector(), 1), history / "other" / "checkpoint-7")
    (history / "uneven.toml").write_text(f'{text}seed1 = "other/checkpoint-*"\n')
    refused(gravlens("trajectory", history / "uneven.toml", "--mean"), "different steps", "seed0: 5; seed1: 7")
    assert gravlens("trajectory", history / "uneven.toml").exit_code == 0


def test_report_writes_the_page_again_and_tells_the_claim(tmp_path: Path) -> None:
    claim = {"organism": "mine", "level": 2, "statement": "It is [so].", "setting": "α = .05.", "capped_by": "closure"}
    claim |= {"sentence": "It is [so]. α = .05.", "demands": []}
    (tmp_path / "results.json").write_text(json.dumps({"claims": [claim]}))
    result = gravlens("report", tmp_path)
    assert result.exit_code == 0 and "Level 2 of 5. It is [so]." in result.output
    assert "It is [so]." in (tmp_path / "report.html").read_text()


def test_report_of_a_folder_without_results_is_one_clear_error(tmp_path: Path) -> None:
    refused(gravlens("report", tmp_path), "results.json does not exist")


# -- options become settings -------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `reproduce` was asked for; nothing is computed."""
    seen: dict[str, Any] = {}

    def listen(settings: Any, out: Path, *, workers: int | None) -> dict[str, Any]:
        seen.update(settings=settings, out=out, workers=workers)
        demands = [
            {"level": 3, "name": f"it {word}", "holds": holds, "figures": "1 → 2"}
            for word, holds in {"rises": True, "falls": False, "rests": None}.items()
        ]
        said = {"statement": "A [statement] of it.", "setting": "α = .05.", "sentence": "A [statement] of it. α = .05."}
        claims = [{"organism": "organism4", "level": 3, **said, "demands": demands}]
        return {"setting": "refusal", "n_anchors": len(settings), "claims": claims}

    monkeypatch.setattr(import_module("gravlens.studies.audit"), "audit", listen)
    return seen


def ask(seen: dict[str, Any], *arguments: str | Path) -> dict[str, Any]:
    result = gravlens("reproduce", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return seen


def test_the_default_is_six_reported_organisms_and_quick_two(asked: dict[str, Any]) -> None:
    six, two = range(FIRST_REPORTED, FIRST_REPORTED + 6), range(FIRST_REPORTED, FIRST_REPORTED + 2)
    found = ask(asked)
    assert found["settings"] == {f"organism{seed}": RefusalOrganism(organism=seed) for seed in six}
    assert (found["out"], found["workers"]) == (Path("results"), None)
    assert list(ask(asked, "--quick")["settings"]) == [f"organism{seed}" for seed in two]


def test_the_options_of_the_organism(asked: dict[str, Any], tmp_path: Path) -> None:
    found = ask(asked, "--organisms", "3", "--quick", "--out", tmp_path, "--workers", "2")
    first = FIRST_REPORTED
    assert list(found["settings"]) == [f"organism{first + i}" for i in range(3)]
    assert [s.organism for s in found["settings"].values()] == [first, first + 1, first + 2]
    assert all((s.runs, s.noise_draws) == (2, 100) for s in found["settings"].values())
    assert (found["out"], found["workers"]) == (tmp_path, 2)
    assert ask(asked, "--runs", "9")["settings"][f"organism{first}"].runs == 9
    quick, slow = (ask(asked, *more)["settings"][f"organism{first}"] for more in (["--quick"], []))
    assert quick.key == slow.key, "a quick run's weights serve the full one"


def own(history: Path) -> Sequence[str | Path]:
    prompts = history / "probes.jsonl"
    return ["--setting", "pretrained", "--harmful", prompts, "--harmless", prompts]


def test_the_options_of_a_real_model(asked: dict[str, Any], history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(asked, *own(history), "--model", history / "base", "--runs", "3", "--threads", "2")
    (setting,) = found["settings"].values()
    prompts = history / "probes.jsonl"
    layers = inner_layers(history / "base")
    assert setting == Pretrained(history / "base", prompts, prompts, runs=3, threads=2, layers_in_mean=layers)
    monkeypatch.setattr(fetched, "inner_layers", lambda model: (3, 4))  # a hub is out of a test's reach
    (hub,) = ask(asked, *own(history), "--model", "hf://owner/name")["settings"].values()
    assert (hub.model, hub.runs, hub.chat_template, hub.layers_in_mean) == ("hf://owner/name", 1, None, (3, 4))
    (quick,) = ask(asked, *own(history), "--model", "hf://owner/name", "--quick")["settings"].values()
    assert (quick.alignment.steps, quick.noise_draws) == (40, 5) and isinstance(quick.alignment, Recipe)
    assert quick.key != hub.key


def test_fetched_weights_and_prompts_are_the_default(
    asked: dict[str, Any], history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = PromptFiles(*(tmp_path / name for name in ("harmful", "train", "harmless")))
    monkeypatch.setattr(fetched, "fetched_prompts", lambda: files)
    monkeypatch.setattr(fetched, "fetched_smollm2", lambda: history / "base")
    (setting,) = ask(asked, "--setting", "pretrained")["settings"].values()
    assert (setting.model, setting.chat_template) == (history / "base", CHATML)
    assert (setting.harmful, setting.harmful_train, setting.harmless) == (
        files.harmful,
        files.harmful_train,
        files.harmless,
    )
    (mixed,) = ask(asked, "--setting", "pretrained", "--harmful", history / "probes.jsonl")["settings"].values()
    assert (mixed.harmful, mixed.harmful_train) == (history / "probes.jsonl", None)
    assert mixed.harmless == files.harmless


def test_results_are_printed_with_every_verdict(asked: dict[str, Any], tmp_path: Path) -> None:
    assert "0.429 ± 0.052" not in gravlens("reproduce", "--out", tmp_path / "[x]").stdout
    shown = gravlens("reproduce", "--full", "--out", tmp_path / "[x]").stdout
    assert "0.429 ± 0.052" in shown and "not run" in shown
    rows = {word: re.search(rf"it {word} +│.*", shown) for word in ("rises", "falls", "rests")}
    assert all(rows.values()), shown
    said = {word: row.group() for word, row in rows.items() if row}
    assert "yes" in said["rises"] and "NO" in said["falls"] and "not run" in said["rests"]
    assert str(tmp_path / "[x]" / "report.html") in shown and asked["out"] == tmp_path / "[x]"
