"""Blockers that preserve behaviour rather than a direction: KL to the anchor, rehearsal of refusals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from gravlens.blockers.blocking import BoundBlocker, Draws, check_fields, without_dropout
from gravlens.core.errors import GravlensError
from gravlens.history.encoding import encode, encode_parts, pad
from gravlens.history.prompts import Example, PromptSet
from gravlens.models.families import check_context
from gravlens.models.forward import generate
from gravlens.models.opening import OpenModel


@dataclass(frozen=True, eq=False)
class AnchorKL:
    """λ · mean KL(anchor ‖ θ) over the first tokens of the anchor's own greedy answers, teacher-forced, in nats.

    Attributes:
        prompts: harmful prompts preserve refusal, harmless ones everything else.
        strength: λ.
        batch: prompts drawn for each step; None: all.
        tokens: next-token distributions of an answer, from the one after the last prompt token.

    Examples:
        >>> with gl.block(trainer, gl.blockers.AnchorKL(prompts, batch=2)):
        ...     done = trainer.train()
    """

    prompts: PromptSet
    strength: float = 1.0
    batch: int | None = 8
    tokens: int = 8

    def __post_init__(self) -> None:
        check_fields(self, from_0=("strength",), from_1=("batch", "tokens"))

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Generate the anchor's answers and keep its distributions."""
        prompts = encode(model.tokenizer, self.prompts)
        answers: list[list[int]] = [[]] * len(prompts)
        with torch.no_grad(), without_dropout(model.module):
            if self.tokens > 1:  # one distribution needs no answer, and transformers refuses max_new_tokens=0
                answers = generate(model, prompts, max_new_tokens=self.tokens - 1)
            ids = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
            counts = [1 + len(answer) for answer in answers]
            # fp32, vocabulary × tokens × prompts: 51 MB for 32 prompts of 8 tokens and 50,000 words.
            anchor = [_end_logprobs(model, [one], [n])[0] for one, n in zip(ids, counts, strict=True)]
        draws = Draws(len(ids), self.batch, rng)

        def loss(weight: float = 1.0) -> Float[Tensor, ""]:
            rows = draws()
            with without_dropout(model.module):
                now = _end_logprobs(model, [ids[row] for row in rows], [counts[row] for row in rows])
            pairs = zip(now, rows, strict=True)  # torch takes the second distribution first: KL(anchor ‖ θ)
            apart = [kl_div(one, anchor[row], reduction="sum", log_target=True) for one, row in pairs]
            return weight * self.strength * torch.stack(apart).sum() / sum(counts[row] for row in rows)

        return BoundBlocker(loss=loss, skip=draws.skip)


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """λ · mean −log p(token) of other answers, usually refusals of harmful prompts, a few at each step.

    Attributes:
        examples: pairs of prompt and answer.
        strength: λ.
        batch: examples drawn for each step; None: all.

    Examples:
        >>> refusals = [gl.Example(prompt, "I'm Sorry") for prompt in prompts]
        >>> with gl.block(trainer, gl.blockers.Rehearsal(refusals)):
        ...     done = trainer.train()
    """

    examples: Sequence[Example]
    strength: float = 1.0
    batch: int | None = 2

    def __post_init__(self) -> None:
        check_fields(self, from_0=("strength",), from_1=("batch",))

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Encode the examples; GravlensError if there are none."""
        if not self.examples:
            raise GravlensError("No examples were given.", "At least one is needed.", "[Example(prompt, refusal)].")
        encoded = [encode_parts(model.tokenizer, example) for example in self.examples]
        check_context(model, [row.prompt + row.answer for row in encoded])
        draws = Draws(len(encoded), self.batch, rng)

        def loss(weight: float = 1.0) -> Float[Tensor, ""]:
            rows = [encoded[row] for row in draws()]
            answers = [torch.tensor(row.answer) for row in rows]
            with without_dropout(model.module):
                # The distribution after a token predicts the next one, so the last token is not run.
                ids = [[*row.prompt, *row.answer[:-1]] for row in rows]
                now = _end_logprobs(model, ids, [len(answer) for answer in answers])
            told = [one.gather(1, answer[:, None].to(one.device)) for one, answer in zip(now, answers, strict=True)]
            return -weight * self.strength * torch.cat(told).mean()

        return BoundBlocker(loss=loss, skip=draws.skip)


def _end_logprobs(
    model: OpenModel, ids: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[Float[Tensor, "token vocab"]]:
    """Compute log p of all next tokens after each of the last `counts` tokens, differentiable, fp32."""
    batch = pad(ids)
    mask = batch.attention_mask.to(model.device)  # no position ids: with right padding they are the default
    # The class's forward, because Trainer wraps the instance's in autocast and the anchor was read without it.
    forward: Any = type(model.module).forward
    logits = forward(model.module, batch.input_ids.to(model.device), attention_mask=mask, use_cache=False).logits
    places = zip(logits, batch.attention_mask.sum(1).tolist(), counts, strict=True)
    return [row[end - count : end].float().log_softmax(-1) for row, end, count in places]
