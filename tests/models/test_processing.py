"""TransformerLens' processing, seen from the weights: what it does to resid_post, what is refused and what is not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from histories import PROMPT_IDS, RAGGED, assert_same_states, hooked_twin, moved, reference, refused
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from gravlens.activations.residuals import cache_residuals, read_residuals
from gravlens.behavior.scores import refusal_log_odds
from gravlens.core.errors import GravlensError
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.interventions.edits import Ablate
from gravlens.interventions.effects import causal_effect
from gravlens.interventions.hooks import intervene
from gravlens.models.families import family_of
from gravlens.models.opening import open_model
from gravlens.models.swapping import open_each

BELOW = range(tiny.LAYERS - 1)  # Hugging Face's last hidden state is post-norm
FLAGS = "fold_ln center_writing_weights center_unembed fold_value_biases refactor_factored_attn_matrices".split()
CENTRING = "center_writing_weights"
RIGHT_CALL = {"hooked_transformer": "from_pretrained_no_processing", "bridge": "boot_transformers"}
tl_kinds = pytest.mark.parametrize("kind", RIGHT_CALL)


def gpt2(seed: int = 0) -> nn.Module:
    """A GPT-2 whose norms have weights of their own, so that folding has something to fold."""
    model: Any = moved(tiny.gpt2(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in filter(lambda part: isinstance(part, nn.LayerNorm), model.modules()):
            norm.weight += 0.3 * torch.randn(tiny.WIDTH, generator=generator)
            norm.bias += 0.3 * torch.randn(tiny.WIDTH, generator=generator)
    return model


def neox(seed: int = 0) -> nn.Module:
    """Rotary positions, attention and MLP in parallel."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=tiny.WIDTH,
        intermediate_size=48,
        num_hidden_layers=tiny.LAYERS,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return GPTNeoXForCausalLM(config).eval()


def processed(model: nn.Module, kind: str, folder: Path, *flags: str) -> Any:
    """The same weights in TransformerLens, processed by its own calls with these flags alone."""
    wanted = {flag: flag in flags for flag in FLAGS}
    if kind == "hooked_transformer":
        twin = hooked_twin(model)
        twin.load_and_process_state_dict(twin.state_dict(), **wanted)
        return twin
    folder.mkdir(exist_ok=True)
    bridge = open_model(tiny.save(model, folder / str(len(list(folder.iterdir())))), through="bridge").module
    bridge.enable_compatibility_mode(disable_warnings=True, **wanted)
    return bridge


def centred(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """The closed form for a Hugging Face GPT-2: every write less its mean over d_model."""
    twin: Any = copy.deepcopy(model)
    writes = [twin.transformer.wte.weight, twin.transformer.wpe.weight]
    for block in twin.transformer.h:
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            writes += [projection.weight, projection.bias]
    with torch.no_grad():
        for weight in writes:
            weight -= weight.mean(-1, keepdim=True)
    return twin.to(dtype)


def own_states(model: Any) -> torch.Tensor:
    """TransformerLens' own cache, which gravlens has no part in."""
    rows = []
    for ids in PROMPT_IDS:
        _, cache = model.run_with_cache(torch.tensor([ids]))
        rows.append(torch.stack([cache[f"blocks.{layer}.hook_resid_post"][0, -1] for layer in BELOW]))
    return torch.stack(rows).detach()


def sequence(**models: nn.Module) -> ModelSequence:
    runs = {"seed0": {5: models["step5"]}} if "step5" in models else {}
    return ModelSequence.from_models(
        witness=models["witness"],
        anchor=models["anchor"],
        runs=runs,
        probes=tiny.PROMPTS,
        held_out=tiny.PROMPTS,
        tokenizer=tiny.TOKENIZER,
    )


# -- what each processing does to resid_post -----------------------------------------------------------------------


@tl_kinds
@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag != CENTRING])
def test_pitfall_5_all_but_centring_leaves_resid_post_and_is_accepted(kind: str, flag: str, tmp_path: Path) -> None:
    model = gpt2()
    twin = processed(model, kind, tmp_path, flag)
    assert_same_states(own_states(twin), reference(model, PROMPT_IDS, BELOW))
    opened = open_model(twin, tokenizer=tiny.TOKENIZER)
    assert_same_states(read_residuals(opened, PROMPT_IDS, layers=BELOW), reference(model, PROMPT_IDS, BELOW))
    assert opened.family.is_folded == (flag == "fold_ln")


@tl_kinds
def test_pitfall_5_centring_takes_the_mean_over_d_model_from_resid_post(kind: str, tmp_path: Path) -> None:
    model = gpt2()
    wanted = reference(model, PROMPT_IDS, BELOW)
    found = own_states(processed(model, kind, tmp_path, CENTRING))
    assert ((found - wanted).norm(dim=-1) > 0.01 * wanted.norm(dim=-1)).all()
    assert_same_states(found, wanted - wanted.mean(-1, keepdim=True))


def test_the_closed_form_is_what_transformerlens_does(tmp_path: Path) -> None:
    model = gpt2()
    assert_same_states(
        reference(centred(model), PROMPT_IDS, BELOW), own_states(processed(model, "bridge", tmp_path, CENTRING))
    )


# -- centred weights are refused -----------------------------------------------------------------------------------


@tl_kinds
@pytest.mark.parametrize("flags", [(CENTRING,), FLAGS[:4], FLAGS], ids=["alone", "defaults", "all"])
def test_pitfall_5_centred_weights_are_refused_with_the_call_that_loads_them_right(
    kind: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    twin = processed(gpt2(), kind, tmp_path, *flags)
    with refused("this checkpoint", "centred"):
        open_model(twin, tokenizer=tiny.TOKENIZER)
    with pytest.raises(GravlensError, match=RIGHT_CALL[kind]):
        open_model(twin)


def test_defaults_of_both_libraries_are_refused(tmp_path: Path) -> None:
    bridge = open_model(tiny.save(gpt2(), tmp_path), through="bridge").module
    bridge.enable_compatibility_mode(disable_warnings=True)
    with refused("centred"):
        open_model(bridge)
    hooked = hooked_twin(gpt2())
    hooked.process_weights_()
    with refused("centred"):
        open_model(hooked)


def test_a_bridge_in_compatibility_mode_without_processing_is_accepted(tmp_path: Path) -> None:
    model = gpt2()
    bridge = open_model(tiny.save(model, tmp_path), through="bridge").module
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    found = read_residuals(open_model(bridge), PROMPT_IDS, layers=BELOW)
    assert_same_states(found, reference(model, PROMPT_IDS, BELOW))


def test_a_family_with_rotary_positions_is_seen_too(tmp_path: Path) -> None:
    with refused("centred"):
        open_model(processed(neox(), "bridge", tmp_path, CENTRING))
    assert open_model(processed(neox(), "bridge", tmp_path, "fold_ln", "fold_value_biases")).kind == "bridge"


@tl_kinds
@pytest.mark.parametrize("name", ["witness", "anchor", "step5"])
def test_a_history_with_one_centred_checkpoint_is_refused_and_names_it(kind: str, name: str, tmp_path: Path) -> None:
    models = {one: processed(gpt2(seed), kind, tmp_path) for seed, one in enumerate(["witness", "anchor", "step5"])}
    assert cache_residuals(sequence(**models)).checkpoints == ("witness", "anchor", "seed0/5")
    models[name] = processed(gpt2(7), kind, tmp_path, CENTRING)
    with refused("seed0/5" if name == "step5" else name, "centred"):
        cache_residuals(sequence(**models))
    if name != "step5":
        with refused(name, "centred"):
            locate_vrev(sequence(**models), layer=1)


@tl_kinds
def test_a_history_whose_checkpoints_are_all_centred_is_refused(kind: str, tmp_path: Path) -> None:
    models = {one: processed(gpt2(seed), kind, tmp_path, CENTRING) for seed, one in enumerate(["witness", "anchor"])}
    with refused("witness", "centred"):
        cache_residuals(sequence(**models))


@tl_kinds
def test_a_direction_meets_no_centred_model(kind: str, tmp_path: Path) -> None:
    twin = processed(gpt2(), kind, tmp_path, CENTRING)
    generator = torch.Generator().manual_seed(0)
    direction = direction_from(torch.randn(tiny.WIDTH, generator=generator).numpy(), layer=1)
    with refused("centred"), intervene(twin, Ablate(direction)):
        pass
    with refused("centred"):
        causal_effect(twin, {"ablated": Ablate(direction)}, score=refusal_log_odds, prompts=tiny.PROMPTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_folder_of_centred_weights_is_refused_first_or_swapped_in(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = [tiny.save(gpt2(seed), tmp_path / f"raw{seed}") for seed in (0, 1)]
    exported = tiny.save(centred(gpt2(2), dtype), tmp_path / "exported")
    for through in ("huggingface", "bridge"):
        with refused(str(exported), "centred"):
            open_model(exported, through=through)
    opened = open_each([Checkpoint(f"run/{i}", f) for i, f in enumerate([*raw, exported])], through="huggingface")
    modules = {next(opened)[1].module, next(opened)[1].module}
    assert len(modules) == 1, "no weights were swapped"
    with refused("run/2", str(exported), "centred"):
        next(opened)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@tl_kinds
def test_rounding_hides_no_centring(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for flags in [(CENTRING,), FLAGS[:4]]:
        with refused("centred"):
            open_model(processed(gpt2(), kind, tmp_path, *flags).to(dtype))
    assert open_model(processed(gpt2(), kind, tmp_path).to(dtype)).dtype == dtype


# -- what looks like centring, or nearly ---------------------------------------------------------------------------


def zero_projections(model: Any) -> None:
    for block in model.transformer.h:
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            projection.weight.zero_()


def centre_all_but_one_bias(model: Any) -> None:
    model.load_state_dict(centred(model).state_dict())
    model.transformer.h[-1].mlp.c_proj.bias += 0.1


def all_zero(model: Any) -> None:
    for weight in model.parameters():
        weight.zero_()


def centre_the_embedding(model: Any) -> None:
    model.transformer.wte.weight -= model.transformer.wte.weight.mean(-1, keepdim=True)


@pytest.mark.parametrize("change", [zero_projections, centre_all_but_one_bias, all_zero, centre_the_embedding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_less_than_every_write_without_a_mean_is_no_centring(change: Callable[[Any], None], dtype: torch.dtype) -> None:
    model: Any = gpt2()
    with torch.no_grad():
        change(model)
    assert open_model(model.to(dtype)).module is model


def test_matrices_of_zeros_do_not_hide_a_centred_model() -> None:
    model = centred(gpt2())
    with torch.no_grad():
        zero_projections(model)
    with refused("centred"):
        open_model(model)


@pytest.mark.parametrize("seed", range(8))
def test_no_random_model_is_taken_for_centred(seed: int) -> None:
    models: list[Any] = [tiny.gpt2(seed), tiny.llama(seed, hidden_size=4, num_attention_heads=2), neox(seed)]
    for model in models:
        for dtype in (torch.float32, torch.bfloat16):
            assert open_model(copy.deepcopy(model).to(dtype)).kind == "huggingface"


def test_rms_norms_allow_no_centring_so_a_processed_bridge_is_accepted(tmp_path: Path) -> None:
    model = moved(tiny.llama(), seed=1)
    bridge = open_model(tiny.save(model, tmp_path), through="bridge").module
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert_same_states(read_residuals(open_model(bridge), RAGGED, layers=BELOW), reference(model, RAGGED, BELOW))


# -- folded ones are accepted among themselves ---------------------------------------------------------------------


@tl_kinds
def test_folded_checkpoints_make_a_history_with_the_states_of_raw_ones(kind: str, tmp_path: Path) -> None:
    raw = {one: gpt2(seed) for seed, one in enumerate(["witness", "anchor", "step5"])}
    folded = {one: processed(model, kind, tmp_path, "fold_ln", "fold_value_biases") for one, model in raw.items()}
    assert_same_states(cache_residuals(sequence(**folded)).values, cache_residuals(sequence(**raw)).values)


@tl_kinds
@pytest.mark.parametrize("name", ["witness", "step5"])
def test_folded_beside_raw_is_refused_and_the_folded_one_is_named(kind: str, name: str, tmp_path: Path) -> None:
    models: dict[str, nn.Module] = {one: gpt2(seed) for seed, one in enumerate(["witness", "anchor", "step5"])}
    models[name] = processed(gpt2(7), kind, tmp_path, "fold_ln")
    with refused("seed0/5" if name == "step5" else name, "folded"):
        cache_residuals(sequence(**models))
    with pytest.raises(GravlensError, match=RIGHT_CALL[kind]):
        cache_residuals(sequence(**models))


def test_a_folded_rms_norm_has_no_weights_in_a_hooked_transformer() -> None:
    raw, twin = tiny.hooked_transformer(normalization_type="RMS"), tiny.hooked_transformer(normalization_type="RMS")
    twin.process_weights_()
    assert (family_of(raw).is_folded, family_of(twin).is_folded) == (False, True)
    assert_same_states(own_states(twin), own_states(raw))
    with refused("anchor", "folded"):
        cache_residuals(sequence(witness=raw, anchor=twin))


def test_norms_at_their_initialisation_are_not_folded(tmp_path: Path) -> None:
    """Weights of one and biases of zero, as in any first checkpoint of a pretraining."""
    start, later = (
        open_model(tiny.save(m, tmp_path / n), through="bridge")
        for n, m in {"start": tiny.gpt2(), "later": gpt2()}.items()
    )
    assert not start.family.is_folded
    assert cache_residuals(sequence(witness=start.module, anchor=later.module)).checkpoints == ("witness", "anchor")
