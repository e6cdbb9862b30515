"""What a reading costs, counted before it is run: the passes, their tokens and floating-point operations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from gravlens.models import block_list, quiet
from gravlens.passes import LONGEST_TAIL, batches_of, window_of
from gravlens.positions import Query
from gravlens.readings import Plan

ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
TRIAL_TOKENS = 104  # of the trial whether keys and values may be reused, once a model that is opened


@dataclass(frozen=True)
class Shape:
    """What a model computes for a token, by its configuration alone.

    Attributes:
        matrices: for each block, how many numbers a token is multiplied with (of experts those that are active).
        inputs: of these, those that make queries, keys and values.
        attended: width of all heads: each pair of tokens costs 4 × so many operations in a block.
        parameters: all numbers of the model.
        largest: numbers of the largest tensor.
        widest: the widest vector inside a block.
        d_model: width of the residual stream.
        cached: numbers that a token leaves in a block's cache.
        window: tokens that attention looks back at least.
    """

    matrices: tuple[float, ...]
    inputs: int
    attended: int
    parameters: int
    largest: int
    widest: int
    d_model: int
    cached: int
    window: float


def shape_of(config: PretrainedConfig) -> Shape:
    """The shape of a causal language model; it is built without numbers, and no weights are read."""
    with torch.device("meta"), quiet():
        module: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    share = next((value for name in ACTIVE if isinstance(value := getattr(text, name, None), int)), None)
    blocks = [[p for p in block.parameters() if p.ndim > 1 and min(p.shape[:2]) > 1] for block in block_list(module)]
    heads = getattr(text, "num_attention_heads", None) or 0
    head = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    pairs = (getattr(text, "num_key_value_heads", None) or heads) * head
    sizes = [p.numel() for p in module.parameters()]
    return Shape(
        matrices=tuple(sum(_active(p, share) for p in block) for block in blocks),
        inputs=text.hidden_size * (heads * head + 2 * pairs),
        attended=heads * head,
        parameters=sum(sizes),
        largest=max(sizes),
        widest=max(max(p.shape[-2:]) for block in blocks for p in block),
        d_model=text.hidden_size,
        cached=2 * pairs,
        window=window_of(config),
    )


def _active(weight: torch.Tensor, share: int | None) -> float:
    """Numbers of a matrix; of several experts' in one tensor [expert, …] those of the experts that a token meets."""
    return weight.numel() * (min(1, share / len(weight)) if weight.ndim == 3 and share else 1)


# --- passes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        prompts: how many.
        width: tokens of each, padding too.
        past: tokens of each whose keys and values are there already.
        whole: whether the deepest block is run to its end, or left after its keys and values.
    """

    prompts: int
    width: int
    past: int
    whole: bool

    @property
    def tokens(self) -> int:
        """As the embedding sees them."""
        return self.prompts * self.width


def passes_of(plan: Plan, shape: Shape, *, tokens: int, reuse: bool) -> Iterator[Pass]:
    """The passes that read one checkpoint, in batches of so many tokens.

    Args:
        plan: prompts, layers and blocks.
        shape: the model's.
        tokens: of a batch (`passes.tokens_for`).
        reuse: whether the family goes on from keys and values (`passes.reuses_keys`).
    """
    prefix, fresh = len(plan.prefix) if reuse else 0, True
    for block in plan.blocks:
        queries = [plan.queries[i] for i in block]
        for batch in batches_of(queries, prefix=prefix, tokens=tokens):
            rows = [queries[i] for i in batch]
            if not reuse or max(query.end for query in rows) + LONGEST_TAIL >= shape.window:
                yield Pass(len(rows), max(query.end for query in rows), 0, True)
                continue
            if fresh and prefix:
                yield Pass(1, prefix, 0, False)
            fresh = False
            yield from _two(rows, prefix)


def _two(rows: Sequence[Query], prefix: int) -> Iterator[Pass]:
    """What comes before the positions that are read, and these."""
    starts = [query.start if query.end - query.start <= LONGEST_TAIL else prefix for query in rows]
    body = max(starts) - prefix
    if body:
        yield Pass(len(rows), body, prefix, False)
    tail = max(query.end - start for query, start in zip(rows, starts, strict=True))
    yield Pass(len(rows), tail, prefix + body, True)


def flops_of(one: Pass, shape: Shape, deepest: int) -> float:
    """Operations of a pass up to a layer: 2 for each number and token, and attention's scores and sums."""
    below = list(accumulate(shape.matrices, initial=0))[deepest]
    last = shape.matrices[deepest] if one.whole else shape.inputs
    attention = 4 * shape.attended * (one.past + one.width) * (deepest + one.whole)
    return one.tokens * (2 * (below + last) + attention)
