"""Directions: a planted truth is found and nothing else, by either kind of model; files, noise, and bad input."""

import copy
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import (
    EOS,
    PROMPT_IDS,
    RAGGED,
    plant,
    planted_vector,
    refused,
    synthetic,
    weights_of,
)

from gravlens.activations.residuals import cache_residuals, read_residuals, residuals_of_batch
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.subspaces import random_like
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import (
    EPSILON,
    NOISE_ROUNDINGS,
    difference_of_means,
    direction_from,
    locate_vrev,
    spearman_brown,
)
from gravlens.history.encoding import pad, prompts_digest
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import open_model

ALL, AT, LENGTH = range(tiny.LAYERS), 1, 3.0  # where, and how far, the planted history moves
TRUTH = planted_vector(length=LENGTH).numpy() / LENGTH
DOORS = ("models", "folders", "bridge", "hooked_transformer")


def models(witness: Any, anchor: Any, **further: Any) -> ModelSequence:
    options = {"probes": tiny.PROMPTS, "tokenizer": tiny.TOKENIZER} | further
    return ModelSequence.from_models(witness=witness, anchor=anchor, **options)


def folders(witness: Path, anchor: Path, **further: Any) -> ModelSequence:
    return ModelSequence.from_folders(witness=witness, anchor=anchor, **{"probes": tiny.PROMPTS, **further})


def planted(door: str, folder: Path, *, anchor: Any = None) -> ModelSequence:
    """Witness = anchor + the truth at one layer, and a run that goes half of the way, through one of the doors."""
    anchor = anchor or (tiny.hooked_transformer() if door == "hooked_transformer" else tiny.gpt2())
    vector = torch.from_numpy(TRUTH) * LENGTH
    witness, half = plant(anchor, vector, AT), plant(anchor, vector / 2, AT)
    if door in ("models", "hooked_transformer"):
        return models(witness, anchor, runs={"seed0": {5: half}})
    names = {"witness": witness, "anchor": anchor, "step-5": half}
    paths = {name: tiny.save(model, folder / name) for name, model in names.items()}
    if door == "folders":
        return folders(paths["witness"], paths["anchor"], runs={"seed0": [paths["step-5"]]})
    bridges = {name: open_model(path, through="bridge").module for name, path in paths.items()}
    return models(bridges["witness"], bridges["anchor"], runs={"seed0": {5: bridges["step-5"]}})


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.astype(np.float64) @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def noisy(*, moved: float = 0.0, prompts: int = 400, width: int = 400, seed: int = 0) -> Any:
    """Witness and anchor states of one layer: independent noise of length √width, the witness moved along axis 0."""
    rng = np.random.default_rng(seed)
    states = {name: rng.standard_normal((prompts, 1, width)) for name in ("witness", "anchor")}
    states["witness"][..., 0] += moved
    return synthetic(states)


# -- planted truth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_planted_truth_is_found_at_its_layer_through_every_door(door: str, tmp_path: Path) -> None:
    v = locate_vrev(planted(door, tmp_path), layer=AT)
    assert cosine(v.vector, TRUTH) > 0.9999
    assert v.layer == AT and v.distance == pytest.approx(LENGTH, rel=1e-4)
    assert v.reliability == pytest.approx(1, abs=1e-4)
    assert np.linalg.norm(v.vector) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("door", DOORS)
def test_planted_truth_is_undefined_below_its_layer(door: str, tmp_path: Path) -> None:
    sequence = planted(door, tmp_path)
    with refused(f"undefined at layer {AT - 1}"):
        locate_vrev(sequence, layer=AT - 1)
    vs = locate_vrev(sequence)
    assert vs.layers == tuple(ALL) and [v.undefined is None for v in vs] == [layer >= AT for layer in ALL]
    below = vs[AT - 1]
    assert np.isnan(below.vector).all() and math.isnan(below.reliability) and below.distance < 1e-4
    assert "noise" in str(below.undefined)
    assert np.array_equal(vs[AT].vector, locate_vrev(sequence, layer=AT).vector)
    assert vs.defined().layers == tuple(range(AT, tiny.LAYERS))


def test_planted_truth_is_followed_and_an_undefined_layer_is_left_out_and_listed(tmp_path: Path) -> None:
    sequence = planted("folders", tmp_path)
    residuals = cache_residuals(sequence)
    trajectory = follow(residuals, locate_vrev(residuals))
    assert trajectory.layers_in_mean == (1, 2) and list(trajectory.undefined) == [0]
    assert "noise" in trajectory.undefined[0]
    table = trajectory.table.set_index("layer")
    assert 0 not in table.index
    assert table.loc[AT, "fraction"] == pytest.approx(0.5, abs=1e-4)
    assert table.loc[AT, "alignment"] == pytest.approx(1, abs=1e-4)
    assert table.loc[AT, "drift_norm"] == pytest.approx(LENGTH / 2, rel=1e-4)
    mean = trajectory.layer_mean
    assert mean.fraction.item() == pytest.approx(table.loc[[1, 2], "fraction"].mean()) and not math.isnan(
        mean.alignment.item()
    )


def test_identical_witness_and_anchor_are_named_and_every_layer_is_marked(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "same")
    with refused("undefined at layer 2", "differ by 0"):
        locate_vrev(folders(folder, folder), layer=2)
    vs = locate_vrev(folders(folder, folder))
    assert len(vs) == tiny.LAYERS and all(v.undefined for v in vs) and np.isnan(vs.vectors).all()
    with refused("undefined"):
        vs.defined()


# -- the forward pass's own noise --------------------------------------------------------------------------------------


def floor(states: torch.Tensor) -> np.ndarray:
    """The documented floor, [layer], for fp32."""
    return NOISE_ROUNDINGS * EPSILON["float32"] * states.norm(dim=-1).mean(0).numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_noise_of_other_batches_padding_and_readers_stays_below_the_floor(family: str, tmp_path: Path) -> None:
    model = tiny.llama() if family == "llama" else tiny.gpt2()
    opened, bridge = open_model(model), open_model(tiny.save(model, tmp_path), through="bridge")
    ids = [*RAGGED, *PROMPT_IDS]
    wanted = torch.cat([read_residuals(opened, [one], layers=ALL) for one in ids])
    with torch.no_grad():
        readings = [residuals_of_batch(one, pad(ids, EOS, "left"), layers=ALL) for one in (opened, bridge)]
        readings += [
            residuals_of_batch(opened, pad(ids[::-1]), layers=ALL).flip(0),
            read_residuals(bridge, ids, layers=ALL),
        ]
    noise = [difference_of_means(one.numpy(), wanted.numpy()) for one in readings]
    assert np.max(noise) > 0, "no noise was provoked"
    for one, reading in zip(readings, noise, strict=True):
        assert (np.linalg.norm(reading, axis=-1) < floor(wanted)).all()
        assert (np.linalg.norm((one - wanted).numpy(), axis=-1).max(0) < floor(wanted)).all()


def test_the_same_weights_read_in_two_ways_make_no_direction(tmp_path: Path) -> None:
    model = tiny.gpt2()
    bridge = open_model(tiny.save(model, tmp_path), through="bridge").module
    assert all(v.undefined for v in locate_vrev(models(bridge, model)))


def test_the_floor_hides_nothing_a_little_above_it() -> None:
    anchor = tiny.gpt2()
    norm = float(read_residuals(open_model(anchor), PROMPT_IDS, layers=[AT]).norm(dim=-1).mean())
    below, above = (
        locate_vrev(models(plant(anchor, planted_vector(length=by * norm), AT), anchor)) for by in (5e-7, 5e-5)
    )
    assert below[AT].undefined and above[AT].undefined is None
    assert cosine(above[AT].vector, TRUTH) > 0.99


@pytest.mark.parametrize(
    ("dtype", "undefined"), [(["float32"], False), (["bfloat16", "float32"], True), (["odd"], True)]
)
def test_the_floor_is_that_of_the_coarsest_dtype(dtype: list[str], undefined: bool) -> None:
    states = {name: np.full((2, 1, 4), value) for name, value in [("witness", 1.01), ("anchor", 1.0)]}
    (v,) = locate_vrev(synthetic(states, meta={"dtype": dtype}))
    assert (v.undefined is not None) == undefined


# -- algebra -----------------------------------------------------------------------------------------------------------


def test_pitfall_4_the_sign_is_from_the_anchor_towards_the_witness() -> None:
    there = synthetic({"witness": np.ones((2, 1, 3)), "anchor": np.zeros((2, 1, 3))})
    back = dataclasses.replace(there, checkpoints=("anchor", "witness"))
    v, w = locate_vrev(there, layer=0), locate_vrev(back, layer=0)
    assert v.vector.tolist() == pytest.approx([3**-0.5] * 3) and v.distance == pytest.approx(3**0.5)
    assert w.vector.tolist() == pytest.approx([-(3**-0.5)] * 3)


def test_pitfall_4_the_order_of_prompts_changes_nothing() -> None:
    anchor, witness = tiny.llama(0), tiny.llama(1)
    one, other = (locate_vrev(models(witness, anchor, probes=tiny.PROMPTS.texts[::step])) for step in (1, -1))
    for v, w in zip(one, other, strict=True):
        assert cosine(v.vector, w.vector) == pytest.approx(1, abs=1e-6)
        assert v.distance == pytest.approx(w.distance, rel=1e-5)
    assert one[0].prompts != other[0].prompts


def test_pitfall_4_a_vector_cannot_be_changed_not_even_through_the_array_it_was_made_of() -> None:
    given = np.array([3.0, 4.0], dtype=np.float32)
    v = Direction(given, layer=0, distance=1.0)
    given[0] = 99
    assert v.vector.tolist() == [3, 4] and v.vector.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        v.vector[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        v.layer = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_pitfall_10_means_are_accumulated_in_fp64() -> None:
    rng = np.random.default_rng(0)
    anchor = (1e4 + rng.standard_normal((50_000, 2))).astype(np.float32)
    witness = (anchor + np.float32([0.5, 0.25])).astype(np.float32)
    exact = [math.fsum(witness[:, i].tolist()) / 5e4 - math.fsum(anchor[:, i].tolist()) / 5e4 for i in (0, 1)]
    assert difference_of_means(witness, anchor) == pytest.approx(exact, abs=1e-9)
    naive = witness.mean(0) - anchor.mean(0)
    assert np.abs(naive - exact).max() > 1e-4, "fp32 would have been good enough"


def test_reliability_is_near_one_for_a_planted_move_and_near_zero_for_noise() -> None:
    assert locate_vrev(noisy(moved=10.0), layer=0).reliability > 0.98
    assert abs(locate_vrev(noisy(), layer=0).reliability) < 0.2


def test_reliability_is_the_split_half_cosine_stepped_up() -> None:
    residuals = noisy(moved=1.0, prompts=30, width=20)
    even, odd = (residuals.values[0, i::2, 0].mean(0) - residuals.values[1, i::2, 0].mean(0) for i in (0, 1))
    half = cosine(even, odd)
    assert locate_vrev(residuals, layer=0).reliability == pytest.approx(2 * half / (1 + half), abs=1e-6)


def test_reliability_is_bounded_below() -> None:
    """2r / (1 + r) is −18 at r = −.9 and has no limit at −1."""
    found = spearman_brown(np.array([-1.0, -0.9, -0.5, 0.0, 0.5, 1.0, np.nan]))
    np.testing.assert_allclose(found, [-1, -1, -1, 0, 2 / 3, 1, np.nan])


def test_one_prompt_has_no_reliability() -> None:
    v = locate_vrev(noisy(moved=10.0, prompts=1), layer=0)
    assert math.isnan(v.reliability) and v.undefined is None


def test_one_layer_of_residuals_is_that_of_all() -> None:
    residuals = cache_residuals(models(tiny.llama(0), tiny.llama(1)), layers=[0, 2])
    vs = locate_vrev(residuals)
    for layer in (0, 2):
        v = locate_vrev(residuals, layer=layer)
        assert v.layer == layer and np.array_equal(v.vector, vs[layer].vector) and v.distance == vs[layer].distance
    assert not np.allclose(vs[0].vector, vs[2].vector)


def test_an_estimator_of_ones_own_is_used_and_named() -> None:
    def medians(witness: np.ndarray, anchor: np.ndarray) -> np.ndarray:
        return np.median(witness, axis=0) - np.median(anchor, axis=0)

    residuals = noisy(moved=5.0, prompts=9, width=4)
    v = locate_vrev(residuals, layer=0, estimator=medians)
    wanted = medians(residuals.values[0, :, 0], residuals.values[1, :, 0])
    assert v.estimator == "medians" and cosine(v.vector, wanted) == pytest.approx(1)
    assert v.distance == pytest.approx(float(np.linalg.norm(wanted)))


def test_a_direction_knows_what_it_was_made_from(tmp_path: Path) -> None:
    sequence = planted("folders", tmp_path)
    v = locate_vrev(sequence, layer=AT)
    assert v.prompts == prompts_digest(PROMPT_IDS) and v.estimator == "difference_of_means"
    assert v.made_from == {
        "witness": str(tmp_path / "witness"),
        "anchor": str(tmp_path / "anchor"),
        "positions": "last",
        "chat_template": "own",
        "n_prompts": len(tiny.PROMPTS),
    }


def test_prompts_may_be_given_instead_of_probes() -> None:
    sequence = models(tiny.llama(0), tiny.llama(1), probes=None)
    v = locate_vrev(sequence, layer=0, prompts=tiny.PROMPTS)
    assert np.array_equal(v.vector, locate_vrev(models(tiny.llama(0), tiny.llama(1)), layer=0).vector)
    with refused("no probe prompts"):
        locate_vrev(sequence, layer=0)
    with refused("Residuals and prompts"):
        locate_vrev(noisy(), layer=0, prompts=tiny.PROMPTS)


# -- Directions, files, twins ------------------------------------------------------------------------------------------


def three() -> Directions:
    """One ordinary direction, one undefined, one with the bare minimum."""
    rng = np.random.default_rng(0)
    full = Direction(rng.standard_normal(5), 4, 0.1, 0.7, "mine", "digest", {"witness": "<b>w</b>", "n": 3})
    none = Direction(np.full(5, np.nan), 7, 0.0, undefined="they do not differ")
    return Directions((full, none, direction_from(rng.standard_normal(5), layer=2)))


def same(a: Direction, b: Direction) -> bool:
    facts = [{k: v for k, v in vars(d).items() if k not in ("vector", "reliability")} for d in (a, b)]
    reliability = np.array([a.reliability, b.reliability])
    return facts[0] == facts[1] and a.vector.tobytes() == b.vector.tobytes() and np.ptp(np.nan_to_num(reliability)) == 0


def test_directions_are_indexed_by_layer() -> None:
    vs = three()
    assert vs.layers == (4, 7, 2) and vs[7].undefined and len(vs) == 3 and vs.at([2, 4]).layers == (2, 4)
    assert vs.vectors.shape == (3, 5) and vs.distances[0] == 0.1
    for bad in (0, -1, 3):
        with refused(f"layer {bad}"):
            vs[bad]


def test_directions_come_back_from_a_file_exactly_nan_included(tmp_path: Path) -> None:
    vs = three()
    loaded = Directions.load(vs.save(tmp_path / "v.safetensors"))
    assert all(same(a, b) for a, b in zip(vs, loaded, strict=True))
    assert math.isnan(loaded[7].reliability) and not loaded[4].vector.flags.writeable
    assert same(Direction.load(vs[7].save(tmp_path / "one.safetensors")), vs[7])
    assert not same(vs[4], vs[2])


def test_pitfall_5_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = noisy().save(tmp_path / "residuals.safetensors")
    with refused("residuals.safetensors"):
        Directions.load(path)


def test_the_html_is_escaped_and_shows_the_reason() -> None:
    html = three()._repr_html_()
    assert "<b>w" not in html and "&lt;b&gt;w" in html and "they do not differ" in html
    assert ">4</td>" in three()[4]._repr_html_() and ">7</td>" not in three()[4]._repr_html_()


@pytest.mark.parametrize("vector", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_a_vector_without_length_is_no_direction(vector: list[float]) -> None:
    with refused("mine"):
        direction_from(np.array(vector), layer=0, name="mine")


def test_a_vector_is_scaled_to_unit_length_and_its_length_is_the_distance() -> None:
    v = direction_from(np.array([3, 4]), layer=1)
    assert v.vector.tolist() == pytest.approx([0.6, 0.8]) and v.distance == 5
    assert direction_from(np.array([3, 4]), layer=1, distance=2.0).distance == 2


def test_random_twins_keep_layers_and_distances_and_are_drawn_anew() -> None:
    vs, rng = three(), np.random.default_rng(0)
    one, other = random_like(vs, rng=rng), random_like(vs, rng=rng)
    assert one.layers == (4, 2) and one.distances.tolist() == [vs[4].distance, vs[2].distance]
    assert np.linalg.norm(one.vectors, axis=1) == pytest.approx([1, 1], abs=1e-6)
    assert not np.allclose(one.vectors, other.vectors)
    again = random_like(vs, rng=np.random.default_rng(0))
    assert np.array_equal(one.vectors, again.vectors)


def test_twins_of_neighbouring_layers_are_as_alike_as_the_states_there() -> None:
    vs = Directions(tuple(Direction(np.eye(8)[0], layer, 1.0) for layer in range(3)))
    states = np.repeat(np.random.default_rng(3).standard_normal((50, 1, 8)), 3, axis=1)  # the same at every layer
    for twin in (
        random_like(vs, rng=np.random.default_rng(0), states=states),
        random_like(vs, rng=np.random.default_rng(0)),
    ):
        assert twin.vectors[0] @ twin.vectors[1] == pytest.approx(1) == twin.vectors[0] @ twin.vectors[2]


def test_covariance_matched_twins_have_the_spectrum_of_the_states() -> None:
    rng = np.random.default_rng(0)
    scales = np.array([5.0, 1.0, 0.2, 0.0])
    states = 100 + rng.standard_normal((300, 1, 4)) * scales  # the mean is far from 0, and is no part of a covariance
    vs = Directions((Direction(np.eye(4)[0], 0, 1.0),))
    drawn = np.stack([random_like(vs, rng=rng, states=states)[0].vector for _ in range(400)])
    assert np.abs(drawn[:, 3]).max() < 1e-6
    assert np.median(np.abs(drawn[:, 1] / drawn[:, 0])) == pytest.approx(0.2, rel=0.25)
    assert abs(drawn[:, 0].mean()) < 0.2


# -- bad input, from the user's door -----------------------------------------------------------------------------------


def apart(layers: int, width: int = 8, prompts: int = 40) -> np.ndarray:
    """States [prompt, layer, d_model] that vary along one axis alone, another axis at each layer."""
    states = np.zeros((prompts, layers, width))
    for layer in range(layers):
        states[:, layer, layer] = np.random.default_rng(layer).standard_normal(prompts)
    return states


@pytest.mark.parametrize("columns", ["all layers", "defined layers"])
def test_covariance_matched_twins_take_their_own_layer_where_another_is_undefined(columns: str) -> None:
    vs = Directions(tuple(Direction(np.eye(8)[0], layer, 1.0) for layer in range(3)))
    gone = dataclasses.replace(vs[1], vector=np.full(8, np.nan), undefined="no difference")
    some = Directions((vs[0], gone, vs[2]))
    states = apart(3) if columns == "all layers" else apart(3)[:, [0, 2]]
    twins = random_like(some, rng=np.random.default_rng(0), states=states)
    assert twins.layers == (0, 2)
    for twin in twins:
        assert abs(twin.vector[twin.layer]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_states_of_other_layers_are_refused(layers: int) -> None:
    vs = Directions(tuple(Direction(np.eye(8)[0], layer, 1.0) for layer in range(3)))
    with refused(f"{layers} layers", "3"):
        random_like(vs, rng=np.random.default_rng(0), states=apart(layers))


@pytest.mark.parametrize("layer", [-1, tiny.LAYERS, 99])
def test_a_layer_out_of_range_is_named_with_the_range(layer: int) -> None:
    sequence = models(tiny.gpt2(0), tiny.gpt2(1))
    with refused(f"Layer {layer}"):
        locate_vrev(sequence, layer=layer)
    with pytest.raises(GravlensError, match=f"from 0 to {tiny.LAYERS - 1}"):
        locate_vrev(sequence, layer=layer)
    with refused(f"Layer {layer}"):
        locate_vrev(cache_residuals(sequence), layer=layer)


def test_residuals_without_a_witness_are_named() -> None:
    with refused("'witness' is not in these residuals"):
        locate_vrev(synthetic({"anchor": np.ones((1, 1, 2))}))


@pytest.mark.parametrize("role", ["witness", "anchor"])
def test_each_bad_checkpoint_is_named_at_the_users_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.chdir(tmp_path)
    good = tiny.save(tiny.llama(0), tmp_path / "good")
    names = ("truncated", "pickled", "wider", "deeper", "gone")
    bad = {name: tiny.save(tiny.llama(1), tmp_path / name) for name in names}
    weights_of(bad["truncated"]).write_bytes(weights_of(bad["truncated"]).read_bytes()[:-1])
    weights_of(bad["pickled"]).rename(bad["pickled"] / "pytorch_model.bin")
    tiny.save(tiny.llama(1, hidden_size=64), bad["wider"])
    tiny.save(tiny.llama(1, num_hidden_layers=4), bad["deeper"])

    def pair(other: Any) -> ModelSequence:
        return folders(**{"witness": good, "anchor": good, role: other})

    for name in ("truncated", "pickled"):
        with refused(str(bad[name])):
            locate_vrev(pair(bad[name]), layer=AT)
    for name, what in [("wider", "width 64"), ("deeper", "4 layers")]:
        with refused(what, str(bad[name]), "anchor", "witness"):
            locate_vrev(pair(bad[name]), layer=AT)
    gone = pair(bad["gone"])
    shutil.rmtree(bad["gone"])
    with refused("gone"):
        locate_vrev(gone, layer=AT)
    with refused("ft/anchor"):  # found missing when it is opened
        locate_vrev(pair("ft/anchor"), layer=AT)


def test_another_vocabulary_is_refused_where_prompts_need_it() -> None:
    one, other = tiny.llama(0), tiny.llama(1)
    one.tokenizer, other.tokenizer = (
        tiny.TOKENIZER,
        copy.deepcopy(tiny.TOKENIZER),
    )  # as TransformerLens models carry them
    other.tokenizer.add_tokens(["unheard-of"])
    assert locate_vrev(models(one, other, tokenizer=None), layer=0).distance > 0
    with refused("tokenizer of witness", "vocabularies of"):
        locate_vrev(models(one, other, tokenizer=None, probes=["unheard-of"] * 2), layer=0)
    assert locate_vrev(models(one, other, tokenizer=tiny.TOKENIZER), layer=0).distance > 0


def test_a_direction_is_named_on_a_line_without_its_numbers() -> None:
    shown = repr(direction_from(np.ones(768), layer=3))
    assert "layer=3" in shown and "array" not in shown and len(shown) < 300


def test_a_layer_of_numpy_is_a_number_of_python_and_true_is_none() -> None:
    states = np.random.default_rng(0).standard_normal((2, 5, 3, 8))
    given = synthetic({"witness": states[0], "anchor": states[1]})
    v = locate_vrev(given, layer=np.int64(1))
    assert type(v.layer) is int and np.array_equal(v.vector, locate_vrev(given)[1].vector)
    with refused("True"):
        locate_vrev(given, layer=True)
