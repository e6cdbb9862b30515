"""Orthogonalised weights, held against the same model with a hook of the test's own on everything that it writes."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from histories import PROMPT_IDS, assert_same_states, hooks_on, planted_vector, refused, weights_of
from torch import Tensor, nn

from gravlens.activations.residuals import read_residuals
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.vrev import direction_from
from gravlens.history.sequence import Checkpoint
from gravlens.interventions.edits import Ablate, everywhere
from gravlens.interventions.hooks import intervene
from gravlens.interventions.orthogonalization import orthogonalize, orthogonalized
from gravlens.models.forward import final_logits
from gravlens.models.opening import OpenModel, load_tokenizer, open_model

WIDTH = tiny.WIDTH
COMMON = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": tiny.LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": tiny.TOKENIZER.eos_token_id,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
           "shared_expert_intermediate_size": 24}  # fmt: skip
GPT2 = {key: COMMON[key] for key in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "GPT2": {**GPT2, "n_embd": WIDTH, "n_layer": tiny.LAYERS, "n_head": 4, "n_positions": 128},
    "GPTNeoX": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Phi": {},
    "OPT": {"ffn_dim": WIDTH, "word_embed_proj_dim": WIDTH},  # no shape tells the two matrices of its MLP apart
    "Gemma": {},
    "Granite": {"residual_multiplier": 0.3, "embedding_multiplier": 5.0},
    "Mixtral": EXPERTS,
    "Qwen2Moe": EXPERTS,
    "GptOss": {**EXPERTS, "intermediate_size": WIDTH},
}
PARALLEL = ("GPTNeoX", "Phi")
RESCALED = ("Gemma2", "Gemma3", "Olmo2")


def build(family: str, *, trained: bool = True, **changes: Any) -> Any:
    """A random model; `trained`: norms and biases have left the values that they start from."""
    torch.manual_seed(0)
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")
    given = {**({} if family == "GPT2" else COMMON), **FAMILIES.get(family, {}), **changes}
    model = getattr(transformers, f"{family}ForCausalLM", None) or transformers.GPT2LMHeadModel
    model = model(config(**given)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if trained and (weight.ndim == 1 or "Bias" in type(weight).__name__):
                weight += 0.2 * torch.randn(weight.shape)
    return model


def direction(layer: int = 1, seed: int = 0) -> Direction:
    return direction_from(planted_vector(seed).numpy(), layer=layer)


def parts(model: OpenModel) -> list[nn.Module]:
    """The embeddings, and attention and MLP of each block, by the names that these families give them."""
    embeddings = {"embed_tokens", "embed_in", "wte", "wpe", "embed_positions"}
    halves = {"self_attn", "attention", "attn", "mlp", "fc2"}
    found = [m for name, m in model.module.named_modules() if name.split(".")[-1] in embeddings]
    return found + [m for block in model.blocks for name, m in block.named_children() if name in halves]


@contextmanager
def ablated(modules: list[nn.Module], v: Direction) -> Iterator[None]:
    """v taken off the output of each module, at every position."""

    def without(h: Tensor) -> Tensor:
        vector = torch.tensor(v.vector)
        return h - (h @ vector)[..., None] * vector

    def hook(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        return (without(out[0]), *out[1:]) if isinstance(out, tuple) else without(out)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def seen(model: OpenModel) -> tuple[Tensor, Tensor]:
    return read_residuals(model, PROMPT_IDS, layers=range(model.n_layers)), final_logits(model, PROMPT_IDS)


def opened(family: str = "Llama", **changes: Any) -> OpenModel:
    return open_model(build(family, **changes), tokenizer=tiny.TOKENIZER)


# --- what it is equal to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_with_every_write_ablated(family: str) -> None:
    model, v = opened(family), direction()
    _, clean = seen(model)
    with ablated(parts(model), v):
        states, logits = seen(model)
    found_states, found = seen(orthogonalized(model, v))
    assert_same_states(found_states, states, 1e-4)
    assert_same_states(found, logits, 1e-4)
    assert (logits - clean).norm() > 0.01 * clean.norm()


@pytest.mark.parametrize("family", PARALLEL)
def test_with_parallel_blocks_it_is_ablation_at_every_layer(family: str) -> None:
    """Attention and MLP read the same state, so the embedding and the blocks' outputs are all there is to ablate."""
    model, v = opened(family), direction()
    with ablated([model.module.get_input_embeddings()], v), intervene(model, Ablate(everywhere(v, model))):
        states, logits = seen(model)
    found_states, found = seen(orthogonalized(model, v))
    assert_same_states(found_states, states, 1e-4)
    assert_same_states(found, logits, 1e-4)


def test_with_sequential_blocks_ablation_between_blocks_is_something_else() -> None:
    """There the MLP still reads what attention has written along v."""
    model, v = opened("Llama"), direction()
    with ablated([model.module.get_input_embeddings()], v), intervene(model, Ablate(everywhere(v, model))):
        between = final_logits(model, PROMPT_IDS)
    _, found = seen(orthogonalized(model, v))
    assert (found - between).norm() > 0.01 * between.norm()


# --- what changes and what does not -----------------------------------------------------------------------------


def test_what_writes_is_orthogonal_and_all_else_is_as_it_was() -> None:
    model, v = opened("GPT2"), direction()
    before = copy.deepcopy(model.module.state_dict())
    after = orthogonalized(model, v).module.state_dict()
    changed = {name.removeprefix("transformer.") for name in before if not torch.equal(before[name], after[name])}
    blocks = [
        f"h.{layer}.{part}.c_proj.{kind}"
        for layer in range(3)
        for part in ("attn", "mlp")
        for kind in ("weight", "bias")
    ]
    assert changed == {"wte.weight", "wpe.weight", *blocks}
    for name in changed:
        old, new = (state[f"transformer.{name}"].double().numpy() for state in (before, after))
        rest = old - (old @ v.vector.astype(np.float64))[..., None] * v.vector  # GPT-2 keeps [in, out]
        np.testing.assert_allclose(new, rest, atol=1e-6)


@pytest.mark.parametrize("handed", ["opened", "module", "checkpoint"])
def test_a_model_that_was_handed_over_is_not_changed(handed: str) -> None:
    model = opened("Qwen2")
    before = copy.deepcopy(model.module.state_dict())
    source = {"opened": model, "module": model.module, "checkpoint": Checkpoint("anchor", model.module)}[handed]
    without = orthogonalized(source, direction())
    assert all(torch.equal(weight, before[name]) for name, weight in model.module.state_dict().items())
    assert model.module.config.tie_word_embeddings and hooks_on(model) == hooks_on(without) == 0
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["Qwen2", "GPT2", "Gemma", "OPT"])
def test_tied_embeddings_are_untied_and_the_folder_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    model, v = build(family, tie_word_embeddings=True), direction()
    head = model.lm_head.weight.detach().clone()
    folder = tiny.save(model, tmp_path / "model")
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    saved = orthogonalize(folder, v, out=tmp_path / "deep" / "out")
    assert saved == tmp_path / "deep" / "out" and [p.name for p in saved.parent.iterdir()] == ["out"]
    again = open_model(saved)
    assert not again.module.config.tie_word_embeddings
    assert torch.equal(again.module.lm_head.weight, head)
    wanted = orthogonalized(model, v)
    assert_same_states(final_logits(again, PROMPT_IDS), final_logits(wanted, PROMPT_IDS), 1e-5)
    assert again.tokenizer.get_vocab() == load_tokenizer(folder).get_vocab()  # type: ignore[union-attr]
    assert "lm_head.weight" in again.weights and weights_of(saved).name == "model.safetensors"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content


def test_an_untied_unembedding_is_as_it_was(tmp_path: Path) -> None:
    model = build("Llama", tie_word_embeddings=False)
    saved = open_model(orthogonalize(model, direction(), out=tmp_path / "out"))
    assert torch.equal(saved.module.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(saved.module.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_second_time_changes_nothing_more() -> None:
    once = orthogonalized(opened(), direction())
    assert_same_states(
        final_logits(orthogonalized(once, direction()), PROMPT_IDS), final_logits(once, PROMPT_IDS), 1e-5
    )


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("family", RESCALED)
def test_an_architecture_that_rescales_a_write_is_refused_by_name(family: str, trained: bool, tmp_path: Path) -> None:
    """Also where its norms are as they start, all ones: then v stays out, but each write has another length."""
    with refused(f"{family}ForCausalLM"):
        orthogonalize(build(family, trained=trained), direction(), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class _Scaled(nn.Module):
    """An MLP with a scale on each of its outputs, as LayerScale has."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.scale = mlp, nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        return self.mlp(h) * self.scale


class _Deep(nn.Module):
    """An MLP with a part that seems to write, and only feeds the rest."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner, self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()), mlp

    def forward(self, h: Tensor) -> Tensor:
        return self.mlp(self.inner(h))


@pytest.mark.parametrize(("kind", "found"), [(_Scaled, "at layer 1"), (_Deep, "block 1.mlp.inner.0")])
def test_what_is_no_write_or_not_the_whole_of_it_is_found_by_measurement(kind: Any, found: str) -> None:
    model = build("Llama")
    model.model.layers[1].mlp = kind(model.model.layers[1].mlp)
    with refused("LlamaForCausalLM", found):
        orthogonalized(model, direction())


def test_directions_of_several_layers_are_refused_and_why() -> None:
    with pytest.raises(GravlensError, match=r"A Directions was given.*\[0, 2\]"):
        orthogonalized(build("Llama"), Directions((direction(0), direction(2))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (replace(direction(), undefined="witness and anchor do not differ"), "undefined"),
        (replace(direction(), vector=2 * direction().vector), "length 2"),
        (direction(tiny.LAYERS), f"Layer {tiny.LAYERS}"),
        (direction_from(np.ones(WIDTH + 1), layer=1), f"({WIDTH + 1},)"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(wrong: Direction, named: str) -> None:
    with refused(named):
        orthogonalized(build("Llama"), wrong)


def test_other_kinds_of_models_and_half_precision_are_refused(tmp_path: Path) -> None:
    with refused("TransformerBridge"):
        orthogonalized(tiny.opened("bridge", tmp_path / "bridge"), direction())
    with refused("bfloat16"):
        orthogonalized(build("Llama").to(torch.bfloat16), direction())


def test_an_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft")
    with refused("Peft"):
        orthogonalized(peft.get_peft_model(build("Llama"), peft.LoraConfig(task_type="CAUSAL_LM")), direction())


def test_nothing_is_written_over_and_nothing_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened()
    (tmp_path / "there").mkdir()
    with refused("there already exists"):
        orthogonalize(model, direction(), out=tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(tiny.TOKENIZER), "save_pretrained", full)
    with refused("out cannot be written (no space left on device)"):
        orthogonalize(model, direction(), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
