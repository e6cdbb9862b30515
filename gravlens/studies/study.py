"""An organism and the folder of its checkpoints and measurements: what every function of a study works on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gravlens.activations.residuals import Residuals, from_start
from gravlens.claims.preregistration import Preregistration
from gravlens.core.errors import read_object
from gravlens.core.files import read_tensors
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import Trajectory, follow
from gravlens.directions.vrev import locate_vrev
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.organisms.base import SIBLING, STRANGER, UNBLOCKED, Arm, Organism, PromptSets

PROMPT_SETS = ("probes", "held_out")
DRAWS = "draws.safetensors"  # of weight noise


@dataclass(frozen=True)
class Study:
    """An organism and the folder `home` of its checkpoints, runs and measurements, read once and cached."""

    # Files below `home` are complete when they appear and never change, so a cached value cannot become stale. The runs
    # of the history can still grow: `with_runs` is not cached.
    organism: Organism
    home: Path

    @classmethod
    def at(cls, organism: Organism, cache: Path) -> "Study":
        """Return the study of an organism in a cache folder, under the organism's key."""
        return cls(organism, cache / "histories" / organism.name / organism.key)

    def __reduce__(self) -> tuple[type["Study"], tuple[Organism, Path]]:
        return type(self), (self.organism, self.home)  # a worker's job carries the two fields, not the cached states

    @cached_property
    def prompts(self) -> PromptSets:
        """Probes, held-out prompts and harmless prompts."""
        return self.organism.prompts(self.home)

    @cached_property
    def sequence(self) -> ModelSequence:
        """Witness, anchor and prompts, without runs."""
        ends = ModelSequence.from_folders(witness=self.home / "witness", anchor=self.home / "anchor")
        return replace(ends, **self.prompts)

    def with_runs(self) -> ModelSequence:
        """Return the sequence with the runs that have their weights, as a user would enter it."""
        kept = [arm for arm in self.organism.arms if arm.keep]
        runs = {
            arm.label(seed) if len(kept) > 1 or seed in arm.labels else f"seed{seed}": tuple(found)
            for arm in kept
            for seed in arm.seeds
            if (found := self._kept(arm, seed))
        }
        return replace(self.sequence, runs=runs)

    @property
    def unblocked(self) -> Arm:
        """The baseline arm."""
        return next(arm for arm in self.organism.arms if arm.name == UNBLOCKED)

    @property
    def siblings(self) -> list[str]:
        """Names of the checkpoints that are further alignments of the same witness."""
        return [name for name in self.organism.checkpoints if name.startswith(SIBLING)]

    @property
    def strangers(self) -> list[str]:
        """Names of the checkpoints that are witnesses of other histories."""
        return [name for name in self.organism.checkpoints if name.startswith(STRANGER)]

    @cached_property
    def preregistration(self) -> Preregistration | None:
        """What was fixed before the runs, if it was."""
        path = self.home / "preregistration.toml"
        return Preregistration.from_toml(path) if path.exists() else None

    def run_folder(self, arm: Arm, seed: int) -> Path:
        """Return the folder of one run's measurements."""
        return self.home / "runs" / arm.name / f"seed{seed}"

    def is_done(self, arm: Arm, seed: int) -> bool:
        """Whether a run is complete: a comparison can be read while its last runs are still being made."""
        return (self.run_folder(arm, seed) / "run.json").exists()

    def facts(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Return the content of a run's run.json."""
        return read_object(self.run_folder(arm, seed) / "run.json")

    def log(self, arm: Arm, seed: int) -> pd.DataFrame:
        """Return a run's training log; a recorded run has none, and so no rows."""
        if seed in arm.recorded:
            return pd.DataFrame(columns=["step", "loss", "grad_norm", "blocker_norm"], dtype=float)
        return pd.read_csv(self.run_folder(arm, seed) / "log.csv")

    def noise_folder(self, step: int) -> Path:
        """Return the folder of the weight-noise draws at one step."""
        draws, runs = self.organism.noise[step], len(self.unblocked.seeds)  # the draws' norm is the mean over the runs
        return self.home / "noise" / f"step{step}-{draws}-draws-{runs}-runs"

    def noise(self, step: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """Return the cosines of the weight-noise draws at one step, and their layers."""
        arrays, _ = read_tensors(self.noise_folder(step) / DRAWS, "noise")
        return arrays["cosines"], tuple(arrays["layers"].tolist())

    def kept(self, arm: Arm) -> list[Checkpoint]:
        """Return the checkpoints of an arm that have their weights, under the names of their states."""
        return [one for seed in arm.seeds for one in arm.named(seed, self._kept(arm, seed))]

    def recorded(self, arm: Arm, seed: int) -> list[Checkpoint]:
        """Return the checkpoints of a recorded run at the steps that are measured."""
        return [one for one in arm.recorded[seed] if one.step in self.organism.save_steps]

    def _kept(self, arm: Arm, seed: int) -> list[Checkpoint]:
        if seed in arm.recorded:
            return self.recorded(arm, seed)
        found = [
            Checkpoint(f"seed{seed}/{(step := int(path.name.split('-')[1]))}", path, step=step)
            for path in self.run_folder(arm, seed).glob("checkpoint-*")
        ]
        return sorted(found, key=lambda one: one.step or 0)  # as text, checkpoint-100 comes before checkpoint-20

    @cached_property
    def _states(self) -> dict[tuple[str, str], Residuals]:
        return {}

    def states(self, part: str, prompts: str) -> Residuals:
        """Return measured states; `part` is `measured` (the history) or `runs/{arm}/seed{n}`."""
        if (part, prompts) not in self._states:
            self._states[part, prompts] = Residuals.load(self.home / part / f"{prompts}.safetensors")
        return self._states[part, prompts]

    def run_states(self, arm: Arm, prompts: str, *, own_start: bool = True) -> Residuals:
        """Return states of the history and of an arm's runs, with drift measured from the arm's own start."""
        runs = [self.states(f"runs/{arm.name}/seed{seed}", prompts) for seed in arm.seeds]
        states = join([self.states("measured", prompts), *runs])
        # An arm may start elsewhere (the unaligned twin from the witness): drift from the anchor would be a distance.
        return from_start(states, start=arm.start) if own_start and arm.start != "anchor" else states

    @cached_property
    def vs(self) -> Directions:
        """v_rev, located on the probes."""
        return locate_vrev(self.states("measured", "probes"))

    def follow(self, arm: Arm, vs: Directions | None = None) -> Trajectory:
        """Follow an arm's runs along v_rev, or along other directions, on probes and held-out prompts."""
        states = [self.run_states(arm, prompts) for prompts in PROMPT_SETS]
        return follow(states, self.vs if vs is None else vs, layers_in_mean=self.organism.layers_in_mean)


def join(parts: Sequence[Residuals]) -> Residuals:
    """Concatenate residuals of the same prompts and layers along the checkpoints."""
    values = np.concatenate([part.values for part in parts])
    return replace(parts[0], values=values, checkpoints=tuple(name for part in parts for name in part.checkpoints))


def numbers(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return measures of behavior without the answers."""
    # JSON has null for a rate of no answers
    return {key: np.nan if value is None else value for key, value in measured.items() if key != "answers"}
