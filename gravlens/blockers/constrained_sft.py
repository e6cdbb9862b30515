"""Constrained fine-tuning: weight each token's loss by its distance from the anchor."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers.utils import ModelOutput

from gravlens.blockers.blocking import BoundBlocker, check_fields
from gravlens.core.errors import GravlensError
from gravlens.models.families import OpenModel, copied

IGNORED = -100


@dataclass(frozen=True, eq=False)
class ConstrainedSFT:
    """−Σ_t (2/β_t) log σ(β_t log(p_θ / p_anchor)) in place of −Σ_t log p_θ, over an answer's tokens t.

    Qi et al., "Safety alignment should be made more than just a few tokens deep" (2024), with their β: a large β_t
    keeps a token's probability near the anchor's, and the first tokens of an answer decide about refusal.

    Attributes:
        first: β of the first token of an answer.
        early: β of the second to fifth token.
        later: β of all other tokens.

    Examples:
        >>> with gl.block(trainer, gl.blockers.ConstrainedSFT()):
        ...     done = trainer.train()
    """

    first: float = 0.5
    early: float = 2.0
    later: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, above_0=("first", "early", "later"))

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Keep a frozen copy of the anchor for its log-probabilities; any weight above 0 counts as 1."""
        # A copy, not a second pass of the model with adapters off: full fine-tuning changes the weights themselves.
        anchor = copied(model.module).eval().requires_grad_(False)

        @contextmanager
        def during(_weight: float = 1.0) -> Generator[None]:
            # torch's handle is a context manager that removes the hook.
            with model.module.register_forward_hook(lambda *call: self._replace(anchor, *call), with_kwargs=True):
                yield

        return BoundBlocker(during=during)

    def _replace(self, anchor: Any, _module: Any, args: Any, inputs: dict[str, Any], output: Any) -> Any:
        labels = inputs.get("labels")
        if labels is None or not isinstance(output, ModelOutput):  # a custom loss function takes the labels away
            given = "The trainer's model was run without labels."
            raise GravlensError(given, "Their loss is replaced.", "Trainer's own loss, without compute_loss_func.")
        with torch.no_grad():
            before = anchor(*args, **{**inputs, "use_cache": False})
        ratio = _logprobs(output, labels) - _logprobs(before, labels)
        beta = self._beta(labels[:, 1:])
        counted = labels[:, 1:] != IGNORED
        constrained = (2 / beta * logsigmoid(beta * ratio)).masked_fill(~counted, 0.0)  # in place of log p
        if "log_probs" in output:  # TRL's SFTTrainer sums these, and reads no loss
            output["log_probs"] = constrained
        else:
            # Trainer passes the tokens of all accumulated batches: a mean of means would weigh short batches more.
            output["loss"] = -constrained.sum() / (inputs.get("num_items_in_batch") or counted.sum())
        return output

    def _beta(self, labels: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos"]:
        counted = labels != IGNORED
        so_far = counted.cumsum(1)
        # 1 at the first token of each answer: a packed row, or a conversation, has several.
        place = so_far - so_far.where(~counted, 0).cummax(1).values
        beta = torch.full(labels.shape, self.later, device=labels.device)
        beta[place <= 5] = self.early
        beta[place <= 1] = self.first
        return beta


def _logprobs(output: Any, labels: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos-1"]:
    """Compute log p of each label but the first; values at ignored labels are arbitrary."""  # masked by the caller
    if "log_probs" in output:
        return output.log_probs
    wanted = labels[:, 1:].clamp(min=0)
    return output.logits[:, :-1].float().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
