"""What is called judged is right: bf16 and fp16 with small adapters merged, against the same drift in fp32."""

import copy
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import moved, synthetic

from gravlens.activations.residuals import EPSILON, NOISE_ROUNDINGS, cache_residuals, noise_floor, rounding_noise
from gravlens.directions.decomposition import leak_map
from gravlens.directions.direction import Directions
from gravlens.directions.geometry import centred, raw, standardised, whitened
from gravlens.directions.trajectory import JUDGED_FROM, Trajectory, follow, judged_from
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.sequence import ModelSequence

SIZES = (5e-4, 2e-3, 8e-3, 3e-2, 1e-1)  # of an adapter's update, from nothing that bf16 can hold to a real one
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def updated(model: Any, size: float, seed: int) -> Any:
    """A copy with a low-rank update of some matrices, added in fp32."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if any(part in name for part in ("q_proj", "v_proj", "o_proj", "down_proj")):
                rows, columns = weight.shape
                left, right = (torch.randn(shape, generator=generator) for shape in ((rows, 4), (4, columns)))
                weight += size * left @ right / columns**0.5
    return twin


def followed(witness: Any, anchor: Any, runs: Any, dtype: torch.dtype) -> Trajectory:
    """Merged in a dtype: the sum is rounded to it, then read in it."""
    witness, anchor = witness.to(dtype), anchor.to(dtype)
    runs = {name: {step: model.to(dtype) for step, model in steps.items()} for name, steps in runs.items()}
    sequence = ModelSequence.from_models(
        witness=witness, anchor=anchor, runs=runs, tokenizer=tiny.TOKENIZER, probes=tiny.PROMPTS
    )
    residuals = cache_residuals(sequence)
    return follow(residuals, locate_vrev(residuals).defined())


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize(("width", "depth"), [(32, 3), pytest.param(64, 6, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_judged_alignment_is_right_within_a_twentieth(dtype: str, width: int, depth: int, massive: bool) -> None:
    half = DTYPES[dtype]
    anchor = tiny.llama(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth)
    if massive:  # one dimension many times as large as all others, and its rounding too
        with torch.no_grad():
            anchor.model.embed_tokens.weight[:, 3] += 20.0
    anchor = anchor.to(half).float()  # as it is stored
    witness = moved(anchor, seed=1, by=0.2).to(half).float()
    steps = dict(enumerate(SIZES, 1))
    runs = {f"run{seed}": {step: updated(anchor, size, seed) for step, size in steps.items()} for seed in (2, 3)}
    truth = followed(*copy.deepcopy((witness, anchor, runs)), torch.float32).table
    found = followed(witness, anchor, runs, half).table
    both = truth.merge(found, on=["run", "prompts", "step", "layer"], suffixes=("", "_half"))
    judged = both[both.judged_half]
    off = (judged.alignment - judged.alignment_half).abs()
    assert len(both) == len(found) and len(judged) and off.max() < 0.05
    assert not both[both.step == 1].judged_half.any() or dtype == "float16", "bf16 holds nothing of the smallest"
    assert both[both.step == len(SIZES)].judged_half.any()


def test_a_drift_within_the_noise_is_not_judged_in_any_table() -> None:
    """Closed form: 16 · ε · ‖h‖ of the dtype, or 2 % of the distance, whichever is longer."""
    rng = np.random.default_rng(0)
    anchor = rng.standard_normal((8, 2, 64))
    anchor *= 100 / np.linalg.norm(anchor, axis=-1, keepdims=True)  # every state is 100 long
    axis = np.eye(64)[0]
    for dtype in ("float32", "bfloat16", "float16"):
        noise = 16 * EPSILON[dtype] * 100
        distance = 20.0
        least = max(noise, 0.02 * distance)
        states = {"witness": anchor + distance * axis, "anchor": anchor}
        states |= {"run/1": anchor + 0.99 * least * axis, "run/2": anchor + 1.01 * least * axis}
        residuals = synthetic(states, meta={"dtype": [dtype]})
        vs = locate_vrev(residuals)
        assert noise_floor(residuals, 1) == pytest.approx(noise, rel=1e-5)
        assert judged_from(vs, residuals) == pytest.approx([least] * 2, rel=1e-5)
        for table in (follow(residuals, vs).table, leak_map([residuals])):
            assert table.set_index("step").judged.groupby("step").all().tolist() == [False, True]
    assert NOISE_ROUNDINGS == 16 and JUDGED_FROM == 0.02


def test_the_noise_is_that_of_the_coarsest_precision_and_scales_with_the_state() -> None:
    assert rounding_noise(2.0) == 2 * rounding_noise(1.0, "float32")
    assert rounding_noise(1.0, "float32, 4-bit (bitsandbytes nf4)", "float16") == rounding_noise(1.0, "bfloat16")
    assert rounding_noise(np.array([1.0, 3.0]), "float16").tolist() == [16 * 2.0**-11, 48 * 2.0**-11]


@pytest.mark.parametrize("fit", [raw, standardised, whitened])
def test_a_map_lengthens_or_shortens_the_noise_too(fit: Any) -> None:
    """Scaled states, a scaled floor: a geometry judges what the raw states judge."""
    rng = np.random.default_rng(1)
    anchor = 50 * rng.standard_normal((400, 1, 8))
    drift = {1: 0.5, 2: 2.0}
    direction = rng.standard_normal((1, 8))
    direction /= np.linalg.norm(direction)
    floor = 16 * EPSILON["bfloat16"] * np.linalg.norm(anchor, axis=-1).mean()
    states = {"witness": anchor + 20 * floor * direction, "anchor": anchor}
    states |= {f"run/{step}": anchor + size * floor * direction for step, size in drift.items()}
    residuals = synthetic(states, meta={"dtype": ["bfloat16"]})
    mapped = fit(residuals).apply(residuals)
    assert follow(mapped, locate_vrev(mapped)).table.judged.tolist() == [False, True]


def test_a_map_that_removes_most_of_a_state_leaves_its_noise() -> None:
    """States of a large constant, which centring removes: what is left of them is short, their rounding is not."""
    rng = np.random.default_rng(3)
    anchor = 100 + rng.standard_normal((20, 1, 64))
    direction = rng.standard_normal((1, 64))
    direction -= direction.mean()
    direction /= np.linalg.norm(direction)
    floor = 16 * EPSILON["bfloat16"] * np.linalg.norm(anchor, axis=-1).mean()
    states = {"witness": anchor + 20 * floor * direction, "anchor": anchor}
    states |= {f"run/{step}": anchor + size * floor * direction for step, size in {1: 0.5, 2: 2.0}.items()}
    residuals = synthetic(states, meta={"dtype": ["bfloat16"]})
    mapped = centred(residuals).apply(residuals)
    assert np.linalg.norm(mapped.of("anchor"), axis=-1).max() < 0.02 * floor * 16
    assert follow(mapped, locate_vrev(mapped)).table.judged.tolist() == [False, True]


def test_directions_of_other_prompts_judge_alike() -> None:
    anchor = np.ones((3, 1, 4))
    residuals = synthetic({"anchor": anchor, "run/1": anchor + 0.001}, meta={"dtype": ["bfloat16"]})
    vs = Directions((direction_from(np.ones(4), layer=0, distance=0.01),))
    assert not follow(residuals, vs).table.judged.any()
