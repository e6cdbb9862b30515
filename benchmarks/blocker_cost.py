"""python benchmarks/blocker_cost.py    (see --help)

What a blocker costs: a blocked optimizer step against a plain one, outside Trainer, in one process on one thread. Each
blocked step is followed or preceded by a plain step on the same batch, and the ratio of their CPU seconds is what
counts, so that other work on the machine hardly shows. Both models are fine-tuned from the organism's anchor as they
are timed, so a projection has real motion to undo; `largest_fraction` is the largest |fraction| of the mean over all 32
probes, at any layer, after any step. Writes blocker_cost.csv.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor

from gravlens.activations.residuals import cache_residuals
from gravlens.blockers.blocking import Blocker, _Blocking
from gravlens.blockers.penalty import Movement, Penalty
from gravlens.blockers.projection import UpdateProjection
from gravlens.directions.vrev import locate_vrev
from gravlens.history.encoding import encode_example
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import OpenModel, open_model, quiet
from gravlens.organisms import arms
from gravlens.organisms.base import Grounds, Make
from gravlens.organisms.fetch import cache_folder
from gravlens.organisms.refusal import RefusalOrganism
from gravlens.studies.experiment import make_checkpoint, refusals_of
from gravlens.studies.study import Study
from gravlens.training.finetune import _collate

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

BLOCKERS: dict[str, Make] = {
    "penalty (8 of 32)": arms.made_by("penalty"),
    "penalty (all)": lambda grounds: Penalty(grounds.vs, grounds.probes, batch=None),
    "clamp (8 of 32)": arms.made_by("clamp"),
    "exact projection (all)": arms.made_by("projection"),
    "exact projection (all, to .0009)": lambda grounds: UpdateProjection(grounds.vs, grounds.probes, tolerance=9e-4),
    "exact projection (8 of 32)": arms.made_by("projection_sampled"),
    "two-move projection (8 of 32)": lambda grounds: UpdateProjection(
        grounds.vs, grounds.probes, batch=8, iterations=2
    ),
    "one-move projection (8 of 32)": lambda grounds: UpdateProjection(
        grounds.vs, grounds.probes, batch=8, iterations=1
    ),
    "preventative steering": arms.made_by("steering_1"),
    "training ablation": arms.made_by("training_ablation"),
    "gradient ablation": arms.made_by("gradient_ablation"),
    "KL to the anchor (8 of 32)": arms.made_by("kl"),
    "rehearsal (2 a step)": arms.made_by("rehearsal"),
    "constrained SFT": arms.made_by("constrained"),
    "task-vector projection": arms.made_by("task_vector"),
}
TARGETS = {
    "penalty (8 of 32)": 2.0,
    "exact projection (all)": 5.0,
    "exact projection (all, to .0009)": 5.0,
    "exact projection (8 of 32)": 2.0,
    "two-move projection (8 of 32)": 2.0,
    "one-move projection (8 of 32)": 2.0,
}


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=10, help="Timed steps of each blocker, each with a plain one.")] = 100,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before them that are not counted.")] = 5,
    only: Annotated[list[str], typer.Option(help="Blockers whose name holds this; repeat it. Default: all.")] = [],  # noqa: B006
    cache: Annotated[
        Path | None, typer.Option(help="Where the organism's checkpoints are, or are made. Default: gravlens's cache.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for blocker_cost.csv.")] = Path("."),
) -> None:
    """What does a blocked optimizer step cost, as a multiple of a plain one?"""
    torch.set_num_threads(1)
    chosen = {name: make for name, make in BLOCKERS.items() if not only or any(part in name for part in only)}
    if not chosen:
        raise typer.BadParameter(f"no blocker of that name; there are: {', '.join(BLOCKERS)}")
    organism = RefusalOrganism()
    sequence = history(organism, cache or cache_folder())
    data = batches(sequence, organism, warm_up + steps)
    with quiet():
        table = pd.DataFrame([cost(name, sequence, make, organism, data, warm_up) for name, make in chosen.items()])
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "blocker_cost.csv", index=False)
    typer.echo(table.to_string(index=False, float_format="{:.4g}".format, na_rep="-"))


def history(organism: RefusalOrganism, cache: Path) -> ModelSequence:
    """Witness and anchor of the organism; made where they are missing, which takes two minutes."""
    study = Study.at(organism, cache)
    for name in ("witness", "anchor"):
        make_checkpoint(study, name)
    return study.sequence


def batches(sequence: ModelSequence, organism: RefusalOrganism, n: int) -> list[dict[str, Tensor]]:
    """Batches of the harmless fine-tuning data, of the recipe's size."""
    tokenizer = open_model(sequence.anchor).tokenizer
    encoded = [encode_example(tokenizer, example) for example in organism.examples("harmless", 0, Path())]
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in encoded]
    size = organism.recipe.batch
    return [_collate([rows[i % len(rows)] for i in range(step * size, (step + 1) * size)]) for step in range(n)]


def grounds_of(sequence: ModelSequence, organism: RefusalOrganism) -> Grounds:
    """What blockers are made of."""
    states = cache_residuals(sequence)
    probes = sequence.require_probes()
    return Grounds(
        sequence=sequence,
        states=states,
        vs=locate_vrev(states).at(organism.layers_in_mean),
        other=None,
        refusals=refusals_of(probes, organism.measures.refusals),
        harmless=probes,
        rng=np.random.default_rng(0),
    )


@dataclass(frozen=True, eq=False)
class Training:
    """A model in training, and the blockers that take part."""

    model: OpenModel
    optimizer: torch.optim.Optimizer
    blocking: _Blocking

    def step(self, number: int, batch: dict[str, Tensor]) -> float:
        """One optimizer step as Trainer takes it, blockers at their places; CPU seconds."""
        module, state = self.model.module, SimpleNamespace(global_step=number)
        began = process_time()
        self.blocking.on_step_begin(None, state, None, model=module)
        module(**batch).loss.backward()
        self.blocking.on_pre_optimizer_step(None, state, None)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        self.optimizer.step()
        self.blocking.on_optimizer_step(None, state, None)
        self.optimizer.zero_grad()
        return process_time() - began


def training(sequence: ModelSequence, organism: RefusalOrganism, *blockers: Blocker) -> Training:
    """A fresh training from the anchor, with the optimizer that Trainer takes by default."""
    model = open_model(sequence.anchor)
    bound = [one.bind(model, rng=np.random.default_rng([0, 1])) for one in blockers]
    model.module.train()
    recipe = organism.recipe
    optimizer = torch.optim.AdamW(
        model.module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    return Training(model, optimizer, _Blocking(bound))


def cost(
    name: str,
    sequence: ModelSequence,
    make: Callable[[Grounds], Blocker],
    organism: RefusalOrganism,
    data: list[dict[str, Tensor]],
    warm_up: int,
) -> dict[str, Any]:
    """One row: the ratio of blocked to plain steps, its median and quartiles, and how far the probes moved."""
    grounds = grounds_of(sequence, organism)
    blocked, plain = training(sequence, organism, make(grounds)), training(sequence, organism)
    movement, timed, fractions = Movement(blocked.model, grounds.vs, grounds.probes), [], []
    for number, batch in enumerate(data):
        timed.append(pair(number, batch, blocked, plain))
        with torch.no_grad():
            fractions.append(float(movement.of(np.arange(len(grounds.probes))).mean(0).abs().max()))
    seconds = np.array(timed)[warm_up:]
    low, median, high = np.quantile(seconds[:, 0] / seconds[:, 1], [0.25, 0.5, 0.75])
    of_sums = seconds[:, 0].sum() / seconds[:, 1].sum()  # what a whole run pays: a few steps need a fresh Gram matrix
    return {"blocker": name, "ratio": median, "ratio_low": low, "ratio_high": high, "of_sums": of_sums,
            "target": TARGETS.get(name, np.nan), "largest_fraction": max(fractions), "last_fraction": fractions[-1],
            "plain_ms": 1e3 * np.median(seconds[:, 1]), "steps": len(seconds)}  # fmt: skip


def pair(number: int, batch: dict[str, Tensor], blocked: Training, plain: Training) -> tuple[float, float]:
    """CPU seconds of a blocked and a plain step, in an order that alternates."""
    if number % 2:
        return blocked.step(number, batch), plain.step(number, batch)
    seconds = plain.step(number, batch)
    return blocked.step(number, batch), seconds


if __name__ == "__main__":
    app()
