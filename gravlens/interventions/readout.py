"""Logit lens of a direction: the tokens that it promotes and suppresses through final norm and unembedding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gravlens.behavior.scores import encode_openings
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction, one_direction, undefined_error
from gravlens.interventions.hooks import check_fit
from gravlens.models.forward import final_logits
from gravlens.models.opening import Openable, OpenModel, open_model
from gravlens.models.precision import check_unquantised

__all__ = ["readout", "readout_openings"]


PROBE = 10.0  # root mean square of probe states: large enough for a norm's ε not to matter
CENTRED_WITHIN = 1e-3


def readout(model: Openable, direction: Direction, *, top: int = 10) -> pd.DataFrame:
    """Logit lens (nostalgebraist 2020): the tokens that a direction promotes and suppresses most, W_U (g ∘ v).

    g is the final norm's gain, measured on the norm itself, so any norm will do; for a LayerNorm, v is centred first.
    Dividing by the state's length, which grows as v is added, is left out: logits rank tokens, they are not changes of
    log-probabilities. Later blocks are skipped, so late layers are more telling than early ones.

    Args:
        model: usually the anchor.
        direction: of one layer, of unit length.
        top: number of tokens at either end.

    Returns:
        Columns `token` (text), `logit` (for a step of length 1 at a state of root mean square 1, minus the mean over
        the vocabulary, which changes no probability), largest first.

    Examples:
        >>> table = gl.readout.readout(model, vs[2], top=3)
        >>> len(table)  # three that v promotes, three that it suppresses
        6
    """
    opened = open_model(model)
    logits = _logits(opened, direction)
    order = np.argsort(-logits, kind="stable")  # ties in the order of token ids, on every machine
    chosen = order if 2 * top >= len(order) else np.concatenate([order[:top], order[len(order) - top :]])
    tokens = [_tokenizer(opened).decode([int(token)]) for token in chosen]
    return pd.DataFrame({"token": tokens, "logit": logits[chosen]})


def readout_openings(
    model: Openable, direction: Direction, *, refusals: Sequence[str], compliances: Sequence[str]
) -> float:
    """Mean logit of the refusals' first tokens minus that of the compliances': negative if v promotes compliance.

    Logits are those of `readout`. A token that begins both refusals and compliances ("I") is left out.

    Args:
        model: usually the anchor.
        direction: of one layer, of unit length.
        refusals: how refusals of this model begin.
        compliances: how its other answers begin.

    Examples:
        >>> gap = gl.readout.readout_openings(model, vs[2], refusals=["Sorry"], compliances=["sure"])
        >>> bool(np.isfinite(gap))
        True
    """
    opened = open_model(model)
    logits = _logits(opened, direction)
    first = [{ids[0] for ids in encode_openings(opened, openings)} for openings in (refusals, compliances)]
    own = [sorted(first[0] - first[1]), sorted(first[1] - first[0])]
    if not all(own):
        given = f"The refusals {list(refusals)} and the compliances {list(compliances)} begin with the same tokens."
        raise GravlensError(given, "Each side needs a first token of its own.", "openings that begin with other words.")
    return float(logits[own[0]].mean() - logits[own[1]].mean())


def _logits(model: OpenModel, direction: Direction) -> Float[np.ndarray, " vocab"]:
    if not np.isfinite(one_direction(direction).vector).all():
        raise undefined_error(direction)
    check_fit(direction, model)
    with torch.no_grad():
        vector = torch.tensor(direction.vector, device=model.device, dtype=model.dtype)
        moved = _through_norm(_final_norm(model), vector)
        # Cut to the tokenizer's tokens: models often pad their vocabulary, and rows beyond it stand for no token.
        logits = (_unembedding(model).detach().to(moved) @ moved)[: len(_tokenizer(model))].double().cpu().numpy()
    return logits - logits.mean()


def _tokenizer(model: OpenModel) -> Any:
    if model.tokenizer is None:
        given = f"This {type(model.module).__name__} has no tokenizer."
        raise GravlensError(given, "Tokens are shown as text.", "open_model(model, tokenizer=tokenizer).")
    return model.tokenizer


def _through_norm(norm: nn.Module, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """gain ∘ v, or gain ∘ (v − mean v) if the norm centres, measured on its outputs: Gemma's gain is 1 + weight."""
    if isinstance(norm, nn.Identity):  # no norm: nothing to measure
        return vector.float()

    def moved(state: Tensor) -> Tensor:  # the norm's bias, which is no part of a direction, cancels
        out, still = (norm(one[None, None])[0, 0] for one in (state, torch.zeros_like(state)))
        return out.float() - still.float()

    part = vector - vector.mean()  # both kinds of norm pass a vector of mean 0 on alike
    size = part.square().mean().sqrt()
    centred = moved(part * (PROBE / size))
    # A norm that centres maps a constant vector to 0; if this one does not, it is an RMSNorm.
    if moved(torch.ones_like(vector)).abs().max() > CENTRED_WITHIN * centred.abs().max():
        size = vector.square().mean().sqrt()
        centred = moved(vector * (PROBE / size))
    return centred * size


def _unembedding(model: OpenModel) -> Float[Tensor, "vocab d_model"]:
    if model.family.head is None:
        raise _not_found(model, "it has no unembedding")
    weight = model.family.unembedding
    if not weight.is_floating_point():
        check_unquantised(model.family.head, "A readout")
    return weight


def _final_norm(model: OpenModel) -> nn.Module:
    """The module that maps the last block's output to the unembedding's input: by name, or traced on one prompt."""
    if model.family.final_norm is not None:
        return model.family.final_norm
    head, last = model.family.head, model.blocks[-1]
    # By name there are as many candidates as architectures, and some have norms that are not the last.
    seen = _outside_the_blocks(model)
    stream = next((output for module, _, output in seen if module is last), None)
    wanted = next((given for module, given, _ in seen if module is head), None)
    if stream is not None and wanted is not None:
        for module, given, output in seen:
            if module is not last and torch.equal(given, stream) and torch.equal(output, wanted):
                return module
    raise _not_found(model, "no single module lies between the last block and the unembedding")


def _outside_the_blocks(model: OpenModel) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Record input and output of the last block and of each module outside the blocks, at the last token."""
    inner = {part for block in model.blocks for part in block.modules()} - {model.blocks[-1]}
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output  # a block's cache follows its states
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor) and output.ndim > 1:
            seen.append((module, inputs[0][:, -1], output[:, -1]))

    handles = [part.register_forward_hook(keep) for part in model.module.modules() if part not in inner]
    size = len(_unembedding(model))
    try:
        final_logits(model, [[size // 4, size // 2]])  # not token 0: the padding token's embedding may be all 0
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _not_found(model: OpenModel, what: str) -> GravlensError:
    given = f"In {type(model.module).__name__} no final norm was found ({what})."
    remedy = "a decoder-only language model, or its TransformerBridge if the Hugging Face model is unusual."
    return GravlensError(given, "A logit lens needs the one norm between the last block and the unembedding.", remedy)
