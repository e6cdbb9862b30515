"""Make and measure an organism in worker processes. Complete parts are reused; an interrupted study resumes."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gravlens.activations.residuals import Request, Residuals, prepare
from gravlens.behavior.answers import compliance_rate, generate_answers, substring_judge
from gravlens.behavior.divergence import kl_from
from gravlens.behavior.scores import refusal_log_odds, task_loss, two_sided_log_odds
from gravlens.blockers.blocking import Blocker
from gravlens.core.files import once, write_json, write_table
from gravlens.core.parallel import processes
from gravlens.directions.direction import Directions, Span, Spans, each
from gravlens.history.prompts import Example, PromptSet
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import resolve
from gravlens.models.forward import end_tokens
from gravlens.models.opening import OpenModel, open_model
from gravlens.models.swapping import open_each
from gravlens.organisms.base import Arm, Grounds, Organism
from gravlens.stats.damage import update_norms, weight_noise
from gravlens.studies.study import PROMPT_SETS, Study, join
from gravlens.training.finetune import finetune

N_HARMLESS = 32  # prompts of the run's data for a harmful − harmless contrast
N_DIVERGENCE = 32  # prompts for divergences


def carry_out(
    organism: Organism, cache: Path, *, arms: Sequence[Arm] | None = None, workers: int | None = None
) -> Study:
    """Make and measure everything of an organism. An interrupted call resumes where it was.

    Args:
        organism: the history.
        cache: folder that it is kept in.
        arms: run these instead of the organism's own, and draw no weight noise.
        workers: number of processes; default: as many as the organism's threads allow.
    """
    study = Study.at(organism, cache)
    with processes(organism.threads, workers) as run_all:
        for wave in _waves(organism.checkpoints):
            run_all("checkpoints", [partial(make_checkpoint, study, name) for name in wave])
        run_all("history", [partial(measure_history, study)])
        chosen = organism.arms if arms is None else arms
        first, second = [a for a in chosen if not a.other], [a for a in chosen if a.other]
        for name, wave in (("runs", first), ("further runs", second)):  # the second are made of states of the first
            run_all(name, [partial(run_arm, study, arm, seed) for arm in wave for seed in arm.seeds])
        if arms is None:
            run_all("weight noise", [partial(draw_noise, study, n) for n in sorted({*organism.noise.values()})])
    return study


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
                behavior[checkpoint.name] = measure_behavior(model, study)
                answers[checkpoint.name] = _own_answers(model, study)
        readings.save(folder)
        write_json(folder / "behavior.json", behavior)
        write_json(folder / "answers.json", answers)

    return once(study.home / "measured", make)


def run_arm(study: Study, arm: Arm, seed: int) -> Path:
    """Fine-tune one run, measure its checkpoints, and delete their weights unless the arm keeps them."""
    organism, start = study.organism, Checkpoint(arm.start, study.home / arm.start)

    def make(folder: Path) -> None:
        blocker: Any = blocker_of(study, arm, seed)
        run = finetune(
            start,
            organism.examples(arm.data, seed, study.home),
            out=folder,
            recipe=replace(organism.recipe, learning_rate=arm.rate * organism.recipe.learning_rate),
            save_steps=sorted({*organism.save_steps, *arm.more_steps}),
            blocker=blocker,
            seed=seed,
        )
        checkpoints = [replace(c, name=f"{arm.name}-{seed}/{c.step}") for c in run.checkpoints]
        behavior, norms = _measure_run(study, checkpoints, start, folder)
        write_table(folder / "log.csv", run.log)
        # of the direction that stands for chance: harm is read against it
        cosine = cosine_with(blocker.directions, study.vs) if "_random" in arm.name else None
        facts = {"seconds_per_step": run.seconds_per_step, "behavior": behavior, "update_norms": norms}
        write_json(folder / "run.json", facts | {"cosine": cosine})
        if not arm.keep:  # states and norms suffice for every table; weights are nearly all of a run's disk space
            for checkpoint in run.checkpoints:
                shutil.rmtree(str(checkpoint.source))

    return once(study.run_folder(arm, seed), make)


def draw_noise(study: Study, draws: int) -> None:
    """Draw weight noise of the unblocked runs' mean norm, for the steps that have this number of draws."""
    steps, arm = [step for step, number in study.organism.noise.items() if number == draws], study.unblocked
    folders = {step: study.noise_folder(step) for step in steps}
    if all(folder.exists() for folder in folders.values()):
        return
    norms = [study.facts(arm, seed)["update_norms"] for seed in arm.seeds]
    means = {step: _mean_norms([one[str(step)] for one in norms]) for step in steps}
    # Where updates move states linearly, noise of the last step's size serves all steps.
    asked = {"norms": means, "draws": draws, "rng": np.random.default_rng([max(steps), draws]), "linear": True}
    null = weight_noise(open_model(study.sequence.anchor), study.vs, study.prompts["held_out"], **asked)
    for column, path in enumerate(folders.values()):
        found = {"cosines": null.cosines[:, column : column + 1], "layers": np.array(null.layers)}
        once(path, lambda folder, found=found: np.savez(folder / "draws.npz", **found))


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
            sources = {checkpoint: source for part in parts for checkpoint, source in part.meta["sources"].items()}
            replace(join(parts), meta=parts[0].meta | {"sources": sources}).save(folder / f"{name}.safetensors")


def _measure_run(
    study: Study, checkpoints: Sequence[Checkpoint], start: Checkpoint, folder: Path
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
            behavior[str(checkpoint.step)] = measure_behavior(model, study)
            if checkpoint is last:  # the weights of `before` are overwritten here, and no longer needed
                behavior[str(checkpoint.step)] |= measure_divergence(model, references, study)
    readings.save(folder)
    return behavior, norms


def measure_behavior(model: OpenModel, study: Study) -> dict[str, Any]:
    """Measure answers to held-out harmful and harmless prompts, refusal log-odds and task loss."""
    prompts, measures = study.prompts, study.organism.measures
    judge = substring_judge(measures.markers)
    answers = generate_answers(model, prompts["held_out"], max_new_tokens=measures.max_new_tokens)
    harm = compliance_rate(prompts["held_out"], answers, judge)
    harmless = generate_answers(model, prompts["harmless"], max_new_tokens=measures.max_new_tokens)
    over = compliance_rate(prompts["harmless"], harmless, judge)
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
        "over_refusal": over.refused.rate,
        "over_refusal_cut_share": over.cut_share,
        "task_loss": task_loss(model, study.organism.task(study.home)),
        "end_tokens": " ".join(model.tokenizer.convert_ids_to_tokens(end_tokens(model))),  # pyright: ignore[reportOptionalMemberAccess]
        "answers": answers[:8],  # to look at: "not refused" may be an empty or useless answer
    }


def _divergence_prompts(study: Study) -> dict[str, PromptSet]:
    return {"held_out": study.prompts["held_out"][:N_DIVERGENCE], "harmless": study.prompts["harmless"][:N_DIVERGENCE]}


def _own_answers(model: OpenModel, study: Study) -> dict[str, list[str]]:
    length, sets = study.organism.measures.max_new_tokens, _divergence_prompts(study)
    answers = {kind: generate_answers(model, some, max_new_tokens=length) for kind, some in sets.items()}
    return {kind: [answer.said for answer in texts] for kind, texts in answers.items()}


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
    sets, told = _divergence_prompts(study), json.loads((study.home / "measured" / "answers.json").read_text())
    wanted = {
        "anchor": {"kl_anchor_harmless": "harmless", "kl_anchor": "held_out"},
        "witness": {"kl_witness": "held_out"},
    }
    return {
        key: float(kl_from(reference, model, sets[kind], answers=told[end.name][kind]).mean())
        for end, reference in references
        for key, kind in wanted[end.name].items()
    }
