"""Fine-tuning on harmless data with dense early checkpoints, on Hugging Face Trainer."""

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gravlens.blocking import Blocker, BoundBlocker
from gravlens.checkpoints import Checkpoint
from gravlens.errors import GravlensError
from gravlens.models import OpenModel, open_model, quiet
from gravlens.prompts import Example, encode_example


@dataclass(frozen=True)
class Recipe:
    """How to train: a small part of `TrainingArguments`, under their meaning there.

    The optimizer is AdamW with the gradient's norm clipped at 1; `schedule` is flat after the warm-up, or a cosine down
    to 10 %. With `bf16` the task's pass runs in autocast; weights, and the passes of a blocker, stay fp32.
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


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A finished run: its checkpoints, and one row a step of `step, loss, grad_norm, blocker_norm` (in `log`)."""

    checkpoints: tuple[Checkpoint, ...]
    log: pd.DataFrame
    seconds_per_step: float


def finetune(
    start: Checkpoint | Path | str | nn.Module | OpenModel,
    examples: Sequence[Example],
    *,
    out: Path | str,
    recipe: Recipe = Recipe(),
    save_steps: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    blocker: Blocker | None = None,
    seed: int = 0,
) -> Finetuned:
    """Fine-tune a checkpoint; the loss is on the answers alone.

    Args:
        start: where to start, usually the anchor; a model in memory is copied, never changed.
        examples: the data. Runs of one seed see it in one order, whatever the blocker.
        out: folder for `checkpoint-{step}`, each an ordinary Hugging Face folder (safetensors, no optimizer state).
        recipe: steps, batch, learning rate, …
        save_steps: after which optimizer steps to save.
        blocker: what is added to the loss; its draws have a generator of their own.
        seed: of the data's order.

    Raises:
        GravlensError: no examples, no tokenizer, or a start that cannot be opened.
    """
    model = _trainable(start, recipe)
    rows = _in_order(model, examples, recipe, seed)
    bound = None if blocker is None else blocker.bind(model, rng=np.random.default_rng([seed, 1]))
    saver = _Saver(model, Path(out), frozenset(step for step in save_steps if step <= recipe.steps))
    with tempfile.TemporaryDirectory() as scratch, quiet():
        trainer = _BlockedTrainer(
            model=model.module,
            args=_arguments(recipe, seed, scratch),
            train_dataset=_Rows(rows),
            data_collator=_collate,
            callbacks=[saver],
        )
        trainer.bound = bound
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    model.module.eval()
    return Finetuned(tuple(saver.saved), _log(trainer), saver.seconds / recipe.steps)


def _trainable(start: Checkpoint | Path | str | nn.Module | OpenModel, recipe: Recipe) -> OpenModel:
    model = open_model(start)
    in_memory = isinstance(start, nn.Module | OpenModel) or isinstance(getattr(start, "source", None), nn.Module)
    if model.kind != "huggingface":
        raise GravlensError(
            f"A {type(model.module).__name__} was given to fine-tune.",
            "Hugging Face Trainer trains Hugging Face models.",
            "the folder that it was made from.",
        )
    if in_memory:
        model = open_model(copy.deepcopy(model.module), tokenizer=model.tokenizer)
    if recipe.freeze_embeddings:
        for embedding in (model.module.get_input_embeddings(), model.module.get_output_embeddings()):
            embedding.requires_grad_(False)
    return model


def _in_order(model: OpenModel, examples: Sequence[Example], recipe: Recipe, seed: int) -> list[dict[str, list[int]]]:
    """As many rows as the run will see, in the order in which it sees them."""
    if not examples:
        raise GravlensError("No examples were given.", "Fine-tuning needs data.", "examples=[Example(prompt, answer)]")
    wanted, rng = recipe.steps * recipe.batch, np.random.default_rng([seed, 0])
    order: list[int] = []
    while len(order) < wanted:
        order += rng.permutation(len(examples)).tolist()
    encoded = {i: encode_example(model.tokenizer, examples[i]) for i in set(order[:wanted])}
    return [{"input_ids": encoded[i][0], "labels": encoded[i][1]} for i in order[:wanted]]


def _arguments(recipe: Recipe, seed: int, scratch: str) -> TrainingArguments:
    cosine: dict[str, Any] = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    flat: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup"}
    return TrainingArguments(
        output_dir=scratch,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.beta2,
        max_grad_norm=1.0,
        warmup_steps=recipe.warmup_steps,
        **(cosine if recipe.schedule == "cosine" else flat),
        bf16=recipe.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class _BlockedTrainer(Trainer):
    """Trainer, with the gradient of a blocker's loss added to the task's before the clipping."""

    bound: BoundBlocker | None = None
    blocker_norm: float = 0.0

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if self.bound is not None:
            self.blocker_norm = _add_gradient(self.bound.loss() / self.current_gradient_accumulation_steps, model)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "blocker_norm": self.blocker_norm}, *args, **kwargs)


def _add_gradient(loss: Tensor, model: nn.Module) -> float:
    """Add the loss's gradient to `.grad` and return its norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    total = 0.0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            total += float(gradient.square().sum())
    return total**0.5


class _Saver(TrainerCallback):
    """Saves at chosen steps, and times the steps without the saving."""

    def __init__(self, model: OpenModel, out: Path, steps: frozenset[int]) -> None:
        self.model, self.out, self.steps = model, out, steps
        self.saved: list[Checkpoint] = []
        self.seconds, self._began = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        if state.global_step in self.steps:
            folder = save_folder(self.model, self.out / f"checkpoint-{state.global_step}")
            self.saved.append(Checkpoint(f"{self.out.name}/{state.global_step}", folder, state.global_step))


def save_folder(model: OpenModel, folder: Path) -> Path:
    """Save a model and its tokenizer as an ordinary Hugging Face folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    with quiet():
        model.module.save_pretrained(scratch)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    os.chmod(scratch, 0o755)
    os.replace(scratch, folder)
    return folder


class _Rows(Dataset[dict[str, list[int]]]):
    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Right-pad; the mask is made of the lengths, labels are −100 on the padding."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> Tensor:
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": torch.tensor(mask)}


def _log(trainer: Trainer) -> pd.DataFrame:
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return pd.DataFrame(rows)[["step", "loss", "grad_norm", "blocker_norm"]]
