"""Forward passes of an opened model: hidden states, next-token logits, log-probabilities, greedy generation."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad as widen

from gravlens.core.errors import GravlensError
from gravlens.core.progress import progress
from gravlens.history.encoding import Batch, end_of_turn, last_positions, pad
from gravlens.models.families import ENDS, OpenModel, check_context, described

BATCH = 32
# Token positions: all, the last prompt token, up to it, after it, or offsets that count it as −1.
Positions: TypeAlias = Literal["all", "last", "prompt", "answer"] | tuple[int, ...]


class Reading(NamedTuple):
    """The padded batch of a forward pass and where its prompts end, for hooks that act at some positions only."""

    batch: Batch
    ends: Int[Tensor, " prompt"]  # index of each row's last prompt token; the tokens after it are its answer

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Token ids of each row's prompt."""
        rows = zip(self.batch.input_ids, self.batch.attention_mask.bool(), self.ends.tolist(), strict=True)
        return [tuple(ids[: end + 1][true[: end + 1]].tolist()) for ids, true, end in rows]

    def chosen(self, positions: Positions, width: int) -> Bool[Tensor, "prompt pos"]:
        """Mask these positions in a pass of `width` tokens, without padding; raise if an offset exceeds a prompt."""
        true = self.batch.attention_mask
        if not isinstance(positions, str):
            shortest = int(true.cumsum(1).gather(1, self.ends[:, None]).min())
            if -min(positions) > shortest:
                given = f"positions={positions!r} was given; the shortest prompt has {shortest} tokens."
                wanted = "Offsets count back from the last prompt token, -1, and every prompt must be long enough."
                raise GravlensError(given, wanted, '"last", or longer prompts.')
        if width <= int(self.ends.max()):  # a decoding step from a KV cache: all of it is answer
            return torch.full((len(self.ends), width), positions in ("all", "answer"))
        after = torch.arange(width) - self.ends[:, None]  # 0 at the last prompt token
        kinds = {"all": after == after, "last": after == 0, "prompt": after <= 0, "answer": after > 0}
        meant = kinds[positions] if isinstance(positions, str) else torch.isin(after - 1, torch.tensor(positions))
        # Generation appends tokens to the batch, none of them padding.
        return meant & widen(true, (0, width - true.shape[1]), value=1).bool()


# A context variable: hooks see a block's output alone, and nested passes each need their own batch.
READING: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def reading(batch: Batch, ends: Int[Tensor, " prompt"] | None = None) -> Generator[None]:
    """Declare the batch of your own forward passes inside the block; gravlens's functions do it themselves.

    Args:
        batch: the padded prompts, at least two tokens wide if a KV cache is used.
        ends: index of each row's last prompt token; default: its last token.
    """
    batch = Batch(*(part.cpu() for part in batch))
    token = READING.set(Reading(batch, last_positions(batch.attention_mask) if ends is None else ends.cpu()))
    try:
        yield
    finally:
        READING.reset(token)


def current_reading(hidden: Float[Tensor, "prompt pos d_model"]) -> Reading:
    """Return the batch of the current forward pass, given its states; raise if it was not declared."""
    now = READING.get()
    if now is None or hidden.ndim != 3 or len(hidden) != len(now.ends):
        given = f"The batch of a forward pass with states {tuple(hidden.shape)} was not declared."
        remedy = 'with gravlens.models.forward.reading(pad(ids)): around your own pass, or positions="all".'
        raise GravlensError(given, "Positions count from the last prompt token, which has to be declared.", remedy)
    return now


def check_positions(positions: Positions) -> None:
    """Raise unless these are valid positions."""
    given: Any = positions
    offsets = isinstance(given, tuple) and given and all(type(one) is int and one < 0 for one in given)
    if not offsets and given not in ("all", "last", "prompt", "answer"):
        wanted = 'Positions are "all", "last", "prompt", "answer" or a tuple of offsets; -1 is the last prompt token.'
        raise GravlensError(f"positions={given!r} was given.", wanted, '"last", or (-1,).')


def run_trunk(model: OpenModel, batch: Batch) -> None:
    """Run the blocks for the hooks on them, without logits where the family allows it."""
    with reading(batch):
        model.family.trunk(_inputs(model, batch))


def final_logits(model: OpenModel, ids: Sequence[Sequence[int]]) -> Float[Tensor, "prompt vocab"]:
    """Return the next-token logits after each prompt, fp32."""
    logits: list[Tensor] = [torch.empty(0)] * len(ids)
    with torch.inference_mode(), progress("logits", total=len(ids), unit="prompt") as bar:
        for rows, batch in batches(model, ids):
            for row, out in zip(rows, end_logits(model, batch)[:, -1], strict=True):
                logits[row] = out.float().cpu()
            bar.update(len(rows))
    return torch.stack(logits)


class Continuation(NamedTuple):
    """Tokens that a model says after a prompt, without the end token."""

    tokens: list[int]
    ended: bool  # by an end token; else cut by `max_new_tokens`


def end_tokens(model: OpenModel) -> tuple[int, ...]:
    """Return the ids of the tokens that end an answer, ascending.

    The tokenizer's end of sequence, the end of turn of its chat template, and `eos_token_id` of the generation
    configurations of the model and of the tokenizer's folder (of all checkpoints, for a `sequence_tokenizer`).
    """
    found, tokenizer = set(model.family.ends), model.tokenizer
    if tokenizer is not None:
        found |= {*end_of_turn(tokenizer), *getattr(tokenizer, ENDS, ())} | ({tokenizer.eos_token_id} - {None})
    return tuple(sorted(found))


def generate(model: OpenModel, ids: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
    """Continue each prompt greedily; return the new tokens up to the first end token."""
    return [one.tokens for one in continued(model, ids, max_new_tokens=max_new_tokens)]


def continued(model: OpenModel, ids: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Continuation]:
    """Continue each prompt greedily, whatever the checkpoint's generation configuration asks for beside end tokens."""
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        given = f"max_new_tokens={max_new_tokens!r} was given."
        raise GravlensError(given, "An answer has at least one token.", "max_new_tokens=64.")
    ends, answers = end_tokens(model), [Continuation([], ended=True)] * len(ids)
    with torch.inference_mode(), progress("answers", total=len(ids), unit="prompt") as bar:
        for rows, batch in batches(model, ids):
            if model.family.kv_cache and batch.input_ids.shape[1] == 1 and model.family.padding:
                batch = Batch(*(widen(part, (1, 0)) for part in batch))  # else a cached pass looks like the prefill
            with reading(batch), _numbers_watched(model):
                found = model.family.generate(_inputs(model, batch, max_new_tokens), max_new_tokens, ends)
            new = found[:, batch.input_ids.shape[1] :].tolist()
            for row, tokens in zip(rows, new, strict=True):
                stop = next((i for i, token in enumerate(tokens) if token in ends), None)
                answers[row] = Continuation(tokens[:stop], stop is not None)
            bar.update(len(rows))
    return answers


def _inputs(model: OpenModel, batch: Batch, new: int = 0) -> dict[str, Tensor]:
    longest = int(batch.attention_mask.sum(1).argmax())
    check_context(model, [batch.input_ids[longest][batch.attention_mask[longest].bool()].tolist()], new=new)
    return {key: part.to(model.device) for key, part in batch._asdict().items()}


def batches(model: OpenModel, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Batch]]:
    """Yield left-padded batches of similar length; of equal length, or single prompts, where padding is wrong."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # so that little is padding
    while order:
        rows = order[:BATCH]
        if len(ids[rows[-1]]) > len(ids[rows[0]]) and not model.family.padding:
            rows = [row for row in rows if len(ids[row]) == len(ids[rows[0]])]
        if len(rows) > 1 and not model.family.batching:
            rows = rows[:1]
        order = order[len(rows) :]
        yield rows, pad([ids[row] for row in rows], side="left")


def sequence_logprobs(
    model: OpenModel, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> Float[Tensor, " prompt"]:
    """Return the teacher-forced log-probability of each continuation, summed over its tokens in fp64; nats."""
    totals = torch.zeros(len(prompts), dtype=torch.float64)
    ids = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    with torch.inference_mode(), progress("likelihoods", total=len(ids), unit="prompt") as bar:
        for rows, batch in batches(model, ids):
            lengths = torch.tensor([len(continuations[row]) for row in rows])
            for row, logits in zip(rows, end_logits(model, batch, lengths), strict=True):
                tokens = torch.tensor(continuations[row], device=logits.device)
                logprobs = logits[-1 - len(tokens) : -1].float().log_softmax(-1)
                totals[row] = logprobs.gather(1, tokens[:, None]).double().sum()
            bar.update(len(rows))
    return totals


def end_logits(
    model: OpenModel, batch: Batch, answers: Int[Tensor, " prompt"] | None = None
) -> Float[Tensor, "prompt keep vocab"]:
    """Return the logits from the last prompt token on; `answers`: number of tokens after it, per row."""
    answers = torch.zeros(len(batch.input_ids), dtype=torch.long) if answers is None else answers
    keep = 1 + int(answers.max())
    with reading(batch, last_positions(batch.attention_mask) - answers):
        logits = model.family.logits(_inputs(model, batch), keep)
    _check_numbers(model, logits[:, -1])
    return logits


@contextmanager
def _numbers_watched(model: OpenModel) -> Generator[None]:
    """Raise where the next token would be chosen among logits that are NaN: the choice would be token 0."""
    head = model.family.head
    if head is None:
        yield
        return

    def hook(_module: Any, _inputs: Any, logits: Tensor) -> None:
        _check_numbers(model, logits[:, -1])

    handle = head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _check_numbers(model: OpenModel, logits: Float[Tensor, "prompt vocab"]) -> None:
    if logits.isnan().any():
        of = f"{described(model.module)} {getattr(model.module, 'name_or_path', '')}".strip()
        remedy = "another checkpoint, whose run has not diverged; instead of float16, bf16 or float32."
        raise GravlensError(f"The logits of {of} are NaN in {model.precision}.", "Answers need numbers.", remedy)
