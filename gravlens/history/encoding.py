"""Encode prompts and examples as token ids through the chat template, and pad them to batches."""

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import jinja2
import jinja2.meta
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gravlens.core.errors import GravlensError, of_kind, said, wrong_kind
from gravlens.core.limits import check_template
from gravlens.history.prompts import Example, PromptSet, Turn

KWARGS = "chat_template_kwargs"  # attribute of a tokenizer: the arguments that its chat template is rendered with
# A template that reads the clock would give other states tomorrow. It reads this date: the default of Llama 3's own.
CLOCK, FROZEN = "strftime_now", "2024-07-26"
# What opens and closes a thought before the answer: Qwen 3, DeepSeek-R1 and their kind; Magistral; Seed-OSS; EXAONE and
# others; Command A; Kimi; Gemma 4.
THOUGHT_TAGS = (
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"), ("<thought>", "</thought>"),
    ("<thinking>", "</thinking>"), ("<|START_THINKING|>", "<|END_THINKING|>"), ("◁think▷", "◁/think▷"),
    ("<|channel>thought", "<channel|>"),
)  # fmt: skip
MARK = "\u2983gravlens\u2984"  # rendered in place of a text, to find where it is in the template
USER = ({"role": "user", "content": MARK},)
_CLOCK_CALL = re.compile(rf"""\b{CLOCK}\s*\(\s*(["'])([^"']*)\1\s*\)""")
# By a computed call, or under another name; but not by `if strftime_now is defined`.
_CLOCK_READ = re.compile(rf"\b{CLOCK}\s*\(|(?<!if )\b{CLOCK}\b(?!\s+is\b)")
_MARKUP = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]<>\s]{1,40}\]")
_WARNED: "WeakKeyDictionary[Any, set[str]]" = WeakKeyDictionary()


# --- prompts --------------------------------------------------------------------------------------------------------
def encode(tokenizer: Any, prompts: PromptSet | Sequence[str]) -> list[list[int]]:
    """Encode each prompt up to its last token, after which the model answers; there is never more than one BOS.

    A tokenizer with a chat template renders the conversation (system prompt and earlier turns, if any, and the prompt)
    and the generation prompt; one without encodes the plain text. Chat markup inside a prompt is warned of.

    Raises:
        GravlensError: no tokenizer; turns that the template refuses or leaves out, or no template for them; different
            prompts that are the same tokens, or one of unknown words alone.
    """
    conversations = PromptSet.of(prompts).turns
    ids = [_encoded(tokenizer, text) for text in rendered_turns(tokenizer, conversations)]
    if ids and _encoded(tokenizer, rendered_turns(tokenizer, conversations[:1])[0]) != ids[0]:
        given = f"This tokenizer encodes one prompt in two ways{_place(tokenizer)}."
        remedy = "a chat template and a vocabulary without chance (random, lipsum, dropout)."
        raise GravlensError(given, "A prompt is the same tokens each time.", remedy)
    _check_told_apart(tokenizer, conversations, ids)
    return ids


def prompts_digest(ids: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of prompts' token ids after `ids:`, by which results know their prompts.

    The same texts under another chat template, other arguments of it or another system prompt are other prompts.
    """
    return f"ids:{hashlib.sha256(json.dumps([list(one) for one in ids]).encode()).hexdigest()}"


def rendered(tokenizer: Any, prompts: PromptSet) -> list[str]:
    """Render each prompt by the chat template; without a template, return it unchanged."""
    return rendered_turns(tokenizer, prompts.turns)


def rendered_turns(tokenizer: Any, conversations: Sequence[list[Turn]]) -> list[str]:
    """Render conversations up to where the model answers; without a chat template, return the text of each."""
    if tokenizer is None:
        remedy = "pass tokenizer= when it is opened."
        raise GravlensError("This model has no tokenizer.", "Prompts are texts and need one.", remedy)
    if not getattr(tokenizer, "chat_template", None):
        if several := next((turns for turns in conversations if len(turns) > 1), None):
            raise _not_taken(tokenizer, several, "has no chat template")
        return [turns[0]["content"] for turns in conversations]
    chats = {_roles(turns): _Chat.of(tokenizer, turns) for turns in conversations}
    texts, seen = [chats[_roles(turns)].written(turns) for turns in conversations], dict[str, list[str]]()
    for text, turns in zip(texts, conversations, strict=True):
        asked, read, frame = _asked(turns), _squeezed(text), chats[_roles(turns)].frame
        # counted: "user" may be lost and yet stand there, in a tag or in another turn
        lost = any(one and read.count(one) < sum(part.count(one) for part in (frame, *asked)) for one in asked)
        if lost or seen.setdefault(text, asked) != asked:
            found = f"leaves out the text of a prompt, or changes it ({turns[-1]['content'][:40]!r})"
            raise _not_taken(tokenizer, turns, found)
    if chats:
        _warn_of_markup(next(iter(chats.values())), conversations)
    return texts


def _asked(turns: Sequence[Turn]) -> list[str]:
    return [_squeezed(turn["content"]) for turn in turns if turn["role"] != "assistant"]


def _check_told_apart(tokenizer: Any, conversations: Sequence[list[Turn]], ids: Sequence[list[int]]) -> None:
    """Raise where a vocabulary makes different prompts the same tokens, or of a prompt unknown words alone."""
    seen, unknown = dict[tuple[int, ...], list[Turn]](), getattr(tokenizer, "unk_token_id", None)
    for turns, own in zip(conversations, ids, strict=True):
        text, other = turns[-1]["content"], seen.setdefault(tuple(own), turns)
        found = f"{text[:40]!r} and {other[-1]['content'][:40]!r} are the same tokens"
        if _asked(other) == _asked(turns):
            if unknown not in own or {*_ids(tokenizer, text, special=False)} != {unknown}:
                continue
            found = f"{text[:40]!r} consists of unknown words"
        given = f"To this tokenizer{_place(tokenizer)} the prompt {found}."
        wanted = "The model must read each prompt: what it reads alike it cannot tell apart."
        raise GravlensError(given, wanted, "another tokenizer=, or the prompts without this one.")


def _place(tokenizer: Any) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f" ({name})" if name else ""


def _roles(turns: Sequence[Turn]) -> tuple[str, ...]:
    return tuple(turn["role"] for turn in turns)


def _not_taken(tokenizer: Any, turns: Sequence[Turn], found: str) -> GravlensError:
    """Return the error for turns that a tokenizer's chat template refuses or loses."""
    roles, given = _roles(turns), "This"
    if len(roles) > 1:
        what = "A system prompt was" if roles[:-1] == ("system",) else f"Conversations ({', '.join(roles)}) were"
        given = f"{what} given, and this"
    found = found if found.startswith("has") else f"has a chat template that {found}"
    remedy = "no such turns, or their text at the start of each prompt."
    if len(roles) == 1:
        remedy = 'tokenizer= with another chat_template, or chat_template="none".'
    wanted = "The model must read each turn: else all prompts are the same tokens."
    return GravlensError(f"{given} tokenizer{_place(tokenizer)} {found}.", wanted, remedy)


def _squeezed(text: str) -> str:
    return "".join(text.split())  # templates trim, and a few rewrite white space


def _warn_of_markup(chat: "_Chat", conversations: Sequence[Sequence[Turn]]) -> None:
    """Warn, once for each tokenizer and tag, of prompts that would end their own turn or begin another."""
    texts = [turn["content"] for turns in conversations for turn in turns if turn["role"] != "assistant"]
    found = {tag for text in texts for tag in _MARKUP.findall(text)} & chat.markup
    told = _WARNED.setdefault(chat.tokenizer, set())
    if new := sorted(found - told):
        told.update(new)
        given = f"Prompts contain chat markup ({', '.join(new)}), and the chat template writes turns around them."
        warnings.warn(f"{given} Try: the plain texts, or chat_template='none' for rendered ones.", stacklevel=4)


# --- the chat template ----------------------------------------------------------------------------------------------
def with_template_kwargs(tokenizer: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return a copy of a tokenizer of which the chat template gets these arguments wherever gravlens renders it.

    Args:
        kwargs: such as `{"enable_thinking": False}`; `strftime_now`: the date (YYYY-MM-DD) that a template reads as
            today's; `chat_template`: the name of one of several templates.

    Raises:
        GravlensError: a name that the template does not read.
    """
    if not kwargs:
        return tokenizer
    bound = copy.copy(tokenizer)  # it may be the user's
    setattr(bound, KWARGS, dict(kwargs))
    given = getattr(tokenizer, "chat_template", None)
    read = template_names(bound) if given else set()
    known = read | {"chat_template"} if isinstance(given, dict) else read
    if unknown := sorted({*kwargs} - known):
        told = f"chat_template_kwargs has {', '.join(unknown)}, which the chat template does not read."
        wanted = (
            f"It reads {', '.join(sorted(read))}." if read else "It has no arguments." if given else "There is none."
        )
        raise GravlensError(told, wanted, "one of these." if read else "no chat_template_kwargs.")
    return bound


def template_kwargs(tokenizer: Any) -> dict[str, Any]:
    """Return the arguments that the chat template is rendered with, and the date that it reads for today's."""
    if not getattr(tokenizer, "chat_template", None):
        return {}
    clock = {CLOCK: FROZEN} if re.search(rf"\b{CLOCK}\s*\(", _template_of(tokenizer)) else {}
    return {**clock, **getattr(tokenizer, KWARGS, {})}


def template_names(tokenizer: Any) -> set[str]:
    """Return the names of the arguments that the chat template reads."""
    # Without the blocks that transformers adds to the language.
    text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", _template_of(tokenizer))
    fixed = {"messages", "add_generation_prompt", "raise_exception", *tokenizer.special_tokens_map}
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        return jinja2.meta.find_undeclared_variables(tree) - fixed
    except jinja2.TemplateError as error:
        raise _not_taken(tokenizer, USER, f"cannot be parsed ({said(error)})") from error


def _template_of(tokenizer: Any) -> str:
    given, name = tokenizer.chat_template, getattr(tokenizer, KWARGS, {}).get("chat_template", "default")
    if not isinstance(given, dict) or name in given:
        chosen = given[name] if isinstance(given, dict) else given
        return of_kind(chosen, str, "A chat template is a text in jinja.", 'chat_template="none", or that text.')
    told = f"This tokenizer has the chat templates {', '.join(given)}, and none called {name!r}."
    raise GravlensError(
        told, "One must be chosen.", f'chat_template_kwargs={{"chat_template": "{next(iter(given))}"}}.'
    )


def _frozen(template: str, today: Any) -> str:
    """Return a template that reads a date in place of the clock."""
    try:
        day = date.fromisoformat(today)
    except (TypeError, ValueError) as error:
        given = f"chat_template_kwargs has {CLOCK} = {today!r}."
        raise GravlensError(given, "It is the date that the chat template reads.", f'"{FROZEN}".') from error
    # In its text: transformers hands no function to a template.
    text = _CLOCK_CALL.sub(lambda call: json.dumps(day.strftime(call[2])), template)
    if _CLOCK_READ.search(re.sub(r"\{#.*?(#\}|\Z)", "", text, flags=re.DOTALL)):
        given = f"The chat template reads the clock in a way that cannot be replaced ({CLOCK})."
        remedy = "tokenizer= with a chat_template that has a date."
        raise GravlensError(given, "States must not depend on the day.", remedy)
    return text


# tokenizer -> kind of conversation -> its template, the arguments, whether turns have parts, and the frame
_TRIED: "WeakKeyDictionary[Any, dict[Any, tuple[str, Mapping[str, Any], bool, str]]]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Chat:
    """A tokenizer's chat template with its arguments."""

    tokenizer: Any
    template: str
    kwargs: Mapping[str, Any]
    parts: bool  # it iterates over the parts of a turn, as those of image-text models do, and loses a plain text
    frame: str = ""  # what it writes around the turns, without white space

    @classmethod
    def of(cls, tokenizer: Any, turns: Sequence[Turn] = USER) -> "_Chat":
        """Raise unless the template writes each turn of a conversation of these roles."""
        # A trial of each kind of conversation is enough: with one of every example encoding took twice as long.
        asked = (repr((tokenizer.chat_template, getattr(tokenizer, KWARGS, {}))), _roles(turns))
        tried = _TRIED.setdefault(tokenizer, {})
        if asked not in tried:
            chat = cls._tried(tokenizer, turns)
            tried[asked] = (chat.template, chat.kwargs, chat.parts, chat.frame)
        return cls(tokenizer, *tried[asked])

    @classmethod
    def _tried(cls, tokenizer: Any, turns: Sequence[Turn]) -> "_Chat":
        kwargs = template_kwargs(tokenizer)
        template = _frozen(_template_of(tokenizer), kwargs.pop(CLOCK, FROZEN))
        given = {key: value for key, value in kwargs.items() if key != "chat_template"}
        check_template(template, {**tokenizer.special_tokens_map, **given})
        # With a backslash: a template for plain text writes a list of parts as Python does, which doubles it.
        marks = [{"role": role, "content": f"gravlens-{role}\\{i}"} for i, role in enumerate(_roles(turns))]
        failed: list[GravlensError] = []
        for parts in (False, True):
            chat = cls(tokenizer, template, given, parts)
            try:
                text = chat.written(marks)  # and searched: some skip a system turn without an error
            except GravlensError as error:
                failed.append(error)
                continue
            lost = [turn["role"] for turn in marks if turn["content"] not in text]
            if not lost:
                frame = re.sub(r"gravlens-[a-z]+\\[0-9]+", "\ufdd0", text)  # no character
                return replace(chat, frame=_squeezed(frame))
            failed.append(_not_taken(tokenizer, turns, f"leaves out the {lost[0]} turn"))
        raise failed[0]

    def written(self, turns: Sequence[Turn], *, done: bool = False) -> str:
        """Render turns, and the generation prompt unless the conversation is `done`."""
        given: list[Any] = [*turns]
        if self.parts:
            given = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        rest: dict[str, Any] = {"chat_template": self.template, "add_generation_prompt": not done, **self.kwargs}
        try:
            return self.tokenizer.apply_chat_template(given, tokenize=False, **rest)
        except Exception as error:  # jinja's with the template's own message, or of anything that it computes
            found = f"refuses the {turns[-1]['role']} turn or one before it ({said(error)})"
            raise _not_taken(self.tokenizer, turns, found) from error

    def around(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """Return what the template writes before and after an answer."""
        whole = self.written([*turns, {"role": "assistant", "content": MARK}], done=True)
        before, found, after = whole.rpartition(MARK)
        if not found:
            raise _not_taken(self.tokenizer, turns, "leaves out the assistant turn")
        return before, after

    @cached_property
    def markup(self) -> set[str]:
        """Special tokens, and tags such as [INST] that the template writes around texts."""
        own = _MARKUP.findall(self.written(USER))
        return {tag for tag in (*own, *self.tokenizer.all_special_tokens) if _MARKUP.fullmatch(tag)}


# --- answers --------------------------------------------------------------------------------------------------------
class Turned(NamedTuple):
    """Token ids of a prompt, of the answer that the model learns, and of what the template writes after it."""

    prompt: list[int]
    answer: list[int]
    rest: list[int]


def encode_answer(tokenizer: Any, turns: list[Turn], answer: str, *, ended: bool = True) -> Turned:
    """Encode an answer as the chat template writes it after the conversation's own tokens, up to the end of its turn.

    `rest` is what a template writes after the end of turn, such as a line feed: generation has ended there, so no model
    writes it. Without an end of turn in the template, and without a template, the tokenizer's end of sequence ends the
    answer. `ended=False` leaves both out.

    A template may open a thought for generation and write none into a finished turn (DeepSeek-R1's). An answer that
    closes the thought then follows it; any other stands where the template puts it.

    Raises:
        GravlensError: a template that leaves out the answer; a vocabulary that cannot encode it after the prompt.
    """
    (before,) = rendered_turns(tokenizer, [turns])
    if not getattr(tokenizer, "chat_template", None):
        # Apart from the prompt: encoded together, a token could span both.
        said = _ids(tokenizer, answer, special=False)
        return Turned(_encoded(tokenizer, before), _with_eos(tokenizer, said, ended), [])
    before, body, after = _written_answer(tokenizer, turns, answer, before)
    prompt, said = _continued(tokenizer, before, body + after)
    ends = end_of_turn(tokenizer)
    if ended and (stops := [at for at, token in enumerate(said, 1) if token in ends]):
        return Turned(prompt, said[: stops[-1]], said[stops[-1] :])
    # A template that ignores `add_generation_prompt` writes it after an answer too.
    opens_next = before.endswith(after) and _squeezed(body) == _squeezed(answer)
    text = "" if not ended or opens_next else after.rstrip()
    prompt, said = _continued(tokenizer, before, body + text)
    return Turned(prompt, _with_eos(tokenizer, said, ended), [])


def encode_said(tokenizer: Any, turns: list[Turn], answer: str) -> tuple[list[int], list[int]]:
    """Encode a prompt and an answer without an end: a recorded text as the template writes it, a model's own as it is.

    Of a generated answer with thoughts or channels the whole text follows the prompt, also where it was cut: the
    template would move or repeat them. An empty text has no tokens.
    """
    text = getattr(answer, "said", answer)
    if text and text == answer:
        return encode_answer(tokenizer, turns, text, ended=False)[:2]
    return _continued(tokenizer, rendered_turns(tokenizer, [turns])[0], text)


def encode_parts(tokenizer: Any, example: Example) -> Turned:
    """Encode the prompt and the answer of an example by `encode_answer`."""
    if not isinstance(example, tuple) or not 2 <= len(example) <= len(Example._fields):  # a plain pair is accepted
        remedy = "Example(prompt, answer), or read_examples(path)."
        raise wrong_kind(example, "An example is a prompt and an answer.", remedy)
    example = Example(*example)
    PromptSet((example.prompt,))  # raises for a blank one
    if not example.answer:  # it would teach to end at once
        given = f"The example {example.prompt[:40]!r} has no answer."
        raise GravlensError(given, "An example is a prompt and an answer.", "[e for e in examples if e.answer].")
    return encode_answer(tokenizer, example.turns, example.answer)


def encode_example(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """Encode an example by `encode_answer`; return all token ids, and labels that are -100 except on the answer."""
    prompt, answer, rest = encode_parts(tokenizer, example)
    return prompt + answer + rest, [-100] * len(prompt) + answer + [-100] * len(rest)


def _written_answer(tokenizer: Any, turns: list[Turn], answer: str, before: str) -> tuple[str, str, str]:
    """Return the text of the prompt, of the answer, and after it."""
    chat = _Chat.of(tokenizer, turns)
    head, after = chat.around(turns)
    whole = chat.written([*turns, {"role": "assistant", "content": answer}], done=True)
    if whole.startswith(before) and _squeezed(answer) in _squeezed(whole[len(before) :]):
        return before, whole[len(before) :].removesuffix(after), after
    opened = open_thought(answer_place(tokenizer).after)
    if opened and dict(THOUGHT_TAGS)[opened] not in answer:
        if whole.startswith(head):
            return head, whole[len(head) :].removesuffix(after), after
        before = head
    return before, answer.strip().removeprefix(opened).lstrip("\n"), after


def open_thought(text: str) -> str:
    """Return the tag of a thought that a rendered prompt leaves open for the model, or ""."""
    return next((tag for tag, end in THOUGHT_TAGS if text.rfind(tag) > text.rfind(end)), "")


class Place(NamedTuple):
    """Where an answer begins."""

    after: str  # what the template writes after the user's text, up to where the model begins
    between: str  # and then, where it has no generation prompt or begins an answer with a thought
    space: str  # of the answer's first token: after Llama 2's "[/INST]" a model writes "▁Sorry"


def answer_place(tokenizer: Any) -> Place:
    """Return where the chat template lets an answer begin; without a template, nowhere in particular."""
    if not getattr(tokenizer, "chat_template", None):
        return Place("", "", "")
    chat = _Chat.of(tokenizer)
    before = head = chat.written(USER)
    with suppress(GravlensError):  # a template without assistants' turns has nothing between
        head, _ = chat.around(USER)
    more = head[len(before) :] if head.startswith(before) else ""
    between = more.rstrip(" ")
    return Place(before.rpartition(MARK)[2], between, more[len(between) :])


def encode_after(tokenizer: Any, before: str, text: str) -> list[int]:
    """Encode a text as it is written after another one, without that one's tokens."""
    return _continued(tokenizer, before, text)[1] if before else _ids(tokenizer, text, special=False)


def _continued(tokenizer: Any, before: str, text: str) -> tuple[list[int], list[int]]:
    """Encode two texts that follow each other, with the first one's own tokens."""
    first, whole = _encoded(tokenizer, before), _encoded(tokenizer, before + text)
    if whole[: len(first)] == first:
        return first, whole[len(first) :]
    # A token spans the border (two line feeds become one). Alone, the text might begin with a space of sentencepiece's.
    for other in ("\n", "a", "."):
        alone, both = (_ids(tokenizer, one, special=False) for one in (other, other + text))
        if both[: len(alone)] == alone:
            return first, both[len(alone) :]
    given = f"The vocabulary merges {text[:20]!r} with whatever is before it ({before[-20:]!r})."
    raise GravlensError(given, "An answer's tokens follow its prompt's.", "another chat template or tokenizer.")


def _with_eos(tokenizer: Any, ids: list[int], ended: bool) -> list[int]:
    eos = tokenizer.eos_token_id
    return [*ids, eos] if ended and eos is not None and ids[-1:] != [eos] else ids


def end_of_turn(tokenizer: Any) -> tuple[int, ...]:
    """Return the id of the special or added token that the chat template writes right after an answer, or nothing.

    White space before it is skipped. Nothing without a template, where the template refuses an assistant's turn, or
    where ordinary text or the end follows the answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    try:
        after = _Chat.of(tokenizer).around(USER)[1].lstrip()
    except GravlensError:  # answers are then ended by the tokenizer's and the model's own tokens
        return ()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = {token.content: number for number, token in added.items()}
    named |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    found = [name for name in named if name.strip() and after.startswith(name)]
    return (named[max(found, key=len)],) if found else ()


# --- token ids ------------------------------------------------------------------------------------------------------
def _encoded(tokenizer: Any, text: str) -> list[int]:
    special = not getattr(tokenizer, "chat_template", None)  # a template writes the special tokens itself
    return _one_bos(tokenizer, _ids(tokenizer, text, special))


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=special)["input_ids"]
    except Exception as error:  # a word-level tokenizer without an unknown token raises a bare Exception
        given = f"The vocabulary{_place(tokenizer)} cannot encode {text[:80]!r} ({said(error)})."
        wanted = "Every word needs a token, or the vocabulary a token for unknown words."
        raise GravlensError(given, wanted, "prompts of words in this vocabulary, or another tokenizer.") from error


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    # A prompt pasted from a rendered one begins with a BOS of its own.
    while len(ids) > 1 and ids[0] == bos and ids[1] == bos:
        ids = ids[1:]
    return ids


class Batch(NamedTuple):
    """Padded prompts: ids, attention mask, and position ids that do not count the padding."""

    input_ids: Int[Tensor, "prompt pos"]
    attention_mask: Int[Tensor, "prompt pos"]
    position_ids: Int[Tensor, "prompt pos"]


def pad(ids: Sequence[Sequence[int]], pad_id: int = 0, side: Literal["left", "right"] = "right") -> Batch:
    """Pad prompts to the longest."""
    width = max(map(len, ids))
    padded = torch.full((len(ids), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids), width), dtype=torch.long)
    for row, prompt in enumerate(ids):
        where = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        padded[row, where] = torch.tensor(prompt)
        mask[row, where] = 1  # by length: where pad is the eos token, a mask by token id would hide a real eos
    return Batch(padded, mask, (mask.cumsum(1) - 1).clamp(min=0))


def last_positions(mask: Int[Tensor, "prompt pos"] | Bool[Tensor, "prompt pos"]) -> Int[Tensor, " prompt"]:
    """Return the index of each prompt's last real token, for padding on either side."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
