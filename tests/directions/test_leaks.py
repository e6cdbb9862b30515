"""Where it leaks, against planted drifts; patching, against models that differ in one known way; half-lives."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from by_layer import stacked
from histories import hooks_on, moved, plant, planted_vector, refused, synthetic

from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.behavior.scores import refusal_log_odds
from gravlens.directions.decomposition import candidate_spans, leak_map, rank_table
from gravlens.directions.direction import Directions, Subspaces
from gravlens.directions.subspaces import principal_angles, span_of, whole_state
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.interventions.patching import half_life, patch_spans, smallest_rank
from gravlens.models.opening import open_model

N, LAYERS, D = 8, 2, 12
DISTANCE = 5.0
E = np.eye(D)


def states(drift: Any, *, prompts: str = "probes", position: Any = "last", **others: Any) -> Residuals:
    """An anchor with noise over prompts, a witness DISTANCE along e0, and `seed0/10` at a drift [prompt, layer, d]."""
    anchor = np.random.default_rng(1).normal(size=(N, LAYERS, D))
    runs = {"seed0/10": drift} | {name.replace("__", "/"): value for name, value in others.items()}
    found = {"witness": anchor + DISTANCE * E[0], "anchor": anchor}
    found |= {name: anchor + value for name, value in runs.items()}
    return synthetic(found, prompts=prompts, meta={"dtype": ["float32"], "positions": position})


def at(layer: int, vector: np.ndarray) -> np.ndarray:
    """The same drift on every prompt, at one layer."""
    drift = np.zeros((N, LAYERS, D))
    drift[:, layer] = vector
    return drift


def row(table: pd.DataFrame, **where: Any) -> pd.Series:
    for column, value in where.items():
        table = table[table[column].isna() if value is pd.NA else table[column] == value]
    assert len(table) == 1, table
    return table.iloc[0]


# --- where ------------------------------------------------------------------------------------------------------


def test_a_leak_of_known_shape_is_measured_in_closed_form() -> None:
    """0.3 of the distance along v_rev and 0.4 across it, at layer 0; layer 1 does not move."""
    table = leak_map([states(at(0, DISTANCE * (0.3 * E[0] + 0.4 * E[3])))])
    found = row(table, layer=0)
    wanted = {"alignment": 0.6, "fraction": 0.3, "drift_norm": 0.5, "drift_rms": 0.5, "share_along_vrev": 0.36}
    wanted["refit_angle"] = np.degrees(np.arctan2(0.4, 0.7))
    assert found[list(wanted)].to_dict() == pytest.approx(wanted, abs=1e-5)
    assert (found["run"], found["step"], found["position"], found["prompts"]) == ("seed0", 10, -1, "given")
    still = row(table, layer=1)
    assert np.isnan(still["alignment"]) and np.isnan(still["share_along_vrev"]) and not still["judged"]
    assert (still["fraction"], still["drift_norm"], still["drift_rms"]) == (0, 0, 0) and still[
        "refit_angle"
    ] == pytest.approx(0, abs=0.05)


def test_the_share_is_of_each_prompt_where_the_mean_hides_what_cancels() -> None:
    drift = at(0, DISTANCE * 0.3 * E[0])
    drift[::2, 0] += DISTANCE * 0.4 * E[3]
    drift[1::2, 0] -= DISTANCE * 0.4 * E[3]
    found = row(leak_map([states(drift)]), layer=0)
    assert found["alignment"] == pytest.approx(1, abs=1e-5) and found["drift_norm"] == pytest.approx(0.3, abs=1e-5)
    assert found["share_along_vrev"] == pytest.approx(0.09 / 0.25, abs=1e-5)


def test_motion_that_cancels_over_prompts_shows_in_the_root_mean_square() -> None:
    """Half of the prompts go 0.4 towards the witness and half as far away: on average nothing has moved."""
    drift = at(0, DISTANCE * 0.4 * E[0])
    drift[1::2] *= -1
    found = row(leak_map([states(drift)]), layer=0)
    assert (found["fraction"], found["drift_norm"]) == pytest.approx((0, 0), abs=1e-6) and not found["judged"]
    assert found["drift_rms"] == pytest.approx(0.4, abs=1e-6) and found["share_along_vrev"] == pytest.approx(
        1, abs=1e-5
    )


def test_each_position_has_its_own_direction_and_held_out_prompts_do_not_locate_it() -> None:
    """At −3 the witness lies along e5, so that the very same drift is a leak there and none at the last token."""
    elsewhere = states(at(0, E[5]), position=-3)
    values = elsewhere.values.copy()
    values[0] = values[1] + 2 * E[5]
    elsewhere = replace(elsewhere, values=values)
    held_out = states(at(0, 2 * E[0]), prompts="others", position=-1)
    table = leak_map([states(at(0, E[5])), elsewhere], [held_out])
    assert row(table, layer=0, position=-1, prompts="given")["fraction"] == pytest.approx(0, abs=1e-6)
    assert row(table, layer=0, position=-3)["fraction"] == pytest.approx(0.5, abs=1e-6)
    assert row(table, layer=0, prompts="held_out")["fraction"] == pytest.approx(0.4, abs=1e-6)
    assert len(table) == 2 * LAYERS + LAYERS


def test_a_checkpoint_at_the_witness_has_no_direction_to_refit() -> None:
    table = leak_map([states(at(0, DISTANCE * E[0]))])
    assert row(table, layer=0)["fraction"] == pytest.approx(1)
    anchor = synthetic({"witness": np.ones((2, 1, 3)), "anchor": np.zeros((2, 1, 3)), "r/1": np.ones((2, 1, 3))})
    assert np.isnan(row(leak_map([anchor]), layer=0)["refit_angle"])


def test_what_cannot_be_mapped_is_refused() -> None:
    one, other = states(at(0, E[1])), states(at(0, E[1]), prompts="others", position=-2)
    with refused("positions ['last', -1]"):
        leak_map([one, states(at(0, E[1]), position=-1)])
    with refused("[-1]", "[-2]"):
        leak_map([one], [other])
    with refused("the same prompts"):
        leak_map([one], [one])
    with refused("[]"):
        leak_map([])
    with refused("no run"):
        leak_map([Residuals(one.values[:2], ("witness", "anchor"), one.layers, one.prompts, one.meta)])
    fewer = Residuals(one.values[:, :, :1], one.checkpoints, (0,), "others", one.meta)
    with refused("no layer 1"):
        leak_map([one], [fewer])


# --- in which directions ----------------------------------------------------------------------------------------


def planar(*lengths: float, seed: int = 0) -> np.ndarray:
    """Drifts in the span of e1, e2, … at both layers, uncorrelated over prompts, of these lengths along each."""
    rng = np.random.default_rng(seed)
    columns = np.linalg.qr(rng.normal(size=(N, len(lengths))))[0] * np.array(lengths)
    return np.repeat((columns @ E[1 : 1 + len(lengths)])[:, None], LAYERS, axis=1)


def test_a_drift_shared_by_two_runs_is_found_in_the_other_one_and_v_rev_is_not() -> None:
    given = states(planar(2, 1, seed=0), seed1__10=planar(3, 1, seed=1))
    held_out = states(planar(2, 1, seed=2), prompts="others")
    vs = locate_vrev(given)
    spans = candidate_spans(given, vs, fit_on=["seed1/10"], ranks=(1, 2), rng=np.random.default_rng(0))
    table = stacked(rank_table(held_out, spans, directions=vs, at=["seed0/10"]))
    share = {(span, rank): row(table, span=span, rank=rank, layer=pd.NA)["share"] for span, rank in
             [("v_rev", 1), ("drift", 1), ("drift", 2), ("drift_orthogonal", 2), ("whole_state", D)]}  # fmt: skip
    wanted = {("v_rev", 1): 0, ("drift", 1): 0.8, ("drift", 2): 1, ("drift_orthogonal", 2): 1, ("whole_state", D): 1}
    assert share == pytest.approx(wanted, abs=1e-5)
    assert set(table[table["span"] == "drift"]["fitted_on"]) == {"seed1/10"}
    assert set(table["run"]) == {"seed0"} and set(table["step"]) == {10}
    assert row(table, span="drift", rank=1, layer=1)["angle_vrev"] == pytest.approx(90, abs=1e-3)
    assert row(table, span="whole_state", layer=0)["angle_vrev"] == pytest.approx(0, abs=1e-3)


def test_angles_are_the_principal_angles_of_scipy() -> None:
    drift = at(0, np.array([3, 4, *[0] * (D - 2)])) + at(1, np.array([1, 0, 1, *[0] * (D - 3)]))
    given = states(drift, seed1__10=drift + 0.3 * planar(0.5, 1, 2))
    vs = locate_vrev(given)
    refusal = Directions(tuple(direction_from(E[2] + E[1], layer=layer) for layer in range(LAYERS)))
    spans = candidate_spans(given, vs, fit_on=["seed1/10"], ranks=(1, 3), refusal=refusal, rng=np.random.default_rng(0))
    table = stacked(rank_table(given, spans, directions=vs, at=["seed0/10"], refusal=refusal))
    for kind, several in spans.items():
        for one in several:
            for span in one:
                found = row(table, span=kind, rank=len(span.basis), layer=span.layer)
                for name, direction in (("angle_vrev", vs[span.layer]), ("angle_refusal", refusal[span.layer])):
                    assert found[name] == pytest.approx(principal_angles(span, direction)[0], abs=1e-2), (kind, name)
    means = table[(table["span"] == "drift") & (table["rank"] == 1)]
    assert means[means["layer"].isna()]["angle_vrev"].item() == pytest.approx(
        means[means["layer"].notna()]["angle_vrev"].mean()
    )
    exact = stacked(rank_table(given, {"v_rev": [vs]}, directions=vs, at=["seed0/10"]))
    assert row(exact, layer=0)["share"] == pytest.approx(9 / 25, abs=1e-5)
    assert row(exact, layer=1)["share"] == pytest.approx(1 / 2, abs=1e-5)


def test_random_spans_hold_what_their_rank_says_or_what_the_states_say() -> None:
    given = states(np.random.default_rng(5).normal(size=(N, LAYERS, D)), seed1__10=planar(3, 2, 1, 1))
    vs = locate_vrev(given)
    spans = candidate_spans(given, vs, fit_on=["seed1/10"], ranks=(1, 4), n_random=40, rng=np.random.default_rng(0))
    assert [len(spans[kind]) for kind in ("isotropic", "covariance_matched", "drift", "v_rev")] == [80, 80, 2, 1]
    table = stacked(rank_table(given, spans, directions=vs, at=["seed0/10"]))
    random = table[(table["span"] == "isotropic") & table["layer"].isna()].groupby("rank")["share"].mean()
    assert random.to_dict() == pytest.approx({1: 1 / D, 4: 4 / D}, abs=0.03)
    centred = given.of("anchor") - given.of("anchor").mean(0)
    for layer in range(LAYERS):
        held = np.linalg.svd(centred[:, layer])[2][: N - 1]  # N prompts span N − 1 directions about their mean
        for one in spans["covariance_matched"][:3]:
            assert np.linalg.norm(one[layer].basis @ held.T) ** 2 == pytest.approx(len(one[layer].basis), abs=1e-3)


def test_a_drift_along_v_rev_has_no_orthogonal_part() -> None:
    """At layer 0 the other run goes along v_rev exactly: the part orthogonal to it is there at layer 1 alone."""
    given = states(at(0, E[1]), seed1__10=at(0, E[0]) + at(1, E[0] + E[4]))
    vs = locate_vrev(given)
    spans = candidate_spans(given, vs, fit_on=["seed1/10"], ranks=(1,), rng=np.random.default_rng(0))
    assert spans["drift_orthogonal"][0].layers == (1,)
    assert abs(spans["drift_orthogonal"][0][1].basis[0] @ E[4]) == pytest.approx(1, abs=1e-5)
    along = states(at(0, E[1]), seed1__10=at(0, E[0]) + at(1, E[0]))
    gone = candidate_spans(along, vs, fit_on=["seed1/10"], ranks=(1,), rng=np.random.default_rng(0))
    assert "drift_orthogonal" not in gone and "refusal" not in gone and "drift" in gone


def test_the_share_of_no_drift_is_undefined_and_a_rank_beyond_the_prompts_is_refused() -> None:
    given = states(at(0, E[1]), seed1__10=planar(1, 1))
    vs = locate_vrev(given)
    table = stacked(rank_table(given, {"v_rev": [vs]}, directions=vs, at=["seed0/10"]))
    assert np.isnan(row(table, layer=1)["share"]) and row(table, layer=0)["share"] == pytest.approx(0, abs=1e-9)
    with refused("9 components"):
        candidate_spans(given, vs, fit_on=["seed1/10"], ranks=(9,), rng=np.random.default_rng(0))


# --- which of them carries the behaviour ------------------------------------------------------------------------

LAST = tiny.LAYERS - 1
SCORE = partial(refusal_log_odds, openings=["sorry"])


@pytest.fixture(scope="module")
def pair() -> dict[str, Any]:
    """A GPT-2, and one whose last block adds a known vector: the last token's state differs along it, and no other."""
    anchor = tiny.gpt2()
    return {"anchor": anchor, "tuned": plant(anchor, planted_vector(4, length=6.0), layer=LAST)}


def read(models: dict[str, Any]) -> Residuals:
    sequence = ModelSequence(
        witness=Checkpoint("witness", models["tuned"]),
        anchor=Checkpoint("anchor", models["anchor"]),
        runs={"run": (Checkpoint("run/1", models["tuned"], 1),)},
        tokenizer=tiny.TOKENIZER,
    )
    return cache_residuals(sequence, tiny.PROMPTS)


def spans_of_width(planted: np.ndarray) -> dict[str, list[Any]]:
    """The planted direction, one orthogonal to it, a plane that holds it, and the whole state; at the last layer."""
    other = np.zeros(tiny.WIDTH)
    other[:2] = planted[1], -planted[0]
    spaces = {"planted": [planted], "orthogonal": [other], "plane": [planted, other]}
    vs = Directions((direction_from(planted, layer=LAST),))
    made = {name: [Subspaces((span_of(np.array(rows), layer=LAST, distance=1.0),))] for name, rows in spaces.items()}
    return {**made, "v": [vs], "whole_state": [whole_state(vs)]}


@pytest.mark.parametrize(("into", "source"), [("tuned", "anchor"), ("anchor", "run/1")])
def test_restoring_the_planted_direction_is_the_whole_way_and_an_orthogonal_one_none(
    pair: dict[str, Any], into: str, source: str
) -> None:
    """Necessity (the anchor's component into the tuned model), and sufficiency the other way."""
    model = open_model(pair[into], tokenizer=tiny.TOKENIZER)
    other = open_model(pair["anchor" if into == "tuned" else "tuned"], tokenizer=tiny.TOKENIZER)
    start, goal = (SCORE(one, tiny.PROMPTS).mean() for one in (model, other))
    assert abs(start - goal) > 0.05
    spans = spans_of_width(planted_vector(4).numpy().astype(float))
    ask = {"score": SCORE, "prompts": tiny.PROMPTS, "goal": float(goal)}
    table = patch_spans(model, spans, source=read(pair), checkpoint=source, **ask)
    wanted = {"planted": 1, "orthogonal": 0, "plane": 1, "v": 1, "whole_state": 1}
    assert dict(zip(table["span"], table["way"], strict=True)) == pytest.approx(wanted, abs=1e-3)
    assert table["rank"].tolist() == [1, 1, 2, 1, tiny.WIDTH]
    assert table["baseline"].to_numpy() == pytest.approx(start, abs=1e-4)
    assert row(table, span="v")["patched"] == pytest.approx(goal, abs=1e-3) and set(table["source"]) == {source}
    assert (table["low"] <= table["difference"] + 1e-9).all() and (table["difference"] <= table["high"] + 1e-9).all()
    assert hooks_on(model) == 0


def test_the_whole_state_of_every_layer_restores_any_change_below_the_head(pair: dict[str, Any]) -> None:
    """Independent of any direction: blocks changed at random, head and norm shared, give the anchor's logits back."""
    tuned = moved(pair["anchor"], seed=3)
    tuned.lm_head.weight, tuned.transformer.ln_f = pair["anchor"].lm_head.weight, pair["anchor"].transformer.ln_f
    model, anchor = (open_model(one, tokenizer=tiny.TOKENIZER) for one in (tuned, pair["anchor"]))
    states = read({"anchor": pair["anchor"], "tuned": tuned})
    vs = locate_vrev(states).defined()
    goal = float(SCORE(anchor, tiny.PROMPTS).mean())
    spans = {"v_rev": [vs], "whole_state": [whole_state(vs)]}
    table = patch_spans(model, spans, source=states, score=SCORE, prompts=tiny.PROMPTS, goal=goal)
    whole, one = (row(table, span=name) for name in ("whole_state", "v_rev"))
    assert whole["patched"] == pytest.approx(goal, abs=1e-3) and whole["way"] == pytest.approx(1, abs=1e-2)
    assert abs(one["patched"] - goal) > 0.02


def test_there_is_no_way_where_the_scores_agree(pair: dict[str, Any]) -> None:
    model = open_model(pair["anchor"], tokenizer=tiny.TOKENIZER)
    goal = float(SCORE(model, tiny.PROMPTS).mean())
    spans = spans_of_width(planted_vector(4).numpy().astype(float))
    same = patch_spans(model, spans, source=read(pair), score=SCORE, prompts=tiny.PROMPTS, goal=goal)
    assert same["way"].isna().all() and np.abs(same["difference"]).max() < 1e-4


def test_the_smallest_rank_is_of_the_mean_over_draws() -> None:
    table = pd.DataFrame({"rank": [1, 2, 2, 4, 16], "way": [0.3, 0.9, 0.5, 0.85, 0.99]})
    assert smallest_rank(table) == 4
    assert smallest_rank(table, share=0.7) == 2
    assert smallest_rank(table, share=0.3) == 1
    assert smallest_rank(table, share=0.995) is None


# --- how long it lasts ------------------------------------------------------------------------------------------


def test_a_straight_way_back_is_half_done_at_half_time() -> None:
    """From 0.1 at step 50 to 0.9 at step 130: half the way, 0.5, is at step 90."""
    steps = [0, 50, 70, 130, 200]
    assert half_life(steps, [0.7, 0.1, 0.3, 0.9, 0.9], lifted=50, unblocked=0.9) == pytest.approx(40)
    assert half_life(steps, [0, 9.0, 7.0, 1.0, 1.0], lifted=50, unblocked=1.0) == pytest.approx(40)  # a falling one


@pytest.mark.parametrize("life", [7.0, 30.0])
def test_an_exponential_way_back_has_its_own_half_life(life: float) -> None:
    steps = np.arange(0, 101)
    values = 0.8 - 0.6 * 2.0 ** (-np.clip(steps - 20, 0, None) / life)
    assert half_life(list(steps), list(values), lifted=20, unblocked=0.8) == pytest.approx(life, abs=0.02)


def test_a_protection_that_lasts_has_no_half_life_within_the_run() -> None:
    assert np.isnan(half_life([10, 20, 30], [0.1, 0.2, 0.49], lifted=10, unblocked=0.9))
    assert half_life([10, 20, 30], [0.1, 0.9, 0.1], lifted=10, unblocked=0.9) == pytest.approx(5)  # the first crossing
    assert np.isnan(half_life([10, 20], [0.9, 0.1], lifted=20, unblocked=0.9))


@pytest.mark.parametrize(
    ("steps", "values", "named"),
    [([10, 20], [0, 1], "step 15"), ([10, 5], [0, 1], "[10, 5]"), ([10, 15], [0], "1 values")],
)
def test_a_release_that_was_not_measured_is_refused(steps: list[int], values: list[float], named: str) -> None:
    with refused(named):
        half_life(steps, values, lifted=15, unblocked=1.0)


def test_what_was_not_held_has_no_half_life() -> None:
    with refused("step 10", "0.5"):
        half_life([10, 20], [0.5, 0.6], lifted=10, unblocked=0.5)
