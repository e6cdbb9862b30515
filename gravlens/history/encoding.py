"""Encode prompts and examples as token ids through the chat template, and pad them to batches."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gravlens.core.errors import GravlensError, wrong_kind
from gravlens.history.prompts import Example, PromptSet, Turn


def encode(tokenizer: Any, prompts: PromptSet | Sequence[str]) -> list[list[int]]:
    """Encode each prompt up to its last token, after which the model answers; there is never more than one BOS.

    A tokenizer with a chat template renders the conversation (system prompt and earlier turns, if any, and the prompt)
    and the generation prompt; one without encodes the plain text.
    """
    if tokenizer is None:
        remedy = "pass tokenizer= when it is opened."
        raise GravlensError("This model has no tokenizer.", "Prompts are texts and need one.", remedy)
    prompts = PromptSet.of(prompts)
    for roles in {tuple(turn["role"] for turn in turns) for turns in prompts.turns} - {("user",)}:
        _check_takes(tokenizer, roles)
    special = not getattr(tokenizer, "chat_template", None)  # a template writes the special tokens itself
    return [_one_bos(tokenizer, _ids(tokenizer, text, special)) for text in rendered(tokenizer, prompts)]


def encode_example(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """Encode prompt + answer; return the token ids, and labels that are -100 (no loss) on the prompt."""
    if not isinstance(example, tuple) or len(example) not in (2, 3, 4):  # a plain pair is accepted
        remedy = "Example(prompt, answer), or read_examples(path)."
        raise wrong_kind(example, "An example is a prompt and an answer.", remedy)
    example = Example(*example)
    if not example.answer:  # it would teach to end at once
        given = f"The example {example.prompt[:40]!r} has no answer."
        raise GravlensError(given, "An example is a prompt and an answer.", "[e for e in examples if e.answer].")
    prompt = encode(tokenizer, PromptSet((example.prompt,), system=example.system, earlier=(example.earlier,)))[0]
    # Apart from the prompt: encoded together, a token could span both, and the mask would have no border.
    answer = _ids(tokenizer, example.answer, special=False)
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def rendered(tokenizer: Any, prompts: PromptSet) -> list[str]:
    """Render each prompt by the chat template; without a template, return it unchanged."""
    if not getattr(tokenizer, "chat_template", None):
        return list(prompts)
    return [_rendered(tokenizer, turns) for turns in prompts.turns]


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=special)["input_ids"]
    except Exception as error:  # a word-level tokenizer without an unknown token raises a bare Exception
        if "UNK" not in str(error).upper():
            raise
        given = f"The vocabulary cannot encode {text[:80]!r}."
        wanted = "Every word needs a token, or the vocabulary a token for unknown words."
        raise GravlensError(given, wanted, "prompts of words in this vocabulary, or another tokenizer.") from error


def _rendered(tokenizer: Any, turns: list[Turn]) -> str:
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def _check_takes(tokenizer: Any, roles: Sequence[str]) -> None:
    """Raise if the chat template would refuse or drop a turn of a conversation of these roles."""
    found, marks = "has no chat template", [f"gravlens-{role}-{i}" for i, role in enumerate(roles)]
    what = "A system prompt was" if roles[:-1] == ("system",) else f"Conversations ({', '.join(roles)}) were"
    if getattr(tokenizer, "chat_template", None):
        try:
            # Rendered and searched: some templates skip the system turn without an error.
            turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
            text = _rendered(tokenizer, turns)
            lost = [role for role, mark in zip(roles, marks, strict=True) if mark not in text]
        except Exception as error:  # jinja's, with the template's own message
            found = f"has a chat template that refuses {'a system turn' if 'system' in roles else 'them'} ({error})"
        else:
            if not lost:
                return
            found = f"has a chat template that leaves out the {lost[0]} turn"
    wanted, remedy = "Each is a turn of the chat template.", "its text at the start of each prompt."
    raise GravlensError(f"{what} given, and this tokenizer {found}.", wanted, f"no such turns, or {remedy}")


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    # A prompt pasted from a rendered one begins with a BOS of its own.
    while len(ids) > 1 and ids[0] == bos and ids[1] == bos:
        ids = ids[1:]
    return ids


def end_of_turn(tokenizer: Any) -> tuple[int, ...]:
    """Return the id of the special or added token that the chat template writes right after an answer, or nothing.

    White space before it is skipped. Nothing without a template, where the template refuses an assistant's turn, or
    where ordinary text or the end follows the answer.
    """
    turns = [{"role": "user", "content": "gravlens-user"}, {"role": "assistant", "content": "gravlens-answer"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False) if tokenizer.chat_template else ""
    except Exception:  # jinja's: answers are then ended by the tokenizer's and the model's own tokens
        text = ""
    after = text.rpartition("gravlens-answer")[2].lstrip() if "gravlens-answer" in text else ""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = {token.content: number for number, token in added.items()}
    named |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    found = [name for name in named if name.strip() and after.startswith(name)]
    return (named[max(found, key=len)],) if found else ()


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
