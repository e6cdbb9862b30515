"""Fine-tuning on harmless data with dense early checkpoints, on Hugging Face Trainer."""

import copy
import threading
import time
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from gravlens.blockers.blocking import Blocker, block
from gravlens.core.display import brief
from gravlens.core.errors import GravlensError, at_home
from gravlens.core.files import checksums, writing
from gravlens.core.progress import progress
from gravlens.history.encoding import encode_example
from gravlens.history.prompts import Example
from gravlens.history.sequence import Checkpoint
from gravlens.models.families import check_context, copied
from gravlens.models.opening import OpenModel, open_model, quiet, save_folder
from gravlens.training.recipe import Recipe, is_whole
from gravlens.training.run_folder import RESUME, claimed, digest, saved_before, seal

with quiet():  # see blockers/blocking.py
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

RESUMABLE_AFTER = 60.0  # seconds between the states that a stopped run goes on from
_ALONE = threading.RLock()


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A finished run.

    Attributes:
        checkpoints: in the order of their steps.
        log: one row per step: `step`, `loss`, `grad_norm` (before the clipping at 1, including blockers' gradients) and
            `blocker_norm` (of what blockers added to the gradient or the weights).
        seconds_per_step: mean duration of a step, without saving.
    """

    checkpoints: tuple[Checkpoint, ...]
    log: pd.DataFrame
    seconds_per_step: float
    __repr__ = brief


def finetune(
    start: Checkpoint | Path | str | nn.Module | OpenModel,
    examples: Sequence[Example],
    *,
    out: Path | str,
    recipe: Recipe = Recipe(),
    save_steps: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    blocker: Blocker | Sequence[Blocker] | None = None,
    monitor: TrainerCallback | None = None,
    seed: int = 0,
) -> Finetuned:
    """Fine-tune a checkpoint; the loss is on the answers alone.

    A stopped run resumes when it is called again: once a minute the weights and the optimizer's state are saved in
    `out/.resume`, with checksums, and removed at the end; a damaged state is passed over with a warning. A run has the
    process's random generators to itself and leaves them as they were; a second thread waits for the first.
    `out/finetune.json` describes the run.

    Args:
        start: where to start, usually the anchor; a model in memory is copied, never changed.
        examples: the data. Runs of one seed see it in one order, whatever the blocker.
        out: folder for `checkpoint-{step}`, each an ordinary Hugging Face folder (safetensors, no optimizer state).
        recipe: steps, batch, learning rate, …
        save_steps: after which optimizer steps to save; the last step is always saved.
        blocker: one or several; their draws have generators of their own.
        monitor: a callback that may stop the run, such as a `Monitor`; the state at which it stops is saved too. In a
            resumed run it gets `on_train_begin` twice: at the start, and at the resumed state.
        seed: of the data's order; from 0 to 2³² − 1.

    Raises:
        GravlensError: no examples, no tokenizer, a start that cannot be opened or has hooks, or `out` holds another
            run, of gravlens or not, or another process trains into it. A run that diverges: what it saved before stays.

    Examples:
        >>> done = gl.finetune(seq.anchor, examples, out="ft/new", recipe=gl.Recipe(steps=2), save_steps=[1])
        >>> [one.step for one in done.checkpoints], len(done.log)
        ([1, 2], 2)
    """
    if not is_whole(seed, 0) or seed >= 2**32:
        raise GravlensError(f"seed={seed!r} was given.", "A seed is a whole number from 0 to 2**32 - 1.", "seed=0.")
    model = _trainable(start, recipe, seed)
    rows: Any = _in_order(model, examples, recipe, seed)  # a list: Trainer needs a length and items of its data set
    blockers = [] if blocker is None else list(blocker) if isinstance(blocker, Sequence) else [blocker]
    bar_of = progress("fine-tuning", total=recipe.steps, unit="step")
    saver = _Saver(model, at_home(out), recipe.saved_steps(save_steps))
    description = {
        **{"recipe": asdict(recipe), "save_steps": saver.steps, "seed": seed},
        **{"data": digest(repr(rows)), "start": digest(model.module), "blocker": digest(blockers)},
        "monitor": digest(getattr(monitor, "stop_above", None)),  # watching changes no weight, stopping does
    }
    with claimed(saver.out, description) as stopped, _alone(), bar_of as saver.bar:
        saver.checksums = {**saved_before(stopped)}
        trainer = _Trainer(
            model=model.module,
            args=_arguments(recipe, seed, saver.out / RESUME),
            train_dataset=rows,
            data_collator=_collate,
            callbacks=[saver, *([] if monitor is None else [monitor])],
        )
        # Callbacks get the tokenizer; Trainer(processing_class=) would also change the special tokens in the config.
        trainer.callback_handler.processing_class = model.tokenizer
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)  # it would print the log at each step
        if monitor is not None and stopped is not None:  # Trainer loads the stopped state before its own event
            given = {"model": model.module, "processing_class": model.tokenizer}
            monitor.on_train_begin(trainer.args, TrainerState(max_steps=recipe.steps), trainer.control, **given)
        with block(trainer, *blockers, tokenizer=model.tokenizer, rng=np.random.default_rng([seed, 1])):
            trainer.train(resume_from_checkpoint=None if stopped is None else str(stopped))
    model.module.eval()
    log = pd.DataFrame([row for row in trainer.state.log_history if "loss" in row])  # a monitor logs rows of its own
    log = log[["step", "loss", "grad_norm", "blocker_norm"]]
    return Finetuned(tuple(saver.saved), log, saver.seconds / max(1, saver.steps_timed))


@contextmanager
def _alone() -> Generator[None]:
    """Let one run at a time seed the generators and set accelerate's state, both of which the process shares."""
    if torch.cuda.is_available():
        torch.cuda.init()  # `quiet` restores the generators that are there when it begins
    # Other objects of accelerate hold these same dicts.
    kinds: Any = (AcceleratorState, PartialState, GradientState)
    shared = [kind._shared_state for kind in kinds]
    with _ALONE, quiet():
        before = [dict(state) for state in shared]
        try:
            yield
        finally:
            for state, found in zip(shared, before, strict=True):
                state.clear()
                state.update(found)


def _trainable(start: Checkpoint | Path | str | nn.Module | OpenModel, recipe: Recipe, seed: int) -> OpenModel:
    model = open_model(start)
    in_memory = isinstance(start, nn.Module | OpenModel) or isinstance(getattr(start, "source", None), nn.Module)
    if not model.family.own_tensors:
        given = f"A {type(model.module).__name__} was given to fine-tune."
        raise GravlensError(given, "A Hugging Face model is needed for Trainer.", "the folder that it was made from.")
    if in_memory:
        model = open_model(copied(model.module), tokenizer=model.tokenizer)
    if recipe.freeze_embeddings:
        for embedding in (model.module.get_input_embeddings(), model.module.get_output_embeddings()):
            embedding.requires_grad_(False)
    if recipe.gradient_checkpointing:
        # Reentrant checkpointing needs an input with a gradient, which frozen embeddings do not give.
        model.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.lora is not None:
        model = open_model(_with_adapters(model.module, recipe.lora, seed), tokenizer=model.tokenizer)
    return model


def _with_adapters(module: Any, rank: int, seed: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        given = f"Recipe(lora={rank}) was given and PEFT is not installed."
        raise GravlensError(given, "PEFT makes the adapters.", "pip install peft.") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with quiet(), warnings.catch_warnings():  # PEFT draws A from the global generator
        warnings.simplefilter("ignore", FutureWarning)  # PEFT imports names that transformers will drop
        torch.manual_seed(seed)
        return get_peft_model(module, config)


def _in_order(model: OpenModel, examples: Sequence[Example], recipe: Recipe, seed: int) -> list[dict[str, list[int]]]:
    """Encode as many rows as the run will see, in their order."""
    if not examples:
        raise GravlensError("No examples were given.", "Fine-tuning needs data.", "examples=[Example(prompt, answer)]")
    wanted, rng = recipe.steps * recipe.batch * recipe.accumulation, np.random.default_rng([seed, 0])
    order: list[int] = []
    while len(order) < wanted:
        order += rng.permutation(len(examples)).tolist()
    encoded = {i: encode_example(model.tokenizer, examples[i]) for i in set(order[:wanted])}
    check_context(model, [ids for ids, _ in encoded.values()])
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
        use_cpu=not torch.cuda.is_available(),  # else Trainer would take MPS
        seed=seed,
        train_sampling_strategy="sequential",  # `_in_order` has shuffled
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log a loss of 0 for one that is not finite
        save_strategy="no",  # `_Saver` asks for it
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class _Trainer(Trainer):
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(str(self.args.output_dir), Exception):  # torch's own errors of a full disk are of several kinds
            super()._save_checkpoint(model, trial)


class _Saver(TrainerCallback):
    """Save at chosen steps, have Trainer save a state to resume from, and time the steps without either."""

    def __init__(self, model: OpenModel, out: Path, steps: tuple[int, ...]) -> None:
        self.model, self.out, self.steps = model, out, steps
        self.bar: Any = None
        self.saved: list[Checkpoint] = []
        self.checksums: dict[str, Mapping[str, str]] = {}
        self.seconds, self.steps_timed, self._began, self._kept = 0.0, 0, 0.0, time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = [self._checkpoint(step) for step in self.steps if step <= state.global_step]  # of a resumed run

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        gradients = [weight.grad for weight in self.model.module.parameters() if weight.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise self._diverged(state.global_step + 1, "gradient is")  # before the update: the weights are whole

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.steps_timed += 1
        self.bar.update(state.global_step - self.bar.n)
        if state.global_step in self.steps:
            self._save(state.global_step)
        if state.global_step < state.max_steps and time.perf_counter() - self._kept > RESUMABLE_AFTER:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seal(self.out / RESUME / f"checkpoint-{state.global_step}", self.checksums)
        self._kept = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and state.global_step not in self.steps:  # stopped by a monitor
            self._save(state.global_step)

    def _diverged(self, step: int, what: str) -> GravlensError:
        kept = ", ".join(str(checkpoint.step) for checkpoint in self.saved) or "none"
        given = f"The run diverged: at step {step} its {what} not finite (checkpoints of {self.out} so far: {kept})."
        remedy = "a lower learning rate, more warm-up steps, or bf16=False, into another out=."
        return GravlensError(given, "Training ends there, and nothing of it is saved.", remedy)

    def _save(self, step: int) -> None:
        model, tuned = self.model, self.model.module
        if not all(weight.isfinite().all() for weight in tuned.parameters() if weight.requires_grad):
            raise self._diverged(step, "weights are")
        if hasattr(tuned, "merge_and_unload"):
            # In a copy: training goes on with the adapters.
            model = open_model(copy.deepcopy(tuned).merge_and_unload(), tokenizer=model.tokenizer)
        folder = save_folder(model, self.out / f"checkpoint-{step}")
        self.checksums[folder.name] = checksums(folder)
        self.saved.append(self._checkpoint(step))

    def _checkpoint(self, step: int) -> Checkpoint:
        return Checkpoint(f"{self.out.name}/{step}", self.out / f"checkpoint-{step}", step)


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    # The mask comes from the lengths: the padding's 0 is a token too.
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> Tensor:
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": torch.tensor(mask)}
