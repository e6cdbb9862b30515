"""Inputs shared by the CLI commands and scripts: v_rev at some layers, a checkpoint, prompts, a score."""

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
    """Return the states of witness and anchor, by default on the probes and at all layers."""
    pair = (sequence.witness, sequence.anchor)
    return cache_residuals(sequence, prompts, layers=layers or None, checkpoints=pair, placement=placement)


def located(states: Residuals, layers: Sequence[int] = ()) -> Directions:
    """Return v_rev at the states' layers. At `layers`, a direction that is undefined raises."""
    if not layers:
        return locate_vrev(states)  # all layers: one with an undefined direction is listed, not refused
    return Directions(tuple(locate_vrev(states, layer=layer) for layer in sorted({*layers})))


def vrev_of(sequence: ModelSequence, layers: Sequence[int] = (), *, placement: Placement = Placement()) -> Directions:
    """Return v_rev at some layers, by default wherever it is defined."""
    return located(ends(sequence, layers=layers, placement=placement), layers).defined()


def checkpoint_of(sequence: ModelSequence, name: str | None = None) -> Checkpoint:
    """Return a checkpoint by its name, by default the last one of the first run."""
    if name is None and sequence.runs:  # the last step of a run is where reversion has gone furthest
        return next(iter(sequence.runs.values()))[-1]
    for checkpoint in sequence:
        if checkpoint.name == name:
            return checkpoint
    given = "This sequence has no run." if name is None else f"This sequence has no checkpoint {name!r}."
    wanted = f"It has {', '.join(checkpoint.name for checkpoint in sequence)}."
    raise GravlensError(given, wanted, "--checkpoint with one of these, or runs under [runs] in SEQUENCE.toml.")


def prompts_of(sequence: ModelSequence, file: Prompts | None = None, most: int | None = None) -> PromptSet:
    """Return at most `most` prompts of a file, else the held-out prompts, else the probes."""
    chosen = sequence.prompts_of(file, "harmful") if file else sequence.held_out or sequence.require_probes()
    return chosen[:: ceil(len(chosen) / most)] if most else chosen  # not the first: files are often sorted by topic


def followed_on(sequence: ModelSequence, file: Prompts | None = None) -> list[PromptSet]:
    """Return the probes, and the evaluation prompts if they are different ones."""
    given, judged = sequence.require_probes(), prompts_of(sequence, file)
    return [given] if judged.digest == given.digest else [given, judged]


def file_at(file: Path, layers: Sequence[int]) -> Directions:
    """Load the directions of a file at some layers; a file of one direction stands for every layer."""
    found = Directions.load(file)
    return (everywhere(found.directions[0], max(layers) + 1) if len(found) == 1 else found).at(layers)


def score_of(openings: Sequence[str] = (), compliances: Sequence[str] = ()) -> Score:
    """Return refusal log-odds by first tokens, or two-sided by whole openings if compliances are given."""
    # partial, not a lambda: tables name a score by its function
    openings = openings or DEFAULT_REFUSAL_OPENINGS
    if compliances:
        return partial(two_sided_log_odds, refusals=openings, compliances=compliances)
    return partial(refusal_log_odds, openings=openings)


def opened(sequence: ModelSequence, checkpoint: Checkpoint, placement: Placement = Placement()) -> OpenModel:
    """Open a checkpoint with its history's tokenizer (which SEQUENCE.toml may name for all checkpoints)."""
    return open_model(checkpoint, tokenizer=sequence_tokenizer(sequence), **placement.where)


@dataclass(frozen=True, eq=False)
class Question:
    """A checkpoint of a history, and the score to measure on it."""

    sequence: ModelSequence
    checkpoint: Checkpoint
    prompts: PromptSet  # to evaluate on
    score: Score = refusal_log_odds  # (model, prompts) -> one number per prompt
    placement: Placement = Placement()
