"""python analyses/calibrate_nulls.py

How often does each null reject where there is nothing to find, and how often where an alignment was planted? No model
is opened: histories are simulated as vectors in worlds whose truth is known, and the package's own nulls are held
against them. A null should reject at most at the nominal rate in the worlds that it assumes; what it does in the others
is its false alarms. Writes calibration.csv (null × world), null_power.csv (rejections by planted alignment) and
null_power.png, and prints the rates at 1 %. About four minutes of one free core; fewer --simulations are less exact.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import root_scalar
from tqdm.auto import tqdm

from gravlens.activations.residuals import Residuals
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import Trajectory, drift_per_prompt, follow
from gravlens.directions.vrev import locate_vrev
from gravlens.plot.style import CYCLE, GREY, MARKERS, STYLE, save_figure, words
from gravlens.stats.nulls import (
    NullDraws,
    compare,
    covariance_matched,
    isotropic,
    other_prompts,
    sample_covariance,
    sign_flips,
    swapped_labels,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

WIDTH, PROMPTS, RUNS, DRAWS = 128, 64, 8, 199  # with 199 draws (1 + k)/(1 + n) meets 1 % and 5 % exactly
PROMPT_NOISE = 2.0  # length of what one prompt adds, in units of what is common to all
AT_ONCE = 50  # histories that are simulated together
LEVELS = (0.01, 0.05)
HATCHES = ("", "////", "....", "xxxx")
PLANTED = tuple(round(0.1 * i, 1) for i in range(9))


@dataclass(frozen=True)
class World:
    """What the simulated histories are like; by default witness, anchor and runs are independent.

    Attributes:
        name: of the world.
        moves: participation ratio of the covariance that v_rev and the drifts come from; None: isotropic.
        states: that of the anchor's states, where it is another one.
        n_states: how many of the anchor's states (a prompt each) the nulls may use.
        witness: `common` to all probes, `shared_anchor` (witness, runs and anchor are independent endpoints of equal
            variance), or `labels` (of each probe by itself, so that witness and anchor could change places).
        runs: `independent`, `alike` (nearly one drift for all) or `prompts` (every prompt drifts by itself).
        others_noise: what one of the other prompts adds, in units of what a held-out one does.
        planted: alignment of every run's drift on the held-out prompts with v_rev.
    """

    name: str
    moves: float | None = 5.4
    states: float | None = None
    n_states: int = 2 * PROMPTS
    witness: str = "common"
    runs: str = "independent"
    others_noise: float = 1.0
    planted: float = 0.0


@dataclass(frozen=True, eq=False)
class Histories:
    """Simulated histories, one a layer: the nulls treat layers alike, so many are tested in one call."""

    world: World
    directions: Directions
    probes: Residuals
    held_out: Residuals
    others: Residuals
    all_runs: Trajectory
    one_run: Trajectory

    def samples(self) -> np.ndarray:
        """The anchor's states [prompt, layer, d_model] on both sets of prompts."""
        return np.concatenate([self.held_out.of("anchor"), self.others.of("anchor")])[: self.world.n_states]

    def drifts(self) -> np.ndarray:
        """Per-prompt drifts of the one run [prompt, layer, d_model] on both sets."""
        sets = (self.held_out, self.others)
        return np.concatenate([drift_per_prompt(one, "run0/1", self.directions.layers) for one in sets])


WORLDS = (
    World("isotropic", moves=None),
    World("anisotropic_34", moves=34),
    World("anisotropic_5.4"),
    World("anisotropic_2.5", moves=2.5),
    World("few_prompts", moves=34, n_states=32),
    World("other_spectrum", moves=2.5, states=34),
    World("shared_anchor", moves=None, witness="shared_anchor"),
    World("runs_alike", runs="alike"),
    World("labels_exchangeable", witness="labels"),
    World("prompts_independent", runs="prompts"),
    World("noisier_others", others_noise=8.0),
)
INDEPENDENT = {world.name for world in WORLDS} - {"shared_anchor"}
# The worlds in which a null's assumption holds, so that its rate has to be the nominal one (docs/nulls.md).
ASSUMED = {
    "isotropic": {"isotropic"},
    "covariance_matched": INDEPENDENT - {"other_spectrum", "anisotropic_34", "few_prompts"},
    "sample_covariance": INDEPENDENT - {"other_spectrum"},
    "drift_covariance": {"prompts_independent"},
    "weight_noise": INDEPENDENT - {"other_spectrum"},
    "sign_flips": INDEPENDENT - {"runs_alike"},
    "swapped_labels": {"labels_exchangeable"},
    "other_prompts": {world.name for world in WORLDS} - {"noisier_others"},
}
POWER_WORLDS = {"isotropic", "anisotropic_34", "anisotropic_5.4", "anisotropic_2.5", "labels_exchangeable"}


# -- simulated histories -----------------------------------------------------------------------------------------------


def spectrum(ratio: float | None) -> np.ndarray:
    """Standard deviations [d_model] whose variances i^(−a) have a participation ratio; their mean square is 1."""
    if ratio is None:
        return np.ones(WIDTH)
    rank = np.arange(1.0, WIDTH + 1)

    def excess(power: float) -> float:
        return float((rank**-power).sum() ** 2 / (rank ** (-2 * power)).sum() - ratio)

    power = root_scalar(excess, bracket=(0.0, 10.0)).root
    variance = rank**-power
    return np.sqrt(variance / variance.mean())


def simulate(world: World, number: int, rng: np.random.Generator) -> Histories:
    """So many histories of a world, a layer each."""
    spread = spectrum(world.moves).astype(np.float32)

    def normal(*shape: int) -> np.ndarray:
        return spread * rng.standard_normal((*shape, number, WIDTH), dtype=np.float32)

    common, drift = _endpoints(world, normal)
    apart, on_held_out = _plant(world, common, drift, PROMPT_NOISE * normal(PROMPTS))
    shared = np.float32(world.runs != "prompts")
    noise = PROMPT_NOISE * normal(RUNS, PROMPTS)
    on_others = world.others_noise * PROMPT_NOISE * normal(1, PROMPTS) + shared * drift[:1, None]
    states = spectrum(world.states or world.moves).astype(np.float32)
    states = states * rng.standard_normal((2, PROMPTS, number, WIDTH), dtype=np.float32)
    probes = _residuals("probes", {"witness": apart, "anchor": np.zeros_like(apart)})
    held_out = _with_runs("held out", states[0], noise + shared * on_held_out[:, None])
    directions = locate_vrev(probes)
    all_runs = follow(held_out, directions)
    one_run = replace(all_runs, data=all_runs.data.sel(run=["run0"]))
    others = _with_runs("others", states[1], on_others)
    return Histories(world, directions, probes, held_out, others, all_runs, one_run)


def _endpoints(world: World, normal: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Witness less anchor [layer, d_model], and each run less anchor [run, layer, d_model], common to all prompts."""
    witness, runs = normal(), normal(RUNS)
    if world.witness == "shared_anchor":
        anchor = normal()
        return witness - anchor, runs - anchor
    if world.runs == "alike":
        runs = normal() + 0.2 * runs
    return (0.0 if world.witness == "labels" else 1.0) * witness, runs


def _plant(world: World, common: np.ndarray, drift: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Witness less anchor of each probe, and each run's drift, turned to each other by the planted alignment."""
    rest = np.sqrt(1 - world.planted**2)
    if world.witness == "labels":  # there is no v_rev to turn a drift to: the probes are turned to the first run's
        length = np.linalg.norm(noise.mean(0), axis=-1, keepdims=True)
        return rest * noise + world.planted * length * _unit(drift[0]), drift
    length = np.linalg.norm(drift, axis=-1, keepdims=True)
    turned = length * (world.planted * _unit(common) + rest * _unit(drift))
    return common + noise, turned if world.planted else drift


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _residuals(prompts: str, states: dict[str, np.ndarray]) -> Residuals:
    values = np.stack(list(states.values()))
    return Residuals(values, tuple(states), tuple(range(values.shape[2])), prompts, {"dtype": ["float32"]})


def _with_runs(prompts: str, anchor: np.ndarray, drift: np.ndarray) -> Residuals:
    """Residuals of the anchor and of runs [run, prompt, layer, d_model] that have drifted from it, at step 1."""
    return _residuals(prompts, {"anchor": anchor} | {f"run{i}/1": anchor + one for i, one in enumerate(drift)})


# -- nulls -------------------------------------------------------------------------------------------------------------


def nulls_of(histories: Histories, rng: np.random.Generator) -> Iterator[NullDraws]:
    """Every null, drawn as a user would draw it."""
    one, step = {"draws": DRAWS, "rng": rng}, {"steps": (1,), "draws": DRAWS, "rng": rng}
    held_out, others, vs = histories.held_out, histories.others, histories.directions
    samples, drifts = histories.samples(), histories.drifts()
    # layers are histories here, so their draws have to be independent
    yield replace(isotropic(vs, **step, coherent=False), name="isotropic")
    yield covariance_matched(vs, samples, **step)
    yield sample_covariance(vs, samples, **step)
    yield covariance_matched(vs, drifts, **step, name="drift_covariance", centred=False)
    yield damage(histories, rng)
    yield sign_flips(histories.all_runs, **one)
    yield swapped_labels(histories.probes, held_out, run="run0", **one)
    yield other_prompts(held_out, others, vs, run="run0", **one)


def damage(histories: Histories, rng: np.random.Generator) -> NullDraws:
    """Weight noise without weights: one linear map makes a drift of Gaussian noise, the null's and the run's alike.

    In the world where the states have another spectrum than the moves, the noise follows the states'.
    """
    world = histories.world
    spread = spectrum(world.states or world.moves)
    drifts = spread * rng.standard_normal((DRAWS, WIDTH))
    cosines = _unit(drifts) @ histories.directions.vectors.T.astype(np.float64)
    return NullDraws("weight_noise", cosines[:, None], (1,), histories.directions.layers)


def p_values(histories: Histories, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Null -> p-value of each history, of its first run or of the mean over its runs."""
    found = {}
    for null in nulls_of(histories, rng):
        compared = compare(histories.all_runs if null.of == "mean" else histories.one_run, null)
        found[null.name] = compared.table.p_value.to_numpy()
    return found


def rejection_rates(world: World, *, simulations: int, rng: np.random.Generator) -> pd.DataFrame:
    """Columns `null, nominal, rejection_rate, n_simulations` in one world."""
    starts = range(0, simulations, AT_ONCE)
    parts = [p_values(simulate(world, min(AT_ONCE, simulations - start), rng), rng) for start in starts]
    rows = []
    for null in parts[0]:
        p = np.concatenate([part[null] for part in parts])
        # a p-value is a ratio of whole numbers: 2/200 is 1 %
        rows += [(null, level, float((p <= level + 1e-9).mean()), simulations) for level in LEVELS]
    return pd.DataFrame(rows, columns=["null", "nominal", "rejection_rate", "n_simulations"])


def calibrate(worlds: Iterable[World], *, simulations: int, rng: np.random.Generator) -> pd.DataFrame:
    """Rejection rates with nothing to find: `null, world, assumed, nominal, rejection_rate, n_simulations`."""
    frames = []
    for world in tqdm(list(worlds), "worlds"):
        rates = rejection_rates(world, simulations=simulations, rng=rng)
        assumed = [world.name in ASSUMED[null] for null in rates.null]
        frames.append(rates.assign(world=world.name, assumed=assumed))
    columns = ["null", "world", "assumed", "nominal", "rejection_rate", "n_simulations"]
    return pd.concat(frames, ignore_index=True)[columns]


def power(worlds: Iterable[World], *, simulations: int, rng: np.random.Generator) -> pd.DataFrame:
    """Rejection rates by planted alignment: `null, world, planted, nominal, rejection_rate, n_simulations`."""
    frames = []
    for world in tqdm(list(worlds), "power"):
        for planted in PLANTED:
            rates = rejection_rates(replace(world, planted=planted), simulations=simulations, rng=rng)
            kept = rates[(rates.null == "swapped_labels") == (world.witness == "labels")]
            frames.append(kept.assign(world=world.name, planted=planted))
    columns = ["null", "world", "planted", "nominal", "rejection_rate", "n_simulations"]
    return pd.concat(frames, ignore_index=True)[columns]


# -- figure and door ---------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw(calibration: pd.DataFrame, powers: pd.DataFrame) -> Figure:
    """Power at 1 % in each world, and the false alarms of the nulls of one drift by the spectrum."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots(2, 3, sharey=True).ravel()
    colours = (*CYCLE, "black", GREY)
    looks: dict[str, dict[str, Any]] = {
        null: {"color": colours[i], "marker": MARKERS[i], "ms": 3} for i, null in enumerate(ASSUMED)
    }
    chosen = powers[powers.nominal == LEVELS[0]]
    for ax, (world, rows) in zip(axes, chosen.groupby("world", sort=False), strict=False):
        for null, line in rows.groupby("null", sort=False):
            dashed = "-" if world in ASSUMED[str(null)] else ":"
            ax.plot(line.planted, line.rejection_rate, ls=dashed, label=words(null), **looks[str(null)])
        ax.axhline(LEVELS[0], color=GREY, linewidth=0.5)
        ax.set(title=f"world: {words(world)}", xlabel="planted alignment (cosine)", ylabel="rejected at 1 % (share)")
    _draw_false_alarms(axes[-1], calibration, {null: look["color"] for null, look in looks.items()})
    handles = {line.get_label(): line for ax in axes for line in ax.get_lines() if str(line.get_label())[0] != "_"}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure


def _draw_false_alarms(ax: Axes, calibration: pd.DataFrame, colours: Mapping[str, str]) -> None:
    worlds = ["isotropic", "anisotropic_34", "anisotropic_5.4", "anisotropic_2.5"]
    rows = calibration[calibration.world.isin(worlds) & (calibration.nominal == LEVELS[0])]
    for i, null in enumerate(["isotropic", "covariance_matched", "sample_covariance", "weight_noise"]):
        rates = rows[rows.null == null].set_index("world").rejection_rate.reindex(worlds)
        look = {"facecolor": colours[null], "hatch": HATCHES[i], "edgecolor": "white", "lw": 0}
        ax.bar(np.arange(len(worlds)) + 0.2 * i - 0.3, rates, 0.2, **look)
    ax.axhline(LEVELS[0], color=GREY, linewidth=0.5)
    ax.set_xticks(range(len(worlds)), ["isotropic", "34", "5.4", "2.5"])
    ax.set(title="nothing planted: false alarms", xlabel="participation ratio of states and drifts")


@app.command()
def main(
    simulations: Annotated[int, typer.Option(min=10, help="Simulated histories in each world.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the figure.")] = Path("."),
) -> None:
    """How often does each null reject where there is nothing to find, and how often where there is?"""
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    calibration = calibrate(WORLDS, simulations=simulations, rng=rng)
    calibration.to_csv(out / "calibration.csv", index=False)
    worlds = [world for world in WORLDS if world.name in POWER_WORLDS]
    powers = power(worlds, simulations=simulations // 10, rng=rng)
    powers.to_csv(out / "null_power.csv", index=False)
    save_figure(draw(calibration, powers), out / "null_power")
    shown = calibration[calibration.nominal == LEVELS[0]].pivot(index="world", columns="null", values="rejection_rate")
    shown = shown.loc[[world.name for world in WORLDS], list(ASSUMED)]
    typer.echo(f"rejected at 1 % of {simulations} histories with nothing to find:\n{shown.to_string()}")


if __name__ == "__main__":
    app()
