"""Forward passes of an opened model: hidden states, next-token logits, log-probabilities, greedy generation."""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad as widen
from transformers import DynamicCache

from gravlens.core.errors import GravlensError
from gravlens.core.progress import progress
from gravlens.history.encoding import Batch, end_of_turn, last_positions, pad
from gravlens.models.families import ENDS, EXACT, ROUNDED, OpenModel, acting_on, bare, check_context, described

Cache = TypeVar("Cache", bound=DynamicCache)
BATCH = 32
SHORTEST_PREFIX = 8  # tokens: a shorter one is not worth a pass of its own
APART = "apart"  # attribute of a hook that may see a pass in parts: how many of the last prompt tokens it tells apart
_CONTINUES: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
# Token positions: all, the last prompt token, up to it, after it, or offsets that count it as −1.
Positions: TypeAlias = Literal["all", "last", "prompt", "answer"] | tuple[int, ...]


class Reading(NamedTuple):
    """The padded batch of a forward pass and where its prompts end, for hooks that act at some positions only."""

    batch: Batch
    ends: Int[Tensor, " prompt"]  # index of each row's last prompt token; the tokens after it are its answer
    start: int | None = None  # of a pass over a part of the batch, with the rest in a KV cache: its first column

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
        if self.start is None and width <= int(self.ends.max()):  # a decoding step from a KV cache: all of it is answer
            return torch.full((len(self.ends), width), positions in ("all", "answer"))
        whole = width if self.start is None else true.shape[1]
        after = torch.arange(whole) - self.ends[:, None]  # 0 at the last prompt token
        kinds = {"all": after == after, "last": after == 0, "prompt": after <= 0, "answer": after > 0}
        meant = kinds[positions] if isinstance(positions, str) else torch.isin(after - 1, torch.tensor(positions))
        # Generation appends tokens to the batch, none of them padding.
        found = meant & widen(true, (0, whole - true.shape[1]), value=1).bool()
        return found if self.start is None else found[:, self.start : self.start + width]


# A context variable: hooks see a block's output alone, and nested passes each need their own batch.
READING: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def reading(batch: Batch, ends: Int[Tensor, " prompt"] | None = None, *, start: int | None = None) -> Generator[None]:
    """Declare the batch of your own forward passes inside the block; gravlens's functions do it themselves.

    Args:
        batch: the padded prompts, at least two tokens wide if a KV cache is used.
        ends: index of each row's last prompt token; default: its last token.
        start: of a pass over a part of the batch, the rest of which is in a KV cache: its first column.
    """
    batch = Batch(*(part.cpu() for part in batch))
    ends = last_positions(batch.attention_mask) if ends is None else ends.cpu()
    token = READING.set(Reading(batch, ends, start))
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
        for rows, found in logits_of(model, ids):
            for row, out in zip(rows, found[:, -1], strict=True):
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


def _inputs(model: OpenModel, batch: Batch, new: int = 0, *, start: int = 0) -> dict[str, Tensor]:
    longest = int(batch.attention_mask.sum(1).argmax())
    check_context(model, [batch.input_ids[longest][batch.attention_mask[longest].bool()].tolist()], new=new)
    parts = batch._replace(input_ids=batch.input_ids[:, start:], position_ids=batch.position_ids[:, start:])
    return {key: part.to(model.device) for key, part in parts._asdict().items()}


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
        for rows, found in logits_of(model, ids, [len(one) for one in continuations]):
            for row, logits in zip(rows, found, strict=True):
                tokens = torch.tensor(continuations[row], device=logits.device)
                logprobs = logits[-1 - len(tokens) : -1].float().log_softmax(-1)
                totals[row] = logprobs.gather(1, tokens[:, None]).double().sum()
            bar.update(len(rows))
    return totals


def logits_of(
    model: OpenModel, ids: Sequence[Sequence[int]], answers: Sequence[int] | None = None
) -> Iterator[tuple[list[int], Float[Tensor, "prompt keep vocab"]]]:
    """Yield rows of prompts, in batches, and their logits from the last prompt token on.

    The prefix that all prompts share is run once and its KV cache reused, by models that give the same logits so.
    `answers`: number of tokens after each prompt, in its `ids`.
    """
    answers = answers or [0] * len(ids)
    cut = _cut_of(model, ids, answers)
    keys = _prefix_keys(model, ids[0], cut, answers[0]) if cut else None
    for rows, batch in batches(model, [one[cut:] for one in ids]):
        after = torch.tensor([answers[row] for row in rows])
        yield rows, end_logits(model, _behind(ids[0][:cut], batch) if cut else batch, after, keys)


def end_logits(
    model: OpenModel, batch: Batch, answers: Int[Tensor, " prompt"] | None = None, keys: DynamicCache | None = None
) -> Float[Tensor, "prompt keep vocab"]:
    """Return the logits from the last prompt token on.

    `answers`: number of tokens after it, per row; `keys`: of one prefix that the whole batch begins with.
    """
    answers = torch.zeros(len(batch.input_ids), dtype=torch.long) if answers is None else answers
    keep, start = 1 + int(answers.max()), None if keys is None else keys.get_seq_length()
    cache = None if keys is None else repeated(keys, len(answers), DynamicCache())
    with reading(batch, last_positions(batch.attention_mask) - answers, start=start):
        inputs, further = _inputs(model, batch, start=start or 0), () if cache is None else (cache,)
        # A family without a KV cache need not know of one.
        logits = model.family.logits(inputs, keep, *further)
    _check_numbers(model, logits[:, -1])
    return logits


# --- a shared prefix ------------------------------------------------------------------------------------------------
def _cut_of(model: OpenModel, ids: Sequence[Sequence[int]], answers: Sequence[int]) -> int:
    """Return the length of the prefix to run once; 0 where passes stay whole."""
    parts = list(model.module.modules()) if model.family.kv_cache and ids else []
    # A hook of somebody else may expect whole prompts; in training dropout differs between them.
    apart = [getattr(hook, APART, None) or math.inf for part in parts for hook in acting_on(part)]
    if not parts or any(part.training for part in parts) or math.inf in apart:
        return 0
    most = min(len(one) - answer for one, answer in zip(ids, answers, strict=True)) - int(max([1, *apart]))
    fits = max(map(len, ids)) < window_of(model.module.config)
    length = shared_prefix(ids, most) if fits else 0
    return length if length and _continues(model) else 0


def _prefix_keys(model: OpenModel, ids: Sequence[int], cut: int, answer: int = 0) -> DynamicCache:
    """Run the first tokens of one prompt, under the hooks that are on the model; return their keys and values."""
    whole, keys = pad([ids]), DynamicCache()
    with reading(whole, last_positions(whole.attention_mask) - answer, start=0):
        model.family.trunk(_inputs(model, pad([ids[:cut]])), keys)
    return keys


def _behind(prefix: Sequence[int], rest: Batch) -> Batch:
    """Put a prefix before the rest of each prompt, and before its padding."""
    first = pad([prefix] * len(rest.input_ids))
    ids, mask = (torch.cat(pair, dim=1) for pair in zip(first[:2], rest[:2], strict=True))
    return Batch(ids, mask, mask.cumsum(1) - 1)


def shared_prefix(ids: Sequence[Sequence[int]], most: int) -> int:
    """Return the length of the prefix that all prompts share, at most `most`; 0 if not worth a pass of its own."""
    columns = zip(*(one[: max(most, 0)] for one in ids), strict=True)
    length = next((i for i, column in enumerate(columns) if len(set(column)) > 1), max(most, 0))
    return length if len(ids) > 1 and length >= SHORTEST_PREFIX else 0


def _continues(model: OpenModel) -> bool:
    """Whether prompts that continue from the keys of a shared prefix have the same logits: tried once per model."""
    if model.module not in _CONTINUES:
        with bare(model.module):
            _CONTINUES[model.module] = _same_logits(model)
    return _CONTINUES[model.module]


def _same_logits(model: OpenModel) -> bool:
    tokens = torch.linspace(1, model.family.vocabulary - 2, 40).long().tolist()
    ids = [[*tokens[:8], *tokens[8 + 5 * i : 12 + 9 * i]] for i in range(3 if model.family.padding else 1)]
    try:
        wanted = torch.cat([end_logits(model, pad([one]))[:, -1] for one in ids]).float()
        batch = _behind(ids[0][:8], pad([one[8:] for one in ids], side="left"))
        found = end_logits(model, batch, None, _prefix_keys(model, ids[0], 8))[:, -1].float()
    except Exception:  # whatever an architecture without such a cache raises: its passes stay whole
        return False
    return alike(model, found, wanted, ROUNDED)


def alike(model: OpenModel, found: Float[Tensor, "*row d"], wanted: Float[Tensor, "*row d"], rounded: float) -> bool:
    """Whether two readings of the same rows differ by rounding alone; below fp32 by `rounded` of a row's length."""
    within = EXACT if model.dtype in (torch.float32, torch.float64) else rounded
    return bool(((found - wanted).norm(dim=-1) <= within * wanted.norm(dim=-1)).all())


def repeated(held: DynamicCache | None, n: int, into: Cache) -> Cache:
    """Copy the keys and values of one prompt, if any, into an empty cache of `n` prompts."""
    for layer, (keys, values, _) in enumerate(held or ()):
        assert keys is not None and values is not None
        DynamicCache.update(into, keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1), layer)
    return into


def window_of(config: Any) -> float:
    """Return the shortest attention window of any layer, or the length from which rotary angles depend on length."""
    told = config.get_text_config().to_dict()
    named = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size")
    sizes = [told.get(name) for name in named]  # transformers has no common name for it
    if any(kind in str(told.get("rope_parameters")) for kind in ("dynamic", "longrope")):
        rope = told["rope_parameters"]
        sizes += [rope.get("original_max_position_embeddings"), told.get("max_position_embeddings")]
    return min([size for size in sizes if isinstance(size, int)], default=float("inf"))


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
