"""python analyses/measure_support.py --out docs/data

Which model families does gravlens support, and what of each? A tiny random model of every family is written to disk and
opened as a folder; nothing is downloaded. The reference is Hugging Face's own model in memory, on each prompt alone:
states are `output_hidden_states` and a hook on the last block, answers are `generate(do_sample=False)`, an ablation is
a hook on its block. Writes families.csv and prints the table of docs/architectures.md. A minute of one core.
"""

import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import torch
import transformers
import typer
from jaxtyping import Float
from measure_architectures import EOS, LAYERS, TOKENIZER, USUAL, WIDTH
from torch import Tensor, nn
from tqdm.auto import tqdm

from gravlens.activations.reader import read_residuals, residuals_of_batch, reuses_keys
from gravlens.core.errors import GravlensError
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import pad
from gravlens.interventions.edits import Ablate
from gravlens.interventions.hooks import intervene
from gravlens.models.forward import final_logits, generate
from gravlens.models.opening import open_model, quiet

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

COLUMNS = ["family", "class", "states", "padded", "answers", "ablation", "keys_reused", "refused"]
TOKENS = 4
PROMPTS = [[7, 9, 11, 30, 31, 8, 21, 40, 61], [12], [20, 50, 60, 70], [20, 23, 70]]
EXACT = 1e-5  # of a length, in fp32

# -- tiny configurations -----------------------------------------------------------------------------------------------

HEAD = {"head_dim": 8}
FULL = {**HEAD, "layer_types": ["full_attention"] * LAYERS}
SLIDING = {**HEAD, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
LINEAR = {
    **HEAD,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
ZAMBA = {"n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "mamba_d_state": 8, "num_mem_blocks": 1}
NEMOTRON = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
LLAMA4 = {"layer_types": ["chunked_attention", "full_attention", "chunked_attention"], "attention_chunk_size": 64}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(TOKENIZER), "num_kv_shared_layers": 0}
GEMMA4 = {**FULL, **PER_LAYER, "global_head_dim": 8, "num_global_key_value_heads": 2}
GEMMA3N = {**FULL, **PER_LAYER, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * LAYERS}
SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
HALF = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# Text models: their class in transformers, and what makes them that family. None: that family has no such setting.
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "Llama 4": ("Llama4ForCausalLM", {**LOCAL, **LLAMA4, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}),
    "Qwen2": ("Qwen2ForCausalLM", {}),
    "Qwen3": ("Qwen3ForCausalLM", HEAD),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**HEAD, **EXPERTS}),
    "Qwen3-Next": ("Qwen3NextForCausalLM", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "Qwen3.5": ("Qwen3_5ForCausalLM", LINEAR),
    "Gemma": ("GemmaForCausalLM", HEAD),
    "Gemma 2": ("Gemma2ForCausalLM", SLIDING),
    "Gemma 3": ("Gemma3ForCausalLM", SLIDING),
    "Gemma 3n": ("Gemma3nForCausalLM", {**GEMMA3N, "intermediate_size": [48] * LAYERS}),
    "Gemma 4": ("Gemma4ForCausalLM", GEMMA4),
    "Mistral": ("MistralForCausalLM", {"sliding_window": 4}),
    "Ministral": ("MinistralForCausalLM", SLIDING),
    "Ministral 3": ("Ministral3ForCausalLM", HEAD),
    "Mixtral": ("MixtralForCausalLM", {**LOCAL, "sliding_window": None}),
    "GPT-OSS": ("GptOssForCausalLM", {**LOCAL, **SLIDING}),
    "DeepSeek V3": ("DeepseekV3ForCausalLM", {**ROUTED, **LATENT, "n_group": 1, "topk_group": 1}),
    "DeepSeek V4": ("DeepseekV4ForCausalLM", {}),
    "OLMo": ("OlmoForCausalLM", {}),
    "OLMo 2": ("Olmo2ForCausalLM", {}),
    "OLMo 3": ("Olmo3ForCausalLM", SLIDING),
    "SmolLM3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1]}),
    "Phi": ("PhiForCausalLM", {}),
    "Phi 3": ("Phi3ForCausalLM", {}),
    "Granite": ("GraniteForCausalLM", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "Granite 4": (
        "GraniteMoeHybridForCausalLM",
        {**MAMBA, **LOCAL, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention", "mamba"]},
    ),
    "Falcon": ("FalconForCausalLM", {"num_key_value_heads": None}),
    "Falcon-H1": ("FalconH1ForCausalLM", {**HEAD, **MAMBA}),
    "Falcon-Mamba": ("FalconMambaForCausalLM", {"state_size": 8, "time_step_rank": 4}),
    "Mamba": ("MambaForCausalLM", {"state_size": 8, "time_step_rank": 4}),
    "Mamba 2": ("Mamba2ForCausalLM", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "Bamba": ("BambaForCausalLM", {**MAMBA, "attn_layer_indices": [1]}),
    "Jamba": ("JambaForCausalLM", {**JAMBA, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4}),
    "Zamba2": ("Zamba2ForCausalLM", {**ZAMBA, "layers_block_type": ["mamba", "hybrid", "mamba"], "chunk_size": 8}),
    "Nemotron-H": (
        "NemotronHForCausalLM",
        {**NEMOTRON, **HEAD, "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": None},
    ),
    "LFM2": ("Lfm2ForCausalLM", CONV),
    "RecurrentGemma": (
        "RecurrentGemmaForCausalLM",
        {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention", "recurrent"]},
    ),
    "RWKV": ("RwkvForCausalLM", {"attention_hidden_size": 32}),
    "GLM-4": ("Glm4ForCausalLM", HEAD),
    "GLM-4.5": ("Glm4MoeForCausalLM", {**HEAD, **ROUTED}),
    "EXAONE 4": ("Exaone4ForCausalLM", {**SLIDING, "sliding_window_pattern": 2}),
    "ERNIE 4.5": ("Ernie4_5ForCausalLM", HEAD),
    "Hunyuan": ("HunYuanDenseV1ForCausalLM", HEAD),
    "Seed-OSS": ("SeedOssForCausalLM", HEAD),
    "MiniMax-M2": ("MiniMaxM2ForCausalLM", LOCAL),
    "Cohere": ("CohereForCausalLM", {}),
    "Cohere 2": ("Cohere2ForCausalLM", SLIDING),
    "BitNet": ("BitNetForCausalLM", {}),
    "GPT-2": ("GPT2LMHeadModel", {"num_key_value_heads": None}),
    "GPT-J": ("GPTJForCausalLM", {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {"num_key_value_heads": None}),
    "OPT": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": ("BloomForCausalLM", {"n_layer": LAYERS, "n_head": 4}),
}
# Towers are wider than the text models, and as deep.
TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": 28, "patch_size": 14}
CLIP, SIGLIP = {"model_type": "clip_vision_model", **VISION}, {"model_type": "siglip_vision_model", **VISION}
QWEN = {"depth": LAYERS, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 32}
DEEP = {**QWEN, "deepstack_visual_indexes": [0]}
# Image–text models: their class, the text model's type and settings, the vision tower, and the rest.
WRAPPERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Mistral 3": ("Mistral3", "mistral", HEAD, {"model_type": "pixtral", **VISION}, {}),
    "Qwen2-VL": ("Qwen2VL", "qwen2_vl_text", SECTIONS, {**QWEN, "embed_dim": 64, "hidden_size": 32}, {}),
    "Qwen2.5-VL": ("Qwen2_5_VL", "qwen2_5_vl_text", SECTIONS, QWEN, {}),
    "Qwen3-VL": ("Qwen3VL", "qwen3_vl_text", {**HEAD, **SECTIONS}, DEEP, {}),
    "Qwen3-VL-MoE": ("Qwen3VLMoe", "qwen3_vl_moe_text", {**HEAD, **SECTIONS, **EXPERTS}, DEEP, {}),
    "Qwen3.5 (with images)": ("Qwen3_5", "qwen3_5_text", {**LINEAR, "rope_parameters": HALF}, QWEN, {}),
    "SmolVLM": ("SmolVLM", "llama", {}, VISION, {}),
    "Idefics3": ("Idefics3", "llama", {}, VISION, {}),
    "LLaVA": ("Llava", "llama", {}, CLIP, {}),
    "LLaVA-NeXT": ("LlavaNext", "llama", {}, CLIP, {}),
    "LLaVA-OneVision": ("LlavaOnevision", "qwen2", {}, SIGLIP, {}),
    "Gemma 3 (with images)": ("Gemma3", "gemma3_text", SLIDING, VISION, {"mm_tokens_per_image": 4}),
    "Gemma 4 (with images)": ("Gemma4", "gemma4_text", GEMMA4, {"model_type": "gemma4_vision", **TOWER}, {}),
    "PaliGemma": ("PaliGemma", "gemma", HEAD, SIGLIP, {}),
    "LFM2-VL": ("Lfm2Vl", "lfm2", CONV, {"model_type": "siglip2_vision_model", **TOWER}, {}),
    "InternVL": ("InternVL", "qwen2", {}, {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}, {}),
    "Aya Vision": ("AyaVision", "cohere2", SLIDING, SIGLIP, {}),
    "GLM-4.1V": ("Glm4v", "glm4v_text", SECTIONS, {**QWEN, "image_size": 28}, {}),
    "Llama 4 (with images)": (
        "Llama4",
        "llama4_text",
        TEXT["Llama 4"][1],
        {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {},
    ),
}
NAMES = (*TEXT, *WRAPPERS)
AFTER = ("Falcon-Mamba", "Mamba", "Mamba 2", "RWKV")  # their `hidden_states` begin behind the first block
TOWERS = re.compile("vision|visual|image|connector|projector|resampler|perceiver|aligner")


def make(family: str) -> Any:
    """A random model of a family, in memory; every weight is drawn, norms' and biases too."""
    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        model = _wrapper(family) if family in WRAPPERS else _text(family)
        for weight in model.parameters():
            weight += (0.2 if weight.ndim == 1 else 0.05) * torch.randn(weight.shape)
    return model.eval()


def _text(family: str) -> Any:
    name, own = TEXT[family]
    cls = getattr(transformers, name)
    return cls(cls.config_class(**{key: value for key, value in {**USUAL, **own}.items() if value is not None}))


def _wrapper(family: str) -> Any:
    name, kind, text, vision, rest = WRAPPERS[family]
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    return cls(cls.config_class(text_config={"model_type": kind, **USUAL, **text}, vision_config=vision, **rest))


# -- Hugging Face, and gravlens ----------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What a model does with PROMPTS."""

    states: Float[Tensor, "prompt layer d_model"]
    answers: list[list[int]]
    ablated: Float[Tensor, "prompt vocab"]


def vector() -> Float[Tensor, " d_model"]:
    """The unit direction that is ablated at layer 1."""
    return torch.nn.functional.normalize(torch.arange(1.0, WIDTH + 1), dim=0)


def reference(family: str, model: Any) -> Measured:
    """Hugging Face alone: each prompt by itself, unpadded."""
    if family == "Llama 4 (with images)":  # transformers 5.24 cannot run that class on text
        model = model.language_model
    model.generation_config = transformers.GenerationConfig(eos_token_id=EOS, pad_token_id=EOS)
    ids = [torch.tensor([prompt]) for prompt in PROMPTS]
    with torch.no_grad(), quiet():
        states = torch.stack([_states(family, model, one) for one in ids])
        long = [model.generate(one, max_new_tokens=TOKENS, do_sample=False)[0, one.shape[1] :].tolist() for one in ids]
        handle = block(model, 1).register_forward_hook(_ablate)
        ablated = torch.cat([model(one, use_cache=False).logits[:, -1] for one in ids])
        handle.remove()
    return Measured(states, [tokens[: tokens.index(EOS)] if EOS in tokens else tokens for tokens in long], ablated)


def block(model: Any, layer: int) -> nn.Module:
    """The block of the text model by its name in transformers."""
    named = [(name, part) for name, part in model.named_modules() if not TOWERS.search(name)]
    (found,) = (part for name, part in named if re.search(rf"(^|\.)(layers|h|blocks)\.{layer}$", name))
    return found


def _states(family: str, model: Any, ids: Tensor) -> Float[Tensor, "layer d_model"]:
    seen: list[Tensor] = []

    def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = block(model, LAYERS - 1).register_forward_hook(see)
    hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[0 if family in AFTER else 1 :]
    handle.remove()
    return torch.stack([state[0, -1] for state in (*hidden[: LAYERS - 1], *seen)])


def _ablate(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    hidden, v = output[0] if isinstance(output, tuple) else output, vector()
    edited = hidden - (hidden @ v)[..., None] * v
    return (edited, *output[1:]) if isinstance(output, tuple) else edited


def measure(family: str) -> dict[str, Any]:
    """One row of the table; a family that gravlens refuses has a reason and no numbers."""
    model = make(family)
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            model.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        try:
            opened = open_model(folder)
        except GravlensError as error:
            return {"family": family, "class": type(model).__name__, "refused": error.given}
    wanted, layers = reference(family, model), range(LAYERS)
    alone = torch.cat([read_residuals(opened, [ids], layers=layers) for ids in PROMPTS])
    with torch.no_grad():
        batches = [residuals_of_batch(opened, pad(PROMPTS, EOS, side), layers=layers) for side in ("left", "right")]
    with intervene(opened, Ablate(direction_from(vector().numpy(), layer=1))):
        ablated = torch.cat([final_logits(opened, [ids]) for ids in PROMPTS])
    return {
        "family": family,
        "class": type(opened.module).__name__,
        "states": off(alone, wanted.states),
        "padded": max(off(batch, wanted.states) for batch in batches),
        "answers": [generate(opened, [ids], max_new_tokens=TOKENS)[0] for ids in PROMPTS] == wanted.answers,
        "ablation": off(ablated, wanted.ablated),
        "keys_reused": reuses_keys(opened),
        "refused": "",
    }


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest ‖difference‖ over rows, relative to the wanted row's length."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


# -- the table of the page and the command -----------------------------------------------------------------------------


def page_table(table: pd.DataFrame) -> str:
    """Markdown: a row for each family that opens."""
    heads = ["family", "opened as", "states", "padded", "answers", "ablation", "keys reused"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in table[table.states.notna()].to_dict("records"):
        numbers: dict[Any, Any] = {
            name: f"{row[name]:.0e}" if row[name] else "0" for name in ("states", "padded", "ablation")
        }
        told = {**row, **numbers, "answers": _word(row["answers"]), "keys_reused": _word(row["keys_reused"])}
        lines.append(f"| {row['family']} | `{row['class']}` | {' | '.join(told[name] for name in COLUMNS[2:-1])} |")
    return "\n".join(lines)


def page_refused(table: pd.DataFrame) -> str:
    """Markdown: the families that do not open, and why."""
    rows = table[table.states.isna()].to_dict("records")
    return "\n".join(f"- **{row['family']}**: {row['refused']}" for row in rows)


def _word(flag: Any) -> str:
    return "yes" if flag in (True, "True") else "no"


@app.command()
def main(out: Annotated[Path, typer.Option(help="Folder for families.csv.")] = Path(".")) -> None:
    """Which families work, and what of each?"""
    table = pd.DataFrame([measure(family) for family in tqdm(NAMES, "families")], columns=COLUMNS)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "families.csv", index=False, float_format="%.2g")
    rounded = pd.read_csv(out / "families.csv")
    typer.echo(f"{page_table(rounded)}\n\n{page_refused(rounded)}")


if __name__ == "__main__":
    app()
