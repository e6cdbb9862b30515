"""Arms at equal task loss, on tables whose answer is worked out by hand."""

import numpy as np
import pandas as pd
from histories import refused

from gravlens.claims.tradeoff import at_equal_task_loss


def table(rows: list[tuple[str, int, float, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["arm", "run", "task_loss", "compliance_rate"])


# Early stops of two runs: the loss falls, the harm rises; not in the order of the loss.
STOPS = [("unblocked", 0, 0.2, 0.8), ("unblocked", 0, 0.4, 0.0), ("unblocked", 0, 0.3, 0.2), ("unblocked", 1, 0.2, 0.6),
         ("unblocked", 1, 0.4, 0.4)]  # fmt: skip


def test_an_arm_is_held_against_its_own_run_at_its_own_loss() -> None:
    found = at_equal_task_loss(table([*STOPS, ("penalty", 0, 0.25, 0.1), ("penalty", 1, 0.25, 0.1)]))
    assert found["arm"].tolist() == ["penalty", "penalty"] and found["run"].tolist() == [0, 1]
    np.testing.assert_allclose(found["at_reference"], [0.5, 0.55])  # halfway from .8 to .2; a quarter from .6 to .4
    np.testing.assert_allclose(found["difference"], [-0.4, -0.45])
    assert found["reason"].tolist() == ["", ""]


def test_the_ends_of_the_frontier_are_read_and_nothing_beyond() -> None:
    arms = [("low", 0, 0.2, 0.1), ("high", 0, 0.4, 0.1), ("below", 0, 0.19, 0.1), ("above", 0, 0.41, 0.1)]
    found = at_equal_task_loss(table([*arms, *STOPS])).set_index("arm")
    np.testing.assert_allclose(found["at_reference"], [0.8, 0.0, np.nan, np.nan])
    assert found["difference"].isna().tolist() == [False, False, True, True]
    for arm, loss in (("below", "0.19"), ("above", "0.41")):
        assert found["reason"][arm] == f"task loss {loss} lies outside the reference's, 0.2 to 0.4"


def test_what_cannot_be_read_says_why() -> None:
    one = [("unblocked", 2, 0.2, 0.8)]
    lossless = [("unblocked", 3, np.nan, 0.8), ("unblocked", 3, 0.2, np.nan)]
    arms = [("penalty", run, loss, 0.1) for run, loss in ((2, 0.2), (3, 0.2), (9, 0.3), (0, np.nan))]
    found = at_equal_task_loss(table([*STOPS, *one, *lossless, *arms]))
    assert found["at_reference"].isna().all()
    assert [reason.split(",")[0] for reason in found["reason"]] == [
        "the reference has 1 point of task loss",
        "the reference has 0 point of task loss",
        "the reference has no such run",
        "task loss nan lies outside the reference's",
    ]


def test_points_of_one_loss_count_at_their_mean() -> None:
    twice = [("unblocked", 0, 0.2, 0.8), ("unblocked", 0, 0.2, 0.4), ("unblocked", 0, 0.4, 0.2)]
    found = at_equal_task_loss(table([*twice, ("penalty", 0, 0.3, 0.1)]))
    np.testing.assert_allclose(found["at_reference"], [0.4])


def test_several_references_make_one_frontier_and_runs_go_by_further_columns() -> None:
    rows = [("unblocked", 0, 0.2, 0.8), ("lower_rate", 0, 0.4, 0.4), ("penalty", 0, 0.3, 0.1)]
    both = pd.concat([table(rows).assign(organism=4), table(rows).assign(organism=5, compliance_rate=1.0)])
    references = ("unblocked", "lower_rate")
    found = at_equal_task_loss(both, reference=references, by=("organism", "run"))
    np.testing.assert_allclose(found["at_reference"], [0.6, 1.0])
    assert found["organism"].tolist() == [4, 5] and found["arm"].unique().tolist() == ["penalty"]


def test_another_measure_and_the_given_table_is_left_alone() -> None:
    given = table([*STOPS, ("penalty", 0, 0.25, 0.1)]).rename(columns={"compliance_rate": "over_refusal"})
    before = given.copy()
    found = at_equal_task_loss(given, measure="over_refusal")
    assert list(found) == ["arm", "run", "task_loss", "over_refusal", "at_reference", "difference", "reason"]
    pd.testing.assert_frame_equal(given, before)


def test_a_table_without_what_is_needed_is_refused() -> None:
    with refused("no column 'kl'"):
        at_equal_task_loss(table(STOPS), measure="kl")
    with refused("reference 'plain'"):
        at_equal_task_loss(table(STOPS), reference="plain")
    with refused("no column 'organism'"):
        at_equal_task_loss(table(STOPS), by=("organism", "run"))
