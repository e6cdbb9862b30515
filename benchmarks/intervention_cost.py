"""python benchmarks/intervention_cost.py    (see --help)

What an intervention at inference costs: a forward pass over prompts, and greedy answers, with hooks against without, in
one process on one thread. Each is timed in turn with a plain one of the same kind, and the ratio of their CPU seconds
is what counts, so that other work on the machine hardly shows. The weights are random: time does not depend on them.
Two sizes: the organism's (5 blocks of width 128), where hooks weigh most, and 12 blocks of width 768. Writes
intervention_cost.csv.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from gravlens.directions.direction import Direction
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode
from gravlens.interventions.edits import Ablate, Intervention, Steer, everywhere
from gravlens.interventions.hooks import intervene
from gravlens.models.forward import final_logits, generate
from gravlens.models.opening import OpenModel, open_model, quiet
from gravlens.organisms.refusal_language import build_tokenizer, held_out_prompts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

TARGET = 1.15
SIZES = {"5 blocks of 128": (5, 128, 4, 384), "12 blocks of 768": (12, 768, 12, 2048)}


@app.command()
def main(
    pairs: Annotated[int, typer.Option(min=4, help="Timed pairs of each row.")] = 40,
    prompts: Annotated[int, typer.Option(min=1, max=96, help="Prompts in a batch.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 24,
    only: Annotated[str, typer.Option(help="Sizes whose name holds this. Default: both.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for intervention_cost.csv.")] = Path("."),
) -> None:
    """What do steering and ablation cost, as a multiple of the pass without them?"""
    torch.set_num_threads(1)
    rows = []
    for name in (name for name in SIZES if only in name):
        model = random_model(*SIZES[name])
        ids = encode(model.tokenizer, held_out_prompts())[:prompts]
        for kind, run in passes(model, ids, tokens).items():
            rows += [{"model": name, "pass": kind, **cost(model, *it, run, pairs)} for it in conditions(model)]
    if not rows:
        raise typer.BadParameter(f"no size of that name; there are: {', '.join(SIZES)}")
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(out / "intervention_cost.csv", index=False)
    typer.echo(table.to_string(index=False, float_format="{:.2f}".format))


def random_model(layers: int, width: int, heads: int, mlp: int) -> OpenModel:
    """A Llama of random weights with the organism's language; it never ends an answer early."""
    tokenizer: Any = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    tokenizer.eos_token_id = None
    return open_model(model, tokenizer=tokenizer)


def passes(model: OpenModel, ids: Sequence[Sequence[int]], tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    return {
        "forward": lambda: final_logits(model, ids),
        "generation": lambda: generate(model, ids, max_new_tokens=tokens),
    }


def conditions(model: OpenModel) -> Iterator[tuple[str, str, Intervention]]:
    """Name, where, and the intervention."""
    vector = np.random.default_rng(0).standard_normal(model.d_model)
    one: Direction = direction_from(vector, layer=model.n_layers // 2, distance=0.01)
    for where, directions in {"one layer": one, "all layers": everywhere(one, model)}.items():
        yield "Steer", where, Steer(directions)
        yield "Ablate", where, Ablate(directions)


def cost(
    model: OpenModel, name: str, where: str, intervention: Intervention, run: Callable[[], Any], pairs: int
) -> dict[str, Any]:
    """One row: the ratio of changed to plain passes, its median and quartiles."""

    def seconds(changed: bool) -> float:
        began = process_time()
        with intervene(model, intervention) if changed else nullcontext(), quiet():
            run()
        return process_time() - began

    orders = [(True, False), (False, True)] * (pairs // 2 + 1)
    timed = [{changed: seconds(changed) for changed in order} for order in orders[: pairs + 2]][2:]  # two warm up
    low, median, high = np.quantile([one[True] / one[False] for one in timed], [0.25, 0.5, 0.75])
    plain = 1e3 * float(np.median([one[False] for one in timed]))
    return {"intervention": name, "where": where, "ratio": median, "ratio_low": low, "ratio_high": high,
            "target": TARGET, "plain_ms": plain, "pairs": len(timed)}  # fmt: skip


if __name__ == "__main__":
    app()
