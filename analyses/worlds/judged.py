"""The refusal organism as it is published, cheap enough to make forty times: fewer runs and prompts."""

from dataclasses import dataclass, replace
from pathlib import Path

from gravlens.organisms.arms import blocker, made_by, random_arms
from gravlens.organisms.base import Arm, Measures, PromptSets
from gravlens.organisms.refusal import RefusalOrganism

SEEDS = (0, 1)  # fine-tuning runs of the arms that are compared run by run; the unit of a claim is the organism


@dataclass(frozen=True)
class Judged(RefusalOrganism):
    """A refusal organism of the published recipe with fewer runs, prompts and measures."""

    runs: int = len(SEEDS)
    save_steps: tuple[int, ...] = (1, 20, 60)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms of the trained histories."""
        seeds, one = tuple(range(self.runs)), (0,)
        return (
            Arm("unblocked", seeds),
            Arm("clamp", seeds, blocker=made_by("clamp")),
            *random_arms(one, "harmless", directions=self.random_directions, draw=(self.organism,)),
            *(Arm(name, one, blocker=made_by(name)) for name in ("reinforce", "rehearsal")),
            Arm("lower_rate", one, rate=0.5),
            Arm("released", one, blocker=blocker("released", step=20)),
            Arm("unaligned_twin", seeds, start="witness", keep=True),  # their updates are put on the anchor, too
            Arm("continued_alignment", one, data="alignment"),
        )

    @property
    def measures(self) -> Measures:
        """The refusal organism's, at the last token only."""
        return replace(super().measures, positions=())

    def prompts(self, home: Path) -> PromptSets:
        """Return half of the held-out prompts and a third of the harmless ones."""
        found = super().prompts(home)
        return {**found, "held_out": found["held_out"][::2], "harmless": found["harmless"][::3]}
