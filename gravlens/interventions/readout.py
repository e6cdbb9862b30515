"""What a direction reads as: the tokens that it raises and lowers through the final norm and the unembedding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gravlens.behavior.scores import encode_openings
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction, one_direction
from gravlens.history.precision import check_unquantised
from gravlens.interventions.hooks import check_fit
from gravlens.models.forward import final_logits
from gravlens.models.opening import Openable, OpenModel, open_model

# A norm's ε is nothing beside states of this root mean square.
PROBE = 10.0
CENTRED_WITHIN = 1e-3


def readout(model: Openable, direction: Direction, *, top: int = 10) -> pd.DataFrame:
    """The tokens that a direction raises most, and those that it lowers most: W_U (g ∘ v).

    g is the final norm's gain; where the norm is a LayerNorm, v is centred first, as the norm does. The norm's division
    by the state's length is left out, and with it that adding v makes the state longer: an order of tokens, no change
    of log-probabilities. It passes over all later blocks (the logit lens: nostalgebraist 2020), so it says more at late
    layers than at early ones. The gain is measured on the norm itself, so it holds for any kind of norm.

    Args:
        model: whose vocabulary it is read in; the anchor, usually.
        direction: of one layer, of unit length.
        top: how many of either end.

    Returns:
        Columns `token` (text), `logit` (for a step of length 1 through a state of root mean square 1; the mean over the
        vocabulary taken off, since that changes no probability), largest first.

    Raises:
        GravlensError: an undefined direction or one of another width, no tokenizer, no final norm found.
    """
    opened = open_model(model)
    logits = _logits(opened, direction)
    order = np.argsort(-logits, kind="stable")
    chosen = order if 2 * top >= len(order) else np.concatenate([order[:top], order[len(order) - top :]])
    tokens = [_tokenizer(opened).decode([int(token)]) for token in chosen]
    return pd.DataFrame({"token": tokens, "logit": logits[chosen]})


def readout_openings(
    model: Openable, direction: Direction, *, refusals: Sequence[str], compliances: Sequence[str]
) -> float:
    """Mean logit of the refusals' first tokens minus that of the compliances': below 0, v leads away from refusing.

    Tokens are read as in `readout`, each once; one that opens refusals and compliances alike ("I") is left out.

    Args:
        model: whose vocabulary it is read in.
        direction: of one layer, of unit length.
        refusals: how refusals of this model begin.
        compliances: how its other answers begin.

    Returns:
        mean(refusals) − mean(compliances), logits.

    Raises:
        GravlensError: what `readout` raises, an opening that the vocabulary cannot write, or no first token of one
            side that the other lacks.
    """
    opened = open_model(model)
    logits = _logits(opened, direction)
    first = [{ids[0] for ids in encode_openings(opened, openings)} for openings in (refusals, compliances)]
    own = [sorted(first[0] - first[1]), sorted(first[1] - first[0])]
    if not all(own):
        raise GravlensError(
            f"The refusals {list(refusals)} and the compliances {list(compliances)} begin with the same tokens.",
            "What tells them apart is the first token.",
            "openings that begin with other words.",
        )
    return float(logits[own[0]].mean() - logits[own[1]].mean())


def _logits(model: OpenModel, direction: Direction) -> Float[np.ndarray, " vocab"]:
    """Logits of the tokenizer's tokens, their mean taken off, fp64."""
    if not np.isfinite(one_direction(direction).vector).all():
        raise GravlensError(
            f"The direction of layer {direction.layer} is undefined ({direction.undefined}).",
            "A direction is read where there is one.",
            "another layer, as of directions.defined().",
        )
    check_fit(direction, model)
    with torch.no_grad():
        vector = torch.tensor(direction.vector, device=model.device, dtype=model.dtype)
        moved = _through_norm(_final_norm(model), vector)
        logits = (_unembedding(model).detach().to(moved) @ moved)[: len(_tokenizer(model))].double().cpu().numpy()
    return logits - logits.mean()


def _tokenizer(model: OpenModel) -> Any:
    if model.tokenizer is None:
        raise GravlensError(
            f"This {type(model.module).__name__} has no tokenizer.",
            "Tokens are shown as text.",
            "open_model(model, tokenizer=tokenizer).",
        )
    return model.tokenizer


# --- the way from the residual stream to the logits -------------------------------------------------------------
def _through_norm(norm: nn.Module, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """gain ∘ v, or gain ∘ (v − mean v) where the norm centres: read off its own output, of whatever kind it is."""
    if isinstance(norm, nn.Identity):
        return vector.float()

    def moved(state: Tensor) -> Tensor:
        out, still = (norm(one[None, None])[0, 0] for one in (state, torch.zeros_like(state)))
        return out.float() - still.float()

    part = vector - vector.mean()
    size = part.square().mean().sqrt()
    centred = moved(part * (PROBE / size))
    if moved(torch.ones_like(vector)).abs().max() > CENTRED_WITHIN * centred.abs().max():
        size = vector.square().mean().sqrt()
        centred = moved(vector * (PROBE / size))
    return centred * size


def _unembedding(model: OpenModel) -> Float[Tensor, "vocab d_model"]:
    if model.kind != "huggingface":
        return model.module.W_U.T
    return _head(model).weight


def _head(model: OpenModel) -> Any:
    head = model.module.get_output_embeddings()
    if head is None:
        raise _not_found(model, "it has no unembedding")
    if not head.weight.is_floating_point():
        check_unquantised(head, "A readout")
    return head


def _final_norm(model: OpenModel) -> nn.Module:
    """The module that makes the unembedding's input of the last block's output: found by a pass of one token."""
    if model.kind != "huggingface":
        norm = getattr(model.module, "ln_final", None)
        if norm is None:
            raise _not_found(model, "it has no ln_final")
        return norm
    head, last = _head(model), model.blocks[-1]
    seen = _outside_the_blocks(model)
    stream = next((output for module, _, output in seen if module is last), None)
    wanted = next((given for module, given, _ in seen if module is head), None)
    if stream is not None and wanted is not None:
        for module, given, output in seen:
            if module is not last and torch.equal(given, stream) and torch.equal(output, wanted):
                return module
    raise _not_found(model, "no single module lies between the last block and the unembedding")


def _outside_the_blocks(model: OpenModel) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Input and output of the last block and of each module outside the blocks, at the last token of a pass."""
    inner = {part for block in model.blocks for part in block.modules()} - {model.blocks[-1]}
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor) and output.ndim > 1:
            seen.append((module, inputs[0][:, -1], output[:, -1]))

    handles = [part.register_forward_hook(keep) for part in model.module.modules() if part not in inner]
    size = len(_unembedding(model))
    try:
        final_logits(model, [[size // 4, size // 2]])  # not 0: the padding token's embedding may be all 0
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _not_found(model: OpenModel, what: str) -> GravlensError:
    return GravlensError(
        f"In {type(model.module).__name__} no final norm was found ({what}).",
        "A direction is read through one norm, from the last block's output to the unembedding's input.",
        "a decoder-only language model, as TransformerBridge where its Hugging Face form is unusual.",
    )
