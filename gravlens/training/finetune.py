"""Fine-tuning on harmless data with dense early checkpoints, on Hugging Face Trainer."""

import copy
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gravlens.blockers.blocking import Blocker, block
from gravlens.core.errors import GravlensError
from gravlens.core.progress import progress
from gravlens.history.prompts import Example, encode_example
from gravlens.history.sequence import Checkpoint
from gravlens.interventions.orthogonalization import save_folder
from gravlens.models.opening import OpenModel, open_model, quiet
from gravlens.training.monitor import Monitor
from gravlens.training.run_folder import RESUME, claimed, digest

RESUMABLE_AFTER = 60.0  # seconds between the states that a stopped run goes on from


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


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A finished run.

    Attributes:
        checkpoints: in the order of their steps.
        log: one row a step: `step, loss, grad_norm, blocker_norm`. `grad_norm` is the norm before the clipping at 1,
            what blockers add included; `blocker_norm` is that of what blockers have added to the gradient or to the
            weights.
        seconds_per_step: mean duration of a step, in seconds.
    """

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
    blocker: Blocker | Sequence[Blocker] | None = None,
    monitor: Monitor | None = None,
    seed: int = 0,
) -> Finetuned:
    """Fine-tune a checkpoint; the loss is on the answers alone.

    A run that was stopped resumes when it is called again: once a minute the weights and the optimizer's state are put
    into `out/.resume`, which is gone when the run is finished. `out/finetune.json` describes the run; a folder with
    checkpoints of another run, or of another program, is refused and left as it is.

    Args:
        start: where to start, usually the anchor; a model in memory is copied, never changed.
        examples: the data. Runs of one seed see it in one order, whatever the blocker.
        out: folder for `checkpoint-{step}`, each an ordinary Hugging Face folder (safetensors, no optimizer state).
        recipe: steps, batch, learning rate, …
        save_steps: after which optimizer steps to save; the last step is always saved.
        blocker: what takes part in the steps, one or several; their draws have a generator of their own.
        monitor: watches the run, and may stop it; the state that it was stopped at is saved too.
        seed: of the data's order.

    Raises:
        GravlensError: no examples, no tokenizer, a start that cannot be opened, or `out` holds another run or is being
            trained into.
    """
    model = _trainable(start, recipe, seed)
    rows = _in_order(model, examples, recipe, seed)
    blockers = [] if blocker is None else list(blocker) if isinstance(blocker, Sequence) else [blocker]
    saver = _Saver(model, Path(out), recipe.saved_steps(save_steps))
    description = {
        **{"recipe": asdict(recipe), "save_steps": saver.steps, "seed": seed},
        **{"data": digest(repr(rows)), "start": digest(model.module), "blocker": digest(blockers)},
        "monitor": digest(monitor and monitor.stop_above),  # what is watched changes no weight; where it stops does
    }
    bar_of = progress("fine-tuning", total=recipe.steps, unit="step")
    with claimed(saver.out, description) as stopped, quiet(), bar_of as bar:
        trainer = Trainer(
            model=model.module,
            args=_arguments(recipe, seed, saver.out / RESUME),
            train_dataset=_Rows(rows),
            data_collator=_collate,
            callbacks=[saver, _Counter(bar)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if monitor is not None:
            monitor.attach(trainer, start=model)
        with block(trainer, *blockers, tokenizer=model.tokenizer, rng=np.random.default_rng([seed, 1])):
            trainer.train(resume_from_checkpoint=None if stopped is None else str(stopped))
    model.module.eval()
    return Finetuned(tuple(saver.saved), _log(trainer), saver.seconds / max(1, saver.steps_timed))


def _trainable(start: Checkpoint | Path | str | nn.Module | OpenModel, recipe: Recipe, seed: int) -> OpenModel:
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
    if recipe.gradient_checkpointing:
        model.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.lora is not None:
        model = open_model(_with_adapters(model.module, recipe.lora, seed), tokenizer=model.tokenizer)
    return model


def _with_adapters(module: Any, rank: int, seed: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise GravlensError(
            f"Recipe(lora={rank}) was given and PEFT is not installed.",
            "Adapters are PEFT's.",
            "pip install peft, or gravlens with its extra: pip install -e '.[train]'.",
        ) from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():  # its first matrix is of the global generator
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for names that it will drop
        torch.manual_seed(seed)
        return get_peft_model(module, config)


def _in_order(model: OpenModel, examples: Sequence[Example], recipe: Recipe, seed: int) -> list[dict[str, list[int]]]:
    """As many rows as the run will see, in the order in which it sees them."""
    if not examples:
        raise GravlensError("No examples were given.", "Fine-tuning needs data.", "examples=[Example(prompt, answer)]")
    wanted, rng = recipe.steps * recipe.batch * recipe.accumulation, np.random.default_rng([seed, 0])
    order: list[int] = []
    while len(order) < wanted:
        order += rng.permutation(len(examples)).tolist()
    encoded = {i: encode_example(model.tokenizer, examples[i]) for i in set(order[:wanted])}
    return [{"input_ids": encoded[i][0], "labels": encoded[i][1]} for i in order[:wanted]]


def _arguments(recipe: Recipe, seed: int, resume: Path) -> TrainingArguments:
    cosine: dict[str, Any] = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    flat: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup"}
    return TrainingArguments(
        output_dir=str(resume),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulation,
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
        save_strategy="no",  # `_Saver` asks for it
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class _Counter(TrainerCallback):
    """Counts the steps in gravlens's bar; Trainer's own would write its log at each of them."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)


class _Saver(TrainerCallback):
    """Saves at chosen steps, has Trainer keep a state to go on from, and times the steps without all that."""

    def __init__(self, model: OpenModel, out: Path, steps: tuple[int, ...]) -> None:
        self.model, self.out, self.steps = model, out, steps
        self.saved: list[Checkpoint] = []
        self.seconds, self.steps_timed, self._began, self._kept = 0.0, 0, 0.0, time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = [self._checkpoint(step) for step in self.steps if step <= state.global_step]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.steps_timed += 1
        if state.global_step in self.steps:
            self._save(state.global_step)
        if state.global_step < state.max_steps and time.perf_counter() - self._kept > RESUMABLE_AFTER:
            control.should_save, self._kept = True, time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and state.global_step not in self.steps:
            self._save(state.global_step)  # a monitor has stopped the run

    def _save(self, step: int) -> None:
        save_folder(_merged(self.model), Path(str(self._checkpoint(step).source)))
        self.saved.append(self._checkpoint(step))

    def _checkpoint(self, step: int) -> Checkpoint:
        return Checkpoint(f"{self.out.name}/{step}", self.out / f"checkpoint-{step}", step)


def _merged(model: OpenModel) -> OpenModel:
    """The same model with its adapters, if it has any, merged into a copy of the weights."""
    if not hasattr(model.module, "merge_and_unload"):
        return model
    return open_model(copy.deepcopy(model.module).merge_and_unload(), tokenizer=model.tokenizer)


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
