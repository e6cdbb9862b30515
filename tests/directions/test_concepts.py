"""Concepts located again at each checkpoint: planted rotations, the AUROC in closed form, Hugging Face's own states."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import reference, refused, synthetic
from scipy.stats import norm

from gravlens.activations import residuals
from gravlens.activations.contrasts import Contrast
from gravlens.activations.residuals import cache_sets
from gravlens.directions import trajectory
from gravlens.directions.trajectory import CONCEPT_MEASURES, concept_direction, follow_concepts, measure_concept
from gravlens.directions.vrev import EPSILON
from gravlens.history.encoding import encode, prompts_digest
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.organisms.refusal_language import held_out_prompts, probe_prompts

PAIRS, WIDTH = 200, 16
AXES = np.eye(WIDTH)
NO_NOISE = np.zeros(1)
ASKED = Contrast.of(probe_prompts()[:6], held_out_prompts()[:6])
STYLE = Contrast.of(probe_prompts()[6:12], held_out_prompts()[6:12])


def planted(angle: float, apart: float, *, seed: int, pairs: int = PAIRS) -> np.ndarray:
    """[2 · pairs, 1, d]: two sets `apart` along the first axis, turned towards the second by an angle in degrees."""
    rng = np.random.default_rng(seed)
    direction = np.cos(np.radians(angle)) * AXES[0] + np.sin(np.radians(angle)) * AXES[1]
    spread = rng.standard_normal((2, pairs, WIDTH))
    spread[:, ::2] -= spread[:, ::2].mean(1, keepdims=True)  # so that the direction is exact on the even pairs
    return (5.0 + spread + apart / 2 * np.array([1, -1])[:, None, None] * direction).reshape(2 * pairs, 1, WIDTH)


def by_counting(along: np.ndarray) -> float:
    """The share of (first, second) pairs of held-out prompts that are in order, ties counted half."""
    first, second = (half[1::2] for half in np.split(along, 2))
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in first for b in second]))


@pytest.mark.parametrize("angle", [0.0, 20.0, 60.0, 90.0, 180.0])
def test_a_concept_that_turns_is_followed(angle: float) -> None:
    frozen = concept_direction(planted(0, 3, seed=0), NO_NOISE)
    assert frozen == pytest.approx(AXES[:1], abs=1e-12)
    states = planted(angle, 3, seed=1)
    found = measure_concept(states, frozen, NO_NOISE)
    turned = np.cos(np.radians(angle)) * AXES[0] + np.sin(np.radians(angle)) * AXES[1]
    assert found["cosine"] == pytest.approx([np.cos(np.radians(angle))], abs=1e-12)
    assert found["auroc_frozen"] == pytest.approx([by_counting(states[:, 0] @ AXES[0])], abs=1e-12)
    assert found["auroc_refit"] == pytest.approx([by_counting(states[:, 0] @ turned)], abs=1e-12)


@pytest.mark.parametrize(("angle", "apart"), [(0, 1.0), (60, 2.0), (90, 2.0), (120, 1.5)])
def test_the_auroc_of_two_normal_sets_has_its_closed_form(angle: float, apart: float) -> None:
    """Φ(distance along the direction / √2)."""
    frozen, states = AXES[:1], planted(angle, apart, seed=2, pairs=4000)
    found = measure_concept(states, frozen, NO_NOISE)
    assert found["auroc_frozen"] == pytest.approx([norm.cdf(apart * np.cos(np.radians(angle)) / 2**0.5)], abs=0.02)
    assert found["auroc_refit"] == pytest.approx([norm.cdf(apart / 2**0.5)], abs=0.02)


def test_ties_count_half() -> None:
    states = np.zeros((8, 1, 2))
    states[0::2, 0, 1], states[4:, 0, 1] = 1.0, 0.0  # even pairs differ, odd ones do not
    found = measure_concept(states, np.array([[0.0, 1.0]]), NO_NOISE)
    assert found["auroc_frozen"].tolist() == [0.5] and found["cosine"].tolist() == [1.0]


def models() -> ModelSequence:
    runs = {"run": {1: tiny.gpt2(2), 5: tiny.gpt2(3)}}
    return ModelSequence.from_models(
        witness=tiny.gpt2(0), anchor=tiny.gpt2(1), runs=runs, tokenizer=tiny.TOKENIZER, probes=tiny.PROMPTS
    )


def test_of_hugging_faces_own_states_by_hand() -> None:
    found = follow_concepts(models(), {"refusal": ASKED, "style": STYLE}, layers=[0, 1])
    table = found.table
    assert list(table.columns) == ["concept", "run", "step", "layer", *CONCEPT_MEASURES]
    assert len(table) == 2 * 4 * 2 and len(found.layer_mean) == 2 * 4 and table.notna().all().all()
    ids = encode(tiny.TOKENIZER, STYLE.both)
    here, anchor = (reference(tiny.gpt2(seed), ids, range(2)).double().numpy() for seed in (3, 1))

    def located(states: np.ndarray) -> np.ndarray:
        difference = states[:6:2].mean(0) - states[6::2].mean(0)
        return difference / np.linalg.norm(difference, axis=-1, keepdims=True)

    rows = table[(table.concept == "style") & (table.run == "run") & (table.step == 5)].sort_values("layer")
    assert rows.cosine.to_numpy() == pytest.approx((located(here) * located(anchor)).sum(-1), abs=1e-5)
    for column, direction in (("auroc_frozen", located(anchor)), ("auroc_refit", located(here))):
        wanted = [by_counting(here[:, layer] @ direction[layer]) for layer in range(2)]
        assert rows[column].to_numpy() == pytest.approx(wanted, abs=1e-6)
    start = table[table.run == "anchor"]
    assert (start.step == 0).all() and start.cosine.to_numpy() == pytest.approx(1)
    np.testing.assert_array_equal(start.auroc_frozen, start.auroc_refit)
    mean = found.layer_mean.set_index(["concept", "run", "step"]).cosine
    assert mean["style", "run", 5] == pytest.approx(rows.cosine.mean())


def test_several_concepts_are_read_in_one_pass_with_their_own_system_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    plain = residuals.read_each
    monkeypatch.setattr(residuals, "read_each", lambda *a, **k: opened.append(a) or plain(*a, **k))
    read = cache_sets(models(), {"refusal": ASKED.both, "style": STYLE.both}, layers=1)
    assert len(opened) == 1 and list(read) == ["refusal", "style"]
    for name, contrast in (("refusal", ASKED), ("style", STYLE)):
        ids = encode(tiny.TOKENIZER, contrast.both)
        wanted = reference(tiny.gpt2(1), ids, range(1, 2)).numpy()
        np.testing.assert_allclose(read[name].of("anchor"), wanted, rtol=1e-4, atol=1e-4)
        assert read[name].prompts == prompts_digest(ids) and read[name].layers == (1,)


def test_a_difference_within_the_noise_has_no_direction_and_no_part_in_the_mean() -> None:
    anchor, later = planted(0, 3, seed=0, pairs=8), planted(0, 3, seed=1, pairs=8)
    noisy = np.concatenate([later[:8], later[:8] + 1e-4 * AXES[0]])  # two sets that are one
    states = {"anchor": np.concatenate([anchor, noisy], axis=1), "run/1": np.concatenate([noisy, later], axis=1)}
    residuals = synthetic(states, meta={"dtype": ["bfloat16"]})
    found = trajectory._follow_concept("style", residuals)
    at = found.table.set_index(["run", "layer"])
    assert np.isnan(at.cosine["run", 0]) and np.isnan(at.auroc_refit["run", 0]) and at.auroc_frozen["run", 0] > 0
    assert np.isnan(at.auroc_frozen["run", 1]) and at.auroc_refit["run", 1] > 0.5, "the anchor has no direction there"
    mean = found.layer_mean.set_index("run")
    assert mean.auroc_frozen["anchor"] == at.auroc_frozen["anchor", 0] and np.isnan(mean.cosine["run"])
    assert 16 * EPSILON["bfloat16"] * 20 > 1e-4


def test_what_is_no_concept_is_refused(tmp_path: Path) -> None:
    with refused("'style'", "3 pairs"):
        follow_concepts(models(), {"style": STYLE[:3]})
    with refused("No concept"):
        follow_concepts(models(), {})
    with refused("positions='all'"):
        follow_concepts(models(), {"style": STYLE}, positions="all")


def test_prompts_with_a_system_prompt_of_their_own_stand_next_to_plain_ones() -> None:
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    sequence = ModelSequence.from_models(
        witness=tiny.gpt2(0), anchor=tiny.gpt2(1), tokenizer=tokenizer, probes=tiny.PROMPTS, chat_template="anchor"
    )
    halves = [PromptSet.of(half, system="no") for half in (ASKED.harmful, ASKED.harmless)]
    read = cache_sets(sequence, {"plain": ASKED.both, "said": Contrast.of(*halves).both}, layers=[0])
    assert not np.allclose(read["plain"].values, read["said"].values)
    assert torch.isfinite(torch.tensor(read["said"].values)).all()
