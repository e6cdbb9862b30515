"""python analyses/orthogonalize.py SEQUENCE.toml --layer 12 --out orthogonalized

Does orthogonalizing the fine-tuned model's weights against v_rev bring refusal back? v_rev of one layer is located on
the sequence's probes and removed from every matrix and bias that writes to the residual stream; the new checkpoint is
saved as an ordinary Hugging Face folder. The refusal log-odds is measured on the held-out prompts before and after.
The control is random directions with the covariance of the anchor's states, removed in the same way. Writes model/,
orthogonalize.csv and orthogonalize.png; an existing model/ is verified and reused.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from jaxtyping import Float
from tqdm.auto import tqdm

from gravlens.behavior.scores import Score
from gravlens.cli.options import (
    COMPLIANCES,
    DEVICE,
    JSON,
    MAX_PROMPTS,
    N_RANDOM,
    OPENINGS,
    PROMPTS,
    SEQUENCE,
)
from gravlens.cli.output import Script, print_answer, write_effect
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction
from gravlens.directions.subspaces import random_like
from gravlens.directions.vrev import locate_vrev
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.effects import crossings, name_of, summarise
from gravlens.interventions.orthogonalization import orthogonalize, orthogonalized
from gravlens.models.opening import OpenModel, open_model
from gravlens.models.placement import Placement
from gravlens.studies.ablation import described
from gravlens.studies.inputs import checkpoint_of, ends, opened, prompts_of, score_of

SAME_WITHIN = 1e-4
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Script)
def main(
    sequence: SEQUENCE,
    layer: Annotated[int, typer.Option(help="Layer of the v_rev to remove, from 0.")],
    checkpoint: Annotated[str | None, typer.Option(help="RUN/STEP, or anchor. Default: the first run's last.")] = None,
    prompts: PROMPTS = None,
    max_prompts: MAX_PROMPTS = None,
    out: Annotated[Path, typer.Option(help="Folder for the table, the figure and the new checkpoint (model/).")] = (
        Path("orthogonalized")
    ),
    n_random: N_RANDOM = 20,
    openings: OPENINGS = [],  # noqa: B006 (typer copies it)
    compliances: COMPLIANCES = [],  # noqa: B006
    device: DEVICE = "cpu",
    json: JSON = False,
) -> None:
    """Does orthogonalizing the fine-tuned model's weights against v_rev bring refusal back?"""
    history = ModelSequence.from_toml(sequence)
    tuned, asked = checkpoint_of(history, checkpoint), prompts_of(history, prompts, max_prompts)
    where, score = Placement(device), score_of(openings, compliances)
    states = ends(history, layers=[layer], placement=where)
    direction = locate_vrev(states, layer=layer)
    anchor = float(score(opened(history, history.anchor, where), asked).mean())
    model = opened(history, tuned, where)
    folder = made(model, direction, out / "model", where)
    after = open_model(folder, tokenizer=model.tokenizer, **where.where)
    cloud = states.of("anchor")
    table = measure(model, after, direction, score=score, prompts=asked, n_random=n_random, states=cloud)
    write_effect(table, out / "orthogonalize")
    about = f"{tuned.name}, {len(asked)} prompts; {table.attrs['score']} of the anchor: {anchor:+.2f}"
    print_answer(f"{summary(table, anchor)}\n{about}\nthe checkpoint without v_rev: {folder}", json, rows=table)


def made(model: OpenModel, direction: Direction, folder: Path, where: Placement) -> Path:
    """Return the folder of the orthogonalized checkpoint; an existing one is verified and reused."""
    if not folder.is_dir():
        return orthogonalize(model, direction, out=folder)
    wanted, found = (
        m.module.state_dict() for m in (orthogonalized(model, direction), open_model(folder, **where.where))
    )
    if not same(wanted, found):
        raise GravlensError(
            f"{folder} holds another model than this checkpoint without v_rev of layer {direction.layer}.",
            "Results are never overwritten.",
            "another --out, or remove that folder.",
        )
    return folder


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models have the same weights up to rounding."""
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and (one[name] - other[name]).norm() <= SAME_WITHIN * one[name].norm()
        for name in one
    )


def measure(
    before: OpenModel,
    after: OpenModel,
    direction: Direction,
    *,
    score: Score,
    prompts: PromptSet,
    n_random: int,
    states: Float[np.ndarray, "prompt 1 d_model"],
) -> pd.DataFrame:
    """Return one row as of `causal_effect`: before, after, and random directions of the same layer."""
    baseline, rng = score(before, prompts), np.random.default_rng(0)
    drawn = np.empty((n_random, len(baseline)))
    for draw in tqdm(range(n_random), "random directions", leave=False):
        twin = random_like(direction, rng=rng, states=states)
        drawn[draw] = score(orthogonalized(before, twin), prompts) - baseline
    moved = score(after, prompts) - baseline
    numbers = {**summarise(moved, drawn.mean(1), rng=rng), **crossings(baseline, moved, drawn)}
    row = {"condition": "orthogonalize", "layer": direction.layer, "baseline": baseline.mean()}
    table = pd.DataFrame([{**row, "with_intervention": row["baseline"] + numbers["difference"], **numbers}])
    table.attrs["score"] = name_of(score)
    return table


def summary(table: pd.DataFrame, anchor: float) -> str:
    """Describe the row, and the share of the gap to the anchor's score that is closed."""
    ((_, row),) = table.iterrows()
    back = "comes back" if row["low"] > 0 and row["difference"] > row["random_high"] else "does not come back"
    share = row["difference"] / (anchor - row["baseline"]) if anchor > row["baseline"] else float("nan")
    return f"refusal {back} beyond random directions ({share:.0%} of the way to the anchor)\n{described(row)}"


if __name__ == "__main__":
    app()
