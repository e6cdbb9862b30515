"""Thresholds to stop a run at: how far it has moved, calibrated on null runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from jaxtyping import Float

from gravlens.core import display as html
from gravlens.core.errors import GravlensError
from gravlens.directions.trajectory import Trajectory

Statistic = Literal["fraction", "alignment"]


class CosineDraws(Protocol):
    """Draws of a run's cosine under a null hypothesis, such as `gravlens.stats.nulls.NullDraws`."""

    # A protocol, because training does not import stats.

    @property
    def name(self) -> str: ...
    @property
    def cosines(self) -> Float[np.ndarray, "draw step layer"]: ...
    @property
    def steps(self) -> tuple[int, ...]: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def of(self) -> str: ...


@dataclass(frozen=True)
class Threshold:
    """Stop a run when the mean over layers of a statistic exceeds a value at several evaluations in a row.

    Attributes:
        statistic: `fraction`, or `alignment` (not evaluated while the drift is too short for a cosine).
        value: the threshold, a fraction or a cosine.
        patience: evaluations in a row.
        quantile: probability that a null run stays below; None: the value was set by hand.
        n_runs: number of null runs.
        last_step: of the null runs; longer runs are refused. None: any run.
        layers: of the null runs' mean; None: any.
        source: name of the null runs.

    Examples:
        >>> monitor = gl.Monitor(vs, prompts, stop_above=gl.training.Threshold("fraction", 0.3, patience=2))
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
            given = f"Threshold({self.statistic!r}, {self.value}, patience={self.patience}) was given."
            wanted = f"The statistic is {' or '.join(get_args(Statistic))}, the value finite, patience at least 1."
            raise GravlensError(given, wanted, "calibrate(null runs), or Threshold('fraction', 0.3).")

    def _repr_html_(self) -> str:
        rows = [(name.replace("_", " "), value) for name, value in vars(self).items() if value is not None]
        return html.facts(rows, title="Threshold")


def calibrate(
    nulls: CosineDraws | Sequence[Trajectory],
    *,
    quantile: float = 0.99,
    statistic: Statistic | None = None,
    patience: int = 1,
    source: str = "null runs",
) -> Threshold:
    """Calibrate a threshold: a further null run exceeds it, at any step, with probability 1 − quantile at most.

    The statistic of a null run (or draw) is the largest value that it held for `patience` evaluations in a row; the
    threshold is the ⌈(n + 1) · quantile⌉-th smallest of these n values, a conformal quantile. The bound holds for one
    run that is exchangeable with the null runs: evaluated on the same probes, at the same steps.

    Args:
        nulls: trajectory of each null run (`Monitor.trajectory`, `follow`); or draws of one run's cosine
            (`weight_noise`).
        quantile: a probability.
        statistic: default: `fraction` for trajectories, `alignment` for draws, which are cosines.
        patience: evaluations in a row that a run must exceed the threshold at.
        source: name of the null runs; draws have their own.

    Raises:
        GravlensError: too few null runs for the quantile (.99 takes 99), null runs with different steps or layers,
            draws of the mean over runs, or null runs that never moved far enough for a cosine.

    Examples:
        >>> draws = gl.NullDraws("noise", rng.uniform(-0.1, 0.1, (99, 3, 3)), steps=(1, 5, 20), layers=(0, 1, 2))
        >>> threshold = gl.training.calibrate(draws, quantile=0.95)
        >>> threshold.statistic, threshold.value < 0.1
        ('alignment', True)
    """
    statistic = statistic or ("fraction" if isinstance(nulls, Sequence) else "alignment")
    if statistic not in get_args(Statistic):
        raise GravlensError(
            f"statistic={statistic!r} was given.", "A run is judged by one of two.", " or ".join(get_args(Statistic))
        )
    if isinstance(nulls, Sequence):
        values, steps, layers = _of_trajectories(nulls, statistic)
    else:
        source = nulls.name
        values, steps, layers = _of_draws(nulls, statistic)
    _check_enough(len(values), quantile, patience, len(steps))
    # The maximum over all steps pays for looking at every step; a window's minimum is what it held throughout.
    windows = np.lib.stride_tricks.sliding_window_view(values, patience, axis=1)
    largest = np.sort(windows.min(-1).max(1))
    value = float(largest[math.ceil((len(values) + 1) * quantile - 1e-9) - 1])  # 1e-9: (n + 1) · .99 is rounded
    if not math.isfinite(value):
        given = f"The {quantile} quantile of these null runs' {statistic} is {value}."
        wanted = "A cosine is defined only for runs that moved, and a value only for runs that did not diverge."
        raise GravlensError(given, wanted, "statistic='fraction', or null runs that train as the run does.")
    return Threshold(statistic, value, patience, quantile, len(values), steps[-1], layers, source)


Series = tuple[Float[np.ndarray, "run step"], tuple[int, ...], tuple[int, ...]]  # values, steps, layers


def _of_draws(null: CosineDraws, statistic: Statistic) -> Series:
    if null.of == "mean" or statistic != "alignment":
        raise GravlensError(
            f"Draws of {null.name} were given for one run's {statistic}"
            + (", and each is a mean over runs." if null.of == "mean" else "."),
            "Draws are cosines of one run.",
            "statistic='alignment' with draws of a run (weight_noise), or trajectories of null runs.",
        )
    values = null.cosines.mean(-1)
    # A draw without a cosine counts as infinite: dropping it would lower the threshold.
    return np.where(np.isnan(values), np.inf, values), null.steps, null.layers


def _of_trajectories(trajectories: Sequence[Trajectory], statistic: Statistic) -> Series:
    values: list[np.ndarray] = []
    steps: set[tuple[int, ...]] = set()
    layers: set[tuple[int, ...]] = set()
    for trajectory in trajectories:
        table = trajectory.layer_mean
        if table.prompts.nunique() > 1:
            raise _mixed(f"A trajectory on {' and '.join(sorted(table.prompts.unique()))} prompts was given.")
        layers.add(tuple(sorted(trajectory.layers_in_mean)))
        for _, rows in table.sort_values("step").groupby("run"):
            found = rows[statistic].to_numpy(float)
            found = np.where(np.isnan(found), np.inf, found)  # dropping a run that diverged would lower the threshold
            judged = rows.judged.to_numpy(bool) | (statistic != "alignment")
            values.append(np.where(judged, found, -np.inf))
            steps.add(tuple(map(int, rows.step)))
    if len(layers) > 1 or len(steps) > 1:
        raise _mixed(f"{len(values)} null runs of different steps or layers were given.")
    return np.array(values), next(iter(steps), ()), next(iter(layers), ())


def _mixed(given: str) -> GravlensError:
    wanted = "Null runs must share one set of prompts, the layers and the steps."
    return GravlensError(given, wanted, "calibrate one kind of null run at a time.")


def _check_enough(runs: int, quantile: float, patience: int, steps: int) -> None:
    if not 0 < quantile < 1 or patience < 1 or (runs and patience > steps):
        given = f"calibrate(quantile={quantile}, patience={patience}) was given, of runs with {steps} evaluations."
        wanted = "quantile must lie between 0 and 1, patience between 1 and the number of evaluations."
        raise GravlensError(given, wanted, "calibrate(null runs), with the defaults .99 and 1.")
    least = math.ceil(quantile / (1 - quantile) - 1e-9)  # rounded above a whole number, one run too many
    if runs < least:
        highest = f"quantile={math.floor(1000 * runs / (runs + 1)) / 1000:g} at most" if runs else "null runs"
        given = f"{runs} null runs were given for the {quantile} quantile."
        wanted = f"It takes {least}: a further run exceeds the maximum of n with probability 1 / (n + 1)."
        raise GravlensError(given, wanted, f"{least - runs} more null runs, or {highest}.")
