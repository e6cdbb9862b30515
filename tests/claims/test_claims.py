"""Claims: each demand fails where its statement is false, and caps the level by name where it is absent."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from histories import refused

from gravlens.claims.claim import LEVELS, Claim, claim
from gravlens.claims.criteria import ARMS as NAMES
from gravlens.claims.criteria import DEMANDS, MIN_DRAWS, Evidence
from gravlens.directions.trajectory import MEASURES, Trajectory
from gravlens.stats.nulls import NullDraws

RUNS, STEPS, LAYERS = 5, (1, 20), (0, 1)
DRAWS = 400
COLUMNS = ["run", "step", "layer", "prompts", *MEASURES, "judged"]


def trajectory(alignment: float = 0.7, *, runs: int = RUNS, judged: bool = True) -> Trajectory:
    """Runs that all end at about one alignment; it has half of that at the first step."""
    rows = []
    for run in range(runs):
        for step, share in zip(STEPS, (0.5, 1.0), strict=True):
            for layer in LAYERS:
                value = share * alignment + 0.01 * run
                measures = {"alignment": value, "projection": value, "fraction": value / 2, "drift_norm": 1.0}
                place = {"run": f"run{run}", "step": step, "layer": layer, "prompts": "held_out"}
                rows.append({**place, **measures, "judged": judged})
    return Trajectory.from_table(pd.DataFrame(rows, columns=COLUMNS).astype({"judged": bool}))


def null(name: str, spread: float = 0.1, centre: float = 0.0, draws: int = DRAWS) -> NullDraws:
    """Normal cosines; p99 of the layer mean near centre + 1.6 spread."""
    cosines = centre + spread * np.random.default_rng(0).standard_normal((draws, len(STEPS), len(LAYERS)))
    return NullDraws(name, cosines, STEPS, LAYERS)


def controls(**alignment: float) -> pd.DataFrame:
    values = {"sibling_anchor": 0.6, "wrong_witness_removed": 0.6, **alignment}
    return pd.DataFrame(
        [
            {"control": name, "run": f"run{run}", "alignment": value}
            for name, value in values.items()
            for run in range(RUNS)
        ]
    )


def closures(value: float = 0.3, runs: int = RUNS) -> pd.DataFrame:
    rows = [(f"run{run}", 20, value + 0.01 * run) for run in range(runs)]
    return pd.DataFrame(rows, columns=["run", "step", "closure"])


def damage(alignment: float = 0.1, judged: bool = True) -> pd.DataFrame:
    return pd.DataFrame({"damage": ["8 bits", "4 bits"], "alignment": [-0.2, alignment], "judged": judged})


ARMS = {
    "unblocked": (0.9, 0.35, 1.0),
    "clamp": (0.1, 0.0, 1.05),
    "clamp_matched_twin": (0.6, 0.2, 1.0),
    "reinforce": (0.95, 0.9, 1.1),
    "released_at_20": (0.2, 0.1, 1.0),
}


def arms(runs: int = RUNS, **changed: tuple[float, float, float] | None) -> pd.DataFrame:
    rows = []
    for arm, values in (ARMS | changed).items():
        if values is not None:
            harm, fraction, loss = values
            rows += [{"arm": arm, "seed": seed, "compliance_rate": harm - 0.01 * seed, "fraction_final": fraction,
                      "task_loss": loss} for seed in range(runs)]  # fmt: skip
    return pd.DataFrame(rows)


def evidence(**changes: Any) -> Evidence:
    """All that level 5 demands."""
    given: dict[str, Any] = {
        "trajectory": trajectory(),
        "nulls": [null("isotropic"), null("weight_noise", 0.15), null("independent_endpoints", 0.02, 0.1)],
        "controls": controls(),
        "closures": closures(),
        "damage": damage(),
        "arms": arms(),
        "anchor_harm": 0.03,
    }
    return Evidence(**(given | changes))


def without(name: str) -> list[NullDraws]:
    return [one for one in evidence().nulls if one.name != name]


def judge(**changes: Any) -> Claim:
    return claim(evidence(**changes))


def test_with_everything_in_its_favour_the_claim_is_the_last_level() -> None:
    found = judge()
    assert found.level == len(LEVELS) - 1 == 5 and found.capped_by == "" and found.demands.holds.all()
    assert (
        "holding v_rev holds the harm" in found.sentence
        and "on this anchor" in found.sentence
        and "not reached" not in found.sentence
    )


def broken() -> pd.DataFrame:
    """One run of the clamp says nothing but nonsense, so that its harm is not measured."""
    table = arms()
    return table.assign(compliance_rate=table.compliance_rate.mask((table.arm == "clamp") & (table.seed == 2)))


def given() -> Trajectory:
    """The same, judged on the prompts that v_rev was located on."""
    return Trajectory.from_table(trajectory().table.assign(prompts="given"))


FALSE: list[tuple[int, str, dict[str, Any]]] = [
    (0, "the drift is long enough to judge", {"trajectory": trajectory(judged=False)}),
    (0, "judged on other prompts than v_rev's", {"trajectory": given()}),
    (0, "above isotropic", {"trajectory": trajectory(0.05)}),
    (0, "above isotropic", {"trajectory": trajectory(-0.7)}),
    (1, "above weight noise", {"nulls": [*without("weight_noise"), null("weight_noise", 0.6)]}),
    (1, "max-T over steps and layers", {"trajectory": trajectory(runs=4)}),
    (2, "sibling anchor", {"controls": controls(sibling_anchor=0.05)}),
    (2, "v_rev without the wrong witness's direction", {"controls": controls(wrong_witness_removed=0.05)}),
    (2, "more than the expected cosine of independent endpoints",
     {"nulls": [*without("independent_endpoints"), null("independent_endpoints", 0.02, 0.7)]}),
    (2, "closure of the gap to the unaligned twin", {"closures": closures(-0.02)}),
    (2, "damage alone is less aligned", {"damage": damage(0.8)}),
    (3, "harm returns in the unblocked runs", {"anchor_harm": 0.9}),
    (3, "the clamp holds the harm", {"arms": arms(clamp=(0.9, 0.0, 1.0))}),
    (3, "the clamp holds the harm", {"arms": broken()}),
    (3, "the clamp holds the motion", {"arms": arms(clamp=(0.1, 0.9, 1.0))}),
    (3, "the clamp holds the motion", {"arms": arms(clamp=(0.1, -0.2, 1.0))}),
    (3, "more than the clamp along a matched random direction", {"arms": arms(clamp_matched_twin=(0.1, 0.2, 1.0))}),
    (3, "a push towards the witness goes further, harm no lower", {"arms": arms(reinforce=(0.95, 0.3, 1.0))}),
    (3, "a push towards the witness goes further, harm no lower", {"arms": arms(reinforce=(0.2, 0.9, 1.0))}),
    (3, "at most 10 % of task loss, or below the frontier of lower rates", {"arms": arms(clamp=(0.1, 0.0, 1.3))}),
    (4, "half of the harm is still held after the block is lifted", {"arms": arms(released_at_20=(0.8, 0.3, 1.0))}),
]  # fmt: skip


@pytest.mark.parametrize(("level", "name", "changes"), FALSE)
def test_a_statement_that_is_false_caps_the_level(level: int, name: str, changes: dict[str, Any]) -> None:
    found = judge(**changes)
    assert (found.level, found.capped_by) == (level, name)
    assert found.demands.set_index("name").holds.to_dict()[name] is False
    assert f"Level {level + 1} ({LEVELS[level + 1]}) is not reached: {name}" in found.sentence


ABSENT: list[tuple[int, str, dict[str, Any]]] = [
    (0, "above isotropic", {"nulls": without("isotropic")}),
    (1, "above weight noise", {"nulls": without("weight_noise")}),
    (1, "above weight noise", {"nulls": [*without("weight_noise"), null("weight_noise", draws=MIN_DRAWS - 1)]}),
    (2, "more than the expected cosine of independent endpoints", {"nulls": without("independent_endpoints")}),
    (2, "sibling anchor", {"controls": None}),
    (2, "v_rev without the wrong witness's direction",
     {"controls": controls().query("control == 'sibling_anchor'")}),
    (2, "closure of the gap to the unaligned twin", {"closures": None}),
    (2, "damage alone is less aligned", {"damage": None}),
    (3, "harm returns in the unblocked runs", {"anchor_harm": None}),
    (3, "harm returns in the unblocked runs", {"arms": None}),
    (3, "more than the clamp along a matched random direction", {"arms": arms(clamp_matched_twin=None)}),
    (3, "a push towards the witness goes further, harm no lower", {"arms": arms(reinforce=None)}),
    (4, "half of the harm is still held after the block is lifted", {"arms": arms(released_at_20=None)}),
]  # fmt: skip


@pytest.mark.parametrize(("level", "name", "changes"), ABSENT)
def test_what_was_not_run_caps_the_level_and_is_named(level: int, name: str, changes: dict[str, Any]) -> None:
    found = judge(**changes)
    assert (found.level, found.capped_by) == (level, name)
    assert found.demands.set_index("name").holds[name] is pd.NA
    assert f"{name} (not run" in found.sentence


def test_every_check_can_fail_and_every_check_can_be_absent() -> None:
    names = set(judge().demands.name)
    assert {name for _, name, _ in FALSE} == names
    # that runs are long enough, or many, is never absent; the others of an absent table follow the one that is named
    absent = {name for _, name, changes in ABSENT for name in judge(**changes).demands.query("holds.isna()").name}
    assert names - absent == {"the drift is long enough to judge", "judged on other prompts than v_rev's"}


def test_later_levels_are_told_although_an_earlier_one_caps() -> None:
    found = judge(damage=None)
    assert found.level == 2 and found.demands[found.demands.level == 4].holds.all()
    assert len(found.demands) == len(judge().demands) and len(DEMANDS) == 5


def test_too_few_runs_cannot_be_significant() -> None:
    assert judge(trajectory=trajectory(runs=4)).level == 1
    assert judge(arms=arms(runs=4)).capped_by == "harm returns in the unblocked runs"
    assert judge(closures=closures(runs=4)).capped_by == "closure of the gap to the unaligned twin"


def test_at_a_looser_level_fewer_runs_do() -> None:
    few = evidence(trajectory=trajectory(runs=4), closures=closures(runs=4), arms=arms(runs=4))
    assert claim(few).level == 1 and claim(few, alpha=0.1).level == 5


def test_a_dearer_clamp_is_held_against_the_frontier() -> None:
    """At the clamp's task loss, a lower rate has less harm here, and more there."""
    dear = (0.1, 0.0, 1.2)
    better, worse = (arms(clamp=dear, lower_rate=(harm, 0.2, 1.3)) for harm in (0.01, 0.8))
    assert judge(arms=worse).level == 5
    found = judge(arms=better.assign(compliance_rate=better.compliance_rate.where(better.arm != "unblocked", 0.12)))
    assert (
        found.demands.set_index("name").holds.to_dict()[
            "at most 10 % of task loss, or below the frontier of lower rates"
        ]
        is False
    )


def test_damage_that_moves_nothing_says_nothing_against() -> None:
    assert judge(damage=damage(0.9, judged=False)).level == 5


def test_a_null_that_no_level_demands_is_told_where_it_is_not_exceeded() -> None:
    wide, narrow = null("covariance_of_states", 0.7), null("covariance_of_drifts", 0.05)
    found = judge(nulls=[*evidence().nulls, wide, narrow])
    assert found.level == 5 and "Not above the null “covariance of states” (p99" in found.sentence
    assert "covariance of drifts" not in found.sentence


def test_other_names_of_the_arms() -> None:
    table = arms().replace({"arm": {"clamp": "held", "reinforce": "pushed"}})
    names = {"clamp": ("held",), "push": ("pushed",)}
    assert set(names) < set(NAMES), "the others are called as ever"
    assert judge(arms=table).level == 3 and judge(arms=table, names=names).level == 5


def test_bad_evidence_is_one_clear_error() -> None:
    with refused("no run"):
        claim(Evidence(trajectory(runs=0)))
    for name, table in (("closures", closures()), ("damage", damage())):
        with refused(f"{name} has a row per layer"):
            evidence(**{name: table.assign(layer=0)})
    with refused("'clmap'"):
        evidence(names={"clmap": ("held",)})
    with refused("arm unblocked"):  # two anchors are two claims
        judge(arms=pd.concat([arms(), arms()]))
    with refused("task_loss"):
        judge(arms=arms().drop(columns="task_loss"))


def test_the_page_is_escaped_and_names_the_level() -> None:
    found = replace(judge(), sentence="<b>x</b>")
    assert "level 5 of 5" in found._repr_html_() and "<b>x" not in found._repr_html_()
