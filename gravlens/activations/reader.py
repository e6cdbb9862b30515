"""Read the residual stream at chosen positions, with as little computation as possible.

The prefix that all prompts share is run once and its KV cache is reused. Up to the first position that is read, the
deepest layer computes keys and values only. Prompts are sorted by length and batched by number of tokens.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from gravlens.activations.positions import Query
from gravlens.core.errors import GravlensError
from gravlens.history.prompts import pad
from gravlens.models.families import OpenModel, resid_post
from gravlens.models.forward import run_trunk

TOKENS = {"cpu": 1024}  # of a batch: larger ones no longer fit into a processor's caches
TOKENS_ELSEWHERE = 16384  # of a batch on an accelerator; split in half if memory runs out
SHORTEST_PREFIX = 8
LONGEST_TAIL = 8  # from the first position that is read to the last
NO_MEMORY = ("out of memory", "enough memory", "allocate memory")  # the CPU allocators raise a plain RuntimeError
EXACT, ROUNDED = 1e-4, 0.1  # allowed difference in fp32 and below, relative to a state's length
_REUSES: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


# --- batches --------------------------------------------------------------------------------------------------------
def common_prefix(queries: Sequence[Query]) -> int:
    """Length of the prefix that all prompts share, up to the first position that is read; 0 if not worth a pass."""
    most = min(query.start for query in queries)
    columns = zip(*(query.ids[:most] for query in queries), strict=True)
    length = next((i for i, column in enumerate(columns) if len(set(column)) > 1), most)
    return length if len(queries) > 1 and length >= SHORTEST_PREFIX else 0


def batches_of(queries: Sequence[Query], *, prefix: int, tokens: int) -> list[list[int]]:
    """Indices of prompts, sorted by length; a batch has at most `tokens` tokens with padding, or one prompt."""
    order = sorted(range(len(queries)), key=lambda i: queries[i].end)
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * (queries[i].end - prefix) > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def tokens_for(model: OpenModel) -> int:
    """Default number of tokens of a batch."""
    return TOKENS.get(model.device.type, TOKENS_ELSEWHERE)


# --- reading --------------------------------------------------------------------------------------------------------
class Reader:
    """Read batches of prompts with one opened model.

    Args:
        model: the model.
        layers: the layers to read, ascending.
        prefix: token ids that every prompt begins with, before any position that is read.
        reuse: continue from a KV cache; default: if a trial with and without one gives the same states.
    """

    def __init__(
        self, model: OpenModel, *, layers: Sequence[int], prefix: Sequence[int] = (), reuse: bool | None = None
    ) -> None:
        self.model, self.layers = model, tuple(layers)
        self._reuse = reuses_keys(model) if reuse is None else reuse
        self._prefix = tuple(prefix) if self._reuse else ()
        self._prefix_keys: _Keys | None = None
        self._kept = Kept(model, self.layers, torch.device("cpu"))

    @property
    def shared(self) -> int:
        """Length of the prefix that batches do not run again."""
        return len(self._prefix)

    def read(self, queries: Sequence[Query]) -> Float[Tensor, "row layer d_model"]:
        """States of one batch, fp32 on the CPU; the batch is halved until it fits into memory.

        Raises:
            GravlensError: one prompt alone does not fit into memory.
        """
        try:
            with torch.inference_mode(), self._kept.hooked():
                return self._reused(queries) if self._reuse and self._fits(queries) else self._plain(queries)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and what the CPU's allocator raises
            if not any(told in str(error).lower() for told in NO_MEMORY):
                raise
            if len(queries) == 1:
                raise _too_long(queries[0], error) from error
        half = len(queries) // 2
        return torch.cat([self.read(queries[:half]), self.read(queries[half:])])

    def _fits(self, queries: Sequence[Query]) -> bool:
        """Whether all prompts fit into the attention window: it would count padding inside the cache as tokens."""
        return max(query.end for query in queries) + LONGEST_TAIL < window_of(self.model.module.config)

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
        cache.last = None
        self._run([query.ids[start : query.end] for query, start in rows], tails, cache, held)
        return self._kept.rows()

    def _prefix_cache(self, n: int) -> "_Keys":
        """The prefix's keys and values, expanded to `n` prompts."""
        if self._prefix and self._prefix_keys is None:
            keys = _Keys(self.layers[-1])
            self._run([self._prefix], [0], keys)
            self._prefix_keys = keys  # assigned last: a pass that ran out of memory leaves no partial cache
        cache = _Keys(self.layers[-1])
        for layer, (keys, values, _) in enumerate(self._prefix_keys or ()):
            assert keys is not None and values is not None
            DynamicCache.update(cache, keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1), layer)
        return cache

    def _run(
        self, ids: Sequence[Sequence[int]], starts: Sequence[int], cache: "_Keys", held: Tensor | None = None
    ) -> Int[Tensor, "prompt pos"]:
        """Run tokens after those in the cache, and return their mask.

        `held` is the mask of the cached tokens. Without it none is padding, and no mask is needed: padding on the right
        comes after every token that is read.
        """
        batch = pad(ids)
        positions = torch.tensor(starts)[:, None] + torch.arange(batch.input_ids.shape[1])
        inputs = {"input_ids": batch.input_ids, "position_ids": positions}
        if held is not None:
            inputs["attention_mask"] = torch.cat([held, batch.attention_mask], dim=1)
        with suppress(Enough):
            self.model.family.trunk({key: part.to(self.model.device) for key, part in inputs.items()}, cache)
        return batch.attention_mask


def _too_long(query: Query, error: Exception) -> GravlensError:
    return GravlensError(
        f"Out of memory on one prompt of {query.end} tokens ({str(error).strip().splitlines()[0]}).",
        "A batch has at least one prompt.",
        "a shorter prompt, bf16, or a larger device.",
    )


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
        """The mean state over each row's positions, accumulated in fp64."""
        found, rows = torch.stack([self._states.pop(layer) for layer in self._layers], dim=1), self._rows
        self._rows = None
        if rows is None or len(rows) == len(self._counts):
            return found
        total = torch.zeros(len(self._counts), *found.shape[1:], dtype=torch.float64)
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


# --- whether a KV cache may be used ---------------------------------------------------------------------------------
def reuses_keys(model: OpenModel) -> bool:
    """Whether a model gives the same states when it continues from a KV cache: tried once per model, on fixed tokens.

    Never for TransformerLens, a model in training, or one with hooks, which would see a pass cut into parts.
    """
    if not model.family.kv_cache or any(part.training or hooks_on(part) for part in model.module.modules()):
        return False
    if model.module not in _REUSES:
        _REUSES[model.module] = _same_states(model)
    return _REUSES[model.module]


def hooks_on(part: nn.Module) -> list[Any]:
    """Forward hooks, except those that transformers leaves behind after `output_hidden_states`: they only record."""
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]  # pyright: ignore[reportPrivateUsage]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]


def _same_states(model: OpenModel) -> bool:
    vocabulary = model.family.vocabulary
    ids = torch.linspace(1, vocabulary - 2, 40).long().tolist()
    prompts = [[*ids[:8], *ids[8 + 5 * i : 12 + 9 * i]] for i in range(3)]
    queries = [Query(tuple(one), ((len(one) - 1,),)) for one in prompts]
    layers = range(model.n_layers)
    plain = Reader(model, layers=layers, reuse=False).read(queries)
    try:
        found = Reader(model, layers=layers, prefix=ids[:8], reuse=True).read(queries)
    except Exception:  # whatever an architecture without such a cache raises: it is read without one
        return False
    within = EXACT if model.dtype in (torch.float32, torch.float64) else ROUNDED
    return bool(((found - plain).norm(dim=-1) <= within * plain.norm(dim=-1)).all())


def window_of(config: Any) -> float:
    """The shortest attention window of any layer, or the length from which rotary angles depend on the prompt's."""
    told = config.get_text_config().to_dict()
    named = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size")
    sizes = [told.get(name) for name in named]
    if any(kind in str(told.get("rope_parameters")) for kind in ("dynamic", "longrope")):
        rope = told["rope_parameters"]
        sizes += [rope.get("original_max_position_embeddings"), told.get("max_position_embeddings")]
    return min([size for size in sizes if isinstance(size, int)], default=float("inf"))
