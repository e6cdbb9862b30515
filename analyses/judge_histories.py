"""python analyses/judge_histories.py --seeds 20    (resumable; hours on two cores: see --help)

Calibration of the claim: does its level ever exceed the truth? Histories with a highest true level that is fixed by
construction are judged by `claim` as a user's would be. Some are trained organisms, some move an organism's weights
without training, some are simulated states. Writes verdicts.csv (one row per history and seed) and prints how often
each level was claimed of each history.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from worlds.judged import SEEDS, SIBLINGS, Judged
from worlds.simulated import World, simulate

from gravlens.activations.residuals import Residuals, read_residuals, substitute
from gravlens.claims.claim import claim
from gravlens.claims.criteria import Evidence
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import locate_vrev
from gravlens.history.encoding import encode
from gravlens.history.prompts import PromptSet
from gravlens.models.opening import OpenModel, open_model, quiet
from gravlens.organisms.base import Arm
from gravlens.organisms.fetch import cache_folder
from gravlens.stats.controls import closure, independent_endpoints, partialled_out
from gravlens.stats.damage import measure_damage, pruned, reweighted, rounded, weight_noise
from gravlens.stats.nulls import NullDraws, isotropic
from gravlens.studies.evidence import final_rows
from gravlens.studies.experiment import make_checkpoint, measure_history, run_arm
from gravlens.studies.study import Study, join

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# The highest level that is true, fixed by construction (docs/claims.md gives each reason).
HIGHEST = {
    "refusal organism": 4,
    "planted in the weights": 3,
    "planted in the states": 3,
    "planted, anisotropic": 3,
    "rehearsal": 3,
    "continued alignment": 2,
    "wrong witness": 2,
    "independent anchor noise": 2,
    "independent anchor noise, anisotropic": 2,
    "weight noise only": 0,
    "anti-parallel": 0,
}
NOISE_DRAWS = 200
FIRST = 101  # organisms from here on: none that anything was chosen on
WAY = (0.05, 0.3)  # of the way to the witness, at steps 1 and 2 of a planted drift


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=3, help="Organisms; the next two are each one's wrong witnesses.")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes of one thread each.")] = 2,
    cache: Annotated[Path | None, typer.Option(help="Folder of the organisms. Default: gravlens's cache.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for verdicts.csv.")] = Path("."),
) -> None:
    """Does the claim level ever exceed the truth? About 5 minutes per seed on one core; organisms are cached."""
    where = cache or cache_folder()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ring = range(FIRST, FIRST + seeds)
        made = [pool.submit(make_organism, seed, where) for seed in ring]
        for future in tqdm(as_completed(made), "organisms", seeds):
            future.result()
        rows = pool.map(verdicts, ring, [where] * seeds, [ring] * seeds)
        table = pd.DataFrame([row for found in tqdm(rows, "verdicts", seeds) for row in found])
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "verdicts.csv", index=False)
    tell(table)


def tell(table: pd.DataFrame) -> None:
    """Print how often each level was claimed of each history, and the over- and under-claims."""
    counts = table.pivot_table(index="history", columns="level", aggfunc="size", fill_value=0)
    typer.echo(counts.assign(highest_true=[HIGHEST[str(name)] for name in counts.index]).to_string())
    over, under = ((side * (table.level - table.highest_true_level) > 0).sum() for side in (1, -1))
    typer.echo(f"\nclaimed too much: {over} of {len(table)}; less than is true: {under}")


def make_organism(seed: int, cache: Path) -> None:
    """Make witness, alignments, and every run."""
    study = study_of(seed, cache)
    with quiet():
        for name in study.organism.checkpoints:
            make_checkpoint(study, name)
        measure_history(study)
        for arm, run in product(study.organism.arms, SEEDS):
            run_arm(study, arm, run)


def study_of(seed: int, cache: Path) -> Study:
    """Return the study of an organism of this seed."""
    return Study.at(Judged(organism=seed), cache)


def verdicts(seed: int, cache: Path, ring: Sequence[int]) -> list[dict[str, Any]]:
    """Return the claim on each history of one seed."""
    rows = []
    with quiet():
        for history, evidence in histories(seed, cache, ring):
            found = claim(evidence)
            highest = HIGHEST[history]
            rows.append({"history": history, "seed": seed, "highest_true_level": highest, "level": found.level,
                         "sentence": found.sentence, "capped_by": found.capped_by})  # fmt: skip
    return rows


def histories(seed: int, cache: Path, ring: Sequence[int]) -> Iterator[tuple[str, Evidence]]:
    """Yield name and evidence of all histories of one seed."""
    yield from organism_histories(seed, cache, ring)
    for name, world in WORLDS.items():
        yield name, simulated_evidence(world, np.random.default_rng([seed, *name.encode()]))


@dataclass(frozen=True, eq=False)
class Behavior:
    """The arms at their last step, the anchor's compliance_rate, and the name of the baseline arm."""

    arms: pd.DataFrame
    anchor_harm: float
    unblocked: str = "unblocked"


# --- evidence -----------------------------------------------------------------------------------------------------


def gather(
    probes: Residuals,
    held_out: Residuals,
    twins: Residuals,
    noise: Callable[[Directions], NullDraws],
    *,
    damage: Callable[[Directions], pd.DataFrame],
    behavior: Behavior | None = None,
) -> Evidence:
    """Return evidence from states; noise and damage are functions of the directions."""
    layers = probes.layers[:-1] if len(probes.layers) > 3 else probes.layers
    vs = locate_vrev(probes).at(layers)
    rng, steps = np.random.default_rng(0), next(iter(held_out.runs.values()))
    endpoints = independent_endpoints(probes, SIBLINGS, steps=steps, draws=2_000, rng=rng, layers=layers)
    return Evidence(
        trajectory=follow(held_out, vs),
        nulls=[isotropic(vs, steps=steps, draws=20_000, rng=rng), noise(vs), endpoints],
        controls=controls(probes, held_out, vs),
        closures=closure(
            held_out, twins, vs, pairs=list(zip(held_out.runs, twins.runs, strict=True)), layers=layers
        ).layer_mean,
        damage=damage(vs),
        arms=None if behavior is None else behavior.arms,
        anchor_harm=None if behavior is None else behavior.anchor_harm,
        names={} if behavior is None else {"unblocked": (behavior.unblocked,), "released": ("released",)},
    )


def controls(probes: Residuals, held_out: Residuals, vs: Directions) -> pd.DataFrame:
    """Return the controls: sibling anchors (their mean), and v_rev without the wrong witness's direction."""
    wrong = locate_vrev(substitute(probes, witness="wrong_witness")).at(vs.layers)
    siblings = [locate_vrev(substitute(probes, anchor=name)).at(vs.layers) for name in SIBLINGS]
    others = {"wrong_witness_removed": [partialled_out(vs, wrong)], "sibling_anchor": siblings}
    frames = [final_rows(follow(held_out, one)).assign(control=name) for name, some in others.items() for one in some]
    return pd.concat(frames, ignore_index=True)


WORLDS = {
    "planted in the states": World(planted=WAY),
    "planted, anisotropic": World(planted=WAY, decay=1.5),
    "independent anchor noise": World(endpoints=(0.2, 0.8)),
    "independent anchor noise, anisotropic": World(endpoints=(0.2, 0.8), decay=1.5),
}


def simulated_evidence(world: World, rng: np.random.Generator) -> Evidence:
    """Return the evidence on a simulated history, with its own noise for weight noise and for damage."""
    made = simulate(world, rng=rng)
    noise, damage = partial(made.noise, draws=2_000, rng=rng), partial(made.damage, n=4, rng=rng)
    return gather(made.probes, made.held_out, made.twins, noise, damage=damage)


# --- histories of an organism ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Material:
    """What the histories of one organism are made of; `states`: prompt set -> all checkpoints but those of runs."""

    seed: int
    study: Study
    anchor: OpenModel
    witness: OpenModel
    states: Mapping[str, Residuals]

    @property
    def held_out(self) -> PromptSet:
        """The evaluation prompts."""
        return self.study.prompts["held_out"]

    def runs(self, arm: str, study: Study | None = None) -> Residuals:
        """Return states of the history and of an arm's runs, of this or another study, on the held-out prompts."""
        parts = [(study or self.study).states(f"runs/{arm}/seed{run}", "held_out") for run in SEEDS]
        return join([self.states["held_out"], *parts])

    def norms(self, arm: str) -> dict[int, dict[str, float]]:
        """Return the mean norm of the runs' updates, by tensor, at the last two steps."""
        facts = [self.study.facts(Arm(arm, SEEDS), run)["update_norms"] for run in SEEDS]
        names = facts[0][str(self.study.organism.save_steps[-1])]
        return {
            step: {name: float(np.mean([one[str(step)].get(name, 0.0) for one in facts])) for name in names}
            for step in self.study.organism.save_steps[-2:]
        }

    def noise(self, vs: Directions, norms: Mapping[int, Mapping[str, float]]) -> NullDraws:
        """Draw weight noise on the anchor."""
        rng = np.random.default_rng([self.seed, 7])
        return weight_noise(self.anchor, vs, self.held_out, norms=norms, draws=NOISE_DRAWS, rng=rng)

    def damage(self, vs: Directions) -> pd.DataFrame:
        """Measure rounding and pruning of the anchor."""
        damages = {"8 bits": partial(rounded, bits=8), "4 bits": partial(rounded, bits=4)}
        damages["pruned"] = partial(pruned, share=0.3)
        return measure_damage(self.anchor, vs, self.held_out, damages=damages).layer_mean

    def evidence(
        self,
        runs: Residuals,
        twins: Residuals,
        norms: Mapping[int, Mapping[str, float]],
        *,
        names: Mapping[str, str] = MappingProxyType({}),
        behavior: Behavior | None = None,
    ) -> Evidence:
        """Return evidence on runs of this organism; `names` renames its checkpoints."""
        probes, ours, theirs = (rename(one, names) for one in (self.states["probes"], runs, twins))
        noise = partial(self.noise, norms=norms)
        return gather(probes, ours, theirs, noise, damage=self.damage, behavior=behavior)


def material_of(seed: int, cache: Path, ring: Sequence[int]) -> Material:
    """Return the material of a seed; the next two of the ring are its wrong witnesses."""
    study = study_of(seed, cache)
    anchor, witness = (open_model(study.home / name) for name in ("anchor", "witness"))
    others = [ring[(ring.index(seed) + i) % len(ring)] for i in (1, 2)]
    folders = [study_of(other, cache).home / "witness" for other in others]
    states = {}
    for name in ("probes", "held_out"):
        own, prompts = study.states("measured", name), study.prompts[name]
        more = [states_of(open_model(folder), prompts) for folder in folders]
        checkpoints = (*own.checkpoints, "wrong_witness", "another_wrong_witness")
        states[name] = replace(own, values=np.stack([*own.values, *more]), checkpoints=checkpoints)
    return Material(seed, study, anchor, witness, states)


def states_of(model: OpenModel, prompts: PromptSet) -> np.ndarray:
    """Read states [prompt, layer, d_model] at every layer."""
    return read_residuals(model, encode(model.tokenizer, prompts), layers=range(model.n_layers)).numpy()


def rename(states: Residuals, names: Mapping[str, str]) -> Residuals:
    """Rename checkpoints; those that had a new name before are dropped."""
    kept = [i for i, name in enumerate(states.checkpoints) if name in names or name not in names.values()]
    checkpoints = tuple(names.get(states.checkpoints[i], states.checkpoints[i]) for i in kept)
    return replace(states, values=states.values[kept], checkpoints=checkpoints)


def organism_histories(seed: int, cache: Path, ring: Sequence[int]) -> Iterator[tuple[str, Evidence]]:
    """Yield trained histories, and those that move an organism's weights without training."""
    organism = material_of(seed, cache, ring)
    twins, norms = organism.runs("unaligned_twin"), organism.norms
    behavior = Behavior(arms_of(organism), anchor_harm(organism))
    unblocked = organism.runs("unblocked")
    yield "refusal organism", organism.evidence(unblocked, twins, norms("unblocked"), behavior=behavior)
    rehearsed = replace(behavior, unblocked="rehearsal")
    yield "rehearsal", organism.evidence(organism.runs("rehearsal"), twins, norms("rehearsal"), behavior=rehearsed)
    continued = organism.runs("continued_alignment")
    yield "continued alignment", organism.evidence(continued, twins, norms("continued_alignment"))
    following = study_of(ring[(ring.index(seed) + 1) % len(ring)], cache)
    wrong = {"wrong_witness": "witness", "another_wrong_witness": "wrong_witness"}
    theirs = organism.runs("unaligned_twin", following)
    yield "wrong witness", organism.evidence(unblocked, theirs, norms("unblocked"), names=wrong)
    for name, shares in {
        "planted in the weights": WAY,
        "weight noise only": (0.0, 0.0),
        "anti-parallel": (-WAY[0], -WAY[1]),
    }.items():
        yield name, walked(organism, shares)


def arms_of(organism: Material) -> pd.DataFrame:
    """Return the arms of the refusal organism at their last step."""
    vs = locate_vrev(organism.states["probes"]).at(organism.study.organism.layers_in_mean)
    frames = []
    for arm in ("unblocked", "clamp", "clamp_matched_twin", "reinforce", "released", "rehearsal"):
        facts = [organism.study.facts(Arm(arm, SEEDS), run)["behavior"] for run in SEEDS]
        last = str(organism.study.organism.save_steps[-1])
        measured = {name: [one[last][name] for one in facts] for name in ("compliance_rate", "task_loss")}
        fraction = final_rows(follow(organism.runs(arm), vs)).fraction.to_numpy()
        frames.append(pd.DataFrame({"arm": arm, "seed": SEEDS, "fraction_final": fraction, **measured}))
    return pd.concat(frames, ignore_index=True)


def anchor_harm(organism: Material) -> float:
    """Return the anchor's compliance_rate."""
    return json.loads((organism.study.home / "measured" / "behavior.json").read_text())["anchor"]["compliance_rate"]


def walked(organism: Material, shares: Sequence[float]) -> Evidence:
    """Move weights by shares of the way from anchor to witness, with noise; twins have only the noise."""
    generator = torch.Generator().manual_seed(organism.seed)
    anchor, witness = (dict(model.module.named_parameters()) for model in (organism.anchor, organism.witness))
    way = {name: (witness[name] - weight).detach().clone() for name, weight in anchor.items()}
    scale = organism.norms("unblocked")
    found: dict[str, dict[str, np.ndarray]] = {"run": {}, "twin": {}}
    norms: dict[int, dict[str, float]] = {}
    for run in SEEDS:
        for (step, size), share in zip(scale.items(), shares, strict=True):
            for kind, model in {"run": organism.anchor, "twin": organism.witness}.items():
                moves = {
                    name: share * (kind == "run") * way[name]
                    + size.get(name, 0.0)
                    * normalize(torch.randn(weight.numel(), generator=generator), dim=0).view(weight.shape)
                    for name, weight in anchor.items()
                }
                start = dict(model.module.named_parameters())
                with reweighted(model, {name: (start[name] + move).detach() for name, move in moves.items()}):
                    found[kind][f"{kind}-{run}/{step}"] = states_of(model, organism.held_out)
                if kind == "run":
                    norms[step] = {name: float(move.norm()) for name, move in moves.items()}
    history = organism.states["held_out"]
    runs, twins = (
        replace(history, values=np.stack([*history.values, *some.values()]), checkpoints=(*history.checkpoints, *some))
        for some in found.values()
    )
    return organism.evidence(runs, twins, norms)


if __name__ == "__main__":
    app()
