"""python benchmarks/exchange.py --repeng REPENG/bin/python --lm-eval LM/bin/python --llama-cpp LLAMA/bin/python

Does a direction that gravlens wrote steer in other programs as it does here: same sign, same layer, same length?

Two random Llamas with a tokenizer are witness and anchor, v_rev is located on prompts and written with `to_gguf` and
`to_steered`, a file for each layer and one for all. repeng, lm-evaluation-harness and llama.cpp, each in an environment
of its own (benchmarks/exchange_contenders.py says which), run the anchor with each file at scale 1 on the same tokens,
in fp32. Their logits at every token are held against those under `Steer(v)` here, and against what they would be if
the layer were one more or one less, or the sign the opposite. Writes exchange.json.
"""

import json
import platform
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import gravlens as gl
from gravlens.directions.direction import Direction, Directions
from gravlens.history.encoding import encode
from gravlens.history.prompts import PromptSet
from gravlens.interventions.orthogonalization import save_folder
from gravlens.models.opening import OpenModel, quiet
from gravlens.organisms.refusal_language import build_tokenizer, held_out_prompts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

LAYERS, WIDTH, HEADS, KV_HEADS = 4, 64, 4, 2
CONTENDERS = Path(__file__).with_name("exchange_contenders.py")
Python = Annotated[Path | None, typer.Option(help="Python of an environment that has it; it is left out without one.")]


@app.command()
def main(
    repeng: Python = None,
    lm_eval: Python = None,
    llama_cpp: Python = None,
    out: Annotated[Path, typer.Option(help="Folder for exchange.json.")] = Path("."),
) -> None:
    """How far are other programs' logits from gravlens', steered by the same file?"""
    pythons = {"repeng": repeng, "lm_eval": lm_eval, "llama_cpp": llama_cpp}
    with tempfile.TemporaryDirectory() as scratch, quiet():
        home = Path(scratch)
        model, vs = prepare(home)
        ids = json.loads((home / "ids.json").read_text())
        found = {name: compared(name, python, home, model, vs, ids) for name, python in pythons.items() if python}
    result = {
        "model": {
            "layers": LAYERS,
            "width": WIDTH,
            "dtype": "float32",
            "prompts": len(ids),
            "tokens": sum(map(len, ids)),
        },
        "distances": {one.layer: one.distance for one in vs},
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "programs": found,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "exchange.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, program in found.items():
        typer.echo(f"{name} {program['version']}: without a vector {program['unsteered']:.1e}")
        for file, row in program["files"].items():
            typer.echo("  " + file + ": " + ", ".join(f"{what} {value:.1e}" for what, value in row.items()))


# --- the model, the directions, the files ---------------------------------------------------------------------------


def prepare(home: Path) -> tuple[OpenModel, Directions]:
    """The anchor as a folder and as GGUF, the tokens, and the files of every layer's v_rev."""
    tokenizer, texts = build_tokenizer(), held_out_prompts()
    witness, anchor = (random_llama(seed, len(tokenizer)) for seed in (0, 1))
    sequence = gl.ModelSequence.from_models(
        witness=witness, anchor=anchor, tokenizer=tokenizer, probes=list(texts[:32])
    )
    vs, model = gl.locate_vrev(sequence), gl.open_model(anchor, tokenizer=tokenizer)
    save_folder(model, home / "model")
    to_model_gguf(anchor, home / "model.gguf")
    ids = encode(tokenizer, PromptSet(tuple(texts[32:40])))
    (home / "ids.json").write_text(json.dumps(ids))
    for name, chosen in files_of(vs).items():
        gl.exchange.to_gguf(chosen, home / f"{name}.gguf", model_hint="llama", layer_0=0 in chosen.layers)
        gl.exchange.to_steered(chosen, home / f"{name}.pt", model=model)
    return model, vs


def files_of(vs: Directions) -> dict[str, Directions]:
    """A file for each layer, and one for all but layer 0, which llama.cpp has not."""
    return {**{f"layer_{layer}": vs.at([layer]) for layer in vs.layers}, "layers_1_up": vs.at(vs.layers[1:])}


def random_llama(seed: int, vocabulary: int) -> LlamaForCausalLM:
    """Random weights, large enough for prompts and layers to matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=256, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def to_model_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The model for llama.cpp, in fp32 and without a tokenizer: it is given token ids."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    head_width = config.hidden_size // config.num_attention_heads
    for add, value in {
        writer.add_context_length: config.max_position_embeddings,
        writer.add_embedding_length: config.hidden_size,
        writer.add_block_count: config.num_hidden_layers,
        writer.add_feed_forward_length: config.intermediate_size,
        writer.add_head_count: config.num_attention_heads,
        writer.add_head_count_kv: config.num_key_value_heads,
        writer.add_layer_norm_rms_eps: config.rms_norm_eps,
        writer.add_rope_dimension_count: head_width,
        writer.add_rope_freq_base: config.rope_parameters["rope_theta"],
        writer.add_vocab_size: config.vocab_size,
        writer.add_file_type: gguf.LlamaFileType.ALL_F32,
        writer.add_tokenizer_model: "none",
    }.items():
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        rows = weight.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp rotates neighbours, transformers halves
            rows = rows.reshape(-1, 2, head_width // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- here and there -------------------------------------------------------------------------------------------------


def compared(
    name: str, python: Path, home: Path, model: OpenModel, vs: Directions, ids: list[list[int]]
) -> dict[str, Any]:
    """Greatest differences of logits over all tokens: as it should be, and as it would be if something were amiss."""
    done = subprocess.run([python, CONTENDERS, name, home], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed in {python}:\n{done.stderr[-3000:]}")
    with np.load(home / f"{name}.npz", allow_pickle=False) as file:
        theirs = {key: file[key] for key in file.files}

    def off(file: str, *steers: gl.Steer) -> float:
        return float(np.abs(theirs[file] - logits(model, ids, *steers)).max())

    rows = {
        file: {
            "as_here": off(file, gl.Steer(chosen)),
            "opposite_sign": off(file, gl.Steer(chosen, -1.0)),
            **{where: off(file, gl.Steer(moved)) for where, moved in shifted(chosen).items()},
            "no_vector": off(file, *()),
        }
        for file, chosen in files_of(vs).items()
        if file in theirs
    }
    found = {"version": str(theirs["version"]), "unsteered": off("unsteered"), "files": rows}
    if (home / f"{name}_back.gguf").exists():
        again = gl.exchange.from_gguf(home / f"{name}_back.gguf")
        found["read_back"] = float(np.abs(again.vectors * again.distances[:, None] - scaled(vs.at(again.layers))).max())
    return found


def shifted(chosen: Directions) -> dict[str, Directions]:
    """The same vectors a layer up and a layer down, where the model has those layers."""
    moved = {"next_layer": 1, "layer_before": -1}
    return {
        where: Directions(tuple(Direction(one.vector, one.layer + by, one.distance) for one in chosen))
        for where, by in moved.items()
        if all(0 <= one.layer + by < LAYERS for one in chosen)
    }


def scaled(vs: Directions) -> np.ndarray:
    """distance · v of each layer."""
    return vs.vectors * vs.distances[:, None]


def logits(model: OpenModel, ids: list[list[int]], *steers: gl.Steer) -> np.ndarray:
    """[token, vocabulary] of all prompts, one after the other."""

    def run() -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([model.module(torch.tensor([one])).logits[0].numpy() for one in ids])

    if not steers:
        return run()
    with gl.intervene(model, *steers):
        return run()


if __name__ == "__main__":
    app()
