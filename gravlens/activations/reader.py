"""Read the residual stream at chosen positions, with as little computation as possible.

The prefix that all prompts share is run once and its KV cache is reused. Up to the first position that is read, the
deepest layer computes keys and values only. Prompts are sorted by length and batched by number of tokens.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from gravlens.activations.positions import Query, offset_of
from gravlens.core.errors import GravlensError, said
from gravlens.core.progress import progress
from gravlens.history.encoding import Batch, last_positions, pad
from gravlens.history.sources import Resolved
from gravlens.models.families import OpenModel, acting_on, bare, described, resid_post
from gravlens.models.forward import alike, repeated, run_trunk, shared_prefix, window_of
from gravlens.models.placement import Placement
from gravlens.models.swapping import check_one_precision, open_each
from gravlens.models.tokenizers import check_vocabulary

# Of a batch: larger ones no longer fit into a processor's caches. On a CPU 512 to 2,048 cost the same within the noise
# of measurement, and 256 a sixth more (docs/log.md).
TOKENS = {"cpu": 1024}
TOKENS_ELSEWHERE = 16384  # of a batch on an accelerator; split in half if memory runs out
BATCH = 32  # prompts of `read_residuals`
BLOCK_BYTES = 4 << 20  # of states held in memory before they are written
LONGEST_TAIL = 8  # from the first position that is read to the last
NO_MEMORY = ("out of memory", "enough memory", "allocate memory")  # the CPU allocators raise a plain RuntimeError
ROUNDED = 0.1  # allowed difference below fp32, relative to a state's length
THIS_MODEL = "this model"
Through = Literal["huggingface", "bridge"]
Offset = Literal["last"] | int  # from the end of each prompt
# Trials per model, not per call.
_REUSES: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
_PADS: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def common_prefix(queries: Sequence[Query]) -> int:
    """Return the length of the prefix that all prompts share before any read position; 0 if not worth a pass."""
    return shared_prefix([query.ids for query in queries], min(query.start for query in queries))


def batches_of(queries: Sequence[Query], *, prefix: int, tokens: int, ragged: bool = True) -> list[list[int]]:
    """Return indices of prompts, by length, in batches of at most `tokens` tokens with padding, or of one prompt.

    Without `ragged` the prompts of a batch are of one length.
    """
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(queries)), key=lambda i: queries[i].end):
        full = (len(batches[-1]) + 1) * (queries[i].end - prefix) > tokens
        if batches[-1] and (full or (not ragged and queries[i].end != queries[batches[-1][0]].end)):
            batches.append([])
        batches[-1].append(i)
    return batches


def tokens_for(model: OpenModel) -> int:
    """Return the default number of tokens of a batch."""
    return TOKENS.get(model.device.type, TOKENS_ELSEWHERE)


@dataclass(frozen=True)
class Plan:
    """Prompts in blocks of similar lengths (`blocks`: their indices), and the layers to read of them, ascending.

    A block is read and written as a whole, and read again as a whole after a killed run. Every prompt begins with the
    token ids `prefix`.
    """

    queries: tuple[Query, ...]
    layers: tuple[int, ...]
    d_model: int
    prefix: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]

    @cached_property
    def ends(self) -> list[int]:
        """One past each prompt's last row of the result."""
        return list(accumulate(len(query.reads) for query in self.queries))

    def rows(self, prompt: int) -> range:
        """Return a prompt's rows of the result."""
        end = self.ends[prompt]
        return range(end - len(self.queries[prompt].reads), end)

    @property
    def index(self) -> Int[np.ndarray, "row 2"] | None:
        """(prompt, token) of each row; None if each prompt is one row."""
        if all(len(query.reads) == 1 for query in self.queries):
            return None
        return np.array([(i, read[-1]) for i, query in enumerate(self.queries) for read in query.reads])

    @classmethod
    def of(cls, queries: Sequence[Query], layers: Sequence[int], d_model: int) -> "Plan":
        """Fill blocks up to BLOCK_BYTES of states, but with at least one full batch of an accelerator."""
        prefix = common_prefix(queries)
        blocks: list[list[int]] = []
        size = tokens = 0
        for i in sorted(range(len(queries)), key=lambda i: (queries[i].end, queries[i].ids, queries[i].reads)):
            full = size > BLOCK_BYTES and tokens > TOKENS_ELSEWHERE
            # Equal prompts stay in one block: a store keeps them once, and a killed run must leave whole blocks.
            if not blocks or (full and queries[i] != queries[blocks[-1][-1]]):
                blocks.append([])
                size = tokens = 0
            blocks[-1].append(i)
            size, tokens = size + 4 * len(queries[i].reads) * len(layers) * d_model, tokens + queries[i].end - prefix
        return cls(tuple(queries), tuple(layers), d_model, queries[0].ids[:prefix], tuple(map(tuple, blocks)))


class Reader:
    """Read batches of prompts with one opened model, at ascending `layers`.

    Args:
        prefix: token ids that every prompt begins with, before any position that is read.
        reuse: continue from a KV cache; default: if a trial with and without one gives the same states.
        of: the checkpoint's name in errors.
    """

    def __init__(
        self,
        model: OpenModel,
        *,
        layers: Sequence[int],
        prefix: Sequence[int] = (),
        reuse: bool | None = None,
        of: str = THIS_MODEL,
    ) -> None:
        self.model, self.layers, self.of = model, tuple(layers), of
        self._reuse = reuses_keys(model) if reuse is None else reuse
        self._prefix = tuple(prefix) if self._reuse else ()
        self._prefix_keys: _Keys | None = None
        self._kept = Kept(model, self.layers, torch.device("cpu"))  # leaves an accelerator's memory to the batch

    @property
    def shared(self) -> int:
        """Length of the prefix that batches do not run again."""
        return len(self._prefix)

    def read(self, queries: Sequence[Query]) -> Float[Tensor, "row layer d_model"]:
        """Read the states of one batch, fp32 on the CPU; halve it until it fits into memory, down to one prompt."""
        try:
            with torch.inference_mode(), self._kept.hooked():
                # An attention window shorter than a prompt would count padding in the cache as tokens.
                longest = max(query.end for query in queries) + LONGEST_TAIL
                reuse = self._reuse and longest < window_of(self.model.module.config)
                return self._reused(queries) if reuse else self._plain(queries)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and what the CPU's allocator raises
            if not any(told in str(error).lower() for told in NO_MEMORY):
                raise
            if len(queries) == 1:
                found = f"one prompt of {queries[0].end} tokens ({said(error)})"
                remedy = "a shorter prompt, bf16, or a larger device."
                raise GravlensError(f"Out of memory on {found}.", "It must fit alone.", remedy) from error
        half = len(queries) // 2  # outside `except`: the traceback would keep the failed pass's tensors alive
        return torch.cat([self.read(queries[:half]), self.read(queries[half:])])

    def _plain(self, queries: Sequence[Query]) -> Float[Tensor, "row layer d_model"]:
        self._kept.at([query.reads for query in queries])
        with suppress(Enough):
            run_trunk(self.model, pad([query.ids[: query.end] for query in queries]))
        return self._kept.rows()

    def _reused(self, queries: Sequence[Query]) -> Float[Tensor, "row layer d_model"]:
        prefix = len(self._prefix)
        tails = [query.start if query.end - query.start <= LONGEST_TAIL else prefix for query in queries]
        rows = list(zip(queries, tails, strict=True))
        cache, held = self._prefix_cache(len(queries)), None
        if any(start > prefix for start in tails):
            body = self._run([query.ids[prefix:start] for query, start in rows], [prefix] * len(rows), cache)
            held = torch.cat([torch.ones(len(rows), prefix, dtype=torch.long), body], dim=1)
        self._kept.at([[[at - start for at in read] for read in query.reads] for query, start in rows])
        cache.last = None  # the tail needs the deepest block's output, not only its keys and values
        self._run([query.ids[start : query.end] for query, start in rows], tails, cache, held)
        return self._kept.rows()

    def _prefix_cache(self, n: int) -> "_Keys":
        """Return the prefix's keys and values, expanded to `n` prompts."""
        if self._prefix and self._prefix_keys is None:
            keys = _Keys(self.layers[-1])
            self._run([self._prefix], [0], keys)
            self._prefix_keys = keys  # assigned last: a pass that ran out of memory leaves no partial cache
        return repeated(self._prefix_keys, n, _Keys(self.layers[-1]))

    def _run(
        self, ids: Sequence[Sequence[int]], starts: Sequence[int], cache: "_Keys", held: Tensor | None = None
    ) -> Int[Tensor, "prompt pos"]:
        """Run tokens after those in the cache, of which `held` is the mask, and return the tokens' own mask."""
        batch = pad(ids)
        positions = torch.tensor(starts)[:, None] + torch.arange(batch.input_ids.shape[1])
        inputs = {"input_ids": batch.input_ids, "position_ids": positions}
        # Without padding in the cache no mask is needed: padding on the right comes after every token that is read.
        if held is not None:
            inputs["attention_mask"] = torch.cat([held, batch.attention_mask], dim=1)
        with suppress(Enough):
            self.model.family.trunk({key: part.to(self.model.device) for key, part in inputs.items()}, cache)
        return batch.attention_mask


class Enough(Exception):  # noqa: N818 (a signal, not an error)
    """Raised in a hook to end a forward pass once everything needed was computed."""


class _Keys(DynamicCache):
    """A KV cache that ends the pass once the keys and values of layer `last` are in it."""

    def __init__(self, last: int | None) -> None:
        super().__init__()
        self.last = last

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **more: Any) -> Any:
        kept = super().update(key_states, value_states, layer_idx, *rest, **more)
        if layer_idx == self.last:
            raise Enough
        return kept


class Kept:
    """Forward hooks on the blocks that keep the states at the requested positions."""

    def __init__(self, model: OpenModel, layers: Sequence[int], device: torch.device) -> None:
        self._model, self._layers, self._device = model, layers, device
        self._rows: Tensor | None = None  # of the result; None: the hooks ignore this pass
        self._states: dict[int, Tensor] = {}

    def at(self, reads: Sequence[Sequence[Sequence[int]]]) -> None:
        """Set the positions to keep in the next pass: [prompt][row of the result][position]."""
        places = [(i, at) for i, rows in enumerate(reads) for row in rows for at in row]
        lengths = torch.tensor([len(row) for rows in reads for row in rows])
        self._prompt, self._pos = torch.tensor(places).unbind(1)
        self._counts, self._rows = lengths, torch.arange(len(lengths)).repeat_interleave(lengths)

    def rows(self) -> Float[Tensor, "row layer d_model"]:
        """Return the mean state over each row's positions; raise if the pass went around a block."""
        if passed := [layer for layer in self._layers if layer not in self._states]:
            given = f"{described(self._model.module)} does not run the blocks of the layers {passed} on text."
            remedy = f"the layers {sorted(self._states)}, or another family."
            raise GravlensError(given, "States are read at the outputs of blocks.", remedy)
        found, rows = torch.stack([self._states.pop(layer) for layer in self._layers], dim=1), self._rows
        self._rows = None
        if rows is None or len(rows) == len(self._counts):
            return found
        total = torch.zeros(len(self._counts), *found.shape[1:], dtype=torch.float64)  # fp32 sums lose digits
        total.index_add_(0, rows, found.double())
        return (total / self._counts[:, None, None]).float()

    @contextmanager
    def hooked(self) -> Generator[None]:
        """Attach the hooks for the duration of the block."""
        handles = [resid_post(self._model, layer).register_forward_hook(self._hook(layer)) for layer in self._layers]
        try:
            yield
        finally:
            self._rows, self._states = None, {}
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._rows is None:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            # Indexing copies: a view would keep the whole batch alive, and see later changes in place.
            kept = hidden[self._prompt.to(hidden.device), self._pos.to(hidden.device)]
            self._states[layer] = kept.float().to(self._device)
            if layer == max(self._layers):
                raise Enough

        return hook


def read_block(
    reader: Reader, queries: Sequence[Query]
) -> Iterator[tuple[list[int], Float[np.ndarray, "row layer d_model"]]]:
    """Yield indices of prompts and their rows, fp32, batch by batch; GravlensError where they are not finite."""
    ragged = len({query.end for query in queries}) == 1 or pads(reader.model)
    for batch in batches_of(queries, prefix=reader.shared, tokens=tokens_for(reader.model), ragged=ragged):
        states = reader.read([queries[i] for i in batch])
        ids = [queries[i].ids for i in batch for _ in queries[i].reads]
        check_finite(states, reader.model, ids=ids, layers=reader.layers, of=reader.of)
        yield batch, states.numpy()


def read_residuals(
    model: OpenModel,
    ids: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    positions: Offset = "last",
    finite: bool = True,
) -> Float[Tensor, "prompt layer d_model"]:
    """Read states of one open model, fp32 on the CPU; prompts are batched by length.

    GravlensError for states that are not finite; `finite=False` returns them.
    """
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    out = torch.empty(len(ids), len(layers), model.d_model, dtype=torch.float32)  # whatever the default is
    with torch.no_grad():  # `Reader` runs in inference mode, whose tensors a model in training must not cache
        one_length = len({len(one) for one in ids}) > 1 and not pads(model)
        for rows in batched(order, lambda row: len(ids[row]) if one_length else 0):
            out[rows] = residuals_of_batch(model, pad([ids[r] for r in rows]), layers=layers, positions=positions).cpu()
    if finite:
        check_finite(out, model, ids=ids, layers=layers)
    return out


def batched(rows: Sequence[int], kind: Callable[[int], int]) -> Iterator[list[int]]:
    """Yield rows in batches of one kind each, in their order."""
    for _, same in groupby(rows, kind):
        some = list(same)
        yield from (some[start : start + BATCH] for start in range(0, len(some), BATCH))


def all_finite(values: Float[np.ndarray, "part *state"]) -> bool:
    """Whether all numbers of an array are finite, part by part, without a copy of it."""
    # An fp64 sum of fp32 numbers is finite just where all of them are.
    with np.errstate(invalid="ignore"):  # ∞ − ∞
        return all(np.isfinite(part.sum(dtype=np.float64)) for part in values)


def check_finite(
    states: Float[Tensor, "row layer d_model"],
    model: OpenModel,
    *,
    ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    of: str = THIS_MODEL,
) -> None:
    """Raise where states that were read are not finite: checkpoint, first layer, prompt, dtype, and the cause.

    Padding is never among them, which is not finite in some families.
    """
    wrong = ~states.isfinite().all(-1)
    if not wrong.any():
        return
    column = int(wrong.any(0).nonzero()[0])
    rows = wrong[:, column].nonzero().flatten().tolist()
    first = list(ids[rows[0]])
    shown = repr(model.tokenizer.decode(first)[-60:]) if model.tokenizer is not None else f"of token ids {first[-12:]}"
    given = f"The states of {of} are not finite at layer {layers[column]} in {model.precision}: {len(rows)} of "
    given += f"{len(states)} read, the first of the prompt {' '.join(shown.split())}."
    raise GravlensError(given, "Hidden states are finite numbers; none of these is kept.", _cause(model))


def _cause(model: OpenModel) -> str:
    """Return the remedy for states that are not finite."""
    named = model.weights or dict(model.module.named_parameters())
    weights = {name: weight for name, weight in named.items() if weight.is_floating_point()}
    if lost := next((name for name, weight in weights.items() if weight.isnan().any()), None):
        return f"another checkpoint: its weights hold NaN ({lost}), so this run has diverged."
    if model.dtype == torch.float16:
        return "the dtype bf16 or float32 (Placement(dtype=…)): numbers above 65504 overflow in float16."
    infinite = any(weight.isinf().any() for weight in weights.values())
    found = "weights are infinite" if infinite else "weights are finite but so large that states overflow"
    return f"another checkpoint: {found}, as of a run that has diverged."


def residuals_of_batch(
    model: OpenModel, batch: Batch, *, layers: Sequence[int], positions: Offset = "last"
) -> Float[Tensor, "prompt layer d_model"]:
    """Read states of one padded batch, fp32; differentiable where gradients are on."""
    kept, offset = Kept(model, layers, model.device), offset_of(positions, int(batch.attention_mask.sum(1).min()))
    kept.at([[[end + 1 + offset]] for end in last_positions(batch.attention_mask).tolist()])
    with kept.hooked():
        with suppress(Enough):
            run_trunk(model, batch)
        return kept.rows()


class Found(NamedTuple):
    """States of one batch, read with one checkpoint."""

    checkpoint: int
    rows: list[int]
    states: Float[np.ndarray, "row layer d_model"]


def read_each(
    plans: Sequence[Plan], checkpoints: Sequence[Resolved], through: Through, placement: Placement,
    precisions: dict[str, str],
) -> Iterator[Found]:  # fmt: skip
    """Yield each checkpoint's states by its plan, batch by batch; one model is open at a time, and no states are kept.

    `precisions` (name -> precision) may hold those of checkpoints that are compared with these; it is filled.
    """
    total = sum(len(plan.queries) for plan in plans)
    with progress("residuals", total=total, unit="prompt", work=f"{total} prompts of {len(plans)} checkpoints") as bar:
        opened = open_each(checkpoints, through=through, placement=placement)
        for number, (plan, (checkpoint, model)) in enumerate(zip(plans, opened, strict=True)):
            precisions[checkpoint.name] = model.precision
            check_one_precision(precisions)
            check_vocabulary(checkpoint, model, [query.ids for query in plan.queries])
            named = f"{checkpoint.name} ({checkpoint.described})"
            reader = Reader(model, layers=plan.layers, prefix=plan.prefix, of=named)
            for block in plan.blocks:
                for batch, states in read_block(reader, [plan.queries[i] for i in block]):
                    yield Found(number, [row for i in batch for row in plan.rows(block[i])], states)
                    bar.update(len(batch))


def reuses_keys(model: OpenModel) -> bool:
    """Return whether a model gives the same states when it continues from a KV cache: tried once, on fixed tokens.

    Never for TransformerLens, a model in training, one with hooks or a replaced `forward`, which would see parts.
    """
    if not model.family.kv_cache or any(part.training or acting_on(part) for part in model.module.modules()):
        return False
    if model.module not in _REUSES:
        _REUSES[model.module] = _same_states(model)
    return _REUSES[model.module]


def pads(model: OpenModel) -> bool:
    """Return whether prompts of different lengths, padded on the right, have their states alone: tried once.

    Not so where all tokens of a prompt attend to each other (PaliGemma). A bridge is tried when it is booted.
    """
    if model.kind != "huggingface":
        return True
    if model.module not in _PADS:
        tokens = torch.linspace(1, model.family.vocabulary - 2, 17).long().tolist()
        prompts, layers = [tokens[:13], tokens[13:]], range(model.n_layers)
        with bare(model.module), torch.no_grad():
            together, *alone = (
                residuals_of_batch(model, pad(some), layers=layers) for some in (prompts, prompts[:1], prompts[1:])
            )
        _PADS[model.module] = alike(model, together, torch.cat(alone), ROUNDED)
    return _PADS[model.module]


def _same_states(model: OpenModel) -> bool:
    ids = torch.linspace(1, model.family.vocabulary - 2, 40).long().tolist()
    prompts = [[*ids[:8], *ids[8 + 5 * i : 12 + 9 * i]] for i in range(3)]  # of different lengths: with padding
    queries = [Query(tuple(one), ((len(one) - 1,),)) for one in prompts]
    layers = range(model.n_layers)
    plain = Reader(model, layers=layers, reuse=False).read(queries)
    try:
        found = Reader(model, layers=layers, prefix=ids[:8], reuse=True).read(queries)
    except Exception:  # whatever an architecture without such a cache raises: it is read without one
        return False
    return alike(model, found, plain, ROUNDED)
