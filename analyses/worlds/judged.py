"""The refusal organism with the arms that a verdict needs alone, cheap enough to be made two dozen times."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gravlens.organisms.arms import made_by, random_arms, released_arm
from gravlens.organisms.base import Arm, Measures, PromptSets
from gravlens.organisms.refusal import RefusalOrganism


@dataclass(frozen=True)
class Judged(RefusalOrganism):
    """A refusal organism with fewer arms, prompts and measures; the recipe is the same."""

    save_steps: tuple[int, ...] = (1, 60)

    @property
    def checkpoints(self) -> Mapping[str, str | None]:
        """Other organisms' witnesses are the strangers, and no demand asks for siblings."""
        return {"witness": None, "anchor": "witness"}

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that a verdict demands, and those whose runs are judged as histories of their own."""
        seeds = tuple(range(self.runs))
        first = seeds[:1]  # of arms whose mean over runs is all that is asked
        released = replace(released_arm(seeds, "harmless"), more_steps=())
        return (
            Arm("unblocked", seeds),
            Arm("clamp", seeds, blocker=made_by("clamp")),
            *(Arm(name, first, blocker=made_by(name)) for name in ("reinforce", "rehearsal")),
            *random_arms(seeds, "harmless", directions=self.random_directions, draw=(self.organism,)),
            released,
            Arm("unaligned_twin", seeds, start="witness", keep=True),
            Arm("continued_alignment", first, data="alignment"),
        )

    @property
    def noise(self) -> Mapping[int, int]:
        """At the judged step alone."""
        return {self.save_steps[-1]: self.noise_draws}

    @property
    def measures(self) -> Measures:
        """The refusal organism's, at the last token only."""
        return replace(super().measures, positions=())

    def prompts(self, home: Path) -> PromptSets:
        """Return half of the held-out prompts and a third of the harmless ones."""
        found = super().prompts(home)
        return {**found, "held_out": found["held_out"][::2], "harmless": found["harmless"][::3]}
