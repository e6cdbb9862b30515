"""Interventions: their algebra, at which positions they act, and what they refuse. tests/test_hooks.py runs models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import RAGGED, planted_vector, refused, synthetic
from torch import Tensor

from gravlens.activations.residuals import Residuals
from gravlens.directions.direction import Direction, Directions, Span, Subspace, Subspaces
from gravlens.directions.subspaces import random_like, span_of
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.encoding import pad
from gravlens.interventions.edits import Ablate, At, Clamp, Intervention, Patch, Steer, everywhere
from gravlens.models.forward import reading

ENDS = ("witness", "anchor")
LENGTHS = [len(ids) for ids in RAGGED]
WIDTH = max(LENGTHS)


def direction(layer: int = 1, seed: int = 0, distance: float = 3.0) -> Direction:
    return direction_from(planted_vector(seed).numpy(), layer=layer, distance=distance)


def subspace(layer: int = 1, seed: int = 0, rank: int = 3) -> Subspace:
    return span_of(np.random.default_rng(seed).standard_normal((rank, tiny.WIDTH)), layer=layer, distance=3.0)


def states(seed: int = 1, *shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 7)), tiny.WIDTH, generator=torch.Generator().manual_seed(seed)) * 50


def history(seed: int = 3) -> Residuals:
    """States of a witness and an anchor on the ragged prompts, far from 0 in the mean."""
    rng, shape = np.random.default_rng(seed), (len(RAGGED), tiny.LAYERS, tiny.WIDTH)
    return synthetic({name: 5 * rng.standard_normal(shape[1:]) + rng.standard_normal(shape) for name in ENDS})


SPANS = [direction(), subspace()]
either_span = pytest.mark.parametrize("span", SPANS, ids=["direction", "subspace"])


def numbers(h: Tensor) -> np.ndarray:
    return h.double().numpy()


def along(h: Any, span: Span) -> np.ndarray:
    """Components [..., rank]."""
    return np.asarray(h, dtype=np.float64) @ span.basis.T.astype(np.float64)


def across(h: Any, span: Span) -> np.ndarray:
    """What is orthogonal to a span."""
    return np.asarray(h, dtype=np.float64) - along(h, span) @ span.basis


# --- algebra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, -0.5, 0.0])
def test_pitfall_4_steering_adds_strength_times_distance_along_v(strength: float) -> None:
    v, h = direction(distance=4.0), states()
    moved = Steer(v, strength).edit(h, v).double().numpy() - h.double().numpy()
    np.testing.assert_allclose(moved, np.broadcast_to(strength * 4.0 * v.vector, moved.shape), atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-6)]
)
@either_span
def test_pitfall_4_ablation_leaves_nothing_along_v_and_all_else(
    span: Span, dtype: torch.dtype, tolerance: float
) -> None:
    h = states().to(dtype)
    once = Ablate(span).edit(h, span)
    scale = h.double().norm(dim=-1).numpy()[..., None]
    assert once.dtype == dtype
    assert (np.abs(along(numbers(once), span)) <= tolerance * scale).all()
    assert (np.linalg.norm(numbers(once) - across(numbers(h), span), axis=-1) <= tolerance * scale[..., 0]).all()
    twice = Ablate(span).edit(once, span)
    assert ((twice - once).double().norm(dim=-1).numpy() <= tolerance * scale[..., 0]).all()


def test_pitfall_4_what_was_planted_along_a_direction_is_what_ablation_takes_away() -> None:
    v, h = direction(), states()
    clean = torch.tensor(across(h, v), dtype=torch.float32)
    planted = Steer(v, 2.5).edit(clean, v)
    np.testing.assert_allclose(along(planted, v), 2.5 * v.distance, rtol=1e-4)
    torch.testing.assert_close(Ablate(v).edit(planted, v), clean, atol=1e-4, rtol=0)


def test_pitfall_4_steering_by_1_takes_the_anchors_mean_to_the_witnesss() -> None:
    """The sign: v_rev points from the anchor to the witness, and its distance is the way there."""
    residuals = history()
    v = locate_vrev(residuals, layer=1)
    witness, anchor = (torch.tensor(residuals.of(name)[:, 1].mean(0)) for name in ENDS)
    torch.testing.assert_close(Steer(v).edit(anchor, v), witness, atol=1e-4, rtol=0)
    torch.testing.assert_close(Steer(v, -1.0).edit(witness, v), anchor, atol=1e-4, rtol=0)


def test_pitfall_4_a_clamp_counts_distances_from_the_anchors_mean() -> None:
    residuals, h = history(), states()
    v = locate_vrev(residuals, layer=1)
    ends = {0.0: "anchor", 1.0: "witness"}
    for strength in (0.0, 1.0, -0.5):
        held = Clamp(v, residuals, strength).edit(h, v)
        anchor, witness = (along(residuals.of(name)[:, 1].mean(0), v) for name in ("anchor", "witness"))
        wanted = np.broadcast_to(anchor + strength * (witness - anchor), (4, 7, 1))
        np.testing.assert_allclose(along(held, v), wanted, atol=1e-3)
        np.testing.assert_allclose(across(held, v), across(h, v), atol=1e-3)
        torch.testing.assert_close(Clamp(v, residuals, strength).edit(held, v), held, atol=1e-3, rtol=0)
        if strength in ends:
            mean = residuals.of(ends[strength])[:, 1].mean(0)
            np.testing.assert_allclose(along(held, v)[0, 0], along(mean, v), atol=1e-3)


def test_pitfall_4_a_clamp_in_a_subspace_is_ablation_pinned_to_the_anchors_mean() -> None:
    residuals, h, space = history(), states(), subspace(layer=2)
    held = Clamp(space, residuals).edit(h, space)
    mean = residuals.of("anchor")[:, 2].astype(np.float64).mean(0)
    assert np.abs(along(mean, space)).min() > 0.1
    np.testing.assert_allclose(along(held, space), np.broadcast_to(along(mean, space), (4, 7, 3)), atol=1e-3)
    np.testing.assert_allclose(across(held, space), across(h, space), atol=1e-3)
    unmeasured = replace(space, distance=float("nan"))  # a distance that is not counted in spoils nothing
    assert torch.equal(Clamp(unmeasured, residuals).edit(h, unmeasured), held)


def test_pitfall_4_an_edit_is_a_new_tensor_and_changes_neither_state_nor_direction() -> None:
    v, h = direction(), states()
    before, vector = h.clone(), v.vector.copy()
    for edit in (Steer(v), Steer(v, 0.0), Ablate(v), Clamp(v, history())):
        edited = edit.edit(h, v)
        assert edited.data_ptr() != h.data_ptr() and edited.untyped_storage().nbytes() == 4 * edited.numel()
        edited += 1
    assert torch.equal(h, before) and np.array_equal(v.vector, vector) and not v.vector.flags.writeable


@pytest.mark.parametrize("make", [lambda v: Steer(v, 0.3), Ablate])
def test_in_bf16_only_the_result_is_rounded(make: Any) -> None:
    v, h = direction(distance=700.0), states().to(torch.bfloat16)
    exact = make(v).edit(h.double(), v).to(torch.bfloat16)
    assert (make(v).edit(h, v) == exact).double().mean() > 0.99  # but for a tie that fp32 rounded first


def test_one_direction_at_every_layer() -> None:
    v = direction(layer=1)
    spread = everywhere(v, 4)
    assert (
        spread.layers == (0, 1, 2, 3) and (spread.vectors == v.vector).all() and (spread.distances == v.distance).all()
    )
    assert everywhere(v, tiny.opened("llama", Path())).layers == tuple(range(tiny.LAYERS))
    spaces = everywhere(subspace(), 4)
    assert spaces.layers == (0, 1, 2, 3) and all((space.basis == subspace().basis).all() for space in spaces)


def test_other_directions_keep_kind_and_all_else() -> None:
    residuals, other = history(), direction(seed=5)
    for edit in (Steer(direction(), 0.3), Ablate(direction()), Clamp(direction(), residuals, 0.3),
                 Patch(direction(), residuals, RAGGED, "witness")):  # fmt: skip
        swapped = edit.with_directions(other)
        assert vars(swapped) == vars(edit) | {"directions": other} and type(swapped) is type(edit)
        there = At(edit, "last").with_directions(other)
        assert there.positions == "last" and vars(there.intervention) == vars(swapped) and there.directions is other


@pytest.mark.parametrize("make", [Ablate, lambda s: Clamp(s, history()), lambda s: Patch(s, history(), RAGGED)])
def test_a_random_twin_of_a_subspace_goes_in_its_place(make: Any) -> None:
    spaces = Subspaces((subspace(0), subspace(1, rank=2)))
    twin = random_like(spaces, rng=np.random.default_rng(0))
    h = states(1, len(RAGGED), WIDTH)
    with reading(pad(RAGGED)):
        for space in twin:
            moved = numbers(make(spaces).with_directions(twin).edit(h, space)) - numbers(h)
            assert np.linalg.matrix_rank(moved.reshape(-1, tiny.WIDTH), tol=0.05) == space.rank
            np.testing.assert_allclose(across(moved, space), 0, atol=1e-3)


# --- at which positions -----------------------------------------------------------------------------------------

BY_HAND = {  # positions -> those of a prompt of n tokens among n + 3
    "all": lambda n: range(n + 3),
    "last": lambda n: [n - 1],
    "prompt": lambda n: range(n),
    "answer": lambda n: range(n, n + 3),
    (-1,): lambda n: [n - 1],
}


def changed(edited: Tensor, h: Tensor) -> list[list[int]]:
    """Positions of each row at which a state is another."""
    return [torch.nonzero(row).flatten().tolist() for row in (edited != h).any(-1)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", BY_HAND)
def test_pitfall_5_positions_count_from_the_last_prompt_token_whichever_side_is_padded(
    positions: Any, side: Any
) -> None:
    """Three tokens follow each prompt in the same batch, as in teacher forcing, and padding is never meant."""
    batch = pad([[*ids, 5, 6, 7] for ids in RAGGED], side=side)
    first = [0 if side == "right" else WIDTH - n for n in LENGTHS]
    ends = torch.tensor([start + n - 1 for start, n in zip(first, LENGTHS, strict=True)])
    v, h = direction(), states(1, len(RAGGED), WIDTH + 3)
    with reading(batch, ends):
        edited = At(Ablate(v), positions).edit(h, v)
    wanted = [[start + one for one in BY_HAND[positions](n)] for start, n in zip(first, LENGTHS, strict=True)]
    if positions == "all":
        wanted = [list(range(WIDTH + 3))] * len(RAGGED)  # without asking where the prompts end
    assert changed(edited, h) == wanted
    torch.testing.assert_close(edited[edited != h], Ablate(v).edit(h, v)[edited != h])


def test_pitfall_5_offsets_count_back_and_every_prompt_has_them() -> None:
    v, prompts = direction(), [RAGGED[0], RAGGED[2], RAGGED[3]]
    h = states(1, 3, WIDTH)
    for side, wanted in (("left", [[6, 8]] * 3), ("right", [[6, 8], [1, 3], [2, 4]])):
        with reading(pad(prompts, side=side)):
            assert changed(At(Ablate(v), (-1, -3)).edit(h, v), h) == wanted
    with refused("(-1, -2)", "1 tokens"), reading(pad(RAGGED)):
        At(Ablate(v), (-1, -2)).edit(states(1, len(RAGGED), WIDTH), v)


@pytest.mark.parametrize("positions", BY_HAND)
def test_pitfall_5_a_pass_from_the_cache_holds_answers_alone_and_one_that_reads_anew_goes_on(positions: Any) -> None:
    v, cached, anew = direction(), states(1, len(RAGGED), 1), states(1, len(RAGGED), WIDTH + 3)
    start = [WIDTH - n for n in LENGTHS]
    with reading(pad(RAGGED, side="left")):
        edit = At(Ablate(v), positions)
        assert changed(edit.edit(cached, v), cached) == [[0] if positions in ("all", "answer") else []] * len(RAGGED)
        assert (edit.edit(cached, v) is cached) == (positions not in ("all", "answer"))
        if positions != "all":
            wanted = [[s + one for one in BY_HAND[positions](n)] for s, n in zip(start, LENGTHS, strict=True)]
            assert changed(edit.edit(anew, v), anew) == wanted


def test_at_in_at_acts_where_both_do() -> None:
    v, h = direction(), states(1, len(RAGGED), WIDTH)
    with reading(pad(RAGGED, side="left")):
        assert changed(At(At(Ablate(v), "prompt"), "last").edit(h, v), h) == [[WIDTH - 1]] * len(RAGGED)
        assert At(At(Ablate(v), "answer"), "last").edit(h, v) is h


@pytest.mark.parametrize("edit", [At(Ablate(direction()), "last"), Patch(direction(), history(), RAGGED)])
def test_a_pass_that_does_not_say_where_its_prompts_end_is_refused(edit: Intervention) -> None:
    v = direction()
    with refused("(4, 7, 32)"):
        edit.edit(states(), v)
    with reading(pad(RAGGED)), refused("(4, 7, 32)"):
        edit.edit(states(), v)  # another batch
    with refused("(6, 9, 32)"):  # the reading is over
        edit.edit(states(1, len(RAGGED), WIDTH), v)


@pytest.mark.parametrize("positions", ["first", "", (), (0,), (-1, 1), (-1.0,), (True,), -1, None, [-1]])
def test_positions_that_are_none_are_refused(positions: Any) -> None:
    with refused(repr(positions)):
        At(Ablate(direction()), positions)


# --- a patch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@either_span
def test_a_patch_restores_each_prompts_own_component_at_its_last_token(span: Span, side: Any) -> None:
    residuals, order = history(), [4, 1, 5, 2]  # some of the prompts, in another order, one-token ones among them
    prompts = [RAGGED[row] for row in order]
    batch = pad(prompts, side=side)
    ends = [batch.input_ids.shape[1] - 1 if side == "left" else len(ids) - 1 for ids in prompts]
    h = states(1, *batch.input_ids.shape)
    with reading(batch):
        patched = Patch(span, residuals, RAGGED, "witness").edit(h, span)
    assert changed(patched, h) == [[end] for end in ends]
    at_end, before = numbers(patched)[range(4), ends], numbers(h)[range(4), ends]
    np.testing.assert_allclose(along(at_end, span), along(residuals.of("witness")[order, 1], span), atol=1e-3)
    np.testing.assert_allclose(across(at_end, span), across(before, span), atol=1e-3)


def test_what_a_patch_refuses() -> None:
    v, residuals = direction(), history()
    with reading(pad([[1, 2]])), refused("[1, 2]", "6"):
        Patch(v, residuals, RAGGED).edit(states(1, 1, 2), v)
    with refused("5 prompts", "6"):
        Patch(v, residuals, RAGGED[:5])
    with refused("position -2"):
        Patch(v, replace(residuals, meta={"positions": -2}), RAGGED)
    with refused("'stranger'"):
        Patch(v, residuals, RAGGED, "stranger")


@pytest.mark.parametrize("make", [Clamp, lambda spans, residuals: Patch(spans, residuals, RAGGED)])
def test_residuals_that_do_not_fit_are_refused(make: Any) -> None:
    with refused("layer 3"):
        make(Directions((direction(1), direction(3))), history())
    with refused("width 33"):
        make(direction_from(np.ones(tiny.WIDTH + 1), layer=1), history())
    with refused("'anchor'"):
        make(direction(), synthetic({"witness": history().of("witness")}))


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Steer, Ablate, lambda v: Clamp(v, history())])
def test_undefined_and_unscaled_directions_are_refused_by_name(make: Any) -> None:
    nothing = Direction(np.full(tiny.WIDTH, np.nan), 2, 0.0, undefined="witness and anchor differ by 0")
    with refused("layer 2", "differ by 0"):
        make(Directions((direction(1), nothing)))
    with refused("layer 2", "nan"):
        make(replace(nothing, undefined=None))
    with refused("layer 1", "length 2"):
        make(replace(direction(1), vector=2 * direction(1).vector))
    with refused("No direction"):
        make(Directions(()))


def test_a_strength_or_distance_that_is_no_number_is_refused() -> None:
    with refused("nan"):
        Steer(direction(), float("nan"))
    with refused("inf"):
        Steer(direction(distance=float("inf")))
    with refused("nan"):
        Clamp(direction(), history(), float("nan"))
    with refused("inf"):
        Clamp(direction(distance=float("inf")), history(), 0.5)


def test_strength_along_a_subspace_is_refused() -> None:
    space: Any = subspace()
    with refused("Steer(strength=1.0)", "subspaces"):
        Steer(space)
    with refused("Clamp(strength=0.5)"):
        Clamp(Subspaces((space,)), history(), 0.5)
