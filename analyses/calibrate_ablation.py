"""python analyses/calibrate_ablation.py

How often does `gravlens ablate` say that refusal comes back where the direction is none of the history's, and does it
find the direction that was planted? The models are tiny and random. The witness is the anchor moved by a planted vector
in one block, which a refusal's first word reads; the run goes part of that way. In v_rev's place stand, in turn:
`matched`, a random mixture of the anchor's states for all layers; `isotropic`, one uniformly random vector for all
layers; `stranger`, the direction from the anchor to another random model; `v_rev`, the planted direction itself, in
models of other seeds. `own_row` is the rate of the rule that this replaces: the best row outside the range of its own
random directions. Writes calibrate_ablation.csv. About six minutes of one core.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.cli.options import OUT_FOLDER
from gravlens.cli.output import Script
from gravlens.core.files import write_table
from gravlens.directions.direction import Directions
from gravlens.directions.subspaces import random_like
from gravlens.directions.vrev import locate_vrev
from gravlens.history.encoding import encode
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.effects import Effect, causal_effect
from gravlens.models.forward import final_logits
from gravlens.models.opening import OpenModel, open_model
from gravlens.organisms.refusal_language import build_tokenizer, held_out_prompts, probe_prompts
from gravlens.studies.ablation import Ablation, each_and_all

WIDTH, LAYERS, PLANTED_AT = 48, 3, 0
OPENING = "sorry"
LENGTH, SHARE, GAIN = 6.0, 0.8, 1.0  # of the planted vector, of the way the run goes, of the opening's logit along it
TOKENIZER: Any = build_tokenizer()
PROMPTS = PromptSet(tuple(held_out_prompts())[::6])
IDS = encode(TOKENIZER, PROMPTS)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, eq=False)
class History:
    """A planted history: states of witness and anchor on the probes, and the fine-tuned model."""

    states: Residuals
    tuned: OpenModel
    anchor: float  # mean score


def opening_log_odds(model: OpenModel, _prompts: PromptSet) -> np.ndarray:
    """`refusal_log_odds` of the one opening; encoding the prompts at each of many scorings would double the time."""
    p = final_logits(model, IDS).double().softmax(-1)[:, TOKENIZER(OPENING)["input_ids"][0]]
    return p.logit().numpy()


def tiny(seed: int, *, along: float = 0.0) -> LlamaForCausalLM:
    """A random Llama, its block `PLANTED_AT` moved `along` the planted vector, which lowers the opening's logit."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=128, initializer_range=0.2, mlp_bias=True,
        bos_token_id=TOKENIZER.bos_token_id, eos_token_id=TOKENIZER.eos_token_id,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    planted = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
    with torch.no_grad():
        model.model.layers[PLANTED_AT].mlp.down_proj.bias += along * planted
        model.lm_head.weight[TOKENIZER(OPENING)["input_ids"][0]] -= GAIN * planted
    return model


def history(seed: int) -> History:
    """Witness, anchor and a run that goes `SHARE` of the way between them."""
    witness, anchor, tuned = (tiny(seed, along=along * LENGTH) for along in (1, 0, SHARE))
    sequence = ModelSequence.from_models(witness=witness, anchor=anchor, probes=probe_prompts(), tokenizer=TOKENIZER)
    score = opening_log_odds(open_model(anchor, tokenizer=TOKENIZER), PROMPTS).mean()
    return History(cache_residuals(sequence), open_model(tuned, tokenizer=TOKENIZER), float(score))


def stranger(vs: Directions, states: Residuals, seed: int) -> Directions:
    """The directions from the anchor to a random model, at the layers of v_rev."""
    sequence = ModelSequence.from_models(
        witness=tiny(seed), anchor=tiny(seed), probes=probe_prompts(), tokenizer=TOKENIZER
    )
    other = cache_residuals(sequence, checkpoints=[sequence.witness]).of("witness")
    pair = np.stack([other, states.of("anchor")])
    return locate_vrev(Residuals(pair, ("witness", "anchor"), states.layers, states.prompts, states.meta)).at(vs.layers)


def directions_of(kind: str, one: History, rng: np.random.Generator) -> Directions:
    """The directions that stand in v_rev's place."""
    vs = locate_vrev(one.states).defined()
    columns = [one.states.layers.index(layer) for layer in vs.layers]
    match kind:
        case "matched":
            return random_like(vs, rng=rng, states=one.states.of("anchor")[:, columns])
        case "isotropic":
            return random_like(vs, rng=rng)
        case "stranger":
            return stranger(vs, one.states, int(rng.integers(1_000, 2**31)))
        case _:
            return vs


def own_row(effect: Effect) -> bool:
    """The rule of gravlens 0.1: the best row against the random directions of that row alone."""
    best = effect.table.sort_values("difference").iloc[-1]
    return bool(best["low"] > 0 and best["difference"] > best["random_high"])


def judged(kind: str, trials: int, n_random: int) -> Iterator[dict[str, Any]]:
    """One row per trial: whether either rule says that refusal comes back."""
    one = history(0)
    for trial in tqdm(range(trials), kind):
        one = history(trial) if kind == "v_rev" else one
        rng = np.random.default_rng([trial, len(kind)])
        directions = directions_of(kind, one, rng)
        ask: dict[str, Any] = {"score": opening_log_odds, "prompts": PROMPTS, "n_random": n_random, "rng": rng}
        effect = causal_effect(one.tuned, each_and_all(directions), states=one.states, **ask)
        found = Ablation(effect.table, effect.largest(rng=rng), "tuned", one.anchor)
        p = float(found.best["p_largest"])
        yield {"in_place": kind, "comes_back": found.comes_back, "p_at_most_5": p <= 0.05, "own_row": own_row(effect)}


@app.command(cls=Script)
def main(
    trials: Annotated[int, typer.Option(min=1, help="Directions of each kind in v_rev's place.")] = 200,
    planted: Annotated[int, typer.Option(min=1, help="Histories with their own v_rev.")] = 20,
    n_random: Annotated[int, typer.Option(min=19, help="Random directions of each trial.")] = 20,
    out: OUT_FOLDER = Path("."),
) -> None:
    """How often does refusal come back along a direction that is none of the history's, and along the planted one?"""
    kinds = {"matched": trials, "isotropic": trials, "stranger": trials, "v_rev": planted}
    rows = [row for kind, number in kinds.items() for row in judged(kind, number, n_random)]
    table = pd.DataFrame(rows).groupby("in_place", sort=False).mean()
    write_table(out / "calibrate_ablation.csv", table.assign(trials=list(kinds.values())).reset_index())
    typer.echo(f"share of trials in which refusal is said to come back:\n{table.round(3).to_string()}")


if __name__ == "__main__":
    app()
