"""What a setting is: a history that gravlens can make itself, and hand to the same code as a user's checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from gravlens.history.prompts import Example, PromptSet
from gravlens.organisms.arms import Arm
from gravlens.training.finetune import Recipe


@dataclass(frozen=True)
class Measures:
    """How behaviour is measured.

    Attributes:
        refusals: openings of refusing answers.
        compliances: openings of complying answers.
        markers: phrases that make an answer a refusal.
        max_new_tokens: the longest answer.
        positions: further positions, counted from a prompt's end, at which a run's last states are read.
    """

    refusals: tuple[str, ...]
    compliances: tuple[str, ...]
    markers: tuple[str, ...]
    max_new_tokens: int
    positions: tuple[int, ...] = (-2,)


class Setting(Protocol):
    """A history that can be made. Making is expensive and goes by name; everything else is cheap."""

    @property
    def name(self) -> str:
        """`refusal` or `pretrained`."""
        ...

    @property
    def key(self) -> str:
        """Digest of all that its weights depend on."""
        ...

    @property
    def checkpoints(self) -> Mapping[str, str | None]:
        """Checkpoints to make -> the one that each starts from. `witness` and `anchor` are among them."""
        ...

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The runs."""
        ...

    @property
    def recipe(self) -> Recipe:
        """Of every arm."""
        ...

    @property
    def save_steps(self) -> tuple[int, ...]:
        """Steps at which states are read."""
        ...

    @property
    def behavior_steps(self) -> tuple[int, ...]:
        """Those at which answers are generated too."""
        ...

    @property
    def noise(self) -> Mapping[int, int]:
        """Steps at which weight noise is drawn -> how many draws."""
        ...

    @property
    def threads(self) -> int:
        """Threads of each process; the weights depend on it."""
        ...

    @property
    def layers_in_mean(self) -> tuple[int, ...]:
        """Inner layers, chosen beforehand: the mean's and the penalty's."""
        ...

    @property
    def measures(self) -> Measures:
        """How behaviour is measured."""
        ...

    def make(self, name: str, start: Path | None, folder: Path) -> None:
        """Make the checkpoint `name` from the one at `start` and write it to `folder`."""
        ...

    def examples(self, data: str, seed: int, home: Path) -> list[Example]:
        """The `data` of one run, in the order that its `seed` gives; `home` holds the checkpoints made before."""
        ...

    def prompts(self, home: Path) -> Mapping[Literal["probes", "held_out", "harmless"], PromptSet]:
        """Probes to estimate on, harmful prompts to judge on, harmless prompts for over-refusal."""
        ...

    def task(self, home: Path) -> list[Example]:
        """Held-out examples of the fine-tuning task."""
        ...
