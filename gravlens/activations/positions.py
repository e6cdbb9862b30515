"""Read positions: each prompt's tokens, and the positions at which its states become rows of a result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from gravlens.core.display import brief
from gravlens.core.errors import GravlensError
from gravlens.history.encoding import MARK, encode, encode_said, rendered_turns
from gravlens.history.prompts import PromptSet, Turn

AT_ONCE = 256  # prompts are tokenised at a time: their token ids are int objects of their own until they are shared


@dataclass(frozen=True)
class Answers:
    """Read the mean over the tokens of an answer after each prompt: `texts`, the same for all checkpoints."""

    texts: tuple[str, ...]
    __repr__ = brief

    def __init__(self, texts: Sequence[str]) -> None:
        object.__setattr__(self, "texts", tuple(texts))


# One row per prompt: the last token, an offset from the end (−1 is the last), the mean over the instruction's tokens or
# over an answer's. One row per token: the template's after the instruction, all, or those that a function returns.
Named: TypeAlias = Literal["last", "instruction", "post_instruction", "all"]
Positions: TypeAlias = Named | int | Answers | Callable[[list[int]], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Query:
    """One prompt's token ids and, for each row of the result, the positions (from 0) to average over."""

    ids: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]

    @property
    def start(self) -> int:
        """The first position that is read."""
        return min(map(min, self.reads))

    @property
    def end(self) -> int:
        """One past the last position that is read; tokens from there on are not run."""
        return 1 + max(map(max, self.reads))


def described(positions: Positions) -> str | int:
    """Return positions in one word, for the metadata of a result."""
    if isinstance(positions, Answers):
        return "answer"
    return getattr(positions, "__name__", "a function") if callable(positions) else positions


def queries_of(tokenizer: Any, prompts: PromptSet, positions: Positions = "last") -> list[Query]:
    """Tokenise prompts with the one tokenizer of a history, and locate their read positions."""
    if isinstance(positions, Answers) and len(positions.texts) != len(prompts):
        given = f"{len(positions.texts)} answers were given for {len(prompts)} prompts."
        remedy = "Answers(generate_answers(open_model(seq.anchor), prompts)), or answers of your own."
        raise GravlensError(given, "One answer per prompt is needed, the same for all checkpoints.", remedy)
    numbers: dict[int, int] = {}  # one int object per token id: large prompt sets repeat each many times
    queries: list[Query] = []
    for start in range(0, len(prompts), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        found = _part_of(tokenizer, prompts[part], positions, part)
        queries += [replace(one, ids=tuple(numbers.setdefault(i, i) for i in one.ids)) for one in found]
    return queries


def _part_of(tokenizer: Any, prompts: PromptSet, positions: Positions, part: slice) -> list[Query]:
    if isinstance(positions, Answers):
        return [_after(tokenizer, *pair) for pair in zip(prompts.turns, positions.texts[part], strict=True)]
    ids = encode(tokenizer, prompts)
    if positions in ("instruction", "post_instruction"):
        return [_around(tokenizer, prompts[i : i + 1], one, str(positions)) for i, one in enumerate(ids)]
    return queries_of_ids(ids, positions)


def queries_of_ids(ids: Sequence[Sequence[int]], positions: Positions = "last") -> list[Query]:
    """Locate read positions in prompts given as token ids: `"last"`, `"all"`, an offset, or a function."""
    if callable(positions):
        return [_chosen(list(one), positions) for one in ids]
    if positions == "all":
        return [Query(tuple(one), tuple((at,) for at in range(len(one)))) for one in ids]
    offset = offset_of(positions, min(map(len, ids)))
    return [Query(tuple(one), ((len(one) + offset,),)) for one in ids]


def offset_of(positions: Any, shortest: int) -> int:
    """Return `"last"` or a negative index as a negative index; raise if the shortest prompt does not have it."""
    offset = -1 if positions == "last" else positions
    # bool is an int, and 0 or more would be another token in each padded prompt.
    if not isinstance(offset, int) or isinstance(offset, bool) or offset >= 0 or -offset > shortest:
        raise GravlensError(
            f"positions={positions!r} was given; the shortest prompt has {shortest} tokens.",
            'A position is "last", a negative index from the end that every prompt has, "instruction", '
            '"post_instruction", "all", Answers([…]), or a function of token ids.',
            'positions="last".',
        )
    return offset


def _chosen(ids: list[int], positions: Callable[[list[int]], Sequence[int]]) -> Query:
    """Read each position that a function returns, sorted and unique; negative ones count from the end."""
    given = list(positions(list(ids)))  # a copy, which the function may change
    if not given or not all(-len(ids) <= at < len(ids) and int(at) == at for at in given):
        found = f"{described(positions)} returned {given} for a prompt of {len(ids)} tokens."
        wanted = "A function of a prompt's token ids returns at least one position in it."
        raise GravlensError(found, wanted, "lambda ids: [len(ids) - 1], which is the last token.")
    return Query(tuple(ids), tuple((at,) for at in sorted({int(at) % len(ids) for at in given})))


def _around(tokenizer: Any, prompt: PromptSet, ids: list[int], which: str) -> Query:
    """Read the mean over the instruction's tokens, or each token of the template after it."""
    start, end, offsets = _place(tokenizer, prompt)
    offsets = offsets[len(offsets) - len(ids) :]  # `encode` removes a second BOS token
    # A token may begin before the instruction and end in it, with the space between them: it counts as inside.
    inside = tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > max(a, start))
    after = tuple(i for i, (a, b) in enumerate(offsets) if a >= end and b > a)  # special tokens may have a == b
    if which == "instruction":
        return Query(tuple(ids), (inside,))
    if not after:
        given = f'positions="post_instruction" was given, and no token follows {prompt.texts[0][:40]!r}.'
        wanted = "These are the tokens that a chat template adds after the instruction."
        raise GravlensError(given, wanted, 'positions="last", or a tokenizer with a chat template.')
    return Query(tuple(ids), tuple((at,) for at in after))


def _place(tokenizer: Any, prompt: PromptSet) -> tuple[int, int, list[tuple[int, int]]]:
    """Return start and end of the instruction in the rendered text, and each token's offsets there."""
    (turns,) = prompt.turns
    told = (turns, [*turns[:-1], {**turns[-1], "content": MARK}])
    whole, marked = (rendered_turns(tokenizer, [one])[0] for one in told)
    before, _, after = marked.partition(MARK)
    special = not getattr(tokenizer, "chat_template", None)  # a template writes its special tokens itself
    try:
        offsets = tokenizer(whole, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
    except (NotImplementedError, KeyError) as error:  # slow tokenizers have no offsets
        given = f"A {type(tokenizer).__name__} has no offsets for its tokens in {prompt.texts[0][:40]!r}."
        remedy = 'a fast tokenizer (a folder with tokenizer.json), positions="last", or a function.'
        raise GravlensError(given, "Offsets tell the instruction's tokens from the template's.", remedy) from error
    return len(before), len(whole) - len(after), offsets


def _after(tokenizer: Any, turns: list[Turn], answer: str) -> Query:
    """Read the mean over an answer's tokens after its prompt."""
    ids, more = encode_said(tokenizer, turns, answer)
    if not more:
        raise GravlensError(f"The answer {answer!r} has no token.", "At least one is needed.", "a non-empty answer.")
    return Query((*ids, *more), (tuple(range(len(ids), len(ids) + len(more))),))
