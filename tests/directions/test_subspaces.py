"""Subspaces: planted ones recovered, closed forms by numpy, and what is left when a direction is taken out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from histories import refused, synthetic

from gravlens.directions.direction import Direction, Directions, Subspace, Subspaces, each
from gravlens.directions.subspaces import (
    drift_subspaces,
    leading_components,
    orthogonal_part,
    principal_angles,
    random_like,
    share_within,
    span_of,
    whole_state,
)
from gravlens.directions.vrev import direction_from

D, N = 24, 40
AXES = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0].T  # orthonormal rows


def directions(layers: tuple[int, ...] = (0, 1)) -> Directions:
    return Directions(tuple(direction_from(AXES[10 + k], layer=k, distance=1.5 + k) for k in layers))


def space(*rows: int, layer: int = 0, distance: float = 2.0) -> Subspace:
    return Subspace(AXES[list(rows)], layer, distance)


def overlap(one: Any, other: np.ndarray) -> float:
    """Smallest cosine between a basis and other orthonormal rows: 1 where both span the same."""
    return float(np.linalg.svd(np.atleast_2d(one) @ np.atleast_2d(other).T)[1].min())


def planted(mean: int, scales: dict[int, float], seed: int = 0) -> np.ndarray:
    """Drifts [prompt, d]: a mean along one axis, and spread along others."""
    rng = np.random.default_rng(seed)
    drift = 3.0 * AXES[mean] + 1e-3 * rng.standard_normal((N, D))
    for axis, scale in scales.items():
        drift = drift + scale * rng.standard_normal((N, 1)) * AXES[axis]
    return drift


# -- leading components ------------------------------------------------------------------------------------------------


def test_the_mean_and_the_spread_of_a_planted_drift_are_found() -> None:
    basis, shares = leading_components(planted(2, {5: 1.0, 7: 0.4}), rank=3)
    assert overlap(basis[0], AXES[2]) > 0.98 and basis[0] @ AXES[2] > 0
    assert overlap(basis, AXES[[2, 5, 7]]) > 0.9999
    assert shares.sum() == pytest.approx(1, abs=1e-4) and (np.diff(shares) < 0).all()


def test_shares_are_parts_of_the_squared_length() -> None:
    drift = np.random.default_rng(1).standard_normal((9, D))
    basis, shares = leading_components(drift, rank=9)
    values, vectors = np.linalg.eigh(drift.T @ drift)
    assert shares == pytest.approx(values[::-1][:9] / np.trace(drift.T @ drift))
    assert np.abs((basis * vectors.T[::-1][:9]).sum(1)) == pytest.approx(1)
    assert basis @ basis.T == pytest.approx(np.eye(9), abs=1e-10)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_points_the_way_of_the_mean_drift(sign: int) -> None:
    drift = sign * planted(2, {5: 1.0})
    basis, _ = leading_components(drift, rank=2)
    assert (basis @ drift.mean(0) >= 0).all() and basis[0] @ (sign * AXES[2]) > 0.9


@pytest.mark.parametrize("rank", [0, N + 1, D + 1])
def test_more_components_than_there_are_are_refused(rank: int) -> None:
    with refused(f"{rank} components"):
        leading_components(planted(2, {5: 1.0}), rank=rank)


def residuals() -> Any:
    """Two layers: layer 0 drifts along axis 2 (spread 5), layer 1 along axis 3 (spread 6); half as far at step 5."""
    anchor = np.random.default_rng(3).standard_normal((N, 2, D)) * 10
    drift = np.stack([planted(2, {5: 1.0}, 1), planted(3, {6: 1.0}, 2)], axis=1)
    other = np.stack([planted(8, {}, 4), planted(9, {}, 5)], axis=1)
    return synthetic({"anchor": anchor, "a/5": anchor + drift / 2, "a/9": anchor + drift, "b/9": anchor + other})


def test_subspaces_of_a_drift_are_its_leading_components_layer_by_layer() -> None:
    spaces = drift_subspaces(residuals(), directions(), at=["a/9"], rank=2)
    assert spaces.layers == (0, 1) and spaces.distances.tolist() == [1.5, 2.5]
    for layer, axes in ((0, [2, 5]), (1, [3, 6])):
        assert spaces[layer].rank == 2 and overlap(spaces[layer].basis, AXES[axes]) > 0.9999
    facts = spaces[0].made_from
    assert facts["checkpoints"] == ["a/9"] and sum(facts["shares"]) == pytest.approx(1, abs=1e-4)
    assert (spaces[0].estimator, spaces[0].prompts) == ("drift_rank_2", "probes")


def test_the_drifts_of_several_checkpoints_are_put_together() -> None:
    both = drift_subspaces(residuals(), directions(), at=["a/9", "b/9"], rank=3)
    assert overlap(both[0].basis, AXES[[2, 5, 8]]) > 0.999
    alone = drift_subspaces(residuals(), directions(), at=["b/9"])
    assert overlap(alone[1].basis, AXES[9]) > 0.9999 and alone[1].rank == 1


def test_undefined_layers_and_unknown_names_are_left_out_or_refused() -> None:
    undefined = Direction(np.full(D, np.nan), 1, 0.0, undefined="no difference")
    assert drift_subspaces(residuals(), Directions((directions()[0], undefined)), at=["a/9"]).layers == (0,)
    with refused("c/9"):
        drift_subspaces(residuals(), directions(), at=["c/9"])
    with refused("layer 4"):
        drift_subspaces(residuals(), directions((4,)), at=["a/9"])


# -- the noun ----------------------------------------------------------------------------------------------------------


def test_a_span_of_dependent_vectors_has_their_rank() -> None:
    vectors = np.stack([AXES[0] * 3, AXES[0] + AXES[1], AXES[1] * -7, 2 * AXES[0]])
    found = span_of(vectors, layer=3, distance=0.5, name="mine")
    assert found.rank == 2 and overlap(found.basis, AXES[:2]) == pytest.approx(1, abs=1e-6)
    assert (found.layer, found.distance, found.estimator) == (3, 0.5, "mine")
    assert span_of(AXES[4] * 9, layer=0, distance=1.0).basis.shape == (1, D)
    with refused("mine"):
        span_of(np.zeros((2, D)), layer=0, distance=1.0, name="mine")


@pytest.mark.parametrize("basis", [2 * AXES[:1], AXES[:2] + 0.01, np.stack([AXES[0], AXES[0]])])
def test_a_basis_that_is_not_orthonormal_is_refused(basis: np.ndarray) -> None:
    with refused("layer 7", "orthonormal"):
        Subspace(basis, 7, 1.0)


def test_a_subspace_is_frozen_and_a_copy() -> None:
    given = AXES[:2].astype(np.float32)
    made = Subspace(given, 0, 1.0)
    given[:] = 0
    assert made.basis.dtype == np.float32 and overlap(made.basis, AXES[:2]) > 0.999
    with pytest.raises(ValueError, match="read-only"):
        made.basis[0] = 0


def test_several_are_asked_for_by_layer() -> None:
    spaces = Subspaces((space(1, layer=4), space(2, 3, layer=2, distance=5.0)))
    assert spaces[2].rank == 2 and spaces.layers == (4, 2) and len(spaces) == 2
    assert spaces.at([2]).layers == (2,) and spaces.distances.tolist() == [2.0, 5.0]
    assert [one.layer for one in each(spaces)] == [4, 2] and each(spaces[2]) == (spaces[2],)
    assert each(directions()[1])[0].basis.shape == (1, D)
    with refused("layer 3"):
        spaces[3]


def test_a_file_holds_all_of_them(tmp_path: Path) -> None:
    kept = Subspaces((Subspace(AXES[:3], 4, 2.5, "mine", "digest", {"shares": [0.5, 0.25]}), space(7, layer=1)))
    found = Subspaces.load(kept.save(tmp_path / "spaces.safetensors"))
    for one, other in zip(found, kept, strict=True):
        assert np.array_equal(one.basis, other.basis)
        assert {**vars(one), "basis": 0} == {**vars(other), "basis": 0}
    with refused("subspaces"):
        Directions.load(tmp_path / "spaces.safetensors")


# -- what is made of them ----------------------------------------------------------------------------------------------


def test_the_whole_state_holds_everything() -> None:
    spaces = whole_state(directions())
    assert spaces.layers == (0, 1) and spaces.distances.tolist() == [1.5, 2.5]
    assert [one.rank for one in spaces] == [D, D]
    assert share_within(np.random.default_rng(0).standard_normal((5, D)), spaces[1]) == pytest.approx(1)


def test_the_part_orthogonal_to_a_direction_is_what_is_left() -> None:
    tilted = span_of(np.stack([AXES[10] + AXES[0], AXES[1]]), layer=0, distance=2.0)
    (part,) = orthogonal_part(Subspaces((tilted,)), directions())
    assert part.rank == 2 and overlap(part.basis, AXES[:2]) == pytest.approx(1, abs=1e-6)
    assert np.abs(part.basis @ AXES[10]).max() < 1e-6
    assert part.estimator == "given_orthogonal" and part.distance == 2.0


def test_of_one_vector_the_part_keeps_its_sign() -> None:
    for sign in (1, -1):
        one = span_of(sign * (AXES[10] + AXES[0]), layer=0, distance=2.0)
        one = Subspace(sign * (AXES[10] + AXES[0])[None] / np.sqrt(2), one.layer, one.distance)
        (part,) = orthogonal_part(Subspaces((one,)), directions())
        assert part.basis[0] @ AXES[0] == pytest.approx(sign, abs=1e-6)


def test_the_rank_falls_where_a_direction_lies_within() -> None:
    (part,) = orthogonal_part(Subspaces((space(10, 3, 4),)), directions())
    assert part.rank == 2 and overlap(part.basis, AXES[[3, 4]]) == pytest.approx(1, abs=1e-6)
    parts = orthogonal_part(whole_state(directions()), directions())
    assert [one.rank for one in parts] == [D - 1] * 2
    assert [np.abs(p.basis @ AXES[10 + i]).max() < 1e-6 for i, p in enumerate(parts)] == [True, True]
    wider = orthogonal_part(Subspaces((space(1, 2, 3),)), Subspaces((space(2, 3, 9),)))
    assert wider[0].rank == 1 and overlap(wider[0].basis, AXES[1]) == pytest.approx(1, abs=1e-6)


def test_what_lies_wholly_along_the_direction_leaves_nothing() -> None:
    with refused("layer 0"):
        orthogonal_part(Subspaces((space(10),)), directions())


@pytest.mark.parametrize("angle", [0.0, 10.0, 45.0, 90.0])
def test_principal_angles_are_those_that_were_planted(angle: float) -> None:
    tilt = np.cos(np.radians(angle)) * AXES[0] + np.sin(np.radians(angle)) * AXES[1]
    assert principal_angles(space(0), span_of(tilt, layer=0, distance=1.0)) == pytest.approx([angle], abs=0.05)
    two = span_of(np.stack([tilt, AXES[5]]), layer=0, distance=1.0)
    assert principal_angles(space(0, 5), two) == pytest.approx([0, angle], abs=0.05)
    assert principal_angles(space(0, 5, 7), two) == pytest.approx([0, angle], abs=0.05)
    assert principal_angles(directions()[0], space(10, 3)) == pytest.approx([0], abs=0.05)


def test_a_share_within_is_the_projected_part_of_the_squared_length() -> None:
    vectors = np.stack([3 * AXES[0], 4 * AXES[1]])
    assert share_within(vectors, space(0)) == pytest.approx(9 / 25)
    assert share_within(vectors, space(0, 1)) == pytest.approx(1)
    assert share_within(vectors, directions()[0]) == pytest.approx(0, abs=1e-12)


def test_random_twins_have_the_layers_ranks_and_distances() -> None:
    given = Subspaces((space(0, 1, layer=2, distance=7.0), space(4, layer=5)))
    twins = [random_like(given, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)]
    for twin in twins:
        assert (twin.layers, twin.distances.tolist()) == ((2, 5), [7.0, 2.0])
        assert [len(one.basis) for one in twin] == [2, 1]
    assert np.array_equal(twins[0][2].basis, twins[1][2].basis)
    assert overlap(twins[0][2].basis, twins[2][2].basis) < 0.9
    assert isinstance(random_like(directions(), rng=np.random.default_rng(0)), Directions)


def test_matched_twins_lie_where_the_states_vary_at_their_own_layer() -> None:
    rng, varied = np.random.default_rng(6), {0: [1, 2, 3], 1: [12, 13, 14]}
    states = np.stack([rng.standard_normal((200, 3)) @ AXES[axes] for axes in varied.values()], axis=1) + 40
    given = Subspaces((space(20, 21, layer=0), space(20, layer=1)))
    for seed in range(5):
        twins = random_like(given, rng=np.random.default_rng(seed), states=states)
        for i, axes in varied.items():
            assert overlap(twins[i].basis, AXES[axes]) > 0.9999 and twins[i].basis.shape == given[i].basis.shape


def test_isotropic_twins_have_no_favourite_way() -> None:
    draws = [random_like(Subspaces((space(0),)), rng=np.random.default_rng(i))[0].basis[0] for i in range(400)]
    assert np.mean(np.square(draws) @ (AXES.T**2), 0) == pytest.approx(1 / D, rel=0.35)
    assert np.mean(np.square(np.array(draws) @ AXES.T), 0) == pytest.approx(1 / D, rel=0.35)


@pytest.mark.parametrize("layers", [1, 3])
def test_random_spans_refuse_states_of_other_layers(layers: int) -> None:
    spaces = Subspaces(tuple(Subspace(np.eye(8)[:2], layer, 1.0) for layer in (0, 2)))
    states = np.random.default_rng(0).standard_normal((40, layers, 8))
    with refused(f"{layers} layers", "2"):
        random_like(spaces, rng=np.random.default_rng(0), states=states)
