"""Makes and measures a setting's checkpoints and runs in worker processes; what is complete is never made again."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.behavior.answers import generate_answers, harmfulness, substring_judge
from gravlens.behavior.divergence import kl_from
from gravlens.behavior.scores import refusal_log_odds, task_loss, two_sided_log_odds
from gravlens.blockers.blocking import Blocker
from gravlens.core.files import once, write_json, write_table
from gravlens.core.parallel import processes
from gravlens.directions.vrev import locate_vrev
from gravlens.history.prompts import Example, PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.models.opening import OpenModel, open_model
from gravlens.models.swapping import open_each
from gravlens.organisms.arms import UNBLOCKED, Arm, Grounds
from gravlens.organisms.base import Setting
from gravlens.stats.damage import update_norms, weight_noise
from gravlens.training.finetune import finetune

PROMPT_SETS = ("probes", "held_out")
N_HARMLESS = 32  # prompts of the data that a harmful − harmless contrast is made with
N_DIVERGENCE = 32  # prompts that divergences are measured on


def home_of(setting: Setting, cache: Path) -> Path:
    """Where a setting's checkpoints and runs lie, keyed by all that they depend on."""
    return cache / "histories" / setting.name / setting.key


def carry_out(setting: Setting, cache: Path, *, arms: Sequence[Arm] | None = None, workers: int | None = None) -> Path:
    """Make and measure everything of a setting; returns its home. A run that was stopped goes on where it was.

    Args:
        setting: the history.
        cache: where it lies.
        arms: run these in place of the setting's own, and draw no weight noise.
        workers: processes at a time (default: as many as the setting's threads allow).
    """
    home = home_of(setting, cache)
    with processes(setting.threads, workers) as run_all:
        for wave in _waves(setting.checkpoints):
            run_all("checkpoints", [partial(make_checkpoint, setting, name, home) for name in wave])
        run_all("history", [partial(measure_history, setting, home)])
        chosen = setting.arms if arms is None else arms
        for name, wave in (
            ("runs", [a for a in chosen if not a.other]),
            ("further runs", [a for a in chosen if a.other]),
        ):
            run_all(name, [partial(run_arm, setting, arm, seed, home) for arm in wave for seed in arm.seeds])
        if arms is None:
            run_all("weight noise", [partial(draw_noise, setting, step, home) for step in setting.noise])
    return home


def _waves(checkpoints: Mapping[str, str | None]) -> Iterator[list[str]]:
    """Names in the order of their making: those whose start exists already, together."""
    made: set[str | None] = {None}
    while left := [name for name in checkpoints if name not in made]:
        wave = [name for name in left if checkpoints[name] in made]
        yield wave
        made.update(wave)


# --- one unit of work each, by folder ---------------------------------------------------------------------------
def make_checkpoint(setting: Setting, name: str, home: Path) -> Path:
    """Make one checkpoint of the history."""
    start = setting.checkpoints[name]
    return once(home / name, lambda folder: setting.make(name, None if start is None else home / start, folder))


def sequence_of(setting: Setting, home: Path) -> ModelSequence:
    """The history by the same door as a user's: folders, and the runs whose weights are kept."""
    kept = [arm for arm in setting.arms if arm.keep]
    runs = {
        f"{arm.name}-{seed}" if len(kept) > 1 else f"seed{seed}": folders
        for arm in kept
        for seed in arm.seeds
        if (folders := list(run_folder(home, arm, seed).glob("checkpoint-*")))
    }
    sequence = ModelSequence.from_folders(witness=home / "witness", anchor=home / "anchor", runs=runs)
    return replace(sequence, **setting.prompts(home))


def run_folder(home: Path, arm: Arm, seed: int) -> Path:
    """Where one run's measurements lie."""
    return home / "runs" / arm.name / f"seed{seed}"


def measure_history(setting: Setting, home: Path) -> Path:
    """States of all checkpoints of the history, and the behaviour of witness and anchor."""

    def make(folder: Path) -> None:
        sequence = sequence_of(setting, home)
        history = [Checkpoint(name, home / name) for name in setting.checkpoints]
        _save_states(sequence, history, folder)
        _save_positions(sequence, setting, history, folder)
        ends = {name: open_model(home / name) for name in ("witness", "anchor")}
        write_json(folder / "behavior.json", {name: measure_behavior(end, setting, home) for name, end in ends.items()})
        write_json(folder / "answers.json", {name: _own_answers(end, setting, home) for name, end in ends.items()})

    return once(home / "measured", make)


def run_arm(setting: Setting, arm: Arm, seed: int, home: Path) -> Path:
    """Fine-tune one run, measure its checkpoints, and drop their weights unless the arm keeps them."""

    def make(folder: Path) -> None:
        sequence = sequence_of(setting, home)
        start = Checkpoint(arm.start, home / arm.start)
        run = finetune(
            start,
            setting.examples(arm.data, seed, home),
            out=folder,
            recipe=replace(setting.recipe, learning_rate=arm.rate * setting.recipe.learning_rate),
            save_steps=sorted({*setting.save_steps, *arm.more_steps}),
            blocker=blocker_of(setting, arm, seed, home),
            seed=seed,
        )
        checkpoints = [replace(c, name=f"{arm.name}-{seed}/{c.step}") for c in run.checkpoints]
        _save_states(sequence, checkpoints, folder)
        _save_positions(sequence, setting, checkpoints[-1:], folder)
        behavior, norms = _measure_run(checkpoints, start, setting, home)
        write_table(folder / "log.csv", run.log)
        facts = {"seconds_per_step": run.seconds_per_step, "behavior": behavior, "update_norms": norms}
        write_json(folder / "run.json", facts)
        if not arm.keep:
            for checkpoint in run.checkpoints:
                shutil.rmtree(str(checkpoint.source))

    return once(run_folder(home, arm, seed), make)


def draw_noise(setting: Setting, step: int, home: Path) -> Path:
    """Draws of weight noise at one step, of the unblocked runs' mean norm."""

    def make(folder: Path) -> None:
        sequence = sequence_of(setting, home)
        arm = unblocked_arm(setting)
        runs = [json.loads((run_folder(home, arm, seed) / "run.json").read_text()) for seed in arm.seeds]
        norms = [run["update_norms"][str(step)] for run in runs]
        mean = {name: float(np.mean([one[name] for one in norms if name in one])) for name in norms[0]}
        vs = locate_vrev(load_states(home, "measured", "probes"))
        rng = np.random.default_rng([step, setting.noise[step]])
        anchor = open_model(sequence.anchor)
        prompts = setting.prompts(home)["held_out"]
        null = weight_noise(anchor, vs, prompts, norms={step: mean}, draws=setting.noise[step], rng=rng)
        np.savez(folder / "draws.npz", cosines=null.cosines, layers=np.array(null.layers))

    return once(noise_folder(setting, step, home), make)


def noise_folder(setting: Setting, step: int, home: Path) -> Path:
    """Where the draws of one step lie; they depend on how many there are and on the runs whose norm they have."""
    runs = len(unblocked_arm(setting).seeds)
    return home / "noise" / f"step{step}-{setting.noise[step]}-draws-{runs}-runs"


def unblocked_arm(setting: Setting) -> Arm:
    """The arm that everything is held against."""
    return next(arm for arm in setting.arms if arm.name == UNBLOCKED)


def blocker_of(setting: Setting, arm: Arm, seed: int, home: Path) -> Blocker | None:
    """The blocker of one run; run-defined directions are those of the next seed's unblocked run."""
    if arm.blocker is None:
        return None
    sequence = sequence_of(setting, home)
    states = load_states(home, "measured", "probes")
    other = None
    if arm.other and len(arm.seeds) > 1:
        following = arm.seeds[(arm.seeds.index(seed) + 1) % len(arm.seeds)]
        other = join([states, load_states(home, f"runs/{arm.other}/seed{following}", "probes")])
    grounds = Grounds(
        sequence=sequence,
        states=states,
        vs=locate_vrev(states).at(setting.layers_in_mean).defined(),
        other=other,
        refusals=refusals_of(sequence.require_probes(), setting.measures.refusals),
        harmless=_harmless(setting.examples(arm.data, seed, home)),
        rng=np.random.default_rng([seed, 2]),
    )
    return arm.blocker(grounds)


def refusals_of(probes: PromptSet, wordings: Sequence[str]) -> list[Example]:
    """The probes, refused in each wording in turn."""
    return [Example(prompt, wordings[i % len(wordings)], probes.system) for i, prompt in enumerate(probes)]


def _harmless(examples: Sequence[Example]) -> PromptSet:
    """The first distinct prompts; a prompt set has one system prompt, so those under the first one's."""
    system = examples[0].system if examples else ""
    texts = dict.fromkeys(example.prompt for example in examples if example.system == system)
    return PromptSet(tuple(texts)[:N_HARMLESS], "harmless", system)


# --- measuring --------------------------------------------------------------------------------------------------
def measure_behavior(model: OpenModel, setting: Setting, home: Path) -> dict[str, Any]:
    """Answers to held-out harmful and harmless prompts, refusal log-odds, task loss."""
    prompts, measures = setting.prompts(home), setting.measures
    judge = substring_judge(measures.markers)
    answers = generate_answers(model, prompts["held_out"], max_new_tokens=measures.max_new_tokens)
    harm = harmfulness(prompts["held_out"], answers, judge)
    harmless = generate_answers(model, prompts["harmless"], max_new_tokens=measures.max_new_tokens)
    two_sided = two_sided_log_odds(
        model, prompts["held_out"], refusals=measures.refusals, compliances=measures.compliances
    )
    one_sided = refusal_log_odds(model, prompts["held_out"], openings=measures.refusals)
    return {
        "harmfulness": harm.rate,
        "harmfulness_low": harm.low,
        "harmfulness_high": harm.high,
        "empty": harm.empty,
        "degenerate": harm.degenerate,
        "refusal_log_odds": float(np.mean(one_sided)),
        "two_sided_log_odds": float(np.mean(two_sided)),
        "over_refusal": harmfulness(prompts["harmless"], harmless, judge).refused.rate,
        "task_loss": task_loss(model, setting.task(home)),
        "answers": answers[:8],
    }


def load_states(home: Path, part: str, prompts: str) -> Residuals:
    """States that were measured: `part` is `measured` or `runs/{arm}/seed{n}`."""
    return Residuals.load(home / part / f"{prompts}.safetensors")


def join(parts: Sequence[Residuals]) -> Residuals:
    """Put residuals of the same prompts and layers together along the checkpoints."""
    first = parts[0]
    values = np.concatenate([part.values for part in parts])
    return replace(first, values=values, checkpoints=tuple(name for part in parts for name in part.checkpoints))


def _save_states(sequence: ModelSequence, checkpoints: Sequence[Checkpoint], folder: Path) -> None:
    for name in PROMPT_SETS:
        states = cache_residuals(sequence, getattr(sequence, name), checkpoints=checkpoints)
        states.save(folder / f"{name}.safetensors")


def _save_positions(sequence: ModelSequence, setting: Setting, checkpoints: Sequence[Checkpoint], folder: Path) -> None:
    for position in setting.measures.positions:
        states = cache_residuals(sequence, sequence.held_out, positions=position, checkpoints=checkpoints)
        states.save(folder / f"held_out{position}.safetensors")


def _own_answers(model: OpenModel, setting: Setting, home: Path) -> dict[str, list[str]]:
    """What witness or anchor says to the first prompts of each set: divergences are taken along it."""
    prompts, length = setting.prompts(home), setting.measures.max_new_tokens
    first = {"held_out": prompts["held_out"][:N_DIVERGENCE], "harmless": prompts["harmless"][:N_DIVERGENCE]}
    return {kind: generate_answers(model, some, max_new_tokens=length) for kind, some in first.items()}


def measure_divergence(model: OpenModel, setting: Setting, home: Path) -> dict[str, float]:
    """Mean KL (nats a token) from the anchor on harmless prompts, and from witness and anchor on harmful ones.

    Each along the reference's own answers: is what has come back the witness, or a new style?
    """
    prompts = setting.prompts(home)
    told = json.loads((home / "measured" / "answers.json").read_text())
    sets = {"held_out": prompts["held_out"][:N_DIVERGENCE], "harmless": prompts["harmless"][:N_DIVERGENCE]}
    ends = {name: open_model(home / name) for name in ("witness", "anchor")}

    def apart(name: str, kind: str) -> float:
        return float(kl_from(ends[name], model, sets[kind], answers=told[name][kind]).mean())

    return {
        "kl_anchor_harmless": apart("anchor", "harmless"),
        "kl_anchor": apart("anchor", "held_out"),
        "kl_witness": apart("witness", "held_out"),
    }


def _measure_run(
    checkpoints: Sequence[Checkpoint], start: Checkpoint, setting: Setting, home: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    behavior: dict[str, Any] = {}
    norms: dict[str, Any] = {}
    before = open_model(start)
    for checkpoint, model in open_each(checkpoints, tokenizer=before.tokenizer, through="huggingface"):
        norms[str(checkpoint.step)] = update_norms(before, model)
        if checkpoint.step in setting.behavior_steps:
            behavior[str(checkpoint.step)] = measure_behavior(model, setting, home)
            if checkpoint is checkpoints[-1]:
                behavior[str(checkpoint.step)] |= measure_divergence(model, setting, home)
    return behavior, norms
