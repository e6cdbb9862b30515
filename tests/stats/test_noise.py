"""Weight noise against models noised by hand."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, hooks_on, reference, refused, weights_of
from scipy import stats

from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from
from gravlens.history.sequence import Checkpoint
from gravlens.models.opening import open_model
from gravlens.stats.damage import update_norms, weight_noise
from gravlens.stats.nulls import NullDraws

LAYERS = tuple(range(tiny.LAYERS))
FIRST, OTHER = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
NORMS = {1: {FIRST: 0.5}, 20: {FIRST: 1.0, OTHER: 0.25}}


def random_vs(width: int = tiny.WIDTH, layers: int = tiny.LAYERS, seed: int = 0) -> Directions:
    rng = np.random.default_rng(seed)
    return Directions(tuple(direction_from(rng.standard_normal(width), layer=layer) for layer in range(layers)))


@contextmanager
def witnessed(model: Any, *, stop_after: int | None = None) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The weights at each pass over the prompts; the first pass is the unchanged model's. Raises at a pass if told."""
    seen: list[dict[str, torch.Tensor]] = []

    def look(*_: Any) -> None:
        seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        if stop_after is not None and len(seen) > stop_after:
            raise KeyboardInterrupt

    open_model(model)  # tries its blocks once, before the passes that are counted
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


# -- small noise, which states follow linearly -------------------------------------------------------------------------

SMALL = {1: {FIRST: 0.002, OTHER: 0.002}, 20: {FIRST: 0.02, OTHER: 0.024}}  # proportions differ a little, as in runs


def linear(norms: Any, draws: int = 30) -> np.ndarray:
    opened = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
    rng = np.random.default_rng(0)
    return weight_noise(opened, random_vs(), tiny.PROMPTS, norms=norms, draws=draws, rng=rng, linear=True).cosines


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def test_small_noise_of_another_size_or_sign_has_the_same_cosine_within_a_quarter() -> None:
    mirrored = {name: -norm for name, norm in SMALL[20].items()}
    last, first, other = (
        noise(tiny.llama(), draws=20, norms={1: sizes}).cosines for sizes in (SMALL[20], SMALL[1], mirrored)
    )
    assert rms(first - last) < 0.25 * rms(last) and rms(other + last) < 0.25 * rms(last)


def test_where_motion_is_linear_half_the_draws_at_the_last_norms_and_their_negatives_serve_every_step() -> None:
    found = linear(SMALL, draws=29)
    assert found.shape == (29, 2, tiny.LAYERS) and np.array_equal(found[:, 0], found[:, 1])
    drawn = noise(tiny.llama(), draws=15, norms={20: SMALL[20]}).cosines[:, 0]
    assert np.array_equal(found[:15, 0], drawn) and np.array_equal(found[15:, 0], -drawn[:14])


def test_where_it_is_not_every_step_has_draws_of_its_own() -> None:
    large = {1: {FIRST: 0.02, OTHER: 0.02}, 20: {FIRST: 60.0, OTHER: 60.0}}
    found = linear(large)
    assert found.shape == (30, 2, tiny.LAYERS) and np.array_equal(
        found, noise(tiny.llama(), draws=30, norms=large).cosines
    )
    assert len(np.unique(np.abs(found[:, :, 0]))) == 60
