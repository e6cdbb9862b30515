"""Changes of the training passes: what the forward and the backward become, and that nothing of it stays."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocked import ROWS, Gradients, apart, collate, flat, opened, trainer, vs, weights
from histories import PROMPT_IDS, hidden_states, hooks_on, refused
from transformers import IntervalStrategy

from gravlens.blockers.blocking import Ramp, Scheduled, block
from gravlens.blockers.steered_training import GradientAblation, PreventativeSteering, TrainingAblation
from gravlens.directions.direction import Direction, Directions, Subspaces
from gravlens.directions.subspaces import span_of
from gravlens.models.opening import OpenModel

BATCH = collate(ROWS[:3])
PLANE = Subspaces(
    tuple(span_of(np.random.default_rng(k).standard_normal((3, tiny.WIDTH)), layer=k, distance=1.0) for k in (0, 1))
)
BLOCKERS = {
    "steering": PreventativeSteering(vs(), 0.7),
    "ablation": TrainingAblation(PLANE),
    "gradient": GradientAblation(PLANE),
}
each_blocker = pytest.mark.parametrize("blocker", BLOCKERS.values(), ids=BLOCKERS)


def bound_context(blocker: Any, model: OpenModel, weight: float = 1.0) -> Any:
    bound = blocker.bind(model, rng=np.random.default_rng(0))
    assert bound.loss is bound.after_update is bound.skip is None
    return bound.during(weight)


def states(model: OpenModel, layer: int) -> torch.Tensor:
    """The states [pos, d_model] that the next block reads of one prompt."""
    kept: list[torch.Tensor] = []
    handle = model.blocks[layer + 1].register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0][0]))
    hidden_states(model.module, PROMPT_IDS[0])
    handle.remove()
    return kept[0]


@contextmanager
def seen(model: OpenModel) -> Iterator[dict[int, torch.Tensor]]:
    """The gradient that arrives at each block's own output [row, pos, d_model], below what hooks make of it."""
    kept: dict[int, torch.Tensor] = {}

    def hook(layer: int) -> Any:
        def keep(_module: Any, _inputs: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            hidden.register_hook(lambda gradient: kept.__setitem__(layer, gradient))

        return keep

    handles = [b.register_forward_hook(hook(i), prepend=True) for i, b in enumerate(model.blocks)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def gradients(model: OpenModel, context: Any = None) -> dict[str, torch.Tensor]:
    model.module.zero_grad()
    if context is None:
        model.module(**BATCH).loss.backward()
    else:
        with context:
            model.module(**BATCH).loss.backward()
    return {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}


# -- the forward pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_steering_adds_the_direction_in_distances(weight: float) -> None:
    model, v = opened(), vs()[1]
    before = states(model, 1)
    with bound_context(PreventativeSteering(v, 0.7), model, weight):
        after = states(model, 1)
    shift = weight * 0.7 * v.distance * torch.from_numpy(np.array(v.vector))
    assert torch.allclose(after - before, shift.expand_as(before), atol=1e-5)


def test_ablation_leaves_nothing_in_the_subspace() -> None:
    model, basis = opened(), torch.from_numpy(np.array(PLANE[0].basis))
    before = states(model, 0)
    with bound_context(TrainingAblation(PLANE.at([0])), model, 0.1):  # there is no part of an ablation
        after = states(model, 0)
    assert torch.allclose(after, before - before @ basis.T @ basis, atol=1e-5)
    assert float((before @ basis.T).norm()) > 0.1 > 1e-4 > float((after @ basis.T).norm())


def test_gradient_ablation_leaves_the_forward_pass_as_it_was() -> None:
    model = opened()
    with torch.no_grad():
        before = model.module(**BATCH)
        with bound_context(BLOCKERS["gradient"], model):
            after = model.module(**BATCH)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)


# -- the backward pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "weight"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (2.0, 0.25)])
def test_the_gradient_along_the_basis_is_cut_by_the_strength(strength: float, weight: float) -> None:
    model, basis = opened(), torch.from_numpy(np.array(PLANE[1].basis))
    with seen(model) as free:
        gradients(model)
    with seen(model) as cut:
        gradients(model, bound_context(GradientAblation(PLANE.at([1]), strength), model, weight))
    along = free[1] @ basis.T @ basis
    assert torch.allclose(cut[1], free[1] - strength * weight * along, atol=1e-6)
    assert torch.equal(cut[2], free[2]), "above the layer nothing changes"
    if strength * weight == 1:
        assert float((cut[1] @ basis.T).norm()) < 1e-5 * float((free[1] @ basis.T).norm())


def test_weights_above_have_their_gradient_and_those_below_another() -> None:
    model = opened()
    free, cut = gradients(model), gradients(model, bound_context(GradientAblation(PLANE.at([1])), model))
    for name in free:
        above = name.startswith(("model.layers.2", "model.norm", "lm_head"))
        assert (apart(cut[name], free[name]) < 1e-6) == above, name


def test_a_step_down_a_gradient_that_is_ablated_moves_the_block_s_writes_off_the_basis() -> None:
    """The last matrix that writes to layer 1 gets no gradient whose writes lie in the subspace."""
    model, basis = opened(), torch.from_numpy(np.array(PLANE[1].basis))
    name = "model.layers.1.mlp.down_proj.weight"  # [d_model, hidden]
    free, cut = gradients(model)[name], gradients(model, bound_context(GradientAblation(PLANE.at([1])), model))[name]
    assert float((basis @ cut).norm()) < 1e-5 * float((basis @ free).norm())


@each_blocker
def test_checkpointed_activations_give_the_same_gradients(blocker: Any) -> None:
    plain, checkpointed = opened(), opened()
    checkpointed.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = []
    for model in (plain, checkpointed):
        model.module.train()
        found.append(flat(gradients(model, bound_context(blocker, model))))
    assert apart(found[1], found[0]) < 1e-6
    assert apart(found[0], flat(gradients(plain))) > 1e-3, "the blocker bites"


def test_in_bf16_the_gradient_keeps_its_dtype() -> None:
    model, basis = opened(), torch.from_numpy(np.array(PLANE[1].basis))
    model.module.to(torch.bfloat16)
    with seen(model) as cut:
        gradients(model, bound_context(GradientAblation(PLANE.at([1])), model))
    assert cut[1].dtype == torch.bfloat16
    assert float((cut[1].float() @ basis.T).norm()) < 2**-7 * float(cut[1].float().norm())


# -- in training alone -------------------------------------------------------------------------------------------------


@each_blocker
def test_on_trainer_the_passes_are_changed_and_the_saved_model_is_not(tmp_path: Path, blocker: Any) -> None:
    taken, model = Gradients(), opened()
    run = trainer(tmp_path, model.module, callback=taken, gradient_accumulation_steps=2)
    with block(run, blocker):
        run.train()
    twin = opened()
    for step, found in enumerate(taken.steps):
        twin.module.load_state_dict(taken.weights[step])
        inputs = collate(ROWS[4 * step : 4 * step + 4])
        twin.module.zero_grad()
        with bound_context(blocker, twin):
            twin.module(**inputs).loss.backward()
        wanted = {n: p.grad for n, p in twin.module.named_parameters() if p.grad is not None}
        assert apart(flat(found), flat(wanted)) < 1e-4
    assert hooks_on(model) == 0
    twin.module.load_state_dict(model.module.state_dict())
    assert torch.equal(twin.module(**BATCH).logits, model.module.eval()(**BATCH).logits)


def test_evaluation_between_steps_sees_the_plain_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    rows: Any = ROWS[:2]
    run.eval_dataset, run.args.eval_strategy, run.args.eval_steps = rows, IntervalStrategy.STEPS, 1
    run.state.eval_steps = 1
    with block(run, PreventativeSteering(vs(), 5.0)):
        run.train()
    (told,) = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert told == pytest.approx(run.model.eval()(**collate(ROWS[:2])).loss.item(), rel=1e-5)


def test_a_schedule_goes_with_the_strength(tmp_path: Path) -> None:
    ends = []
    for i, blocker in enumerate(
        [Scheduled(PreventativeSteering(vs(), 1.0), Ramp(4)), PreventativeSteering(vs(), 0.25)]
    ):
        run = trainer(tmp_path / str(i), max_steps=1)
        with block(run, blocker):
            run.train()
        ends.append(flat(weights(run.model)))
    assert torch.equal(*ends)


@pytest.mark.parametrize("make", [PreventativeSteering, TrainingAblation, GradientAblation])
def test_an_undefined_direction_is_refused_before_training(make: Any) -> None:
    undefined = Direction(np.full(tiny.WIDTH, np.nan), 1, 0.0, undefined="no difference")
    with refused("layer 1"):
        make(Directions((vs()[0], undefined))).bind(opened(), rng=np.random.default_rng(0))
