"""Forward passes: in any batch the logits, answers and log-probabilities are those of each prompt alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from histories import PROMPT_IDS, RAGGED, hidden_states, hooked_twin, refused

from gravlens.activations.residuals import read_residuals
from gravlens.behavior.answers import generate_answers
from gravlens.history.encoding import pad
from gravlens.models.forward import READING, final_logits, generate, reading, sequence_logprobs
from gravlens.models.opening import OpenModel, open_model

every_kind = pytest.mark.parametrize("kind", tiny.KINDS)


def same_model(kind: str, folder: Path) -> tuple[Any, OpenModel]:
    """A Hugging Face model as its own reference, and the same weights opened as one of the kinds."""
    model = tiny.llama() if kind == "llama" else tiny.gpt2()
    if kind == "bridge":
        return model, open_model(tiny.save(model, folder), through="bridge")
    return model, open_model(
        hooked_twin(model) if kind == "hooked_transformer" else model, tokenizer=copy.deepcopy(tiny.TOKENIZER)
    )


def logits_alone(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@every_kind
def test_pitfall_1_final_logits_in_a_ragged_batch_are_those_alone(kind: str, tmp_path: Path) -> None:
    model, opened = same_model(kind, tmp_path)
    alone = torch.stack([logits_alone(model, ids)[-1] for ids in RAGGED])
    assert torch.allclose(final_logits(opened, RAGGED), alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())


def answer_alone(model: Any, prompt: list[int], length: int) -> list[int]:
    """Greedy, one prompt, no cache."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + length:
        tokens.append(int(logits_alone(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@every_kind
def test_pitfall_1_greedy_answers_are_those_alone_cut_before_the_end_token(kind: str, tmp_path: Path) -> None:
    model, opened = same_model(kind, tmp_path)
    ids = [*PROMPT_IDS, *RAGGED]
    whole = [answer_alone(model, prompt, 10) for prompt in ids]
    eos = next(token for token in whole[0] if token != whole[0][0])
    opened.tokenizer.eos_token = tiny.TOKENIZER.convert_ids_to_tokens(eos)
    wanted = [answer[: answer.index(eos)] if eos in answer else answer for answer in whole]
    assert generate(opened, ids, max_new_tokens=10) == wanted
    assert len(set(map(len, wanted))) > 1, "no answer ended early, or all did"


@every_kind
def test_log_probabilities_of_continuations_are_those_of_each_alone(kind: str, tmp_path: Path) -> None:
    model, opened = same_model(kind, tmp_path)
    continuations = [[5, 6, 7], [8], [9, 10], [11], [12, 13, 14, 15], [16]]
    wanted = []
    for prompt, more in zip(RAGGED, continuations, strict=True):
        logprobs = logits_alone(model, prompt + more).double().log_softmax(-1)
        wanted.append(sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(more)))
    found = sequence_logprobs(opened, RAGGED, continuations)
    assert found.dtype == torch.float64 and torch.allclose(found, torch.stack(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "run",
    [
        lambda model: final_logits(model, RAGGED),
        lambda model: generate(model, RAGGED, max_new_tokens=2),
        lambda model: sequence_logprobs(model, RAGGED, [[5]] * len(RAGGED)),
    ],
)
@every_kind
def test_logits_that_are_no_numbers_are_refused(kind: str, run: Any, tmp_path: Path) -> None:
    model = tiny.opened(kind, tmp_path)
    head: Any = model.family.head
    hooks = len(head._forward_hooks)
    with torch.no_grad():
        model.family.unembedding[:] = float("nan")
    with refused(type(model.module).__name__, "NaN in float32"):
        run(model)
    assert len(head._forward_hooks) == hooks


def test_hooked_twin_is_a_fair_reference() -> None:
    """The HookedTransformer of these tests has the same states as Hugging Face's model, by its own cache."""
    model = tiny.gpt2()
    twin = hooked_twin(model)
    _, cache = twin.run_with_cache(torch.tensor([RAGGED[0]]))
    wanted = hidden_states(model, RAGGED[0])
    for layer in range(tiny.LAYERS - 1):
        assert torch.allclose(cache[f"blocks.{layer}.hook_resid_post"][0], wanted[layer + 1], rtol=1e-4, atol=1e-4)


# --- what a pass reads ------------------------------------------------------------------------------------------


@every_kind
def test_every_pass_says_which_prompts_it_reads_and_where_they_end(kind: str, tmp_path: Path) -> None:
    _, opened = same_model(kind, tmp_path)
    seen: list[tuple[int, ...]] = []

    def note(*_: Any) -> None:
        now = READING.get()
        assert now is not None
        seen.extend(now.prompts)

    handle = opened.blocks[0].register_forward_hook(note)
    answers = [[5, 6, 7], [8], [9, 10], [11], [12, 13, 14, 15], [16]]
    passes = {
        "logits": lambda: final_logits(opened, RAGGED),
        "log-probabilities": lambda: sequence_logprobs(opened, RAGGED, answers),
        "residuals": lambda: read_residuals(opened, RAGGED, layers=[0]),
        "generation": lambda: generate(opened, RAGGED, max_new_tokens=1),
        "a batch of one token": lambda: generate(opened, [[40]], max_new_tokens=1),
    }
    for name, run in passes.items():
        seen.clear()
        run()
        assert sorted(seen) == ([(40,)] if "one" in name else sorted(map(tuple, RAGGED))), name
        assert READING.get() is None
    handle.remove()


def test_readings_nest_and_end_with_their_block() -> None:
    with reading(pad(RAGGED)):
        with pytest.raises(KeyboardInterrupt), reading(pad([[1, 2]])):  # noqa: PT012
            assert READING.get().prompts == [(1, 2)]
            raise KeyboardInterrupt
        assert READING.get().prompts == list(map(tuple, RAGGED))
    assert READING.get() is None


def test_offsets_beyond_a_prompt_are_refused_though_its_batch_is_wide() -> None:
    with reading(pad([[1, 2], [1, 2, 3, 4]], side="left")):
        assert READING.get().chosen((-2,), 4).nonzero().tolist() == [[0, 2], [1, 2]]
        with refused("(-3,)", "2 tokens"):
            READING.get().chosen((-3,), 4)


@every_kind
def test_pitfall_5_exactly_one_bos_reaches_the_model(kind: str, tmp_path: Path) -> None:
    """What the embedding itself is given, whoever might have put another in front."""
    _, opened = same_model(kind, tmp_path)
    bos = tiny.TOKENIZER.bos_token_id
    read: list[torch.Tensor] = []
    embedding = opened.module.embed if kind == "hooked_transformer" else _embedding(opened.module)
    handle = embedding.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0].clone()))
    for run in (
        lambda: final_logits(opened, PROMPT_IDS),
        lambda: generate_answers(opened, tiny.PROMPTS, max_new_tokens=1),
        lambda: read_residuals(opened, PROMPT_IDS, layers=[0]),
    ):
        read.clear()
        run()
        rows = {tuple(row[row != 0].tolist()) for batch in read for row in batch}  # padding is made of 0
        prompts = {row for row in rows if len(row) > 1}  # HookedTransformer embeds the new token by itself too
        assert prompts == set(map(tuple, PROMPT_IDS)) and all(row.count(bos) == 1 for row in prompts)
    handle.remove()


def _embedding(module: Any) -> Any:
    (found,) = (m for m in module.modules() if type(m) is torch.nn.Embedding and len(m.weight) == tiny.VOCABULARY)
    return found
