"""What a question about a history is asked of: v_rev at some layers, a checkpoint, prompts, a score."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.behavior.scores import DEFAULT_REFUSAL_OPENINGS, Score, refusal_log_odds, two_sided_log_odds
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import locate_vrev
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence, Prompts
from gravlens.interventions.edits import everywhere
from gravlens.models.opening import OpenModel, open_model
from gravlens.models.placement import Placement
from gravlens.models.tokenizers import sequence_tokenizer


def ends(
    sequence: ModelSequence,
    prompts: Prompts | None = None,
    *,
    layers: Sequence[int] = (),
    placement: Placement = Placement(),
) -> Residuals:
    """States of witness and anchor, on the probes unless other prompts are given; without layers, of all of them."""
    pair = (sequence.witness, sequence.anchor)
    return cache_residuals(sequence, prompts, layers=layers or None, checkpoints=pair, placement=placement)


def located(states: Residuals, layers: Sequence[int] = ()) -> Directions:
    """v_rev at the states' layers; those that were asked for by number have to be defined."""
    if not layers:
        return locate_vrev(states)
    return Directions(tuple(locate_vrev(states, layer=layer) for layer in sorted({*layers})))


def vrev_of(sequence: ModelSequence, layers: Sequence[int] = (), *, placement: Placement = Placement()) -> Directions:
    """v_rev at some layers, or at every layer that has one."""
    return located(ends(sequence, layers=layers, placement=placement), layers).defined()


def checkpoint_of(sequence: ModelSequence, name: str | None = None) -> Checkpoint:
    """A checkpoint by its name; default: the last one of the first run."""
    if name is None and sequence.runs:
        return next(iter(sequence.runs.values()))[-1]
    for checkpoint in sequence:
        if checkpoint.name == name:
            return checkpoint
    raise GravlensError(
        "This sequence has no run." if name is None else f"This sequence has no checkpoint {name!r}.",
        f"It has {', '.join(checkpoint.name for checkpoint in sequence)}.",
        "--checkpoint with one of these, or [runs] in the sequence's file.",
    )


def prompts_of(sequence: ModelSequence, file: Path | None = None, most: int | None = None) -> PromptSet:
    """Prompts of a file, else the held-out ones, else the probes; `most` are spread evenly, files often go by topic."""
    chosen = sequence.prompts_of(file, "harmful") if file else sequence.held_out or sequence.require_probes()
    return chosen[:: ceil(len(chosen) / most)] if most else chosen


def followed_on(sequence: ModelSequence, file: Path | None = None) -> list[PromptSet]:
    """The probes, and the prompts that runs are judged on where these are others."""
    given, judged = sequence.require_probes(), prompts_of(sequence, file)
    return [given] if judged.digest == given.digest else [given, judged]


def file_at(file: Path, layers: Sequence[int]) -> Directions:
    """The directions of a file (`Directions.save`) at some layers; one alone stands for every layer."""
    found = Directions.load(file)
    return (everywhere(found.directions[0], max(layers) + 1) if len(found) == 1 else found).at(layers)


def score_of(openings: Sequence[str] = (), compliances: Sequence[str] = ()) -> Score:
    """Refusal log-odds by first tokens, or two-sided by whole openings where compliances are given."""
    openings = openings or DEFAULT_REFUSAL_OPENINGS
    if compliances:
        return partial(two_sided_log_odds, refusals=openings, compliances=compliances)
    return partial(refusal_log_odds, openings=openings)


def opened(sequence: ModelSequence, checkpoint: Checkpoint, placement: Placement = Placement()) -> OpenModel:
    """A checkpoint with the tokenizer of its history."""
    return open_model(checkpoint, tokenizer=sequence_tokenizer(sequence), **placement.where)


@dataclass(frozen=True, eq=False)
class Question:
    """A checkpoint of a history and the score that is asked of it.

    Attributes:
        sequence: the history.
        checkpoint: which one.
        prompts: what it is scored on.
        score: (model, prompts) -> one number a prompt.
        placement: device and dtype.
    """

    sequence: ModelSequence
    checkpoint: Checkpoint
    prompts: PromptSet
    score: Score = refusal_log_odds
    placement: Placement = Placement()
