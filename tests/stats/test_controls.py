"""Controls in closed form, and the artefact that the sibling anchor is there for."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from by_layer import stacked
from histories import refused, synthetic

from gravlens.activations.residuals import Residuals, from_start, substitute
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.trajectory import drifts, follow
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.stats.controls import (
    AnchorRatio,
    anchor_ratio,
    closure,
    compare_witnesses,
    independent_endpoints,
    partialled_out,
)
from gravlens.stats.nulls import compare

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
    table = stacked(closure(runs({"a/5": run}), twins({"b/5": twin}), vs, pairs=[("a", "b")], layers=(0, 1, 2)))
    assert table.closure.to_numpy() == pytest.approx(closed, abs=1e-5)
    assert table.layer.to_list()[:3] == [0, 1, 2] and table.layer.isna().sum() == 1
    assert set(table.run) == {"a"} and set(table.step) == {5}


def test_a_run_that_is_where_its_twin_is_has_closed_the_gap() -> None:
    moved = twins({"b/1": (0.4, 0.1), "b/20": (0.6, -0.3)})
    reached = history(**{f"a/{step}": moved.of(f"b/{step}") for step in (1, 20)})
    table = stacked(closure(reached, moved, locate_vrev(history()), pairs=[("a", "b")], layers=(0, 1, 2)))
    assert len(table) == 2 * 4 and table.closure.to_numpy() == pytest.approx(1, abs=1e-5)


def test_pairs_steps_and_layers_keep_apart() -> None:
    ours = runs({"a/20": (0.9, 0), "a/1": (0.1, 0), "b/1": (0.5, 0), "b/20": (0.6, 0)})
    theirs = twins({"x/1": (0.05, 0), "x/20": (0.4, 0), "y/1": (0.2, 0), "y/20": (0.1, 0)})
    uneven = theirs.values[theirs.checkpoints.index("x/1")]
    uneven[:, 2] -= (DISTANCES * V)[2] * 0.6  # x/1 differs between layers
    table = stacked(closure(ours, theirs, locate_vrev(history()), pairs=[("b", "x"), ("a", "y")], layers=(2, 0)))
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
    with refused("nobody"):
        pairs = [("nobody", "nobody")]
        closure(runs({"a/1": (0, 0)}), twins({"b/1": (0, 0)}), locate_vrev(history()), pairs=pairs, layers=(0,))


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
    with refused("'anchor'"):
        from_start(synthetic({"witness": WITNESS, "b/1": WITNESS}), start="witness")


def test_rows_of_several_positions_keep_their_index() -> None:
    residuals = history(b=WITNESS)
    residuals = replace(residuals, index=np.array([[0, at] for at in range(residuals.values.shape[1])]))
    assert substitute(residuals, witness="b").index is residuals.index
    assert from_start(residuals, start="witness").index is residuals.index


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
        table = follow(residuals, locate_vrev(substitute(residuals, **swap))).layer_mean
        return float(table.alignment.iloc[0])

    assert cosine() == pytest.approx(r / (1 + r), abs=0.02)
    assert cosine(witness="wrong_witness") == pytest.approx(r / (1 + r), abs=0.02), "this anchor is shared too"
    assert cosine(anchor="sibling_anchor") == pytest.approx(0, abs=0.02)


# -- a wrong witness, partialled out -----------------------------------------------------------------------------------


def test_what_is_partialled_out_is_gone_and_the_rest_is_gram_and_schmidt_s() -> None:
    given = Directions(tuple(direction_from(2 * V[i] + W[i], layer=i) for i in range(LAYERS)))
    other = Directions(tuple(direction_from(-3 * W[i], layer=i) for i in (2, 0, 1)))  # neither order nor sign matters
    rest = partialled_out(given, other)
    assert rest.layers == (0, 1, 2) and rest.vectors == pytest.approx(V, abs=1e-6)
    assert rest.distances == pytest.approx(2, rel=1e-6), "of (2, 1) along (v, w), 2 is left"
    for direction in rest:
        basis = np.linalg.qr(np.stack([other[direction.layer].vector, given[direction.layer].vector]).T)[0]
        assert abs(basis[:, 1] @ direction.vector) == pytest.approx(1, abs=1e-6)
    right_angle = partialled_out(rest, other)
    assert right_angle.vectors == pytest.approx(V, abs=1e-6) and right_angle.distances == pytest.approx(2, rel=1e-6)
    assert given.vectors[0] == pytest.approx((2 * V + W)[0] / 5**0.5, abs=1e-6), "what was given is as it was"


def test_a_planted_common_part_goes_and_the_specific_one_stays() -> None:
    """Both witnesses lie 3 along what is common; each lies 2 along a direction of its own; a run moves along one."""
    common, own, theirs = BASIS[:, :, 2], V, W
    ends = {"witness": 3 * common + 2 * own, "stranger": 3 * common + 2 * theirs}
    moves = {"common/1": common, "own/1": own, "theirs/1": theirs}
    residuals = history(**{name: ANCHOR + move for name, move in {**ends, **moves}.items()})
    vs, wrong = (locate_vrev(substitute(residuals, witness=name)) for name in ends)
    left = partialled_out(vs, wrong)

    def cosines(directions: Directions) -> dict[str, float]:
        table = follow(residuals, directions).layer_mean
        return table.set_index("run").alignment.to_dict()

    assert cosines(vs) == pytest.approx({"common": 3 / 13**0.5, "own": 2 / 13**0.5, "theirs": 0}, abs=1e-5)
    after = cosines(left)  # v − (9/13) u = (12, 26, −18)/(13√13) of (common, own, theirs)
    scale = (12**2 + 26**2 + 18**2) ** 0.5
    assert after == pytest.approx({"common": 12 / scale, "own": 26 / scale, "theirs": -18 / scale}, abs=1e-5)
    assert left.distances == pytest.approx(scale / 13, rel=1e-5)


def test_partialling_keeps_what_it_was_made_from_and_says_what_is_gone() -> None:
    residuals = history(stranger=ANCHOR + W)
    left = partialled_out(locate_vrev(residuals), locate_vrev(substitute(residuals, witness="stranger")))
    assert left[0].made_from["partialled_out"] == "stranger" and left[0].made_from["witness"] == "witness"
    assert np.isnan(left[0].reliability) and left[0].prompts == residuals.prompts


def test_partialling_is_undefined_where_nothing_is_left_or_nothing_is_known() -> None:
    same = direction_from(V[0], layer=0)
    unknown = Direction(np.full(WIDTH, np.nan), 1, 0.0, undefined="no difference")
    vs = Directions((same, direction_from(V[1], layer=1), unknown))
    vs = Directions((vs[0], vs.directions[1], Direction(unknown.vector, 2, 0.0, undefined="too close")))
    other = Directions((same, unknown, direction_from(V[2], layer=2)))
    found = partialled_out(vs, other)
    assert "nothing is left" in str(found[0].undefined) and found[0].distance < 1e-5
    assert "no difference" in str(found[1].undefined) and found[2].undefined == "too close"
    assert np.isnan(found.vectors).all()
    with refused("layer 2"):
        partialled_out(vs, other.at((0, 1)))


@pytest.mark.parametrize("r", [0.25, 1.0, 1.83])
def test_one_wrong_witness_takes_out_only_a_part_of_the_shared_anchor(r: float) -> None:
    """It is one noisy view of the anchor's excursion: of c, c √((1 − c)/(1 + c)) is left (a partial covariance)."""
    residuals, c = unrelated(r), r / (1 + r)
    vs = locate_vrev(residuals)
    left = partialled_out(vs, locate_vrev(substitute(residuals, witness="wrong_witness")))
    found = float(follow(residuals, left).layer_mean.alignment.iloc[0])
    assert found == pytest.approx(c * ((1 - c) / (1 + c)) ** 0.5, abs=0.02)
    assert (left.distances / vs.distances).mean() == pytest.approx((1 - c**2) ** 0.5, abs=0.02)


# -- every witness beside every other ----------------------------------------------------------------------------------


def test_every_run_is_followed_along_every_pair() -> None:
    names = ("witness", "earlier", "stranger", "anchor", "sibling", "a/1", "a/20", "b/5")
    probes, held_out = (
        synthetic({name: RNG.standard_normal((PROMPTS, LAYERS, WIDTH)) for name in names}, prompts=prompts)
        for prompts in ("probes", "others")
    )
    witnesses, anchors, layers = ("witness", "earlier", "stranger"), ("anchor", "sibling"), (2, 0)
    table = compare_witnesses(probes, held_out, witnesses=witnesses, anchors=anchors, layers_in_mean=layers)
    assert table.columns.to_list() == [
        "witness", "anchor", "run", "step", "alignment", "fraction", "distance", "cosine_with_v_rev"
    ]  # fmt: skip
    assert len(table) == 3 * 2 * 3 and not table.isna().any(axis=None)

    def mean(residuals: Residuals, name: str) -> np.ndarray:
        return residuals.of(name).astype(float).mean(0)[list(layers)]

    def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)

    v_rev = mean(probes, "witness") - mean(probes, "anchor")
    for row in table.to_dict("records"):
        pair = mean(probes, row["witness"]) - mean(probes, row["anchor"])
        drift = mean(held_out, f"{row['run']}/{row['step']}") - mean(held_out, "anchor")  # always from the real anchor
        assert row["alignment"] == pytest.approx(cosine(drift, pair).mean(), abs=1e-5)
        assert row["fraction"] == pytest.approx(((drift * pair).sum(-1) / (pair**2).sum(-1)).mean(), abs=1e-5)
        assert row["distance"] == pytest.approx(np.linalg.norm(pair, axis=-1).mean(), rel=1e-5)
        assert row["cosine_with_v_rev"] == pytest.approx(cosine(pair, v_rev).mean(), abs=1e-5)
    own = table[(table.witness == "witness") & (table.anchor == "anchor")]
    assert own.cosine_with_v_rev.to_numpy() == pytest.approx(1, abs=1e-6)
    plain = follow(held_out, locate_vrev(probes), layers_in_mean=layers).layer_mean
    assert own.alignment.to_list() == pytest.approx(plain.alignment.to_list(), abs=1e-6)


def test_a_run_that_goes_back_prefers_its_own_ancestor_to_an_equally_distant_stranger() -> None:
    residuals = history(stranger=ANCHOR + DISTANCES * W, **{"a/20": ANCHOR + DISTANCES * (0.4 * V + 0.1 * W)})
    table = compare_witnesses(residuals, residuals, witnesses=["witness", "stranger"], layers_in_mean=(0, 1, 2))
    table = table.set_index("witness")
    assert table.distance["witness"] == pytest.approx(table.distance["stranger"], rel=1e-5)
    assert table.fraction.to_dict() == pytest.approx({"witness": 0.4, "stranger": 0.1}, abs=1e-5)
    assert table.alignment.to_dict() == pytest.approx({"witness": 4 / 17**0.5, "stranger": 1 / 17**0.5}, abs=1e-5)
    assert table.cosine_with_v_rev["stranger"] == pytest.approx(0, abs=1e-5)


def test_pairs_are_compared_on_the_same_layers_or_not_at_all() -> None:
    half = ANCHOR + W
    half[:, 1] = ANCHOR[:, 1]  # an earlier witness that does not differ at layer 1
    residuals = history(earlier=half, **{"a/1": WITNESS})
    with refused("earlier", "[1]"):
        compare_witnesses(residuals, residuals, witnesses=["witness", "earlier"], layers_in_mean=(0, 1))
    table = compare_witnesses(residuals, residuals, witnesses=["witness", "earlier"], layers_in_mean=(0, 2))
    assert len(table) == 2
    with refused("'nobody'"):
        compare_witnesses(residuals, residuals, witnesses=["nobody"], layers_in_mean=(0,))


# -- r over siblings ---------------------------------------------------------------------------------------------------


def aligned_often(r: float, *, siblings: int, apart: float = 1.0, width: int = 2000, seed: int = 5) -> Residuals:
    """Independent endpoints about one mean: the witness and a run's end (`apart` as far), and `siblings` anchors."""
    rng, layers = np.random.default_rng(seed), 4
    centre = 10 * rng.standard_normal((1, layers, width))
    scales = {"witness": 1.0, "a/1": apart, "anchor": r**0.5, **{f"s{i}": r**0.5 for i in range(1, siblings)}}
    return synthetic({name: centre + scale * rng.standard_normal((1, layers, width)) for name, scale in scales.items()})


def ratio_of(residuals: Residuals, siblings: int, *, draws: int = 200, seed: int = 0) -> AnchorRatio:
    names = [f"s{i}" for i in range(1, siblings)]
    rng = np.random.default_rng(seed)
    return anchor_ratio(residuals, siblings=names, layers=(0, 1, 2, 3), draws=draws, rng=rng)


@pytest.mark.parametrize(("r", "cosine"), [(0.1, 0.0909), (1.0, 0.5), (1.83, 0.647)])
def test_r_over_siblings_is_that_of_the_world_and_foretells_the_artefact(r: float, cosine: float) -> None:
    residuals = aligned_often(r, siblings=5)
    ratio = ratio_of(residuals, siblings=5)
    assert ratio.r.mean() == pytest.approx(r, rel=0.08) and ratio.siblings == ("anchor", "s1", "s2", "s3", "s4")
    assert ratio.expected_cosine == pytest.approx(cosine, abs=0.04)
    assert ratio.expected_cosine == pytest.approx(ratio.r / (1 + ratio.r))
    measured = follow(residuals, locate_vrev(residuals)).layer_mean
    assert float(measured.alignment.iloc[0]) == pytest.approx(cosine, abs=0.03)
    assert float(measured.fraction.iloc[0]) == pytest.approx(cosine, abs=0.04)


def test_an_endpoint_nearer_to_the_siblings_mean_has_a_cosine_up_to_the_root_but_the_same_fraction() -> None:
    residuals = aligned_often(1.0, siblings=5, apart=0.01)  # all but the siblings' mean itself
    measured = follow(residuals, locate_vrev(residuals)).layer_mean
    mean = measured.iloc[0]
    assert mean.alignment == pytest.approx(0.5**0.5, abs=0.03) and mean.fraction == pytest.approx(0.5, abs=0.03)


def test_r_is_the_siblings_unbiased_variance_over_the_mean_squared_distance() -> None:
    residuals = aligned_often(0.7, siblings=3, width=6)
    states = np.stack([residuals.of(name)[0].astype(float) for name in ("anchor", "s1", "s2")])
    variance = states.var(0, ddof=1).sum(-1)
    distance = ((residuals.of("witness")[0] - states) ** 2).sum(-1).mean(0)
    ratio = ratio_of(residuals, siblings=3)
    assert ratio.expected_cosine == pytest.approx(variance / distance, rel=1e-4)
    assert ratio.r == pytest.approx(variance / (distance - variance), rel=1e-4)
    named = anchor_ratio(residuals, siblings=["s2", "anchor", "s1"], layers=(2,), draws=1, rng=np.random.default_rng(0))
    assert named.r == pytest.approx(ratio.r[2:3], rel=1e-6), "the anchor counts once, named or not"


def test_it_is_unbiased_over_worlds_and_so_are_its_draws() -> None:
    """A plain bootstrap of three siblings would be a third too small, and one time in nine have no variance at all."""
    ratios = [ratio_of(aligned_often(1.0, siblings=3, width=300, seed=s), siblings=3, draws=40) for s in range(30)]
    found = np.stack([ratio.expected_cosine for ratio in ratios])
    drawn = np.stack([ratio.draws for ratio in ratios])
    assert found.mean() == pytest.approx(0.5, abs=0.01) and drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.min() > 0.3 and drawn.max() < 0.7


def test_more_siblings_and_closer_ones_give_narrower_draws() -> None:
    few, many = (ratio_of(aligned_often(1.0, siblings=n, width=60), siblings=n, draws=500) for n in (3, 40))
    assert few.draws.shape == (500, 4) and few.draws.std(0).mean() > 2 * many.draws.std(0).mean()
    table = many.table
    assert table.columns.to_list() == ["layer", "r", "expected_cosine", "low", "high"]
    assert (table.low < table.expected_cosine).all() and (table.expected_cosine < table.high).all()


def test_siblings_that_agree_leave_no_artefact_and_a_witness_among_them_leaves_nothing_else() -> None:
    still = history(s1=ANCHOR, s2=ANCHOR)
    ratio = anchor_ratio(still, siblings=["s1", "s2"], layers=(0, 2), draws=5, rng=np.random.default_rng(0))
    assert (ratio.r == 0).all() and (ratio.expected_cosine == 0).all() and (ratio.draws == 0).all()
    among = synthetic(
        {name: ANCHOR + scale * V for name, scale in {"anchor": -1, "s1": 0, "s2": 1, "witness": 0}.items()}
    )
    ratio = anchor_ratio(among, siblings=["s1", "s2"], layers=(0,), draws=5, rng=np.random.default_rng(0))
    assert ratio.expected_cosine == 1 and np.isinf(ratio.r).all() and (ratio.draws <= 1).all()


def test_two_siblings_are_too_few_and_names_and_layers_are_checked() -> None:
    residuals = aligned_often(1.0, siblings=3, width=6)
    ask = {"layers": (0,), "draws": 1, "rng": np.random.default_rng(0)}
    for few in ([], ["s1"], ["s1", "s1"], ["anchor", "s1"]):
        with refused("siblings", "anchor"):
            anchor_ratio(residuals, siblings=few, **ask)
    with refused("'nobody'"):
        anchor_ratio(residuals, siblings=["s1", "nobody"], **ask)
    with refused("layer 9"):
        anchor_ratio(residuals, siblings=["s1", "s2"], **{**ask, "layers": (0, 9)})


def prompts_of(residuals: Residuals, *, prompts: int = 40, seed: int = 1) -> Residuals:
    """The same mean states on several prompts, whose deviations all checkpoints share."""
    jitter = np.random.default_rng(seed).standard_normal((prompts, *residuals.values.shape[2:]))
    return replace(residuals, values=(residuals.values + jitter - jitter.mean(0)).astype(np.float32))


def test_independent_endpoints_are_a_null_that_the_artefact_does_not_exceed_and_reversion_does() -> None:
    residuals = prompts_of(aligned_often(1.0, siblings=4))
    v = residuals.of("witness") - residuals.of("anchor")
    back = synthetic(
        {**{name: residuals.of(name) for name in residuals.checkpoints}, "b/1": residuals.of("anchor") + 0.6 * v}
    )
    rng = np.random.default_rng(0)
    null = independent_endpoints(back, ["s1", "s2", "s3"], steps=(1, 20), draws=300, rng=rng)
    assert null.name == "independent_endpoints" and null.cosines.shape == (300, 2, 4) and null.layers == (0, 1, 2, 3)
    assert np.array_equal(null.cosines[:, 0], null.cosines[:, 1]) and (null.run, null.of) == (None, "run")
    mean = compare(follow(back, locate_vrev(back)), null, prompts="given").layer_mean.set_index("run")
    assert mean.above["b"] and mean.p_value["b"] == 1 / 301
    assert mean.alignment["a"] == pytest.approx(null.cosines.mean(), abs=0.04) and mean.p_value["a"] > 0.05
    narrow = independent_endpoints(back, ["s1", "s2"], steps=(1,), draws=2, rng=rng, layers=(3, 1))
    assert narrow.layers == (3, 1) and narrow.cosines.shape == (2, 1, 2)
    with refused("Samples of shape (1,"):
        independent_endpoints(aligned_often(1.0, siblings=3), ["s1", "s2"], steps=(1,), draws=2, rng=rng)


@pytest.mark.parametrize("r", [0.1, 1.0])
def test_independent_endpoints_reject_as_often_as_they_say_and_the_estimate_s_spread_far_more(r: float) -> None:
    """Layers are worlds here: endpoints, anchors and states of one covariance, few dimensions of which matter."""
    worlds, width, siblings = 400, 24, ["s1", "s2", "s3"]
    rng, spread = np.random.default_rng(2), np.arange(1, width + 1) ** -0.5
    scales = {"witness": 1.0, "a/1": 1.0, "anchor": r**0.5, **dict.fromkeys(siblings, r**0.5)}
    means = {name: scale * spread * rng.standard_normal((1, worlds, width)) for name, scale in scales.items()}
    jitter = spread * rng.standard_normal((64, worlds, width))
    residuals = synthetic({name: one + jitter - jitter.mean(0) for name, one in means.items()})
    followed = follow(residuals, locate_vrev(residuals))
    ask = {"draws": 199, "rng": rng}
    null = independent_endpoints(residuals, siblings, steps=(1,), **ask)
    rate = (compare(followed, null, prompts="given").table.p_value <= 0.05).mean()
    assert 0.02 <= rate <= 0.085  # 5 % ± 3 standard errors
    estimate = anchor_ratio(residuals, siblings=siblings, layers=range(worlds), **ask).draws[:, None]
    former = compare(followed, replace(null, cosines=estimate), prompts="given").table.p_value
    assert (former <= 0.05).mean() > 0.15


def test_siblings_that_agree_leave_endpoints_without_a_cosine_on_average() -> None:
    still = prompts_of(synthetic(dict.fromkeys(("anchor", "s1", "s2"), ANCHOR[:1]) | {"witness": WITNESS[:1]}))
    found = independent_endpoints(still, ["s1", "s2"], steps=(1,), draws=4000, rng=np.random.default_rng(0)).cosines
    assert found.mean() == pytest.approx(0, abs=0.02) and found.std() == pytest.approx(WIDTH**-0.5, rel=0.15)
