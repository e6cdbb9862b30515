"""Hyperparameters of a fine-tuning run, importable without the training machinery."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


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
    """

    steps: int = 100
    batch: int = 4
    learning_rate: float = 7e-5  # AdamW's first step moves every weight by about this much
    weight_decay: float = 0.01
    beta2: float = 0.999
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    bf16: bool = False
    freeze_embeddings: bool = False
    accumulation: int = 1
    gradient_checkpointing: bool = False
    lora: int | None = None

    def saved_steps(self, asked: Iterable[int]) -> tuple[int, ...]:
        """Return the requested steps that a run reaches, in order, and always its last."""
        return tuple(sorted({*(step for step in asked if 0 < step < self.steps), self.steps}))
