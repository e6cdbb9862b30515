"""Comparing arms: rows against what was measured, the cost against the unblocked run of the same seed."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small
from histories import refused

from gravlens.directions.vrev import locate_vrev
from gravlens.organisms.arms import core_arms, further_arms, made_by
from gravlens.organisms.base import Arm
from gravlens.plot.lines import plot_frontier
from gravlens.studies import experiment
from gravlens.studies.comparison import COLUMNS, compare_arms, compare_layers, orderings
from gravlens.studies.experiment import carry_out
from gravlens.studies.study import Study
from gravlens.training.recipe import Recipe

pytestmark = pytest.mark.long

ORGANISM = small.Short(**{**small.PLAN, "recipe": Recipe(4, 4, 1e-3), "save_steps": (1, 4), "noise_draws": 2})
ARMS = (
    Arm("unblocked", (0, 1)),
    Arm("clamp", (0, 1), blocker=made_by("clamp")),
    Arm("projection", (0,), blocker=made_by("projection")),
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "processes", small.inline)
        return carry_out({"one": ORGANISM}, tmp_path_factory.mktemp("cache"), arms=ARMS)["one"]


@pytest.fixture(scope="module")
def table(study: Study) -> pd.DataFrame:
    return compare_arms(study, ARMS, organism="tiny")


def test_there_is_a_row_a_run_with_the_issue_s_columns_first(table: pd.DataFrame) -> None:
    assert tuple(table.columns[: len(COLUMNS)]) == COLUMNS
    assert table[["blocker", "run"]].to_numpy().tolist() == [
        ["unblocked", 0], ["unblocked", 1], ["clamp", 0], ["clamp", 1], ["projection", 0],
    ]  # fmt: skip
    assert (table.organism == "tiny").all() and (table.data == "harmless").all()


def test_a_row_is_what_was_measured(study: Study, table: pd.DataFrame) -> None:
    row = table.iloc[3]
    facts = study.facts(ARMS[1], 1)
    behavior = facts["behavior"]["4"]
    assert row.task_loss == behavior["task_loss"] and row.kl == behavior["kl_anchor_harmless"]
    plain = study.facts(ARMS[0], 1)["seconds_per_step"]
    assert row.step_cost_ratio == pytest.approx(facts["seconds_per_step"] / plain)
    assert (table[table.blocker == "unblocked"].step_cost_ratio == 1).all()
    measured = study.states("measured", "held_out").of("anchor").mean(0)
    drift = study.states("runs/clamp/seed1", "held_out").of("clamp-1/4").mean(0) - measured
    vs = locate_vrev(study.states("measured", "probes")).at(ORGANISM.layers_in_mean)
    fractions = [float(drift[v.layer] @ v.vector) / v.distance for v in vs]
    assert row.fraction_heldout == pytest.approx(np.mean(fractions), rel=1e-3)


def test_a_projection_holds_its_probes_at_every_saved_step(table: pd.DataFrame) -> None:
    held = table[table.blocker == "projection"].largest_fraction_given.item()
    free = table[table.blocker == "unblocked"].largest_fraction_given.min()
    assert held <= 1e-3 < free


def test_layers_are_those_of_every_run(study: Study) -> None:
    layers = compare_layers(study, ARMS, organism="tiny")
    assert set(layers.blocker) == {"unblocked", "clamp", "projection"}
    assert set(layers.layer.dropna()) == {0, 1, 2} and set(layers.prompts) == {"given", "held_out"}
    assert set(layers.step) == {1, 4} and set(layers[layers.blocker == "clamp"].run) == {0, 1}


def test_runs_that_are_not_there_yet_are_left_out(study: Study) -> None:
    arms = (*ARMS, Arm("late", (0, 1), blocker=made_by("clamp")), Arm("unblocked", (2,)))
    assert len(compare_arms(study, arms, organism="tiny")) == 5


def planted(harm: dict[str, list[float]]) -> pd.DataFrame:
    rows = [
        {"blocker": b, "organism": "o", "run": run, "compliance_rate": h, "fraction_heldout": h / 2, "task_loss": 1 + h}
        for b, values in harm.items()
        for run, h in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_the_words_say_in_how_many_runs() -> None:
    table = planted({"unblocked": [0.8, 0.6, 0.4], "held": [0.1, 0.2, 0.3], "pushed": [0.9, 0.9, 0.3]})
    held, pushed = orderings(table)
    assert held.startswith("held: harm lower in 3 of 3 runs (-0.40), |fraction| lower in 3 of 3 runs (-0.20)")
    assert pushed.startswith("pushed: harm higher in 2 of 3 (+0.10)")
    assert held.endswith(f"task loss {np.mean([1.1 / 1.8, 1.2 / 1.6, 1.3 / 1.4]) - 1:+.1%}")


def test_arms_have_names_of_their_own_and_a_twin_of_each_kind() -> None:
    arms = core_arms((0, 1), "given_answers") + core_arms((0, 1), "own_answers", "_own_answers")
    names = [arm.name for arm in arms + further_arms((0,), "given_answers", (1, 2))]
    assert len(set(names)) == len(names)
    assert {"clamp_matched_twin", "clamp_isotropic_twin", "projection_matched_twin", "reinforce"} <= set(names)
    made = next(arm for arm in arms if arm.name == "clamp_matched_twin").blocker
    assert made is not None and made.keywords == {"kind": "clamp", "along": "matched_twin"}  # pyright: ignore


def test_the_frontier_has_a_point_for_each_blocker_where_its_means_are(tmp_path: Path) -> None:
    table = planted({"unblocked": [0.8, 0.6], "held": [0.1, 0.3], "random_twin": [0.7, 0.5]})
    ax = plot_frontier(table, twins=["random_twin"])
    points = {one.get_label(): one for one in ax.containers}
    assert list(points) == ["1  unblocked", "2  held", "3  random twin"]
    line = points["2  held"][0]
    assert (line.get_xdata()[0], line.get_ydata()[0]) == pytest.approx((1.2, 0.2))
    ax.figure.savefig(tmp_path / "frontier.png")
    with refused("no column compliance_rate"):
        plot_frontier(table.drop(columns="compliance_rate"))
