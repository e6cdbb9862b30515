"""python analyses/measure_architectures.py --out docs/data

Does gravlens read the residual stream that Hugging Face computes, in every family, with any padding, in either way of
opening a folder, and where prompts begin alike and that beginning is run once? Tiny random models of each family are
written to disk, nothing is downloaded. The reference is Hugging Face on each prompt alone: `output_hidden_states`, and
for the last layer, whose hidden state comes after the final norm, a plain hook on the last block. Writes
architectures.csv: for each family × path × padding × dtype the largest difference over prompts and layers, in units of
the state's length (none where gravlens refuses), and prints the table of docs/architectures.md. A minute of one core.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
import transformers
import typer
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from gravlens.activations.positions import queries_of_ids
from gravlens.activations.reader import Reader, read_block
from gravlens.activations.residuals import read_residuals, residuals_of_batch
from gravlens.core.errors import GravlensError
from gravlens.history.encoding import pad
from gravlens.models.opening import OpenModel, open_model, quiet
from gravlens.organisms.refusal_language import build_tokenizer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

COLUMNS = ["architecture", "path", "padding", "dtype", "max_relative_difference"]
PATHS: dict[str, Literal["huggingface", "bridge"]] = {"direct": "huggingface", "bridge": "bridge"}
REUSED = "prefix reused"  # the direct path, where prompts begin alike
PADDINGS = ("none", "left", "right")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LAYERS, WIDTH, WINDOW = 3, 32, 4
TOKENIZER = build_tokenizer()
EOS: Any = TOKENIZER.eos_token_id
# Ragged: longer than two windows, one token, a genuine eos (what padding is made of) and a genuine pad at the end.
PROMPTS = [
    [7, 9, 11, 30, 31, 5, 8, 21, 40, 61, 17, 90, 33],
    [12],
    [1, 50, 60, 70, EOS],
    [1, 3, 70, 80, 4, 18, 25, 99],
    [1, 90, 100, 0],
    [EOS],
]
PREFIX = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]

USUAL = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": EOS,
    "pad_token_id": TOKENIZER.pad_token_id,
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ALL_HEADS = {"num_key_value_heads": None}  # no grouped queries, or by another name
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 4.0}
# Family -> its name in transformers, and what makes it that family.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Gemma2": ("Gemma2", {**SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "Gemma3": ("Gemma3", {**SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "OLMo2": ("Olmo2", {}),
    "OLMo3": ("Olmo3", SLIDING),
    "Mistral": ("Mistral", {"sliding_window": WINDOW}),
    "Phi3": ("Phi3", {"sliding_window": WINDOW}),
    "GPT-NeoX": ("GPTNeoX", ALL_HEADS),
    "GPT-2": ("GPT2", ALL_HEADS),
    "Granite": ("Granite", SCALES),
    "StableLM": ("StableLm", {}),
    "Falcon": ("Falcon", ALL_HEADS),
    "Cohere": ("Cohere", {}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Qwen2-MoE": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 40}),
    "Qwen3-MoE": ("Qwen3Moe", {**EXPERTS, "head_dim": 8}),
    # What the bridge of TransformerLens 3.9 has been seen to miss.
    "Falcon (ALiBi)": ("Falcon", {**ALL_HEADS, "alibi": True, "parallel_attn": False, "multi_query": False}),
    "Falcon (new decoder)": ("Falcon", {**ALL_HEADS, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "Cohere (QK norm)": ("Cohere", {"use_qk_norm": True}),
}


# -- tiny models -------------------------------------------------------------------------------------------------------


def make(architecture: str, folder: Path) -> Path:
    """A random model of a family as an ordinary folder; every weight is drawn, norms' and biases too."""
    name, own = FAMILIES[architecture]
    text = "Text" if name == "Gemma3" else ""
    settings = {key: value for key, value in {**USUAL, **own}.items() if value is not None}
    config = getattr(transformers, f"{name}{text}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += (0.2 if weight.ndim == 1 else 0.05) * torch.randn(weight.shape)
    with quiet():
        model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


# -- Hugging Face's states and gravlens's ------------------------------------------------------------------------------


def reference(
    folder: Path, dtype: torch.dtype, prompts: Sequence[list[int]] = PROMPTS
) -> Float[Tensor, "prompt layer d_model"]:
    """Hugging Face alone: each prompt by itself, unpadded, the state after each block at its last token."""
    with quiet():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    (last,) = (part for name, part in model.named_modules() if re.fullmatch(rf"\w+\.(layers|h)\.{LAYERS - 1}", name))
    return torch.stack([_alone(model, last, ids) for ids in prompts])


def _alone(model: Any, last: Any, ids: list[int]) -> Float[Tensor, "layer d_model"]:
    seen: list[Tensor] = []
    handle = last.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return torch.stack([state[0, -1].float() for state in (*hidden[1:LAYERS], *seen)])


def read(model: OpenModel, padding: str) -> Float[Tensor, "prompt layer d_model"]:
    """What gravlens reads: prompts one by one, or in one batch whose padding is made of the eos token."""
    layers = range(LAYERS)
    if padding == "none":
        return torch.cat([read_residuals(model, [ids], layers=layers) for ids in PROMPTS])
    side: Literal["left", "right"] = "left" if padding == "left" else "right"
    with torch.no_grad():
        return residuals_of_batch(model, pad(PROMPTS, EOS, side), layers=layers)


def read_behind(model: OpenModel, prefix: list[int]) -> Float[Tensor, "prompt layer d_model"]:
    """The same prompts behind a common beginning, whose keys and values are reused where the family allows it."""
    queries, rows = queries_of_ids([prefix + ids for ids in PROMPTS]), torch.empty(len(PROMPTS), LAYERS, WIDTH)
    for batch, states in read_block(Reader(model, layers=range(LAYERS), prefix=prefix), queries):
        rows[batch] = torch.from_numpy(states)
    return rows


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Over prompts and layers: the length of the difference in units of the wanted state's length."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def measure(architecture: str, folder: Path) -> pd.DataFrame:
    """The rows of one family; a path that gravlens refuses has no difference."""
    make(architecture, folder)
    rows = []
    for name, dtype in DTYPES.items():
        wanted = reference(folder, dtype)
        for path in PATHS:
            found = differences(folder, path, dtype, wanted)
            rows += [(architecture, path, padding, name, off) for padding, off in zip(PADDINGS, found, strict=True)]
        found = read_behind(open_model(folder, dtype=dtype), PREFIX)
        off = largest_difference(found, reference(folder, dtype, [PREFIX + ids for ids in PROMPTS]))
        rows.append((architecture, REUSED, "right", name, off))
    return pd.DataFrame(rows, columns=COLUMNS)


def differences(folder: Path, path: str, dtype: torch.dtype, wanted: Tensor) -> list[float]:
    """One for each padding; NaN where the folder is refused."""
    try:
        model = open_model(folder, dtype=dtype, through=PATHS[path])
    except GravlensError:
        return [float("nan")] * len(PADDINGS)
    return [largest_difference(read(model, padding), wanted) for padding in PADDINGS]


# -- the table of the page and the door --------------------------------------------------------------------------------


def page_table(table: pd.DataFrame) -> str:
    """Markdown: a row for each family; fp32 with each padding, the largest of them in bf16; – is a refusal."""
    cells = [*((path, padding) for path in PATHS for padding in PADDINGS), (REUSED, "right")]
    heads = [f"{path}, {padding}" for path, padding in cells] + [f"{path}, bf16" for path in (*PATHS, REUSED)]
    lines = [f"| family | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for architecture, rows in table.groupby("architecture", sort=False):
        fp32 = rows[rows.dtype == "float32"].set_index(["path", "padding"])[COLUMNS[-1]].to_dict()
        bf16 = rows[rows.dtype == "bfloat16"].groupby("path")[COLUMNS[-1]].max().to_dict()
        numbers = [fp32[cell] for cell in cells] + [bf16[path] for path in (*PATHS, REUSED)]
        shown = ["–" if np.isnan(off) else f"{off:.0e}" if off else "0" for off in numbers]
        lines.append(f"| {architecture} | {' | '.join(shown)} |")
    return "\n".join(lines)


@app.command()
def main(out: Annotated[Path, typer.Option(help="Folder for architectures.csv.")] = Path(".")) -> None:
    """How far are gravlens's states from Hugging Face's, in every family, with any padding?"""
    frames = []
    for architecture in tqdm(FAMILIES, "families"):
        with tempfile.TemporaryDirectory() as folder:
            frames.append(measure(architecture, Path(folder)))
    table = pd.concat(frames, ignore_index=True)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "architectures.csv", index=False, float_format="%.2g")
    typer.echo(page_table(table))


if __name__ == "__main__":
    app()
