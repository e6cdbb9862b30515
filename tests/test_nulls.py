"""Nulls: the isotropic one against geometry, weight noise against models noised by hand, p-values against counting."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from histories import PROMPT_IDS, hooks_on, reference, refused, synthetic, weights_of
from scipy import stats

from gravlens.checkpoints import Checkpoint
from gravlens.directions import Direction, Directions, direction_from, locate_vrev
from gravlens.models import open_model
from gravlens.nulls import (
    NullDraws,
    compare,
    isotropic,
    isotropic_p_value,
    isotropic_quantile,
    update_norms,
    weight_noise,
)
from gravlens.trajectory import Trajectory, follow

LAYERS = tuple(range(tiny.LAYERS))
FIRST, OTHER = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
NORMS = {1: {FIRST: 0.5}, 20: {FIRST: 1.0, OTHER: 0.25}}


def random_vs(width: int = tiny.WIDTH, layers: int = tiny.LAYERS, seed: int = 0) -> Directions:
    rng = np.random.default_rng(seed)
    return Directions(tuple(direction_from(rng.standard_normal(width), layer=layer) for layer in range(layers)))


# -- isotropic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [-1.0, -0.8, -0.1, 0.0, 0.3, 0.99, 1.0])
def test_in_two_dimensions_it_is_an_angle_and_in_three_a_height(cosine: float) -> None:
    assert isotropic_p_value(cosine, 2) == pytest.approx(math.acos(cosine) / math.pi, abs=1e-12)
    assert isotropic_p_value(cosine, 3) == pytest.approx((1 - cosine) / 2, abs=1e-12)


@pytest.mark.parametrize("width", [2, 3, 8, 64])
def test_closed_form_and_draws_are_the_distribution_of_random_unit_vectors(width: int) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2000, width))
    fixed = rng.standard_normal(width)
    cosines = vectors @ fixed / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(fixed))
    below = np.vectorize(lambda cosine: 1 - isotropic_p_value(float(cosine), width))
    assert stats.kstest(cosines, below).pvalue > 0.01
    drawn = isotropic(random_vs(width), steps=(1,), draws=700, rng=rng).cosines
    assert stats.kstest(drawn.ravel(), below).pvalue > 0.01


@pytest.mark.parametrize("width", [2, 5, 128, 4096])
@pytest.mark.parametrize("probability", [0.001, 0.2, 0.5, 0.8, 0.99])
def test_quantile_and_p_value_are_inverse_and_mirrored(width: int, probability: float) -> None:
    quantile = isotropic_quantile(probability, width)
    assert isotropic_p_value(quantile, width) == pytest.approx(1 - probability, abs=1e-9)
    assert isotropic_quantile(1 - probability, width) == pytest.approx(-quantile, abs=1e-12)
    assert isotropic_p_value(-quantile, width) == pytest.approx(probability, abs=1e-9)
    assert (quantile > 0) == (probability > 0.5) and (quantile < 0) == (probability < 0.5)


@pytest.mark.parametrize(("width", "p99"), [(128, 0.2046), (4096, 0.0363)])
def test_its_p99_is_nearly_vacuous(width: int, p99: float) -> None:
    assert isotropic_quantile(0.99, width) == pytest.approx(p99, abs=1e-4)
    assert isotropic_quantile(0.99, width) == pytest.approx(stats.norm.ppf(0.99) / math.sqrt(width), rel=0.01)


def test_layers_are_independent_so_their_mean_has_a_narrower_null() -> None:
    vs = random_vs(64, layers=9)
    draws = isotropic(vs, steps=(1, 5), draws=20_000, rng=np.random.default_rng(0))
    assert draws.cosines.shape == (20_000, 2, 9) and (draws.steps, draws.layers) == ((1, 5), tuple(range(9)))
    flat = draws.cosines.reshape(20_000, -1)
    assert np.abs(np.corrcoef(flat.T) - np.eye(18)).max() < 0.03
    one, mean = np.quantile(flat[:, 0], 0.99), np.quantile(draws.cosines[:, 0].mean(1), 0.99)
    assert mean == pytest.approx(one / 3, rel=0.06)


def test_isotropic_is_drawn_for_defined_layers_and_reproduced_by_its_generator() -> None:
    undefined = Direction(np.full(tiny.WIDTH, np.nan), 1, 0.0, undefined="no difference")
    vs = Directions((random_vs()[0], undefined, random_vs()[2]))
    draws = [isotropic(vs, steps=(1,), draws=7, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert draws[0].layers == (0, 2) and draws[0].cosines.shape == (7, 1, 2) and np.isfinite(draws[0].cosines).all()
    assert np.array_equal(draws[0].cosines, draws[1].cosines)
    assert not np.array_equal(draws[0].cosines, draws[2].cosines)


# -- weight noise ------------------------------------------------------------------------------------------------------


@contextmanager
def witnessed(model: Any, *, stop_after: int | None = None) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The weights at each pass over the prompts; the first pass is the unchanged model's. Raises at a pass if told."""
    seen: list[dict[str, torch.Tensor]] = []

    def look(*_: Any) -> None:
        seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        if stop_after is not None and len(seen) > stop_after:
            raise KeyboardInterrupt

    handle = model.base_model.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def noise(model: Any, *, draws: int = 3, seed: int = 0, norms: Any = None) -> NullDraws:
    opened = open_model(model, tokenizer=tiny.TOKENIZER)
    rng = np.random.default_rng(seed)
    return weight_noise(opened, random_vs(), tiny.PROMPTS, norms=norms or NORMS, draws=draws, rng=rng)


def test_each_tensor_moves_by_its_norm_and_no_other_moves() -> None:
    model = tiny.llama()
    with witnessed(model) as seen:
        noise(model, draws=3)
    start, *passes = seen
    assert len(passes) == 6
    for number, weights in enumerate(passes):
        wanted = NORMS[1 if number < 3 else 20]
        moved = {name: float((weights[name] - start[name]).norm()) for name in start}
        assert {name: length for name, length in moved.items() if length} == pytest.approx(wanted, rel=1e-3)
    kicks = torch.stack([(one[FIRST] - start[FIRST]).flatten() / (one[FIRST] - start[FIRST]).norm() for one in passes])
    assert (kicks @ kicks.T - torch.eye(6)).abs().max() < 0.15, "each draw is noise of its own, added to the start"
    flat = kicks[0].numpy() * math.sqrt(kicks.shape[1])
    assert stats.kstest(flat, "norm").pvalue > 0.01


def test_cosines_are_those_of_models_noised_by_hand() -> None:
    model = tiny.llama()
    with witnessed(model) as seen:
        found = noise(model, draws=2)
    assert found.name == "weight_noise" and (found.steps, found.layers) == ((1, 20), LAYERS)
    assert found.cosines.shape == (2, 2, tiny.LAYERS)
    by_hand, means = copy.deepcopy(model), []
    for weights in seen:
        by_hand.load_state_dict(weights, strict=False)
        means.append(reference(by_hand, PROMPT_IDS, range(tiny.LAYERS - 1)).double().mean(0).numpy())
    drifts = np.stack(means[1:]) - means[0]  # [pass, layer, d_model]
    vectors = random_vs().vectors[: tiny.LAYERS - 1]
    cosines = np.einsum("pld,ld->pl", drifts, vectors) / np.linalg.norm(drifts, axis=-1)
    wanted = cosines.reshape(2, 2, -1).transpose(1, 0, 2)  # passes go step by step
    assert found.cosines[..., : tiny.LAYERS - 1] == pytest.approx(wanted, abs=1e-4)


def test_small_noise_has_no_preferred_side() -> None:
    cosines = noise(tiny.llama(), draws=150, norms={1: {FIRST: 0.02, OTHER: 0.02}}).cosines[:, 0]
    assert (np.abs(cosines.mean(0)) < 3.5 * cosines.std(0) / math.sqrt(150)).all()
    assert (cosines.std(0) > 0.05).all()


@pytest.mark.parametrize("stop_after", [None, 0, 3])
def test_weights_are_put_back_bit_for_bit_whatever_happens(stop_after: int | None) -> None:
    model = tiny.llama()
    before = copy.deepcopy(model.state_dict())
    with witnessed(model, stop_after=stop_after) as seen:
        if stop_after is None:
            noise(model)
        else:
            with pytest.raises(KeyboardInterrupt):
                noise(model)
    assert len(seen) == (7 if stop_after is None else stop_after + 1)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert hooks_on(open_model(model)) == 0


def test_a_seed_reproduces_the_noise_and_the_global_generator_has_no_part_in_it() -> None:
    model = tiny.llama()
    first = noise(model, seed=0).cosines
    torch.manual_seed(99)
    assert np.array_equal(first, noise(model, seed=0).cosines)
    assert np.abs(first - noise(model, seed=1).cosines).max() > 0.01


def test_a_checkpoint_on_disk_is_read_and_left_alone(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "anchor")
    content = weights_of(folder).read_bytes()
    found = weight_noise(
        Checkpoint("anchor", folder), random_vs(), tiny.PROMPTS, norms=NORMS, draws=3, rng=np.random.default_rng(0)
    )
    assert found.cosines == pytest.approx(noise(tiny.llama()).cosines, abs=1e-5)
    assert weights_of(folder).read_bytes() == content


def test_a_tensor_that_the_model_lacks_is_no_silence() -> None:
    with refused("nowhere.weight"):
        noise(tiny.llama(), norms={1: {FIRST: 0.5, "nowhere.weight": 1.0}})


def test_update_norms_are_those_of_the_weights_that_moved() -> None:
    before, after = tiny.llama(), tiny.llama()
    kick = torch.randn(after.get_parameter(OTHER).shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        after.get_parameter(OTHER).add_(kick)
    norms = update_norms(open_model(before), open_model(after))
    assert list(norms) == [OTHER] and norms[OTHER] == pytest.approx(math.sqrt(float((kick**2).sum())), rel=1e-5)


# -- comparing ---------------------------------------------------------------------------------------------------------


def trajectory_of(alignments: dict[str, list[float]], steps: tuple[int, ...] = (1,)) -> Trajectory:
    """Runs of one layer and its mean, held out, with chosen alignments, one a step."""
    rows = [
        {"run": run, "step": step, "layer": layer, "prompts": "held_out", "alignment": value}
        for run, values in alignments.items()
        for step, value in zip(steps, values, strict=True)
        for layer in (0, pd.NA)
    ]
    return Trajectory(pd.DataFrame(rows).astype({"layer": "Int64"}), (0,))


def null_of(draws: list[float], name: str = "null") -> NullDraws:
    return NullDraws(name, np.array(draws)[:, None, None], (1,), (0,))


@pytest.mark.parametrize(
    ("alignment", "at_least"), [(0.25, 2), (0.2, 3), (0.4, 1), (0.41, 0), (-0.9, 4), (-math.inf, 4)]
)
def test_p_counts_the_draws_that_reach_as_far_and_the_run_itself(alignment: float, at_least: int) -> None:
    draws = [0.1, 0.4, 0.2, 0.3]
    table = compare(trajectory_of({"a": [alignment]}), null_of(draws))
    assert list(table.columns) == ["null", "run", "step", "layer", "alignment", "p99", "p_value", "above"]
    assert table.p_value.to_list() == [(1 + at_least) / (1 + 4)] * 2
    assert table.p99.to_list() == [pytest.approx(np.quantile(draws, 0.99))] * 2
    assert table.above.to_list() == [alignment > 0.397] * 2
    assert table.null.unique().tolist() == ["null"] and str(table.layer.dtype) == "Int64"


def test_a_run_without_drift_has_no_cosine_and_is_never_significant() -> None:
    table = compare(trajectory_of({"still": [math.nan]}), null_of([-0.1, 0.0, 0.1]))
    assert table.p_value.to_list() == [1, 1] and not table.above.any()
    table = compare(trajectory_of({"a": [0.9]}), null_of([-0.1, math.nan, 0.1]))
    assert table.p_value.to_list() == [0.5, 0.5] and not table.above.any(), "a draw without drift excuses nothing"


def test_steps_and_layers_are_held_against_their_own_draws_and_the_mean_against_means() -> None:
    rng = np.random.default_rng(0)
    states = {name: rng.standard_normal((2, 3, 16)) for name in ("witness", "anchor", "a/1", "a/5", "a/20")}
    residuals = synthetic(states)
    trajectory = follow(residuals, locate_vrev(residuals), layers_in_mean=(0, 2))
    null = NullDraws("null", rng.uniform(-1, 1, (50, 2, 3)), (20, 1), (2, 0, 1))  # other orders than the trajectory's
    table = compare(trajectory, null, prompts="given")
    assert len(table) == 2 * 4 and set(table.step) == {1, 20}
    for row in table.to_dict("records"):
        draws = null.cosines[:, null.steps.index(row["step"])]
        drawn = (draws[:, 0] + draws[:, 1]) / 2 if pd.isna(row["layer"]) else draws[:, (2, 0, 1).index(row["layer"])]
        assert row["p99"] == pytest.approx(np.quantile(drawn, 0.99))
        assert row["p_value"] == (1 + sum(d >= row["alignment"] for d in drawn)) / 51
        wanted = trajectory.table[trajectory.table.step == row["step"]]
        wanted = wanted[wanted.layer.isna() if pd.isna(row["layer"]) else wanted.layer == row["layer"]]
        assert row["alignment"] == wanted.alignment.item()


def test_nothing_to_compare_is_an_error() -> None:
    with refused("held_out", "[1]"):
        compare(trajectory_of({"a": [0.1]}, steps=(5,)), null_of([0.0]))
    with refused("given"):
        compare(trajectory_of({"a": [0.1]}), null_of([0.0]), prompts="given")


# -- a world where it is true, and one where it is false ---------------------------------------------------------------

WIDTH = 24


def world(*, along: float, runs: int) -> pd.DataFrame:
    """Runs whose drifts are uniformly random, plus `along` of their length in the direction of v_rev."""
    rng = np.random.default_rng(7)
    witness, anchor = rng.standard_normal((2, 1, 3, WIDTH))
    v = (witness - anchor) / np.linalg.norm(witness - anchor, axis=-1, keepdims=True)
    drift = rng.standard_normal((runs, 1, 3, WIDTH))
    drift /= np.linalg.norm(drift, axis=-1, keepdims=True)
    moved = {f"run{i}/1": anchor + one + along * v for i, one in enumerate(drift)}
    residuals = synthetic({"witness": witness, "anchor": anchor, **moved})
    vs = locate_vrev(residuals)
    null = isotropic(vs, steps=(1,), draws=1000, rng=np.random.default_rng(1))
    return compare(follow(residuals, vs), null, prompts="given")


def test_isotropic_drifts_exceed_the_isotropic_null_as_often_as_they_should() -> None:
    table = world(along=0.0, runs=250)
    for layer in (0, 1, 2, None):
        rows = table[table.layer.isna() if layer is None else table.layer == layer]
        assert len(rows) == 250 and stats.kstest(rows.p_value, "uniform").pvalue > 0.005
        assert stats.binomtest(int(rows.above.sum()), 250, 0.01).pvalue > 0.005


def test_drifts_towards_the_witness_exceed_it_and_drifts_away_never_do() -> None:
    towards, away = world(along=1.5, runs=30), world(along=-1.5, runs=30)
    assert towards[towards.layer.isna()].above.all() and (towards[towards.layer.isna()].p_value < 0.01).all()
    assert not away.above.any() and (away[away.layer.isna()].p_value > 0.99).all()
