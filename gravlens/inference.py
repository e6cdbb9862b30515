"""Forward passes of an opened model: the trunk alone, next-token logits, log-probabilities, greedy generation."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig

from gravlens.models import OpenModel
from gravlens.prompts import Batch, pad

BATCH = 32


def run_trunk(model: OpenModel, batch: Batch) -> None:
    """Run the blocks for the sake of hooks on them; logits are not computed where the family allows it."""
    inputs = {key: value.to(model.device) for key, value in batch._asdict().items()}
    if model.kind != "huggingface":
        model.module(inputs["input_ids"], attention_mask=inputs["attention_mask"], return_type=None)
        return
    trunk = _trunk(model.module)
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        del inputs["position_ids"]
    trunk(**inputs, use_cache=False)


def _trunk(module: Any) -> Any:
    """The decoder without its head. It is called directly: Trainer wraps the whole model's forward in autocast."""
    module = module.get_base_model() if hasattr(module, "get_base_model") else module
    return module.base_model


def final_logits(model: OpenModel, ids: Sequence[Sequence[int]]) -> Float[Tensor, "prompt vocab"]:
    """Next-token logits after each prompt, fp32."""
    logits: list[Tensor] = [torch.empty(0)] * len(ids)
    with torch.inference_mode():
        for rows, batch in _batches(model, ids):
            for row, out in zip(rows, _end_logits(model, batch, keep=1)[:, -1], strict=True):
                logits[row] = out.float().cpu()
    return torch.stack(logits)


def generate(model: OpenModel, ids: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
    """Greedy continuation of each prompt: new tokens alone, cut before the end-of-sequence token.

    Hugging Face models use the KV cache, those of TransformerLens read each prefix anew.
    """
    eos = None if model.tokenizer is None else model.tokenizer.eos_token_id
    answers: list[list[int]] = [[]] * len(ids)
    with torch.inference_mode():
        for rows, batch in _batches(model, ids):
            new = _greedy(model, batch, max_new_tokens, eos)[:, batch.input_ids.shape[1] :].tolist()
            for row, tokens in zip(rows, new, strict=True):
                answers[row] = tokens[: tokens.index(eos)] if eos in tokens else tokens
    return answers


def _greedy(model: OpenModel, batch: Batch, max_new_tokens: int, eos: int | None) -> Tensor:
    ids = batch.input_ids.to(model.device)
    module: Any = model.module
    if model.kind != "huggingface":
        # Their cached answers are wrong: the bridge's cache stays empty where transformers calls it `cache`, and
        # HookedTransformer counts learned positions twice without a tokenizer (TransformerLens 3.9 to 4.3).
        return module.generate(
            ids, max_new_tokens=max_new_tokens, do_sample=False, stop_at_eos=eos is not None, eos_token_id=eos,
            return_type="tokens", verbose=False, use_past_kv_cache=False,
        )  # fmt: skip
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0 if eos is None else eos
    )
    return module.generate(ids, attention_mask=batch.attention_mask.to(model.device), generation_config=config)


def _batches(model: OpenModel, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Batch]]:
    """Left-padded batches of similar length; for TransformerLens models of equal length, so that nothing is padded."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    while order:
        rows = order[:BATCH]
        if model.kind != "huggingface":
            rows = [row for row in rows if len(ids[row]) == len(ids[rows[0]])]
        order = order[len(rows) :]
        yield rows, pad([ids[row] for row in rows], side="left")


def sequence_logprobs(
    model: OpenModel, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> Float[Tensor, " prompt"]:
    """log p of each continuation after its prompt, teacher-forced, summed over its tokens in fp64; nats."""
    totals = torch.zeros(len(prompts), dtype=torch.float64)
    ids = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    with torch.inference_mode():
        for rows, batch in _batches(model, ids):
            keep = 1 + max(len(continuations[row]) for row in rows)
            for row, logits in zip(rows, _end_logits(model, batch, keep), strict=True):
                tokens = torch.tensor(continuations[row], device=logits.device)
                logprobs = logits[-1 - len(tokens) : -1].float().log_softmax(-1)
                totals[row] = logprobs.gather(1, tokens[:, None]).double().sum()
    return totals


def _end_logits(model: OpenModel, batch: Batch, keep: int) -> Float[Tensor, "prompt keep vocab"]:
    inputs = {key: value.to(model.device) for key, value in batch._asdict().items()}
    if model.kind != "huggingface":
        return model.module(inputs["input_ids"], attention_mask=inputs["attention_mask"])[:, -keep:]
    known = inspect.signature(model.module.forward).parameters
    extra = {"logits_to_keep": keep} if "logits_to_keep" in known else {}
    inputs = {key: value for key, value in inputs.items() if key in known}
    return model.module(**inputs, **extra, use_cache=False).logits[:, -keep:]
