"""Controls in closed form, and the artefact that the sibling anchor is there for."""

from collections.abc import Mapping

import numpy as np
import pytest
from histories import refused, synthetic

from gravlens.controls import closure, from_start, substitute
from gravlens.directions import locate_vrev
from gravlens.residuals import Residuals
from gravlens.trajectory import drifts, follow

PROMPTS, LAYERS, WIDTH = 3, 3, 8
RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.standard_normal((LAYERS, WIDTH, WIDTH)))[0]
V, W = BASIS[:, :, 0], BASIS[:, :, 1]  # [layer, d_model], orthonormal
DISTANCES = np.array([2.0, 5.0, 0.5])[:, None]
ANCHOR = 3 * RNG.standard_normal((PROMPTS, LAYERS, WIDTH))
WITNESS = ANCHOR + DISTANCES * V


def states(start: np.ndarray, moved: Mapping[str, tuple[float, float]]) -> dict[str, np.ndarray]:
    """Checkpoints that are, from a start, `a` of the distance along v and `b` of it at a right angle."""
    jitter = RNG.standard_normal((PROMPTS, LAYERS, WIDTH))
    jitter -= jitter.mean(0)  # prompts differ, their mean does not
    return {name: start + DISTANCES * (a * V + b * W) + jitter for name, (a, b) in moved.items()}


def history(**further: np.ndarray) -> Residuals:
    return synthetic({"witness": WITNESS, "anchor": ANCHOR, **further})


def runs(moved: Mapping[str, tuple[float, float]]) -> Residuals:
    return history(**states(ANCHOR, moved))


def twins(moved: Mapping[str, tuple[float, float]]) -> Residuals:
    return history(**states(WITNESS, moved))


# -- closure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "twin", "closed"),
    [
        ((0.3, 0.7), (0.3, 0.7), 0.0),  # the same data moves both alike
        ((0.3, 0.7), (0.3, -0.2), 0.0),  # a right angle to v closes nothing
        ((1.25, 0.4), (0.25, 0.4), 1.0),  # the run has reached its twin
        ((0.5, 0.0), (0.2, 0.0), 0.3),
        ((0.1, 0.0), (0.4, 0.0), -0.3),  # further apart than before
        ((0.0, 0.0), (-1.0, 0.0), 1.0),  # the twin came over
    ],
)
def test_closure_is_what_the_run_moved_beyond_its_twin(
    run: tuple[float, float], twin: tuple[float, float], closed: float
) -> None:
    vs = locate_vrev(history())
    table = closure(runs({"a/5": run}), twins({"b/5": twin}), vs, pairs=[("a", "b")], layers=(0, 1, 2))
    assert table.closure.to_numpy() == pytest.approx(closed, abs=1e-5)
    assert table.layer.to_list()[:3] == [0, 1, 2] and table.layer.isna().sum() == 1
    assert set(table.run) == {"a"} and set(table.step) == {5}


def test_a_run_that_is_where_its_twin_is_has_closed_the_gap() -> None:
    moved = twins({"b/1": (0.4, 0.1), "b/20": (0.6, -0.3)})
    reached = history(**{f"a/{step}": moved.of(f"b/{step}") for step in (1, 20)})
    table = closure(reached, moved, locate_vrev(history()), pairs=[("a", "b")], layers=(0, 1, 2))
    assert len(table) == 2 * 4 and table.closure.to_numpy() == pytest.approx(1, abs=1e-5)


def test_pairs_steps_and_layers_keep_apart() -> None:
    ours = runs({"a/20": (0.9, 0), "a/1": (0.1, 0), "b/1": (0.5, 0), "b/20": (0.6, 0)})
    theirs = twins({"x/1": (0.05, 0), "x/20": (0.4, 0), "y/1": (0.2, 0), "y/20": (0.1, 0)})
    uneven = theirs.values[theirs.checkpoints.index("x/1")]
    uneven[:, 2] -= (DISTANCES * V)[2] * 0.6  # x/1 differs between layers
    table = closure(ours, theirs, locate_vrev(history()), pairs=[("b", "x"), ("a", "y")], layers=(2, 0))
    assert set(table.layer.dropna()) == {0, 2}
    found = table.set_index([table.run, table.step, table.layer.fillna(-1)]).closure
    wanted = {
        ("b", 1, 0): 0.45, ("b", 1, 2): 1.05, ("b", 1, -1): 0.75, ("b", 20, 0): 0.2, ("b", 20, -1): 0.2,
        ("a", 1, 0): -0.1, ("a", 20, 2): 0.8, ("a", 20, -1): 0.8,
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=1e-5)


def test_closure_wants_the_same_steps() -> None:
    with refused("a has steps (1,)", "twin b (5,)"):
        closure(runs({"a/1": (0, 0)}), twins({"b/5": (0, 0)}), locate_vrev(history()), pairs=[("a", "b")], layers=(0,))


# -- another pair, another start ---------------------------------------------------------------------------------------


def test_substitute_puts_another_checkpoint_in_the_place_of_witness_or_anchor() -> None:
    stranger, sibling = RNG.standard_normal((2, PROMPTS, LAYERS, WIDTH))
    residuals = synthetic(
        {"witness": WITNESS, "anchor": ANCHOR, "wrong_witness": stranger, "sibling_anchor": sibling, "a/1": WITNESS},
        meta={"dtype": ["float32"], "sources": {"witness": "W", "anchor": "A", "sibling_anchor": "A2"}},
    )
    before = residuals.values.copy()
    for swap, ends, made_from in [
        ({"witness": "wrong_witness"}, (stranger, ANCHOR), ("wrong_witness", "A")),
        ({"anchor": "sibling_anchor"}, (WITNESS, sibling), ("W", "A2")),
        ({}, (WITNESS, ANCHOR), ("W", "A")),
    ]:
        vs = locate_vrev(substitute(residuals, **swap))
        wanted = (ends[0] - ends[1]).mean(0)
        assert vs.distances == pytest.approx(np.linalg.norm(wanted, axis=-1), rel=1e-5)
        assert vs.vectors == pytest.approx(wanted / np.linalg.norm(wanted, axis=-1, keepdims=True), abs=1e-5)
        assert (vs[0].made_from["witness"], vs[0].made_from["anchor"]) == made_from
        assert vs[0].prompts == residuals.prompts
    assert np.array_equal(residuals.values, before)
    with refused("'nobody'"):
        substitute(residuals, witness="nobody")


def test_from_start_takes_the_drift_from_elsewhere_and_changes_nothing_given() -> None:
    residuals = twins({"b/1": (0.25, 0.5)})
    moved = drifts(from_start(residuals, start="witness"), "b", (0, 1, 2))[0]
    assert moved == pytest.approx(DISTANCES * (0.25 * V + 0.5 * W), abs=1e-5)
    from_anchor = drifts(residuals, "b", (0, 1, 2))[0]
    assert from_anchor == pytest.approx(DISTANCES * (1.25 * V + 0.5 * W), abs=1e-5), "what was given is as it was"
    with refused("'nobody'"):
        from_start(residuals, start="nobody")


# -- the shared anchor (docs/controls.md) ------------------------------------------------------------------------------


def unrelated(r: float, *, width: int = 4000, layers: int = 30) -> Residuals:
    """Endpoints that have nothing to do with each other; the anchor's excursion has r times their variance."""
    rng = np.random.default_rng(3)
    names = ("witness", "wrong_witness", "anchor", "sibling_anchor", "a/1")
    scale = {"anchor": r**0.5, "sibling_anchor": r**0.5}
    return synthetic({name: scale.get(name, 1.0) * rng.standard_normal((1, layers, width)) for name in names})


@pytest.mark.parametrize("r", [0.25, 1.0, 1.83])
def test_a_shared_anchor_alone_makes_a_cosine_and_a_sibling_anchor_removes_it(r: float) -> None:
    residuals = unrelated(r)

    def cosine(**swap: str) -> float:
        table = follow(residuals, locate_vrev(substitute(residuals, **swap))).table
        return float(table[table.layer.isna()].alignment.iloc[0])

    assert cosine() == pytest.approx(r / (1 + r), abs=0.02)
    assert cosine(witness="wrong_witness") == pytest.approx(r / (1 + r), abs=0.02), "this anchor is shared too"
    assert cosine(anchor="sibling_anchor") == pytest.approx(0, abs=0.02)
