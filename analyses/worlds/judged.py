"""A refusal organism that is cheap enough to make twenty times, with the runs that a claim is judged on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gravlens.organisms.arms import blocker, made_by
from gravlens.organisms.base import Arm, Measures, PromptSets
from gravlens.organisms.refusal import RefusalOrganism
from gravlens.training.recipe import Recipe

SEEDS = tuple(range(5))  # fine-tuning runs of each arm: the smallest p of five sign flips is .031
SIBLINGS = ("sibling_anchor", "sibling_anchor_2")


@dataclass(frozen=True)
class Judged(RefusalOrganism):
    """A refusal organism with shorter runs, fewer prompts and fewer measures."""

    runs: int = len(SEEDS)
    recipe: Recipe = Recipe(60, 4, 5e-5)
    save_steps: tuple[int, ...] = (1, 20, 60)

    @property
    def checkpoints(self) -> Mapping[str, str | None]:
        """The wrong witness is the next organism's witness."""
        return {"witness": None, **dict.fromkeys(("anchor", *SIBLINGS), "witness")}

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms of the trained histories."""
        return (
            Arm("unblocked", SEEDS),
            *(Arm(name, SEEDS, blocker=made_by(name)) for name in ("clamp", "clamp_matched_twin", "reinforce")),
            Arm("released", SEEDS, blocker=blocker("released", step=20)),
            Arm("unaligned_twin", SEEDS, start="witness"),
            Arm("continued_alignment", SEEDS, data="alignment"),
            Arm("rehearsal", SEEDS, blocker=made_by("rehearsal")),
        )

    @property
    def measures(self) -> Measures:
        """The refusal organism's, at the last token only."""
        return replace(super().measures, positions=())

    def prompts(self, home: Path) -> PromptSets:
        """Return half of the held-out prompts and a third of the harmless ones."""
        found = super().prompts(home)
        return {**found, "held_out": found["held_out"][::2], "harmless": found["harmless"][::3]}
