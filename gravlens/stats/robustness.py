"""Does the conclusion depend on the choice? The same runs through every estimator and geometry, as one table."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from gravlens.activations.residuals import Residuals, check_states
from gravlens.directions.covariance import participation_ratio
from gravlens.directions.direction import Directions
from gravlens.directions.estimators import first_component, geometric_median, lda, logistic_probe
from gravlens.directions.geometry import GEOMETRIES, Fit, locate_in
from gravlens.directions.trajectory import ByLayer, follow
from gravlens.directions.vrev import Estimator, difference_of_means, locate_vrev
from gravlens.stats.nulls import isotropic_quantile

ESTIMATORS: tuple[Estimator, ...] = (difference_of_means, geometric_median, first_component, logistic_probe, lda)
FOLLOWED = ["alignment", "fraction", "judged"]
FACTS = ["layers", "witness_alignment", "reliability", "participation_ratio", "isotropic_p99"]


def compare_choices(
    probes: Residuals,
    held_out: Residuals | None = None,
    *,
    layers_in_mean: Sequence[int] | None = None,
    estimators: Sequence[Estimator] = ESTIMATORS,
    geometries: Sequence[Fit] = GEOMETRIES,
) -> ByLayer:
    """Alignment and fraction of every run under every choice of estimator and geometry.

    Layers without a v_rev in the raw residual stream are left out under every choice: a map can lengthen noise
    (docs/estimators.md).

    Args:
        probes: states that geometries are fitted and directions are estimated on; they hold witness and anchor.
        held_out: states of the runs on other prompts (default: on the probes).
        layers_in_mean: layers of the mean; default: all that are defined.
        estimators: (witness states, anchor states) -> direction.
        geometries: residuals of the probes -> `Geometry`.

    Returns:
        One row per estimator × geometry × run × step × layer, with `alignment, fraction, judged` of the trajectory;
        `layers` (number of layers in the row: fewer than asked for where the estimator finds no direction, 0 and NaN
        where it finds none at all); `witness_alignment` (the cosine of the witness's own mean difference: no run that
        goes straight back has more); `reliability` (split-half); `participation_ratio` (of the anchor's states in that
        geometry); `isotropic_p99` (of one layer in the raw geometry, else NaN). `.layer_mean` has the means over
        `layers_in_mean`.

    Raises:
        GravlensError: no run, no layer with a v_rev, a layer of the mean without one, too few prompts.
    """
    check_states(probes)
    defined = locate_vrev(probes).defined()
    mean = defined.layers if layers_in_mean is None else defined.at(layers_in_mean).layers
    sets = [_at_layers(one, defined.layers) for one in (probes, probes if held_out is None else held_out)]
    results = []
    for fit in geometries:
        geometry = fit(sets[0])
        mapped = [geometry.apply(one) for one in sets]
        ratios, lengths = _participation(mapped[0]), _lengths(mapped[0])
        p99 = isotropic_quantile(0.99, probes.values.shape[-1]) if geometry.name == "raw" else np.nan
        for estimator in estimators:
            directions = locate_in(geometry, sets[0], estimator=estimator)
            found = _followed(mapped[1], directions, mean, lengths)
            table = found.table.assign(participation_ratio=found.table["layer"].map(ratios), isotropic_p99=p99)
            ratio = float(np.mean([ratios[layer] for layer in mean]))
            means = found.layer_mean.assign(participation_ratio=ratio, isotropic_p99=np.nan)
            names = {"estimator": directions.directions[0].estimator, "geometry": geometry.name}
            results.append(ByLayer(table, means).assign(names))
    found = ByLayer.concat(results)
    return ByLayer(*(table[_columns(table)].astype({"judged": bool}) for table in (found.table, found.layer_mean)))


def _columns(table: pd.DataFrame) -> list[str]:
    places = [name for name in ("run", "prompts", "step", "layer") if name in table]
    return ["estimator", "geometry", *places, *FOLLOWED, *FACTS]


def final_choices(choices: ByLayer) -> pd.DataFrame:
    """Each choice's layer mean at each run's last step, averaged over runs: a row per estimator × geometry.

    Args:
        choices: result of `compare_choices`.

    Returns:
        Columns `estimator, geometry, alignment, fraction, witness_alignment, reliability, judged` (in all runs),
        `layers` (the fewest of a run), `runs`.
    """
    means = choices.layer_mean
    last = means[means["step"] == means.groupby("run")["step"].transform("max")]
    measures = {name: (name, "mean") for name in ("alignment", "fraction", "witness_alignment", "reliability")}
    facts = {"judged": ("judged", "all"), "layers": ("layers", "min")}
    grouped = last.groupby(["estimator", "geometry"], sort=False)
    return grouped.agg(**measures, **facts, runs=("run", "nunique")).reset_index()


def _at_layers(residuals: Residuals, layers: Sequence[int]) -> Residuals:
    columns = [residuals.layers.index(layer) for layer in layers]
    return replace(residuals, values=residuals.values[:, :, columns], layers=tuple(layers))


def _participation(residuals: Residuals) -> dict[int, float]:
    """layer -> participation ratio of the anchor's states."""
    states = residuals.of("anchor")
    return {layer: participation_ratio(states[:, i]) for i, layer in enumerate(residuals.layers)}


def _lengths(residuals: Residuals) -> dict[int, float]:
    """layer -> length of the witness's mean difference."""
    difference = np.linalg.norm(difference_of_means(residuals.of("witness"), residuals.of("anchor")), axis=-1)
    return dict(zip(residuals.layers, difference.tolist(), strict=True))


def _followed(residuals: Residuals, directions: Directions, mean: Sequence[int], lengths: dict[int, float]) -> ByLayer:
    """The trajectory with facts about its directions; NaN where no layer of the mean has a direction."""
    found = [v for v in directions if v.undefined is None]
    kept = [v.layer for v in found if v.layer in mean]
    if not kept:
        return _nothing(residuals, "given" if residuals.prompts == directions.directions[0].prompts else "held_out")
    followed = follow(residuals, directions, layers_in_mean=kept)
    facts = {
        "witness_alignment": {v.layer: v.distance / lengths[v.layer] for v in found},
        "reliability": {v.layer: v.reliability for v in found},
    }
    table, means = followed.table.assign(layers=1), followed.layer_mean.assign(layers=len(kept))
    for name, numbers in facts.items():
        table[name] = table["layer"].map(numbers)
        means[name] = np.mean([numbers[layer] for layer in kept])
    return ByLayer(table, means)


def _nothing(residuals: Residuals, prompts: str) -> ByLayer:
    """No layer, and a mean of NaN for each run and step, so that a choice without directions does not go missing."""
    rows = [(run, step) for run, steps in residuals.runs.items() for step in steps]
    means = pd.DataFrame(rows, columns=["run", "step"]).assign(prompts=prompts, alignment=np.nan, fraction=np.nan)
    means = means.assign(judged=False, layers=0, witness_alignment=np.nan, reliability=np.nan)
    return ByLayer(means.assign(layer=0)[:0], means)
