"""`~` is the home folder wherever a path is taken, in Python, in files and on the command line."""

import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from histories import sequence_on_disk
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

import gravlens as gl
from gravlens.cli import app
from gravlens.cli.options import at_home
from gravlens.directions.direction import Subspaces
from gravlens.directions.vrev import direction_from
from gravlens.exchange import from_gguf, from_npz, from_steered, to_gguf, to_npz, to_steered
from gravlens.history.prompts import Example, PromptSet
from gravlens.interventions.orthogonalization import orthogonalize
from gravlens.models.opening import load_huggingface, load_tokenizer
from gravlens.reporting.page import read_results, write_report

VS = gl.Directions((direction_from(np.arange(1.0, tiny.WIDTH + 1), layer=1),))
STATES = gl.Residuals(np.zeros((1, 1, 1, 2), dtype=np.float32), ("anchor",), (0,), "x", {})
DIGEST = "0" * 64


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    sequence_on_disk(folder, {"witness": tiny.llama(0), "anchor": tiny.llama(1), "ft/checkpoint-1": tiny.llama(2)})
    text = (folder / "SEQUENCE.toml").read_text()
    (folder / "HOME.toml").write_text(text.replace('= "', '= "~/'))
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=tiny.VOCABULARY, **config)).save_pretrained(folder / "judge")
    tiny.TOKENIZER.save_pretrained(folder / "judge")
    (folder / "pilot").mkdir()
    runs = {"organism": "a", "seed": [0, 1], "compliance_rate": [0.8, 1.0], "alignment_final": [0.3, 0.5]}
    pd.DataFrame({**runs, "arm": "unblocked", "run": ["u-0", "u-1"]}).to_csv(folder / "pilot/arms.csv", index=False)
    (folder / "pilot/results.json").write_text('{"setting": "results", "claims": []}')
    return folder


@pytest.fixture(autouse=True)
def elsewhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def memory() -> Any:
    return gl.ModelSequence.from_models(
        witness=tiny.llama(0), anchor=tiny.llama(1), tokenizer=tiny.TOKENIZER, probes=tiny.PROMPTS
    )


def folders(kind: Callable[[str], Any]) -> Any:
    return gl.ModelSequence.from_folders(
        witness=kind("~/witness"), anchor=kind("~/anchor"), runs={"a": kind("~/ft/checkpoint-*")},
        probes=kind("~/probes.jsonl"), tokenizer=kind("~/anchor"),
    )  # fmt: skip


def preregistered() -> Any:
    return gl.claims.Preregistration((1,), 5, 0.05, DIGEST, DIGEST, "harm", date(2026, 1, 1))


READ: dict[str, Callable[[Callable[[str], Any]], Any]] = {
    "read_prompts": lambda at: gl.read_prompts(at("~/probes.jsonl")),
    "PromptSet.of": lambda at: PromptSet.of(at("~/probes.jsonl")),
    "ModelSequence.from_toml": lambda at: gl.ModelSequence.from_toml(at("~/SEQUENCE.toml")),
    "ModelSequence.of, its paths too": lambda at: gl.ModelSequence.of(at("~/HOME.toml")).require_probes(),
    "ModelSequence.from_folders": folders,
    "Checkpoint": lambda at: gl.open_model(gl.Checkpoint("x", at("~/anchor"))),
    "open_model": lambda at: gl.open_model(at("~/anchor")),
    "load_huggingface": lambda at: load_huggingface(at("~/anchor")),
    "load_tokenizer": lambda at: load_tokenizer(at("~/anchor")).get_vocab(),
    "a score": lambda at: gl.refusal_log_odds(at("~/anchor"), at("~/probes.jsonl"), openings=["get"]),
    "inspect_sequence": lambda at: gl.inspect_sequence(at("~/HOME.toml")),
    "classifier_judge": lambda at: gl.judges.classifier_judge(at("~/judge"), harmful_labels=["LABEL_1"]),
    "Effects.from_results": lambda at: gl.stats.Effects.from_results(at("~/pilot")),
    "write_report": lambda at: write_report(at("~/pilot")),
    "read_results": lambda at: read_results(at("~/pilot")),
}  # fmt: skip
WRITTEN: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], Any] | None]] = {
    "cache_residuals": ("~/out/store", lambda path: cached(path), None),
    "finetune": ("~/out/run", lambda path: trained(path), None),
    "Residuals": ("~/out/r.safetensors", STATES.save, gl.Residuals.load),
    "Direction": ("~/out/d.safetensors", VS[1].save, gl.Direction.load),
    "Directions": ("~/out/vs.safetensors", VS.save, gl.Directions.load),
    "Subspaces": ("~/out/s.safetensors", lambda path: spans().save(path), Subspaces.load),
    "gguf": ("~/out/v.gguf", lambda path: to_gguf(VS, path), from_gguf),
    "steered": ("~/out/v.pt", lambda path: to_steered(VS, path), from_steered),
    "npz": ("~/out/v.npz", lambda path: to_npz(VS, path), from_npz),
    "Preregistration": ("~/out/p.toml", lambda path: preregistered().write(path), gl.claims.Preregistration.from_toml),
    "save_figure": ("~/out/f.svg", lambda path: gl.plot.save_figure(figure(), path), None),
    "orthogonalize": ("~/out/model", lambda path: orthogonalize("~/anchor", VS[1], out=path), gl.open_model),
}  # fmt: skip


def cached(path: Any) -> Any:
    return gl.cache_residuals(gl.ModelSequence.of("~/HOME.toml"), store=path)


def trained(path: Any) -> Any:
    start, data = gl.open_model("~/anchor"), [Example(text, "get") for text in tiny.PROMPTS]
    return gl.finetune(start, data, out=path, recipe=gl.Recipe(steps=1, batch=2), save_steps=())


def spans() -> Subspaces:
    return Subspaces((gl.subspaces.span_of(VS[1].vector[None], layer=1, distance=1.0),))


def figure() -> Any:
    return Figure()


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", READ)
def test_a_path_that_is_read_may_begin_with_a_tilde(name: str, kind: Callable[[str], Any]) -> None:
    assert READ[name](kind) is not None


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_path_that_is_written_may_begin_with_a_tilde(
    name: str, kind: Callable[[str], Any], home: Path, elsewhere: Path
) -> None:
    given, write, read = WRITTEN[name]
    shutil.rmtree(home / "out", ignore_errors=True)
    write(kind(given))
    assert (home / given[2:]).exists() and not any(elsewhere.iterdir())
    if read is not None:
        assert read(kind(given)) is not None


@pytest.mark.parametrize(
    ("command", "made"),
    [
        (["locate", "~/HOME.toml", "--out=~/cli/vs.safetensors"], "cli/vs.safetensors"),
        (["trajectory", "~/HOME.toml", "--out=~/cli/t.csv", "--prompts=~/held_out.jsonl"], "cli/t.csv"),
        (["inspect", "~/HOME.toml"], ""),
        (["report", "~/pilot"], "pilot/report.html"),
        (["store", "list", "~/pilot"], ""),
    ],
)
def test_a_shell_may_leave_it_as_it_is(command: list[str], made: str, home: Path, elsewhere: Path) -> None:
    (home / made).unlink(missing_ok=True) if made else None
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0 or command[0] == "store", found.output
    assert "~" not in found.stderr and (home / made).exists() and not any(elsewhere.iterdir())


def test_an_output_is_checked_in_the_home_folder(home: Path) -> None:
    (home / "file").write_text("")
    found = CliRunner().invoke(app, ["locate", "~/HOME.toml", "--out=~/file/vs.safetensors"])
    assert found.exit_code == 2 and f"{home / 'file'} is not a folder" in found.stderr


def test_an_unknown_user_has_no_home_and_other_tildes_stay() -> None:
    for path in ("~nobody0/x", "a/~/b", "b~"):
        assert str(at_home(path)) == str(at_home(Path(path))) == path
