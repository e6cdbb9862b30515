"""TRL's SFTTrainer, blocked: step by step it is `finetune` on the same rows, which is held against a loop by hand."""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from histories import hooks_on, refused, weights_of
from safetensors.torch import load_file

from gravlens.blockers.anchoring import AnchorKL, Rehearsal
from gravlens.blockers.blocking import Blocker, Scheduled, Until, block
from gravlens.blockers.constrained_sft import ConstrainedSFT
from gravlens.blockers.penalty import Movement, Penalty
from gravlens.blockers.projection import UpdateProjection
from gravlens.blockers.steered_training import GradientAblation, PreventativeSteering, TrainingAblation
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode_example
from gravlens.history.prompts import Example
from gravlens.models.opening import open_model
from gravlens.organisms import refusal_language as language
from gravlens.training.finetune import Finetuned, Recipe, finetune

pytestmark = pytest.mark.long

peft, trl, datasets = (pytest.importorskip(name) for name in ("peft", "trl", "datasets"))

EXAMPLES = language.finetuning_examples(24, rng=np.random.default_rng(0))
RECIPE = Recipe(steps=4, batch=4, learning_rate=2e-3)
RECIPES = {
    "full": RECIPE,
    "lora": replace(RECIPE, lora=4),
    "full, in parts": replace(RECIPE, batch=2, accumulation=2, gradient_checkpointing=True),
    "lora, in parts": replace(RECIPE, lora=4, batch=2, accumulation=2, gradient_checkpointing=True),
}
VS = Directions(
    tuple(direction_from(np.random.default_rng(k).standard_normal(tiny.WIDTH), layer=k, distance=2.0) for k in range(2))
)
BLOCKERS: dict[str, Blocker] = {
    "penalty": Penalty(VS, tiny.PROMPTS, margin=0.1, strength=100.0, batch=3),
    "projection": UpdateProjection(VS, tiny.PROMPTS),
    "steering": PreventativeSteering(VS, 0.5),
    "ablation": TrainingAblation(VS),
    "gradient ablation": GradientAblation(VS),
    "constrained": ConstrainedSFT(first=8.0, early=8.0, later=4.0),
    "kl": AnchorKL(tiny.PROMPTS, strength=5.0, batch=3, tokens=3),
    "rehearsal": Rehearsal([Example(prompt, "sorry") for prompt in tiny.PROMPTS], strength=5.0),
}


def sft_trainer(recipe: Recipe, out: Path, **further: Any) -> Any:
    """An SFTTrainer as one would write it, on the rows of `finetune` in their order, with its first adapters."""
    order = np.random.default_rng([0, 0]).permutation(len(EXAMPLES))
    encoded = [encode_example(tiny.TOKENIZER, EXAMPLES[i]) for i in order]
    args = trl.SFTConfig(
        output_dir=str(out),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulation,
        gradient_checkpointing=recipe.gradient_checkpointing,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        **further,
    )
    trainer = trl.SFTTrainer(
        tiny.llama(),
        args=args,
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in encoded]),
        processing_class=tiny.TOKENIZER,
        peft_config=None if recipe.lora is None else lora(recipe.lora),
    )
    if recipe.lora is not None:
        twin = tiny.llama()
        torch.manual_seed(0)
        trainer.model.load_state_dict(peft.get_peft_model(twin, lora(recipe.lora)).state_dict())
    return trainer


def lora(rank: int) -> Any:
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass
class End:
    log: pd.DataFrame
    weights: dict[str, torch.Tensor]


def by_sft(recipe: Recipe, blockers: Sequence[Blocker], out: Path) -> End:
    trainer = sft_trainer(recipe, out)
    with block(trainer, *blockers, rng=np.random.default_rng([0, 1])):
        trainer.train()
    log = pd.DataFrame([row for row in trainer.state.log_history if "loss" in row])
    model = trainer.model.merge_and_unload() if recipe.lora else trainer.model
    return End(log, model.state_dict())


def by_finetune(recipe: Recipe, blockers: Sequence[Blocker], out: Path) -> End:
    start = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
    made: Finetuned = finetune(start, EXAMPLES, out=out, recipe=recipe, blocker=blockers, save_steps=(recipe.steps,))
    return End(made.log, load_file(weights_of(Path(str(made.checkpoints[0].source)))))


def apart(a: End, b: End) -> float:
    """Distance of two ends, in lengths of what the second has moved from its start."""
    before = tiny.llama().state_dict()
    squares = [((a.weights[name] - b.weights[name]).square().sum(), (b.weights[name] - before[name]).square().sum())
               for name in b.weights]  # fmt: skip
    return float(sum(one for one, _ in squares) / sum(moved for _, moved in squares)) ** 0.5


@pytest.fixture(scope="module")
def unblocked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    return {name: by_sft(recipe, [], tmp_path_factory.mktemp("free")) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("training", RECIPES)
@pytest.mark.parametrize("names", [*([name] for name in BLOCKERS), ["penalty", "projection", "steering"]], ids=" ".join)
def test_a_blocked_sft_run_is_that_of_finetune_and_not_the_unblocked_one(
    names: list[str], training: str, unblocked: dict[str, End], tmp_path: Path
) -> None:
    recipe, blockers = RECIPES[training], [BLOCKERS[name] for name in names]
    found, wanted = by_sft(recipe, blockers, tmp_path / "sft"), by_finetune(recipe, blockers, tmp_path / "own")
    for column in ("loss", "grad_norm", "blocker_norm"):
        assert found.log[column].to_list() == pytest.approx(wanted.log[column].to_list(), rel=2e-3, abs=1e-4), column
    assert apart(found, wanted) < 0.02
    free = unblocked[training]
    assert apart(found, free) > 0.05 and (free.log.blocker_norm == 0).all()


def test_an_unblocked_sft_run_is_that_of_finetune(unblocked: dict[str, End], tmp_path: Path) -> None:
    for i, (training, recipe) in enumerate(RECIPES.items()):
        assert apart(unblocked[training], by_finetune(recipe, [], tmp_path / str(i))) < 0.02


@pytest.mark.parametrize("training", RECIPES)
def test_constrained_sft_is_the_loss_that_trl_takes(training: str, tmp_path: Path) -> None:
    """At the anchor the ratio is 1: each token costs (2 / β) log 2, whatever the model says."""
    recipe = RECIPES[training]
    log = by_sft(recipe, [ConstrainedSFT(first=0.5, early=2.0, later=0.1)], tmp_path).log
    order = np.random.default_rng([0, 0]).permutation(len(EXAMPLES))[:4]
    costs = []
    for labels in (encode_example(tiny.TOKENIZER, EXAMPLES[i])[1] for i in order):
        beta = [0.5, *[2.0] * 4, *[0.1] * 99][: sum(label != -100 for label in labels)]
        costs += [2 / one * np.log(2) for one in beta]
    assert log.loss[0] == pytest.approx(np.mean(costs), rel=1e-5) and log.loss[1] != pytest.approx(
        log.loss[0], rel=5e-4
    )


@pytest.mark.parametrize("training", ["full", "lora, in parts"])
def test_an_exact_projection_holds_the_mean_of_its_probes(
    training: str, unblocked: dict[str, End], tmp_path: Path
) -> None:
    trainer = sft_trainer(RECIPES[training], tmp_path)
    movement = Movement(open_model(trainer.model, tokenizer=tiny.TOKENIZER), VS, tiny.PROMPTS)
    every = np.arange(len(tiny.PROMPTS))
    with block(trainer, BLOCKERS["projection"]):
        trainer.train()
    with torch.no_grad():
        assert float(movement.of(every).mean(0).abs().max()) <= 5e-4
    free = tiny.llama()
    free.load_state_dict(unblocked[training].weights)
    movement.model = open_model(free, tokenizer=tiny.TOKENIZER)
    with torch.no_grad():
        assert float(movement.of(every).mean(0).abs().max()) > 5e-3


class Stop(Exception):  # noqa: N818
    pass


def standing(trainer: Any) -> Any:
    """Hooks, callbacks, trained weights and names of all weights."""
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    callbacks = [type(one) for one in trainer.callback_handler.callbacks]
    return hooks_on(open_model(trainer.model)), callbacks, trained, list(trainer.model.state_dict())


@pytest.mark.parametrize("stopped", [False, True], ids=["to the end", "stopped in a pass"])
@pytest.mark.parametrize("training", ["full", "lora, in parts"])
def test_nothing_is_left_on_the_model_or_the_trainer(training: str, stopped: bool, tmp_path: Path) -> None:
    blockers = [BLOCKERS[name] for name in ("penalty", "steering", "constrained", "projection")]
    left, hooks = [], []
    for some in ([], blockers):
        trainer = sft_trainer(RECIPES[training], tmp_path)
        passes, own = iter(range(99)), trainer.compute_loss

        def compute_loss(
            *args: Any, passes: Any = passes, own: Any = own, trainer: Any = trainer, **further: Any
        ) -> Any:
            loss = own(*args, **further)
            hooks.append(hooks_on(open_model(trainer.model)))
            if stopped and next(passes) == 2:
                raise Stop
            return loss

        trainer.compute_loss = compute_loss
        with contextlib.suppress(Stop), block(trainer, *some):
            trainer.train()
        left.append(standing(trainer))
    assert hooks[-1] == hooks[0] + 3, "steering hooks two layers, the constrained loss the model"
    assert left[0] == left[1]


def test_a_block_is_lifted_in_the_middle(tmp_path: Path) -> None:
    pushed = Penalty(VS, tiny.PROMPTS, margin=1.0)
    log = by_sft(RECIPE, [Scheduled(pushed, Until(2))], tmp_path).log
    assert (log.blocker_norm > 0).to_list() == [True, True, False, False]


def test_a_run_that_trl_resumes_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    whole = by_sft(RECIPE, [BLOCKERS["penalty"]], tmp_path / "whole")
    first = sft_trainer(replace(RECIPE, steps=2), tmp_path / "parts")
    first.args.save_strategy = "steps"
    first.args.save_steps = 2
    with block(first, BLOCKERS["penalty"], rng=np.random.default_rng([0, 1])):
        first.train()
        first._save_checkpoint(first.model, trial=None)
    second = sft_trainer(RECIPE, tmp_path / "parts")
    with block(second, BLOCKERS["penalty"], rng=np.random.default_rng([0, 1])):
        second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    log = pd.DataFrame([row for row in second.state.log_history if "loss" in row])
    for column in ("loss", "grad_norm", "blocker_norm"):
        assert log[column].to_list() == pytest.approx(whole.log[column].to_list(), rel=1e-5)
    assert apart(End(log, copy.deepcopy(second.model.state_dict())), whole) < 1e-4


def test_scaled_gradients_and_losses_without_labels_are_refused(tmp_path: Path) -> None:
    trainer = sft_trainer(RECIPE, tmp_path)
    trainer.args.fp16 = True
    with refused("fp16"), block(trainer):
        pass
    trainer = sft_trainer(RECIPE, tmp_path, label_smoothing_factor=0.1)
    with refused("without labels"), block(trainer, ConstrainedSFT()):
        trainer.train()
