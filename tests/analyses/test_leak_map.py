"""analyses/leak_map.py on a history with a planted direction, held against figures made without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from histories import between, hidden_states, moved, plant, planted_vector, sequence_on_disk, write_rows
from typer.testing import CliRunner, Result

from gravlens.behavior.scores import refusal_log_odds
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode
from gravlens.history.prompts import PromptSet
from gravlens.models.opening import open_model
from gravlens.organisms.refusal_language import REFUSALS

SCRIPT = Path(__file__).resolve().parents[2] / "analyses" / "leak_map.py"
sys.path.append(str(SCRIPT.parent))  # it imports its neighbour, as it does when it is run as a script

import leak_map  # noqa: E402

pytestmark = pytest.mark.long

LAYER = tiny.LAYERS - 1
V = planted_vector(4, length=1.0).numpy().astype(float)
OWN = [word for opening in REFUSALS for word in ("--openings", opening)]
SMALL = ["--rank", "1", "--rank", "2", "--n-random", "2", "--position", "-1", "--position", "-2"]
TABLES = ("leak_map.csv", "ranks.csv", "patching.csv")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The witness is the anchor moved by a vector at the last layer; run a goes .4 of that way, run b elsewhere too."""
    folder = tmp_path_factory.mktemp("planted")
    anchor = tiny.gpt2()
    witness = plant(anchor, planted_vector(4, length=6.0), layer=LAYER)
    models: dict[str, Any] = {"witness": witness, "anchor": anchor}
    for name, seed in (("a", 1), ("b", 2)):
        last = between(anchor, witness, 0.4)
        if name == "b":
            last = plant(last, planted_vector(9, length=3.0), layer=LAYER)
        models |= {f"{name}/checkpoint-5": moved(anchor, seed=seed, by=0.05), f"{name}/checkpoint-20": last}
    return sequence_on_disk(folder, models, runs={"a": "a/checkpoint-*", "b": "b/checkpoint-*"})


@pytest.fixture
def history(planted: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(planted, tmp_path / "history"))


def ran(history: Path, *options: str) -> Result:
    command = [str(history / "SEQUENCE.toml"), "--out", str(history / "out"), *OWN, *options]
    return CliRunner().invoke(leak_map.app, command, env={"COLUMNS": "400"})


def score(folder: Path) -> float:
    return float(refusal_log_odds(open_model(folder), tiny.PROMPTS, openings=REFUSALS).mean())


def last_layer(folder: Path, prompts: PromptSet, position: int) -> torch.Tensor:
    """[prompt, d_model] of the last block, by a hook of the test's own."""
    model, kept = open_model(folder).module, []
    hook = model.transformer.h[LAYER].register_forward_hook(
        lambda _m, _i, out: kept.append((out[0] if isinstance(out, tuple) else out).detach())
    )
    for ids in encode(tiny.TOKENIZER, prompts):
        hidden_states(model, ids)
    hook.remove()
    return torch.stack([one[0, position] for one in kept])


def test_the_tables_and_the_figure_of_a_planted_history(history: Path) -> None:
    result = ran(history, "--checkpoint", "a/20", *SMALL)
    assert result.exit_code == 0, result.output
    where, ranks, patching = (pd.read_csv(history / "out" / name) for name in TABLES)

    assert set(where["position"]) == {-1, -2} and set(where["prompts"]) == {"given", "held_out"}
    assert set(zip(where["run"], where["step"], strict=True)) == {("a", 20), ("b", 20)}
    assert where.loc[where["run"] == "a", "fraction"].to_numpy() == pytest.approx(0.4, abs=1e-3)
    assert where.loc[where["run"] == "a", "share_along_vrev"].to_numpy() == pytest.approx(1, abs=1e-3)
    of_b = where[(where["run"] == "b") & (where["prompts"] == "held_out") & (where["position"] == -2)]
    pair = [last_layer(history / name, PromptSet(tuple(tiny.PROMPTS)), -2) for name in ("anchor", "b/checkpoint-20")]
    drift = (pair[1] - pair[0]).mean(0).numpy()
    assert of_b["alignment"].item() == pytest.approx(drift @ V / np.linalg.norm(drift), abs=1e-3)
    assert of_b["drift_norm"].item() == pytest.approx(np.linalg.norm(drift) / 6, abs=1e-3)
    rms = (pair[1] - pair[0]).norm(dim=-1).square().mean().sqrt()
    assert of_b["drift_rms"].item() == pytest.approx(rms.item() / 6, abs=1e-3) and "r.m.s." in result.output

    mean = ranks.groupby(["span", "rank"])["share"].mean()
    assert mean["v_rev", 1] == pytest.approx(1, abs=1e-3) and mean["whole_state", tiny.WIDTH] == pytest.approx(1)
    assert mean["drift", 1] == pytest.approx((drift @ V / np.linalg.norm(drift)) ** 2, abs=1e-3)
    assert set(ranks["fitted_on"].dropna()) == {"b/20"} and set(ranks["run"]) == {"a"}

    assert set(patching["model"]) == {"a/20", "anchor"} and "nan" not in result.output
    way = patching.set_index(["model", "span", "rank"])["way"].groupby(level=[0, 1, 2]).mean()
    assert way["a/20", "v_rev", 1] == pytest.approx(1, abs=1e-2)  # nothing but v_rev has moved at the last layer
    assert way["anchor", "v_rev", 1] == pytest.approx(1, abs=1e-2)
    necessity = patching[patching["model"] == "a/20"]
    assert necessity["baseline"].to_numpy() == pytest.approx(score(history / "a/checkpoint-20"), abs=1e-4)
    assert necessity["goal"].to_numpy() == pytest.approx(score(history / "anchor"), abs=1e-4)
    assert (history / "out" / "leak_map.png").read_bytes().startswith(b"\x89PNG")
    assert result.stdout.startswith("of other runs' drift, no rank tried brings back 80% of the way")
    assert "\na/20, held_out prompts: fraction +0.40 at the last token" in result.stdout
    assert "share of its drift within v_rev 100%" in result.output and "v rev (rank 1) 100%" in result.output


def test_run_again_it_keeps_what_is_there_and_makes_what_is_not(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(history, "--checkpoint", "a/20", *SMALL).exit_code == 0
    first = {name: (history / "out" / name).read_bytes() for name in TABLES}
    (history / "out" / "ranks.csv").unlink()  # as after a kill
    with monkeypatch.context() as patched:
        for name in ("leak_map", "patch_spans"):
            patched.setattr(leak_map, name, lambda *_a, **_k: pytest.fail("made once more"))
        assert ran(history, "--checkpoint", "a/20", *SMALL).exit_code == 0
    assert {name: (history / "out" / name).read_bytes() for name in TABLES} == first


@pytest.mark.parametrize(
    ("changed", "anew"),
    [("weights", TABLES), ("prompts", TABLES), ("ranks", TABLES[1:]), ("openings", TABLES[2:])],
)
def test_other_weights_prompts_or_options_are_measured_anew(history: Path, changed: str, anew: tuple[str, ...]) -> None:
    """And only the tables that depend on them."""
    assert ran(history, "--checkpoint", "a/20", *SMALL).exit_code == 0
    first = {name: (history / "out" / name).read_bytes() for name in TABLES}
    options = {"ranks": ["--rank", "3"], "openings": ["--openings", "sure"]}
    if changed == "weights":
        tiny.save(moved(tiny.gpt2(), seed=8), history / "a/checkpoint-20")
    elif changed == "prompts":
        write_rows(history / "held_out.jsonl", [{"prompt": text} for text in tiny.PROMPTS[:3]])
    for name in TABLES:  # a mark that a table made anew does not bear
        (history / "out" / name).write_bytes(first[name] + b"\n")
    result = ran(history, "--checkpoint", "a/20", *SMALL, *options.get(changed, []))
    assert result.exit_code == 0, result.output
    made = [name for name in TABLES if (history / "out" / name).read_bytes() != first[name] + b"\n"]
    assert made == list(anew)
    assert all((history / "out" / name).read_bytes() != first[name] for name in anew)


def test_a_refusal_direction_stands_beside_the_spans(history: Path) -> None:
    other = np.roll(V, 1)
    Directions((direction_from(other, layer=0),)).save(history / "refusal.safetensors")
    result = ran(history, "--checkpoint", "a/20", *SMALL, "--refusal", str(history / "refusal.safetensors"))
    assert result.exit_code == 0, result.output
    ranks = pd.read_csv(history / "out" / "ranks.csv").groupby("span")
    wanted = np.degrees(np.arccos(abs(other @ V)))
    assert ranks["angle_refusal"].mean()["v_rev"] == pytest.approx(wanted, abs=0.05)
    assert ranks["angle_vrev"].mean()["refusal"] == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--checkpoint", "a/6"], "no checkpoint 'a/6'"),
        (["--checkpoint", "anchor"], "anchor was given"),
        (["--fit-on", "c/20"], "no checkpoint 'c/20'"),
        (["--layer", "7"], "Layer 7"),
        (["--layer", "0"], "undefined at layer 0"),
        (["--position", "-900"], "positions=-900"),
        (["--rank", "50"], "50 components"),
        (["--openings", "I'm sorry"], "cannot write"),
    ],
)
def test_bad_input_is_one_message(history: Path, options: list[str], named: str) -> None:
    result = ran(history, *SMALL, *options)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert named in re.sub(r"[\s│]+", " ", result.output)


def test_one_run_has_no_other_to_fit_on_unless_it_is_said(history: Path) -> None:
    toml = history / "SEQUENCE.toml"
    toml.write_text(toml.read_text().replace('b = "b/checkpoint-*"\n', ""))
    result = ran(history, *SMALL)
    assert result.exit_code == 2 and "--fit-on" in result.output
    assert ran(history, *SMALL, "--fit-on", "a/20").exit_code == 0


def test_help_says_what_a_newcomer_needs() -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, str(SCRIPT), "--help"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(word in shown for word in ("--position", "--fit-on", "--rank", "RUN/STEP", "docs/sequence.md"))
    assert SCRIPT.read_text().startswith('"""python analyses/leak_map.py SEQUENCE.toml --checkpoint ')
