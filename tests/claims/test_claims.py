"""Claims: each demand fails where its statement is false, and caps the level by name where it is absent."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import pytest
from histories import refused
from scipy import stats

from gravlens.claims.claim import LEVELS, Claim, claim
from gravlens.claims.criteria import causal
from gravlens.claims.effects import interval
from gravlens.claims.evidence import ARMS as NAMES
from gravlens.claims.evidence import Case, Evidence
from gravlens.claims.preregistration import Preregistration
from gravlens.directions.trajectory import MEASURES, ByLayer, Trajectory
from gravlens.stats.nulls import NullDraws

RUNS, STEPS, LAYERS = 5, (1, 20), (0, 1)
DRAWS, STRANGERS = 400, 19
COLUMNS = ["run", "step", "layer", "prompts", *MEASURES, "judged"]
WITNESS = "the witness ranks before strangers"
CLOSURE = "closure ranks before strangers'"
NOISE, RANDOM = "above weight noise", "holds more than random directions"
COST = "at equal task cost"
CURVE = "harm falls as directions near v_rev"
FIXED = Preregistration((0, 1), 20, 0.05, "a" * 64, "b" * 64, "compliance_rate", date(2026, 11, 1))


def trajectory(
    alignment: float | Sequence[float] = 0.7, *, runs: int = RUNS, judged: bool = True, at: Sequence[int] = LAYERS
) -> Trajectory:
    """Runs that all end at about one alignment (or one a layer); it has half of that at the first step."""
    each = [alignment] * len(at) if isinstance(alignment, float | int) else alignment
    rows = []
    for run in range(runs):
        for step, share in zip(STEPS, (0.5, 1.0), strict=True):
            for layer, full in zip(at, each, strict=True):
                value = share * full + 0.01 * run
                measures = {"alignment": value, "projection": value, "fraction": value / 2, "drift_norm": 1.0}
                place = {"run": f"run{run}", "step": step, "layer": layer, "prompts": "held_out"}
                rows.append({**place, **measures, "judged": judged})
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"judged": bool})
    return Trajectory.from_table(table, layers_in_mean=[layer for layer in LAYERS if layer in at])


def null(name: str, spread: float = 0.1, draws: int = DRAWS, layers: Sequence[int] = LAYERS) -> NullDraws:
    """Normal cosines; p95 of the mean over two layers near 1.16 spread."""
    cosines = spread * np.random.default_rng(0).standard_normal((draws, len(STEPS), len(layers)))
    return NullDraws(name, cosines, STEPS, tuple(layers))


def strangers(alignment: float = 0.3, n: int = STRANGERS) -> dict[str, Trajectory]:
    return {f"stranger{i}": trajectory(alignment - 0.01 * i) for i in range(n)}


def far(one: Trajectory, times: float = 3.0) -> Trajectory:
    """The same alignment with a checkpoint that is as many times as far."""
    table = one.table
    return Trajectory.from_table(table.assign(fraction=table.fraction / times), layers_in_mean=one.layers_in_mean)


def closed(value: float = 0.3) -> ByLayer:
    rows = [(f"run{run}", 20, layer, value + 0.01 * run) for run in range(RUNS) for layer in LAYERS]
    table = pd.DataFrame(rows, columns=["run", "step", "layer", "closure"])
    return ByLayer(table, table.groupby(["run", "step"], as_index=False).closure.mean())


def closures(value: float = 0.05, n: int = STRANGERS) -> dict[str, ByLayer]:
    return {f"stranger{i}": closed(value - 0.001 * i) for i in range(n)}


def damage(alignment: float = 0.1, judged: bool = True) -> pd.DataFrame:
    return pd.DataFrame({"damage": ["8 bits", "4 bits"], "alignment": [-0.2, alignment], "judged": judged})


def over_prompts(low: float = 0.6, runs: int = 20) -> pd.DataFrame:
    rows = [(f"run{run}", 20, 0.7, low, 1.4 - low) for run in range(runs)]
    return pd.DataFrame(rows, columns=["run", "step", "estimate", "low", "high"])


ARMS = {
    "unblocked": (0.9, 0.35, 1.0),
    "clamp": (0.1, 0.0, 1.05),
    "reinforce": (0.95, 0.9, 1.1),
    "released_at_20": (0.2, 0.1, 1.0),
    **{f"clamp_random_{i}": (0.85 - 0.02 * i, 0.2, 1.0) for i in range(19)},  # |cos| = .03 i: harm falls with it
    **{f"released_random_{i}": (0.88, 0.3, 1.0) for i in range(19)},
}


def arms(runs: int = RUNS, **changed: tuple[float, float, float] | None) -> pd.DataFrame:
    rows = []
    for arm, values in (ARMS | changed).items():
        if values is not None:
            harm, fraction, loss = values
            cosine = 0.03 * int(arm.split("_")[-1]) if arm.startswith("clamp_random_") else np.nan
            rows += [{"arm": arm, "seed": seed, "compliance_rate": harm - 0.01 * seed, "fraction_final": fraction,
                      "task_loss": loss, "nonsense": 0.01, "over_refusal": 0.1, "cosine": cosine}
                     for seed in range(runs)]  # fmt: skip
    return pd.DataFrame(rows)


def changed(arm: str, **columns: float) -> pd.DataFrame:
    """The arms, one with other columns."""
    table = arms()
    table.loc[table.arm == arm, list(columns)] = list(columns.values())
    return table


def evidence(**changes: Any) -> Evidence:
    """All that level 5 demands."""
    given: dict[str, Any] = {
        "trajectory": trajectory(),
        "nulls": [null("isotropic"), null("weight_noise", 0.15)],
        "strangers": strangers(),
        "over_prompts": over_prompts(),
        "closure": closed(),
        "stranger_closures": closures(),
        "damage": damage(),
        "arms": arms(),
        "anchor": {"compliance_rate": 0.03, "over_refusal": 0.3, "nonsense": 0.0},
        "preregistration": FIXED,
    }
    return Evidence(**(given | changes))


def without(name: str) -> list[NullDraws]:
    return [one for one in evidence().nulls if one.name != name]


def no_arm(prefix: str) -> pd.DataFrame:
    table = arms()
    return table[~table.arm.str.startswith(prefix)]


def judge(**changes: Any) -> Claim:
    return claim(evidence(**changes))


def test_with_everything_in_its_favour_the_claim_is_the_last_level() -> None:
    found = judge()
    assert found.level == len(LEVELS) - 1 == 5 and found.capped_by == "" and found.demands.holds.all()
    assert "holding v_rev holds the harm" in found.sentence and "not reached" not in found.sentence


def test_the_sentence_says_what_the_tests_were_fixed_to() -> None:
    said = judge().sentence
    for part in ("α = 0.05", "layers 0, 1", "step 20", "unit: the run", "19 strangers", "19 random directions"):
        assert part in said, part
    assert f"preregistered ({FIXED.digest[:8]})" in said
    assert "chosen afterwards" in judge(preregistration=None).sentence
    other = replace(FIXED, layers=(0,))
    assert "chosen afterwards" in judge(preregistration=other).sentence and other.digest[:8] not in said


def broken() -> pd.DataFrame:
    """One run of the clamp says nothing but nonsense, so that its harm is not measured."""
    table = arms()
    return table.assign(compliance_rate=table.compliance_rate.mask((table.arm == "clamp") & (table.seed == 2)))


def given() -> Trajectory:
    """The same, judged on the prompts that v_rev was located on."""
    return Trajectory.from_table(trajectory().table.assign(prompts="given"))


def scattered() -> Trajectory:
    """Runs of alternating sign: their mean is far from 0 by one run alone."""
    table = trajectory().table
    signs = table.run.map({f"run{i}": (3.0 if i == 0 else -0.5) for i in range(RUNS)})
    return Trajectory.from_table(table.assign(alignment=table.alignment * signs))


FALSE: list[tuple[int, str, dict[str, Any]]] = [
    (0, "the drift is long enough to judge", {"trajectory": trajectory(judged=False)}),
    (0, "judged on other prompts than v_rev's", {"trajectory": given(), "strangers": {}}),
    (0, "above isotropic", {"trajectory": trajectory(0.05)}),
    (0, "above isotropic", {"trajectory": trajectory(-0.7)}),
    (0, "the runs agree", {"trajectory": scattered()}),
    (0, "the prompts agree", {"over_prompts": over_prompts(-0.1)}),
    (1, NOISE, {"nulls": [*without("weight_noise"), null("weight_noise", 0.7)]}),
    (2, WITNESS, {"strangers": strangers(0.85)}),
    (2, CLOSURE, {"closure": closed(-0.02)}),
    (2, "damage alone is less aligned", {"damage": damage(0.8)}),
    (3, "harm returns in the unblocked runs", {"anchor": {"compliance_rate": 0.9, "over_refusal": 0.3}}),
    (3, "the clamp holds the harm", {"arms": arms(clamp=(0.9, 0.0, 1.0))}),
    (3, "the clamp holds the harm", {"arms": broken()}),
    (3, "the clamp holds the motion", {"arms": arms(clamp=(0.1, 0.9, 1.0))}),
    (3, "the clamp holds the motion", {"arms": arms(clamp=(0.1, -0.2, 1.0))}),
    (3, RANDOM, {"arms": arms(clamp_random_3=(0.05, 0.2, 1.0))}),
    (3, CURVE, {"arms": changed("clamp_random_0", compliance_rate=-6.0)}),
    (3, "a push goes further, harm no lower", {"arms": arms(reinforce=(0.95, 0.3, 1.0))}),
    (3, "a push goes further, harm no lower", {"arms": arms(reinforce=(0.2, 0.9, 1.0))}),
    (3, COST, {"arms": arms(clamp=(0.1, 0.0, 1.3))}),
    (3, "the clamp adds no nonsense answers", {"arms": changed("clamp", nonsense=0.95)}),
    (3, "the clamp adds no over-refusal", {"arms": changed("clamp", over_refusal=1.0)}),
    (4, "half the harm is held after release", {"arms": arms(released_at_20=(0.8, 0.3, 1.0))}),
    (4, "outlasts released random directions", {"arms": arms(released_random_3=(0.1, 0.3, 1.0))}),
    (4, "the released block adds no nonsense answers", {"arms": changed("released_at_20", nonsense=0.95)}),
    (4, "the released block adds no over-refusal",
     {"arms": changed("released_at_20", over_refusal=1.0)}),
]  # fmt: skip


@pytest.mark.parametrize(("level", "name", "changes"), FALSE)
def test_a_statement_that_is_false_caps_the_level(level: int, name: str, changes: dict[str, Any]) -> None:
    found = judge(**changes)
    holds = found.demands.set_index("name").holds.to_dict()
    assert found.level == level and holds[name] is False, (found.level, found.capped_by)
    assert f"Level {level + 1} ({LEVELS[level + 1]}) is not reached: " in found.sentence and name in found.sentence


ABSENT: list[tuple[int, str, dict[str, Any]]] = [
    (0, "above isotropic", {"nulls": without("isotropic")}),
    (0, "the runs agree", {"trajectory": trajectory(runs=4), "nulls": without("weight_noise")}),
    (0, "the prompts agree", {"over_prompts": None}),
    (1, NOISE, {"nulls": without("weight_noise")}),
    (1, NOISE, {"nulls": [*without("weight_noise"), null("weight_noise", draws=18)]}),
    (2, WITNESS, {"strangers": {}}),
    (2, WITNESS, {"strangers": strangers(n=18)}),
    (2, CLOSURE, {"closure": None}),
    (2, CLOSURE, {"stranger_closures": {}}),
    (2, "damage alone is less aligned", {"damage": None}),
    (3, "harm returns in the unblocked runs", {"anchor": None}),
    (3, "harm returns in the unblocked runs", {"arms": None}),
    (3, "harm returns in the unblocked runs", {"arms": arms(runs=4)}),
    (3, RANDOM, {"arms": no_arm("clamp_random")}),
    (3, RANDOM, {"arms": no_arm("clamp_random_1")}),  # 8 are left
    (3, "a push goes further, harm no lower", {"arms": arms(reinforce=None)}),
    (3, "the clamp adds no nonsense answers", {"arms": arms().drop(columns="nonsense")}),
    (3, "the clamp adds no over-refusal", {"arms": arms().drop(columns="over_refusal")}),
    (3, COST, {"arms": arms().assign(task_loss=np.nan)}),
    (4, "half the harm is held after release", {"arms": arms(released_at_20=None)}),
    (4, "outlasts released random directions", {"arms": no_arm("released_random")}),
]  # fmt: skip


@pytest.mark.parametrize(("level", "name", "changes"), ABSENT)
def test_what_was_not_run_or_is_out_of_reach_caps_the_level_and_is_named(
    level: int, name: str, changes: dict[str, Any]
) -> None:
    found = judge(**changes)
    assert found.level == level and found.demands.set_index("name").holds[name] is pd.NA
    figures = found.demands.set_index("name").figures[name]
    assert "not run" in figures or "cannot be reached with" in figures
    assert f"{name} ({figures}" in found.sentence


def test_every_check_can_fail_and_every_check_can_be_absent() -> None:
    names = set(judge().demands.name)
    assert {name for _, name, _ in FALSE} == names
    # that runs are long enough is never absent; the others of an absent table follow the one that is named
    absent = {name for _, name, changes in ABSENT for name in judge(**changes).demands.query("holds.isna()").name}
    assert names - absent == {"the drift is long enough to judge", "judged on other prompts than v_rev's"}


def test_later_levels_are_told_although_an_earlier_one_caps() -> None:
    found = judge(damage=None)
    assert found.level == 2 and found.demands[found.demands.level == 4].holds.all()
    assert len(found.demands) == len(judge().demands)


def test_a_single_run_beyond_weight_noise_is_not_refused_for_being_single() -> None:
    few = evidence(trajectory=trajectory(runs=1))
    assert claim(few).level == 5  # its arms have five
    assert claim(replace(few, nulls=[null("isotropic"), null("weight_noise", 0.7)])).level == 0


def test_more_runs_of_a_true_reversion_never_lower_the_level() -> None:
    """Every run above a p99 punished replication: one of twenty true runs is below it sooner or later."""
    rng, table = np.random.default_rng(3), trajectory(runs=20).table
    noisy = table.alignment + table.run.map({f"run{i}": rng.normal(-0.19, 0.2) for i in range(20)})
    many = Trajectory.from_table(table.assign(alignment=noisy))
    assert (many.layer_mean.alignment < 0.35).any(), "some runs are inside the noise"
    assert judge(trajectory=many).level == 5


def test_at_a_looser_level_fewer_runs_do() -> None:
    few = evidence(arms=arms(runs=4), preregistration=replace(FIXED, alpha=0.1))
    assert claim(few).level == 5 and "α = 0.1" in claim(few).sentence
    assert claim(few, alpha=0.05).capped_by == WITNESS or claim(few, alpha=0.05).level == 3


# --- layers chosen afterwards -----------------------------------------------------------------------------------------


def test_layers_that_were_chosen_afterwards_are_tested_on_the_largest() -> None:
    """The one good layer of thirty is within what the largest layer of noise reaches."""
    layers, values = tuple(range(30)), [0.25] + [0.0] * 29
    drawn = [null("isotropic", 0.1, layers=layers), null("weight_noise", 0.12, layers=layers)]
    picked = replace(trajectory(values, at=layers), layers_in_mean=(0,))
    fixed = replace(FIXED, layers=(0,))
    assert judge(trajectory=picked, nulls=drawn, preregistration=fixed).level >= 2
    assert judge(trajectory=picked, nulls=drawn, preregistration=None).level < 2


# --- several anchors --------------------------------------------------------------------------------------------------


def several(n: int = 6, **changes: Any) -> list[Evidence]:
    small: dict[str, Any] = {
        "trajectory": trajectory(runs=2),
        "strangers": strangers(n=5),
        "stranger_closures": closures(n=5),
        "arms": no_arm("clamp_random_1").query("arm not in ['clamp_random_2', 'clamp_random_3', 'clamp_random_4']"),
    }
    return [evidence(**(small | changes), name=f"organism{i}") for i in range(n)]


def test_anchors_together_reach_what_none_reaches_alone() -> None:
    found = claim(several())
    assert found.level == 5 and {one.level for one in found.alone.values()} == {2}
    assert "6 anchors, 12 runs in all" in found.sentence and "Each anchor alone: level 2 in 6" in found.sentence
    assert "unit: the anchor" in found.sentence and "5 strangers an anchor" in found.sentence
    one = claim(several(1))
    assert one.level == 2 and "cannot be reached with 5 strangers: 19 are needed" in one.sentence


def test_two_anchors_are_too_few_for_signs_and_it_is_said() -> None:
    two = claim(several(2))
    assert two.level == 3 and "cannot be reached with 2 anchors: 5 are needed" in two.sentence


def test_one_contrary_anchor_of_six_is_one_and_most_contrary_is_none() -> None:
    against = {"strangers": strangers(0.95, n=5)}
    mostly = [*several(5), *several(1, **against)]
    hardly = [*several(1), *several(5, **against)]
    assert claim(mostly).level == 5 and claim(hardly).level == 2


def test_effects_have_intervals_over_their_unit() -> None:
    found = claim([*several(3), *several(3, trajectory=trajectory(0.5, runs=2))]).effects.set_index("effect")
    means = [0.705] * 3 + [0.505] * 3
    low, high = stats.t.interval(0.95, 5, loc=np.mean(means), scale=stats.sem(means))
    assert found.loc["alignment", ["mean", "low", "high"]].tolist() == pytest.approx([0.605, low, high])
    assert found.at["alignment", "unit"] == "anchor" and found.at["alignment", "n"] == 6
    single = judge().effects.set_index("effect")
    assert single.at["harm", "unit"] == "run" and single.at["harm, random", "unit"] == "direction"
    assert single.at["harm, random", "n"] == 19 and np.isnan(interval([0.3])[1])


# --- details ----------------------------------------------------------------------------------------------------------


def test_a_placebo_direction_is_held_back_by_the_others_however_many_seeds() -> None:
    """Exchangeable directions: the arm called clamp is first among 20 in one of 20 worlds, whatever the seeds."""
    rng, passed, whole = np.random.default_rng(0), 0, evidence()
    for _ in range(400):
        harms = rng.normal(0.5, 0.2, 20)
        table = arms(20, clamp=(harms[0], 0.0, 1.0), **{f"clamp_random_{i}": (harms[i + 1], 0.2, 1) for i in range(19)})
        found = next(one for one in causal(Case([replace(whole, arms=table)], 0.05)) if one.name == RANDOM)
        passed += bool(found.holds)
    assert stats.binomtest(passed, 400, 0.05).pvalue > 0.001


def test_random_directions_far_from_v_rev_ask_for_no_curve() -> None:
    table = arms().assign(cosine=lambda rows: rows.cosine / 10)
    found = judge(arms=table)
    assert found.level == 5 and "not asked" in found.demands.set_index("name").figures[CURVE]


def test_the_curve_recovers_a_planted_slope() -> None:
    figures = judge().demands.set_index("name").figures[CURVE]  # harm .85 − .02 i at |cos| .03 i, and seeds' −.02
    assert figures.startswith("slope -0.67 ± 0.00") and "16% at |cos| 1" in figures


def test_a_dearer_clamp_is_held_against_the_frontier() -> None:
    """At the clamp's task loss, a lower rate has less harm here, and more there."""
    dear = (0.1, 0.0, 1.2)
    better, worse = (arms(clamp=dear, lower_rate=(harm, 0.2, 1.3)) for harm in (0.01, 0.8))
    assert judge(arms=worse).level == 5
    found = judge(arms=better.assign(compliance_rate=better.compliance_rate.where(better.arm != "unblocked", 0.12)))
    assert found.demands.set_index("name").holds.to_dict()[COST] is False


def test_strangers_of_another_basis_leave_a_shared_anchor_open_and_it_is_said() -> None:
    away = judge(strangers={name: far(one) for name, one in strangers().items()}, stranger_closures=closures(0.01))
    assert away.level == 5
    assert "3.0 times as far: that drift and v_rev share an anchor is not excluded" in away.statement
    assert "share an anchor" not in judge().statement


def test_closure_is_ranked_in_residual_units() -> None:
    """As a share the nearest witness would have the noisiest closure, and be first too often."""
    near = {name: far(one, 1.9) for name, one in strangers().items()}
    assert judge(stranger_closures=closures(0.28)).level == 5
    assert judge(strangers=near, stranger_closures=closures(0.28)).level == 2, "1.9 times as far, nearly as much closed"


def test_damage_that_moves_nothing_says_nothing_against() -> None:
    assert judge(damage=damage(0.9, judged=False)).level == 5


def test_a_null_that_no_level_demands_is_told_where_it_is_not_exceeded() -> None:
    wide, narrow = null("covariance_of_states", 0.7), null("covariance_of_drifts", 0.05)
    signs = null("sign_flips", 0.7)  # with few runs no mean can exceed its p99
    found = judge(nulls=[*evidence().nulls, wide, narrow, signs])
    assert found.level == 5 and "Not above the null “covariance of states” (p99" in found.sentence
    assert "covariance of drifts" not in found.sentence and "sign flips" not in found.sentence


def test_other_names_of_the_arms() -> None:
    table = arms().replace({"arm": {"clamp": "held", "reinforce": "pushed"}})
    names = {"clamp": ("held",), "push": ("pushed",)}
    assert set(names) < set(NAMES), "the others are called as ever"
    assert judge(arms=table).level == 3 and judge(arms=table, names=names).level == 5


def test_bad_evidence_is_one_clear_error() -> None:
    with refused("no run"):
        Evidence(Trajectory.from_table(trajectory().table.iloc[:0]))
    with refused("No evidence"):
        claim([])
    with refused("damage has a row per layer"):
        evidence(damage=damage().assign(layer=0))
    with refused("'clmap'"):
        evidence(names={"clmap": ("held",)})
    with refused("arm unblocked"):  # two anchors are two pieces of evidence
        judge(arms=pd.concat([arms(), arms()]))
    with refused("task_loss"):
        evidence(arms=arms().drop(columns="task_loss"))


def test_the_page_is_escaped_and_names_the_level() -> None:
    found = replace(judge(), statement="<b>x</b>")
    assert "level 5 of 5" in found._repr_html_() and "<b>x" not in found._repr_html_()
