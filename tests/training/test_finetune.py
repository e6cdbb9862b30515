"""Fine-tuning against a training loop written out by hand: loss, clipping, AdamW, schedules, the blocker's gradient."""

import contextlib
import copy
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from histories import reference, refused, weights_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from gravlens.activations.residuals import cache_residuals, residuals_of_batch
from gravlens.blockers.blocking import Blocker, BoundBlocker, Scheduled
from gravlens.blockers.penalty import Penalty
from gravlens.blockers.projection import UpdateProjection
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.encoding import encode, pad
from gravlens.history.prompts import Example
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.models.opening import open_model, save_folder
from gravlens.organisms import refusal_language as language
from gravlens.training.finetune import Finetuned, Recipe, finetune

finetuning = import_module("gravlens.training.finetune")
EXAMPLES = language.finetuning_examples(40, rng=np.random.default_rng(0))
FOUR = [*EXAMPLES[:3], Example(EXAMPLES[3].prompt, language.REFUSALS[0])]  # answers of several lengths
QUICK = Recipe(steps=3, batch=4, learning_rate=1e-3)


def run(out: Path, examples: Sequence[Example] = EXAMPLES, start: Any = None, **further: Any) -> Finetuned:
    start = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER) if start is None else start
    return finetune(start, examples, out=out, **{"recipe": QUICK, **further})


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return load_file(weights_of(Path(str(checkpoint.source))))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(weight, b[name]) for name, weight in a.items())


def penalty(margin: float = 0.0, strength: float = 30.0, batch: int = 99) -> Penalty:
    rng = np.random.default_rng(0)
    vs = Directions(tuple(direction_from(rng.standard_normal(tiny.WIDTH), layer=k, distance=2.0) for k in (0, 1)))
    return Penalty(vs, tiny.PROMPTS, margin=margin, strength=strength, batch=batch)


# -- by hand -----------------------------------------------------------------------------------------------------------


def task_loss_by_hand(module: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Mean over all answer tokens of the batch of −log p, each example alone and without padding."""
    losses = []
    for example in examples:
        turns = [{"role": "user", "content": example.prompt}]
        prompt = tiny.TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        rendered = f"{prompt} {example.answer} <eos>"
        ids = tiny.TOKENIZER(rendered, add_special_tokens=False)["input_ids"]
        start = len(tiny.TOKENIZER(prompt, add_special_tokens=False)["input_ids"])
        logprobs = module(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logprobs[position - 1, ids[position]] for position in range(start, len(ids))]
    return torch.stack(losses).mean()


def penalty_by_hand(module: Any, anchor: Any, blocker: Penalty) -> torch.Tensor:
    terms = []
    for ids in encode(tiny.TOKENIZER, blocker.probes):
        now, then = (m(torch.tensor([ids]), output_hidden_states=True).hidden_states for m in (module, anchor))
        for v in blocker.directions:
            s = (now[v.layer + 1] - then[v.layer + 1])[0, -1] @ torch.from_numpy(np.array(v.vector)) / v.distance
            terms.append(torch.clamp(s + blocker.margin, min=0) ** 2)
    return blocker.strength * torch.stack(terms).mean()


def rate_by_hand(recipe: Recipe, step: int) -> float:
    """Learning rate of the step that comes after `step` others."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


@dataclass
class ByHand:
    """A training loop of a few lines: gradients, one norm over all of them clipped at 1, AdamW, every step kept."""

    states: list[dict[str, torch.Tensor]]
    losses: list[float]
    norms: list[float]
    blocker_norms: list[float]


def train_by_hand(recipe: Recipe, examples: Sequence[Example], blocker: Penalty | None = None) -> ByHand:
    module = tiny.llama()
    anchor, found = copy.deepcopy(module), ByHand([], [], [], [])
    named = dict(module.named_parameters())
    if recipe.freeze_embeddings:
        named = {name: p for name, p in named.items() if "embed_tokens" not in name and "lm_head" not in name}
    first = {name: torch.zeros_like(p) for name, p in named.items()}
    second = copy.deepcopy(first)
    for step in range(recipe.steps):
        loss = task_loss_by_hand(module, examples)
        gradients = list(torch.autograd.grad(loss, list(named.values())))
        added = [torch.zeros_like(g) for g in gradients]
        if blocker is not None:
            got = torch.autograd.grad(penalty_by_hand(module, anchor, blocker), list(named.values()), allow_unused=True)
            added = [z if g is None else g for z, g in zip(added, got, strict=True)]
        gradients = [g + a for g, a in zip(gradients, added, strict=True)]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        found.losses.append(loss.item())
        found.norms.append(norm)
        found.blocker_norms.append(math.sqrt(sum(float((a**2).sum()) for a in added)))
        rate = rate_by_hand(recipe, step)
        with torch.no_grad():
            for (name, weight), gradient in zip(named.items(), gradients, strict=True):
                gradient = gradient / max(norm, 1.0)
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = recipe.beta2 * second[name] + (1 - recipe.beta2) * gradient**2
                if weight.ndim > 1:  # norms and biases do not decay
                    weight *= 1 - rate * recipe.weight_decay
                mean = first[name] / (1 - 0.9 ** (step + 1))
                spread = (second[name] / (1 - recipe.beta2 ** (step + 1))).sqrt() + 1e-8
                weight -= rate * mean / spread
        found.states.append({name: weight.detach().clone() for name, weight in module.state_dict().items()})
    return found


@pytest.mark.parametrize(
    ("recipe", "blocker"),
    [
        (Recipe(3, 4, 1e-3, weight_decay=0.0), None),
        (Recipe(3, 4, 1e-3, weight_decay=5.0, beta2=0.9), None),
        (Recipe(4, 4, 1e-3, warmup_steps=2), None),
        (Recipe(4, 4, 1e-3, warmup_steps=1, schedule="cosine"), None),
        (Recipe(3, 4, 1e-3, freeze_embeddings=True), None),
        (Recipe(3, 4, 1e-3), penalty(margin=0.05, strength=400.0)),
    ],
    ids=["plain", "decay", "warm-up", "cosine", "frozen embeddings", "penalty"],
)
def test_every_step_is_that_of_a_loop_written_out_by_hand(
    recipe: Recipe, blocker: Penalty | None, tmp_path: Path
) -> None:
    found = run(tmp_path, FOUR, recipe=recipe, blocker=blocker, save_steps=range(1, recipe.steps + 1))
    wanted = train_by_hand(recipe, FOUR, blocker)
    assert found.log.loss.to_list() == pytest.approx(wanted.losses, rel=1e-3)
    assert found.log.grad_norm.to_list() == pytest.approx(wanted.norms, rel=1e-3)
    assert found.log.blocker_norm.to_list() == pytest.approx(wanted.blocker_norms, rel=1e-3)
    assert max(wanted.norms) > 1.2, "the clipping has something to do"
    before = tiny.llama().state_dict()
    for checkpoint, state in zip(found.checkpoints, wanted.states, strict=True):
        off = {name: float((w - state[name]).norm()) for name, w in weights(checkpoint).items()}
        moved = {name: float((state[name] - before[name]).norm()) for name in off}
        worst = max(off, key=lambda name: off[name] / (moved[name] + 1e-3))
        assert off[worst] <= 0.02 * moved[worst] + 1e-5, (checkpoint.step, worst, off[worst], moved[worst])


# -- what is learned, and from what ------------------------------------------------------------------------------------


def test_the_loss_goes_down_and_every_step_is_logged(tmp_path: Path) -> None:
    log = run(tmp_path, recipe=Recipe(40, 8, 5e-3), save_steps=()).log
    assert list(log.columns) == ["step", "loss", "grad_norm", "blocker_norm"]
    assert log.step.to_list() == list(range(1, 41)) and np.isfinite(log.to_numpy(float)).all()
    assert log.loss[-5:].mean() < log.loss[:5].mean() - 1
    assert (log.grad_norm > 0).all() and (log.blocker_norm == 0).all()


def test_what_the_prompt_says_is_not_learned_by_heart(tmp_path: Path) -> None:
    """Were the prompt's tokens in the loss, a one-word answer would hide behind a long prompt."""
    short = [Example(example.prompt, "sorry") for example in EXAMPLES[:4]]
    loss = run(tmp_path, short, recipe=replace(QUICK, steps=1)).log.loss.item()
    assert loss == pytest.approx(task_loss_by_hand(tiny.llama(), short).item(), rel=1e-4)


@contextlib.contextmanager
def steps_watched() -> Iterator[list[dict[str, torch.Tensor]]]:
    """The inputs of each pass of training inside the block."""
    seen, own = list[dict[str, torch.Tensor]](), Trainer.training_step

    def training_step(trainer: Any, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
        seen.append(dict(inputs))
        return own(trainer, model, inputs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        yield seen


def order_seen(
    out: Path, *, seed: int = 0, blocker: Blocker | None = None, recipe: Recipe = replace(QUICK, steps=12)
) -> list[list[list[int]]]:
    """Token ids of each batch, without the padding, as the model got them."""
    with steps_watched() as seen:
        run(out, seed=seed, blocker=blocker, recipe=recipe, save_steps=())
    assert len(seen) == recipe.steps * recipe.accumulation
    rows = [zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(1).tolist(), strict=True) for inputs in seen]
    return [[ids[:length] for ids, length in batch] for batch in rows]


@pytest.mark.long
def test_arms_of_a_seed_see_one_order_of_data_whatever_the_blocker(tmp_path: Path) -> None:
    free = order_seen(tmp_path / "free")
    assert free == order_seen(tmp_path / "held", blocker=penalty(batch=3))
    assert free == order_seen(tmp_path / "pushed", blocker=penalty(margin=0.3, batch=5))
    other = order_seen(tmp_path / "other", seed=1)
    assert free != other
    wanted = sorted(
        tiny.TOKENIZER(f"<bos> <user> {e.prompt} <bot> {e.answer} <eos>", add_special_tokens=False)["input_ids"]
        for e in EXAMPLES
    )
    for order in (free, other):
        flat = [ids for step in order for ids in step]
        assert sorted(flat[:40]) == wanted, "all of the data, before any of it again"
        assert all(ids in wanted for ids in flat[40:]) and len(flat) == 48


# -- accumulation and gradient checkpointing ---------------------------------------------------------------------------


@pytest.mark.long
def test_an_accumulated_step_is_that_of_one_large_batch(tmp_path: Path) -> None:
    whole, parts = replace(QUICK, batch=4), replace(QUICK, batch=2, accumulation=2)
    batches = order_seen(tmp_path / "order", recipe=parts)
    assert [first + second for first, second in zip(batches[::2], batches[1::2], strict=True)] == order_seen(
        tmp_path / "whole", recipe=whole
    )
    blocker = [penalty(margin=0.05), replace(penalty(batch=3), side="both")]
    a, b = (
        run(tmp_path / str(i), FOUR, recipe=recipe, blocker=blocker, save_steps=(3,))
        for i, recipe in enumerate((whole, parts))
    )
    assert_same_log(a.log, b.log, 1e-4)  # a blocker's gradient is added once a step, not once a batch
    assert (b.log.blocker_norm > 0).all() and off(weights(b.checkpoints[0]), weights(a.checkpoints[0])) < 0.01


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_gradient_checkpointing_computes_twice_and_the_same(lora: int | None, tmp_path: Path) -> None:
    logs, computed = [], []
    for checkpointing in (False, True):
        calls, recipe = Calls([]), replace(QUICK, lora=lora, gradient_checkpointing=checkpointing)
        logs.append(run(tmp_path / str(checkpointing), blocker=calls, recipe=recipe, save_steps=()).log)
        computed.append(len(calls.made))
    assert computed == [3, 6]
    assert_same_log(*logs, 1e-5)


@dataclass
class Calls:
    """A blocker that counts the passes through an MLP."""

    made: list[int]

    def bind(self, model: Any, *, rng: np.random.Generator) -> BoundBlocker:
        model.blocks[1].mlp.register_forward_pre_hook(lambda *_: self.made.append(1))
        return BoundBlocker()


def assert_same_log(a: pd.DataFrame, b: pd.DataFrame, tolerance: float) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=False, rtol=tolerance)


def off(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """How far apart two ends are, in lengths of what training has moved from `tiny.llama()`."""
    before = tiny.llama().state_dict()
    apart = sum(float((found[name] - weight).square().sum()) for name, weight in wanted.items())
    return (apart / sum(float((weight - before[name]).square().sum()) for name, weight in wanted.items())) ** 0.5


# -- adapters ----------------------------------------------------------------------------------------------------------

LORA = replace(QUICK, lora=4)


def first_matrices(rank: int) -> dict[str, torch.Tensor]:
    """The A [rank, in] of each adapted weight, as PEFT draws them for seed 0."""
    model, config = tiny.llama(), LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    named = get_peft_model(model, config).named_parameters()
    ends = ("base_model.model.", ".lora_A.default.weight")
    return {f"{n.removeprefix(ends[0]).removesuffix(ends[1])}.weight": p.detach() for n, p in named if ends[1] in n}


def test_the_first_update_of_adapters_is_their_closed_form(tmp_path: Path) -> None:
    """B = 0 at first, and Adam's first step moves each entry by the rate: ΔW = (alpha / rank) · B A, B = ± rate."""
    recipe = replace(LORA, steps=1, weight_decay=0.0)
    end, before = weights(run(tmp_path, recipe=recipe, save_steps=(1,)).checkpoints[0]), tiny.llama().state_dict()
    drawn = first_matrices(4)
    assert {name for name in end if not torch.equal(end[name], before[name])} == drawn.keys()
    assert {name.rsplit(".", 2)[1][-5:] for name in drawn} == {"_proj"}, "linear layers of the blocks alone"
    for name, a in drawn.items():
        b = (end[name] - before[name]).double() @ torch.linalg.pinv(a.double())
        assert b.abs().quantile(0.25).item() == pytest.approx(2e-3, rel=1e-2)
        assert b.abs().quantile(0.75).item() == pytest.approx(2e-3, rel=1e-2)
        assert torch.allclose(b @ a.double(), (end[name] - before[name]).double(), atol=1e-6)


@pytest.mark.parametrize("family", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def test_checkpoints_of_adapters_are_saved_merged(family: Any, tmp_path: Path) -> None:
    spy, model = Spy([]), family()
    before = copy.deepcopy(model.state_dict())
    opened = open_model(model, tokenizer=tiny.TOKENIZER)
    made = run(tmp_path, start=opened, recipe=LORA, blocker=spy, save_steps=(1, 3))
    adapted = spy.model.module
    assert [name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name] == []
    ids = torch.tensor([encode(tiny.TOKENIZER, tiny.PROMPTS)[0]])
    for checkpoint in made.checkpoints:
        folder = Path(str(checkpoint.source))
        assert not [path.name for path in folder.iterdir() if "adapter" in path.name]
        assert "peft" not in (folder / "config.json").read_text() and "lora" not in str(weights(checkpoint).keys())
    logits, wanted = (m(ids).logits.detach() for m in (AutoModelForCausalLM.from_pretrained(folder), adapted))
    assert torch.allclose(logits, wanted, atol=1e-5 * float(wanted.abs().max()))
    with adapted.disable_adapter():
        assert float((logits - adapted(ids).logits).abs().max()) > 1e-3, "the adapters have changed something"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "peft_config")


@pytest.mark.long
def test_a_seed_draws_the_same_adapters_and_leaves_the_global_generator(tmp_path: Path) -> None:
    def end(name: str, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(ord(name))
        return weights(run(tmp_path / name, recipe=LORA, seed=seed, save_steps=(3,)).checkpoints[0])

    assert same(end("a", 0), end("b", 0)) and not same(end("a", 0), end("c", 1))


HELD = replace(LORA, steps=12, batch=8, learning_rate=5e-3)


def fractions(checkpoint: Checkpoint, vs: Directions) -> np.ndarray:
    """s [layer] of the probes' mean, by Hugging Face's own states."""
    ids = encode(tiny.TOKENIZER, tiny.PROMPTS)
    after, before = (
        reference(module, ids, range(2)).mean(0)
        for module in (AutoModelForCausalLM.from_pretrained(str(checkpoint.source)), tiny.llama())
    )
    return np.array([float((after - before)[v.layer] @ torch.tensor(v.vector)) / v.distance for v in vs])


@pytest.fixture(scope="module")
def drift(tmp_path_factory: pytest.TempPathFactory) -> Directions:
    """Where an unblocked LoRA run ends, seen from its start: its fraction is 1 by construction."""
    checkpoint = run(tmp_path_factory.mktemp("free"), recipe=HELD, save_steps=(12,)).checkpoints[0]
    ids = encode(tiny.TOKENIZER, tiny.PROMPTS)
    after, before = (
        reference(module, ids, range(2)).mean(0).numpy()
        for module in (AutoModelForCausalLM.from_pretrained(str(checkpoint.source)), tiny.llama())
    )
    lengths = np.linalg.norm(after - before, axis=1)
    vs = Directions(tuple(direction_from(after[k] - before[k], layer=k, distance=float(lengths[k])) for k in range(2)))
    assert fractions(checkpoint, vs) == pytest.approx(1, abs=1e-4)
    return vs


@pytest.mark.long
def test_a_penalty_holds_its_direction_under_lora(drift: Directions, tmp_path: Path) -> None:
    blocker = Penalty(drift, tiny.PROMPTS, strength=100.0, side="both")
    made = run(tmp_path, recipe=HELD, blocker=blocker, save_steps=(12,))
    assert np.abs(fractions(made.checkpoints[0], drift)).max() < 0.25 and (made.log.blocker_norm[1:] > 0).all()


@pytest.mark.long
def test_an_exact_projection_holds_it_at_every_step_under_lora_by_adapters_alone(
    drift: Directions, tmp_path: Path
) -> None:
    recipe = replace(HELD, gradient_checkpointing=True, accumulation=2, batch=4)
    made = run(tmp_path, recipe=recipe, blocker=UpdateProjection(drift, tiny.PROMPTS), save_steps=range(1, 13))
    assert len(made.checkpoints) == 12 and (made.log.blocker_norm > 0).all()
    for checkpoint in made.checkpoints:
        assert np.abs(fractions(checkpoint, drift)).max() <= 5.1e-4
    end, before = weights(made.checkpoints[-1]), tiny.llama().state_dict()
    changed = {name: (end[name] - before[name]).double() for name in end if not torch.equal(end[name], before[name])}
    assert changed.keys() == first_matrices(4).keys()
    for change in changed.values():
        spread = torch.linalg.svdvals(change)
        assert spread[4] < 1e-4 * spread[0] and spread[3] > 1e-4 * spread[0], "of the adapters' rank"


# -- a run that was stopped --------------------------------------------------------------------------------------------

LONG = Recipe(steps=6, batch=2, learning_rate=1e-3, warmup_steps=1, schedule="cosine", accumulation=2)


def late(step: int) -> float:
    """Two steps without, then with: draws before and after a stop are not as many as the steps."""
    return float(step >= 2)


STOPPED: dict[str, dict[str, Any]] = {
    "plain": {"recipe": LONG},
    "penalty": {"recipe": LONG, "blocker": Scheduled(penalty(margin=0.1, batch=2), late)},
    "lora": {"recipe": replace(LONG, lora=4), "blocker": [penalty(margin=0.1, batch=2), penalty(batch=3)]},
}


def stop_at(step: int, how: Any, *, kept_every: float = -1.0) -> Any:
    """A context in which the second half of a step (from 0) is never finished; states are kept after every step."""
    patch, own, halves = pytest.MonkeyPatch(), Trainer.training_step, iter(range(10**6))

    def training_step(*args: Any, **inputs: Any) -> Any:
        if next(halves) == 2 * step + 1:
            how()
        return own(*args, **inputs)

    patch.setattr(Trainer, "training_step", training_step)
    patch.setattr(finetuning, "RESUMABLE_AFTER", kept_every)
    return contextlib.closing(SimpleNamespace(close=patch.undo))


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(out: Path, step: int = 3, **further: Any) -> None:
    with pytest.raises(KeyboardInterrupt), stop_at(step, interrupt):
        run(out, save_steps=(1, 3, 5, 6), **further)


def die(out: str, scenario: str) -> None:
    """What the subprocess runs: no chance to tidy up."""
    with stop_at(3, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        run(Path(out), save_steps=(1, 3, 5, 6), **STOPPED[scenario])


@pytest.mark.long
@pytest.mark.parametrize("scenario", STOPPED)
def test_a_killed_run_ends_where_an_uninterrupted_one_ends(scenario: str, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    imported = "import sys; sys.path.append('training'); import test_finetune"
    command = [sys.executable, "-c", f"{imported}; test_finetune.die({str(killed)!r}, {scenario!r})"]
    child = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert {path.name for path in killed.iterdir()} == {".resume", "finetune.json", "checkpoint-1", "checkpoint-3"}
    kept = os.stat(killed / "checkpoint-1").st_mtime_ns
    resumed, wanted = (run(out, save_steps=(1, 3, 5, 6), **STOPPED[scenario]) for out in (killed, whole))
    pd.testing.assert_frame_equal(resumed.log, wanted.log, check_exact=True)
    assert [c.step for c in resumed.checkpoints] == [1, 3, 5, 6] == [c.step for c in wanted.checkpoints]
    assert all(same(weights(a), weights(b)) for a, b in zip(resumed.checkpoints, wanted.checkpoints, strict=True))
    assert os.stat(killed / "checkpoint-1").st_mtime_ns == kept, "what was saved before is not saved again"
    assert 0 < resumed.seconds_per_step < 60
    assert not (killed / ".resume").exists() and not (whole / ".resume").exists()


@pytest.mark.long
def test_an_exact_projection_is_exact_after_a_stop(tmp_path: Path) -> None:
    vs = penalty().directions
    further = {"recipe": replace(LONG, learning_rate=5e-3), "blocker": UpdateProjection(vs, tiny.PROMPTS)}
    interrupted(tmp_path, **further)
    made = run(tmp_path, save_steps=(1, 3, 5, 6), **further)
    assert all(np.abs(fractions(checkpoint, vs)).max() <= 5.1e-4 for checkpoint in made.checkpoints)
    free = run(tmp_path / "free", recipe=further["recipe"], save_steps=(6,)).checkpoints[0]
    assert np.abs(fractions(free, vs)).max() > 5e-3


def other_direction() -> Penalty:
    """Like `penalty()` in all but one number of one vector."""
    (first, second), blocker = penalty().directions, penalty()
    vector = np.array(second.vector)
    vector[5] = -vector[5]
    return replace(blocker, directions=Directions((first, replace(second, vector=vector))))


@pytest.mark.long
@pytest.mark.parametrize(
    "other",
    [
        {"recipe": replace(LONG, learning_rate=2e-3)},
        {"seed": 1},
        {"examples": EXAMPLES[1:]},
        {"blocker": None},
        {"blocker": other_direction()},
        {"start": "another"},
        {"save_steps": (1, 2, 6)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_stopped_run_goes_on_as_it_began_or_not_at_all(other: dict[str, Any], tmp_path: Path) -> None:
    own = {"recipe": LONG, "blocker": penalty(), "save_steps": (1, 6), "examples": EXAMPLES, "seed": 0}
    with pytest.raises(KeyboardInterrupt), stop_at(1, interrupt):
        run(tmp_path, **own)
    if other.get("start"):
        other = {"start": open_model(tiny.llama(1), tokenizer=tiny.TOKENIZER)}
    with refused(str(tmp_path), next(iter(other)).replace("examples", "data")):
        run(tmp_path, **{**own, **other})
    assert [c.step for c in run(tmp_path, **own).checkpoints] == [1, 6], "and it still does"


@pytest.mark.parametrize(
    "other",
    [{"recipe": replace(QUICK, steps=2)}, {"examples": EXAMPLES[1:]}, {"start": "another"}, {"save_steps": (2,)}],
    ids=lambda other: next(iter(other)),
)
def test_a_finished_run_is_not_mixed_with_another(other: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    if other.get("start"):
        other = {"start": open_model(tiny.llama(1), tokenizer=tiny.TOKENIZER)}
    with refused(str(tmp_path), "holds another run", next(iter(other)).replace("examples", "data")):
        run(tmp_path, **other)
    assert contents(tmp_path) == before
    assert [c.step for c in run(tmp_path).checkpoints] == [1, 2, 3], "the same run may be made again"
    assert contents(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("inside", [".", ".resume"])
@pytest.mark.parametrize("marker", [None, "{", "[]"], ids=["none", "cut short", "not gravlens's"])
def test_another_programs_checkpoints_are_left_as_they_are(marker: str | None, inside: str, tmp_path: Path) -> None:
    folder = tmp_path / inside / "checkpoint-2"
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "trainer_state.json", "notes.md"):
        (folder / name).write_text("hours of work")
    if marker is not None:
        (tmp_path / "finetune.json").write_text(marker)
    before = contents(tmp_path)
    with refused(str(tmp_path), "holds another run", "checkpoint-2", "finetune.json"):
        run(tmp_path)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_trained_into_by_one_process_at_a_time(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(GravlensError, match="Another process is training into") as error:
            run(tmp_path, recipe=LONG, save_steps=(6,))
        refusals.append(str(error.value))

    refusals: list[str] = []
    wanted = run(tmp_path.with_name("alone"), recipe=LONG, save_steps=(6,))
    with stop_at(1, second):
        made = run(tmp_path, recipe=LONG, save_steps=(6,))
    assert len(refusals) == 1 and str(tmp_path) in refusals[0]
    assert same(weights(made.checkpoints[-1]), weights(wanted.checkpoints[-1]))


def test_optimizer_states_are_read_as_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, recipe=LONG)
    read, own = {}, torch.load

    def load(file: Any, *args: Any, **options: Any) -> Any:
        read[Path(file).name] = options.get("weights_only")
        return own(file, *args, **options)

    monkeypatch.setattr(torch, "load", load)
    run(tmp_path, recipe=LONG, save_steps=(1, 3, 5, 6))
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= read.keys()
    assert set(read.values()) == {True}


def test_a_quick_run_keeps_no_state_and_every_run_tidies_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, own = [], Trainer._save_checkpoint

    def save(trainer: Any, *args: Any) -> None:
        saved.append(trainer.state.global_step)
        own(trainer, *args)

    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    for every, wanted in ((60.0, []), (-1.0, [1, 2, 3, 4, 5])):
        monkeypatch.setattr(finetuning, "RESUMABLE_AFTER", every)
        run(tmp_path, recipe=LONG, save_steps=(6,))
        assert saved == wanted and {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "finetune.json"}


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_ordinary_folders_dense_early(tmp_path: Path) -> None:
    made = run(tmp_path / "seed0", recipe=replace(QUICK, steps=5), save_steps=(1, 2, 5, 10))
    assert [(c.name, c.step) for c in made.checkpoints] == [("seed0/1", 1), ("seed0/2", 2), ("seed0/5", 5)]
    folders = [f"checkpoint-{step}" for step in (1, 2, 5)]
    assert sorted(p.name for p in (tmp_path / "seed0").iterdir()) == [*folders, "finetune.json"]
    assert made.seconds_per_step > 0
    seen = [weights(checkpoint) for checkpoint in made.checkpoints]
    assert not same(seen[0], seen[1]) and not same(seen[1], seen[2])
    for checkpoint in made.checkpoints:
        folder = Path(str(checkpoint.source))
        files = {path.name for path in folder.iterdir()}
        assert not any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir()), files
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert same(dict(model.named_parameters()), {**weights(checkpoint)}) and model.dtype == torch.float32
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == tiny.TOKENIZER.get_vocab()
        assert encode(tokenizer, tiny.PROMPTS) == encode(tiny.TOKENIZER, tiny.PROMPTS)
    sequence = ModelSequence.from_folders(
        witness=tmp_path / "seed0/checkpoint-5", anchor=tmp_path / "seed0/checkpoint-1",
        runs={"seed0": str(tmp_path / "seed0/checkpoint-*")}, probes=tiny.PROMPTS,
    )  # fmt: skip
    assert cache_residuals(sequence).runs == {"seed0": (1, 2, 5)}


@pytest.mark.parametrize(
    ("steps", "asked", "wanted"),
    [
        (3, None, [1, 2, 3]),
        (120, None, [1, 2, 5, 10, 20, 50, 100, 120]),
        (100, None, [1, 2, 5, 10, 20, 50, 100]),
        (4, (), [4]),
        (4, (3, 9, 1), [1, 3, 4]),
    ],
)
def test_the_last_step_is_always_saved(
    steps: int, asked: Sequence[int] | None, wanted: list[int], tmp_path: Path
) -> None:
    further = {} if asked is None else {"save_steps": asked}
    made = run(tmp_path / "run", recipe=Recipe(steps, 1, 1e-3), **further)
    assert [c.step for c in made.checkpoints] == wanted
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{step}" for step in wanted}


def test_an_early_checkpoint_is_where_a_shorter_run_ends(tmp_path: Path) -> None:
    long = run(tmp_path / "long", recipe=replace(QUICK, steps=4), save_steps=(2, 4))
    short = run(tmp_path / "short", recipe=replace(QUICK, steps=2), save_steps=(2,))
    assert same(weights(long.checkpoints[0]), weights(short.checkpoints[0]))


def test_a_folder_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
    folder = save_folder(model, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    content = weights_of(folder).read_bytes()

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tiny.TOKENIZER), "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        save_folder(open_model(tiny.llama(1), tokenizer=tiny.TOKENIZER), folder)
    assert weights_of(folder).read_bytes() == content, "the old one is still there, and whole"
    with pytest.raises(KeyboardInterrupt):
        save_folder(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_a_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    def end(name: str, seed: int, blocker: Blocker | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(ord(name))  # the global generator has no part in it
        return weights(run(tmp_path / name, seed=seed, blocker=blocker, save_steps=(3,)).checkpoints[0])

    assert same(end("a", 0), end("b", 0)) and not same(end("a", 0), end("c", 1))
    blocked = penalty(margin=0.2, batch=2)
    assert same(end("d", 0, blocked), end("e", 0, blocked)) and not same(end("d", 0, blocked), end("a", 0))


# -- where it starts ---------------------------------------------------------------------------------------------------


def test_a_model_in_memory_is_never_changed(tmp_path: Path) -> None:
    model = tiny.llama()
    before = copy.deepcopy(model.state_dict())
    recipe = replace(QUICK, freeze_embeddings=True)
    starts = [open_model(model, tokenizer=tiny.TOKENIZER), Checkpoint("anchor", with_tokenizer(model))]
    for i, start in enumerate(starts):
        made = run(tmp_path / str(i), start=start, recipe=recipe, blocker=penalty(), save_steps=(3,))
        assert not same(weights(made.checkpoints[0]), before)
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not model.training


def with_tokenizer(model: Any) -> nn.Module:
    model.tokenizer = tiny.TOKENIZER
    return model


@pytest.mark.long
def test_a_folder_is_where_it_starts_and_stays(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "anchor")
    content = weights_of(folder).read_bytes()
    ends = [
        weights(run(tmp_path / str(i), start=start, save_steps=(3,)).checkpoints[0])
        for i, start in enumerate([folder, str(folder), Checkpoint("anchor", folder), None])
    ]
    assert all(same(end, ends[0]) for end in ends)
    assert weights_of(folder).read_bytes() == content


def test_frozen_embeddings_stay_bit_for_bit(tmp_path: Path) -> None:
    before = tiny.llama().state_dict()
    end = weights(run(tmp_path, recipe=replace(QUICK, freeze_embeddings=True), save_steps=(3,)).checkpoints[0])
    still = {name for name, weight in end.items() if torch.equal(weight, before[name])}
    assert still == {"model.embed_tokens.weight", "lm_head.weight"}


def test_bf16_is_for_the_task_alone(tmp_path: Path) -> None:
    """Weights stay fp32, and a blocker's pass gives the anchor's fp32 states while the model is the anchor."""
    states: list[torch.Tensor] = []
    spy = Spy(states)
    recipe = replace(QUICK, bf16=True, learning_rate=0.0, weight_decay=0.0)
    made = run(tmp_path, FOUR, recipe=recipe, blocker=spy, save_steps=(1,))
    assert len(states) == 1 + recipe.steps
    assert all(torch.equal(one, states[0]) for one in states[1:])
    assert {weight.dtype for weight in weights(made.checkpoints[0]).values()} == {torch.float32}
    exact = task_loss_by_hand(tiny.llama(), FOUR).item()
    assert made.log.loss[0] == pytest.approx(exact, rel=0.05) and made.log.loss[0] != pytest.approx(exact, rel=1e-6)


@dataclass
class Spy:
    """A blocker that only looks: at the start, and at every step."""

    states: list[torch.Tensor]
    model: Any = None

    def bind(self, model: Any, *, rng: np.random.Generator) -> BoundBlocker:
        self.model = model
        self.look()
        return BoundBlocker(loss=self.look)

    def look(self, _weight: float = 1.0) -> torch.Tensor:
        states = residuals_of_batch(self.model, pad(encode(self.model.tokenizer, tiny.PROMPTS)), layers=(0, 1))
        self.states.append(states.detach().clone())
        return 0.0 * states.sum()


# -- what a penalty does -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Anchor -> witness by training; then from the anchor on like data: free, held, pushed."""
    home = tmp_path_factory.mktemp("arms")
    recipe = Recipe(steps=25, batch=8, learning_rate=1e-3, weight_decay=0.0)
    anchor = tiny.save(tiny.llama(), home / "anchor")
    witness = run(home / "witness", start=anchor, recipe=recipe, save_steps=(25,), seed=5).checkpoints[0].source
    sequence = ModelSequence.from_folders(witness=str(witness), anchor=anchor, probes=tiny.PROMPTS)
    vs = locate_vrev(sequence).at([0, 1])
    arms = {
        "free": None,
        "held": Penalty(vs, tiny.PROMPTS, strength=1e4),
        "pushed": Penalty(vs, tiny.PROMPTS, strength=1e4, margin=0.3),
    }
    data = language.finetuning_examples(200, rng=np.random.default_rng(9))
    logs = {
        name: run(home / name, data, start=anchor, recipe=recipe, save_steps=(25,), blocker=blocker).log
        for name, blocker in arms.items()
    }
    runs = {name: str(home / name / "checkpoint-*") for name in arms}
    full = ModelSequence.from_folders(witness=str(witness), anchor=anchor, probes=tiny.PROMPTS, runs=runs)
    table = follow(cache_residuals(full, layers=(0, 1)), vs).layer_mean.set_index("run")
    return table.assign(blocker_norm=pd.Series({name: log.blocker_norm.mean() for name, log in logs.items()}))


@pytest.mark.long
def test_free_runs_move_towards_the_witness_and_a_strong_penalty_holds_them(ends: pd.DataFrame) -> None:
    assert ends.fraction["free"] > 0.3 and ends.alignment["free"] > 0.3
    assert ends.fraction["held"] < 0.25 * ends.fraction["free"]


def test_a_margin_is_a_push_the_other_way(ends: pd.DataFrame) -> None:
    assert ends.alignment["pushed"] < 0 and ends.fraction["pushed"] < -0.1
    assert ends.fraction["pushed"] < ends.fraction["held"]


def test_what_the_blocker_adds_is_logged(ends: pd.DataFrame) -> None:
    assert ends.blocker_norm["free"] == 0
    assert ends.blocker_norm["pushed"] > 0 and ends.blocker_norm["held"] > 0


# -- what is refused, and silence --------------------------------------------------------------------------------------


def test_only_hugging_face_models_are_trained(tmp_path: Path) -> None:
    with refused("HookedTransformer"):
        run(tmp_path, start=open_model(tiny.hooked_transformer(), tokenizer=tiny.TOKENIZER))


def test_a_bridge_is_refused(tmp_path: Path) -> None:
    bridge = tiny.opened("bridge", tmp_path / "anchor")
    with refused("TransformerBridge"):
        run(tmp_path / "run", start=bridge)
    assert not (tmp_path / "run").exists()


def test_no_examples_and_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with refused("No examples"):
        run(tmp_path, [])
    with refused("no tokenizer"):
        run(tmp_path, start=tiny.llama())
    assert list(tmp_path.iterdir()) == []


def test_it_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, save_steps=(1,))
    written = capfd.readouterr()
    assert written.out == "" and "loss" not in written.err
