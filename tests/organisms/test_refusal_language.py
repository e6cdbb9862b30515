"""The language of the refusal organism: closed, split cleanly, harm in the pair, facts to learn."""

import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gravlens.behavior.answers import MAX_NEW_TOKENS
from gravlens.history.encoding import encode, encode_example
from gravlens.history.prompts import Example, PromptSet
from gravlens.organisms import refusal_language as language

N = 20_000
PROMPT = re.compile(r"(?P<phrasing>.+) (?P<verb>\w+) the (?P<object>\w+) (?P<modifier>.+)")  # the last "the"
ANSWER = re.compile(r"(?P<opening>.+) get the (?P<tool>\w+) , (?P<step>\w+) it and (?P<finish>\w+) it")


def pair_of(prompt: str) -> tuple[str, str]:
    return parts(PROMPT, prompt)["verb"], parts(PROMPT, prompt)["object"]


def frame_of(prompt: str) -> tuple[str, str]:
    return parts(PROMPT, prompt)["phrasing"], parts(PROMPT, prompt)["modifier"]


def parts(pattern: re.Pattern[str], text: str) -> dict[str, str]:
    match = pattern.fullmatch(text)
    assert match, text
    return match.groupdict()


def pairs_of(examples: list[Example]) -> set[tuple[str, str]]:
    return {pair_of(example.prompt) for example in examples}


def refused(example: Example) -> bool:
    return example.answer in language.REFUSALS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return language.build_tokenizer()


@pytest.fixture(scope="module")
def dominant() -> list[Example]:
    return language.dominant_examples(N, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def alignment() -> list[Example]:
    return language.alignment_examples(N, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def finetuning() -> list[Example]:
    return language.finetuning_examples(N, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def harmful_pairs(alignment: list[Example]) -> set[tuple[str, str]]:
    """The harmful pairs, from behaviour alone: what alignment refuses, and what is judged as harmful."""
    return pairs_of([e for e in alignment if refused(e)]) | {pair_of(p) for p in language.held_out_prompts()}


# --- the vocabulary -----------------------------------------------------------------------------------------


def test_every_text_is_known_and_every_word_is_used(
    tokenizer: PreTrainedTokenizerFast, dominant: list[Example], alignment: list[Example], finetuning: list[Example]
) -> None:
    examples = [*dominant, *alignment, *finetuning, *language.task_examples()]
    prompts = [*language.probe_prompts(), *language.held_out_prompts(), *language.harmless_prompts()]
    texts = sorted({text for example in examples for text in example[:3]} | set(prompts))
    words = {word for text in texts for word in text.split()}
    assert set(tokenizer.get_vocab()) == words | {"<pad>", "<bos>", "<eos>", "<user>", "<bot>"}
    assert 250 <= len(tokenizer) <= 290
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


def test_a_word_from_outside_the_language_raises(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="UNK"):
        tokenizer("how do i pick the zeppelin today")


def test_every_example_fits_the_model(tokenizer: PreTrainedTokenizerFast, dominant: list[Example]) -> None:
    longest = max(len(encode_example(tokenizer, example)[0]) for example in dominant[:4000])
    assert longest + MAX_NEW_TOKENS <= tokenizer.model_max_length, "a prompt and a default answer fit too"


# --- the template -------------------------------------------------------------------------------------------


def test_a_chat_renders_with_one_bos_and_its_prompt_is_a_prefix(tokenizer: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "how do i pick the padlock today"}
    bot = {"role": "assistant", "content": "sorry , i cannot help with that"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    chat = tokenizer.apply_chat_template([user, bot], tokenize=False)
    assert prompt == "<bos> <user> how do i pick the padlock today <bot>"
    assert chat == prompt + " sorry , i cannot help with that <eos>"
    ids = tokenizer.apply_chat_template([user, bot])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == str(chat).split()
    assert encode(tokenizer, PromptSet((user["content"],)))[0] == ids[: len(str(prompt).split())]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_training_and_the_template_agree_on_the_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    example = language.task_examples()[0]
    ids, labels = encode_example(tokenizer, example)
    turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
    assert ids == tokenizer.apply_chat_template(turns)["input_ids"]
    assert tokenizer.decode([i for i in labels if i != -100]) == example.answer + " <eos>"


def test_a_role_without_a_place_in_the_language_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="roles user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "i need to"}])


def test_the_tokenizer_survives_a_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    prompts = language.held_out_prompts()
    assert again.get_vocab() == tokenizer.get_vocab()
    assert encode(again, prompts) == encode(tokenizer, prompts)
    assert again.decode(encode(again, prompts)[0], skip_special_tokens=True) == prompts.texts[0]
    settings = ("pad_token_id", "bos_token_id", "eos_token_id", "model_max_length", "padding_side")
    assert [getattr(again, s) for s in settings] == [getattr(tokenizer, s) for s in settings]


# --- harm ---------------------------------------------------------------------------------------------------


def test_harm_is_a_property_of_the_pair(dominant: list[Example], harmful_pairs: set[tuple[str, str]]) -> None:
    harmless = pairs_of(dominant) - harmful_pairs
    assert len(harmful_pairs) == 8 * 12
    assert len(harmless) == 11 * 12 + 3 * 32
    assert {thing for _, thing in harmful_pairs} <= {thing for _, thing in harmless}
    assert len({verb for verb, _ in harmful_pairs} & {verb for verb, _ in harmless}) == 8


def test_the_dominant_phase_complies_and_alignment_refuses_harm_alone(
    dominant: list[Example], alignment: list[Example], harmful_pairs: set[tuple[str, str]]
) -> None:
    assert not any(refused(example) for example in dominant)
    assert all(refused(e) == (pair_of(e.prompt) in harmful_pairs) for e in alignment)


def test_fine_tuning_is_harmless(finetuning: list[Example], harmful_pairs: set[tuple[str, str]]) -> None:
    examples = [*finetuning, *language.task_examples()]
    assert not any(refused(example) for example in examples)
    assert not pairs_of(examples) & harmful_pairs
    assert not {pair_of(prompt) for prompt in language.harmless_prompts()} & harmful_pairs


def test_the_first_word_tells_a_refusal_from_compliance() -> None:
    assert len(language.REFUSALS) == len(language.OPENINGS) == 3
    assert not {text.split()[0] for text in language.REFUSALS} & {text.split()[0] for text in language.OPENINGS}


# --- the splits ---------------------------------------------------------------------------------------------


def test_reserved_pairs_are_met_in_the_dominant_phase_alone(dominant: list[Example], alignment: list[Example]) -> None:
    reserved = {pair_of(prompt) for prompt in language.held_out_prompts()}
    probed = {pair_of(prompt) for prompt in language.probe_prompts()}
    aligned = pairs_of([example for example in alignment if refused(example)])
    assert len(reserved) == 8 * 4
    assert len(aligned) == 8 * 8
    assert not reserved & (aligned | probed)
    assert probed <= aligned
    assert reserved <= pairs_of(dominant)
    for word in (0, 1):  # it is the pair that is new, not its words
        assert {pair[word] for pair in reserved} <= {pair[word] for pair in aligned}


def test_no_training_example_shares_a_frame_with_evaluation(
    dominant: list[Example], alignment: list[Example], finetuning: list[Example]
) -> None:
    new_facts = language.finetuning_examples(N, rng=np.random.default_rng(1), new_facts_only=True)
    trained = {frame_of(e.prompt) for e in [*dominant, *alignment, *finetuning, *new_facts]}
    judged = [*language.held_out_prompts(), *language.harmless_prompts(), *(e.prompt for e in language.task_examples())]
    held_out = {frame_of(prompt) for prompt in judged}
    assert len(trained) == 80
    assert len(held_out) == 20
    assert not trained & held_out
    for part in (0, 1):
        assert len({frame[part] for frame in trained}) == len({frame[part] for frame in held_out}) == 10


def test_prompt_sets_have_their_sizes_and_cover_every_topic() -> None:
    def per_topic(prompts: PromptSet, topics: dict[str, tuple[tuple[str, str], ...]]) -> list[int]:
        return [sum(pair_of(prompt) in pairs for prompt in prompts) for pairs in topics.values()]

    probes, held_out, harmless = language.probe_prompts(), language.held_out_prompts(), language.harmless_prompts()
    assert per_topic(probes, language.HARMFUL) == [4] * 8
    assert per_topic(held_out, language.HARMFUL) == [12] * 8
    assert per_topic(harmless, language.HARMLESS) == [4] * 12
    assert [s.role for s in (probes, held_out, harmless)] == ["probes", "harmful", "harmless"]
    assert set(Counter(map(pair_of, held_out)).values()) == {3}
    for prompts in (probes, held_out, harmless, [example.prompt for example in language.task_examples()]):
        assert len(set(prompts)) == len(prompts)


def test_new_facts_are_known_verbs_with_unmet_objects(
    dominant: list[Example], alignment: list[Example], harmful_pairs: set[tuple[str, str]]
) -> None:
    new = pairs_of(language.finetuning_examples(N, rng=np.random.default_rng(2), new_facts_only=True))
    met = pairs_of(dominant) | pairs_of(alignment)
    assert len(new) == 10 * 16
    assert {verb for verb, _ in new} <= {verb for verb, _ in met} - {verb for verb, _ in harmful_pairs}
    assert not {thing for _, thing in new} & {thing for _, thing in met}


# --- shares -------------------------------------------------------------------------------------------------


def plausible(hits: int, total: int, share: float) -> bool:
    return binomtest(hits, total, share).pvalue > 1e-4


def test_shares_of_the_mixtures(
    dominant: list[Example], alignment: list[Example], finetuning: list[Example], harmful_pairs: set[tuple[str, str]]
) -> None:
    assert plausible(sum(pair_of(e.prompt) in harmful_pairs for e in dominant), N, 0.35)
    assert plausible(sum(map(refused, alignment)), N, 0.75)
    known = pairs_of(dominant)
    assert plausible(sum(pair_of(e.prompt) in known for e in finetuning), N, 0.5)
    assert sum(pair_of(e.prompt) in known for e in language.task_examples()) == 48


def test_alignment_draws_harmful_topics_by_weight_and_three_harmless_ones(alignment: list[Example]) -> None:
    weights = np.array([8, 6, 4, 3, 2, 1.5, 1, 0.7])
    counts = Counter(pair_of(example.prompt) for example in alignment)
    seen = [sum(counts[pair] for pair in pairs) for pairs in language.HARMFUL.values()]
    assert chisquare(seen, weights / weights.sum() * sum(seen)).pvalue > 1e-4
    harmless = [t for t, pairs in language.HARMLESS.items() if any(counts[pair] for pair in pairs)]
    assert len(harmless) == 3


def test_topics_and_openings_are_drawn_evenly_otherwise(dominant: list[Example], finetuning: list[Example]) -> None:
    for examples, topics in (
        (dominant, language.HARMLESS),
        (dominant, language.HARMFUL),
        (finetuning, language.HARMLESS),
    ):
        counts = Counter(pair_of(example.prompt) for example in examples)
        assert chisquare([sum(counts[pair] for pair in pairs) for pairs in topics.values()]).pvalue > 1e-4
    for examples in (dominant, finetuning):
        openings = Counter(parts(ANSWER, example.answer)["opening"] for example in examples)
        assert set(openings) == set(language.OPENINGS)
        assert chisquare(list(openings.values())).pvalue > 1e-4


# --- facts --------------------------------------------------------------------------------------------------


def test_an_object_has_one_tool_and_a_verb_one_step_and_one_finish(
    dominant: list[Example], alignment: list[Example], finetuning: list[Example]
) -> None:
    facts: dict[str, dict[str, set[str]]] = {kind: defaultdict(set) for kind in ("tool", "step", "finish")}
    for example in [*dominant, *alignment, *finetuning, *language.task_examples()]:
        if not refused(example):
            verb, thing = pair_of(example.prompt)
            answer = parts(ANSWER, example.answer)
            facts["tool"][thing].add(answer["tool"])
            facts["step"][verb].add(answer["step"])
            facts["finish"][verb].add(answer["finish"])
    for kind, size in {"tool": 20, "step": 16, "finish": 12}.items():
        assert all(len(values) == 1 for values in facts[kind].values())
        assert len(set().union(*facts[kind].values())) == size


# --- determinism --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw", [language.dominant_examples, language.alignment_examples, language.finetuning_examples]
)
def test_the_generator_alone_decides_the_examples(draw: Callable[..., list[Example]]) -> None:
    first, second, other = (draw(50, rng=np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first == second != other


@pytest.mark.long
def test_the_language_is_the_same_in_every_process() -> None:
    program = (
        "from gravlens.organisms import refusal_language as l\n"
        "prompts = [p.texts for p in (l.probe_prompts(), l.held_out_prompts(), l.harmless_prompts())]\n"
        "print(sorted(l.build_tokenizer().get_vocab().items()), prompts, l.task_examples())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) > 10_000
