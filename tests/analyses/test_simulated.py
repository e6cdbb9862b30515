"""Simulated histories: what a world says is true of its states."""

import numpy as np
import pytest
from worlds.simulated import SIBLINGS, World, simulate

from gravlens.activations.residuals import substitute
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import locate_vrev
from gravlens.stats.nulls import isotropic_quantile

PLANTED = World(planted=(0.05, 0.3), runs=8)
INDEPENDENT = World(endpoints=(0.2, 1.0), noise=0.0, runs=8)


def final(world: World, seed: int, **swap: str) -> np.ndarray:
    """Alignment of every run at the last step, the layers' mean; with another witness or anchor."""
    made = simulate(world, rng=np.random.default_rng(seed))
    table = follow(made.held_out, locate_vrev(substitute(made.probes, **swap))).layer_mean
    return table[table.step == table.step.max()].alignment.to_numpy()


def test_a_planted_drift_goes_its_share_of_the_way() -> None:
    made = simulate(PLANTED, rng=np.random.default_rng(0))
    table = follow([made.probes, made.held_out], locate_vrev(made.probes)).layer_mean
    means = table.groupby(["prompts", "step"]).fraction.mean()
    assert means["given"].to_list() == pytest.approx([0.05, 0.3], abs=0.03)
    assert means["held_out"].to_list() == pytest.approx([0.05, 0.3], abs=0.03)


@pytest.mark.parametrize("world", [PLANTED, World(planted=(0.3,), decay=1.5)])
def test_a_planted_drift_is_towards_a_sibling_s_witness_too_and_to_no_wrong_one(world: World) -> None:
    siblings = [final(world, seed, anchor=SIBLINGS[0]).mean() for seed in range(10)]
    assert min(siblings) > 0.7
    # a wrong witness shares the anchor, so that it is not 0 either
    wrong = [final(world, seed, witness="wrong_witness").mean() for seed in range(20)]
    assert np.mean(wrong) > 0.2 and np.mean(wrong) < np.mean(siblings) - 0.2


def test_independent_endpoints_have_half_a_cosine_and_none_with_a_sibling() -> None:
    assert np.mean([final(INDEPENDENT, seed).mean() for seed in range(20)]) == pytest.approx(0.5, abs=0.05)
    assert abs(np.mean([final(INDEPENDENT, seed, anchor=SIBLINGS[0]).mean() for seed in range(20)])) < 0.05


def test_twins_start_at_the_witness_and_share_its_prompts() -> None:
    made = simulate(PLANTED, rng=np.random.default_rng(0))
    assert list(made.twins.runs) == [f"twin-{i}" for i in range(8)]
    moved = made.twins.of("twin-0/2").mean(0) - made.twins.of("witness").mean(0)
    assert np.linalg.norm(moved, axis=1).max() < 0.3, "noise alone: they have nowhere to go back to"
    assert made.twins.of("witness").tolist() == made.held_out.of("witness").tolist()


def test_noise_is_isotropic_where_the_world_is_and_wide_where_it_is_not() -> None:
    spread = {}
    for decay in (0.0, 1.5):
        rng = np.random.default_rng(1)
        made = simulate(World(planted=(0.3,), decay=decay), rng=rng)
        vs = locate_vrev(made.probes)
        spread[decay] = float(np.quantile(made.noise(vs, draws=4_000, rng=rng).cosines, 0.99))
        damage = made.damage(vs, n=3, rng=rng)
        assert len(damage) == 3 and damage.alignment.abs().max() < 1
    assert spread[0.0] == pytest.approx(isotropic_quantile(0.99, 64), rel=0.1) and spread[1.5] > 1.5 * spread[0.0]


def test_the_same_seed_is_the_same_history() -> None:
    one, same, other = (simulate(PLANTED, rng=np.random.default_rng(seed)).probes.values for seed in (0, 0, 1))
    assert (one == same).all() and not (one == other).all()
