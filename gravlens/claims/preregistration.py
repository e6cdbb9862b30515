"""Preregister an analysis: layers, step, alpha, prompts and outcome, fixed in a file before the runs are judged."""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from gravlens.core.errors import GravlensError, at_home, check_layer, reading
from gravlens.core.files import write_atomically
from gravlens.history.sequence import ModelSequence
from gravlens.history.sources import resolve
from gravlens.models.swapping import inner_of, one_shape

REMEDY = "Preregistration.of('SEQUENCE.toml', step=100).write('preregistration.toml'), which writes one."
ALPHA = 0.05  # where nothing else is fixed
HEADER = "# The analysis of a training history, fixed beforehand. Prompts are known by their SHA-256.\n"


def _is_whole(value: Any, least: int) -> bool:
    # True is an int, and TOML has a `true`
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_layers(value: Any) -> bool:
    return isinstance(value, tuple) and [*value] == sorted({*value}) != [] and all(_is_whole(one, 0) for one in value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "layers": (_are_layers, "different layers in ascending order, such as [1, 2, 3]"),
    "step": (lambda value: _is_whole(value, 1), "an optimizer step, 1 or more"),
    "alpha": (lambda value: isinstance(value, float) and 0 < value < 1, "a number between 0 and 1"),
    "probes": (_is_digest, "PromptSet.digest, 64 hexadecimal digits"),
    "held_out": (_is_digest, "PromptSet.digest, 64 hexadecimal digits"),
    "outcome": (lambda value: isinstance(value, str) and value.isidentifier(), "a column of the arms' table"),
    # not isinstance: a datetime is a date, and would be read back as another type
    "written": (lambda value: type(value) is date, "a date without time, such as 2026-11-30"),
    "after_runs": (lambda value: isinstance(value, bool), "true or false"),
}


@dataclass(frozen=True)
class Preregistration:
    """What a claim is judged on, fixed beforehand: choosing the best of many layers or steps afterwards inflates it.

    Attributes:
        layers: those of the layer mean, ascending.
        step: the optimizer step that is judged.
        alpha: the largest p-value that is called significant.
        probes: `PromptSet.digest` of the prompts that v_rev is estimated on.
        held_out: the same of the prompts that runs are judged on.
        outcome: the column of the arms' table that is the harm: `compliance_rate`.
        written: the day of writing.
        after_runs: the history named runs already when it was written.

    Raises:
        GravlensError: a value of another kind.
    """

    layers: tuple[int, ...]
    step: int
    alpha: float
    probes: str
    held_out: str
    outcome: str
    written: date
    after_runs: bool = False

    def __post_init__(self) -> None:
        for name, (is_valid, wanted) in CHECKS.items():
            if not is_valid(value := getattr(self, name)):
                given = f"The preregistration has {name} = {value!r}."
                raise GravlensError(given, f"{name} is {wanted}.", REMEDY)

    @property
    def digest(self) -> str:
        """SHA-256 of the content, whatever the order and the comments of its file."""
        # of values, not of the file's bytes: a comment or another order is no other analysis
        return hashlib.sha256(json.dumps(self._texts(), sort_keys=True).encode()).hexdigest()

    @classmethod
    def of(
        cls,
        sequence: ModelSequence | Path | str,
        *,
        layers: Sequence[int] | None = None,
        step: int | None = None,
        alpha: float = ALPHA,
        outcome: str = "compliance_rate",
        today: date | None = None,
    ) -> "Preregistration":
        """Preregister the analysis of a history; no weights are read.

        Args:
            sequence: the history, or its SEQUENCE.toml.
            layers: default: the inner layers, from 27 % to 80 % of the depth.
            step: default: the last step that all runs share.
            alpha: see `Preregistration`, like `outcome`.
            today: the day of writing; default: this one.

        Raises:
            GravlensError: no probes or held-out prompts, a layer that the anchor lacks, no step that all runs share.
        """
        sequence = ModelSequence.of(sequence)
        probes, held_out = sequence.require_probes(), sequence.held_out
        if held_out is None:
            remedy = 'held_out = "held_out.jsonl" in the sequence\'s file, or from_folders(..., held_out=[…]).'
            raise GravlensError("This sequence has no held_out prompts.", "Runs are judged on other prompts.", remedy)
        # weights=False: of a hub id only the configuration is downloaded
        depth, _ = one_shape([resolve(sequence.anchor, weights=False)])
        chosen = inner_of(depth) if layers is None else sorted({check_layer(layer, depth) for layer in layers})
        return cls(
            layers=tuple(chosen),
            step=_last_common_step(sequence) if step is None else step,
            alpha=float(alpha),
            probes=probes.digest,
            held_out=held_out.digest,
            outcome=outcome,
            written=today or date.today(),
            after_runs=bool(sequence.runs),
        )

    @classmethod
    def from_toml(cls, path: Path | str) -> "Preregistration":
        """Read a file of `write`; raise `GravlensError` for a key that is unknown or missing."""
        path = at_home(path)
        with reading(path, "A preregistration is a TOML file.", REMEDY):
            table = tomllib.loads(path.read_text(encoding="utf-8"))
            # every key is needed: without after_runs a file would pass for one written before the runs
            unlike = {"unknown key": table.keys() - CHECKS.keys(), "missing key": CHECKS.keys() - table.keys()}
            if wrong := [f"the {kind} {', '.join(sorted(keys))}" for kind, keys in unlike.items() if keys]:
                raise GravlensError(f"{path} has {' and '.join(wrong)}.", f"Its keys are {', '.join(CHECKS)}.", REMEDY)
            if isinstance(table["layers"], list):  # anything else is refused by name below
                table["layers"] = tuple(table["layers"])
            return cls(**table)

    def write(self, path: Path | str) -> Path:
        """Write the TOML file. Another preregistration is never overwritten: `GravlensError`."""
        path = at_home(path)
        if path.exists() and self.from_toml(path) != self:
            wanted = "A preregistration is written once; a changed one is a new file."
            raise GravlensError(f"{path} holds another preregistration.", wanted, "another file name.")
        # by hand: the standard library reads TOML and does not write it
        lines = "".join(f"{name} = {text}\n" for name, text in self._texts().items())
        return write_atomically(path, (HEADER + lines).encode())

    def departures(self, *, layers: Iterable[int], step: int, alpha: float, probes: str, held_out: str) -> list[str]:
        """Describe how an analysis differs ("step 50, preregistered 100"); empty if it is the one preregistered."""
        used = {"layers": tuple(sorted(layers)), "step": step, "alpha": alpha, "probes": probes, "held_out": held_out}
        return [
            f"{name.replace('_', '-')} {_shown(value)}, preregistered {_shown(fixed)}"
            for name, value in used.items()
            if value != (fixed := getattr(self, name))
        ]

    def _texts(self) -> dict[str, str]:
        """Return the values as TOML writes them, which is as JSON does but for a date."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: value.isoformat() if isinstance(value, date) else json.dumps(value) for k, value in values.items()}


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value[:8]  # of a digest
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _last_common_step(sequence: ModelSequence) -> int:
    steps = {name: {c.step for c in run if c.step is not None} for name, run in sequence.runs.items()}
    # common to all: a run that stopped early would otherwise be judged at another step than the rest
    common = set.intersection(*steps.values()) if steps else set()
    if not common:
        shown = "; ".join(f"{name}: {', '.join(map(str, sorted(own)))}" for name, own in steps.items())
        given = f"The runs share no step ({shown})." if steps else "This sequence names no runs."
        raise GravlensError(given, "The step that will be judged is fixed beforehand.", "step=100, or --step 100.")
    return max(common)
