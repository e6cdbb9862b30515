"""Greedy decoding: transformers' own answers token for token, whatever files say; batches of unusual families."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
import transformers
from histories import RAGGED, assert_same_states
from torch import nn
from transformers import GenerationConfig
from typer.testing import CliRunner

from gravlens.activations.residuals import read_residuals
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode, end_of_turn
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.edits import At, Steer
from gravlens.interventions.hooks import intervene
from gravlens.models.forward import continued, end_tokens, final_logits, generate
from gravlens.models.opening import open_model
from gravlens.models.swapping import open_each
from gravlens.models.tokenizers import sequence_tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "analyses"))

import decoding_matrix as matrix  # noqa: E402

KINDS = matrix.KINDS
EOS: Any = tiny.TOKENIZER.eos_token_id
LIBRARIES = ["bridge: Llama", "bridge: GPT-2", "HookedTransformer: GPT-2"]


# -- end tokens --------------------------------------------------------------------------------------------------------


def tokenizer(kind: str, **changes: Any) -> Any:
    found = matrix.tokenizer_of(KINDS[kind], range(100, 100 + len(KINDS[kind].ends)))
    for name, value in changes.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_turn_is_what_the_template_writes_after_an_answer(kind: str) -> None:
    wanted = () if KINDS[kind].turn is None else (100,)  # the first of `ends`
    assert end_of_turn(tokenizer(kind)) == wanted


@pytest.mark.parametrize(
    "after", ["", " w5 <end_of_turn>", "\n", "{{ raise_exception('no assistant') }}", " <end_of_turn_of_another>"]
)
def test_words_white_space_and_a_refusing_template_are_no_end_of_turn(after: str) -> None:
    template = "{% for m in messages %}w1 {{ m['content'] }}" + after + "{% endfor %}"
    assert end_of_turn(tokenizer("Gemma", chat_template=template)) == ()


def test_the_longest_special_token_is_the_one_that_stands_there() -> None:
    given = tokenizer("Gemma")
    given.add_special_tokens({"additional_special_tokens": ["<end", "<end_of_turn>", "w50"]})
    assert end_of_turn(given) == (100,)
    assert (
        end_of_turn(tokenizer("Gemma", chat_template="{% for m in messages %}{{ m['content'][:3] }}{% endfor %}")) == ()
    )


@pytest.mark.long
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT-NeoX", "Mixtral", *LIBRARIES])
def test_answers_are_hugging_faces_token_for_token(family: str, tmp_path: Path) -> None:
    if family.startswith("Hooked"):
        tiny.hooked_transformer()  # skips where TransformerLens has none
    table = pd.DataFrame(list(matrix.rows_of(family, tmp_path)))
    assert table["equal"].all(), f"\n{table}"
    assert list(table["end_of_turn"]) == list(KINDS) and (table["ended"] > 0).all()


@pytest.mark.long
@pytest.mark.parametrize("missing", ["list", "turn"])
def test_a_missed_end_token_would_be_seen(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "turn":
        monkeypatch.setattr("gravlens.models.forward.end_of_turn", lambda _: ())
    else:
        monkeypatch.setattr("gravlens.models.families.HuggingFace.ends", ())
        monkeypatch.setattr("gravlens.models.opening.listed", lambda _: ())
    table = pd.DataFrame(list(matrix.rows_of("Llama", tmp_path))).set_index("end_of_turn")
    wrong = {"turn": ["ChatML", "template only"], "list": ["Llama 3", "list, no template"]}[missing]
    assert table.index[~table["equal"]].tolist() == wrong


# -- generation_config.json ------------------------------------------------------------------------------------------


HOSTILE = {
    "penalty": {"repetition_penalty": 5.0}, "beams": {"num_beams": 4}, "words": {"suppress_tokens": [*range(1, 60)]},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 9}, "least": {"min_new_tokens": 9},
    "sampling": {"do_sample": True, "temperature": 20.0}, "n-grams": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[number] for number in range(1, 60)]},
    "decay": {"exponential_decay_length_penalty": [1, 50.0]}, "watermark": {"watermarking_config": {"bias": 50.0}},
    "guidance": {"guidance_scale": 4.0}, "lookup": {"prompt_lookup_num_tokens": 3}, "many": {"num_return_sequences": 1},
    "static cache": {"cache_implementation": "static"}, "no cache": {"use_cache": False}, "length": {"max_length": 5},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A folder, and Hugging Face's own greedy tokens after each prompt alone."""
    folder = tiny.save(tiny.llama(), tmp_path_factory.mktemp("plain"))
    module: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return folder, [matrix.reference(module, ids, [EOS]) for ids in RAGGED]


def without_end(answers: list[list[int]]) -> list[list[int]]:
    return [one[: one.index(EOS)] if EOS in one else one for one in answers]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_else_in_the_file_changes_an_answer(
    hostile: str, plain: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    folder, wanted = plain
    copied = tmp_path / "hostile"
    copied.mkdir()
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    stored = {"eos_token_id": EOS, **HOSTILE[hostile]}
    (copied / "generation_config.json").write_text(json.dumps(stored))
    model = open_model(copied)
    before = model.module.generation_config
    assert generate(model, RAGGED, max_new_tokens=matrix.LENGTH) == without_end(wanted)
    assert model.module.generation_config is before, "it is put back"


def test_the_configuration_is_put_back_after_an_error() -> None:
    model = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
    before = model.module.generation_config
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, [[5, 6, 7]], max_new_tokens=0)
    assert model.module.generation_config is before


def test_inside_a_peft_wrapper(plain: tuple[Path, list[list[int]]]) -> None:
    peft = pytest.importorskip("peft")
    module: Any = transformers.AutoModelForCausalLM.from_pretrained(plain[0]).eval()
    wrapped = peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj"])).eval()  # B is 0: the same model
    wrapped.generation_config = GenerationConfig(repetition_penalty=5.0, num_beams=4)
    module.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=20.0)
    found = generate(open_model(wrapped, tokenizer=tiny.TOKENIZER), RAGGED, max_new_tokens=matrix.LENGTH)
    assert found == without_end(plain[1])


def test_an_answer_says_whether_an_end_token_ended_it(plain: tuple[Path, list[list[int]]]) -> None:
    model = open_model(plain[0])
    model.module.generation_config.eos_token_id = [plain[1][0][3], plain[1][2][1]]
    for length in (2, matrix.LENGTH):
        ends = end_tokens(model)
        for found, wanted in zip(continued(model, RAGGED, max_new_tokens=length), plain[1], strict=True):
            stop = next((i for i, token in enumerate(wanted[:length]) if token in ends), None)
            assert found == (wanted[:length][:stop], stop is not None)


# -- all checkpoints of a history ------------------------------------------------------------------------------------


def folder_with(folder: Path, ends: list[int], *, seed: int) -> Path:
    module = tiny.llama(seed, eos_token_id=ends[0])
    module.generation_config.eos_token_id = ends
    return tiny.save(module, folder)


@pytest.mark.parametrize("order", [1, -1])
def test_all_checkpoints_of_a_history_end_alike(order: int, tmp_path: Path) -> None:
    """The base lists one end token, the aligned model another, a run none and later a third."""
    base, aligned = folder_with(tmp_path / "base", [EOS, 5], seed=0), folder_with(tmp_path / "a", [9, EOS], seed=1)
    run = folder_with(tmp_path / "run" / "checkpoint-1", [EOS], seed=2)
    (run / "generation_config.json").unlink()
    later = folder_with(tmp_path / "run" / "checkpoint-2", [EOS, 11], seed=3)
    sequence = ModelSequence.from_folders(witness=base, anchor=aligned, runs={"r": [run, later]}, probes=tiny.PROMPTS)
    tokenizer = sequence_tokenizer(sequence)
    checkpoints = list(sequence)[::order]
    for _, model in open_each(checkpoints, tokenizer=tokenizer, through="huggingface"):  # weights are swapped
        assert end_tokens(model) == tuple(sorted((5, 9, 11, EOS)))
    for checkpoint in checkpoints:
        assert end_tokens(open_model(checkpoint, tokenizer=tokenizer)) == tuple(sorted((5, 9, 11, EOS)))


def test_the_file_beside_a_tokenizer_counts_and_the_users_tokenizer_is_left_alone(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "aligned", [9, EOS], seed=0)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    witness, anchor = tiny.llama(1, eos_token_id=EOS), tiny.llama(2, eos_token_id=7)
    assert end_tokens(open_model(witness, tokenizer=loaded)) == tuple(sorted((9, EOS)))
    given = copy.deepcopy(tiny.TOKENIZER)
    sequence = ModelSequence.from_models(witness=witness, anchor=anchor, probes=tiny.PROMPTS, tokenizer=given)
    assert end_tokens(open_model(witness, tokenizer=sequence_tokenizer(sequence))) == tuple(sorted((7, EOS)))
    assert end_tokens(open_model(witness, tokenizer=given)) == (EOS,)


# -- batches of recurrent and hybrid families --------------------------------------------------------------------------


COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
# Architecture -> its own settings, whether a padded batch is right, whether a batch of equal lengths is.
RECURRENT: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "Mamba": ({"state_size": 8}, True, True),
    "Mamba with biases": ({"state_size": 8, "use_bias": True}, False, True),
    "RecurrentGemma": (
        {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "recurrent", "attention"]},
        False, True,
    ),
    "Rwkv": ({"attention_hidden_size": 32, "context_length": 64}, False, False),
    "MiniMax": ({"head_dim": 8, "layer_types": LINEAR, "num_local_experts": 2, "block_size": 4}, False, True),
    "Lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, True, True),
    "GPT2": ({"num_key_value_heads": None}, True, True),
}  # fmt: skip


def recurrent(name: str) -> Any:
    architecture, own = name.partition(" ")[0], RECURRENT[name][0]
    settings = {key: value for key, value in {**COMMON, **own}.items() if value is not None}
    torch.manual_seed(0)
    head = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{architecture}{head}")(getattr(transformers, f"{architecture}Config")(**settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight += (0.2 if weight.ndim == 1 else 0.05) * torch.randn(weight.shape)
    return model.eval()


def alone(module: Any, blocks: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the blocks' outputs at the last token of one prompt."""
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    handles = [block.register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        logits = module(torch.tensor([ids]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits, torch.stack([state[0, -1] for state in seen])


@pytest.mark.parametrize("name", RECURRENT)
def test_ragged_prompts_are_read_and_answered_as_each_alone(name: str) -> None:
    ids = [[7, 9, 11, 30, 31, 5, 8, 21, 40, 61, 17, 90, 33], [12, 5, 60, 70], [3, 70, 80, 4, 18, 25, 9], [5, 6, 7, 8]]
    module = recurrent(name)
    wanted = [matrix.reference(module, one, ()) for one in ids]
    model = open_model(module)
    logits, states = zip(*(alone(module, model.blocks[:2], one) for one in ids), strict=True)
    assert (model.family.padding, model.family.batching) == RECURRENT[name][1:]
    assert generate(model, ids, max_new_tokens=matrix.LENGTH) == wanted
    assert_same_states(final_logits(model, ids), torch.stack(logits))
    found = read_residuals(model, ids, layers=[0, 1])  # padded on the right, which is right for all
    assert_same_states(found, torch.stack(states))


def test_the_trial_sees_the_model_without_hooks_and_dropout_and_puts_them_back() -> None:
    module: Any = tiny.gpt2()
    module.config.resid_pdrop = 0.5
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    module.train()
    model = open_model(module, tokenizer=tiny.TOKENIZER)
    calls: list[Any] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    assert model.family.padding and not calls
    assert module.training and all(part.training for part in module.modules())
    with torch.no_grad():
        module(torch.tensor([[5, 6]]))
    assert calls
    handle.remove()
    assert not module._forward_hooks


def test_a_first_batch_inside_an_intervention_is_padded_and_steered() -> None:
    ids = encode(tiny.TOKENIZER, tiny.PROMPTS[:2])
    ids[0] = ids[0][-3:]
    directions = Directions((direction_from(torch.ones(tiny.WIDTH).numpy(), layer=0, distance=3.0),))
    model = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
    with intervene(model, At(Steer(directions), "last")):
        found = final_logits(model, ids)
        single = [final_logits(model, [one])[0] for one in ids]
    assert_same_states(found, torch.stack(single))


# -- the committed table -----------------------------------------------------------------------------------------------


def test_the_committed_table_is_the_pages_and_says_equal_throughout() -> None:
    table = pd.read_csv(ROOT / "docs/data/decoding.csv")
    assert table["equal"].all() and set(table["end_of_turn"]) == set(KINDS)
    assert set(table["family"]) == {*matrix.FAMILIES, *LIBRARIES} and (table["ended"] > 0).mean() > 0.9
    assert matrix.page_table(table) in (ROOT / "docs/behavior.md").read_text()


def test_the_command_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "FAMILIES", {"Llama": matrix.FAMILIES["Llama"]})
    monkeypatch.setattr(matrix, "LIBRARIES", ())
    monkeypatch.setattr(matrix, "KINDS", {"Gemma": KINDS["Gemma"]})
    result = CliRunner().invoke(matrix.app, ["--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv(tmp_path / "new/decoding.csv")) == 1 and "| Llama | equal, " in result.output
