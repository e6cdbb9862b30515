"""python analyses/leak_map.py SEQUENCE.toml --checkpoint seed0/100 --fit-on seed1/100 --position -1 --position -5

Where has a fine-tuned model moved, in which few directions, and which of them carry the refusals that it lost? Writes
leak_map.csv (drift by layer, token position and prompt set), ranks.csv (share of the drift within subspaces that were
fitted on other runs), patching.csv (activation patching of each subspace: the anchor's component into the fine-tuned
model, and the reverse) and leak_map.png. Tables of the same weights, prompts and options are reused.
"""

import hashlib
import json as json_text
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from matplotlib import rc_context
from matplotlib.figure import Figure

from gravlens import __version__
from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.cli.options import (
    COMPLIANCES,
    DEVICE,
    DTYPE,
    JSON,
    MAX_PROMPTS,
    OPENINGS,
    OUT_FOLDER,
    PROMPTS,
    SEQUENCE,
)
from gravlens.cli.output import Script, print_answer
from gravlens.core.errors import GravlensError
from gravlens.core.files import write_json, write_table
from gravlens.directions.decomposition import candidate_spans, leak_map, rank_table
from gravlens.directions.direction import Directions, Spans
from gravlens.directions.vrev import locate_vrev
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.interventions.patching import patch_spans, smallest_rank
from gravlens.models.placement import Placement
from gravlens.plot.heatmap import plot_heatmap
from gravlens.plot.style import STYLE, save_figure
from gravlens.studies.inputs import checkpoint_of, file_at, opened, prompts_of, score_of

KEYS = "leak_map.json"
CONTENT = {".safetensors", ".json", ".jinja", ".model", ".bin", ".txt", ".gguf"}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, eq=False)
class Question:
    """Everything that the tables depend on."""

    history: ModelSequence
    tuned: Checkpoint
    others: Sequence[Checkpoint]
    asked: PromptSet
    positions: Sequence[int]
    ranks: Sequence[int]
    layers: Sequence[int] | None
    refusal: Path | None
    n_random: int
    openings: Sequence[str]
    compliances: Sequence[str]
    placement: Placement = Placement()


@app.command(cls=Script)
def main(
    sequence: SEQUENCE,
    checkpoint: Annotated[str | None, typer.Option(help="RUN/STEP. Default: the first run's last.")] = None,
    fit_on: Annotated[
        list[str], typer.Option(help="RUN/STEP whose drift is fitted; repeatable. Default: each other run's last.")
    ] = [],  # noqa: B006
    position: Annotated[
        list[int], typer.Option(help="Token position from the end; -1 is the last prompt token; repeatable.")
    ] = [-1, -2, -5],  # noqa: B006
    rank: Annotated[
        list[int], typer.Option(min=1, help="Number of leading components of the fitted drift; repeatable.")
    ] = [1, 2, 4, 16],  # noqa: B006
    layer: Annotated[
        list[int], typer.Option(help="A layer, counted from 0; repeatable. Default: every layer with a v_rev.")
    ] = [],  # noqa: B006
    refusal: Annotated[
        Path | None,
        typer.Option(help="Refusal direction, a file of Directions.save; one alone serves all layers."),
    ] = None,
    prompts: PROMPTS = None,
    max_prompts: MAX_PROMPTS = None,
    out: OUT_FOLDER = Path("."),
    n_random: Annotated[int, typer.Option(min=1, help="Number of random subspaces of each rank and kind.")] = 3,
    openings: OPENINGS = [],  # noqa: B006
    compliances: COMPLIANCES = [],  # noqa: B006
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    json: JSON = False,
) -> None:
    """Where has a fine-tuned model moved, and which of its directions carry the refusals that it lost?"""
    history = ModelSequence.from_toml(sequence)
    tuned, asked = checkpoint_of(history, checkpoint), prompts_of(history, prompts, max_prompts)
    positions, ranks, layers = sorted({*position, -1}), sorted({*rank}), sorted({*layer}) or None
    question = Question(
        history, tuned, others_of(history, tuned, fit_on), asked, positions, ranks, layers, refusal, n_random,
        openings, compliances, Placement(device, dtype),
    )  # fmt: skip
    tables = measure(question, out)
    save_figure(draw(question, *tables), out / "leak_map")
    print_answer(
        summary(*tables, tuned.name), json, **dict(zip(("leak_map", "ranks", "patching"), tables, strict=True))
    )


def others_of(history: ModelSequence, tuned: Checkpoint, names: Sequence[str]) -> list[Checkpoint]:
    """Return the checkpoints that drift directions are fitted on: by name, or the last of each other run."""
    if names:
        return [checkpoint_of(history, name) for name in names]
    run = tuned.name.rpartition("/")[0]
    others = [checkpoints[-1] for name, checkpoints in history.runs.items() if name != run]
    if not others or not run:
        raise GravlensError(
            f"{tuned.name} was given, and the runs are {', '.join(history.runs) or 'none'}.",
            "A checkpoint of a run is needed; drift directions are fitted on other runs.",
            "another --checkpoint, or --fit-on the same run, which says nothing about transfer.",
        )
    return others


def measure(question: Question, out: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return the three tables; those of the same weights, prompts and options are reused."""
    where, ranks, patching = keys_of(question)
    return (
        kept(out / "leak_map.csv", where, lambda: moved(question)),
        kept(out / "ranks.csv", ranks, lambda: ranked(question)),
        kept(out / "patching.csv", patching, lambda: patched(question)),
    )


def moved(question: Question) -> pd.DataFrame:
    """Measure where the model and the fitted runs have moved, on the probes and other prompts."""
    probes = question.history.require_probes()
    sets = [probes] if question.asked.digest == probes.digest else [probes, question.asked]
    return leak_map(*([states(question, prompts, at) for at in question.positions] for prompts in sets))


def ranked(question: Question) -> pd.DataFrame:
    """Measure in which directions, on the evaluation prompts."""
    vs, refusal = directions(question), refusal_of(question)
    asked, at = states(question, question.asked, -1), [question.tuned.name]
    return rank_table(asked, spans(question), directions=vs, at=at, refusal=refusal).table


def patched(question: Question) -> pd.DataFrame:
    """Patch the anchor's component into the fine-tuned model (necessity) and the reverse (sufficiency)."""
    pair, score = (question.tuned, question.history.anchor), score_of(question.openings, question.compliances)
    ask = {"source": states(question, question.asked, -1), "score": score, "prompts": question.asked}
    models = {checkpoint.name: opened(question.history, checkpoint, question.placement) for checkpoint in pair}
    goal = {name: float(score(model, question.asked).mean()) for name, model in models.items()}
    tables = []
    for into, source in (pair, pair[::-1]):
        put = {"checkpoint": source.name, "goal": goal[source.name]}
        table = patch_spans(models[into.name], spans(question), **ask, **put)
        tables.append(table.assign(model=into.name))
    table = pd.concat(tables, ignore_index=True)
    return table[["model", *table.columns.drop("model")]]


# --- states and directions --------------------------------------------------------------------------------------


@cache
def states(question: Question, prompts: PromptSet, position: int) -> Residuals:
    """Read the residuals of all checkpoints involved, once."""
    history = question.history
    checkpoints = list(dict.fromkeys([history.witness, history.anchor, question.tuned, *question.others]))
    ask = {"layers": question.layers, "checkpoints": checkpoints, "placement": question.placement}
    return cache_residuals(history, prompts, positions=position, **ask)


def directions(question: Question) -> Directions:
    """Return v_rev at the last prompt token, where it is defined."""
    return locate_vrev(states(question, question.history.require_probes(), -1)).defined()


@cache
def spans(question: Question) -> dict[str, list[Spans]]:
    """Return the subspaces, fitted on the probes and the other runs."""
    return candidate_spans(
        states(question, question.history.require_probes(), -1),
        directions(question),
        fit_on=[checkpoint.name for checkpoint in question.others],
        ranks=question.ranks,
        refusal=refusal_of(question),
        n_random=question.n_random,
        rng=np.random.default_rng(0),
    )


def refusal_of(question: Question) -> Directions | None:
    """Load the refusal direction of the file at the layers of v_rev."""
    return None if question.refusal is None else file_at(question.refusal, directions(question).layers)


# --- cache ------------------------------------------------------------------------------------------------------


def kept(path: Path, key: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Return the table at `path` if it was written under this key, else make and write it; the key is written last."""
    marks = path.parent / KEYS
    known = json_text.loads(marks.read_text()) if marks.exists() else {}
    if not path.exists() or known.get(path.name) != key:
        write_table(path, make())
        write_json(marks, known | {path.name: key})
    return pd.read_csv(path, dtype={"layer": "Int64"})


def keys_of(question: Question) -> tuple[str, str, str]:
    """Return digests of the weights, prompts and options that each table depends on."""
    history = question.history
    checkpoints = [history.witness, history.anchor, question.tuned, *question.others]
    read = [(checkpoint.name, digest_of(checkpoint.described)) for checkpoint in checkpoints]
    read += [history.require_probes().digest, question.asked.digest, history.chat_template, question.layers]
    read += [] if question.placement == Placement() else [repr(question.placement)]
    refusal = digest_of(str(question.refusal)) if question.refusal else None
    fitted = [*read, question.ranks, question.n_random, refusal]
    scored = [*fitted, list(question.openings), list(question.compliances)]
    where, ranks, patching = (
        hashlib.sha256(repr((facts, __version__)).encode()).hexdigest()
        for facts in ([*read, question.positions, "drift_rms"], fitted, scored)  # a table without that column is older
    )
    return where, ranks, patching


def digest_of(source: str) -> str:
    """Return the digest of a file, or of a folder's weights, config and tokenizer; a hub id is returned as it is."""
    path = Path(source)
    files = sorted(file for file in path.iterdir() if file.suffix in CONTENT) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        return source
    content = []
    for file in files:
        with file.open("rb") as opened_file:
            content.append((file.name, hashlib.file_digest(opened_file, "sha256").hexdigest()))
    return repr(content)


# --- output -----------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw(question: Question, where: pd.DataFrame, ranks: pd.DataFrame, patching: pd.DataFrame) -> Figure:
    """Draw fraction and per-prompt drift by layer × position, share of drift and recovered score by span × rank."""
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    axes = figure.subplots(1, 4)
    tuned, into = rows_of(where, question.tuned.name), patching[patching["model"] == question.tuned.name]
    plot_heatmap(tuned, ax=axes[0])
    plot_heatmap(tuned, value="drift_rms", ax=axes[1])
    plot_heatmap(ranks, value="share", rows="span", columns="rank", limit=1, ax=axes[2])
    plot_heatmap(into, value="way", rows="span", columns="rank", limit=1, ax=axes[3])
    return figure


def rows_of(where: pd.DataFrame, checkpoint: str) -> pd.DataFrame:
    """Return a checkpoint's rows on held-out prompts if there are any, else on the probes."""
    run, _, step = checkpoint.rpartition("/")
    rows = where[(where["run"] == run) & (where["step"] == int(step))]
    held_out = rows[rows["prompts"] == "held_out"]
    return held_out if len(held_out) else rows


def summary(where: pd.DataFrame, ranks: pd.DataFrame, patching: pd.DataFrame, tuned: str) -> str:
    """Describe where the model moved, in which directions, and which of them restore refusal."""
    rows = rows_of(where, tuned)
    last = rows[rows["position"] == -1]
    far, wide = (rows.sort_values(name).iloc[-1] for name in ("fraction", "drift_rms"))
    within = ranks.groupby(["span", "rank"])["share"].mean().groupby("span").max()
    into = patching[patching["model"] == tuned]
    back = into.groupby(["span", "rank"], sort=False)["way"].mean().reset_index()
    ways = [f"{row['span'].replace('_', ' ')} (rank {row['rank']}) {row['way']:.0%}" for _, row in back.iterrows()]
    least = smallest_rank(into[into["span"] == "drift"])
    return (
        f"of other runs' drift, {f'rank {least}' if least else 'no rank tried'} brings back 80% of the way to the "
        "anchor's score\n"
        f"{tuned}, {rows['prompts'].iloc[0]} prompts: fraction {last['fraction'].mean():+.2f} at the last token (mean "
        f"over layers), at most {far['fraction']:+.2f} (layer {far['layer']}, position {far['position']})\n"
        f"single prompts move by {last['drift_rms'].mean():.2f} of the distance at the last token (r.m.s., mean over "
        f"layers; their mean by {last['drift_norm'].mean():.2f}), at most {wide['drift_rms']:.2f} "
        f"(layer {wide['layer']}, position {wide['position']})\n"
        f"share of its drift within v_rev {within['v_rev']:.0%}, within other runs' drift {within['drift']:.0%}\n"
        f"the anchor's component put back, share of the way from the score {into['baseline'].iloc[0]:+.2f} to the "
        f"anchor's {into['goal'].iloc[0]:+.2f}: {', '.join(ways)}"
    )


if __name__ == "__main__":
    app()
