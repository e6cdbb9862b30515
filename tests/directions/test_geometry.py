"""Geometries: what they do to planted rogue dimensions, to covariances and to drifts; closed forms; bad input."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from histories import refused, synthetic
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from gravlens.activations.residuals import Residuals
from gravlens.directions.estimators import lda
from gravlens.directions.geometry import (
    GEOMETRIES,
    Fit,
    Geometry,
    centred,
    locate_in,
    raw,
    standardised,
    whitened,
    without_top,
)
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import EPSILON, NOISE_ROUNDINGS, Estimator, difference_of_means, locate_vrev

WIDTH, LAYERS, PROMPTS, ROGUE = 12, 2, 80, 3
NAMES = dict(zip(GEOMETRIES, "raw centred standardised whitened top1 top3".split(), strict=True))
every_geometry = pytest.mark.parametrize("fit", GEOMETRIES, ids=NAMES.values())


def history(
    *, seed: int = 0, spread: np.ndarray | float = 1.0, rogue: float = 0.0, steps: tuple[int, ...] = (1, 20)
) -> Residuals:
    """Anchor's states of a spread a dimension; the witness is moved along dimension 0, the run along dimension 1, and
    both along one rogue dimension."""
    rng = np.random.default_rng(seed)
    anchor = 5 + rng.standard_normal((PROMPTS, LAYERS, WIDTH)) * spread
    names: dict[str, np.ndarray] = {"anchor": anchor, "witness": anchor.copy()}
    names["witness"][..., 0] += 1
    names["witness"][..., ROGUE] += rogue
    for step in steps:
        run = anchor.copy()
        run[..., 1] += step / 20
        run[..., ROGUE] += rogue * step / 20
        names[f"seed0/{step}"] = run + 0.01 * rng.standard_normal(anchor.shape)
    return synthetic(names)


def random_history(seed: int = 0, **meta: object) -> Residuals:
    """Nothing planted: correlated states of several checkpoints."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((WIDTH, WIDTH))
    names = ("anchor", "witness", "seed0/1", "seed0/20", "seed1/20")
    states = {name: rng.standard_normal((PROMPTS, LAYERS, WIDTH)) @ mixing + rng.standard_normal() for name in names}
    return synthetic(states, meta={"dtype": ["float32"], **meta})


def alignment(fit: Fit, residuals: Residuals) -> float:
    mapped = fit(residuals).apply(residuals)
    table = follow(mapped, locate_vrev(mapped)).layer_mean
    return float(table.loc[table["step"] == 20, "alignment"].item())


def drift(residuals: Residuals, name: str = "seed0/20") -> np.ndarray:
    return residuals.of(name).astype(float).mean(0) - residuals.of("anchor").astype(float).mean(0)


# -- a linear map of every state ---------------------------------------------------------------------------------------


@every_geometry
def test_the_drift_of_mapped_states_is_the_map_of_the_drift(fit: Fit) -> None:
    residuals = random_history()
    geometry = fit(residuals)
    mapped = geometry.apply(residuals)
    for name in residuals.checkpoints[1:]:
        wanted = np.stack([geometry.maps[layer](drift(residuals, name)[layer]) for layer in residuals.layers])
        assert drift(mapped, name) == pytest.approx(wanted, abs=1e-5)
    one, other = np.random.default_rng(1).standard_normal((2, 4, WIDTH))
    for linear in geometry.maps.values():
        assert linear(2 * one - other) == pytest.approx(2 * linear(one) - linear(other), abs=1e-10)


@every_geometry
def test_it_is_fitted_on_the_anchors_states_alone_and_serves_other_prompts(fit: Fit) -> None:
    """A run or a witness that is thrown far off changes nothing of it."""
    residuals, held_out = random_history(), random_history(seed=5)
    far = Residuals(residuals.values.copy(), residuals.checkpoints, residuals.layers, "probes")
    far.values[1:] *= 1000
    found, wanted = fit(far).apply(held_out), fit(residuals).apply(held_out)
    assert np.array_equal(found.values, wanted.values)
    if fit not in (raw, centred):  # and the anchor's do change it
        far.values[:1] += np.random.default_rng(2).standard_normal(far.values[:1].shape) * np.arange(WIDTH) * 10
        assert not np.allclose(fit(far).apply(held_out).values, wanted.values, rtol=0.05)


@every_geometry
def test_names_digest_and_layers_stay_and_the_geometry_is_named(fit: Fit, tmp_path: Path) -> None:
    residuals = random_history(sources={"witness": "base"}, positions="last")
    residuals = replace(residuals, index=np.array([[0, at] for at in range(residuals.values.shape[1])]))
    mapped = fit(residuals).apply(residuals)
    same = ("checkpoints", "layers", "prompts", "runs", "index")
    assert all(np.array_equal(getattr(mapped, name), getattr(residuals, name)) for name in same)
    assert mapped.values.dtype == np.float32 and mapped.values.shape == residuals.values.shape
    geometry = mapped.meta["geometry"]
    assert geometry == fit(residuals).name and mapped.meta["positions"] == "last"
    made_from = locate_vrev(mapped)[0].made_from
    named = {"raw": ("base", "anchor")}.get(geometry, (f"base ({geometry} geometry)", f"anchor ({geometry} geometry)"))
    assert (made_from["witness"], made_from["anchor"]) == named
    assert Residuals.load(mapped.save(tmp_path / "mapped.safetensors")).meta == mapped.meta
    assert set(follow(mapped, locate_vrev(mapped)).table["prompts"]) == {"given"}


def test_raw_changes_nothing() -> None:
    residuals = random_history()
    assert np.array_equal(raw(residuals).apply(residuals).values, residuals.values)


# -- planted rogue dimensions and components ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_standardising_and_whitening_kill_a_rogue_dimension_that_carries_the_cosine(seed: int) -> None:
    """It varies a hundredfold over the probes, and witness and run are both moved along it and else apart."""
    spread = np.where(np.arange(WIDTH) == ROGUE, 100.0, 1.0)
    residuals = history(seed=seed, spread=spread, rogue=10.0)
    assert alignment(raw, residuals) > 0.9 and alignment(centred, residuals) > 0.9
    assert abs(alignment(standardised, residuals)) < 0.05 and abs(alignment(without_top, residuals)) < 0.05
    assert abs(alignment(whitened, residuals)) < 0.3  # less sharply: the rogue's variance sets the shrinkage's target


@pytest.mark.parametrize("fit", [standardised, whitened, without_top])
def test_and_leave_a_cosine_that_no_rogue_dimension_carries(fit: Fit) -> None:
    """Positive control: the run goes the witness's way, in a dimension like any other."""
    residuals = history(spread=np.where(np.arange(WIDTH) == ROGUE, 100.0, 1.0))
    index = residuals.checkpoints.index
    residuals.values[index("seed0/20")] = (residuals.of("anchor") + residuals.of("witness")) / 2
    assert alignment(raw, residuals) > 0.99
    assert alignment(fit, residuals) > 0.99


def test_centring_kills_a_cosine_that_the_mean_over_dimensions_carries() -> None:
    residuals = history()
    for name in ("witness", "seed0/20"):
        residuals.values[residuals.checkpoints.index(name)] += 30
    assert alignment(raw, residuals) > 0.9
    # 1 − 1/d along their own dimension each, −1/d along the other's: the cosine of two of d centred axes
    assert alignment(centred, residuals) == pytest.approx(-1 / (WIDTH - 1), abs=0.01)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_without_top_removes_exactly_these_components(k: int) -> None:
    residuals = random_history()
    mapped = without_top(residuals, k=k).apply(residuals)
    for layer in range(LAYERS):
        components = PCA().fit(residuals.of("anchor")[:, layer].astype(float)).components_
        for name in residuals.checkpoints:
            before, after = (one.of(name)[:, layer] @ components.T for one in (residuals, mapped))
            assert after[:, :k] == pytest.approx(0, abs=1e-4)
            assert after[:, k:] == pytest.approx(before[:, k:], abs=1e-4)


# -- directions in a geometry ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [difference_of_means, lda])
@every_geometry
def test_located_in_a_geometry_is_located_on_mapped_states(fit: Fit, estimator: Estimator) -> None:
    residuals = random_history(sources={"witness": "base"})
    geometry = fit(residuals)
    found, wanted = (
        locate_in(geometry, residuals, estimator=estimator),
        locate_vrev(geometry.apply(residuals), estimator=estimator),
    )
    assert np.array_equal(found.vectors, wanted.vectors) and np.array_equal(found.distances, wanted.distances)
    for v, other in zip(found, wanted, strict=True):
        assert v.made_from == {**other.made_from, "geometry": geometry.name}
        assert (v.reliability, v.prompts, v.undefined) == (other.reliability, other.prompts, None)


def test_where_the_map_leaves_only_rounding_there_is_no_direction() -> None:
    """The states vary in two dimensions and the witness moves within them; what is left is rounding, whose direction
    is no v_rev although it is longer than the rounding of the little that is left of the states."""
    rng = np.random.default_rng(0)
    anchor = np.zeros((PROMPTS, 1, WIDTH))
    anchor[..., :2] = rng.standard_normal((PROMPTS, 1, 2)) * [30, 10] @ np.array([[0.6, 0.8], [-0.8, 0.6]])
    witness = anchor + np.r_[3.3, 4.7, np.zeros(WIDTH - 2)]
    residuals = synthetic({"witness": witness, "anchor": anchor})
    for k, defined in ((1, True), (2, False)):
        (v,) = locate_in(without_top(residuals, k=k), residuals)
        assert (v.undefined is None) == defined == np.isfinite(v.vector).all()
    assert "noise" in str(v.undefined) and "without_top_2" in str(v.undefined) and np.isnan(v.reliability)


@every_geometry
def test_a_layer_without_v_rev_in_the_raw_states_has_none_in_a_geometry(fit: Fit) -> None:
    """Whitening and standardising lengthen what differs by rounding alone."""
    residuals = random_history()
    quiet = residuals.of("anchor")[:, 0]
    quiet[:, 0] *= 1e-7  # a dimension that hardly varies, along which the witness moves by rounding
    residuals.values[1, :, 0] = quiet
    floor = NOISE_ROUNDINGS * EPSILON["float32"] * np.linalg.norm(quiet, axis=1).mean()
    residuals.values[1, :, 0, 0] += 0.8 * floor
    found = locate_in(fit(residuals), residuals)
    assert found[0].undefined is not None and np.isnan(found[0].vector).all() and found[1].undefined is None


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_centred_states_have_no_mean_over_dimensions_and_are_what_layernorm_sees() -> None:
    residuals = random_history()
    mapped = centred(residuals).apply(residuals).values
    assert mapped.mean(-1) == pytest.approx(0, abs=1e-5)
    assert mapped == pytest.approx(residuals.values - residuals.values.mean(-1, keepdims=True), abs=1e-5)


def test_subtracting_the_prompts_mean_would_change_no_difference() -> None:
    residuals = random_history()
    shifted = Residuals(residuals.values - residuals.of("anchor").mean(0), residuals.checkpoints, (0, 1), "probes")
    for fit in GEOMETRIES:
        assert drift(fit(shifted).apply(shifted)) == pytest.approx(drift(fit(residuals).apply(residuals)), abs=1e-4)


def test_standardised_is_scikit_learns_scale() -> None:
    residuals = random_history()
    mapped = standardised(residuals).apply(residuals)
    assert mapped.of("anchor").std(0) == pytest.approx(1, abs=1e-5)
    for layer in range(LAYERS):
        scale = StandardScaler().fit(residuals.of("anchor")[:, layer].astype(float)).scale_
        assert mapped.values[:, :, layer] * scale == pytest.approx(residuals.values[:, :, layer], abs=1e-4)


def test_a_dimension_in_which_the_anchor_does_not_vary_is_left_out_of_the_standardised() -> None:
    residuals = history()
    assert residuals.checkpoints[:2] == ("anchor", "witness")
    residuals.values[:2, :, :, ROGUE] = 1234.5
    residuals.values[:2, ::2, :, ROGUE] = np.nextafter(np.float32(1234.5), np.float32(np.inf))  # rounding alone
    residuals.values[1, :, :, ROGUE] += 7
    mapped = standardised(residuals).apply(residuals)
    assert np.array_equal(mapped.values[..., ROGUE], np.zeros_like(mapped.values[..., ROGUE]))
    assert np.isfinite(mapped.values).all() and locate_vrev(mapped)[0].vector[0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("prompts", [6, PROMPTS])  # fewer than dimensions, and more
def test_whitened_states_have_identity_covariance_up_to_the_shrinkage(prompts: int) -> None:
    residuals = random_history()
    residuals = Residuals(residuals.values[:, :prompts], residuals.checkpoints, residuals.layers, "probes")
    for layer, linear in whitened(residuals).maps.items():
        matrix = linear(np.eye(WIDTH))
        shrunk = LedoitWolf().fit(residuals.of("anchor")[:, layer].astype(float)).covariance_
        assert matrix.T @ shrunk @ matrix == pytest.approx(np.eye(WIDTH), abs=1e-8)
        assert matrix == pytest.approx(matrix.T) and (np.linalg.eigvalsh(matrix) > 0).all()


def test_with_many_prompts_the_whitened_covariance_itself_is_the_identity() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((4, 4))
    residuals = synthetic({"anchor": rng.standard_normal((20_000, 1, 4)) @ mixing})
    mapped = whitened(residuals).apply(residuals).of("anchor")[:, 0]
    assert np.cov(mapped.T, bias=True) == pytest.approx(np.eye(4), abs=0.01)


def test_the_difference_of_means_in_whitened_geometry_is_lda_read_there() -> None:
    """⟨x, Σ⁻¹ difference⟩ is the product in whitened geometry: the same sign, though not the same cosine."""
    rng = np.random.default_rng(0)
    noise = np.linspace(0.3, 6, WIDTH)
    anchor = rng.standard_normal((4000, 1, WIDTH)) * noise
    witness = anchor + np.arange(WIDTH)  # the same Σ within both
    moved = rng.standard_normal(WIDTH)
    residuals = synthetic({"anchor": anchor, "witness": witness})
    geometry = whitened(residuals)
    mapped = geometry.apply(residuals)
    white, inside = difference_of_means(mapped.of("witness")[:, 0], mapped.of("anchor")[:, 0]), geometry.maps[0](moved)
    line = lda(witness[:, 0], anchor[:, 0])
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in ((white, inside), (line, moved))]
    assert np.sign(cosines[0]) == np.sign(cosines[1]) and abs(cosines[0] - cosines[1]) > 0.02
    back = geometry.maps[0](white)  # Σ^(−1/2) of the whitened difference is Σ⁻¹ difference
    assert back @ line / np.linalg.norm(back) / np.linalg.norm(line) == pytest.approx(1, abs=1e-3)


# -- bad input ---------------------------------------------------------------------------------------------------------


@every_geometry
def test_a_geometry_is_applied_once(fit: Fit) -> None:
    residuals = random_history()
    once = standardised(residuals).apply(residuals)
    with refused("in the standardised geometry already"):
        fit(residuals).apply(once)
    again = raw(residuals).apply(residuals)
    assert fit(residuals).apply(again).meta["geometry"] == fit(residuals).name


def test_layers_that_it_was_not_fitted_on_are_named() -> None:
    residuals = random_history()
    only = Residuals(residuals.values[:, :, 1:], residuals.checkpoints, (1,), "probes")
    with refused("The whitened geometry has no map of layer 0."):
        whitened(only).apply(residuals)
    assert np.array_equal(
        standardised(residuals).apply(only).values, standardised(residuals).apply(residuals).values[:, :, 1:]
    )


@pytest.mark.parametrize("k", [0, -1, 12, 80])
def test_as_many_components_as_there_are_can_be_removed(k: int) -> None:
    residuals = random_history()
    few = Residuals(residuals.values[:, :10], residuals.checkpoints, residuals.layers, "probes")
    assert without_top(few, k=9).name == "without_top_9" and without_top(residuals, k=11)
    with refused(f"The first {k} components"):
        without_top(few if k != 80 else residuals, k=k)


@pytest.mark.parametrize("fit", [standardised, whitened])
def test_one_prompt_has_no_spread(fit: Fit) -> None:
    residuals = random_history()
    with refused("states of one prompt"):
        fit(Residuals(residuals.values[:, :1], residuals.checkpoints, residuals.layers, "probes"))


def test_a_geometry_of_ones_own_is_a_function_per_layer() -> None:
    def halved(residuals: Residuals) -> Geometry:
        maps: Mapping = dict.fromkeys(residuals.layers, partial(np.multiply, 0.5))
        return Geometry("halved", maps)

    residuals = random_history()
    assert np.allclose(halved(residuals).apply(residuals).values, residuals.values / 2)
