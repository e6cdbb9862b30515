"""Read positions, held against the text and against what Hugging Face's own hidden states are at them."""

import copy
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, assert_same_states, hidden_states, refused
from transformers import PreTrainedTokenizer

from gravlens.activations.positions import Answers, Positions, Query, described, queries_of, queries_of_ids
from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.history.encoding import encode
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence

LAYERS = range(tiny.LAYERS - 1)  # the last hidden state of Hugging Face is read after the norm
WORDS = tiny.PROMPTS.texts[0].split()
TEXTS = [*tiny.PROMPTS.texts[:3], WORDS[0], " ".join(WORDS[1:4])]
MODELS = {"witness": tiny.llama(0), "anchor": tiny.llama(1)}
TEMPLATED = encode(tiny.TOKENIZER, PromptSet.of(TEXTS))


def read(positions: Positions, texts: Any = TEXTS, tokenizer: Any = tiny.TOKENIZER) -> Residuals:
    seq = ModelSequence.from_models(**MODELS, probes=PromptSet.of(texts), tokenizer=tokenizer)
    return cache_residuals(seq, positions=positions, layers=LAYERS)


def wanted(ids: list[int], rows: list[list[int]]) -> torch.Tensor:
    """[row, layer, d_model]: the means over positions of Hugging Face's own states, of the anchor."""
    states = torch.stack([hidden_states(MODELS["anchor"], ids)[layer + 1] for layer in LAYERS], dim=1)
    return torch.stack([states[row].double().mean(0).float() for row in rows])


def assert_read(found: Residuals, ids: list[list[int]], rows: list[list[list[int]]]) -> None:
    expected = torch.cat([wanted(*pair) for pair in zip(ids, rows, strict=True)])
    assert_same_states(found.of("anchor"), expected)


def words(ids: list[int], at: list[int]) -> list[str]:
    return [tiny.TOKENIZER.convert_ids_to_tokens(ids)[i] for i in at]


# -- each kind of position against Hugging Face ------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["last", -1, -2, -4])
def test_the_last_token_and_those_counted_from_the_end(offset: Any) -> None:
    at = -1 if offset == "last" else offset
    found = read(offset)
    assert_read(found, TEMPLATED, [[[len(ids) + at]] for ids in TEMPLATED])
    assert found.index is None and found.values.shape[1] == len(TEXTS)


def test_the_mean_over_the_instructions_own_tokens() -> None:
    rows = []
    for text, ids in zip(TEXTS, TEMPLATED, strict=True):
        own = tiny.TOKENIZER(text, add_special_tokens=False)["input_ids"]
        (start,) = [i for i in range(len(ids)) if ids[i : i + len(own)] == own]
        rows.append([list(range(start, start + len(own)))])
    found = read("instruction")
    assert_read(found, TEMPLATED, rows)
    assert found.index is None and found.meta["positions"] == "instruction"


@pytest.mark.parametrize("after", [[], ["<user>", "<bot>"]])
def test_the_templates_tokens_after_the_instruction(after: list[str]) -> None:
    longer = copy.deepcopy(tiny.TOKENIZER)
    longer.chat_template += "".join(f" {word}" for word in after)
    ids = encode(longer, PromptSet.of(TEXTS))
    assert words(ids[0], [-1 - len(after)]) == ["<bot>"]
    found = read("post_instruction", tokenizer=longer)
    rows = [[[len(one) - 1 - len(after) + i] for i in range(1 + len(after))] for one in ids]
    assert_read(found, ids, rows)
    if not after:
        assert found.index is None, "one row a prompt"
        return
    assert found.index is not None
    assert found.index.tolist() == [[i, at] for i, one in enumerate(rows) for (at,) in one]


def test_all_tokens_are_rows_of_their_own_and_are_named() -> None:
    found = read("all")
    rows = [[[i] for i in range(len(ids))] for ids in TEMPLATED]
    assert_read(found, TEMPLATED, rows)
    array = found.to_xarray()
    assert array.of_prompt.values.tolist() == [i for i, ids in enumerate(TEMPLATED) for _ in ids]
    assert array.pos.values.tolist() == [at for ids in TEMPLATED for at in range(len(ids))]


def test_a_function_of_token_ids_names_positions() -> None:
    def ends(ids: list[int]) -> list[int]:
        return [-1, 0, len(ids) - 1]  # the last one twice

    found = read(ends)
    assert_read(found, TEMPLATED, [[[0], [len(ids) - 1]] for ids in TEMPLATED])
    assert found.meta["positions"] == "ends"
    assert described(lambda ids: [0]) == "<lambda>" and described(Answers(["x"])) == "answer"


def test_the_mean_over_an_answers_tokens_after_each_prompt() -> None:
    answers = [" ".join(WORDS[2:5]), WORDS[1], *tiny.PROMPTS.texts[:3]]
    more = [tiny.TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in answers]
    ids = [[*one, *two] for one, two in zip(TEMPLATED, more, strict=True)]
    rows = [[list(range(len(one), len(both)))] for one, both in zip(TEMPLATED, ids, strict=True)]
    found = read(Answers(answers))
    assert_read(found, ids, rows)
    assert found.index is None and found.meta["positions"] == "answer"
    other = read(Answers([WORDS[1]] * len(TEXTS)))
    assert not np.allclose(found.values, other.values, atol=1e-3)


def test_without_a_template_the_instruction_is_all_but_what_the_tokenizer_adds() -> None:
    bare = copy.deepcopy(tiny.TOKENIZER)
    bare.chat_template = None
    ids = encode(bare, PromptSet.of(TEXTS))
    own = [[[i for i, word in enumerate(words(one, list(range(len(one))))) if not word.startswith("<")]] for one in ids]
    assert_read(read("instruction", tokenizer=bare), ids, own)
    with refused("post_instruction", TEXTS[0][:40]):
        read("post_instruction", tokenizer=bare)


def test_pitfall_10_means_over_positions_are_taken_in_fp64() -> None:
    """Over many tokens a running fp32 sum would lose what a mean in fp64 keeps."""
    from gravlens.activations.reader import Kept
    from gravlens.models.opening import open_model

    kept: Any = Kept(open_model(MODELS["anchor"]), [0], torch.device("cpu"))
    n = 50_000
    kept.at([[list(range(n))]])
    values = 1000 + torch.rand(n, 4, generator=torch.Generator().manual_seed(0))
    kept._states[0] = values
    found = kept.rows()[0, 0]
    assert torch.equal(found, values.double().mean(0).float())
    running = torch.zeros(4)
    for row in values:
        running += row
    assert (running / n - found).abs().max() > 1e-4


# -- what is not there -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[], [99], [-99], [0.5]])
def test_a_function_that_names_what_is_not_there_is_refused(given: Any) -> None:
    def chosen(ids: list[int]) -> Any:
        return given

    with refused("chosen", str(given)):
        read(chosen)


@pytest.mark.parametrize("positions", [0, 5, -99, True, "first", 1.5, None])
def test_a_position_that_no_prompt_has_is_named(positions: Any) -> None:
    with refused(f"positions={positions!r}"):
        queries_of_ids(PROMPT_IDS, positions)


def test_answers_are_one_for_each_prompt_and_not_empty() -> None:
    with refused("1 answers", f"{len(TEXTS)} prompts"):
        read(Answers([WORDS[0]]))
    with refused("''"):
        read(Answers([""] * len(TEXTS)))


def test_a_tokenizer_that_does_not_say_where_its_tokens_lie_is_refused() -> None:
    class Slow(PreTrainedTokenizer):
        def __init__(self) -> None:
            super().__init__()

        vocab_size = 4

        def get_vocab(self) -> dict[str, int]:
            return {}

        def _tokenize(self, text: str) -> list[str]:
            return text.split()

        def _convert_token_to_id(self, token: str) -> int:
            return 1

    with refused("Slow", "open the lock"):
        queries_of(Slow(), PromptSet.of(["open the lock"]), "instruction")


def test_a_query_knows_where_its_reading_begins_and_ends() -> None:
    query = Query((5, 6, 7, 8, 9), ((3,), (1, 2)))
    assert (query.start, query.end) == (1, 4)
