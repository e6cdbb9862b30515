"""Blocking: how something takes part in the steps of a Hugging Face `Trainer`, and `block`, which lets it.

A `Blocker` is a frozen description. It is bound once, while the model still stands at its start (the anchor), and then
takes part in each optimizer step at up to three places: a loss whose gradient is added to the task's, a change of the
forward and backward passes, a change of the weights after the update. Everything goes through Trainer's callbacks, so
TRL's `SFTTrainer` is blocked in the same way, with LoRA, gradient accumulation and checkpointing.
"""

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from gravlens.core.errors import GravlensError
from gravlens.models.opening import OpenModel, open_model

Schedule: TypeAlias = Callable[[int], float]


def always(_step: int) -> float:
    """Weight 1 at every step."""
    return 1.0


@dataclass(frozen=True)
class Until:
    """Weight 1 before a step, 0 from it on: the block is lifted there (the release test).

    Attributes:
        step: the first optimizer step without the block, counted from 0.
    """

    step: int

    def __call__(self, step: int) -> float:
        return float(step < self.step)


@dataclass(frozen=True)
class Ramp:
    """Weight from 1/steps up to 1.

    Attributes:
        steps: optimizer steps that it takes.
    """

    steps: int

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True, eq=False)
class BoundBlocker:
    """Where a blocker takes part in an optimizer step; what is None it leaves alone.

    Attributes:
        loss: weight -> a loss, differentiable in the parameters; its gradient is added to the task's before clipping.
        during: weight -> a context in which the step's forward and backward passes run.
        after_update: weight -> the norm of what it has changed in the weights, which the optimizer has just updated.
        weight: step (from 0) -> weight; at 0 the blocker is left out of that step.
        skip: puts the random draws to where so many steps lead, when a run begins or goes on.
    """

    loss: Callable[[float], Float[Tensor, ""]] | None = None
    during: Callable[[float], AbstractContextManager[Any]] | None = None
    after_update: Callable[[float], float] | None = None
    weight: Schedule = always
    skip: Callable[[int], None] | None = None


class Blocker(Protocol):
    """The description of a blocker."""

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Take what is needed from the model at its start (the anchor)."""
        ...


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A blocker whose weight goes by the step: `Scheduled(Penalty(vs, probes), Until(50))`.

    Attributes:
        blocker: any.
        schedule: step -> weight, such as `Until` or `Ramp`.
    """

    blocker: Blocker
    schedule: Schedule

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Bind the blocker."""
        return replace(self.blocker.bind(model, rng=rng), weight=self.schedule)


class Draws:
    """Rows of probes, drawn anew at each step; all of them where no fewer are asked for."""

    def __init__(self, n: int, size: int | None, rng: np.random.Generator) -> None:
        self.n, self.size, self.rng = n, n if size is None else min(size, n), rng
        self.start = copy.deepcopy(rng)

    def __call__(self) -> Int[np.ndarray, " draw"]:
        """The next rows."""
        return self.rng.choice(self.n, size=self.size, replace=False)

    def skip(self, steps: int) -> None:
        """Stand where so many draws from the beginning lead."""
        self.rng = copy.deepcopy(self.start)
        for _ in range(steps):
            self()


@contextmanager
def block(
    trainer: Trainer, *blockers: Blocker, tokenizer: Any | None = None, rng: np.random.Generator | None = None
) -> Generator[None]:
    """Let blockers take part in a trainer's steps: `with block(trainer, Penalty(vs, probes)): trainer.train()`.

    They are bound here, where the trainer's model is the anchor; a run that is resumed from Trainer's own checkpoint
    inside the block goes on with the same draws. The norm of what they add stands in the trainer's log as
    `blocker_norm`. Whatever was hooked is gone when the block is left, however it is left.

    Args:
        trainer: a Hugging Face `Trainer` or TRL's `SFTTrainer`, not yet trained.
        blockers: any number of them.
        tokenizer: default: the trainer's `processing_class`.
        rng: of the draws; default: seeded with 0.

    Raises:
        GravlensError: fp16, whose scaled gradients a blocker's would not match; what binding raises.
    """
    if trainer.args.fp16:
        raise GravlensError(
            "The trainer trains in fp16.", "Its gradients are scaled and a blocker's are not.", "bf16=True, or fp32."
        )
    if trainer.model is None or trainer.model_init is not None:
        raise GravlensError(
            "The trainer makes another model itself (model_init).",
            "Blockers are bound to the anchor.",
            "Trainer(model=…).",
        )
    model = open_model(trainer.model, tokenizer=tokenizer or trainer.processing_class)
    rng = np.random.default_rng(0) if rng is None else rng
    generators = [rng, *rng.spawn(max(0, len(blockers) - 1))]  # each has draws of its own, so each can be resumed
    bound = [one.bind(model, rng=own) for one, own in zip(blockers, generators, strict=False)]
    callback = _Blocking(bound)
    trainer.add_callback(callback)
    try:
        with callback.hooks:  # an error on the way is handed on to what is still hooked
            yield
    finally:
        trainer.remove_callback(callback)


class _Blocking(TrainerCallback):
    """Bound blockers at work. A gradient is added at a step's beginning, when the last step's is gone already."""

    def __init__(self, bound: Sequence[BoundBlocker]) -> None:
        self.bound, self.hooks, self.norm = bound, ExitStack(), 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for one in self.bound:
            if one.skip is not None:
                one.skip(sum(one.weight(step) > 0 for step in range(state.global_step)))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.hooks.close()
        self.weights = [one.weight(state.global_step) for one in self.bound]
        norms = [0.0]
        for one, weight in zip(self.bound, self.weights, strict=True):
            if one.loss is not None and weight > 0:
                norms.append(_add_gradient(one.loss(weight), model))
        self.norm = float(np.linalg.norm(norms))
        for one, weight in zip(self.bound, self.weights, strict=True):
            if one.during is not None and weight > 0:
                self.hooks.enter_context(one.during(weight))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.hooks.close()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for one, weight in zip(self.bound, self.weights, strict=True):
            if one.after_update is not None and weight > 0:
                self.norm = float(np.hypot(self.norm, one.after_update(weight)))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if "loss" in state.log_history[-1]:  # Trainer has just appended it
            state.log_history[-1]["blocker_norm"] = self.norm


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _add_gradient(loss: Tensor, model: nn.Module) -> float:
    """Add the loss's gradient to `.grad` and return its norm."""
    parameters = trained(model)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    total = 0.0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:  # pyright: ignore[reportUnnecessaryComparison] (allow_unused)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            total += float(gradient.square().sum())
    return total**0.5


@contextmanager
def without_dropout(module: nn.Module) -> Generator[None]:
    """The anchor was read without: with it, motion would be noise where the model has not moved."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
