"""What the tests of blockers share: tiny models that move, directions, and a Trainer of a few steps."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode_example, pad
from gravlens.models.opening import OpenModel, open_model
from gravlens.organisms import refusal_language as language

LENGTHS = {0: 0.7, 1: 2.5}
EXAMPLES = language.finetuning_examples(12, rng=np.random.default_rng(0))
ROWS = [encode_example(tiny.TOKENIZER, example) for example in EXAMPLES]  # ids, labels


def vs(seed: int = 0, layers: Sequence[int] = (0, 1)) -> Directions:
    """A random direction for each of two layers, at different distances."""
    rng = np.random.default_rng(seed)
    drawn = {layer: rng.standard_normal(tiny.WIDTH) for layer in LENGTHS}
    return Directions(tuple(direction_from(drawn[k], layer=k, distance=LENGTHS[k]) for k in layers))


def opened(seed: int = 0) -> OpenModel:
    return open_model(tiny.llama(seed), tokenizer=tiny.TOKENIZER)


def move(module: nn.Module, scale: float = 0.02, seed: int = 1) -> None:
    """Change every weight a little, in place, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight += (scale * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def collate(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    ids, labels = (pad([row[part] for row in rows], pad_id=fill) for part, fill in ((0, 0), (1, -100)))
    return {"input_ids": ids.input_ids, "attention_mask": ids.attention_mask, "labels": labels.input_ids}


def trainer(out: Path, module: Any = None, *, callback: TrainerCallback | None = None, **changes: Any) -> Trainer:
    """Three steps of two examples each, in the order of `ROWS`; the gradient is not clipped."""
    arguments = {
        "output_dir": str(out),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    rows: Any = ROWS
    return Trainer(
        model=tiny.llama() if module is None else module,
        args=TrainingArguments(**{**arguments, **changes}),
        train_dataset=rows,
        data_collator=collate,
        processing_class=tiny.TOKENIZER,
        callbacks=[] if callback is None else [callback],
    )


class Gradients(TrainerCallback):
    """Keeps what each optimizer step is made of: name -> gradient, and the weights before it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        self.weights.append(weights(model))


def task_gradient(module: Any, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Of the mean of −log p over all answer tokens, each example alone, in fp64."""
    twin = copy.deepcopy(module).double()
    told = [one for ids, labels in rows for one in token_logprobs(twin, ids, labels)]
    (-torch.stack(told).mean()).backward()
    return {name: weight.grad for name, weight in twin.named_parameters()}


def token_logprobs(module: Any, ids: list[int], labels: list[int]) -> list[torch.Tensor]:
    """log p of each answer token of one example, by Hugging Face's own logits."""
    logprobs = module(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logprobs[i - 1, label] for i, label in enumerate(labels) if label != -100]


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far one vector is from another, as a share of its length."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
