"""Robustness of a conclusion: the same runs under every estimator and geometry, as one table."""

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

    `probes` fit the geometries and the directions; the runs are followed on `held_out` (default: the probes). Layers
    without a v_rev in the raw residual stream are always left out: a map can lengthen noise (docs/estimators.md).

    Returns:
        One row per estimator × geometry × run × step × layer: `alignment, fraction, judged`; `layers` (number of layers
        in the row; 0 and NaN where the estimator finds no direction); `witness_alignment` (cosine of the witness's own
        mean difference, the ceiling of a run that goes straight back); `reliability` (split-half);
        `participation_ratio` (of the anchor's mapped states); `isotropic_p99` (one layer, raw geometry, else NaN).

    Examples:
        >>> choices = gl.stats.compare_choices(given, held_out, layers_in_mean=[0, 1])
        >>> gl.stats.final_choices(choices).columns.tolist()[:3]
        ['estimator', 'geometry', 'alignment']
    """
    check_states(probes)
    defined = locate_vrev(probes).defined()
    mean = defined.layers if layers_in_mean is None else defined.at(layers_in_mean).layers
    sets = []
    for one in (probes, probes if held_out is None else held_out):
        columns = [one.layers.index(layer) for layer in defined.layers]
        sets.append(replace(one, values=one.values[:, :, columns], layers=defined.layers))
    results = []
    for fit in geometries:  # the outer loop: a geometry is fitted and applied once for all estimators
        geometry = fit(sets[0])
        mapped = [geometry.apply(one) for one in sets]
        witness, anchor = mapped[0].of("witness"), mapped[0].of("anchor")
        ratios = {layer: participation_ratio(anchor[:, i]) for i, layer in enumerate(defined.layers)}
        difference = np.linalg.norm(difference_of_means(witness, anchor), axis=-1)
        lengths = dict(zip(defined.layers, difference.tolist(), strict=True))
        p99 = isotropic_quantile(0.99, probes.values.shape[-1]) if geometry.name == "raw" else np.nan
        for estimator in estimators:
            directions = locate_in(geometry, sets[0], estimator=estimator)
            found = _followed(mapped[1], directions, mean, lengths)
            table = found.table.assign(participation_ratio=found.table["layer"].map(ratios), isotropic_p99=p99)
            ratio = float(np.mean([ratios[layer] for layer in mean]))
            # a mean over layers has another p99
            means = found.layer_mean.assign(participation_ratio=ratio, isotropic_p99=np.nan)
            names = {"estimator": directions.directions[0].estimator, "geometry": geometry.name}
            results.append(ByLayer(table, means).assign(names))
    found = ByLayer.concat(results)
    columns = ["estimator", "geometry", "run", "prompts", "step", "layer", *FOLLOWED, *FACTS]
    means = [name for name in columns if name != "layer"]
    kinds = {"judged": bool}  # object, where a choice without directions was added
    return ByLayer(found.table[columns].astype(kinds), found.layer_mean[means].astype(kinds))


def final_choices(choices: ByLayer) -> pd.DataFrame:
    """Average each choice's layer mean at the last step over runs: a row per estimator × geometry.

    Columns `estimator, geometry, alignment, fraction, witness_alignment, reliability, judged` (in all runs), `layers`
    (the fewest of a run), `runs`.

    Examples:
        >>> choices = gl.stats.compare_choices(given, held_out, layers_in_mean=[0, 1])
        >>> gl.stats.final_choices(choices).runs.unique().tolist()
        [2]
    """
    means = choices.layer_mean
    last = means[means["step"] == means.groupby("run")["step"].transform("max")]
    measures = {name: (name, "mean") for name in ("alignment", "fraction", "witness_alignment", "reliability")}
    facts = {"judged": ("judged", "all"), "layers": ("layers", "min")}
    grouped = last.groupby(["estimator", "geometry"], sort=False)
    return grouped.agg(**measures, **facts, runs=("run", "nunique")).reset_index()


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
    """An empty table, and a mean of NaN per run and step, so that a choice without directions is not dropped."""
    rows = [(run, step) for run, steps in residuals.runs.items() for step in steps]
    means = pd.DataFrame(rows, columns=["run", "step"]).assign(prompts=prompts, alignment=np.nan, fraction=np.nan)
    means = means.assign(judged=False, layers=0, witness_alignment=np.nan, reliability=np.nan)
    return ByLayer(means.assign(layer=0)[:0], means)  # no rows, but the columns and dtypes to concatenate
