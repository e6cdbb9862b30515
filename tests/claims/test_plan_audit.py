"""Plans: what a history has is counted, what is missing is the difference, and time is runs times seconds."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from histories import refused, sequence_on_disk

from gravlens.activations.cost import plan_reading
from gravlens.claims.planning import Plan, plan_audit
from gravlens.history.sequence import ModelSequence
from gravlens.stats.power_analysis import Design, Effects, needed, power


def folder_of(tmp_path: Path, *, runs: int = 2, controls: str = "") -> Path:
    models = {name: tiny.llama(i) for i, name in enumerate(("witness", "anchor", "other1", "other2"))}
    for name in [f"ft/run{i}" for i in range(runs)] + ["twin/run0", "stranger/run0", "clamp/run0", "push/run0", "r/1"]:
        models[f"{name}/checkpoint-20"] = tiny.llama(9)
    folder = sequence_on_disk(
        tmp_path, models, {f"run{i}": f"ft/run{i}/checkpoint-*" for i in range(runs)} or {"x": "none"}
    )
    path = folder / "SEQUENCE.toml"
    text = path.read_text() if runs else path.read_text().partition("[runs]")[0]
    path.write_text(text + controls)
    return path


CONTROLS = """
[controls]
strangers = ["other1", "other2"]
[controls.twins]
run0 = "twin/run0/checkpoint-*"
[controls.stranger_twins.other1]
run0 = "stranger/run0/checkpoint-*"
[controls.clamp]
run0 = "clamp/run0/checkpoint-*"
[controls.push]
run0 = "push/run0/checkpoint-*"
[controls.random.1]
directions = "random1.safetensors"
run0 = "r/1/checkpoint-*"
"""


def planned(sequences: Any, **changes: Any) -> Plan:
    return plan_audit(sequences, **{"rng": np.random.default_rng(0), **changes})


def rows(plan: Plan) -> pd.DataFrame:
    return plan.table.set_index(["level", "plan"])


def test_what_is_there_is_counted(tmp_path: Path) -> None:
    plan = planned(folder_of(tmp_path, controls=CONTROLS))
    assert plan.now == {
        "anchors": 1, "strangers": 2, "directions": 1, "runs": 2, "twins": 1, "clamp": 1, "push": 1, "released": 0,
        "stranger_twins": 1, "random": 1,
    }  # fmt: skip
    assert plan.table.level.tolist() == [2, 2, 3, 3, 4, 4, 5, 5]


def test_missing_runs_are_those_of_the_plan_less_those_that_are_there(tmp_path: Path) -> None:
    plan = planned(folder_of(tmp_path, controls=CONTROLS))
    alone = rows(plan).loc[(3, "one anchor")]
    wanted = needed(3, 0.8, rng=np.random.default_rng(0)).set_index("plan").loc["one anchor"]
    design = Design(1, wanted.runs, wanted.strangers, 0)
    # runs, their twins, and the strangers' twins, less 2, 1 and 1
    assert design.runs == 2 and alone.missing == 0 + (2 - 1) + (2 * wanted.strangers - 1)
    assert alone.strangers == wanted.strangers - 2 and alone.histories == 0
    several = rows(plan).loc[(4, "several anchors")]
    anchors, directions = (
        int(re.findall(rf"(\d+) {name}", several.needed)[0]) for name in ("anchors", "random directions")
    )
    assert several.histories == anchors - 1 and several.strangers == 0  # the further histories' witnesses serve
    assert several.missing == Design(anchors, 2, anchors - 1, directions).trained(4) - 2 - 1 - 1 - 1 - 1


def test_power_now_is_simulated_and_needs_every_arm(tmp_path: Path) -> None:
    path = folder_of(tmp_path, controls=CONTROLS)
    now = rows(planned(path)).power_now
    wanted = power(runs=2, strangers=2, directions=1, rng=np.random.default_rng(0)).set_index("level").power
    assert now[2, "one anchor"] == pytest.approx(wanted[2], abs=0.02) and wanted[2] > 0.9
    # 20 strangers' worth of power, and not the twins to go with them
    few = Effects(strangers=-1.0, stranger_closure=-1.0)
    assert rows(planned([path] * 6, effects=few)).power_now[3, "one anchor"] == 0
    assert power(anchors=6, runs=2, strangers=7, effects=few, rng=np.random.default_rng(0)).power[1] > 0.9


def test_a_history_without_runs_reaches_nothing_yet(tmp_path: Path) -> None:
    plan = planned(folder_of(tmp_path, runs=0))
    assert (plan.table.power_now == 0).all() and plan.now["runs"] == 0
    assert rows(plan).loc[(2, "one anchor")].missing == 2
    assert dict(plan.lines())["now"].startswith("anchors: 1, strangers: 0, directions: 0, runs: 0")


def test_several_histories_are_strangers_to_each_other(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    plan = planned([path, ModelSequence.of(path), path])
    assert (plan.now["anchors"], plan.now["strangers"], plan.now["runs"]) == (3, 2, 6)


# -- time --------------------------------------------------------------------------------------------------------------


def test_time_is_an_estimate_from_this_machine(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    plan = planned(path, steps=50, batch=4)
    forecast = plan_reading(path)
    passes = forecast.seconds["passes"] / forecast.checkpoints / forecast.prompts
    # 3 passes a step over 4 examples twice as long as a prompt; two measurements of one machine differ
    assert 50 * 4 * 6 * passes / 5 < plan.seconds < 50 * 4 * 6 * passes * 5
    assert "an estimate for 50 steps of 4 examples" in plan.basis
    assert plan.table.minutes.tolist() == pytest.approx((plan.table.missing * plan.seconds / 60).tolist())
    assert planned(path).basis.startswith("an estimate for 20 steps")  # those of the runs


def test_a_pilot_gives_effects_and_seconds(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    runs = {"organism": "a", "seed": [0, 1], "compliance_rate": [0.8, 1.0], "alignment_final": [0.3, 0.5]}
    arms = pd.DataFrame({**runs, "arm": "unblocked", "run": ["u-0", "u-1"], "seconds_per_step": [0.1, 0.3]})
    arms.to_csv(tmp_path / "arms.csv", index=False)
    plan = planned(path, effects=tmp_path)
    assert plan.seconds == pytest.approx(20 * 0.2) and "as recorded in the pilot" in plan.basis
    assert plan.effects.alignment == pytest.approx(0.4) and plan.effects.harm == pytest.approx(0.9)


def test_models_in_memory_have_a_plan_without_a_time() -> None:
    model = tiny.llama()
    given: dict[str, Any] = {"tokenizer": tiny.TOKENIZER, "probes": tiny.PROMPTS, "held_out": tiny.PROMPTS}
    plan = planned(ModelSequence.from_models(witness=model, anchor=model, runs={"a": {20: model}}, **given))
    assert np.isnan(plan.seconds) and plan.table.minutes.isna().all()
    assert "in memory" in plan.basis and dict(plan.lines())["a run to train"].startswith("not known")


# -- in words ----------------------------------------------------------------------------------------------------------


def test_lines_say_what_to_add(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    lasting = Effects(held=0.9)
    told = dict(planned(path, effects=lasting).lines())
    assert "enough as it is" in told["level 2"]
    causal = told["level 4"]
    assert causal.startswith("power 0% now; ") and "further histories to supply" in causal and "runs to train" in causal
    assert Effects().source in told["effects planned for"]
    durable = dict(planned(path).lines())["level 5"]  # on the organism the block does not outlast its release
    assert "no plan of the lists has 80% with these effects (0% at most)" in durable
    with refused("No history"):
        planned([])
