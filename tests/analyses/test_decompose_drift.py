"""analyses/decompose_drift.py on a history with planted parts, whose shares are known in closed form."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from histories import between, moved, plant, planted_vector, sequence_on_disk, write_rows
from typer.testing import CliRunner, Result

from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from
from gravlens.interventions.readout import readout_openings
from gravlens.models.opening import open_model
from gravlens.organisms.refusal_language import REFUSALS

SCRIPT = Path(__file__).resolve().parents[2] / "analyses" / "decompose_drift.py"
sys.path.append(str(SCRIPT.parent))  # it imports its neighbour, as it does when it is run as a script

import decompose_drift  # noqa: E402

pytestmark = pytest.mark.long

LAYER = tiny.LAYERS - 1
V, W = (planted_vector(seed, length=1.0).numpy().astype(float) for seed in (4, 9))
C = V @ W
B = 2.4 * V + 3 * W  # run b's drift, and its update of the last block's bias
WORDS = ["--compliances", "sure", *(word for opening in REFUSALS for word in ("--openings", opening))]
SMALL = ["--components", "1", "--top", "3"]
TABLES = ("drift_parts", "ancestors", "update_parts", "readout")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The witness is the anchor moved by 6 V at the last layer; run a goes .4 of that way, run b 3 W further."""
    anchor = tiny.gpt2()
    witness = plant(anchor, planted_vector(4, length=6.0), layer=LAYER)
    models: dict[str, Any] = {"witness": witness, "anchor": anchor}
    for name, seed in (("a", 1), ("b", 2)):
        last = between(anchor, witness, 0.4)
        if name == "b":
            last = plant(last, planted_vector(9, length=3.0), layer=LAYER)
        models |= {f"{name}/checkpoint-5": moved(anchor, seed=seed, by=0.05), f"{name}/checkpoint-20": last}
    for name, sign, seed in (("opposite", -1, 4), ("other", 1, 9)):
        models[name] = plant(anchor, sign * planted_vector(seed, length=6.0), layer=LAYER)
    folder = tmp_path_factory.mktemp("planted")
    Directions((direction_from(-W, layer=LAYER),)).save(folder / "refusal.safetensors")
    return sequence_on_disk(folder, models, runs={"a": "a/checkpoint-*", "b": "b/checkpoint-*"})


@pytest.fixture
def history(planted: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(planted, tmp_path / "history"))


def ran(history: Path, *options: str) -> Result:
    command = [str(history / "SEQUENCE.toml"), "--out", str(history / "out"), *options]
    return CliRunner().invoke(decompose_drift.app, command, env={"COLUMNS": "400"})


def tables(history: Path) -> list[pd.DataFrame]:
    return [pd.read_csv(history / "out" / f"{name}.csv") for name in TABLES]


def at_the_end(table: pd.DataFrame, run: str) -> pd.DataFrame:
    return table[(table["run"] == run) & (table["step"] == 20)]


def test_the_tables_and_the_figure_of_a_planted_history(history: Path) -> None:
    ancestors = [str(history / name) for name in ("opposite", "other")]
    refusal = ["--refusal", str(history / "refusal.safetensors")]
    result = ran(history, *SMALL, *WORDS, *refusal, *(word for one in ancestors for word in ("--ancestor", one)))
    assert result.exit_code == 0, result.output
    drift, pulls, update, words = tables(history)

    assert set(drift["layer"]) == {LAYER} and set(drift["order"]) == {"v_rev, refusal", "refusal, v_rev"}
    share = {(o, p): s for o, p, s in at_the_end(drift, "b")[["order", "part", "share"]].itertuples(index=False)}
    first, beyond = (2.4 + 3 * C) ** 2, 9 * (1 - C**2)
    assert share["v_rev, refusal", "v_rev"] == pytest.approx(first / (B @ B), abs=1e-4)
    assert share["v_rev, refusal", "refusal"] == pytest.approx(beyond / (B @ B), abs=1e-4)
    assert share["refusal, v_rev", "refusal"] == pytest.approx((3 + 2.4 * C) ** 2 / (B @ B), abs=1e-4)
    assert share["refusal, v_rev", "v_rev"] == pytest.approx(2.4**2 * (1 - C**2) / (B @ B), abs=1e-4)
    of_a = at_the_end(drift, "a")
    assert of_a[of_a["order"].str.startswith("v_rev")]["share"].to_numpy() == pytest.approx([1, 0, 0, 0], abs=1e-4)

    # Of two collinear ancestors only the difference is determined; rounding shares it out, another way on each machine.
    for run, other in (("a", 0), ("b", 0.5)):
        found = at_the_end(pulls, run).set_index("witness")["coefficient"]
        assert found["witness"] - found[ancestors[0]] == pytest.approx(0.4, abs=1e-4)
        assert found[ancestors[1]] == pytest.approx(other, abs=1e-4)
    assert pulls["condition"].min() > 1e3  # the opposite one is collinear with the witness

    whole: Any = update[update["tensor"] == "all"].set_index("checkpoint")
    assert set(whole.index) == {"a/5", "a/20", "b/5", "b/20"}
    assert whole.loc["a/20", ["cosine", "fraction"]].to_numpy() == pytest.approx([1, 0.4], abs=1e-4)
    assert whole.loc["b/20", "share_parallel"] == pytest.approx(first / (B @ B), abs=1e-4)
    assert whole.loc["b/20", "norm"] == pytest.approx(np.linalg.norm(B), abs=1e-4)
    assert abs(whole.loc["a/5", "cosine"]) < 0.1

    assert list(words.groupby("direction").size()) == [6, 6] and set(words["layer"]) == {LAYER}
    anchor, direction = open_model(history / "anchor"), direction_from(V, layer=LAYER)
    wanted = readout_openings(anchor, direction, refusals=REFUSALS, compliances=["sure"])
    of_vrev = words[words["direction"] == "v_rev"]
    assert of_vrev["refusals_minus_compliances"].to_numpy() == pytest.approx(wanted, abs=1e-4)
    assert (history / "out" / "decompose_drift.png").read_bytes().startswith(b"\x89PNG")
    assert "drift: v_rev " in result.output and "drift: refusal " in result.output and "nan" not in result.output
    assert f"v_rev of layer {LAYER} raises {of_vrev['token'].iloc[0]!r}" in result.output


def test_without_a_refusal_direction_there_is_one_order_and_with_harmless_prompts_there_are_two(history: Path) -> None:
    result = ran(history, *SMALL, "--checkpoint", "b/20", "--max-prompts", "3")
    assert result.exit_code == 0, result.output
    drift, pulls, update, words = tables(history)
    assert set(drift["order"]) == {"v_rev"} and set(drift["part"]) == {"v_rev", "top_components", "rest"}
    assert set(pulls["witness"]) == {"witness"} and set(update["checkpoint"]) == {"b/20"}
    assert words["refusals_minus_compliances"].isna().all() and "refusals minus" not in result.output

    write_rows(history / "harmless.jsonl", [{"prompt": text} for text in tiny.PROMPTS[:3]])
    toml = history / "SEQUENCE.toml"
    toml.write_text(f'harmless = "harmless.jsonl"\n{toml.read_text()}')
    result = ran(history, *SMALL, "--checkpoint", "b/20")
    assert result.exit_code == 0, result.output
    assert set(tables(history)[0]["order"]) == {"v_rev, refusal", "refusal, v_rev"}
    means = pd.read_csv(history / "out" / "drift_parts_layer_mean.csv")
    for table, places in ((tables(history)[0], ["run", "step", "layer"]), (means, ["run", "step"])):
        assert table.groupby(["order", *places])["share"].sum().to_numpy() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--checkpoint", "a/6"], "no checkpoint 'a/6'"),
        (["--layer", "7"], "Layer 7"),
        (["--layer", "0"], "undefined at layer 0"),
        (["--components", "500"], "500 components"),
        (["--ancestor", "nowhere"], "nowhere"),
        (["--ancestor", "anchor"], "ancestor 1 is undefined"),
        (["--compliances", "I can"], "cannot write"),
    ],
)
def test_bad_input_is_one_message(
    history: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], named: str
) -> None:
    monkeypatch.chdir(history)
    result = ran(history, *SMALL, *options)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert named in re.sub(r"[\s│]+", " ", result.output)


def test_a_history_without_runs_has_no_motion(history: Path) -> None:
    toml = history / "SEQUENCE.toml"
    toml.write_text(toml.read_text().split("[runs]")[0])
    result = ran(history, *SMALL)
    assert result.exit_code == 2 and "hold no run" in result.output


def test_help_says_what_a_newcomer_needs() -> None:
    shown = CliRunner().invoke(decompose_drift.app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(word in shown for word in ("--ancestor", "--refusal", "--components", "RUN/STEP", "docs/sequence.md"))
    assert SCRIPT.read_text().startswith('"""python analyses/decompose_drift.py SEQUENCE.toml ')
