"""python benchmarks/forecast.py    (see --help)

Compare forecasts with measured runs: histories of random weights are read into an empty store several times, and each
forecast is made right before its run, since the load of a shared machine changes within minutes. Writes forecast.json:
predicted and measured seconds of each pair, their medians, and the median of the pairs' ratios.
"""

import json
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from gravlens.activations.cost import plan_reading
from gravlens.activations.residuals import cache_residuals
from gravlens.history.sequence import ModelSequence
from gravlens.organisms.refusal_language import build_tokenizer, held_out_prompts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# layers, width, heads, inner width, prompts, words of a prompt, positions
CASES: dict[str, tuple[int, int, int, int, int, int, str]] = {
    "6 blocks of 256, 96 prompts of 24": (6, 256, 4, 704, 96, 24, "last"),
    "4 blocks of 512, 32 prompts of 48": (4, 512, 8, 1408, 32, 48, "last"),
    "12 blocks of 384, 24 prompts of 96": (12, 384, 6, 1024, 24, 96, "last"),
    "6 blocks of 256, 32 prompts of 48, all positions": (6, 256, 4, 704, 32, 48, "all"),
    "12 blocks of 768, 16 prompts of 24": (12, 768, 12, 2048, 16, 24, "last"),
}


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of forecast and run.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for forecast.json.")] = Path("."),
) -> None:
    """Compare forecasts with runs."""
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        histories = {name: history(Path(scratch) / str(i), *case[:6]) for i, (name, case) in enumerate(chosen(only))}
        pairs: dict[str, list[dict[str, Any]]] = {name: [] for name in histories}
        for _ in range(repeats):
            for name, sequence in histories.items():
                pairs[name].append(one := pair(sequence, CASES[name][6], Path(scratch) / "store"))
                typer.echo(f"{name:<52} {one['predicted']:6.2f} s {one['measured']:6.2f} s")
    for name, found in pairs.items():
        predicted, measured = (median(one[key] for one in found) for key in ("predicted", "measured"))
        ratio = median(one["predicted"] / one["measured"] for one in found)
        rows.append({"case": name, "predicted": predicted, "measured": measured, "ratio": ratio})
        typer.echo(f"{name:<52} predicted {predicted:6.2f} s   measured {measured:6.2f} s   {ratio:.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out.mkdir(parents=True, exist_ok=True)
    table = {"threads": threads, "peak_memory": peak, "cases": rows, "pairs": pairs}
    (out / "forecast.json").write_text(json.dumps(table, indent=1) + "\n")


def chosen(only: str) -> Iterator[tuple[str, tuple[int, int, int, int, int, int, str]]]:
    """Cases that contain a text in their name."""
    yield from ((name, case) for name, case in CASES.items() if only in name)


def history(folder: Path, layers: int, width: int, heads: int, inner: int, prompts: int, words: int) -> ModelSequence:
    """Write four checkpoints of random weights."""
    tokenizer: Any = build_tokenizer()
    names = ("witness", "anchor", "ft/checkpoint-1", "ft/checkpoint-2")
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=inner, max_position_embeddings=2048,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return ModelSequence.from_folders(
        witness=folder / names[0], anchor=folder / names[1], runs={"seed0": str(folder / "ft/checkpoint-*")},
        probes=texts(prompts, words),
    )  # fmt: skip


def texts(prompts: int, words: int) -> Sequence[str]:
    """Prompts of 3/4 to 5/4 of a number of words."""
    spoken = " ".join(held_out_prompts()).split()
    lengths = [words * (3 + 2 * i / max(prompts - 1, 1)) / 4 for i in range(prompts)]
    return [" ".join(spoken[(7 * i + j) % len(spoken)] for j in range(round(n))) for i, n in enumerate(lengths)]


def pair(sequence: ModelSequence, positions: Any, store: Path) -> dict[str, Any]:
    """Forecast a run, then run it."""
    began = perf_counter()
    found = plan_reading(sequence, positions=positions)
    planned = perf_counter()
    cache_residuals(sequence, positions=positions, store=store)
    ended = perf_counter()
    shutil.rmtree(store)
    return {
        "predicted": found.total,
        "measured": ended - planned,
        "planning": planned - began,
        "parts": found.seconds,
        "memory": found.memory,
        "flops": found.machine.flops,
    }


if __name__ == "__main__":
    app()
