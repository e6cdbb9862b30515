"""What an intervention does to a score: with against without, paired over prompts, beside random directions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import bootstrap
from torch import nn
from tqdm.auto import tqdm

from gravlens.behavior import Score
from gravlens.directions import Direction, Directions, direction_from
from gravlens.errors import GravlensError
from gravlens.interventions import Ablate, Intervention, each, intervene
from gravlens.models import OpenModel, open_model
from gravlens.prompts import PromptSet

Condition: TypeAlias = Intervention | Sequence[Intervention]
Make: TypeAlias = Callable[[Direction], Intervention]


@dataclass(frozen=True, eq=False)
class Effect:
    """What each condition does to the score.

    Attributes:
        table: one row a condition: `condition`, `layer` (<NA>: several), `baseline` and `with_intervention` (means over
            prompts), `difference` with its 95 % bootstrap interval over prompts `low`, `high`, `p_random` (two-sided,
            (1 + k)/(1 + n)) among `n_random` random directions whose central 95 % is `random_low`, `random_high`,
            and `n_prompts`. `table.attrs["score"]` names the score.
        random: condition -> mean difference of each random draw.
        differences: condition -> difference of each prompt.
    """

    table: pd.DataFrame
    random: Mapping[str, Float[np.ndarray, " draw"]]
    differences: Mapping[str, Float[np.ndarray, " prompt"]]

    def _repr_html_(self) -> str:
        caption = f"<p>score: {escape(str(self.table.attrs.get('score')))}</p>"
        return caption + self.table.to_html(index=False, float_format="{:.3f}".format, escape=True)


def causal_effect(
    model: OpenModel | nn.Module,
    conditions: Mapping[str, Condition],
    *,
    score: Score,
    prompts: PromptSet | Sequence[str],
    n_random: int = 20,
    rng: np.random.Generator | None = None,
    n_bootstrap: int = 2000,
) -> Effect:
    """Measure what interventions do to a score, against what random directions of the same length do.

    A random control is the same intervention along fresh isotropic unit vectors, at the same layers, distances and
    strengths; directions that share a vector share its replacement. It costs
    1 + conditions · (1 + n_random) scorings of all prompts.

    Args:
        model: its weights are never touched.
        conditions: name -> an intervention, or several that act together.
        score: (model, prompts) -> one number a prompt, such as `refusal_log_odds`.
        prompts: what it is scored on; other prompts than the directions were estimated on.
        n_random: random draws per condition; the smallest p is 1/(1 + n_random).
        rng: of the draws and the bootstrap; default: seeded with 0.
        n_bootstrap: resamples of the prompts.

    Raises:
        GravlensError: no condition, a score that is not one finite number a prompt, or what `intervene` raises.
    """
    if not conditions:
        raise GravlensError("No condition was given.", "One at least is compared.", '{"ablated": Ablate(direction)}.')
    opened, prompts = open_model(model), PromptSet.of(prompts)
    rng = np.random.default_rng(0) if rng is None else rng
    measure = partial(_scores, opened, score, prompts)
    baseline = measure(())
    rows, random, differences = [], {}, {}
    with tqdm(total=len(conditions) * (1 + n_random), desc="effects", leave=False) as bar:
        for name, condition in conditions.items():
            together = tuple(condition) if isinstance(condition, Sequence) else (condition,)
            differences[name] = measure(together) - baseline
            bar.update()
            random[name] = np.empty(n_random)
            for draw in range(n_random):
                random[name][draw] = (measure(_random_twin(together, rng)) - baseline).mean()
                bar.update()
            numbers = _summary(differences[name], random[name], rng=rng, n_bootstrap=n_bootstrap)
            rows.append({"condition": name, "layer": _layer(together), "baseline": baseline.mean(), **numbers})
    return Effect(_table(rows, score), random, differences)


def layerwise_effect(
    model: OpenModel | nn.Module,
    directions: Directions,
    intervention: Make | Mapping[str, Make] = Ablate,
    *,
    score: Score,
    prompts: PromptSet | Sequence[str],
    n_random: int = 20,
    rng: np.random.Generator | None = None,
) -> Effect:
    """`causal_effect` of an intervention at each defined layer by itself.

    Args:
        model: see `causal_effect`, like all that is not named here.
        directions: one a layer; undefined layers are left out.
        intervention: direction -> intervention (`Ablate`), or several by name
            (`{"strength 0.5": partial(Steer, strength=0.5)}`).

    Returns:
        An `Effect`, one row per intervention and layer; `random` and `differences` go by `"{condition}, layer {l}"`.
    """
    makes = intervention if isinstance(intervention, Mapping) else {_name(intervention).lower(): intervention}
    named = [(name, make, direction) for name, make in makes.items() for direction in directions.defined()]
    conditions = {f"{name}, layer {direction.layer}": make(direction) for name, make, direction in named}
    effect = causal_effect(model, conditions, score=score, prompts=prompts, n_random=n_random, rng=rng)
    table = effect.table.assign(condition=[name for name, _, _ in named])
    table.attrs = effect.table.attrs
    return Effect(table, effect.random, effect.differences)


def _scores(
    model: OpenModel, score: Score, prompts: PromptSet, interventions: Sequence[Intervention]
) -> Float[np.ndarray, " prompt"]:
    """One finite number a prompt, in fp64; without interventions the model as it is."""
    if interventions:
        with intervene(model, *interventions):
            values = score(model, prompts)
    else:
        values = score(model, prompts)
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(prompts),) or not np.isfinite(values).all():
        raise GravlensError(
            f"The score {_name(score)} gave {int(np.isfinite(values).sum())} finite numbers of shape {values.shape}.",
            f"A score gives one finite number for each of the {len(prompts)} prompts.",
            "refusal_log_odds, or a function (model, prompts) -> array.",
        )
    return values


def _random_twin(interventions: Sequence[Intervention], rng: np.random.Generator) -> list[Intervention]:
    """The same interventions along isotropic unit vectors, one for each different vector, at the same distances."""
    fresh: dict[bytes, np.ndarray] = {}

    def twin(direction: Direction) -> Direction:
        key = direction.vector.tobytes()
        if key not in fresh:
            fresh[key] = rng.standard_normal(direction.vector.shape)
        return direction_from(fresh[key], layer=direction.layer, distance=direction.distance, name="isotropic")

    return [one.with_directions(Directions(tuple(map(twin, each(one.directions))))) for one in interventions]


def _summary(
    differences: Float[np.ndarray, " prompt"],
    random: Float[np.ndarray, " draw"],
    *,
    rng: np.random.Generator,
    n_bootstrap: int,
) -> dict[str, float]:
    difference, nan = float(differences.mean()), float("nan")
    low, high, p, random_low, random_high = (nan,) * 5
    if len(differences) > 1:  # one prompt has no interval
        resampled = bootstrap((differences,), np.mean, n_resamples=n_bootstrap, method="percentile", rng=rng)
        low, high = map(float, resampled.confidence_interval)
    if len(random):
        p = (1 + int((np.abs(random) >= abs(difference)).sum())) / (1 + len(random))
        # Outward from the quantile's place, so that 20 draws give their whole range.
        random_low = float(np.quantile(random, 0.025, method="lower"))
        random_high = float(np.quantile(random, 0.975, method="higher"))
    return {"difference": difference, "low": low, "high": high, "p_random": p, "n_random": len(random),
            "random_low": random_low, "random_high": random_high, "n_prompts": len(differences)}  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]], score: Score) -> pd.DataFrame:
    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    table.insert(3, "with_intervention", table["baseline"] + table["difference"])
    table.attrs["score"] = _name(score)
    return table


def _layer(interventions: Sequence[Intervention]) -> Any:
    layers = {direction.layer for one in interventions for direction in each(one.directions)}
    return layers.pop() if len(layers) == 1 else pd.NA


def _name(function: Callable[..., Any]) -> str:
    """A function's name, also where some of its arguments are filled in."""
    function = function.func if isinstance(function, partial) else function
    return getattr(function, "__name__", type(function).__name__)
