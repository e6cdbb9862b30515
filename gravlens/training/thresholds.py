"""When to stop a run: a threshold on how far it has moved, calibrated on runs that are null."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from gravlens.core import display as html
from gravlens.core.errors import GravlensError
from gravlens.directions.trajectory import Trajectory
from gravlens.stats.nulls import NullDraws

Statistic = Literal["fraction", "alignment"]


@dataclass(frozen=True)
class Threshold:
    """Stop where the layers' mean of a statistic exceeds a value at so many evaluations in a row.

    Attributes:
        statistic: `fraction`, or `alignment` (which exceeds nothing where it is not judged).
        value: what is exceeded, a fraction or a cosine.
        patience: evaluations in a row.
        quantile: probability that a null run stays below; None: the value was set by hand.
        n_runs: how many null runs it comes from.
        last_step: the null runs' last; a longer run is not watched with it. None: it serves any.
        layers: of the null runs' mean; None: it serves any.
        source: where it comes from.
    """

    statistic: Statistic
    value: float
    patience: int = 1
    quantile: float | None = None
    n_runs: int = 0
    last_step: int | None = None
    layers: tuple[int, ...] | None = None
    source: str = "set by hand"

    def __post_init__(self) -> None:
        if self.statistic not in get_args(Statistic) or self.patience < 1 or not math.isfinite(self.value):
            raise GravlensError(
                f"Threshold({self.statistic!r}, {self.value}, patience={self.patience}) was given.",
                f"The statistic is {' or '.join(get_args(Statistic))}, the value a number, patience at least 1.",
                "calibrate(null runs), or Threshold('fraction', 0.3).",
            )

    def _repr_html_(self) -> str:
        rows = [(name.replace("_", " "), value) for name, value in vars(self).items() if value is not None]
        return html.facts(rows, title="Threshold")


def calibrate(
    nulls: NullDraws | Sequence[Trajectory],
    *,
    quantile: float = 0.99,
    statistic: Statistic | None = None,
    patience: int = 1,
    source: str = "null runs",
) -> Threshold:
    """A threshold that a run like the null ones exceeds, at any of its steps, with probability 1 − quantile at most.

    Of each null run (or draw) the largest value is taken that it held for `patience` evaluations in a row; of these n
    values the ⌈(n + 1) · quantile⌉-th smallest is the threshold. This holds for one further run that is exchangeable
    with the null ones: watched on the same probes, at the same steps.

    Args:
        nulls: the trajectory of each null run (`Monitor.trajectory`, `follow`); or draws of one run's cosine, such as
            those of `weight_noise`.
        quantile: of the null runs' largest values, a probability.
        statistic: default: `fraction` of trajectories; draws are cosines, `alignment`.
        patience: evaluations in a row that a run must exceed the threshold at.
        source: the null runs in a word; draws have a name of their own.

    Raises:
        GravlensError: too few null runs for the quantile (.99 takes 99), null runs of different steps or layers, draws
            of the mean over runs, fewer evaluations than `patience`, or null runs that never moved far enough for a
            cosine to be judged.
    """
    drawn = isinstance(nulls, NullDraws)
    statistic = statistic or ("alignment" if drawn else "fraction")
    if statistic not in get_args(Statistic):
        raise GravlensError(
            f"statistic={statistic!r} was given.", "A run is judged by one of two.", " or ".join(get_args(Statistic))
        )
    values, steps, layers = _of_draws(nulls, statistic) if drawn else _of_trajectories(nulls, statistic)
    _check_enough(len(values), quantile, patience, len(steps))
    windows = np.lib.stride_tricks.sliding_window_view(values, patience, axis=1)
    largest = np.sort(windows.min(-1).max(1))
    value = float(largest[math.ceil((len(values) + 1) * quantile - 1e-9) - 1])
    if not math.isfinite(value):
        raise GravlensError(
            f"The {quantile} quantile of these null runs' {statistic} is {value}.",
            "Their drift has no cosine that is judged: they hardly moved (or diverged).",
            "statistic='fraction', or null runs that train as the run does.",
        )
    return Threshold(
        statistic, value, patience, quantile, len(values), steps[-1], layers, nulls.name if drawn else source
    )


Series = tuple[Float[np.ndarray, "run step"], tuple[int, ...], tuple[int, ...]]  # and its steps, and layers


def _of_draws(null: NullDraws, statistic: Statistic) -> Series:
    if null.of == "mean" or statistic != "alignment":
        raise GravlensError(
            f"Draws of {null.name} were given for one run's {statistic}"
            + (", and each is a mean over runs." if null.of == "mean" else "."),
            "Draws are cosines, and a monitor judges one run.",
            "statistic='alignment' with draws of a run (weight_noise), or trajectories of null runs.",
        )
    values = null.data.mean("layer", skipna=False).to_numpy()
    return np.where(np.isnan(values), np.inf, values), null.steps, null.layers  # no cosine: it must not lower the value


def _of_trajectories(trajectories: Sequence[Trajectory], statistic: Statistic) -> Series:
    values: list[np.ndarray] = []
    steps: set[tuple[int, ...]] = set()
    layers: set[tuple[int, ...]] = set()
    for trajectory in trajectories:
        table = trajectory.layer_mean
        if table.prompts.nunique() > 1:
            raise _unlike(f"A trajectory on {' and '.join(sorted(table.prompts.unique()))} prompts was given.")
        layers.add(tuple(sorted(trajectory.layers_in_mean)))
        for _, rows in table.sort_values("step").groupby("run"):
            found = rows[statistic].to_numpy(float)
            found = np.where(np.isnan(found), np.inf, found)  # a run that diverged must not lower the value
            judged = rows.judged.to_numpy(bool) | (statistic != "alignment")
            values.append(np.where(judged, found, -np.inf))
            steps.add(tuple(map(int, rows.step)))
    if len(layers) > 1 or len(steps) > 1:
        raise _unlike(f"{len(values)} null runs of different steps or layers were given.")
    return np.array(values), next(iter(steps), ()), next(iter(layers), ())


def _unlike(given: str) -> GravlensError:
    return GravlensError(
        given, "Null runs are watched alike: on one set of prompts, at the same layers and steps.", "those of one kind."
    )


def _check_enough(runs: int, quantile: float, patience: int, steps: int) -> None:
    if not 0 < quantile < 1 or patience < 1 or (runs and patience > steps):
        raise GravlensError(
            f"calibrate(quantile={quantile}, patience={patience}) was given, of runs with {steps} evaluations.",
            "A quantile lies between 0 and 1; patience is from 1 to the number of evaluations.",
            "calibrate(null runs) for .99 and 1.",
        )
    least = math.ceil(quantile / (1 - quantile) - 1e-9)
    if runs < least:
        highest = f"quantile={math.floor(1000 * runs / (runs + 1)) / 1000:g} at most" if runs else "null runs"
        raise GravlensError(
            f"{runs} null runs were given for the {quantile} quantile.",
            f"It takes {least}: a further run exceeds the largest of n with probability 1 / (n + 1).",
            f"{least - runs} more, or {highest}.",
        )
