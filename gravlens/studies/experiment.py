"""Make and measure an organism in worker processes. Complete parts are reused; an interrupted study resumes."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gravlens.activations.residuals import Request, Residuals, cache_residuals, prepare
from gravlens.behavior.answers import Answer, compliance_rate, generate_answers, substring_judge
from gravlens.behavior.divergence import kl_from
from gravlens.behavior.scores import refusal_log_odds, task_loss, two_sided_log_odds
from gravlens.blockers.blocking import Blocker
from gravlens.claims.preregistration import ALPHA, Preregistration
from gravlens.core.errors import read_object
from gravlens.core.files import is_whole, once, write_json, write_table, write_tensors
from gravlens.core.parallel import processes
from gravlens.directions.direction import Directions, Span, Spans, each
from gravlens.directions.trajectory import ByLayer
from gravlens.history.prompts import Example, PromptSet, shuffled_words
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import resolve
from gravlens.models.forward import end_tokens
from gravlens.models.opening import OpenModel, open_model
from gravlens.models.swapping import open_each
from gravlens.organisms.base import Arm, Grounds, Organism
from gravlens.stats.damage import Damage, measure_damage, pruned, rounded, sign_flipped, update_norms, weight_noise
from gravlens.studies.study import DRAWS, PROMPT_SETS, Study, join
from gravlens.training.finetune import Finetuned, finetune

OTHER_PROMPTS = ("harmless", "shuffled_words")
N_HARMLESS = 32  # prompts of the run's data for a harmful − harmless contrast
N_DIVERGENCE = 32  # prompts for divergences


def carry_out(
    organisms: Mapping[str, Organism], cache: Path, *, arms: Sequence[Arm] | None = None, workers: int | None = None
) -> dict[str, Study]:
    """Make and measure everything of some organisms, side by side. An interrupted call resumes where it was.

    Args:
        organisms: name -> history.
        cache: folder that they are kept in.
        arms: run these instead of the organisms' own, and draw no weight noise.
        workers: number of processes; default: as many as the organisms' threads allow.
    """
    studies = {name: Study.at(organism, cache) for name, organism in organisms.items()}
    made = list(studies.values())
    with processes(max((study.organism.threads for study in made), default=1), workers) as run_all:
        for wave in zip_longest(*(_waves(study.organism.checkpoints) for study in made), fillvalue=[]):
            jobs = [
                partial(make_checkpoint, study, name) for study, names in zip(made, wave, strict=True) for name in names
            ]
            run_all("checkpoints", jobs)
        run_all("witness and anchor", [partial(measure_history, study) for study in made])
        for study in made:
            preregister(study)
        runs = [(study, arm) for study in made for arm in (study.organism.arms if arms is None else arms)]
        for name, second in (("runs", False), ("further runs", True)):  # the second are made of states of the first
            chosen = [(study, arm, seed) for study, arm in runs if bool(arm.other) is second for seed in arm.seeds]
            run_all(name, [partial(run_arm, *one) for one in chosen])
        if arms is None:
            noise = [partial(draw_noise, study, n) for study in made for n in sorted({*study.organism.noise.values()})]
            run_all("nulls and damage", [*noise, *(job for study in made for job in read_more(study))])
    return studies


def preregister(study: Study) -> None:
    """Fix layers, step, α and prompts in a file before the first run; of runs that exist it would be too late."""
    path, organism, prompts = study.home / "preregistration.toml", study.organism, study.prompts
    if not path.exists() and not study.unblocked.recorded:
        layers, digests = tuple(sorted(organism.layers_in_mean)), (prompts["probes"].digest, prompts["held_out"].digest)
        fixed = Preregistration(layers, organism.save_steps[-1], ALPHA, *digests, "compliance_rate", date.today())
        fixed.write(path)


def _waves(checkpoints: Mapping[str, str | None]) -> Iterator[list[str]]:
    """Yield names in the order of making; one wave starts from checkpoints of the waves before, so it is parallel."""
    made: set[str | None] = {None}
    while left := [name for name in checkpoints if name not in made]:
        wave = [name for name in left if checkpoints[name] in made]
        yield wave
        made.update(wave)


def make_checkpoint(study: Study, name: str) -> Path:
    """Make one checkpoint of the history."""
    start = study.organism.checkpoints[name]
    origin = None if start is None else study.home / start
    return once(study.home / name, lambda folder: study.organism.make(name, origin, folder))


def measure_history(study: Study) -> Path:
    """Read the states of all checkpoints of the history, and measure the behavior of witness and anchor."""

    def make(folder: Path) -> None:
        readings, behavior, answers = Readings(study), {}, {}
        history = [Checkpoint(name, study.home / name) for name in study.organism.checkpoints]
        for checkpoint, model in open_each(history, through="huggingface"):
            readings.read(checkpoint, model, positions=True)
            if checkpoint.name in ("witness", "anchor"):
                given = _answers(model, study)
                behavior[checkpoint.name] = measure_behavior(model, study, given)
                answers[checkpoint.name] = {
                    kind: [one.said for one in some[:N_DIVERGENCE]] for kind, some in given.items()
                }
        readings.save(folder)
        write_json(folder / "behavior.json", behavior)
        write_json(folder / "answers.json", answers)

    return once(study.home / "measured", make)


def run_arm(study: Study, arm: Arm, seed: int) -> Path:
    """Fine-tune one run, measure its checkpoints, and delete their weights unless the arm keeps them.

    A recorded run is measured as it is: nothing of it is trained, copied or deleted.
    """
    start = Checkpoint(arm.start, study.home / arm.start)

    def make(folder: Path) -> None:
        run = None if seed in arm.recorded else _train(study, arm, seed, start, folder)
        found = run.checkpoints if run else study.recorded(arm, seed)
        behavior, norms = _measure_run(study, arm.named(seed, found), start, folder, divergence=not arm.brief)
        seconds = run.seconds_per_step if run else None
        facts = {"seconds_per_step": seconds, "behavior": behavior, "update_norms": norms}
        if run:
            write_table(folder / "log.csv", run.log)
        write_json(folder / "run.json", facts | {"cosine": _cosine(study, arm, seed)})
        if run and not arm.keep:  # states and norms suffice for every table; weights are nearly all of the disk space
            for checkpoint in run.checkpoints:
                shutil.rmtree(str(checkpoint.source))

    return once(study.run_folder(arm, seed), make)


def _train(study: Study, arm: Arm, seed: int, start: Checkpoint, folder: Path) -> Finetuned:
    organism = study.organism
    return finetune(
        start,
        organism.examples(arm.data, seed, study.home),
        out=folder,
        recipe=replace(organism.recipe, learning_rate=arm.rate * organism.recipe.learning_rate),
        save_steps=sorted({*organism.save_steps[-1 if arm.brief else 0 :], *arm.more_steps}),
        blocker=blocker_of(study, arm, seed),
        seed=seed,
    )


def draw_noise(study: Study, draws: int) -> None:
    """Draw weight noise of the unblocked runs' mean norm, for the steps that have this number of draws."""
    steps, arm = [step for step, number in study.organism.noise.items() if number == draws], study.unblocked
    folders = {step: study.noise_folder(step) for step in steps}
    if all(is_whole(folder) for folder in folders.values()):
        return
    norms = [study.facts(arm, seed)["update_norms"] for seed in arm.seeds]
    means = {step: _mean_norms([one[str(step)] for one in norms]) for step in steps}
    # Where updates move states linearly, noise of the last step's size serves all steps.
    asked = {"norms": means, "draws": draws, "rng": np.random.default_rng([max(steps), draws]), "linear": True}
    null = weight_noise(open_model(study.sequence.anchor), study.vs, study.prompts["held_out"], **asked)
    layers = np.array(null.layers)
    for column, path in enumerate(folders.values()):
        drawn = null.cosines[:, column : column + 1]
        arrays = {"cosines": drawn, "layers": layers}
        once(path, lambda folder, arrays=arrays: write_tensors(folder / DRAWS, "noise", arrays, {}))


def _mean_norms(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in runs if name in one])) for name in runs[0]}


def blocker_of(study: Study, arm: Arm, seed: int) -> Blocker | None:
    """Return the blocker of one run. Run-defined directions are those of the next seed's unblocked run."""
    if arm.blocker is None:
        return None
    states, other = study.states("measured", "probes"), None
    if arm.other and len(arm.seeds) > 1:  # another seed's: a run's own drift would be known only after the run
        following = arm.seeds[(arm.seeds.index(seed) + 1) % len(arm.seeds)]
        other = join([states, study.states(f"runs/{arm.other}/seed{following}", "probes")])
    grounds = Grounds(
        sequence=study.sequence,
        states=states,
        vs=study.vs.at(study.organism.layers_in_mean).defined(),
        other=other,
        refusals=refusals_of(study.sequence.require_probes(), study.organism.measures.refusals),
        harmless=_harmless(study.organism.examples(arm.data, seed, study.home)),
        rng=np.random.default_rng([seed, 2]),
    )
    return arm.blocker(grounds)


def cosine_with(spans: Span | Spans, vs: Directions) -> float:
    """Return the mean over the spans' layers of |cos| with v_rev; of a subspace, of v_rev's projection into it."""
    return float(np.mean([np.linalg.norm(span.basis @ vs[span.layer].vector) for span in each(spans)]))


def _cosine(study: Study, arm: Arm, seed: int) -> float | None:
    """Return `cosine_with` of a random direction, which stands for chance: harm is read against it."""
    if "_random" not in arm.name:
        return None
    if arm.directions is not None:
        return cosine_with(Directions.load(arm.directions), study.vs)
    blocker: Any = blocker_of(study, arm, seed)
    return cosine_with(blocker.directions, study.vs)


def refusals_of(probes: PromptSet, wordings: Sequence[str]) -> list[Example]:
    """Return the probes with refusals as answers, in each wording in turn."""
    earlier = probes.earlier or ((),) * len(probes)
    pairs = enumerate(zip(probes, earlier, strict=True))
    return [Example(prompt, wordings[i % len(wordings)], probes.system, turns) for i, (prompt, turns) in pairs]


def _harmless(examples: Sequence[Example]) -> PromptSet:
    # the first distinct prompts under the first one's system prompt: a prompt set has a single system prompt
    system = examples[0].system if examples else ""
    asked = dict.fromkeys((example.prompt, example.earlier) for example in examples if example.system == system)
    kept = [*asked][:N_HARMLESS]
    return PromptSet(tuple(text for text, _ in kept), "harmless", system, tuple(turns for _, turns in kept))


@dataclass(frozen=True)
class Readings:
    """States of checkpoints that are opened one after the other, by the name of the file that they are saved to."""

    study: Study
    parts: dict[str, list[Residuals]] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)  # prompts are encoded once for all checkpoints

    def read(self, checkpoint: Checkpoint, model: OpenModel, *, positions: bool) -> None:
        """Read an open model on probes and held-out prompts, and on the latter at further positions."""
        for name in PROMPT_SETS:
            self._read(name, checkpoint, model, self.study.prompts[name], "last")
        for position in self.study.organism.measures.positions if positions else ():
            self._read(f"held_out{position}", checkpoint, model, self.study.prompts["held_out"], position)

    def _read(self, file: str, checkpoint: Checkpoint, model: OpenModel, prompts: PromptSet, position: Any) -> None:
        # The model in memory, not its folder: it would be loaded again for each prompt set.
        live = replace(checkpoint, source=model.module, tokenizer=model.tokenizer)
        if file not in self.requests:
            self.requests[file] = prepare(self.study.sequence, prompts, positions=position, checkpoints=[live])
        request = replace(self.requests[file], checkpoints=(resolve(live, weights=False),))
        states, sources = request.read(), {checkpoint.name: checkpoint.described}
        self.parts.setdefault(file, []).append(replace(states, meta=states.meta | {"sources": sources}))

    def save(self, folder: Path) -> None:
        """Write one file per prompt set and position."""
        for name, parts in self.parts.items():
            told = [item for part in parts for item in part.meta["sources"].items()]
            # A run's own checkpoints by their names beside the file: `folder` has another name once it is complete.
            sources = {checkpoint: source.removeprefix(f"{folder}/") for checkpoint, source in told}
            replace(join(parts), meta=parts[0].meta | {"sources": sources}).save(folder / f"{name}.safetensors")


def _measure_run(
    study: Study, checkpoints: Sequence[Checkpoint], start: Checkpoint, folder: Path, *, divergence: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    # Two models are loaded in all: `open_each` copies each checkpoint's weights into the same one (8 loads before).
    behavior: dict[str, Any] = {}
    norms: dict[str, Any] = {}
    readings, last = Readings(study), checkpoints[-1]
    ends = [Checkpoint(name, study.home / name) for name in ("anchor", "witness")]
    references = open_each([start, *ends], through="huggingface")
    _, before = next(references)
    for checkpoint, model in open_each(checkpoints, tokenizer=before.tokenizer, through="huggingface"):
        norms[str(checkpoint.step)] = update_norms(before, model)
        readings.read(checkpoint, model, positions=checkpoint is last)
        if checkpoint.step in study.organism.behavior_steps:
            behavior[str(checkpoint.step)] = measure_behavior(model, study, _answers(model, study))
            if divergence and checkpoint is last:  # the weights of `before` are overwritten here, and no longer needed
                behavior[str(checkpoint.step)] |= measure_divergence(model, references, study)
    readings.save(folder)
    return behavior, norms


def _answers(model: OpenModel, study: Study) -> dict[str, list[Answer]]:
    length, asked = study.organism.measures.max_new_tokens, study.prompts.items()
    return {kind: generate_answers(model, some, max_new_tokens=length) for kind, some in asked if kind != "probes"}


def measure_behavior(model: OpenModel, study: Study, given: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Measure answers that were given to held-out and harmless prompts, refusal log-odds and task loss."""
    prompts, measures = study.prompts, study.organism.measures
    judge, answers = substring_judge(measures.markers), given["held_out"]
    harm = compliance_rate(prompts["held_out"], answers, judge)
    over, task = None, study.organism.task(study.home)
    if "harmless" in prompts:
        over = compliance_rate(prompts["harmless"], given["harmless"], judge)
    openings = {"refusals": measures.refusals, "compliances": measures.compliances}
    two_sided = two_sided_log_odds(model, prompts["held_out"], **openings)
    one_sided = refusal_log_odds(model, prompts["held_out"], openings=measures.refusals)
    return {
        "compliance_rate": harm.rate,
        "compliance_rate_low": harm.low,
        "compliance_rate_high": harm.high,
        "empty": harm.empty,
        "degenerate": harm.degenerate,
        "thought_only": harm.thought_only,
        "cut_share": harm.cut_share,
        "refusal_log_odds": float(np.mean(one_sided)),
        "two_sided_log_odds": float(np.mean(two_sided)),
        "over_refusal": over.refused.rate if over else np.nan,
        "over_refusal_cut_share": over.cut_share if over else np.nan,
        "task_loss": task_loss(model, task) if task else np.nan,
        "end_tokens": " ".join(model.tokenizer.convert_ids_to_tokens(end_tokens(model))),  # pyright: ignore[reportOptionalMemberAccess]
        "answers": answers[:8],  # to look at: "not refused" may be an empty or useless answer
    }


def _divergence_prompts(study: Study) -> dict[str, PromptSet]:
    return {name: study.prompts[name][:N_DIVERGENCE] for name in ("held_out", "harmless") if name in study.prompts}


def measure_divergence(
    model: OpenModel, references: Iterator[tuple[Checkpoint, OpenModel]], study: Study
) -> dict[str, float]:
    """Return the mean KL in nats per token from the anchor on harmless prompts, and from both ends on harmful ones.

    Args:
        model: the fine-tuned model.
        references: anchor and witness, opened one after the other.
        study: prompts and answers.
    """
    # Along the reference's own answers: has the witness come back, or has a new style?
    sets, told = _divergence_prompts(study), read_object(study.home / "measured" / "answers.json")
    wanted = {
        "anchor": {"kl_anchor_harmless": "harmless", "kl_anchor": "held_out"},
        "witness": {"kl_witness": "held_out"},
    }
    return {
        key: float(kl_from(reference, model, sets[kind], answers=told[end.name][kind]).mean())
        for end, reference in references
        for key, kind in wanted[end.name].items()
        if kind in sets
    }


# --- nulls and damage -----------------------------------------------------------------------------------------------
def other_prompt_sets(study: Study) -> list[str]:
    """Return the names of the prompt sets on which `other_states` can read the unblocked runs."""
    kept = bool(study.kept(study.unblocked))
    return [name for name in OTHER_PROMPTS if kept and (name != "harmless" or name in study.prompts)]


def other_states(study: Study, name: str) -> Residuals:
    """Read anchor and unblocked runs on harmless prompts, or on the held-out prompts with their words shuffled."""
    prompts = study.prompts["harmless" if name == "harmless" else "held_out"]
    if name == "shuffled_words":
        prompts = shuffled_words(prompts, rng=np.random.default_rng(0))

    def make(folder: Path) -> None:
        checkpoints = [Checkpoint("anchor", study.home / "anchor"), *study.kept(study.unblocked)]
        states = cache_residuals(study.with_runs(), prompts, checkpoints=checkpoints)
        states.save(folder / "states.safetensors")

    made = once(study.home / "other_prompts" / f"{name}-{len(study.unblocked.seeds)}-runs", make)
    return Residuals.load(made / "states.safetensors")


DAMAGES: dict[str, Damage] = {
    "rounded to 8 bits": partial(rounded, bits=8),
    "rounded to 4 bits": partial(rounded, bits=4),
    "smallest 30 % pruned": partial(pruned, share=0.3),
}


def read_more(study: Study) -> list[Callable[[], Any]]:
    """Return the jobs of nulls and damage, whose results are cached below `home`."""
    damage = partial(damage_of, study, study.organism.layers_in_mean)
    return [damage, *(partial(other_states, study, name) for name in other_prompt_sets(study))]


def damage_of(study: Study, layers: Sequence[int]) -> ByLayer:
    """Measure damage of the anchor along v_rev, with the refusal log-odds as score.

    The mirrored update is that of the last unblocked run with weights, if there is one.
    """
    kept = study.kept(study.unblocked)[-1:]
    damages = dict(DAMAGES)
    if kept:
        damages["update mirrored"] = partial(sign_flipped, checkpoint=kept[0])

    def make(folder: Path) -> None:
        anchor, prompts = open_model(study.sequence.anchor), study.prompts["held_out"]
        score = partial(refusal_log_odds, openings=study.organism.measures.refusals)
        found = measure_damage(anchor, study.vs, prompts, damages=damages, layers_in_mean=layers, score=score)
        for name, table in (("damage", found.table), ("damage_layer_mean", found.layer_mean)):
            write_table(folder / f"{name}.csv", table)

    # by name: the repr of a partial holds the address of its function, so it differs in every process
    facts = "|".join([*damages, *(last.name for last in kept)])
    made = once(study.home / "damage_by_layer" / hashlib.sha256(facts.encode()).hexdigest()[:8], make)
    return ByLayer(*(pd.read_csv(made / f"{name}.csv") for name in ("damage", "damage_layer_mean")))
