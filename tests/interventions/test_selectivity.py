"""Selectivity against scores that read one axis of the residual stream each, so that every number is known."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from histories import hooks_on, refused, synthetic

from gravlens.activations.residuals import read_residuals
from gravlens.directions.direction import Direction
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode
from gravlens.history.prompts import PromptSet
from gravlens.interventions.edits import Ablate, Steer
from gravlens.interventions.effects import measure_selectivity
from gravlens.models.opening import OpenModel

LAST = tiny.LAYERS - 1
LEANING = np.eye(tiny.WIDTH)[3] + np.eye(tiny.WIDTH)[4]
FIRST, OTHERS = tiny.PROMPTS[:4], tiny.PROMPTS


def reads(axis: int, *, times: float = 1.0) -> Callable[[OpenModel, PromptSet], np.ndarray]:
    """A score: one coordinate of the last layer's state."""

    def score(model: OpenModel, prompts: PromptSet) -> np.ndarray:
        return times * states(model, prompts)[:, axis]

    return score


def states(model: OpenModel, prompts: PromptSet) -> np.ndarray:
    return read_residuals(model, encode(tiny.TOKENIZER, prompts), layers=[LAST])[:, 0].double().numpy()


def along(axis: int, distance: float = 2.0) -> Direction:
    return direction_from(np.eye(tiny.WIDTH)[axis], layer=LAST, distance=distance)


@pytest.fixture(scope="module")
def llama() -> OpenModel:
    return tiny.opened("llama", Path())


MEASURES = {"refusal": (reads(3), FIRST), "task": (reads(7, times=1000), OTHERS)}


def test_effects_are_in_units_of_each_scores_spread(llama: OpenModel) -> None:
    table = measure_selectivity(llama, {"steer": Steer(along(3)), "ablate": Ablate(along(7))}, MEASURES, n_random=0)
    assert table["condition"].tolist() == ["steer", "steer", "ablate", "ablate"]
    assert table["measure"].tolist() == ["refusal", "task"] * 2 and table["n_prompts"].tolist() == [4, 6] * 2
    first, others = states(llama, FIRST)[:, 3], states(llama, OTHERS)[:, 7]
    np.testing.assert_allclose(table["spread"][:2], [first.std(ddof=1), 1000 * others.std(ddof=1)], rtol=1e-5)
    np.testing.assert_allclose(table["baseline"][:2], [first.mean(), 1000 * others.mean()], rtol=1e-5)
    wanted = [2 / first.std(ddof=1), 0, 0, -others.mean() / others.std(ddof=1)]
    np.testing.assert_allclose(table["effect"], wanted, atol=1e-5)
    assert (table["low"][:1] <= table["effect"][:1] + 1e-9).all() and table["low"][3] < wanted[3] < table["high"][3]
    np.testing.assert_allclose(table["margin"], [wanted[0], -wanted[0], wanted[3], -wanted[3]], atol=1e-5)
    assert table[["p_random", "p_margin", "random_low"]].isna().all(axis=None)


def test_the_margin_is_over_the_largest_of_the_others(llama: OpenModel) -> None:
    measures = {**MEASURES, "half": (lambda model, prompts: 0.5 * states(model, prompts) @ LEANING, OTHERS)}
    table = measure_selectivity(llama, {"steer": Steer(along(3))}, measures, n_random=0).set_index("measure")
    effect = table["effect"].abs()
    assert effect["half"] > 0.1 and effect["task"] < 1e-5
    np.testing.assert_allclose(table["margin"]["refusal"], effect["refusal"] - effect["half"], atol=1e-5)
    np.testing.assert_allclose(table["margin"]["task"], effect["task"] - max(effect["refusal"], effect["half"]))


def test_a_selective_direction_is_told_from_random_ones_and_an_unselective_is_not(llama: OpenModel) -> None:
    both = direction_from(np.eye(tiny.WIDTH)[3] + np.eye(tiny.WIDTH)[7], layer=LAST, distance=2.0)
    measures = {"refusal": (reads(3), OTHERS), "task": (reads(3, times=8), OTHERS)}
    selective = measure_selectivity(llama, {"it": Steer(along(3))}, MEASURES)
    assert selective["p_margin"][0] == 1 / 21 and selective["p_margin"][1] > 0.5
    assert selective["p_random"][0] == 1 / 21 and selective["random_high"][0] < selective["effect"][0]
    assert (selective["n_random"] == 20).all() and (selective["random_kind"] == "covariance_matched").all()
    isotropic = measure_selectivity(llama, {"it": Steer(along(3))}, MEASURES, states="isotropic", n_random=1)
    assert (isotropic["random_kind"] == "isotropic").all()
    # The same score twice, in other units: every draw moves both alike, if a draw is the same for both.
    alike = measure_selectivity(llama, {"it": Steer(both)}, measures)
    assert (alike["margin"] == 0).all() and (alike["p_margin"] == 1).all() and (alike["effect"] > 0).all()


def test_the_same_seed_gives_the_same_table_and_another_another(llama: OpenModel) -> None:
    ask = partial(measure_selectivity, llama, {"it": Ablate(along(3))}, MEASURES, n_random=3)
    pd.testing.assert_frame_equal(ask(), ask(seed=0))
    assert not np.allclose(ask()["random_low"], ask(seed=1)["random_low"])


def test_random_controls_may_come_from_a_covariance(llama: OpenModel) -> None:
    anchor = np.zeros((50, tiny.LAYERS, tiny.WIDTH))
    anchor[:, :, 3] = np.random.default_rng(0).standard_normal((50, tiny.LAYERS))
    states = synthetic({"anchor": anchor})
    table = measure_selectivity(llama, {"it": Steer(along(3))}, MEASURES, states=states)
    assert (table["random_kind"] == "covariance_matched").all()
    # States vary along that very axis alone, so each twin is it, or its opposite.
    np.testing.assert_allclose(-table["random_low"][0], table["effect"][0], rtol=1e-4)
    np.testing.assert_allclose(table["random_high"][0], table["effect"][0], rtol=1e-4)


def test_what_cannot_be_compared_is_refused(llama: OpenModel) -> None:
    condition = {"it": Ablate(along(3))}
    with refused("1 measure"):
        measure_selectivity(llama, condition, {"refusal": MEASURES["refusal"]})
    for prompts, times in ((FIRST, 0.0), (FIRST[:1], 1.0)):
        with refused("measure flat"):
            measure_selectivity(llama, condition, {**MEASURES, "flat": (reads(1, times=times), prompts)}, n_random=0)
    assert hooks_on(llama) == 0
