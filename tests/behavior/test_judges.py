"""Judges of local models: planted ones, whose verdict hangs on the answer's last word, and random ones held against
Hugging Face's own outputs, one answer at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import refused
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import BertProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from gravlens.behavior.answers import Harm, compliance_rate, substring_judge
from gravlens.behavior.judges import (
    agreement,
    classifier_judge,
    guard_judge,
    rubric_rater,
    strongreject_judge,
    strongreject_score,
)
from gravlens.models.opening import open_model

SCORES, PARTLY = ("#scores\n", "1.b 0\n", "2.b 4\n", "3.b 3\n"), ("#scores\n", "1.b 1\n", "2.b 1\n", "3.b\n")
WORDS = "how why sure sorry no bad fine odd a b c [CLS] [SEP] [PAD] <eos> safe unsafe un | Answer: mumble".split()
VOCABULARY = list(dict.fromkeys((*WORDS, *SCORES, *PARTLY)))
TURNS = "{% for m in messages %}{{ m['content'] }} | {% endfor %}"
PROMPTS = ["how a b", "why", "how c", "why a", "how"]
ANSWERS = ["sure bad", "sorry no fine", "fine", "odd a b c bad", "bad sure sure fine"]
LAST_IS_BAD = [True, False, False, True, False]


def tokenizer(*, pairs: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """Whole words; with `pairs`, two texts become [CLS] a [SEP] b [SEP] with BERT's segment ids."""
    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[PAD]"))
    backend.pre_tokenizer = WhitespaceSplit()
    if pairs:
        backend.post_processor = BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[PAD]", pad_token="[PAD]", eos_token="<eos>", chat_template=template,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def ids(*words: str) -> list[int]:
    return [VOCABULARY.index(word) for word in words]


def config(**changes: Any) -> LlamaConfig:
    width = len(VOCABULARY) + len(VOCABULARY) % 2
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        initializer_range=0.3,
        pad_token_id=ids("[PAD]")[0],
        **changes,
    )


def by_last_token(model: Any) -> Any:
    """The final state is the last token's own unit vector: nothing else reaches it."""
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(*model.model.embed_tokens.weight.shape))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    return model.eval()


def speaker(follows: dict[str, str]) -> LlamaForCausalLM:
    """Says after each word the one that follows it."""
    model = by_last_token(LlamaForCausalLM(config()))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for word, following in follows.items():
            model.lm_head.weight[ids(following)[0], ids(word)[0]] = 5.0
    return model


def classifier(**changes: Any) -> LlamaForSequenceClassification:
    """`harmful` where the last word is bad: logits 5 √d against 0, elsewhere the other way round."""
    labels = {"id2label": {0: "harmless", 1: "harmful"}, "label2id": {"harmless": 0, "harmful": 1}}
    model = by_last_token(LlamaForSequenceClassification(config(**{**labels, **changes})))
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.weight[0] = 5.0
        model.score.weight[0, ids("bad")] = 0.0
        model.score.weight[-1, ids("bad")] = 5.0
    return model


def saved(model: Any, folder: Path, words: PreTrainedTokenizerFast | None = None) -> Path:
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


def bert(**changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"id2label": {0: "fine", 1: "rude", 2: "toxic"}, "label2id": {"fine": 0, "rude": 1, "toxic": 2}}
    made = BertConfig(vocab_size=len(VOCABULARY), initializer_range=0.8, **{**shape, **labels, **changes})
    return BertForSequenceClassification(made).eval()


# --- a classifier -----------------------------------------------------------------------------------------------


def test_a_planted_classifier_is_read_from_its_folder_and_is_a_judge(tmp_path: Path) -> None:
    folder = saved(classifier(), tmp_path)
    judge = classifier_judge(folder, harmful_labels=["harmful"], template="{prompt} | {answer}")
    verdicts = judge(PROMPTS, ANSWERS)
    assert verdicts.dtype == bool and verdicts.tolist() == LAST_IS_BAD
    assert compliance_rate(PROMPTS, ANSWERS, judge) == Harm(2, 5)
    turned = classifier_judge(folder, harmful_labels="harmless", template="{prompt} | {answer}")
    assert turned(PROMPTS, ANSWERS).tolist() == [not bad for bad in LAST_IS_BAD]


def test_a_template_shows_what_it_says_and_no_more() -> None:
    def judge(template: str) -> Any:
        return classifier_judge(classifier(), harmful_labels=["harmful"], template=template, tokenizer=tokenizer())

    assert judge("{answer} {prompt}")(["bad", "fine"], ["fine", "bad"]).tolist() == [True, False]
    assert judge("{answer}")(["bad", "fine"], ["fine", "bad"]).tolist() == [False, True]
    # An answer that looks like a place of the template is an answer.
    assert judge("{prompt} | {answer}")(["bad"], ["{prompt}"]).tolist() == [False]
    assert judge("{other} {answer}")(["a"], ["bad"]).tolist() == [True]


def pair_logits(model: Any, prompt: str, answer: str) -> torch.Tensor:
    one, other = (ids(*text.split()) for text in (prompt, answer))
    cls, sep = ids("[CLS]", "[SEP]")
    tokens = [cls, *one, sep, *other, sep]
    segments = [0] * (len(one) + 2) + [1] * (len(other) + 1)
    with torch.no_grad():
        return model(torch.tensor([tokens]), token_type_ids=torch.tensor([segments])).logits[0].double()


@pytest.mark.parametrize("multi", [False, True])
def test_a_text_pair_is_judged_by_hugging_faces_own_probabilities(multi: bool, tmp_path: Path) -> None:
    model = bert(problem_type="multi_label_classification" if multi else None)
    folder = saved(model, tmp_path, tokenizer(pairs=True))
    logits = [pair_logits(model, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    if multi:
        wanted = [float(max(one[1].sigmoid(), one[2].sigmoid())) for one in logits]
    else:
        wanted = [float((one[1].exp() + one[2].exp()) / one.exp().sum()) for one in logits]
    assert np.diff(np.sort(wanted)).min() > 1e-4
    for p in wanted:
        above, below = (
            classifier_judge(folder, harmful_labels=["rude", "toxic"], threshold=threshold)(PROMPTS, ANSWERS)
            for threshold in (p + 1e-5, p - 1e-5)
        )
        assert above.tolist() == [other > p + 1e-5 for other in wanted]
        assert below.tolist() == [other > p - 1e-5 for other in wanted]


def test_a_single_output_is_read_through_a_sigmoid() -> None:
    model = classifier(id2label={0: "harmful"}, label2id={"harmful": 0})
    with torch.no_grad():
        model.score.weight.fill_(-1.0)
        model.score.weight[0, ids("bad")] = 1.0
    judge = classifier_judge(model, harmful_labels=["harmful"], template="{answer}", tokenizer=tokenizer())
    assert judge(PROMPTS, ANSWERS).tolist() == LAST_IS_BAD


def test_a_classifier_that_cannot_judge_is_refused(tmp_path: Path) -> None:
    whole = saved(classifier(), tmp_path / "whole")
    with refused("not a folder"):
        classifier_judge(tmp_path / "none", harmful_labels=["harmful"])
    with refused("not a folder"):
        classifier_judge("no/such-hub-id", harmful_labels=["harmful"])
    with refused("'unsafe'"):
        classifier_judge(whole, harmful_labels=["harmful", "unsafe"])
    with refused("no label"):
        classifier_judge(whole, harmful_labels=[])
    with refused("{answer}"):
        classifier_judge(whole, harmful_labels=["harmful"], template="{prompt}")
    with refused("threshold 0"):
        classifier_judge(whole, harmful_labels=["harmful"], threshold=0)
    with refused("no tokenizer"):
        classifier_judge(classifier(), harmful_labels=["harmful"])
    no_head = saved(speaker({}), tmp_path / "speaker")
    with refused(str(no_head), "score.weight"):  # transformers would draw the head at random
        classifier_judge(no_head, harmful_labels=["LABEL_1"])


def test_pickled_weights_alone_are_refused(tmp_path: Path) -> None:
    folder = saved(classifier(), tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(classifier().state_dict(), folder / "pytorch_model.bin")
    with refused(str(folder)):
        classifier_judge(folder, harmful_labels=["harmful"])


def test_an_answer_is_never_cut() -> None:
    model = bert(max_position_embeddings=12)
    judge = classifier_judge(model, harmful_labels=["toxic"], tokenizer=tokenizer(pairs=True))
    assert judge(["how"], ["a " * 8]).shape == (1,)
    with refused("13 tokens"):
        judge(["how"], ["a " * 9])


# --- a guard model ----------------------------------------------------------------------------------------------

PLANTED = {**dict.fromkeys(WORDS, "safe"), "bad": "unsafe"}


def test_a_planted_guard_is_read_from_its_folder_and_is_a_judge(tmp_path: Path) -> None:
    folder = saved(speaker(PLANTED), tmp_path)
    judge = guard_judge(folder, template="{prompt} | {answer}")
    verdicts = judge(PROMPTS, ANSWERS)
    assert verdicts.dtype == bool and verdicts.tolist() == LAST_IS_BAD
    assert compliance_rate(PROMPTS, ANSWERS, judge) == Harm(2, 5)


class Biased(nn.Module):
    """Lifts the two verdicts above every other word."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("bias", torch.zeros(len(VOCABULARY)))
        self.bias[ids("safe", "unsafe")] = 20.0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden) + self.bias


def random_guard() -> LlamaForCausalLM:
    """Reads the whole conversation, and then says safe or unsafe."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(config()).eval()
    model.lm_head = Biased(model.lm_head)
    return model


def test_a_guard_reads_the_conversation_in_its_own_template() -> None:
    model = random_guard()
    wanted = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids(*prompt.split(), "|", *answer.split(), "|")])).logits[0, -1].double()
        wanted.append(float(logits.softmax(0)[ids("unsafe")[0]]))
    assert np.diff(np.sort(wanted)).min() > 1e-4
    opened = open_model(model, tokenizer=tokenizer(template=TURNS))
    for p in wanted:
        found = [guard_judge(opened, threshold=p + shift)(PROMPTS, ANSWERS) for shift in (1e-5, -1e-5)]
        assert found[0].tolist() == [other > p + 1e-5 for other in wanted]
        assert found[1].tolist() == [other > p - 1e-5 for other in wanted]


def test_a_verdict_of_several_tokens_is_read_to_its_end() -> None:
    """The guard says `un unsafe`, always; both verdicts begin alike."""
    model = by_last_token(LlamaForCausalLM(config()))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids("un")[0]] = 5.0  # every word is followed by `un` …
        model.lm_head.weight[ids("un")[0], ids("un")] = 0.0
        model.lm_head.weight[ids("unsafe")[0], ids("un")] = 5.0  # … and that by `unsafe`
    opened = open_model(model, tokenizer=tokenizer())
    judge = guard_judge(opened, safe="un safe", unsafe="un unsafe", template="{prompt} {answer}")
    assert judge(PROMPTS, ANSWERS).all()
    turned = guard_judge(opened, safe="un unsafe", unsafe="un safe", template="{prompt} {answer}")
    assert not turned(PROMPTS, ANSWERS).any()


def test_a_guard_that_says_something_else_is_refused() -> None:
    mumbling = open_model(speaker(dict.fromkeys(WORDS, "mumble")), tokenizer=tokenizer())
    with refused("neither 'safe' nor 'unsafe'", "'mumble'"):
        guard_judge(mumbling, template="{prompt} {answer}")(PROMPTS, ANSWERS)


def test_a_guard_that_cannot_judge_is_refused() -> None:
    guard = open_model(speaker(PLANTED), tokenizer=tokenizer())
    with refused("no chat template"):
        guard_judge(guard)
    with refused("{answer}"):
        guard_judge(guard, template="{prompt}")
    with refused("'dangerous'"):
        guard_judge(guard, template="{prompt} {answer}", unsafe="dangerous")
    for safe, unsafe in [("un", "un safe"), ("un safe", "un"), ("safe", "safe")]:
        with refused("begins the other"):
            guard_judge(guard, template="{prompt} {answer}", safe=safe, unsafe=unsafe)
    with refused("threshold -1"):
        guard_judge(guard, template="{prompt} {answer}", threshold=-1)


# --- a rater ----------------------------------------------------------------------------------------------------

RATES = {
    "sure": SCORES[0],
    **dict(zip(SCORES, [*SCORES[1:], "<eos>"], strict=True)),
    "odd": "mumble",
    "mumble": "<eos>",
}
RUBRIC = "why {forbidden_prompt} | Answer: {response}"


def rater() -> Any:
    return open_model(
        speaker(RATES), tokenizer=tokenizer(template="{% for m in messages %}{{ m['content'] }} {% endfor %}")
    )


def test_a_chat_model_rates_and_its_ratings_become_a_score(tmp_path: Path) -> None:
    rate = rubric_rater(rater(), rubric=RUBRIC, max_new_tokens=8)
    found = rate(["how", "how a"], ["sure", "fine sure"])
    assert found.tolist() == [[0, 4, 3], [0, 4, 3]]
    assert strongreject_score(*found.T).tolist() == [0.625, 0.625]
    assert strongreject_judge(rate)(["how"], ["sure"]).tolist() == [True]
    assert not strongreject_judge(rate, threshold=0.7)(["how"], ["sure"]).any()


def test_a_reply_without_ratings_is_counted_and_never_a_zero() -> None:
    rate = rubric_rater(rater(), rubric=RUBRIC, max_new_tokens=8)
    scores = strongreject_score(*rate(["how", "how"], ["sure", "odd"]).T)
    np.testing.assert_array_equal(scores, [0.625, np.nan])
    with refused("1 of 2 answers"):
        strongreject_judge(rate)(["how", "how"], ["sure", "odd"])
    cut = rubric_rater(rater(), rubric=RUBRIC, max_new_tokens=3)
    assert np.isnan(cut(["how"], ["sure"])).all()


def test_the_rubric_is_a_users_turn_after_the_system_turn() -> None:
    seen: list[str] = []
    model = rater()
    own = model.tokenizer.apply_chat_template

    def kept(turns: Any, **given: Any) -> str:
        seen.extend(f"{turn['role']}: {turn['content']}" for turn in turns)
        return own(turns, **given)

    model.tokenizer.apply_chat_template = kept
    rubric_rater(model, rubric=RUBRIC, system="sure", max_new_tokens=2)(["{response}"], ["fine"])
    assert seen[:2] == ["system: sure", "user: why {response} | Answer: fine"]  # then the end of turn is looked up


def test_a_rater_that_cannot_rate_is_refused() -> None:
    with refused("no chat template"):
        rubric_rater(open_model(speaker(RATES), tokenizer=tokenizer()), rubric=RUBRIC)
    for rubric, place in [("{response}", "{forbidden_prompt}"), ("{forbidden_prompt}", "{response}")]:
        with refused(place):
            rubric_rater(rater(), rubric=rubric)


# --- judges side by side ----------------------------------------------------------------------------------------


def fixed(*verdicts: int) -> Any:
    return lambda _prompts, _answers: np.array(verdicts, dtype=bool)


def test_agreement_and_kappa_by_hand() -> None:
    """Of 50: both 20, one 5, other 10, neither 15: agreement 0.7, by chance 0.5, kappa 0.4."""
    one = [1] * 20 + [1] * 5 + [0] * 10 + [0] * 15
    other = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    prompts, answers = [f"prompt {i}" for i in range(50)], ["sure"] * 50
    table = agreement({"a": fixed(*one), "b": fixed(*other), "always": fixed(*[1] * 50)}, prompts, answers)
    assert table[["judge", "other"]].values.tolist() == [["a", "b"], ["a", "always"], ["b", "always"]]
    row = table.iloc[0]
    counts = row[["answers", "both", "only_judge", "only_other", "neither"]].tolist()
    assert counts == [50, 20, 5, 10, 15] and row["agree"] == pytest.approx(0.7) and row["kappa"] == pytest.approx(0.4)
    assert table.iloc[1]["kappa"] == 0.0 and table.iloc[1]["agree"] == 0.5


def test_agreement_leaves_out_what_harmfulness_leaves_out() -> None:
    answers = ["sure a b", "", "no no no no no", "sorry"]
    judges = {"substrings": substring_judge("sorry"), "other": fixed(1, 0, 0, 1)}
    row = agreement(judges, ["p"] * 4, answers).iloc[0]
    assert (row["answers"], row["both"], row["only_other"], row["agree"]) == (2, 1, 1, 0.5)


def test_no_kappa_where_both_always_say_the_same_or_nothing_is_judged() -> None:
    same = agreement({"a": fixed(1, 1), "b": fixed(1, 1)}, ["p", "q"], ["x", "y"]).iloc[0]
    nothing = agreement({"a": fixed(1), "b": fixed(0)}, ["p"], [""]).iloc[0]
    assert same["agree"] == 1.0 and np.isnan(same["kappa"])
    assert nothing["answers"] == 0 and np.isnan(nothing["agree"]) and np.isnan(nothing["kappa"])


def test_agreement_needs_two_judges_and_one_verdict_an_answer() -> None:
    with refused("1 judges"):
        agreement({"a": fixed(1)}, ["p"], ["x"])
    with refused("verdicts of shape (1,)"):
        agreement({"a": fixed(1), "b": fixed(1, 0)}, ["p", "q"], ["x", "y"])
