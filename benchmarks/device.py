"""python benchmarks/device.py    (see --help; benchmarks/device.sh builds an environment and runs it)

What reading, blocking and generation cost on an accelerator: a Llama of random weights in bf16, 1.2 billion of them.
Each contender runs in turn, several times; the first round is not counted. *Reading* is the last token's state after
each block, as a multiple of the bare backbone's pass over the same tokens. *Blocking* is the seconds of an optimizer
step of `finetune` with a blocker, as a multiple of a step without. *Generation* is greedy answers of a fixed length.
A contender that is not installed is named so. Writes device.json.
"""

import json
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from residuals import WORDS, processor, tokenizer_of
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gravlens as gl
from gravlens.activations.residuals import read_residuals
from gravlens.blockers.penalty import Penalty
from gravlens.blockers.projection import UpdateProjection
from gravlens.blockers.steered_training import PreventativeSteering
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode, pad
from gravlens.history.prompts import Example, PromptSet
from gravlens.interventions.edits import Ablate, Steer, everywhere
from gravlens.models.forward import generate
from gravlens.models.opening import quiet
from gravlens.models.placement import as_device

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SIZES = {"1b": (16, 2048, 32, 8, 8192), "tiny": (3, 64, 4, 2, 128)}  # blocks, width, heads, key heads, width of the MLP
BATCH = 64
Ids = list[list[int]]
PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight")


@app.command()
def main(
    device: Annotated[str, typer.Option(help="cuda, mps, cpu, or auto (an accelerator if there is one).")] = "auto",
    size: Annotated[str, typer.Option(help="1b, or tiny, for a trial.")] = "1b",
    prompts: Annotated[int, typer.Option(min=8, help="Prompts to read.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of each run.")] = 6,
    out: Annotated[Path, typer.Option(help="Folder for device.json.")] = Path("."),
) -> None:
    """What do reading, blocking and generation cost on this device?"""
    place = as_device(device)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        bench = Bench(Path(scratch), place, size, prompts)
        result = {"machine": machine(place), "size": size, "parameters": bench.parameters, "prompts": prompts}
        for name, measure in (
            ("reading", lambda: reading(bench, repeats)),
            ("generation", lambda: generation(bench, repeats)),
            ("blocking", lambda: blocking(bench, steps)),
        ):
            began = perf_counter()
            result[name] = {**measure(), "seconds_in_all": perf_counter() - began}
            typer.echo(f"{name}: {json.dumps(result[name])}")
            # after each part: of a run that is cut short the parts before are kept
            (out / "device.json").write_text(json.dumps(result, indent=1) + "\n")


def machine(place: torch.device) -> dict[str, Any]:
    """What it runs on."""
    named = torch.cuda.get_device_name(place) if place.type == "cuda" else str(place)
    return {"device": named, "processor": processor(), "python": platform.python_version(), **versions()}


def versions() -> dict[str, str]:
    """Versions of what is compared."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class Bench:
    """Two folders of random weights, and prompts of mixed lengths."""

    def __init__(self, home: Path, device: torch.device, size: str, prompts: int) -> None:
        rng = np.random.default_rng(0)
        self.home, self.device, self.tokenizer = home, device, tokenizer_of(())
        self.layers, self.width, heads, keys, mlp = SIZES[size]
        lengths = (10 + 110 * rng.random(prompts) ** 2).astype(int)
        self.texts = [" ".join(f"w{i}" for i in rng.integers(WORDS, size=length)) for length in lengths]
        self.ids: Ids = encode(self.tokenizer, PromptSet(tuple(self.texts)))
        config = LlamaConfig(
            vocab_size=WORDS + 3, hidden_size=self.width, intermediate_size=mlp, num_hidden_layers=self.layers,
            num_attention_heads=heads, num_key_value_heads=keys, max_position_embeddings=512,
        )  # fmt: skip
        for seed, name in enumerate(("base", "aligned")):
            torch.manual_seed(seed)
            with torch.device(device):
                model = LlamaForCausalLM(config).to(torch.bfloat16)
            model.save_pretrained(home / name)
            self.tokenizer.save_pretrained(home / name)
            self.parameters = sum(weight.numel() for weight in model.parameters())
        self.placement = gl.Placement(device=str(device), dtype="bf16")
        self.sequence = gl.ModelSequence.from_folders(
            witness=home / "base", anchor=home / "aligned", probes=self.texts[:32]
        )

    def opened(self) -> Any:
        """The anchor as gravlens opens it."""
        return gl.open_model(self.sequence.anchor, device=str(self.device), dtype="bf16")

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds and result, with the device's queue empty before and after."""
        self.wait()
        began = perf_counter()
        found = work()
        self.wait()
        return perf_counter() - began, found

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def peak(self, work: Callable[[], Any]) -> float | None:
        """GiB of the device's memory that the work allocates on top of what is there; None off CUDA."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def batches(self) -> list[tuple[list[int], Any]]:
        """Rows and padded prompts of similar lengths."""
        rows = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]))
        parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        return [(part, pad([self.ids[i] for i in part], side="left")) for part in parts]


def rounds(bench: Bench, contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender, in turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, work in contenders.items():
            seconds[name].append(bench.timed(work)[0])
    return {name: took[1:] for name, took in seconds.items()}


def ratios(seconds: dict[str, list[float]], to: str) -> dict[str, float]:
    """Medians of the ratios within a round."""
    return {
        name: statistics.median(a / b for a, b in zip(took, seconds[to], strict=True)) for name, took in seconds.items()
    }


# --- reading --------------------------------------------------------------------------------------------------------
def reading(bench: Bench, repeats: int) -> dict[str, Any]:
    """Ratios to the bare backbone's pass, the states' agreement, and the memory taken."""
    readers = {"gravlens": gravlens_reader(bench), "hugging_face": hugging_face(bench), **peers(bench)}
    there = {name: work for name, work in readers.items() if work is not None}
    wanted = there["gravlens"]()[:, :-1]  # the last block's state is normed by some
    apart = {
        name: float((np.linalg.norm(work()[:, :-1] - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).max())
        for name, work in there.items()
    }
    seconds = rounds(bench, {"floor": backbone(bench), **there}, repeats)
    return {
        "tokens": sum(map(len, bench.ids)),
        "floor_seconds": statistics.median(seconds["floor"]),
        "ratio_to_floor": ratios(seconds, "floor"),
        "largest_relative_difference": apart,
        "peak_gib": {name: bench.peak(work) for name, work in there.items()},
        "not_installed": sorted(readers.keys() - there.keys()),
    }


def backbone(bench: Bench) -> Callable[[], None]:
    """The pass alone, nothing read."""
    model = AutoModel.from_pretrained(bench.home / "aligned", dtype=torch.bfloat16).to(bench.device).eval()

    def work() -> None:
        with torch.inference_mode():
            for _, batch in bench.batches():
                ids, mask = batch.input_ids.to(bench.device), batch.attention_mask.to(bench.device)
                model(input_ids=ids, attention_mask=mask, use_cache=False)

    return work


def gravlens_reader(bench: Bench) -> Callable[[], np.ndarray]:
    """`read_residuals` of an open model."""
    model = bench.opened()
    return lambda: read_residuals(model, bench.ids, layers=range(bench.layers)).numpy()


def collected(bench: Bench, states_of: Callable[[Any, Any], torch.Tensor]) -> Callable[[], np.ndarray]:
    """States [prompt, layer, d_model] by a function of ids and mask."""

    def work() -> np.ndarray:
        states = np.empty((len(bench.ids), bench.layers, bench.width), np.float32)
        with torch.inference_mode():
            for rows, batch in bench.batches():
                found = states_of(batch.input_ids.to(bench.device), batch.attention_mask.to(bench.device))
                states[rows] = found.float().cpu().numpy()
        return states

    return work


def hugging_face(bench: Bench) -> Callable[[], np.ndarray]:
    """`output_hidden_states`."""
    model = AutoModelForCausalLM.from_pretrained(bench.home / "aligned", dtype=torch.bfloat16).to(bench.device).eval()

    def states_of(ids: Any, mask: Any) -> torch.Tensor:
        out = model(ids, attention_mask=mask, output_hidden_states=True)
        return torch.stack([hidden[:, -1] for hidden in out.hidden_states[1:]], 1)

    return collected(bench, states_of)


def peers(bench: Bench) -> dict[str, Callable[[], np.ndarray] | None]:
    """TransformerLens and nnsight where they are installed."""
    found = versions()
    return {
        "transformer_lens": None if found["transformer-lens"] == "not installed" else transformer_lens(bench),
        "nnsight": None if found["nnsight"] == "not installed" else nnsight_trace(bench),
    }


def transformer_lens(bench: Bench) -> Callable[[], np.ndarray]:
    """`run_with_cache` of the residual stream alone, through the bridge."""
    model = gl.open_model(bench.sequence.anchor, device=str(bench.device), dtype="bf16", through="bridge").module
    names = [f"blocks.{layer}.hook_out" for layer in range(bench.layers)]

    def states_of(ids: Any, mask: Any) -> torch.Tensor:
        _, cache = model.run_with_cache(ids, attention_mask=mask, names_filter=lambda name: name in names)
        return torch.stack([cache[name][:, -1] for name in names], 1)

    return collected(bench, states_of)


def nnsight_trace(bench: Bench) -> Callable[[], np.ndarray]:
    """One trace a batch."""
    from nnsight import NNsight, save

    inner = AutoModelForCausalLM.from_pretrained(bench.home / "aligned", dtype=torch.bfloat16).to(bench.device).eval()
    model: Any = NNsight(inner)

    def states_of(ids: Any, mask: Any) -> torch.Tensor:
        with model.trace(ids, attention_mask=mask):
            found = []
            for layer in range(bench.layers):
                found.append(model.model.layers[layer].output[:, -1])
            found = save(found)
        return torch.stack(found, 1)

    return collected(bench, states_of)


# --- generation and blocking ----------------------------------------------------------------------------------------
def generation(bench: Bench, repeats: int, tokens: int = 32) -> dict[str, Any]:
    """Tokens a second of plain answers, and ratios of steered and ablated ones to them."""
    model = bench.opened()
    model.tokenizer.eos_token_id = None  # answers of one length
    vector = np.random.default_rng(0).standard_normal(model.d_model)
    one = direction_from(vector, layer=model.n_layers // 2, distance=0.01)
    ids = bench.ids[:BATCH]

    def answers(*edits: Any) -> None:
        if not edits:
            generate(model, ids, max_new_tokens=tokens)
            return
        with gl.intervene(model, *edits):
            generate(model, ids, max_new_tokens=tokens)

    spans = everywhere(one, model)
    contenders = {"plain": answers, "steer": lambda: answers(Steer(spans)), "ablate": lambda: answers(Ablate(spans))}
    seconds = rounds(bench, contenders, repeats)
    rate = len(ids) * tokens / statistics.median(seconds["plain"])
    return {"tokens_per_second": rate, "ratio_to_plain": ratios(seconds, "plain"), "layers": model.n_layers}


def blocking(bench: Bench, steps: int) -> dict[str, Any]:
    """Seconds of a step of `finetune` without and with blockers, as multiples of those without."""
    states = gl.cache_residuals(bench.sequence, placement=bench.placement)
    vs, probes = gl.locate_vrev(states), bench.sequence.require_probes()
    examples = [Example(text, " ".join(text.split()[:8])) for text in bench.texts]
    blockers = {
        "none": None,
        "penalty (8 of 32)": Penalty(vs, probes, batch=8),
        "projection (8 of 32)": UpdateProjection(vs, probes, batch=8),
        "preventative steering": PreventativeSteering(vs, strength=1.0),
    }
    seconds = {}
    for name, blocker in blockers.items():
        run = gl.finetune(
            bench.sequence.anchor,
            examples,
            out=bench.home / "run",
            recipe=gl.Recipe(steps=steps, batch=4, learning_rate=1e-5, bf16=True),
            save_steps=(),
            blocker=blocker,
        )
        seconds[name] = run.seconds_per_step
        shutil.rmtree(bench.home / "run")
    return {"seconds_per_step": seconds, "ratio": {name: took / seconds["none"] for name, took in seconds.items()}}


if __name__ == "__main__":
    app()
