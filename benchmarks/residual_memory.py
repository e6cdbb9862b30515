"""python benchmarks/residual_memory.py    (see --help)

Does memory grow with the number of prompts or of checkpoints? `cache_residuals` into a store, and `residual_moments`,
each case in a process of its own: anonymous memory (the process's own; pages of mapped files do not count) at its
highest, over what was held before, less one model's weights (`mib`). A Llama of random weights, 4 layers of width 256.
Linux alone says these. Writes residual_memory.json.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sequence_memory import peaks  # beside this file
from transformers import LlamaConfig, LlamaForCausalLM

import gravlens as gl
from gravlens.activations.residuals import residual_moments
from gravlens.core.files import write_json
from gravlens.history.weight_files import weight_files
from gravlens.models.opening import quiet
from gravlens.organisms.refusal_language import build_tokenizer, held_out_prompts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MIB = 2**20


@app.command()
def main(
    prompts: Annotated[str, typer.Option(help="Numbers of prompts, with few checkpoints.")] = "512,8192",
    checkpoints: Annotated[str, typer.Option(help="Numbers of checkpoints, with few prompts.")] = "2,16",
    out: Annotated[Path, typer.Option(help="Folder for residual_memory.json.")] = Path("."),
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """How much memory does reading take above the model's own?"""
    if child:
        how, n_prompts, n_checkpoints, home = child.split(",", 3)
        typer.echo(json.dumps(measure(how, int(n_prompts), int(n_checkpoints), Path(home))))
        return
    many, long = ([int(n) for n in text.split(",")] for text in (prompts, checkpoints))
    cases = [*((n, long[0]) for n in many), *((many[0], n) for n in long[1:])]
    with tempfile.TemporaryDirectory() as folder:
        size = write_folders(Path(folder), max(long))
        rows = [run(how, *case, Path(folder), size) for how in ("store", "mean", "covariance") for case in cases]
    write_json(out / "residual_memory.json", {"weights_mib": size / MIB, "rows": rows})
    for row in rows:
        typer.echo(
            "  ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        )


def write_folders(home: Path, count: int) -> int:
    """Checkpoints of random weights; the bytes of one."""
    tokenizer: Any = build_tokenizer()
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768}
    with quiet():
        for step in range(count):
            torch.manual_seed(step)
            LlamaForCausalLM(
                LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape)
            ).save_pretrained(home / f"step{step}")
            tokenizer.save_pretrained(home / f"step{step}")
    return sum(path.stat().st_size for path in weight_files(home / "step0"))


def run(how: str, prompts: int, checkpoints: int, home: Path, size: int) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, __file__, "--child", f"{how},{prompts},{checkpoints},{home}"]
    peak = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    above = (peak * 1024 - size) / MIB
    return {"read": how, "prompts": prompts, "checkpoints": checkpoints, "mib": above}


def measure(how: Any, prompts: int, checkpoints: int, home: Path) -> int:
    """Anonymous memory at its highest over what was held before, KiB."""
    torch.set_num_threads(1)
    folders = [home / f"step{step}" for step in range(checkpoints)]
    words = " ".join(held_out_prompts()).split()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size=rng.integers(5, 20))) for _ in range(prompts)]
    sequence = gl.ModelSequence.from_folders(
        witness=folders[0], anchor=folders[1], runs={"run": folders[2:]} if folders[2:] else {}
    )
    if how == "store":
        with tempfile.TemporaryDirectory(dir=home) as store:
            return peaks(lambda: gl.cache_residuals(sequence, texts, store=store))["RssAnon"]
    return peaks(lambda: residual_moments(sequence, texts, reduce=how))["RssAnon"]


if __name__ == "__main__":
    app()
