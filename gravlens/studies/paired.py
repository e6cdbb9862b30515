"""Fine-tune the anchor of a history with a blocker and, paired by seed and data order, without one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from gravlens.activations.fingerprint import fingerprint
from gravlens.activations.residuals import cache_residuals
from gravlens.behavior.scores import task_loss
from gravlens.blockers.blocking import Blocker
from gravlens.blockers.penalty import Penalty
from gravlens.blockers.projection import UpdateProjection
from gravlens.core.errors import GravlensError, read_object
from gravlens.core.files import write_json, write_table
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import Trajectory, follow
from gravlens.history.prompts import ENCODING, Example, PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.history.sources import resolve
from gravlens.models.placement import Placement
from gravlens.models.swapping import open_each
from gravlens.models.tokenizers import sequence_tokenizer
from gravlens.organisms.arms import LATE
from gravlens.organisms.base import UNBLOCKED, inner_of
from gravlens.studies.inputs import ends, followed_on, located
from gravlens.training.finetune import finetune
from gravlens.training.recipe import Recipe

BLOCKED = "blocked"
HELD_OUT = 8  # one in 8 examples is held out for the task loss


@dataclass(frozen=True)
class Block:
    """Specification of a blocker along v_rev.

    Attributes:
        kind: `penalty` (against motion back only), `clamp` (both ways) or `projection` (exact, of the probes' mean).
        strength: strength of penalty or clamp; default: 30.
        margin: margin of the penalty: above 0 the model is pushed the other way by up to this fraction; default: 0.
        layers: default: the inner layers that have a v_rev; for a projection the last of these.
    """

    kind: Literal["penalty", "clamp", "projection"] = "penalty"
    strength: float | None = None
    margin: float | None = None
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        taken = {"penalty": ("strength", "margin"), "clamp": ("strength",), "projection": ()}[self.kind]
        unread = [n for n in ("strength", "margin") if getattr(self, n) is not None and n not in taken]
        if unread:
            given, remedy = f"{unread[0]} was given for a {self.kind}.", f"--kind {self.kind} without --{unread[0]}."
            raise GravlensError(given, f"It takes {' and '.join(taken) or 'neither strength nor margin'}.", remedy)

    def along(self, directions: Directions, probes: PromptSet) -> Blocker:
        """Return the blocker."""
        if self.kind == "projection":
            return UpdateProjection(directions, probes)
        side = "one" if self.kind == "penalty" else "both"
        strength = Penalty.strength if self.strength is None else self.strength
        return Penalty(directions, probes, margin=self.margin or 0.0, strength=strength, side=side)

    def directions(self, sequence: ModelSequence, placement: Placement) -> Directions:
        """Return v_rev at the blocked layers."""
        states = ends(sequence, layers=self.layers, placement=placement)
        found = located(states, self.layers).defined()
        if self.layers:
            return found
        inner = inner_of(len(states.layers))
        kept = [layer for layer in found.layers if layer in inner] or list(found.layers)
        return found.at(kept[-LATE:] if self.kind == "projection" else kept)


@dataclass(frozen=True)
class Training:
    """How both runs are trained.

    Attributes:
        recipe: steps, batch, learning rate, …
        save_steps: steps after which a checkpoint is saved; the last one always is.
        seed: seed of the data order.
    """

    recipe: Recipe = Recipe()
    save_steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    seed: int = 0

    @property
    def saved(self) -> tuple[int, ...]:
        """The steps after which a checkpoint is saved."""
        return self.recipe.saved_steps(self.save_steps)


@dataclass(frozen=True, eq=False)
class Paired:
    """Results of the paired runs.

    Attributes:
        table: one row for the anchor and one per run at its last step: `run`, `step`, `alignment` and `fraction` (mean
            over the blocked layers, on the evaluation prompts), `fraction_probes` (on the prompts that the blocker acts
            on), `task_loss` (nats per token, on held-out examples), `seconds_per_step`, `folder`.
        trajectory: all saved steps.
        prompts: evaluation prompts: `held_out`, or `given` if the sequence has only probes.
        n_trained: number of training examples.
        n_task: number of held-out examples for the task loss.
    """

    table: pd.DataFrame
    trajectory: Trajectory
    prompts: str
    n_trained: int
    n_task: int


def block_beside(
    sequence: ModelSequence,
    examples: Sequence[Example],
    *,
    out: Path,
    block: Block = Block(),
    training: Training = Training(),
    only_blocked: bool = False,
    placement: Placement = Placement(),
) -> Paired:
    """Fine-tune the anchor with a blocker along v_rev and, as the baseline, without; both see the same data order.

    The last eighth of the examples is held out for the task loss. An interrupted call resumes, and complete runs are
    reused.

    Args:
        sequence: witness, anchor, probes, and held-out prompts to judge on.
        examples: harmless data.
        out: folder for `blocked/checkpoint-{step}` and `unblocked/checkpoint-{step}`.
        block: the blocker.
        training: how both runs are trained.
        only_blocked: leave the baseline out.
        placement: where states and losses are computed; training uses a GPU if there is one.

    Raises:
        GravlensError: no probes, fewer than two examples, no v_rev, or `out` holds another run.
    """
    n_task = _n_task(examples)
    train, task = examples[:-n_task], examples[-n_task:]
    vs = block.directions(sequence, placement)
    blocker = block.along(vs, sequence.require_probes())
    kinds: dict[str, Blocker | None] = {} if only_blocked else {UNBLOCKED: None}
    start = fingerprint(resolve(sequence.anchor, weights=False), ("paired",))
    runs = {}
    for name, chosen in {**kinds, BLOCKED: blocker}.items():
        made_of = (start, train, training, (block, vs.vectors.tobytes()) if chosen else None)
        runs[name] = _trained(sequence, train, out / name, chosen, training, made_of)
    after = replace(sequence, runs=runs)
    followed = _followed(after, vs, placement)
    judged = "held_out" if "held_out" in followed.data["prompts"] else "given"
    last = {"anchor": sequence.anchor, **{name: run[-1] for name, run in runs.items()}}
    models = open_each(
        last.values(), tokenizer=sequence_tokenizer(sequence), through="huggingface", placement=placement
    )
    losses = {name: task_loss(model, task) for name, (_, model) in zip(last, models, strict=True)}
    return Paired(_tabulated(followed, runs, losses, judged), followed, judged, len(train), n_task)


def _n_task(examples: Sequence[Example]) -> int:
    if len(examples) < 2:
        given = f"The data has {len(examples)} example(s)."
        raise GravlensError(given, "At least two are needed, one to train and one to judge.", "more data.")
    return max(1, len(examples) // HELD_OUT)


def _trained(
    sequence: ModelSequence,
    examples: Sequence[Example],
    folder: Path,
    blocker: Blocker | None,
    training: Training,
    made_of: Any,
) -> tuple[Checkpoint, ...]:
    """Make one run, or reuse a complete one of the same description."""
    mark, key = folder / "run.json", hashlib.sha256(repr((ENCODING, made_of)).encode()).hexdigest()
    saved = [Checkpoint(f"{folder.name}/{step}", folder / f"checkpoint-{step}", step) for step in training.saved]
    if mark.exists():
        if read_object(mark)["description"] == key:
            return tuple(saved)
        given = f"{folder} holds another run."
        raise GravlensError(given, "Results are never overwritten.", "another --out, or remove that folder.")
    run = finetune(
        sequence.anchor,
        examples,
        out=folder,
        recipe=training.recipe,
        save_steps=training.saved,
        blocker=blocker,
        seed=training.seed,
    )
    write_table(folder / "log.csv", run.log)
    write_json(mark, {"description": key, "seconds_per_step": run.seconds_per_step})
    return run.checkpoints


def _followed(sequence: ModelSequence, vs: Directions, placement: Placement) -> Trajectory:
    """Follow the runs on the probes, and on the held-out prompts if there are any."""
    asked = followed_on(sequence)
    return follow([cache_residuals(sequence, prompts, layers=vs.layers, placement=placement) for prompts in asked], vs)


def _tabulated(
    followed: Trajectory, runs: Mapping[str, tuple[Checkpoint, ...]], losses: Mapping[str, float], judged: str
) -> pd.DataFrame:
    means: dict[Any, Any] = {(row.run, row.step, row.prompts): row for row in followed.layer_mean.itertuples()}
    rows: list[dict[str, Any]] = [{"run": "anchor", "step": 0, "fraction": 0.0, "fraction_probes": 0.0}]
    for name, run in runs.items():
        last, folder = run[-1], Path(str(run[-1].source))
        found = means[name, last.step, judged]
        rows.append(
            {
                "run": name,
                "step": last.step,
                "alignment": found.alignment,
                "fraction": found.fraction,
                "fraction_probes": means[name, last.step, "given"].fraction,
                "seconds_per_step": read_object(folder.parent / "run.json")["seconds_per_step"],
                "folder": str(folder),
            }
        )
    columns = ["run", "step", "alignment", "fraction", "fraction_probes", "task_loss", "seconds_per_step", "folder"]
    table = pd.DataFrame(rows).assign(task_loss=lambda frame: frame["run"].map(losses))
    return table[columns]
