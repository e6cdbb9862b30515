"""Hyperparameters of a fine-tuning run, importable without the training machinery."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """How to train: a small part of `TrainingArguments`, under their meaning there.

    The optimizer is AdamW with the gradient's norm clipped at 1. Checkpoints are saved merged.

    Attributes:
        steps: optimizer steps.
        batch: examples of a pass; a step sees `batch` · `accumulation`.
        learning_rate: its strength after the warm-up; AdamW's first step is about as long in every weight.
        weight_decay: AdamW's λ.
        beta2: AdamW's β_2.
        warmup_steps: steps in which the rate rises from 0; the first update is then empty.
        schedule: `constant` after the warm-up, or `cosine`, down to 10 %.
        bf16: the task's pass in autocast; weights, and the passes of a blocker, stay fp32.
        freeze_embeddings: train all but the token embeddings and the unembedding.
        accumulation: passes whose gradients make one step.
        gradient_checkpointing: compute activations again in the backward pass, for less memory.
        lora: rank of adapters on all linear layers (PEFT, alpha twice the rank); None trains all weights.
    """

    steps: int = 100
    batch: int = 4
    learning_rate: float = 7e-5
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
        """Return the steps of `asked` that a run reaches, in order, and always its last."""
        return tuple(sorted({*(step for step in asked if 0 < step < self.steps), self.steps}))
