"""`block` on Hugging Face Trainer, with blockers whose effect is known: what is added where, when, and what is left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocked import EXAMPLES, ROWS, Gradients, apart, flat, opened, task_gradient, trainer, vs, weights
from histories import hooks_on, refused
from transformers import TrainerCallback

from gravlens.blockers.anchoring import Rehearsal
from gravlens.blockers.blocking import BoundBlocker, Draws, Ramp, Scheduled, Until, block
from gravlens.blockers.penalty import Penalty
from gravlens.blockers.steered_training import PreventativeSteering
from gravlens.models.opening import OpenModel

NAME = "model.layers.1.mlp.up_proj.weight"
SLOPE = torch.randn(tiny.llama().get_parameter(NAME).shape, generator=torch.Generator().manual_seed(0))


@dataclass
class Known:
    """Adds `scale` · SLOPE to one weight's gradient, writes down its passes, shifts that weight by `shift`."""

    scale: float = 0.05
    shift: float = 0.0
    seen: list[tuple[str, float]] = field(default_factory=list)
    fault: BaseException | None = None

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        weight_of = model.module.get_parameter(NAME)

        def loss(weight: float) -> torch.Tensor:
            self.seen.append(("loss", weight))
            return weight * self.scale * (weight_of * SLOPE).sum()

        @contextmanager
        def during(weight: float) -> Iterator[None]:
            handle = model.blocks[0].register_forward_hook(lambda *_: self.seen.append(("pass", weight)))
            try:
                yield
            finally:
                handle.remove()

        def after_update(weight: float) -> float:
            self.seen.append(("update", weight))
            if self.fault is not None:
                raise self.fault
            with torch.no_grad():
                weight_of.add_(weight * self.shift)
            return abs(weight * self.shift) * weight_of.numel() ** 0.5

        return BoundBlocker(loss=loss, during=during, after_update=after_update)

    def of(self, kind: str) -> list[float]:
        return [weight for name, weight in self.seen if name == kind]


def added(gradient: dict[str, torch.Tensor], by: float) -> dict[str, torch.Tensor]:
    return {**gradient, NAME: gradient[NAME] + by * SLOPE}


# -- the gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_gradient_is_added_once_an_optimizer_step(tmp_path: Path, accumulation: int) -> None:
    taken, module = Gradients(), tiny.llama()
    run = trainer(tmp_path, module, callback=taken, gradient_accumulation_steps=accumulation, max_steps=2)
    start, blocker = tiny.llama(), Known()
    with block(run, blocker):
        run.train()
    each = 2 * accumulation
    for step, gradient in enumerate(taken.steps):
        start.load_state_dict(taken.weights[step])
        wanted = added(task_gradient(start, ROWS[step * each : (step + 1) * each]), blocker.scale)
        assert apart(flat(gradient), flat(wanted)) < 1e-4
        assert apart(gradient[NAME], wanted[NAME]) < 1e-4
    assert len(taken.steps) == 2 and blocker.of("loss") == [1, 1] and len(blocker.of("pass")) == 2 * accumulation


def test_it_is_clipped_together_with_the_task_s(tmp_path: Path) -> None:
    taken = Gradients()
    run = trainer(tmp_path, callback=taken, max_steps=1, max_grad_norm=0.25)
    with block(run, Known()):
        run.train()
    wanted = flat(added(task_gradient(tiny.llama(), ROWS[:2]), 0.05))
    assert apart(flat(taken.steps[0]), 0.25 * wanted / wanted.norm()) < 1e-4
    assert run.state.log_history[0]["grad_norm"] == pytest.approx(float(wanted.norm()), rel=1e-4)


@pytest.mark.long
def test_several_blockers_add_up_and_none_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for i, blockers in enumerate([(), (Known(),), (Known(0.02), Known(0.03)), (Known(0.0),)]):
        run = trainer(tmp_path / str(i))
        with block(run, *blockers):
            run.train()
        ends.append(weights(run.model))
    plain = trainer(tmp_path / "plain")
    plain.train()
    for found, wanted in ((ends[0], weights(plain.model)), (ends[3], weights(plain.model)), (ends[2], ends[1])):
        assert apart(flat(found), flat(wanted)) < 1e-5
    assert apart(flat(ends[1]), flat(ends[0])) > 1e-4


def test_an_update_is_followed_by_the_change_of_weights(tmp_path: Path) -> None:
    free, shifted = trainer(tmp_path, max_steps=1), trainer(tmp_path, max_steps=1)
    free.train()
    with block(shifted, Known(scale=0.0, shift=0.125)):
        shifted.train()
    moved = weights(shifted.model)[NAME] - weights(free.model)[NAME]
    assert moved.min().item() == pytest.approx(0.125, abs=1e-5) and moved.max().item() == pytest.approx(0.125, abs=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_log_has_the_norm_of_what_was_added(tmp_path: Path, shift: float) -> None:
    run = trainer(tmp_path, max_steps=2)
    with block(run, Scheduled(Known(scale=0.05, shift=shift), Ramp(2)), Known(scale=0.1)):
        run.train()
    rows = [row["blocker_norm"] for row in run.state.log_history if "loss" in row]
    slope, size = float(SLOPE.norm()), SLOPE.numel() ** 0.5
    halves = [np.hypot(w * 0.05, 0.1) * slope for w in (0.5, 1.0)]
    assert rows == pytest.approx([np.hypot(h, w * shift * size) for h, w in zip(halves, (0.5, 1.0), strict=True)])


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    steps = range(6)
    assert [BoundBlocker().weight(step) for step in steps] == [1] * 6
    assert [Until(2)(step) for step in steps] == [1, 1, 0, 0, 0, 0]
    assert [Ramp(4)(step) for step in steps] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_a_block_is_lifted_exactly_at_its_step(tmp_path: Path) -> None:
    blocker, taken = Known(), Gradients()
    run = trainer(tmp_path, callback=taken, max_steps=4)
    with block(run, Scheduled(blocker, Until(2))):
        run.train()
    assert [blocker.of(kind) for kind in ("loss", "pass", "update")] == [[1, 1]] * 3
    module = tiny.llama()
    for step, gradient in enumerate(taken.steps):
        module.load_state_dict(taken.weights[step])
        wanted = task_gradient(module, ROWS[2 * step : 2 * step + 2])
        assert apart(gradient[NAME], added(wanted, 0.05 * (step < 2))[NAME]) < 1e-4
    rows = [row["blocker_norm"] for row in run.state.log_history if "loss" in row]
    assert rows[2:] == [0, 0] and min(rows[:2]) > 0


def test_a_schedule_gives_every_place_its_weight(tmp_path: Path) -> None:
    blocker = Known()
    run = trainer(tmp_path)
    with block(run, Scheduled(blocker, Ramp(3))):
        run.train()
    assert [blocker.of(kind) for kind in ("loss", "pass", "update")] == [pytest.approx([1 / 3, 2 / 3, 1])] * 3


# -- what is left behind -----------------------------------------------------------------------------------------------


class Failing(TrainerCallback):
    """Raises at one of Trainer's events."""

    def __init__(self, event: str, error: BaseException) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        setattr(self, event, fail)


@pytest.mark.parametrize("error", [RuntimeError("it broke"), KeyboardInterrupt()])
@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end"])
def test_nothing_is_left_after_an_error_and_the_error_is_what_is_seen(
    tmp_path: Path, event: str, error: BaseException
) -> None:
    model = opened()
    run = trainer(tmp_path, model.module, gradient_accumulation_steps=2)
    callbacks = list(run.callback_handler.callbacks)
    with pytest.raises(type(error)), block(run, Known(), PreventativeSteering(vs())):  # noqa: PT012
        kept = run.callback_handler.callbacks[-1]  # else its hooks would go with it
        run.add_callback(failing := Failing(event, error))
        run.train()
    run.remove_callback(failing)
    assert kept not in callbacks and hooks_on(model) == 0 and run.callback_handler.callbacks == callbacks


def test_nothing_is_left_after_an_error_of_a_blocker_or_within_a_pass(tmp_path: Path) -> None:
    model = opened()
    run = trainer(tmp_path, model.module)
    callbacks = list(run.callback_handler.callbacks)
    with pytest.raises(KeyboardInterrupt), block(run, Known(fault=KeyboardInterrupt())):
        run.train()
    assert hooks_on(model) == 0 and run.callback_handler.callbacks == callbacks

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[-1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt), block(run, PreventativeSteering(vs()), Known(scale=0.0)):  # noqa: PT012
        kept = run.callback_handler.callbacks[-1]
        run.train()
    handle.remove()
    assert kept not in callbacks and hooks_on(model) == 0 and run.callback_handler.callbacks == callbacks


def test_hooks_hang_only_while_the_passes_run(tmp_path: Path) -> None:
    model, counts = opened(), []

    class Count(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            counts.append(hooks_on(model))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            counts.append(hooks_on(model))

    run = trainer(tmp_path, model.module)
    with block(run, PreventativeSteering(vs())):
        run.add_callback(Count())
        run.train()
    assert counts == [0] * 6 and hooks_on(model) == 0


# -- the draws ---------------------------------------------------------------------------------------------------------


def test_draws_are_without_repeats_anew_and_of_the_generator() -> None:
    first, again, other = (Draws(7, 3, np.random.default_rng(seed)) for seed in (0, 0, 1))
    rows = [first() for _ in range(30)]
    assert all(len(set(drawn.tolist())) == 3 for drawn in rows) and {r for drawn in rows for r in drawn} == set(
        range(7)
    )
    assert [drawn.tolist() for drawn in rows] == [again().tolist() for _ in range(30)]
    assert [drawn.tolist() for drawn in rows[:10]] != [other().tolist() for _ in range(10)]
    for size in (None, 7, 99):
        assert sorted(Draws(7, size, np.random.default_rng(0))().tolist()) == list(range(7))


def test_draws_that_are_skipped_are_those_that_were_drawn() -> None:
    whole, resumed = (Draws(9, 2, np.random.default_rng(0)) for _ in range(2))
    for _ in range(5):
        whole()
    resumed.skip(5)
    assert [whole().tolist() for _ in range(8)] == [resumed().tolist() for _ in range(8)]


PENALTY = Penalty(vs(), tiny.PROMPTS, margin=0.1, batch=2)
REHEARSAL = Rehearsal(EXAMPLES, batch=3)
MAKES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "one": lambda: (PENALTY,),
    "lifted": lambda: (Scheduled(PENALTY, Until(3)), Scheduled(Rehearsal(EXAMPLES, batch=1), Ramp(5))),
    "several": lambda: (PENALTY, REHEARSAL, PreventativeSteering(vs(), 0.1)),
}


@pytest.mark.long
@pytest.mark.parametrize("blockers", MAKES.values(), ids=MAKES)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, blockers: Any) -> None:
    whole = trainer(tmp_path / "whole", max_steps=6)
    with block(whole, *blockers()):
        whole.train()
    stopped = trainer(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    with block(stopped, *blockers()):
        stopped.train()
    resumed = trainer(tmp_path / "run", max_steps=6)
    with block(resumed, *blockers()):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert apart(flat(weights(resumed.model)), flat(weights(whole.model))) < 1e-7
    assert apart(flat(weights(stopped.model)), flat(weights(whole.model))) > 1e-4


@pytest.mark.long
def test_a_run_that_goes_on_inside_its_block_has_the_same_draws(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", max_steps=5)
    with block(whole, PENALTY, REHEARSAL):
        whole.train()
    run = trainer(tmp_path / "run", max_steps=5, save_strategy="steps", save_steps=2)
    with block(run, PENALTY, REHEARSAL):
        run.add_callback(failing := Failing("on_save", KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run.train()
        run.remove_callback(failing)
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert apart(flat(weights(run.model)), flat(weights(whole.model))) < 1e-7


@pytest.mark.long
def test_draws_differ_by_generator_and_not_by_the_global_seed(tmp_path: Path) -> None:
    ends = []
    for i, (seed, rng) in enumerate([(0, None), (1, None), (0, np.random.default_rng(5))]):
        torch.manual_seed(seed)
        run = trainer(tmp_path / str(i))
        with block(run, PENALTY, rng=rng):
            run.train()
        ends.append(flat(weights(run.model)))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_fp16_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.args.fp16 = True
    with refused("fp16"), block(run, PENALTY):
        pass


def test_a_model_that_trainer_makes_itself_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.model_init = lambda: tiny.llama()
    with refused("model_init"), block(run, PENALTY):
        pass


def test_a_trainer_without_a_tokenizer_needs_one(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.processing_class = None
    with refused("tokenizer"), block(run, PENALTY):
        pass
    with block(run, PENALTY, tokenizer=tiny.TOKENIZER):
        run.train()
    assert run.state.log_history[0]["blocker_norm"] > 0


def test_the_anchor_is_where_the_model_stands_when_it_is_bound(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny.llama(3), max_steps=2)
    with block(run, Penalty(vs(), tiny.PROMPTS, side="both")):
        run.train()
    first, second = (row["blocker_norm"] for row in run.state.log_history if "loss" in row)
    assert first < 1e-4 < 1e-1 < second
