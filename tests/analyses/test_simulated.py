"""Simulated histories: what a world says is true of its states, and of its arms."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "analyses"))

from worlds.behavior import Rule, arms_of, harm_along  # noqa: E402
from worlds.simulated import PLANS, STEP, History, World, evidence_of, excursions, simulate  # noqa: E402

from gravlens.activations.residuals import Residuals, substitute  # noqa: E402
from gravlens.directions.trajectory import follow  # noqa: E402
from gravlens.directions.vrev import locate_vrev  # noqa: E402
from gravlens.stats.controls import closure  # noqa: E402

ONE, SIX = PLANS["one anchor"], PLANS["six anchors"]
ENDPOINTS = World(endpoints=1.0, noise=0.0)


def first(world: World, seed: int = 0) -> History:
    return simulate(world, ONE, rng=np.random.default_rng(seed))[0]


def alignment(world: World, seeds: int = 20) -> float:
    """Mean alignment over histories, runs and layers."""
    return float(
        np.mean([one.along(one.runs - one.anchor, one.witness) for one in (first(world, s) for s in range(seeds))])
    )


def as_residuals(name: str, means: dict[str, np.ndarray]) -> Residuals:
    """Two prompts that lie about each mean, the same at every checkpoint."""
    about = np.random.default_rng(0).standard_normal((1, 1, *next(iter(means.values())).shape))
    values = np.stack(list(means.values()))[:, None] + np.concatenate([about, -about], axis=1)
    return Residuals(values, tuple(means), tuple(range(values.shape[2])), name, {"dtype": ["float64"]})


def test_the_evidence_is_what_follow_and_closure_give_on_states_of_these_means() -> None:
    one = first(World(planted=0.3, decay=1.0))
    found = evidence_of(one, name="", rng=np.random.default_rng(0))
    ends = {"witness": one.witness, "anchor": one.anchor, "stranger0": one.strangers[0]}
    runs = {f"run{i}/{STEP}": run for i, run in enumerate(one.runs)}
    twins = {f"twin{i}/{STEP}": twin for i, twin in enumerate(one.stranger_twins[0])}
    probes, held_out = as_residuals("probes", ends), as_residuals("held_out", ends | runs)
    theirs = as_residuals("held_out", {"witness": one.strangers[0], "anchor": one.anchor} | twins)
    vs, other = locate_vrev(probes), locate_vrev(substitute(probes, witness="stranger0"))
    assert found.trajectory.layer_mean.alignment.to_numpy() == pytest.approx(follow(held_out, vs).layer_mean.alignment)
    assert found.trajectory.layer_mean.fraction.to_numpy() == pytest.approx(follow(held_out, vs).layer_mean.fraction)
    seen = found.strangers["stranger0"].table.alignment.to_numpy()
    assert seen == pytest.approx(follow(held_out, other).table.alignment)
    pairs = list(zip(held_out.runs, theirs.runs, strict=True))
    wanted = closure(held_out, theirs, other, pairs=pairs, layers=other.layers)
    assert found.stranger_closures["stranger0"].table.closure.to_numpy() == pytest.approx(wanted.table.closure)
    assert found.stranger_closures["stranger0"].layer_mean.closure.to_numpy() == pytest.approx(
        wanted.layer_mean.closure
    )


def test_a_planted_drift_goes_its_share_of_the_way_and_its_opposite_goes_back() -> None:
    for share in (0.3, -0.3):
        rows = [
            evidence_of(first(World(planted=share), s), name="", rng=np.random.default_rng(0)).rows for s in range(5)
        ]
        assert np.mean([table.fraction.mean() for table in rows]) == pytest.approx(share, abs=0.03)
        assert np.sign([table.alignment.mean() for table in rows]).tolist() == [np.sign(share)] * 5


def test_independent_endpoints_have_half_a_cosine_with_every_witness_of_their_centre_and_none_elsewhere() -> None:
    assert alignment(ENDPOINTS) == pytest.approx(0.5, abs=0.05)
    near, far = first(ENDPOINTS), first(replace(ENDPOINTS, apart=5.0))
    strangers = {
        name: one.along(one.runs.mean(0) - one.anchor, one.strangers).mean()
        for name, one in (("near", near), ("far", far))
    }
    assert strangers["near"] == pytest.approx(
        near.along(near.runs.mean(0) - near.anchor, near.witness).mean(), abs=0.15
    )
    assert strangers["far"] < 0.25 < 0.4 < far.along(far.runs.mean(0) - far.anchor, far.witness).mean()


def test_anchors_share_as_much_of_their_excursion_as_the_world_says() -> None:
    for share in (0.0, 0.5, 1.0):
        histories = simulate(World(endpoints=0.8, shared=share, d_model=4_000), SIX, rng=np.random.default_rng(0))
        one, other = (history.anchor.ravel() for history in histories[:2])
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) == pytest.approx(share, abs=0.04)


def test_a_common_drift_closes_no_gap_to_anyone_s_twin() -> None:
    one = first(World(common=0.3))
    assert one.along(one.runs - one.anchor, one.witness).mean() > 0.8
    assert abs(one.closed(one.witness, one.twins).mean()) < 0.1
    planted = first(World(planted=0.3))
    assert planted.closed(planted.witness, planted.twins).mean() == pytest.approx(0.3, abs=0.07)


def test_prompts_cancel_exactly_or_by_chance() -> None:
    assert abs(alignment(World(per_prompt=1.0))) < 0.1
    by_chance = [first(World(per_prompt=1.0, balanced=False), s) for s in range(20)]
    means = [one.along(one.runs - one.anchor, one.witness).mean() for one in by_chance]
    assert np.abs(means).mean() > 0.4 and min(means) < 0 < max(means), "the same sign in all runs"


def test_draws_have_the_covariance_of_their_world() -> None:
    rng = np.random.default_rng(0)
    plain, few, rogue, alike = (
        excursions(world, 2_000, rng=rng)
        for world in (World(), World(decay=1.5), World(rogue=0.9), World(coherent=True))
    )
    for drawn in (plain, few, rogue, alike):
        assert (drawn**2).sum(-1).mean() == pytest.approx(1, abs=0.05)
    variance = (few[:, 0] ** 2).mean(0)
    assert variance.sum() ** 2 / (variance**2).sum() < 8
    assert (rogue[:, 0, 0] ** 2).mean() == pytest.approx(0.9, abs=0.1)
    between = {name: (drawn[:, 0] * drawn[:, 1]).sum(-1).mean() for name, drawn in (("plain", plain), ("alike", alike))}
    assert abs(between["plain"]) < 0.05 < 0.9 < between["alike"]


def test_the_best_layer_is_kept_and_nothing_else() -> None:
    one = first(World(n_layers=30, best_of=True, preregistered=False))
    found = evidence_of(one, name="", rng=np.random.default_rng(0))
    aligned = one.along(one.runs - one.anchor, one.witness).mean(0)
    assert found.trajectory.layers_in_mean == (int(aligned.argmax()),) and found.preregistration is None


# --- arms -------------------------------------------------------------------------------------------------------------


def test_harm_falls_with_the_cosine_unless_the_direction_is_a_placebo() -> None:
    rng = np.random.default_rng(0)
    harms = {c: np.mean([harm_along(c, Rule(), rng) for _ in range(200)]) for c in (0.0, 0.4, 1.0)}
    assert (
        harms[0.0] == pytest.approx(0.9, abs=0.02) and harms[0.4] == pytest.approx(0.45, abs=0.02) and harms[1.0] < 0.1
    )
    placebo = [np.mean([harm_along(c, Rule(placebo=True), rng) for _ in range(1_000)]) for c in (0.0, 1.0)]
    assert placebo[0] == pytest.approx(placebo[1], abs=0.03)


def test_each_rule_breaks_what_it_says() -> None:
    def clamp(rule: Rule) -> dict[str, float]:
        table = arms_of(rule, seeds=5, directions=4, rng=np.random.default_rng(0))
        return table.groupby("arm").mean(numeric_only=True).loc["clamp"].to_dict()

    assert clamp(Rule(nonsense=0.95))["nonsense"] == pytest.approx(0.95)
    assert clamp(Rule(over_refusal=1.0))["over_refusal"] == pytest.approx(1.0)
    assert (
        clamp(Rule(loss=2.0))["task_loss"] == pytest.approx(2.0, abs=0.05)
        and clamp(Rule(loss=2.0))["compliance_rate"] < 0.3
    )
    still = arms_of(Rule(returns=False), seeds=5, directions=4, rng=np.random.default_rng(0))
    assert still[still.arm == "unblocked"].compliance_rate.mean() < 0.1


def test_the_same_seed_is_the_same_history() -> None:
    one, same, other = (first(World(planted=0.3), seed).runs for seed in (0, 0, 1))
    assert (one == same).all() and not (one == other).all()
