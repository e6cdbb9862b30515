"""python benchmarks/residuals.py    (needs nnsight beside gravlens; see --help)

What it costs to read the residual stream of checkpoints: gravlens, TransformerLens, Hugging Face and nnsight on the
same folders and prompts, interleaved in one process. All give the last token's state after each of 12 blocks, and
each is held against the others' states before it is timed. A Llama of random weights, 12 layers of width 512; chat
prompts of mixed length, once behind a system prompt of 40 tokens that all share, once without it.

*End to end* is: open the checkpoint's folder, run, write the states. *Pass* is the model's run alone. The floor is the
pass of the bare backbone over all tokens, sorted by length, 32 prompts at a time, right-padded, no hooks; every figure
is a ratio to it. Contenders as users write them take prompts as they come, 32 at a time. Writes residuals.json.
"""

import json
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from copy import copy
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from time import perf_counter, process_time
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gravlens as gl
from gravlens.history.encoding import encode, pad
from gravlens.history.prompts import PromptSet
from gravlens.models.opening import quiet

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

LAYERS, WIDTH, WORDS, SYSTEM, BATCH = 12, 512, 8192, 40, 32
TEMPLATE = "{% for turn in messages %}<user> {{ turn['content'] }} {% endfor %}<assistant>"
States = np.ndarray  # [prompt, layer, d_model]
Ids = Sequence[Sequence[int]]


@app.command()
def main(
    prompts: Annotated[int, typer.Option(min=8, help="Prompts of each workload.")] = 128,
    checkpoints: Annotated[int, typer.Option(min=1, help="Checkpoints that each contender reads.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each contender is timed, in turn.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = os.cpu_count() or 1,
    cpu_seconds: Annotated[bool, typer.Option(help="Count CPU seconds, where other work runs beside.")] = False,
    only: Annotated[str, typer.Option(help="Contenders whose name holds this, and the floor.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for residuals.json.")] = Path("."),
) -> None:
    """What does it cost to read residual states, as a multiple of the bare model's pass?"""
    torch.set_num_threads(threads)
    clock = process_time if cpu_seconds else perf_counter
    workloads = {}
    with tempfile.TemporaryDirectory() as scratch, quiet(), redirect_stdout(StringIO()):
        for name, system in (("shared_prefix", SYSTEM), ("no_prefix", 0)):
            history = History(Path(scratch) / name, system, prompts, checkpoints)
            workloads[name] = measured(history, repeats, clock, only)
    machine = {
        "processor": processor(),
        "threads": threads,
        "clock": clock.__name__,
        "python": platform.python_version(),
    }
    machine |= {package: version(package) for package in ("torch", "transformers", "transformer-lens", "nnsight")}
    result = {
        "machine": machine,
        "prompts": prompts,
        "checkpoints": checkpoints,
        "repeats": repeats,
        "workloads": workloads,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "residuals.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, found in workloads.items():
        typer.echo(f"{name}: {found['tokens']} tokens, {found['shared']:.0%} shared, {found['floor_seconds']:.2f} s")
        for contender, ratio in found["ratio_to_floor"].items():
            typer.echo(f"  {contender:<34} {ratio:5.2f}")


# --- the work -------------------------------------------------------------------------------------------------------


class History:
    """Folders of random checkpoints, prompts, and their tokens."""

    def __init__(self, home: Path, system: int, prompts: int, checkpoints: int) -> None:
        rng = np.random.default_rng(0)
        self.home, self.tokenizer = home, tokenizer_of([f"w{i}" for i in rng.integers(WORDS, size=system)])
        lengths = (10 + 110 * rng.random(prompts) ** 2).astype(int)
        self.texts = [" ".join(f"w{i}" for i in rng.integers(WORDS, size=length)) for length in lengths]
        self.ids = encode(self.tokenizer, PromptSet(tuple(self.texts)))
        self.shared = system
        self.folders = [home / f"checkpoint-{step}" for step in range(checkpoints)]
        for step, folder in enumerate(self.folders):
            random_llama(step).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def first(self, n: int) -> "History":
        """The same with its first prompts alone."""
        few = copy(self)
        few.texts, few.ids = self.texts[:n], self.ids[:n]
        return few

    def sequence(self) -> gl.ModelSequence:
        """The same folders as gravlens takes them."""
        first, *rest = self.folders
        runs = {"run": rest[1:]} if rest[1:] else {}
        return gl.ModelSequence.from_folders(witness=first, anchor=(rest or [first])[0], runs=runs)


def tokenizer_of(system: Sequence[str]) -> PreTrainedTokenizerFast:
    """Words by their numbers, and a chat template that begins with a system prompt."""
    vocabulary = {
        word: i for i, word in enumerate([*(f"w{i}" for i in range(WORDS)), "<user>", "<assistant>", "<eos>"])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = " ".join([*system, TEMPLATE])
    return tokenizer


def random_llama(seed: int) -> LlamaForCausalLM:
    """12 layers of width 512, 45 million weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS + 3, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=8, max_position_embeddings=512,
        )
    )  # fmt: skip


# --- the contenders: (folder, history) -> states --------------------------------------------------------------------


class Timed:
    """Seconds of the pass alone, within a contender."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, 0.0

    def __enter__(self) -> None:
        self._start = self.clock()

    def __exit__(self, *_: object) -> None:
        self.seconds += self.clock() - self._start


def in_order(ids: Ids) -> Iterator[list[int]]:
    """Batches of prompts as they come."""
    rows = list(range(len(ids)))
    yield from (rows[i : i + BATCH] for i in range(0, len(rows), BATCH))


def by_length(ids: Ids) -> Iterator[list[int]]:
    """Batches of prompts of similar lengths."""
    rows = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    yield from (rows[i : i + BATCH] for i in range(0, len(rows), BATCH))


def floor(folder: Path, history: History, timed: Timed) -> None:
    """The bare backbone's pass, nothing read."""
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode(), timed:
        for rows in by_length(history.ids):
            batch = pad([history.ids[i] for i in rows])
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def hugging_face(tuned: bool) -> Callable[[Path, History, Timed], States]:
    """`output_hidden_states`, as users write it, or of the backbone alone over prompts sorted by length."""

    def contender(folder: Path, history: History, timed: Timed) -> States:
        model = (AutoModel if tuned else AutoModelForCausalLM).from_pretrained(folder).eval()
        more = {"output_hidden_states": True, **({"use_cache": False} if tuned else {})}
        states = np.empty((len(history.ids), LAYERS, WIDTH), np.float32)
        with torch.inference_mode(), timed:
            for rows in (by_length if tuned else in_order)(history.ids):
                batch = pad([history.ids[i] for i in rows], side="left")
                out = model(batch.input_ids, attention_mask=batch.attention_mask, **more)
                states[rows] = torch.stack([hidden[:, -1] for hidden in out.hidden_states[1:]], 1).numpy()
        return states

    return contender


def transformer_lens(filtered: bool) -> Callable[[Path, History, Timed], States]:
    """`run_with_cache`, of everything or of the residual stream alone."""

    def contender(folder: Path, history: History, timed: Timed) -> States:
        from transformer_lens.model_bridge import TransformerBridge

        model: Any = TransformerBridge.boot_transformers(str(folder))
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
        canonical = [f"blocks.{layer}.hook_out" for layer in range(LAYERS)]
        states = np.empty((len(history.ids), LAYERS, WIDTH), np.float32)
        with torch.inference_mode(), timed:
            for rows in in_order(history.ids):
                batch = pad([history.ids[i] for i in rows], side="left")
                more = {"names_filter": lambda name: name in names or name in canonical} if filtered else {}
                _, cache = model.run_with_cache(batch.input_ids, attention_mask=batch.attention_mask, **more)
                states[rows] = torch.stack([cache[name][:, -1] for name in names], 1).numpy()
        return states

    return contender


def nnsight_trace(folder: Path, history: History, timed: Timed) -> States:
    """One trace a batch."""
    from nnsight import NNsight, save

    model: Any = NNsight(AutoModelForCausalLM.from_pretrained(folder).eval())
    states = np.empty((len(history.ids), LAYERS, WIDTH), np.float32)
    with torch.inference_mode(), timed:
        for rows in in_order(history.ids):
            batch = pad([history.ids[i] for i in rows], side="left")
            with model.trace(batch.input_ids, attention_mask=batch.attention_mask):
                found = []
                for layer in range(LAYERS):
                    found.append(model.model.layers[layer].output[:, -1])
                found = save(found)
            states[rows] = torch.stack(found, 1).numpy()
    return states


PEERS: dict[str, Callable[[Path, History, Timed], States]] = {
    "transformer_lens": transformer_lens(filtered=False),
    "transformer_lens_filtered": transformer_lens(filtered=True),
    "hugging_face": hugging_face(tuned=False),
    "hugging_face_tuned": hugging_face(tuned=True),
    "nnsight": nnsight_trace,
}


# --- timing ---------------------------------------------------------------------------------------------------------


def measured(history: History, repeats: int, clock: Callable[[], float], only: str) -> dict[str, Any]:
    """Seconds of every contender as ratios to the floor's in the same round."""
    peers = {name: peer for name, peer in PEERS.items() if only in name}
    check_alike(history, peers)
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        bare = Timed(clock)
        for folder in history.folders:
            floor(folder, history, bare)
        seconds.setdefault("floor", []).append(bare.seconds)
        for name, found in (("gravlens", gravlens_twice(history, clock)), *peers_once(history, peers, clock)):
            for what, took in found.items():
                seconds.setdefault(f"{name}{what}", []).append(took)
    tokens = sum(map(len, history.ids))
    least = {name: statistics.median(took) for name, took in seconds.items()}
    pairs = {name: [a / b for a, b in zip(took, seconds["floor"], strict=True)] for name, took in seconds.items()}
    return {
        "tokens": tokens,
        "shared": history.shared * len(history.ids) / tokens,
        "floor_seconds": least["floor"],
        "ratio_to_floor": {name: statistics.median(pair) for name, pair in pairs.items()},
        "ratios": pairs,
    }


def gravlens_twice(history: History, clock: Callable[[], float]) -> dict[str, float]:
    """End to end into an empty store, the same call again, and end to end in memory."""
    store = history.home / "store"
    shutil.rmtree(store, ignore_errors=True)
    sequence, wanted = history.sequence(), list(history.sequence())[: len(history.folders)]
    took = {}
    for what, where in (("", store), ("_again", store), ("_in_memory", None)):
        start = clock()
        gl.cache_residuals(sequence, history.texts, checkpoints=wanted, store=where)
        took[what] = clock() - start
    return took


def peers_once(
    history: History, peers: dict[str, Callable[[Path, History, Timed], States]], clock: Callable[[], float]
) -> Iterator[tuple[str, dict[str, float]]]:
    """(contender, its seconds end to end and of the pass alone)."""
    for name, peer in peers.items():
        timed, start = Timed(clock), clock()
        for folder in history.folders:
            np.save(history.home / "states.npy", peer(folder, history, timed))
        yield name, {"": clock() - start, "_pass": timed.seconds}


def check_alike(history: History, peers: dict[str, Callable[[Path, History, Timed], States]]) -> None:
    """Every contender reads the same states: to 1e-4 of their length, below the last layer, which some norm."""
    sequence, folder, few = history.sequence(), history.folders[0], history.first(BATCH)
    wanted = gl.cache_residuals(sequence, few.texts, checkpoints=[sequence.witness]).values[0][:, :-1]
    for name, peer in peers.items():
        off = np.linalg.norm(peer(folder, few, Timed(perf_counter))[:, :-1] - wanted, axis=-1)
        assert (off <= 1e-4 * np.linalg.norm(wanted, axis=-1)).all(), f"{name} reads other states"


def processor() -> str:
    """What it runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{named}, {os.cpu_count()} cores"


if __name__ == "__main__":
    app()
