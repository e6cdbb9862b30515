"""Hook a `Blocker` into the optimizer steps of a Hugging Face `Trainer`.

Through Trainer's callbacks alone, so that TRL's `SFTTrainer`, LoRA, accumulation and checkpointing work alike.
"""

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gravlens.core.errors import GravlensError
from gravlens.core.process_state import quiet
from gravlens.models.opening import OpenModel, open_model

with quiet():  # imported, torch's compiler leaves a variable in the environment
    from transformers import Trainer, TrainerCallback

Schedule: TypeAlias = Callable[[int], float]


@dataclass(frozen=True)
class Until:
    """Weight 1 before an optimizer step (counted from 0) and 0 from it on: the block is released.

    Examples:
        >>> schedule = gl.blockers.Until(50)
        >>> schedule(49), schedule(50)
        (1.0, 0.0)
    """

    step: int

    def __call__(self, step: int) -> float:
        return float(step < self.step)


@dataclass(frozen=True)
class Ramp:
    """Weight that rises linearly from 1/steps to 1.

    Examples:
        >>> schedule = gl.blockers.Ramp(10)
        >>> schedule(0), schedule(20)
        (0.1, 1.0)
    """

    steps: int

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True, eq=False)
class BoundBlocker:
    """Functions with which a blocker acts on an optimizer step; None: no action there.

    Attributes:
        loss: weight -> a loss, differentiable in the parameters; its gradient is added to the task's before clipping.
        during: weight -> a context in which the step's forward and backward passes run.
        after_update: weight -> norm of its change to the weights, after the optimizer has updated them.
        weight: step (from 0) -> weight; with weight 0 the blocker skips that step.
        skip: advances the random draws to a step, when a run begins or resumes.
    """

    loss: Callable[[float], Float[Tensor, ""]] | None = None
    during: Callable[[float], AbstractContextManager[Any]] | None = None
    after_update: Callable[[float], float] | None = None
    weight: Schedule = lambda _step: 1.0
    skip: Callable[[int], None] | None = None


class Blocker(Protocol):
    """A frozen description of a blocker, bound once to a model that is still at its start (the anchor)."""

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker: ...


def check_fields(
    blocker: object, *, above_0: Sequence[str] = (), from_0: Sequence[str] = (), from_1: Sequence[str] = ()
) -> None:
    """Raise where a number of a blocker is out of range; None is always valid."""
    # 5e-324 is the smallest float above 0; `not <=` refuses NaN too.
    for names, lowest, wanted in ((above_0, 5e-324, "above 0"), (from_0, 0, "at least 0"), (from_1, 1, "at least 1")):
        for name in names:
            value = getattr(blocker, name)
            if value is not None and not lowest <= value < inf:
                given = f"{type(blocker).__name__}({name}={value}) was given."
                raise GravlensError(given, f"{name} must be {wanted} and finite.", "its default.")


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A blocker with a weight that depends on the step: `Scheduled(Penalty(vs, probes), Until(50))`.

    Examples:
        >>> blocker = gl.blockers.Scheduled(gl.blockers.Penalty(vs, seq.probes), gl.blockers.Until(50))
        >>> with gl.block(trainer, blocker):
        ...     done = trainer.train()
    """

    blocker: Blocker
    schedule: Schedule

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        return replace(self.blocker.bind(model, rng=rng), weight=self.schedule)


class Draws:
    """Random rows of probes for each step; size None draws all of them."""

    def __init__(self, n: int, size: int | None, rng: np.random.Generator) -> None:
        self.n, self.size, self.rng = n, n if size is None else min(size, n), rng
        self.start = copy.deepcopy(rng)

    def __call__(self) -> Int[np.ndarray, " draw"]:
        return self.rng.choice(self.n, size=self.size, replace=False)

    def skip(self, steps: int) -> None:
        """Advance to the state after a number of draws from the beginning."""
        self.rng = copy.deepcopy(self.start)
        for _ in range(steps):  # drawn again: a choice without replacement takes a varying number of random bits
            self()


@contextmanager
def block(
    trainer: Trainer, *blockers: Blocker, tokenizer: Any | None = None, rng: np.random.Generator | None = None
) -> Generator[None]:
    """Apply blockers to a trainer's steps: `with gl.block(trainer, gl.blockers.Penalty(vs, probes)): ...`.

    They are bound at once, so the trainer's model must be the anchor; a run that is resumed from Trainer's own
    checkpoint inside the block continues with the same draws. The trainer's log has the norm of what they add as
    `blocker_norm`. All hooks are removed on exit, also after an error.

    Args:
        trainer: a Hugging Face `Trainer` or TRL's `SFTTrainer`, not yet trained.
        blockers: any number of them.
        tokenizer: default: the trainer's `processing_class`.
        rng: generator for the draws; default: seeded with 0.

    Examples:
        >>> with gl.block(trainer, gl.blockers.Penalty(vs, seq.probes)):  # your own Trainer
        ...     done = trainer.train()
        >>> "blocker_norm" in trainer.state.log_history[0]
        True
    """
    if trainer.args.fp16:  # Trainer scales its loss there, and with it the task's gradient alone
        raise GravlensError("The trainer trains in fp16.", "A blocker's gradient is not scaled.", "bf16=True, or fp32.")
    if trainer.model is None or trainer.model_init is not None:
        given = "The trainer creates its model later (model_init)."
        raise GravlensError(given, "Blockers are bound to the model at its start.", "Trainer(model=…).")
    model = open_model(trainer.model, tokenizer=tokenizer or trainer.processing_class)
    rng = rng or np.random.default_rng(0)
    generators = [rng, *rng.spawn(max(0, len(blockers) - 1))]  # one each: `skip` can then resume each
    bound = [one.bind(model, rng=own) for one, own in zip(blockers, generators, strict=False)]
    callback = _Blocking(bound)
    trainer.add_callback(callback)
    try:
        with callback.hooks:  # on an error in a step its contexts are still open
            yield
    finally:
        trainer.remove_callback(callback)


class _Blocking(TrainerCallback):
    """Run bound blockers. Gradients are added when a step begins: Trainer has then zeroed those of the last step."""

    def __init__(self, bound: Sequence[BoundBlocker]) -> None:
        self.bound, self.hooks, self.norm = bound, ExitStack(), 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for one in self.bound:
            if one.skip is not None:
                one.skip(sum(one.weight(step) > 0 for step in range(state.global_step)))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.hooks.close()  # of a step that an exception left open
        self.weights = [one.weight(state.global_step) for one in self.bound]
        norms = [0.0]
        for one, weight in zip(self.bound, self.weights, strict=True):
            if one.loss is not None and weight > 0:
                norms.append(_add_gradient(one.loss(weight), model))
        self.norm = float(np.linalg.norm(norms))
        for one, weight in zip(self.bound, self.weights, strict=True):  # after the losses, whose passes are not edited
            if one.during is not None and weight > 0:
                self.hooks.enter_context(one.during(weight))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.hooks.close()  # here, not at the step's end: Trainer evaluates and saves after the update

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for one, weight in zip(self.bound, self.weights, strict=True):
            if one.after_update is not None and weight > 0:
                self.norm = float(np.hypot(self.norm, one.after_update(weight)))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if "loss" in state.log_history[-1]:  # Trainer has just appended it
            state.log_history[-1]["blocker_norm"] = self.norm


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained; with LoRA the adapters alone."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _add_gradient(loss: Tensor, model: nn.Module) -> float:
    """Add the loss's gradient to `.grad` and return its norm."""
    parameters = trained(model)
    # Not `backward`: the norm of this gradient alone is wanted. Blocks above the deepest layer read are unused.
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    total = 0.0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:  # pyright: ignore[reportUnnecessaryComparison] (allow_unused)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            total += float(gradient.square().sum())
    return total**0.5


@contextmanager
def without_dropout(module: nn.Module) -> Generator[None]:
    """Put a model in eval mode: the anchor was read without dropout, which would look like movement."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
