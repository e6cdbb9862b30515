"""Cross-fitting against halves followed one by one, reliability of planted and absent directions, the pass's noise."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from by_layer import stacked
from histories import moved, refused, synthetic

from gravlens.activations.residuals import Residuals, read_residuals
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import locate_vrev
from gravlens.models.opening import OpenModel, open_model
from gravlens.organisms.refusal_language import held_out_prompts
from gravlens.stats.reliability import cross_fit, forward_noise, split_half_reliability

LAYERS, WIDTH = 2, 32


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noisy(means: Mapping[str, np.ndarray], *, prompts: int, spread: float, seed: int = 0) -> Residuals:
    """Checkpoints with means [layer, d_model], each prompt with noise of its own at each checkpoint."""
    random = rng(seed)
    shape = (prompts, LAYERS, WIDTH)
    return synthetic({name: mean + spread * random.standard_normal(shape) for name, mean in means.items()})


def cell(table: pd.DataFrame, layer: int | None = None, **where: Any) -> pd.Series:
    rows = table[table.layer.isna() if layer is None else table.layer == layer]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    (found,) = rows.iloc
    return found


STILL = np.zeros((LAYERS, WIDTH))
V, W = np.eye(WIDTH)[[0, 0]], np.eye(WIDTH)[[1, 1]]  # the same at both layers, at a right angle


# -- cross-fitting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [4, 5])
def test_it_is_the_mean_over_halves_followed_one_by_one(prompts: int) -> None:
    states = {name: rng(i).standard_normal((prompts, LAYERS, WIDTH)) for i, name in enumerate(["witness", "anchor"])}
    states |= {name: rng(i + 9).standard_normal((prompts, LAYERS, WIDTH)) for i, name in enumerate(["a/1", "a/5"])}

    def part(rows: tuple[int, ...], label: str) -> Residuals:
        return synthetic({name: one[list(rows)] for name, one in states.items()}, prompts=label)

    everyone, tables = set(range(prompts)), []
    for half in combinations(range(prompts), prompts // 2):
        rest = tuple(everyone - set(half))
        for one, other in ((half, rest), (rest, half)):
            tables.append(stacked(follow(part(other, "other"), locate_vrev(part(one, "one")))))
    wanted = pd.concat(tables).groupby(["step", "layer"], dropna=False)[["alignment", "fraction"]].agg(["mean", "std"])
    found = stacked(cross_fit(synthetic(states), repeats=4000, rng=rng()))
    assert list(found.columns) == ["run", "step", "layer", "alignment", "alignment_sd", "fraction"]
    assert len(found) == 2 * (LAYERS + 1) and str(found.layer.dtype) == "Int64"
    for step in (1, 5):
        for layer in (0, 1, None):
            one = cell(found, layer, run="a", step=step)
            rows = wanted.xs(step, level="step")
            exact = rows[rows.index.isna()] if layer is None else rows.loc[[layer]]
            assert one.alignment == pytest.approx(exact["alignment", "mean"].item(), abs=0.01)
            assert one.alignment_sd == pytest.approx(exact["alignment", "std"].item(), rel=0.1)
            assert one.fraction == pytest.approx(exact["fraction", "mean"].item(), abs=0.01)


def test_without_prompt_noise_it_is_the_trajectory() -> None:
    residuals = noisy({"witness": 3 * V, "anchor": STILL, "a/1": V + W}, prompts=6, spread=0.0)
    found, exact = (
        stacked(one) for one in (cross_fit(residuals, repeats=5, rng=rng()), follow(residuals, locate_vrev(residuals)))
    )
    for measure, wanted in {"alignment": np.sqrt(0.5), "fraction": 1 / 3}.items():
        assert found[measure].to_list() == pytest.approx([wanted] * 3)
        assert exact[measure].to_list() == pytest.approx([wanted] * 3)
    assert (found.alignment_sd < 1e-12).all()


def test_prompt_noise_of_the_anchor_makes_an_alignment_that_cross_fitting_takes_out() -> None:
    means = {"witness": STILL, "anchor": STILL, "a/1": STILL}  # nothing moved: all that differs is noise
    naive, crossed = [], []
    for seed in range(20):
        residuals = noisy(means, prompts=12, spread=1.0, seed=seed)
        naive.append(cell(stacked(follow(residuals, locate_vrev(residuals))), run="a").alignment)
        crossed.append(cell(stacked(cross_fit(residuals, repeats=10, rng=rng(seed))), run="a").alignment)
    assert np.mean(naive) > 0.4, "r / (1 + r) = 1/2 where the anchor is as noisy as the rest"
    assert abs(np.mean(crossed)) < 0.08


def test_a_drift_towards_the_witness_survives_it_and_so_does_the_anchors_own_excursion() -> None:
    true = noisy({"witness": 4 * V, "anchor": STILL, "a/1": V + W}, prompts=40, spread=0.3)
    assert cell(stacked(cross_fit(true, repeats=10, rng=rng())), run="a").alignment == pytest.approx(
        np.sqrt(0.5), abs=0.1
    )
    # The witness and the run went nowhere in common; the anchor alone left, for every prompt.
    shared = noisy({"witness": V, "anchor": -W, "a/1": -V}, prompts=40, spread=0.1)
    expected = follow(shared, locate_vrev(shared)).table.alignment.to_numpy()
    found = cross_fit(shared, repeats=10, rng=rng()).table.alignment.to_numpy()
    assert found == pytest.approx(expected, abs=0.1)
    common = noisy({"witness": V, "anchor": -3 * W, "a/1": np.eye(WIDTH)[[2, 2]]}, prompts=40, spread=0.1)
    assert cell(stacked(cross_fit(common, repeats=10, rng=rng())), run="a").alignment > 0.8, (
        "disjoint prompts do not help"
    )


def test_chosen_layers_and_undefined_ones() -> None:
    states = {name: rng(i).standard_normal((6, 3, WIDTH)) for i, name in enumerate(["witness", "anchor", "a/1"])}
    states["witness"][:, 1] = states["anchor"][:, 1]
    residuals = synthetic(states)
    for table in (
        stacked(cross_fit(residuals, repeats=3, rng=rng())),
        split_half_reliability(residuals, repeats=3, rng=rng()),
    ):
        assert set(table.layer.dropna()) == {0, 2}
    chosen = stacked(cross_fit(residuals, layers=[2], repeats=3, rng=rng()))
    assert cell(chosen, 2).alignment == cell(chosen).alignment
    assert set(split_half_reliability(residuals, layers=[2, 1], repeats=3, rng=rng()).layer) == {2}
    with refused("layer 7"):
        cross_fit(residuals, layers=[7], repeats=3, rng=rng())
    with refused("layer 1"):
        split_half_reliability(residuals, layers=[1], repeats=3, rng=rng())


def test_what_cannot_be_halved_is_refused() -> None:
    states = {name: rng(i).standard_normal((6, LAYERS, WIDTH)) for i, name in enumerate(["witness", "anchor", "a/1"])}
    one = synthetic({name: state[:1] for name, state in states.items()})
    for verb in (cross_fit, split_half_reliability):
        with refused("one prompt"):
            verb(one, repeats=3, rng=rng())
        with refused("repeats=0"):
            verb(synthetic(states), repeats=0, rng=rng())
    with refused("no run"):
        cross_fit(synthetic({name: states[name] for name in ("witness", "anchor")}), repeats=3, rng=rng())


# -- reliability -------------------------------------------------------------------------------------------------------


def test_noise_alone_has_no_reliability_and_a_planted_direction_all_of_it() -> None:
    means = {"witness": 3 * V, "anchor": STILL, "a/1": STILL, "b/20": 2 * W}
    found = [
        split_half_reliability(noisy(means, prompts=48, spread=0.3, seed=s), repeats=20, rng=rng(s)) for s in range(6)
    ]
    assert list(found[0].columns) == ["of", "step", "layer", "reliability"]
    assert [str(found[0][name].dtype) for name in ("step", "layer")] == ["Int64", "Int64"]
    assert set(found[0].of) == {"v_rev", "a", "b"} and found[0][found[0].of == "v_rev"].step.isna().all()
    table = pd.concat(found).groupby("of").reliability.mean()
    assert table["v_rev"] > 0.97 and table["b"] > 0.97 and abs(table["a"]) < 0.15


def test_it_is_spearman_browns_and_foretells_a_second_set_of_prompts() -> None:
    means, spread = {"witness": V, "anchor": STILL}, 0.9
    sets = [noisy(means, prompts=32, spread=spread, seed=seed) for seed in range(30)]
    halves = [split_half_reliability(one, repeats=20, rng=rng(1)).reliability.mean() for one in sets]
    vectors = np.stack([locate_vrev(one).vectors for one in sets])
    again = np.mean([(one * other).sum(-1).mean() for one, other in combinations(vectors, 2)])
    assert 0.2 < again < 0.8 and np.mean(halves) == pytest.approx(again, abs=0.07)


def test_more_prompts_are_more_reliable_and_a_step_further_too() -> None:
    means = {"witness": V, "anchor": STILL, "a/1": 0.1 * W, "a/5": 0.4 * W}
    few, many = (split_half_reliability(noisy(means, prompts=n, spread=0.5), repeats=20, rng=rng()) for n in (8, 128))
    assert cell(few, 0, of="v_rev").reliability < cell(many, 0, of="v_rev").reliability
    assert cell(many, 0, of="a", step=1).reliability < cell(many, 0, of="a", step=5).reliability


def test_two_prompts_have_the_cosine_of_their_differences() -> None:
    residuals = noisy({"witness": V, "anchor": STILL}, prompts=2, spread=0.3)
    one, other = residuals.of("witness").astype(float) - residuals.of("anchor")
    r = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    found = split_half_reliability(residuals, repeats=3, rng=rng())
    assert found.reliability.to_numpy() == pytest.approx(2 * r / (1 + r))


# -- the pass's own noise ----------------------------------------------------------------------------------------------

ALL = tuple(range(tiny.LAYERS))
TEXTS = held_out_prompts()[:12]


def mean_state(model: OpenModel) -> np.ndarray:
    ids = [tiny.TOKENIZER(text)["input_ids"] for text in TEXTS]
    return read_residuals(model, ids, layers=ALL).double().mean(0).numpy()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bridge"])
def test_it_is_rounding_and_a_changed_weight_moves_further(kind: str, tmp_path: Any) -> None:
    model = tiny.opened(kind, tmp_path)
    noise = forward_noise(model, TEXTS, layers=ALL, repeats=4, rng=rng())
    assert noise.shape == (tiny.LAYERS,)
    assert (noise < 1e-5 * np.linalg.norm(mean_state(model), axis=-1)).all()
    if kind == "llama":
        before, changed = mean_state(model), open_model(moved(tiny.llama(), seed=1, by=1e-3), tokenizer=tiny.TOKENIZER)
        assert (np.linalg.norm(mean_state(changed) - before, axis=-1) > 10 * noise).all()


def leak(_module: Any, _inputs: Any, output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden + 0.01 * len(hidden)  # every entry, by the number of prompts in the batch


def test_a_pass_that_depends_on_its_batch_is_seen() -> None:
    model = tiny.opened("llama", None)  # pyright: ignore[reportArgumentType]
    quiet = forward_noise(model, TEXTS, layers=[2, 0], repeats=5, rng=rng())

    handle = model.module.model.layers[1].register_forward_hook(leak)
    try:
        noise = forward_noise(model, TEXTS, layers=[2, 0], repeats=5, rng=rng())
    finally:
        handle.remove()
    assert noise[0] > 100 * quiet[0] and noise[1] == quiet[1], "only above the block that leaks"
    assert noise[1] == pytest.approx(forward_noise(model, TEXTS, layers=[0], repeats=5, rng=rng())[0])


def test_the_more_repeats_the_larger_the_largest_and_no_gradient_is_kept() -> None:
    model = tiny.opened("llama", None)  # pyright: ignore[reportArgumentType]
    model.module.model.layers[1].register_forward_hook(leak)  # on some processors passes of a batch do not round
    few, many = (forward_noise(model, TEXTS, layers=ALL, repeats=n, rng=rng()) for n in (1, 6))
    assert (many >= few).all() and many.max() > 0
    assert all(weight.grad is None for weight in model.module.parameters()) and torch.is_grad_enabled()


def test_a_layer_that_is_not_there_and_no_repeats_are_refused() -> None:
    model = tiny.opened("llama", None)  # pyright: ignore[reportArgumentType]
    with refused("Layer 3"):
        forward_noise(model, TEXTS, layers=[3], repeats=1, rng=rng())
    with refused("repeats=0"):
        forward_noise(model, TEXTS, layers=[0], repeats=0, rng=rng())
