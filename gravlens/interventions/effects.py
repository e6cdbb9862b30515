"""Causal effects of interventions on a score: paired over prompts, against random directions of the same length."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float

from gravlens.activations.residuals import Residuals, read_residuals
from gravlens.behavior.scores import Score
from gravlens.core import display as html
from gravlens.core.errors import GravlensError, as_list, check_layer, of_kind, wrong_kind
from gravlens.core.progress import progress
from gravlens.directions.direction import Direction, Directions, Span, Spans, Subspaces, each
from gravlens.directions.subspaces import random_like
from gravlens.history.encoding import encode, prompts_digest
from gravlens.history.prompts import PromptSet
from gravlens.interventions.edits import Ablate, Intervention, Steer, check_intervention
from gravlens.interventions.hooks import intervene
from gravlens.models.opening import Openable, OpenModel, open_model

__all__ = ["DoseResponse", "Effect", "dose_response", "layerwise_effect", "measure_selectivity"]


Condition: TypeAlias = Intervention | Sequence[Intervention]
Make: TypeAlias = Callable[[Any], Intervention]
Matching: TypeAlias = Residuals | Literal["isotropic"] | None  # what random directions are drawn from
Clouds: TypeAlias = Mapping[int, Float[np.ndarray, "prompt d_model"]]  # layer -> centred states
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
    __repr__ = html.brief

    def largest(self, *, sign: Literal[1, -1] = 1, rng: np.random.Generator | None = None) -> pd.Series:
        """Return the condition with the largest increase (sign −1: decrease), corrected for the choice.

        Returns:
            Its row of `table`, with `low`, `high` from a 95 % band that holds for all conditions at once (bootstrap
            over prompts, max-t: Romano and Wolf 2005; rng: default seeded with 0), and `p_largest`, one-sided,
            (1 + k)/(1 + n): the largest increase among the conditions, k of n draws reaching it in theirs.
        """
        # Draw i is one set of directions for all conditions, so its own largest is what chance alone would have named.
        moved = sign * np.stack([self.differences[name] for name in self.differences])
        random = sign * np.stack([self.random[name] for name in self.random])
        at = int(moved.mean(1).argmax())
        row = self.table.iloc[at].copy()
        row["low"], row["high"] = sorted(sign * bound for bound in _band(moved, rng or np.random.default_rng(0))[:, at])
        reached = int((random.max(0) >= moved[at].mean()).sum())
        row["p_largest"] = (1 + reached) / (1 + random.shape[1]) if random.shape[1] else float("nan")
        return row

    def contrast(self, one: str, other: str, *, rng: np.random.Generator | None = None) -> pd.Series:
        """Return the effect of one condition minus another's, paired over prompts and random draws.

        Fields as in `table`: `difference` with its 95 % bootstrap interval, `p_random` (two-sided) and the random range
        of the same contrast. GravlensError for an unknown condition.
        """
        for name in (one, other):
            if name not in self.differences:
                given, known = f"There is no condition {name!r}.", ", ".join(self.differences)
                raise GravlensError(given, f"Conditions: {known}.", "one of these.")
        pairs = (self.differences[one] - self.differences[other], self.random[one] - self.random[other])
        return pd.Series(summarise(*pairs, rng=rng or np.random.default_rng(0)), name=f"{one} − {other}")

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
    states: Matching = None,
) -> Effect:
    """Measure the effect of interventions on a score, with random directions as controls (docs/effects.md).

    A control is the same intervention along random unit vectors (or random subspaces of the same rank), at the same
    layers, distances and strengths. Draw i is one random mixture of the states for all layers and conditions, so its
    vectors in neighbouring blocks are as alike as the states are.

    Args:
        model: scored 1 + conditions · (1 + n_random) times on all prompts (22 times for one condition), and read once
            without `states`; where that is long, a line says how long after the first scoring.
        conditions: name -> an intervention, or several that act together; a single intervention is named by its class.
        score: (model, prompts) -> one number per prompt, such as `refusal_log_odds`.
        prompts: held out: not those that the directions were estimated on.
        n_random: random draws per condition; the smallest p is 1/(1 + n_random).
        rng: for the draws and the bootstrap; default: seeded with 0.
        states: residuals with `anchor` at the conditions' layers: random directions have the covariance of its states
            over prompts. Default: of this model's own states on these prompts, at the last prompt token.
            `"isotropic"`: uniformly random directions, a weak control.

    Raises:
        GravlensError: no condition, a score that is not one finite number per prompt, states that do not vary, without
            one of the layers or of too low a rank for a subspace, or what `intervene` raises.

    Examples:
        >>> effect = gl.causal_effect(model, {"ablated": gl.Ablate(vs[2])}, score=gl.refusal_log_odds, prompts=prompts)
        >>> effect.table[["condition", "n_prompts", "n_random"]].values.tolist()
        [['ablated', 6, 20]]
    """
    conditions = by_name(conditions)
    opened, prompts = open_model(model), PromptSet.of(prompts)
    rng = rng or np.random.default_rng(0)
    measure = partial(_scores, opened, score, prompts)
    seeds = rng.integers(2**63, size=n_random)  # shared by the conditions: their controls are paired
    began = time.monotonic()
    baseline = measure(())
    each = time.monotonic() - began  # the other scorings take as long
    twin = _twins_of(conditions, _clouds(states, opened, prompts, conditions) if n_random else None)
    rows, random, differences = [], {}, {}
    total = len(conditions) * (1 + n_random)
    work = f"{total} scoring{'s' * (total != 1)} of {len(prompts)} prompts"
    with progress("effects", total=total, unit="scoring", work=work, seconds=total * each) as bar:
        for name, condition in conditions.items():
            together = as_list(condition)
            differences[name] = measure(together) - baseline
            bar.update()
            drawn = np.empty((n_random, len(baseline)))
            for draw, seed in enumerate(seeds):
                drawn[draw] = measure(twin(together, int(seed))) - baseline
                bar.update()
            random[name] = drawn.mean(1)
            numbers = summarise(differences[name], random[name], rng=rng) | crossings(
                baseline, differences[name], drawn
            )
            rows.append({"condition": name, "layer": _layer(together), "baseline": baseline.mean(), **numbers})
    table = pd.DataFrame(rows).astype({"layer": "Int64"})  # nullable: <NA> for several layers
    table.insert(3, "with_intervention", table["baseline"] + table["difference"])
    table["random_kind"] = "isotropic" if isinstance(states, str) else "covariance_matched"
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
    states: Matching = None,
) -> Effect:
    """Sweep an intervention over layers, one layer at a time; draws are seeded with 0 (docs/effects.md).

    Args:
        model: as for `causal_effect`, like all arguments not listed here.
        directions: one direction or subspace per layer; undefined layers are skipped.
        intervention: direction -> intervention (`Ablate`), or several by name
            (`{"strength 0.5": partial(Steer, strength=0.5)}`).

    Returns:
        One row per intervention and layer; keys of `random` and `differences`: `"{condition}, layer {l}"`.

    Examples:
        >>> effect = gl.effects.layerwise_effect(model, vs, score=gl.refusal_log_odds, prompts=prompts, n_random=2)
        >>> effect.table.layer.tolist()
        [0, 1, 2]
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
        slope: least-squares slope of the mean difference by strength, through 0 at strength 0, with `low`, `high` (95 %
            bootstrap over prompts), `p_random` and the random range as in `Effect`.
        spearman: rank correlation of strength and mean score, strength 0 included; NaN for a constant score.
        spearman_interval: its 95 % bootstrap interval over prompts.
        spearman_prompts: the same per prompt.
        spearman_random: the same per random draw; a draw keeps its directions at all strengths.
    """

    effect: Effect
    slope: pd.Series
    spearman: float
    spearman_interval: tuple[float, float]
    spearman_prompts: Float[np.ndarray, " prompt"]
    spearman_random: Float[np.ndarray, " draw"]
    __repr__ = html.brief

    @property
    def table(self) -> pd.DataFrame:
        return self.effect.table

    def _repr_html_(self) -> str:
        slope, (low, high) = self.slope, self.spearman_interval
        notes = [
            f"score: {self.table.attrs.get('score')}; slope {slope['difference']:+.3f} per unit of strength "
            f"[{slope['low']:+.3f}, {slope['high']:+.3f}]",
            f"Spearman with strength: {self.spearman:.3f} [{low:.3f}, {high:.3f}]",
        ]
        return html.of_frame(_shown(self.table), title="DoseResponse", notes=notes)


def dose_response(
    model: Openable,
    directions: Direction | Directions,
    strengths: Sequence[float],
    *,
    score: Score,
    prompts: PromptSet | Sequence[str],
    n_random: int = 20,
    states: Matching = None,
) -> DoseResponse:
    """Steer at several strengths and compare the dose–response with that of random directions (docs/effects.md).

    A random direction often moves a score monotonically as well, so judge the size of the effect with its order.

    Args:
        model: as for `causal_effect`, like all arguments not listed here.
        directions: steered together, each at its layer.
        strengths: at least two, none of them 0 (the baseline), in units of each direction's distance.

    Examples:
        >>> curve = gl.effects.dose_response(
        ...     model, vs[1], [-1, 1], score=gl.refusal_log_odds, prompts=prompts, n_random=2
        ... )
        >>> curve.effect.table.strength.tolist()
        [-1.0, 1.0]
    """
    doses = sorted(set(map(float, as_list(strengths))))
    if len(doses) < 2 or 0 in doses:
        given = f"strengths={strengths} was given."
        raise GravlensError(
            given, "Two or more, besides 0 (the baseline), are needed.", "strengths=[-1, -0.5, 0.5, 1]."
        )
    conditions = {f"strength {dose:g}": Steer(directions, dose) for dose in doses}
    effect = causal_effect(model, conditions, score=score, prompts=prompts, n_random=n_random, states=states)
    along_prompts, random = (
        np.stack([part[name] for name in conditions]) for part in (effect.differences, effect.random)
    )
    least_squares, rng = np.array(doses) / np.square(doses).sum(), np.random.default_rng(0)
    return DoseResponse(
        replace(effect, table=effect.table.assign(strength=doses)),
        pd.Series(summarise(least_squares @ along_prompts, least_squares @ random, rng=rng), name="slope"),
        float(_spearman(doses, along_prompts.mean(1, keepdims=True))[0]),
        _spearman_interval(doses, along_prompts, rng),
        _spearman(doses, along_prompts),
        _spearman(doses, random),
    )


def _spearman_interval(
    doses: Sequence[float], differences: Float[np.ndarray, "dose prompt"], rng: np.random.Generator
) -> tuple[float, float]:
    n = differences.shape[1]
    if n < 2:
        return float("nan"), float("nan")
    drawn = _spearman(doses, differences @ rng.multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP).T / n)
    low, high = np.quantile(drawn, (0.025, 0.975)) if np.isfinite(drawn).all() else (np.nan, np.nan)
    return float(low), float(high)


def _spearman(doses: Sequence[float], differences: Float[np.ndarray, "dose n"]) -> Float[np.ndarray, " n"]:
    """Rank correlation of each column with the dose, including the baseline (difference 0 at dose 0)."""
    curves = np.vstack([np.zeros(differences.shape[1]), differences])
    parts = (np.array([0.0, *doses])[:, None], curves)
    x, y = (scipy.stats.rankdata(one, axis=0) - (len(curves) + 1) / 2 for one in parts)
    with np.errstate(invalid="ignore"):  # a constant curve has none
        return (x * y).sum(0) / np.sqrt((x**2).sum(0) * (y**2).sum(0))


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


def _twins_of(
    conditions: Mapping[str, Condition], clouds: Clouds | None
) -> Callable[[Sequence[Intervention], int], list[Intervention]]:
    """(interventions, seed of a draw) -> the same interventions along random spans, at the same layers and distances.

    All layers and conditions of a draw share one mixture of the states. Different spans in one layer need mixtures of
    their own, or their replacements would coincide: each gets the first number that is free in all its layers.
    """
    layers: dict[bytes, set[int]] = {}
    for span in _spans_of(conditions):
        layers.setdefault(span.basis.tobytes(), set()).add(span.layer)
    number: dict[bytes, int] = {}
    for key, own in layers.items():
        taken = {number[other] for other in number if own & layers[other]}
        number[key] = next(i for i in count() if i not in taken)

    def twins(interventions: Sequence[Intervention], seed: int) -> list[Intervention]:
        shared: dict[bytes, list[int]] = {}
        for span in _spans_of({"": interventions}):
            shared.setdefault(span.basis.tobytes(), []).append(span.layer)

        def twin(span: Span) -> Span:
            key = span.basis.tobytes()
            # A vector that acts at several layers is replaced by one vector, a mixture of these layers' summed states.
            own = dict.fromkeys(shared[key])
            cloud = None if clouds is None else np.sum([clouds[layer] for layer in own], axis=0)
            return _replacement(span, np.random.default_rng([seed, number[key]]), cloud)

        return [one.with_directions(_like(one.directions, map(twin, each(one.directions)))) for one in interventions]

    return twins


def _spans_of(conditions: Mapping[str, Condition]) -> list[Span]:
    together = (one for condition in conditions.values() for one in as_list(condition))
    return [span for one in together for span in each(one.directions)]


def _like(given: Span | Spans, spans: Iterable[Span]) -> Spans:
    made: Any = tuple(spans)
    return Directions(made) if isinstance(given, Direction | Directions) else Subspaces(made)


def _replacement(span: Span, rng: np.random.Generator, cloud: Float[np.ndarray, "prompt d_model"] | None) -> Span:
    twin = random_like(span, rng=rng, states=None if cloud is None else cloud[:, None])
    if twin.basis.shape != span.basis.shape:
        given = f"States that span {len(twin.basis)} dimensions were given for a subspace of rank {len(span.basis)}."
        wanted = "A random subspace of the same rank needs the states of more prompts than its rank."
        raise GravlensError(given, wanted, 'states on more prompts, or states="isotropic".')
    return replace(twin, layer=span.layer, distance=span.distance)


def _clouds(
    states: Matching, model: OpenModel, prompts: PromptSet, conditions: Mapping[str, Condition]
) -> Clouds | None:
    """The states that random directions are mixtures of, centred per layer; None for isotropic ones."""
    if isinstance(states, str):
        if states == "isotropic":
            return None
        given, wanted = f"states={states!r} was given.", 'Residuals, or "isotropic" for uniformly random directions.'
        raise GravlensError(given, wanted, "states=cache_residuals(sequence), or leave it out.")
    layers = sorted({span.layer for span in _spans_of(conditions)})
    states = own_states(model, [prompts], layers) if states is None else states
    of_kind(states, Residuals, "States are Residuals.", "states=cache_residuals(sequence), or leave it out.")
    if missing := [layer for layer in layers if layer not in states.layers]:
        given = f"The states do not contain layer {missing[0]}, only {list(states.layers)}."
        remedy = "cache_residuals(sequence, prompts)."
        raise GravlensError(given, "Random directions are drawn from states at their layers.", remedy)
    anchor = states.of("anchor")
    if len(anchor) < 2:
        given, wanted = "The states of one prompt were given.", "Random directions are drawn from how states vary."
        raise GravlensError(given, wanted, 'states=cache_residuals(sequence) of the probes, or states="isotropic".')
    at = {layer: anchor[:, states.layers.index(layer)].astype(np.float64) for layer in layers}
    return {layer: one - one.mean(0) for layer, one in at.items()}


def own_states(model: OpenModel, sets: Sequence[PromptSet], layers: Sequence[int]) -> Residuals:
    """States of one open model at the last prompt token, all prompts in a row, in the role of `anchor`."""
    ids = [one for prompts in sets for one in encode(model.tokenizer, prompts)]
    values = read_residuals(model, ids, layers=[check_layer(layer, model.n_layers) for layer in layers]).numpy()
    return Residuals(values[None], ("anchor",), tuple(layers), prompts_digest(ids))


def _band(moved: Float[np.ndarray, "condition prompt"], rng: np.random.Generator) -> Float[np.ndarray, "2 condition"]:
    """95 % band of the conditions' means, all at once: ± the same multiple of each one's standard error."""
    n = moved.shape[1]
    if n < 2:
        return np.full((2, len(moved)), np.nan)
    mean = moved.mean(1)
    means = rng.multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP) @ moved.T / n
    error = means.std(0)
    # a condition that moves all prompts alike has no error, and so its bounds are its mean
    multiple = np.quantile(np.max(np.abs(means - mean) / np.where(error > 0, error, np.inf), axis=1), 0.95)
    return np.stack([mean - multiple * error, mean + multiple * error])


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
    states: Matching = None,
) -> pd.DataFrame:
    """Compare the effect sizes of an intervention on several behaviours: does it move one more than the others?

    Args:
        model: as for `causal_effect`, like all arguments not listed here.
        conditions: likewise.
        measures: name -> a score and its prompts, at least two: refusal on harmful prompts, over-refusal on harmless
            ones, log-likelihood of a task's answers.
        seed: of the draws. Draw i is the same set of directions for every measure.
        states: default: of this model's own states on the prompts of all measures.

    Returns:
        One row per condition and measure: `baseline` (mean), `spread` (standard deviation over prompts without
        intervention), `effect` (effect size: mean difference / spread) with its interval `low`, `high`; `random_low`,
        `random_high`, `p_random`, `n_random`, `random_kind`, `n_prompts` as in `Effect`; `margin`, |effect| minus the
        largest |effect| of the other measures, and `p_margin`, its p-value (1 + k)/(1 + n) against random directions.

    Raises:
        GravlensError: fewer than two measures, a constant score, or what `causal_effect` raises.

    Examples:
        >>> harmless = [example.prompt for example in examples]
        >>> measures = {"refusal": (gl.refusal_log_odds, prompts), "over-refusal": (gl.refusal_log_odds, harmless)}
        >>> table = gl.effects.measure_selectivity(model, gl.Ablate(vs[1]), measures, n_random=2)
        >>> len(table) > 0
        True
    """
    if len(measures) < 2:
        example = '{"refusal": (refusal_log_odds, harmful), "over-refusal": (refusal_log_odds, harmless)}.'
        raise GravlensError(f"{len(measures)} measure was given.", "Selectivity compares at least two.", example)
    conditions, effects, opened = by_name(conditions), {}, open_model(model)
    if states is None and n_random:  # one cloud for all measures: draws are paired across them
        sets = [PromptSet.of(prompts) for _, prompts in measures.values()]
        states = own_states(opened, sets, sorted({span.layer for span in _spans_of(conditions)}))
    for name, (score, prompts) in measures.items():
        rng = np.random.default_rng(seed)  # started again, so that random directions are paired across measures
        effects[name] = causal_effect(
            opened, conditions, score=score, prompts=prompts, n_random=n_random, rng=rng, states=states
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
