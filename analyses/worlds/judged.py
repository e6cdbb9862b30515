"""A refusal organism that is cheap enough to be made twenty times, with the runs that a claim is judged on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from gravlens.history.prompts import PromptSet
from gravlens.organisms.arms import Arm, clamp, matched_twin, rehearsal, reinforce, released
from gravlens.organisms.base import Measures
from gravlens.organisms.refusal import RefusalOrganism
from gravlens.training.finetune import Recipe

SEEDS = tuple(range(5))  # fine-tuning runs of each arm: the least p of five sign flips is .031
SIBLINGS = ("sibling_anchor", "sibling_anchor_2")


@dataclass(frozen=True)
class Judged(RefusalOrganism):
    """A refusal organism with shorter runs, asked and measured less: twenty of them are made."""

    runs: int = len(SEEDS)
    recipe: Recipe = Recipe(60, 4, 5e-5)
    save_steps: tuple[int, ...] = (1, 20, 60)

    @property
    def checkpoints(self) -> Mapping[str, str | None]:
        """The wrong witness is the next organism's witness."""
        return {"witness": None, **dict.fromkeys(("anchor", *SIBLINGS), "witness")}

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Those of the trained histories."""
        return (
            Arm("unblocked", SEEDS),
            Arm("clamp", SEEDS, blocker=clamp),
            Arm("clamp_matched_twin", SEEDS, blocker=partial(clamp, along=matched_twin)),
            Arm("reinforce", SEEDS, blocker=reinforce),
            Arm("released", SEEDS, blocker=partial(released, step=20)),
            Arm("unaligned_twin", SEEDS, start="witness"),
            Arm("continued_alignment", SEEDS, data="alignment"),
            Arm("rehearsal", SEEDS, blocker=rehearsal),
        )

    @property
    def measures(self) -> Measures:
        """At the last token alone."""
        return replace(super().measures, positions=())

    def prompts(self, home: Path) -> Mapping[Literal["probes", "held_out", "harmless"], PromptSet]:
        """Half of the held-out prompts, a third of the harmless ones."""
        found = super().prompts(home)
        return {**found, "held_out": found["held_out"][::2], "harmless": found["harmless"][::3]}
