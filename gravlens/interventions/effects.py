"""Causal effects of interventions on a score: paired over prompts, against random directions of the same length."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float

from gravlens.activations.residuals import Residuals
from gravlens.behavior.scores import Score
from gravlens.core import display as html
from gravlens.core.errors import GravlensError, as_list, wrong_kind
from gravlens.core.progress import progress
from gravlens.directions.direction import Direction, Directions, Span, Spans, Subspaces, each
from gravlens.directions.subspaces import random_like
from gravlens.history.prompts import PromptSet
from gravlens.interventions.edits import Ablate, Intervention, Steer, check_intervention
from gravlens.interventions.hooks import intervene
from gravlens.models.opening import Openable, OpenModel, open_model

__all__ = ["DoseResponse", "Effect", "dose_response", "layerwise_effect", "measure_selectivity"]


Condition: TypeAlias = Intervention | Sequence[Intervention]
Make: TypeAlias = Callable[[Any], Intervention]
N_BOOTSTRAP = 2000


@dataclass(frozen=True, eq=False)
class Effect:
    """Effect of each condition on a score.

    Attributes:
        table: one row per condition: `layer` (`<NA>`: several), `baseline` and `with_intervention` (mean scores),
            `difference` with its 95 % bootstrap interval over prompts `low`, `high`; `p_random` (two-sided,
            (1 + k)/(1 + n)) against `n_random` random directions, their central 95 % `random_low`, `random_high`,
            `n_prompts`; `crossing`, the share of prompts that moved over a score of 0 in the direction of the
            difference, and `random_crossing`, the same of the random directions on average; `random_kind`: `isotropic`
            or `covariance_matched`. `table.attrs["score"]` names the score.
        random: condition -> mean difference of each random draw.
        differences: condition -> difference of each prompt.
        baseline: score of each prompt without an intervention.
    """

    table: pd.DataFrame
    random: Mapping[str, Float[np.ndarray, " draw"]]
    differences: Mapping[str, Float[np.ndarray, " prompt"]]
    baseline: Float[np.ndarray, " prompt"]

    def _repr_html_(self) -> str:
        return html.of_frame(_shown(self.table), title="Effect", notes=[f"score: {self.table.attrs.get('score')}"])


def causal_effect(
    model: Openable,
    conditions: Mapping[str, Condition] | Intervention,
    *,
    score: Score,
    prompts: PromptSet | Sequence[str],
    n_random: int = 20,
    rng: np.random.Generator | None = None,
    states: Residuals | None = None,
) -> Effect:
    """Measure the effect of interventions on a score, with random directions as controls (docs/effects.md).

    A control is the same intervention along random unit vectors (or random subspaces of the same rank), at the same
    layers, distances and strengths. Draw i replaces a vector by the same random one in every layer and condition.

    Args:
        model: scored 1 + conditions · (1 + n_random) times on all prompts.
        conditions: name -> an intervention, or several that act together; a single intervention is named by its class.
        score: (model, prompts) -> one number per prompt, such as `refusal_log_odds`.
        prompts: held out: not those that the directions were estimated on.
        n_random: random draws per condition; the smallest p is 1/(1 + n_random).
        rng: for the draws and the bootstrap; default: seeded with 0.
        states: of `anchor`, at the conditions' layers: draws then have their covariance over prompts (summed over the
            layers that share a vector). Default: isotropic draws.

    Raises:
        GravlensError: no condition, a score that is not one finite number per prompt, states without one of the layers
            or of too low a rank for a subspace, or what `intervene` raises.
    """
    conditions = by_name(conditions)
    opened, prompts = open_model(model), PromptSet.of(prompts)
    rng = rng or np.random.default_rng(0)
    measure = partial(_scores, opened, score, prompts)
    seeds = rng.integers(2**63, size=n_random)  # shared by the conditions: their controls are paired
    baseline = measure(())
    rows, random, differences = [], {}, {}
    with progress("effects", total=len(conditions) * (1 + n_random), unit="scoring") as bar:
        for name, condition in conditions.items():
            together = as_list(condition)
            differences[name] = measure(together) - baseline
            bar.update()
            drawn = np.empty((n_random, len(baseline)))
            for draw, seed in enumerate(seeds):
                drawn[draw] = measure(_random_twin(together, int(seed), states)) - baseline
                bar.update()
            random[name] = drawn.mean(1)
            numbers = summarise(differences[name], random[name], rng=rng) | crossings(
                baseline, differences[name], drawn
            )
            rows.append({"condition": name, "layer": _layer(together), "baseline": baseline.mean(), **numbers})
    table = pd.DataFrame(rows).astype({"layer": "Int64"})  # nullable: <NA> for several layers
    table.insert(3, "with_intervention", table["baseline"] + table["difference"])
    table["random_kind"] = "isotropic" if states is None else "covariance_matched"
    table.attrs["score"] = name_of(score)
    return Effect(table, random, differences, baseline)


def crossings(
    baseline: Float[np.ndarray, " prompt"],
    differences: Float[np.ndarray, " prompt"],
    drawn: Float[np.ndarray, "draw prompt"],
) -> dict[str, float]:
    """Columns of `Effect`: the share of prompts that cross a score of 0 in the direction of the mean difference."""
    up = differences.mean() > 0  # a score of exactly 0 lies on neither side and is not above
    before, after = baseline > 0, baseline + np.vstack([differences, drawn]) > 0
    shares = (after & ~before if up else before & ~after).mean(1)
    random = float(shares[1:].mean()) if len(drawn) else float("nan")
    return {"crossing": float(shares[0]), "random_crossing": random}


def by_name(conditions: Mapping[str, Condition] | Intervention) -> Mapping[str, Condition]:
    """Name conditions; a single intervention is named by its class, such as `ablate`."""
    if not isinstance(conditions, Mapping):
        return {type(check_intervention(conditions)).__name__.lower(): conditions}
    if not conditions:
        raise GravlensError("No condition was given.", "At least one is needed.", '{"ablated": Ablate(direction)}.')
    for condition in conditions.values():
        for one in as_list(condition):
            check_intervention(one)
    return conditions


def layerwise_effect(
    model: Openable,
    directions: Span | Spans,
    intervention: Make | Mapping[str, Make] = Ablate,
    *,
    score: Score,
    prompts: PromptSet | Sequence[str],
    n_random: int = 20,
    states: Residuals | None = None,
) -> Effect:
    """Sweep an intervention over layers, one layer at a time; draws are seeded with 0 (docs/effects.md).

    Args:
        model: as for `causal_effect`, like all arguments not listed here.
        directions: one direction or subspace per layer; undefined layers are skipped.
        intervention: direction -> intervention (`Ablate`), or several by name
            (`{"strength 0.5": partial(Steer, strength=0.5)}`).

    Returns:
        One row per intervention and layer; keys of `random` and `differences`: `"{condition}, layer {l}"`.
    """
    makes = intervention if isinstance(intervention, Mapping) else {name_of(intervention).lower(): intervention}
    spans = directions.defined() if isinstance(directions, Directions) else each(directions)
    named = [(name, make, span) for name, make in makes.items() for span in spans]
    conditions = {f"{name}, layer {span.layer}": make(span) for name, make, span in named}
    effect = causal_effect(model, conditions, score=score, prompts=prompts, n_random=n_random, states=states)
    return replace(effect, table=effect.table.assign(condition=[name for name, _, _ in named]))


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """Dose–response curve of a steering vector.

    Attributes:
        effect: its table has one row per strength, ascending, in a column `strength`.
        spearman: rank correlation of strength and mean score, strength 0 included; NaN for a constant score.
        spearman_prompts: the same per prompt.
        spearman_random: the same per random draw; a draw keeps its directions at all strengths.
    """

    effect: Effect
    spearman: float
    spearman_prompts: Float[np.ndarray, " prompt"]
    spearman_random: Float[np.ndarray, " draw"]

    @property
    def table(self) -> pd.DataFrame:
        return self.effect.table

    def _repr_html_(self) -> str:
        notes = [f"score: {self.table.attrs.get('score')}; Spearman with strength: {self.spearman:.3f}"]
        return html.of_frame(_shown(self.table), title="DoseResponse", notes=notes)


def dose_response(
    model: Openable,
    directions: Direction | Directions,
    strengths: Sequence[float],
    *,
    score: Score,
    prompts: PromptSet | Sequence[str],
    n_random: int = 20,
    states: Residuals | None = None,
) -> DoseResponse:
    """Steer at several strengths and compare the dose–response with that of random directions (docs/effects.md).

    A random direction often moves a score monotonically as well, so judge the size of the effect with its order.

    Args:
        model: as for `causal_effect`, like all arguments not listed here.
        directions: steered together, each at its layer.
        strengths: at least two, none of them 0 (the baseline), in units of each direction's distance.
    """
    doses = sorted(set(map(float, as_list(strengths))))
    if len(doses) < 2 or 0 in doses:
        given = f"strengths={strengths} was given."
        raise GravlensError(
            given, "Two or more, besides 0 (the baseline), are needed.", "strengths=[-1, -0.5, 0.5, 1]."
        )
    conditions = {f"strength {dose:g}": Steer(directions, dose) for dose in doses}
    effect = causal_effect(model, conditions, score=score, prompts=prompts, n_random=n_random, states=states)
    along_prompts = np.stack([effect.differences[name] for name in conditions])
    return DoseResponse(
        replace(effect, table=effect.table.assign(strength=doses)),
        float(_spearman(doses, along_prompts.mean(1, keepdims=True))[0]),
        _spearman(doses, along_prompts),
        _spearman(doses, np.stack([effect.random[name] for name in conditions])),
    )


def _spearman(doses: Sequence[float], differences: Float[np.ndarray, "dose n"]) -> Float[np.ndarray, " n"]:
    """Rank correlation of each column with the dose, including the baseline (difference 0 at dose 0)."""
    doses, curves = [0.0, *doses], np.vstack([np.zeros(differences.shape[1]), differences])
    # scipy warns of a constant curve.
    return np.array([scipy.stats.spearmanr(doses, curve)[0] if np.ptp(curve) else np.nan for curve in curves.T])


def _scores(
    model: OpenModel, score: Score, prompts: PromptSet, interventions: Sequence[Intervention]
) -> Float[np.ndarray, " prompt"]:
    if not callable(score):
        raise wrong_kind(score, "A score is a function (model, prompts) -> array.", "score=refusal_log_odds.")
    with intervene(model, *interventions) if interventions else nullcontext():
        values = np.asarray(score(model, prompts), dtype=np.float64)
    if values.shape != (len(prompts),) or not np.isfinite(values).all():
        given = f"{name_of(score)} returned {int(np.isfinite(values).sum())} finite numbers of shape {values.shape}."
        raise GravlensError(
            given, f"Each of the {len(prompts)} prompts needs a number.", "a function (model, prompts) -> array."
        )
    return values


def _random_twin(interventions: Sequence[Intervention], seed: int, states: Residuals | None) -> list[Intervention]:
    """The same interventions along random spans at the same layers and distances, one twin per distinct span."""
    spans = [span for one in interventions for span in each(one.directions)]
    fresh: dict[bytes, Span] = {}

    def twin(span: Span) -> Span:
        key = span.basis.tobytes()
        if key not in fresh:
            layers = dict.fromkeys(other.layer for other in spans if other.basis.tobytes() == key)
            # Seeded by the span too, so that it has one twin in all conditions of a draw and they differ by their
            # interventions alone; sha256, because Python's hash of bytes changes from process to process.
            rng = np.random.default_rng([seed, int.from_bytes(sha256(key).digest())])
            fresh[key] = _replacement(span, rng, _cloud(states, tuple(layers)))
        return replace(fresh[key], layer=span.layer, distance=span.distance)

    def twins(given: Span | Spans) -> Spans:
        made: Any = tuple(map(twin, each(given)))
        return Directions(made) if isinstance(given, Direction | Directions) else Subspaces(made)

    return [one.with_directions(twins(one.directions)) for one in interventions]


def _replacement(span: Span, rng: np.random.Generator, cloud: Float[np.ndarray, "n 1 d_model"] | None) -> Span:
    twin = random_like(span, rng=rng, states=cloud)
    if twin.basis.shape != span.basis.shape:
        given = f"States that span {len(twin.basis)} dimensions were given for a subspace of rank {len(span.basis)}."
        wanted = "A random subspace of the same rank needs the states of more prompts than its rank."
        raise GravlensError(given, wanted, "states on more prompts, or states=None for isotropic controls.")
    return twin


def _cloud(states: Residuals | None, layers: Sequence[int]) -> Float[np.ndarray, "n 1 d_model"] | None:
    """The anchor's states at these layers, centred per layer and pooled: random vectors are drawn from them."""
    if states is None:
        return None
    if missing := [layer for layer in layers if layer not in states.layers]:
        given = f"The states do not contain layer {missing[0]}, only {list(states.layers)}."
        raise GravlensError(
            given, "Controls are drawn from states at their layers.", "cache_residuals(sequence, prompts)."
        )
    at = states.of("anchor")[:, [states.layers.index(layer) for layer in layers]].astype(np.float64)
    return (at - at.mean(0)).reshape(-1, 1, at.shape[-1])


def summarise(
    differences: Float[np.ndarray, " prompt"], random: Float[np.ndarray, " draw"], *, rng: np.random.Generator
) -> dict[str, float]:
    """Columns of `Effect`: mean difference, bootstrap interval over prompts, p-value against random draws."""
    difference, n = float(differences.mean()), len(differences)
    low, high, p, random_low, random_high = (float("nan"),) * 5
    if n > 1:  # scipy refuses to resample a single prompt
        # `import scipy` loads scipy.stats here, at its first use: at the top of the file it would cost 0.7 s.
        bootstrap = partial(scipy.stats.bootstrap, n_resamples=N_BOOTSTRAP, method="percentile", rng=rng)
        low, high = map(float, bootstrap((differences,), np.mean).confidence_interval)
    if len(random):
        # The observed effect counts as one of the draws, so that p is never 0 (Phipson and Smyth 2010).
        p = (1 + int((np.abs(random) >= abs(difference)).sum())) / (1 + len(random))
        # Rounded outwards: interpolation between the few draws would make the range too narrow.
        random_low = float(np.quantile(random, 0.025, method="lower"))
        random_high = float(np.quantile(random, 0.975, method="higher"))
    return {"difference": difference, "low": low, "high": high, "p_random": p, "n_random": len(random),
            "random_low": random_low, "random_high": random_high, "n_prompts": n}  # fmt: skip


def _layer(interventions: Sequence[Intervention]) -> Any:
    layers = {direction.layer for one in interventions for direction in each(one.directions)}
    return layers.pop() if len(layers) == 1 else pd.NA


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(layer=["several" if layer is pd.NA else layer for layer in table.layer])


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, also of a `functools.partial` of one."""
    function = function.func if isinstance(function, partial) else function
    return getattr(function, "__name__", type(function).__name__)  # an object with `__call__` has no name


def measure_selectivity(
    model: Openable,
    conditions: Mapping[str, Condition] | Intervention,
    measures: Mapping[str, tuple[Score, PromptSet | Sequence[str]]],
    *,
    n_random: int = 20,
    seed: int = 0,
    states: Residuals | None = None,
) -> pd.DataFrame:
    """Compare the effect sizes of an intervention on several behaviours: does it move one more than the others?

    Args:
        model: as for `causal_effect`, like all arguments not listed here.
        conditions: likewise.
        measures: name -> a score and its prompts, at least two: refusal on harmful prompts, over-refusal on harmless
            ones, log-likelihood of a task's answers.
        seed: of the draws. Draw i is the same set of directions for every measure.

    Returns:
        One row per condition and measure: `baseline` (mean), `spread` (standard deviation over prompts without
        intervention), `effect` (effect size: mean difference / spread) with its interval `low`, `high`; `random_low`,
        `random_high`, `p_random`, `n_random`, `random_kind`, `n_prompts` as in `Effect`; `margin`, |effect| minus the
        largest |effect| of the other measures, and `p_margin`, its p-value (1 + k)/(1 + n) against random directions.

    Raises:
        GravlensError: fewer than two measures, a constant score, or what `causal_effect` raises.
    """
    if len(measures) < 2:
        example = '{"refusal": (refusal_log_odds, harmful), "over-refusal": (refusal_log_odds, harmless)}.'
        raise GravlensError(f"{len(measures)} measure was given.", "Selectivity compares at least two.", example)
    conditions, effects = by_name(conditions), {}
    for name, (score, prompts) in measures.items():
        rng = np.random.default_rng(seed)  # started again, so that random directions are paired across measures
        effects[name] = causal_effect(
            model, conditions, score=score, prompts=prompts, n_random=n_random, rng=rng, states=states
        )
    spreads = {name: _spread(name, effect.baseline) for name, effect in effects.items()}
    rows = [_selective(condition, effects, spreads) for condition in conditions]
    return pd.concat(rows, ignore_index=True)


def _spread(name: str, baseline: Float[np.ndarray, " prompt"]) -> float:
    spread = float(baseline.std(ddof=1)) if len(baseline) > 1 else 0.0  # ddof=1 of one prompt is NaN and warns
    if not spread > 0:
        given = f"The measure {name} is constant over its {len(baseline)} prompts."
        raise GravlensError(
            given, "Effect sizes divide by the spread over prompts.", "more prompts, or a continuous score."
        )
    return spread


def _selective(condition: str, effects: Mapping[str, Effect], spreads: Mapping[str, float]) -> pd.DataFrame:
    units = np.array(list(spreads.values()))
    moved = np.array([effect.differences[condition].mean() for effect in effects.values()]) / units
    random = np.stack([effect.random[condition] for effect in effects.values()]) / units[:, None]
    margins, random_margins = _margins(moved[:, None])[:, 0], _margins(random)
    beyond = (random_margins >= margins[:, None]).sum(1)  # paired: draw i is one direction for all measures
    rows = pd.concat([effect.table[effect.table["condition"] == condition] for effect in effects.values()])
    n_random = random.shape[1]
    ends = {name: rows[name].to_numpy() / units for name in ("low", "high", "random_low", "random_high")}
    return pd.DataFrame(
        {"condition": condition, "measure": list(effects), "baseline": rows["baseline"].to_numpy(), "spread": units,
         "effect": moved, **ends, "p_random": rows["p_random"].to_numpy(), "margin": margins,
         "p_margin": (1 + beyond) / (1 + n_random) if n_random else np.nan, "n_random": n_random,
         "random_kind": rows["random_kind"].to_numpy(), "n_prompts": rows["n_prompts"].to_numpy()}
    )  # fmt: skip


def _margins(moved: Float[np.ndarray, "measure n"]) -> Float[np.ndarray, "measure n"]:
    size = np.abs(moved)
    return np.stack([size[i] - np.delete(size, i, axis=0).max(0) for i in range(len(size))])
