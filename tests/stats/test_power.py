"""Power of the claim ladder: its size, closed forms, the tests of `claim` themselves, and estimates from a pilot."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from histories import refused
from scipy import stats

import gravlens as gl
from gravlens.stats.permutation import rank_test, sign_flip_test
from gravlens.stats.power_analysis import PLANS, Design, Effects, needed, power

# Every effect so large that its tests never fail; then one of them is taken away.
CERTAIN = Effects(
    alignment=0.7, alignment_anchors=0.0, alignment_runs=0.001, noise=0.05, strangers=0.0, strangers_sd=0.05,
    closure=0.5, closure_sd=0.01, stranger_closure=0.0, stranger_closure_sd=0.02, harm=0.9, anchor_harm=0.0,
    harm_anchors=0.01, harm_seeds=0.01, clamp=0.05, random=0.8, random_directions=0.05, held=0.9, held_sd=0.01,
)  # fmt: skip
FULL: dict[str, Any] = {"runs": 6, "strangers": 19, "directions": 19}


def powers(effects: Effects, *, seed: int = 0, simulations: int = 4_000, **design: Any) -> dict[int, float]:
    table = power(effects=effects, simulations=simulations, rng=np.random.default_rng(seed), **design)
    return dict(zip(table.level, table.power, strict=True))


def near(rate: float, simulations: int = 4_000) -> Any:
    return pytest.approx(rate, abs=4 * np.sqrt(max(rate * (1 - rate), 0.01) / simulations))


def test_what_is_certain_has_power_1() -> None:
    assert powers(CERTAIN, **FULL) == dict.fromkeys((2, 3, 4, 5), 1.0)
    assert powers(CERTAIN, anchors=6, runs=2, strangers=5, directions=4) == dict.fromkeys((2, 3, 4, 5), 1.0)


# -- size: with one effect absent, its level is reached at the rate of its test ----------------------------------------


def test_noise_alone_reaches_level_2_at_alpha() -> None:
    noise = replace(CERTAIN, alignment=0.0, alignment_anchors=0.2, alignment_runs=0.0, noise=0.2)
    # one run: too few for sign flips, so level 2 is the noise test alone; 199 draws reach 10 / 200 exactly
    assert powers(noise, runs=1, draws=199)[2] == near(0.05)
    assert powers(noise, runs=1, draws=199, alpha=0.01)[2] == near(0.01)
    assert powers(noise, runs=1, anchors=4, draws=199)[2] == near(0.05)


@pytest.mark.parametrize(
    ("level", "absent"),
    [
        (3, {"alignment": 0.7, "alignment_anchors": 0.05, "alignment_runs": 0.0, "strangers": 0.7}),
        (3, {"closure": 0.0, "closure_sd": 0.02}),
        (4, {"clamp": 0.5, "random": 0.5, "random_directions": 0.0, "harm_seeds": 0.05}),
    ],
)
def test_what_is_no_different_from_its_controls_passes_at_alpha(level: int, absent: dict[str, float]) -> None:
    effects = replace(CERTAIN, **absent)
    assert powers(effects, **FULL)[level] == near(0.05)
    # 6 anchors with 4 controls: the largest p of a sum of ranks that does not exceed alpha
    p = [rank_test([1] * (6 - more) + [2] * more, [5] * 6) for more in range(7)]
    attained = max(one for one in p if one <= 0.05)
    assert 0.02 < attained < p[-1]
    assert powers(effects, anchors=6, runs=2, strangers=4, directions=4)[level] == near(attained)


def test_harm_that_is_half_held_on_average_reaches_level_5_at_the_size_of_sign_flips() -> None:
    half = replace(CERTAIN, held=0.5, held_sd=0.2)
    assert powers(half, **FULL)[5] == near(3 / 64)  # 6 runs: 3 of 64 sign patterns have p ≤ .05
    assert powers(half, **{**FULL, "runs": 5})[5] == near(1 / 32)
    assert powers(half, **{**FULL, "runs": 14})[5] == near(0.05)  # drawn at random


# -- power: closed forms, and the tests themselves ---------------------------------------------------------------------


def test_the_power_of_first_place_is_an_integral() -> None:
    effects = replace(CERTAIN, alignment_anchors=0.1, alignment_runs=0.0, strangers=0.5, strangers_sd=0.15)
    x = np.linspace(-0.2, 1.6, 20_001)  # P(none of 19 strangers is above the witness)
    first = np.trapezoid(stats.norm.pdf(x, 0.7, 0.1) * stats.norm.cdf(x, 0.5, 0.15) ** 19, x)
    assert 0.2 < first < 0.8
    assert powers(effects, **FULL)[3] == near(float(first))


def test_the_power_against_noise_is_that_of_a_z_test() -> None:
    effects = replace(CERTAIN, alignment=0.4, alignment_anchors=0.1, alignment_runs=0.0, noise=0.2)
    draws = 9_999  # so many that the noise's quantile is known
    for anchors in (1, 4):
        z = (stats.norm.isf(0.05) * 0.2 - 0.4 * np.sqrt(anchors)) / 0.1
        assert powers(effects, anchors=anchors, runs=1, draws=draws)[2] == near(float(stats.norm.sf(z)))


def test_it_agrees_with_drawing_every_control_and_calling_the_tests() -> None:
    """The simulation draws how many controls are above; here each one is drawn."""
    e = replace(CERTAIN, clamp=0.3, random=0.5, random_directions=0.2, harm_seeds=0.05)
    rng, found = np.random.default_rng(1), []
    anchors, runs, directions = 4, 2, 6
    for _ in range(1_500):
        clamp = e.clamp + e.harm_seeds * rng.standard_normal((anchors, runs))
        means = e.random + e.random_directions * rng.standard_normal((anchors, directions, 1))
        random = means + e.harm_seeds * rng.standard_normal((anchors, directions, runs))
        ranks = 1 + (random.mean(2) <= clamp.mean(1)[:, None]).sum(1)
        found.append(rank_test(ranks.tolist(), [directions + 1] * anchors) <= 0.07)
    ours = powers(e, anchors=anchors, runs=runs, strangers=19, directions=directions, alpha=0.07)[4]
    assert 0.2 < ours < 0.9
    assert ours == pytest.approx(np.mean(found), abs=4 * np.sqrt(0.25 / 1_500 + 0.25 / 4_000))


def test_sign_flips_of_runs_are_those_of_the_permutation_test() -> None:
    e = replace(CERTAIN, held=0.55, held_sd=0.1, harm_anchors=0.0, harm_seeds=0.0)
    rng = np.random.default_rng(2)
    values = e.harm * (e.held + e.held_sd * rng.standard_normal((6, 4_000)) - 0.5)
    assert powers(e, **FULL)[5] == near(float((sign_flip_test(values) <= 0.05).mean()), 2_000)


@pytest.mark.parametrize(
    ("level", "weak", "design", "grows", "values"),
    [
        (2, {"alignment": 0.35, "alignment_anchors": 0.1, "noise": 0.2}, {}, "draws", (19, 39, 399)),
        (2, {"alignment": 0.35, "alignment_anchors": 0.1, "noise": 0.2}, {}, "anchors", (1, 2, 4)),
        (3, {"strangers": 0.35, "strangers_sd": 0.15}, {}, "strangers", (19, 39, 159)),
        (3, {"strangers": 0.6, "strangers_sd": 0.15}, {"strangers": 5}, "anchors", (2, 6, 10)),
        (4, {"clamp": 0.3, "random": 0.75, "random_directions": 0.2}, {}, "directions", (19, 59, 199)),
        (4, {"clamp": 0.3, "random": 0.5, "random_directions": 0.2}, {"directions": 2}, "anchors", (5, 8, 12)),
        (5, {"held": 0.56, "held_sd": 0.1}, {}, "runs", (5, 8, 12)),
    ],
)
def test_power_rises_with_each_number(
    level: int, weak: dict[str, float], design: dict[str, int], grows: str, values: tuple[int, ...]
) -> None:
    effects = replace(CERTAIN, **weak)
    rates = [powers(effects, **{**FULL, **design, grows: value})[level] for value in values]
    assert rates[0] < rates[1] < rates[2], rates


def test_more_directions_do_not_help_where_one_in_ten_holds_as_much() -> None:
    """With one anchor: 19 directions leave room for luck, and many place the clamp among the best tenth for certain."""
    tenth = replace(CERTAIN, clamp=0.3, random=0.3 + 0.2 * stats.norm.isf(0.1), random_directions=0.2)
    rates = [powers(tenth, **{**FULL, "directions": n})[4] for n in (19, 99, 999)]
    assert rates[0] > rates[1] > rates[2] and rates[2] < 0.02


# -- what cannot be reached --------------------------------------------------------------------------------------------


def test_the_obstacle_is_named_and_keeps_the_higher_levels_out() -> None:
    def cannot(**design: Any) -> list[str]:
        table = power(effects=CERTAIN, simulations=50, rng=np.random.default_rng(0), **design)
        assert (table.power[table.cannot != ""] == 0).all() and (table.power[table.cannot == ""] == 1).all()
        return table.cannot.tolist()

    assert cannot(**FULL) == ["", "", "", ""]
    two = cannot(runs=2, strangers=19, directions=19)
    assert two[:2] == ["", ""] and two[2] == two[3] == "cannot be reached with 2 runs: the least p is 0.25, alpha 0.05"
    assert cannot(runs=6, strangers=5)[1].startswith("cannot be reached with 5 strangers: the least p is 0.17")
    assert cannot(runs=6, draws=10)[0].startswith("cannot be reached with 10 draws of weight noise")
    assert cannot(anchors=5, runs=2, strangers=1, directions=0)[2].startswith("cannot be reached with no random")
    assert cannot(anchors=4, runs=9, strangers=3, directions=4)[2].startswith("cannot be reached with 4 anchors")


def test_least_p_is_that_of_the_weakest_test() -> None:
    table = power(anchors=3, runs=2, strangers=2, directions=4, draws=99, rng=np.random.default_rng(0), simulations=9)
    assert table.least_p.tolist() == pytest.approx([1 / 100, 1 / 27, 1 / 8, 1 / 8])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"anchors": 0}, "anchors=0"),
        ({"runs": 1.5}, "runs=1.5"),
        ({"strangers": -1}, "strangers=-1"),
        ({"alpha": 5}, "alpha=5"),
        ({"simulations": 0}, "simulations=0"),
    ],
)
def test_impossible_numbers_are_named(given: dict[str, Any], named: str) -> None:
    with refused(named):
        power(**given, rng=np.random.default_rng(0))


# -- the smallest plan -------------------------------------------------------------------------------------------------


def test_runs_to_train_are_counted_arm_by_arm() -> None:
    one = Design(1, 2, 19, 4)
    # runs; their twins and the strangers'; clamp, push and 4 random directions; released
    assert [one.trained(level) for level in (2, 3, 4, 5)] == [2, 2 + 2 + 38, 42 + 12, 54 + 2]
    several = Design(6, 2, 5, 4)  # the others' twins are there already
    assert [several.trained(level) for level in (2, 3, 4, 5)] == [12, 24, 24 + 72, 96 + 12]


def test_needed_is_the_first_plan_of_each_list_that_has_the_power() -> None:
    found = needed(4, 0.8, effects=Effects(), rng=np.random.default_rng(0)).set_index("plan")
    assert list(found.index) == list(PLANS)
    several = found.loc["several anchors"]
    assert several.enough and several.power >= 0.8
    smaller = [
        plan
        for plan in PLANS["several anchors"]
        if (plan.anchors, plan.trained(4)) < (several.anchors, several.trained)
    ]
    assert smaller and all(powers(Effects(), **vars(plan))[4] < 0.82 for plan in smaller)
    alone = found.loc["one anchor"]  # one in six matched directions holds as much: a single anchor never shows it
    assert not alone.enough and alone.power < 0.2


def test_what_a_lower_level_does_not_need_is_left_out() -> None:
    found = needed(2, rng=np.random.default_rng(0))
    assert (found.strangers == 0).all() and (found.directions == 0).all() and (found.trained <= 4).all()
    with refused("level=1"):
        needed(1, rng=np.random.default_rng(0))


# -- a pilot -----------------------------------------------------------------------------------------------------------


def pilot(folder: Path) -> Path:
    """Two anchors, two seeds, three random directions; every figure can be worked out by hand."""
    rows = []
    for organism, shift in (("a", 0.0), ("b", 0.2)):
        for seed, by in ((0, -0.01), (1, 0.01)):
            harm = {"unblocked": 0.7 + shift, "clamp": 0.1, "released_at_20": (0.7 + shift + by) / 2 - by}
            harm |= {f"clamp_random_{k}": 0.5 + 0.1 * k for k in range(3)}
            rows += [
                {
                    "organism": organism,
                    "arm": arm,
                    "run": f"{arm}-{seed}",
                    "seed": seed,
                    "compliance_rate": rate + by,
                    "alignment_final": 0.6 + shift + 2 * by,
                }
                for arm, rate in harm.items()
            ]
    pd.DataFrame(rows).to_csv(folder / "arms.csv", index=False)
    controls = [
        {"organism": o, "control": c, "run": "r", "alignment_final": a, "closure_final": x}
        for o, c, a, x in [("a", "wrong_witness", 0.1, None), ("b", "wrong_witness", 0.3, None),
                           ("a", "unaligned_twin", 0.9, 0.4), ("b", "unaligned_twin", 0.9, 0.6)]
    ]  # fmt: skip
    pd.DataFrame(controls).to_csv(folder / "controls.csv", index=False)
    pd.DataFrame({"null": ["weight_noise", "isotropic"], "p99": [0.4, 9.0]}).to_csv(
        folder / "nulls_layer_mean.csv", index=False
    )
    return folder


def test_a_pilot_replaces_what_it_measured(tmp_path: Path) -> None:
    found = Effects.from_results(pilot(tmp_path))
    wanted = {
        "alignment": 0.7, "alignment_anchors": np.sqrt(0.02), "alignment_runs": 0.02 * np.sqrt(2),
        "harm": 0.8, "harm_anchors": np.sqrt(0.02), "harm_seeds": 0.01 * np.sqrt(2), "clamp": 0.1,
        "random": 0.6, "random_directions": 0.1, "held": 0.5, "held_sd": 0.0, "strangers": 0.2,
        "strangers_sd": np.sqrt(0.02), "closure": 0.5, "closure_sd": np.sqrt(0.02), "noise": 0.4 / stats.norm.isf(0.01),
    }  # fmt: skip
    assert {name: getattr(found, name) for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert found.anchor_harm == Effects().anchor_harm and "anchor_harm" not in found.source.split(";")[0]
    assert tmp_path.name in found.source and "held" in found.source and Effects().source in found.source
    (tmp_path / "results.json").write_text("{}")
    assert Effects.from_results(tmp_path / "results.json") == found


def test_a_mean_over_strangers_does_not_pass_for_one_stranger(tmp_path: Path) -> None:
    controls = pd.read_csv(pilot(tmp_path) / "controls.csv")
    controls.replace("wrong_witness", "stranger").to_csv(tmp_path / "controls.csv", index=False)
    found = Effects.from_results(tmp_path)
    assert found.strangers == pytest.approx(0.2) and found.strangers_sd == Effects().strangers_sd
    assert "strangers_sd" not in found.source


def test_a_pilot_of_one_anchor_has_no_spread_between_anchors(tmp_path: Path) -> None:
    pilot(tmp_path)
    arms = pd.read_csv(tmp_path / "arms.csv")
    arms[arms.organism == "a"].to_csv(tmp_path / "arms.csv", index=False)
    found = Effects.from_results(tmp_path)
    assert found.alignment == pytest.approx(0.6) and found.alignment_anchors == Effects().alignment_anchors
    with refused("no arms.csv"):
        Effects.from_results(tmp_path / "elsewhere" / "results.json")


def test_it_is_callable_where_the_documentation_says_and_loads_nothing_early() -> None:
    assert gl.stats.power is power
    code = "import sys, gravlens; gravlens.stats; assert 'scipy' not in sys.modules; gravlens.stats.power"
    subprocess.run([sys.executable, "-c", code], check=True)
