"""The refusal direction of Arditi et al., "Refusal in language models is mediated by a single direction" (2024)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from gravlens.activations.residuals import read_residuals
from gravlens.behavior.scores import Score, refusal_log_odds
from gravlens.core.display import brief
from gravlens.core.errors import GravlensError
from gravlens.core.progress import progress
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.vrev import difference_of_means, direction_from
from gravlens.history.encoding import encode, prompts_digest
from gravlens.history.prompts import PromptSet
from gravlens.interventions.edits import Ablate, Steer, everywhere
from gravlens.interventions.hooks import intervene
from gravlens.models.forward import final_logits
from gravlens.models.opening import Openable, open_model

__all__ = ["Chosen", "Filters", "choose_refusal", "refusal_candidates"]


@dataclass(frozen=True)
class Filters:
    """Criteria for a candidate; the defaults are the paper's.

    Attributes:
        induce: least refusal score on harmless prompts with the direction added.
        kl: largest KL divergence of the next-token distribution on harmless prompts with the direction ablated; nats.
        depth: share of the blocks, from the first, that a direction may come from.

    Examples:
        >>> gl.refusal.Filters(kl=0.2).depth
        0.8
    """

    induce: float = 0.0
    kl: float = 0.1
    depth: float = 0.8


@dataclass(frozen=True, eq=False)
class Chosen:
    """The chosen direction and the measurements of all candidates.

    Attributes:
        direction: its distance is the length of the difference of means, so `Steer(direction)` adds that difference.
        table: one row per candidate, in their order: `bypass` (mean score on harmful prompts with it ablated at every
            layer), `induce` (on harmless prompts with it added at its layer), `kl` (mean KL(plain ‖ ablated) of the
            next token on harmless prompts; nats) and `dropped` (why, or ""). `table.attrs` has the mean scores without
            an intervention, `harmful` and `harmless`.
    """

    direction: Direction
    table: pd.DataFrame
    __repr__ = brief


def refusal_candidates(
    model: Openable,
    *,
    harmful: PromptSet | Sequence[str],
    harmless: PromptSet | Sequence[str],
    positions: Sequence[int] = (-1,),
) -> tuple[Direction, ...]:
    """Difference of means, mean(harmful) − mean(harmless), of `resid_post` at each layer and position.

    Args:
        model: the aligned model.
        harmful: prompts that it refuses.
        harmless: prompts that it does not refuse, of the same kind.
        positions: from the prompt's end (−1 is the last token); the paper takes all tokens that the chat template adds
            after the instruction.

    Raises:
        GravlensError: a position beyond the start of a prompt, two equal means, or two system prompts.

    Examples:
        >>> harmless = [example.prompt for example in examples]
        >>> candidates = gl.refusal.refusal_candidates(model, harmful=prompts, harmless=harmless, positions=(-1, -2))
        >>> len(candidates)  # layers × positions
        6
    """
    opened = open_model(model)
    sets = [PromptSet.of(prompts) for prompts in (harmful, harmless)]
    if sets[0].system != sets[1].system:
        given = f"The system prompts of harmful and harmless prompts are {sets[0].system!r} and {sets[1].system!r}."
        raise GravlensError(given, "The difference of means would be theirs.", "one system prompt for both, or none.")
    ids = [encode(opened.tokenizer, prompts) for prompts in sets]
    layers, found = range(opened.n_layers), []
    for position in positions:
        states = [read_residuals(opened, one, layers=layers, positions=position).numpy() for one in ids]
        facts = {"position": position, "n_harmful": len(ids[0]), "n_harmless": len(ids[1])}
        for layer in layers:
            vector = difference_of_means(*(one[:, layer] for one in states))
            direction = direction_from(vector, layer=layer, name="harmful_minus_harmless")
            found.append(replace(direction, prompts=prompts_digest(ids[0]), made_from=facts))
    return tuple(found)


def choose_refusal(
    model: Openable,
    candidates: Sequence[Direction],
    *,
    harmful: PromptSet | Sequence[str],
    harmless: PromptSet | Sequence[str],
    score: Score = refusal_log_odds,
    filters: Filters = Filters(),
) -> Chosen:
    """Select the candidate whose ablation leaves the least refusal, among those that pass the filters.

    The selection of Arditi et al. (2024), at three passes over the prompts per candidate. Ablation is at the output of
    every block; theirs is at every write to the residual stream, as in `orthogonalized`.

    Args:
        model: the model of the candidates.
        candidates: from `refusal_candidates`, or any other directions.
        harmful: held-out prompts: not those that the candidates were estimated on.
        harmless: likewise.
        score: refusal log-odds, with the model's own refusal openings.
        filters: criteria for a candidate.

    Examples:
        >>> harmless = [example.prompt for example in examples]
        >>> candidates = gl.refusal.refusal_candidates(model, harmful=seq.probes, harmless=harmless[::2])
        >>> wide = gl.refusal.Filters(induce=-50, kl=50, depth=1.4)  # for a random model, which refuses nothing
        >>> asked = {"harmful": prompts, "harmless": harmless[1::2]}
        >>> len(gl.refusal.choose_refusal(model, candidates, **asked, filters=wide).table)
        3
    """
    if not candidates:
        raise GravlensError("No candidate was given.", "At least one is needed.", "refusal_candidates(model, …).")
    opened, harmful, harmless = open_model(model), PromptSet.of(harmful), PromptSet.of(harmless)
    ids = encode(opened.tokenizer, harmless)
    plain = final_logits(opened, ids)

    def measured(direction: Direction) -> dict[str, float]:
        with intervene(opened, Ablate(everywhere(direction, opened))):
            bypass, kl = float(np.mean(score(opened, harmful))), _kl(plain, final_logits(opened, ids))
        with intervene(opened, Steer(direction)):
            return {"bypass": bypass, "induce": float(np.mean(score(opened, harmless))), "kl": kl}

    with progress("refusal", Directions.of(candidates).directions, unit="candidate") as each:
        found = [(one, measured(one)) for one in each]
    table = pd.DataFrame([{"layer": one.layer, **numbers} for one, numbers in found])
    table.insert(
        1, "position", [one.made_from.get("position", pd.NA) for one, _ in found]
    )  # any directions may be given
    table["dropped"] = ["; ".join(_reasons(one.layer, numbers, filters, opened.n_layers)) for one, numbers in found]
    both = {"harmful": harmful, "harmless": harmless}
    table.attrs = {name: float(np.mean(score(opened, prompts))) for name, prompts in both.items()}
    passed = np.where(table["dropped"] == "", table["bypass"], np.inf)
    if not np.isfinite(passed).any():
        raise _none_left(table, filters)
    return Chosen(candidates[int(passed.argmin())], table)


def _kl(before: Float[Tensor, "prompt vocab"], after: Float[Tensor, "prompt vocab"]) -> float:
    """Mean KL(before ‖ after), nats."""
    before, after = (logits.double().log_softmax(1) for logits in (before, after))  # fp64: near 0 the terms cancel
    # torch takes the second distribution first.
    return float(kl_div(after, before, reduction="batchmean", log_target=True))


def _reasons(layer: int, measured: dict[str, float], filters: Filters, n_layers: int) -> list[str]:
    allowed = int(n_layers * filters.depth) - 1  # − 1: the paper counts states at a block's input, layer l is its l + 1
    # NaN would pass the comparisons below.
    found = [f"{name} is not finite" for name, value in measured.items() if not np.isfinite(value)]
    if layer >= allowed:
        found.append(f"layer {layer} is not below {allowed}")
    if measured["induce"] < filters.induce:
        found.append(f"induce {measured['induce']:.3g} is below {filters.induce:g}")
    if measured["kl"] > filters.kl:
        found.append(f"KL {measured['kl']:.3g} is above {filters.kl:g}")
    return found


def _none_left(table: pd.DataFrame, filters: Filters) -> GravlensError:
    best = table.sort_values("bypass").iloc[0]
    return GravlensError(
        f"All {len(table)} candidates were filtered out: lowest bypass {best['bypass']:.3g} (layer {best['layer']}: "
        f"{best['dropped']}), highest induce {table['induce'].max():.3g}, lowest KL {table['kl'].min():.3g}.",
        f"At least one must pass {filters}.",
        "openings of this model's own refusals, more prompts or positions, or other Filters.",
    )
