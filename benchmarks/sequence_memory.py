"""python benchmarks/sequence_memory.py    (see --help)

What memory a sequence of checkpoints takes: `cache_residuals` over 1, 2 and 20 of them, each count in a process of its
own, for folders with a Llama's weights, for the same with its tied unembedding spelled out (the names then differ from
the model's, and transformers maps them), and for PEFT adapters over one folder. The weights are random. Memory is
sampled while it runs, over what the process held before: anonymous pages (the model's own), and all resident ones, to
which the pages of mapped safetensors files belong that the kernel may drop at any time. Linux alone says these. Writes
sequence_memory.json; the multiples are of one checkpoint's weights.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gravlens.activations.residuals import cache_residuals
from gravlens.core.files import write_json
from gravlens.history.sequence import ModelSequence
from gravlens.history.weight_files import weight_files
from gravlens.models.opening import quiet
from gravlens.organisms.refusal_language import build_tokenizer, held_out_prompts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

TARGET = 2.0  # one model, and one checkpoint's weights
KINDS = ("whole", "spelled_out", "adapters")
MIB = 2**20


@app.command()
def main(
    counts: Annotated[str, typer.Option(help="How many checkpoints of a run.")] = "1,2,20",
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the model, of width 768.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for sequence_memory.json.")] = Path("."),
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """How much memory does a sequence of checkpoints take, in multiples of one checkpoint's weights?"""
    if child:
        kind, count, home = child.split(",", 2)
        typer.echo(json.dumps(measure(kind, int(count), Path(home))))
        return
    numbers = [int(count) for count in counts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        size = write_history(Path(folder), layers, max(numbers))
        rows = [run(kind, count, Path(folder), size) for kind in KINDS for count in numbers]
    write_json(out / "sequence_memory.json", {"weights_mib": size / MIB, "target": TARGET, "rows": rows})
    for row in rows:
        typer.echo(
            "  ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        )


def write_history(home: Path, layers: int, count: int) -> int:
    """A base, and a run of each kind over it; the bytes of one checkpoint's weights."""
    tokenizer: Any = build_tokenizer()
    shape = {"hidden_size": 768, "num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": 2048}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True, **shape)
    with quiet():
        for step in range(count + 1):
            torch.manual_seed(step)
            model: Any = LlamaForCausalLM(config)
            folder = home / (f"whole/step{step}" if step else "base")
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if step:
                spell_out(folder, home / f"spelled_out/step{step}")
                lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
                get_peft_model(model, lora).save_pretrained(home / f"adapters/step{step}")
                named = home / f"adapters/step{step}/adapter_config.json"
                named.write_text(json.dumps(json.loads(named.read_text()) | {"base_model_name_or_path": None}))
    return sum(path.stat().st_size for path in weight_files(home / "base"))


def spell_out(folder: Path, copy: Path) -> None:
    """The same checkpoint with the tied unembedding under its own name."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})


def run(kind: str, count: int, home: Path, size: int) -> dict[str, Any]:
    """One row: a process of its own, its peaks as multiples of the weights."""
    command = [sys.executable, __file__, "--child", f"{kind},{count},{home}"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"run": kind, "checkpoints": count, **{name: peak * 1024 / size for name, peak in found.items()}}


def measure(kind: str, count: int, home: Path) -> dict[str, int]:
    """Peaks in KiB over what was held before, of this process."""
    torch.set_num_threads(1)
    folders: list[Path | str] = [home / f"{kind}/step{step}" for step in range(1, count + 1)]
    sequence = ModelSequence.from_folders(witness=home / "base", anchor=home / "base", runs={"run": folders})
    peak = peaks(lambda: cache_residuals(sequence, list(held_out_prompts())[:8], checkpoints=sequence.runs["run"]))
    return {"anonymous": peak["RssAnon"], "resident": peak["VmRSS"], "high_water_mark": peak["VmHWM"]}


def peaks(work: Callable[[], Any]) -> dict[str, int]:
    """This process's memory at its highest while it works, over what it held before, KiB."""
    before, peak, done = status(), dict[str, int](), Event()

    def sample() -> None:
        while not done.wait(0.002):
            for name, value in status().items():
                peak[name] = max(peak.get(name, 0), value - before[name])

    sampler = Thread(target=sample)
    sampler.start()
    work()
    done.set()
    sampler.join()
    return {**peak, "VmHWM": status()["VmHWM"] - before["VmRSS"]}


def status() -> dict[str, int]:
    """What Linux says of this process's memory, KiB."""
    text = Path("/proc/self/status").read_text()
    return {name: int(kib) for name, kib in re.findall(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", text, re.MULTILINE)}


if __name__ == "__main__":
    app()
