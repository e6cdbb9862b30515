"""Compare two models on text: KL divergence over answers, and the log-likelihood of given answers."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gravlens.behavior.answers import MAX_NEW_TOKENS, Prompts
from gravlens.core.errors import GravlensError
from gravlens.core.progress import progress
from gravlens.history.encoding import encode, encode_said
from gravlens.history.prompts import PromptSet
from gravlens.models.forward import batches, end_logits, generate, sequence_logprobs
from gravlens.models.opening import Openable, OpenModel, open_model

__all__ = ["answer_log_likelihood", "kl_from"]


Ids = Sequence[Sequence[int]]
POSITIONS = 512  # per pass and model: each is a row of logits over the whole vocabulary in memory


def kl_from(
    reference: Openable,
    model: Openable,
    prompts: Prompts,
    *,
    answers: Sequence[str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Float[np.ndarray, " prompt"]:
    """KL(reference ‖ model) of next-token distributions over the whole vocabulary, averaged over an answer; nats.

    Positions are the last prompt token and every token of the answer; both models read the same tokens.
    `functools.partial(kl_from, reference)` is a `Score`.

    Args:
        reference: the baseline, such as the anchor or the witness.
        model: the other model; not the same object, or hooks would act on both.
        answers: one per prompt; default: the reference's greedy answers. An empty one leaves the last prompt token.
        max_new_tokens: length of the default answers.

    Raises:
        GravlensError: different vocabularies or chat templates, no tokenizer, or different numbers of answers and
            prompts.

    Examples:
        >>> anchor = gl.open_model(seq.anchor)
        >>> kl = gl.divergence.kl_from(anchor, model, prompts, max_new_tokens=4)
        >>> kl.shape, bool((kl >= 0).all())
        ((6,), True)
    """
    reference, model = open_model(reference), open_model(model)
    _check_one_language(reference, model)
    if answers is None:
        asked = encode(reference.tokenizer, PromptSet.of(prompts))
        said = generate(reference, asked, max_new_tokens=max_new_tokens)
    else:
        asked, said = _encode_answers(reference, prompts, answers)
    divergences = np.empty(len(asked))
    # Compared as they are yielded: kept, they would take prompts × positions × vocabulary in memory.
    with torch.inference_mode(), progress("divergence", total=len(asked), unit="prompt") as bar:
        sides = (_answer_logprobs(one, asked, said) for one in (reference, model))
        for (row, log_p), (_, log_q) in zip(*sides, strict=True):
            if log_p.shape != log_q.shape:  # models without tokenizers show their vocabularies here first
                raise _another_vocabulary(log_p.shape[1], log_q.shape[1])
            terms = log_p.exp() * (log_p - log_q.to(log_p.device))
            # fp64: terms of both signs nearly cancel for close models.
            divergences[row] = float(terms.sum(1, dtype=torch.float64).mean())
            bar.update()
    return divergences


def _answer_logprobs(model: OpenModel, prompts: Ids, answers: Ids) -> Iterator[tuple[int, Float[Tensor, "pos vocab"]]]:
    """Yield log-probabilities from the last prompt token on, fp32."""
    ids = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # for any family, so that both models' rows pair up
    size = max(1, POSITIONS // (1 + max(map(len, answers))))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        for chosen, batch in batches(model, [ids[row] for row in part]):
            rows = [part[index] for index in chosen]
            lengths = [len(answers[row]) for row in rows]
            logits = end_logits(model, batch, torch.tensor(lengths))
            for row, length, own in zip(rows, lengths, logits, strict=True):
                yield row, own[-1 - length :].float().log_softmax(-1)


def answer_log_likelihood(model: Openable, prompts: Prompts, answers: Sequence[str]) -> Float[np.ndarray, " prompt"]:
    """Log-likelihood of answers, teacher-forced: mean of log p(token | prompt, tokens before); nats per token.

    Answers may be from any source; NaN for an empty one. The end of sequence is not included: a recorded answer may
    have been truncated.

    Raises:
        GravlensError: no tokenizer, or different numbers of answers and prompts.

    Examples:
        >>> asked, answers = [one.prompt for one in examples], [one.answer for one in examples]
        >>> bool((gl.divergence.answer_log_likelihood(model, asked, answers) < 0).all())
        True
    """
    model = open_model(model)
    asked, said = _encode_answers(model, prompts, answers)
    rows = [row for row, tokens in enumerate(said) if tokens]
    means = np.full(len(asked), np.nan)
    if rows:
        sums = sequence_logprobs(model, [asked[row] for row in rows], [said[row] for row in rows]).numpy()
        means[rows] = sums / [len(said[row]) for row in rows]
    return means


def _encode_answers(model: OpenModel, prompts: Prompts, answers: Sequence[str]) -> tuple[Ids, Ids]:
    """Encode prompts, and answers as the chat template writes them; an empty answer has no tokens."""
    asked = PromptSet.of(prompts)
    if len(asked) != len(answers):
        given = f"There are {len(asked)} prompts and {len(answers)} answers."
        raise GravlensError(given, "One answer per prompt is needed.", "answers = generate_answers(model, prompts).")
    pairs = zip(asked.turns, answers, strict=True)
    written = [encode_said(model.tokenizer, turns, answer) for turns, answer in pairs]
    return [prompt for prompt, _ in written], [answer for _, answer in written]


def _check_one_language(reference: OpenModel, model: OpenModel) -> None:
    """Raise if both models have tokenizers and these differ in vocabulary or chat template."""
    one, other = reference.tokenizer, model.tokenizer
    if one is None or other is None or one is other:
        return
    if one.get_vocab() != other.get_vocab():
        raise _another_vocabulary(len(one), len(other))
    if getattr(one, "chat_template", None) != getattr(other, "chat_template", None):
        given, wanted = "The two models have different chat templates.", "Both must read the same tokens."
        raise GravlensError(given, wanted, "open_model(folder, tokenizer=sequence_tokenizer(sequence)) for both.")


def _another_vocabulary(one: int, other: int) -> GravlensError:
    given = f"The two models have different vocabularies ({one} and {other} tokens)."
    return GravlensError(given, "KL divergence compares them token by token.", "two checkpoints of one history.")
