"""Hyperparameters of a fine-tuning run, importable without the training machinery."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from gravlens.core.errors import GravlensError

WHOLE = {"steps": 1, "batch": 1, "accumulation": 1, "warmup_steps": 0, "lora": 1}  # field -> the least it may be
Schedule = Literal["constant", "cosine"]
SWITCHES = ("bf16", "freeze_embeddings", "gradient_checkpointing")


@dataclass(frozen=True)
class Recipe:
    """How to train with AdamW, the gradient's norm clipped at 1; fields as in `TrainingArguments`.

    Attributes:
        batch: examples per pass; a step sees `batch` · `accumulation`.
        warmup_steps: steps in which the rate rises from 0; the first update is then empty.
        schedule: `constant` after the warm-up, or `cosine`, down to 10 %.
        bf16: the task's pass in autocast; weights, and the passes of a blocker, stay fp32.
        freeze_embeddings: train all but the token embeddings and the unembedding.
        accumulation: passes per optimizer step.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
        lora: rank of adapters on all linear layers (PEFT, alpha twice the rank); None trains all weights.

    Examples:
        >>> gl.Recipe(steps=4, batch=2, learning_rate=1e-4, schedule="cosine").steps
        4
    """

    steps: int = 100
    batch: int = 4
    learning_rate: float = 7e-5  # AdamW's first step moves every weight by about this much
    weight_decay: float = 0.01
    beta2: float = 0.999
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    bf16: bool = False
    freeze_embeddings: bool = False
    accumulation: int = 1
    gradient_checkpointing: bool = False
    lora: int | None = None

    def __post_init__(self) -> None:
        for name, least in WHOLE.items():
            if not (is_whole(getattr(self, name), least) or (name == "lora" and self.lora is None)):
                raise self._wrong(name, f"a whole number from {least}{' or None' * (name == 'lora')}")
        for name, below in {"learning_rate": math.inf, "weight_decay": math.inf, "beta2": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < below:  # NaN too
                raise self._wrong(name, f"a number from 0{' to 1, without 1' if below == 1 else ', and finite'}")
        if self.schedule not in get_args(Schedule):
            raise self._wrong("schedule", " or ".join(map(repr, get_args(Schedule))))
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise self._wrong(name, "True or False")

    def _wrong(self, name: str, wanted: str) -> GravlensError:
        remedy = f"its default, {getattr(type(self), name)!r}."
        return GravlensError(f"Recipe({name}={getattr(self, name)!r}) was given.", f"{name} is {wanted}.", remedy)

    def saved_steps(self, asked: Iterable[int]) -> tuple[int, ...]:
        """Return the requested steps that a run reaches, in order, and always its last.

        Raises:
            GravlensError: steps that are no whole numbers from 1, or none of which a run reaches.
        """
        asked = [*asked]
        wrong = [step for step in asked if not is_whole(step, 1)]
        if wrong or (asked and min(asked) > self.steps):
            given = f"save_steps={tuple(asked)!r} was given, and the run has {self.steps} steps."
            wanted = "Steps are whole numbers from 1, and at least one of them is reached."
            raise GravlensError(given, wanted, f"save_steps=({self.steps},), or () for the last step alone.")
        return tuple(sorted({*(int(step) for step in asked if step < self.steps), self.steps}))


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number (True and 1.0 are none) from `least` on."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
