"""python benchmarks/readme_snippet.py FOLDER    (see --help)

What README's snippet "In Python" costs, statement by statement, in a folder that holds the checkpoints and prompts
that it names (base, aligned, ft/seed0/checkpoint-*, probes.jsonl, held_out.jsonl). The first statements import what a
session needs, torch among it. Wall seconds are what one waits for; CPU seconds hardly depend on other work.
"""

import ast
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SCORED = """
import numpy as np
import gravlens as gl
from gravlens.directions.vrev import direction_from
from gravlens.models import forward
runs = {"seed0": "ft/seed0/checkpoint-*"}
seq = gl.ModelSequence.from_folders(witness="base", anchor="aligned", runs=runs, held_out="held_out.jsonl")
model = gl.open_model(seq.runs["seed0"][-1])
v = direction_from(np.random.default_rng(0).standard_normal(model.d_model), layer=2)
"""
SCORING = "with gl.intervene(model, gl.Ablate(v)): gl.refusal_log_odds(model, seq.held_out)"
WIDTH = 60  # characters of a statement that are shown
README = Path(__file__).resolve().parents[1] / "README.md"


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Holds checkpoints and prompts.")],
    repeat: Annotated[bool, typer.Option(help="Run the snippet a second time in the same session.")] = False,
    pairs: Annotated[int, typer.Option(help="Instead, time so many pairs of one scoring: prefix shared, and not.")] = 0,
    readme: Annotated[Path, typer.Option(help="Another README, such as an earlier one.")] = README,
) -> None:
    """Print seconds per statement of README's snippet."""
    code = snippet(readme)
    os.environ["MPLBACKEND"] = "Agg"  # a window would wait to be closed
    os.chdir(folder)
    if pairs:
        return compare_scorings(pairs)
    for turn in range(1 + repeat):
        typer.echo(f"{'wall':>8} {'CPU':>8}  " + ("the same again" if turn else "statement"))
        names, total = dict[str, Any](), [0.0, 0.0]
        for statement in ast.parse(code).body:
            seconds = timed(statement, names)
            total = [one + more for one, more in zip(total, seconds, strict=True)]
            show(seconds, ast.unparse(statement))
        show(total, "in all")


def snippet(readme: Path) -> str:
    """Return the first Python block of the section "In Python"."""
    return readme.read_text(encoding="utf-8").split("## In Python")[1].split("```python\n")[1].split("```")[0]


def compare_scorings(pairs: int) -> None:
    """Print seconds of a scoring of the held-out prompts under an ablation, with their prefix run once and in each."""
    names: dict[str, Any] = {}
    exec(SCORED, names)  # here, so that the imports of the snippet are timed
    score, forward = ast.parse(SCORING).body[0], names["forward"]
    timed(score, names)  # and the trials, once per model
    for _ in range(pairs):
        once = timed(score, names)
        kept, forward.SHORTEST_PREFIX = forward.SHORTEST_PREFIX, 10**9
        each = timed(score, names)
        forward.SHORTEST_PREFIX = kept
        show(once, "prefix run once")
        show(each, f"prefix run with each prompt: {each[1] / once[1]:.2f} times the CPU seconds")


def timed(statement: ast.stmt, names: dict[str, Any]) -> tuple[float, float]:
    """Run one statement; return its wall and CPU seconds."""
    began = time.perf_counter(), time.process_time()
    exec(compile(ast.Module([statement], []), "README.md", "exec"), names)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def show(seconds: Sequence[float], what: str) -> None:
    """Print one row at once: a later statement may take minutes."""
    typer.echo(f"{seconds[0]:7.1f}s {seconds[1]:7.1f}s  {what[:WIDTH]}")
    sys.stdout.flush()


if __name__ == "__main__":
    app()
