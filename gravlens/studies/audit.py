"""Reproduce the paper on organisms: make, measure and judge them, and write a results folder."""

import glob
import json
import platform
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from gravlens import __version__
from gravlens.core.files import write_atomically, write_json, write_table
from gravlens.organisms.base import UNBLOCKED, Organism
from gravlens.plot import lines as plots
from gravlens.plot.style import save_figure
from gravlens.reporting.page import write_report
from gravlens.reporting.paper import ARMS, CONTROLS
from gravlens.studies.evidence import Findings, findings_of
from gravlens.studies.experiment import carry_out
from gravlens.studies.study import Study

SCHEMA_VERSION = 2
FINALS = ("alignment_final", "fraction_final")
JUDGED = ("compliance_rate", "cut_share", "refusal_log_odds", "over_refusal")
BEHAVIOR = (*JUDGED, "task_loss", "seconds_per_step")
DAMAGE = ("organism", "damage", "alignment", "fraction", "drift_norm", "judged", "weight_norm", "score")
VREV = (
    *("organism", "layer", "distance", "reliability", "top_1", "top_3", "isotropic_top_3", "few_dimensions"),
    *("alignment_final", "alignment_without_top_3"),
)
DRAWN = ("isotropic", "weight_noise", "covariance_of_states", "independent_endpoints")  # in the figure
PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "scipy")


def reproduce(
    organisms: Mapping[str, Organism], out: Path, *, cache: Path, workers: int | None = None
) -> dict[str, Any]:
    """Make, measure and judge organisms, write a results folder, and return the content of `results.json`.

    Args:
        organisms: name -> organism; the name is a column of every table.
        out: results folder: `results.json`, CSVs, `figures/`, `report.html`, and a `SEQUENCE.toml` per organism.
        cache: folder of checkpoints and runs; complete ones are reused.
        workers: number of processes (default: as many as the organism's threads allow).
    """
    seconds: dict[str, float] = {}
    studies: dict[str, Study] = {}
    parts = []
    for name, organism in organisms.items():
        with _timed(seconds, f"make {name}"):
            studies[name] = carry_out(organism, cache, workers=workers)
        with _timed(seconds, f"judge {name}"):
            parts.append(findings_of(studies[name], organism=name))
    first, findings = next(iter(organisms.values())), Findings.concat(parts)
    with _timed(seconds, "tables"):
        results = summarise(findings, first)
    results["environment"] = environment(first, seconds)
    out.mkdir(parents=True, exist_ok=True)
    for name, table in vars(findings).items():
        write_table(out / f"{name}.csv", table)
    for name, study in studies.items():
        _write_sequence(study, out / f"{name if len(studies) > 1 else 'SEQUENCE'}.toml")
    draw_figures(findings, out / "figures")
    write_json(out / "results.json", results)
    write_report(out)
    return results


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Generator[None]:
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began


# --- results.json -----------------------------------------------------------------------------------------------
def summarise(findings: Findings, organism: Organism) -> dict[str, Any]:
    """Return the content of `results.json` (docs/results.md), without the environment."""
    unblocked = findings.trajectory[findings.trajectory.arm == UNBLOCKED]
    history = findings.behavior[findings.behavior.arm == "history"]
    return {
        "schema_version": SCHEMA_VERSION,
        "setting": organism.name,
        "organisms": findings.arms.organism.unique().tolist(),
        "n_anchors": int(findings.arms.organism.nunique()),
        "seeds": sorted(int(seed) for seed in findings.arms.seed.unique()),
        "layers": sorted(int(layer) for layer in unblocked.layer.unique()),
        "layers_in_mean": list(organism.layers_in_mean),
        "vrev": _records(findings.vrev, VREV),
        "alignment": _alignment(findings),
        "summary": _summary(findings.trajectory_layer_mean, organism.save_steps),
        "nulls": {name: _null(rows) for name, rows in findings.nulls_layer_mean.groupby("null")},
        "controls": {name: _spreads(findings.controls, "control", name, _control_columns(name)) for name in CONTROLS},
        "arms": {name: _spreads(findings.arms, "arm", name, FINALS + BEHAVIOR) for name in _arm_names(findings)},
        "history": {name: _spreads(history, "run", name, JUDGED) for name in ("witness", "anchor")},
        "claims": _claims(findings),
        "interval": _interval(findings.intervals_layer_mean),
        "damage": _records(findings.damage_layer_mean, DAMAGE),
    }


def _alignment(findings: Findings) -> list[dict[str, Any]]:
    """Return every unblocked run, prompt set, step and layer; the mean over layers has the layer null."""
    means = findings.trajectory_layer_mean.assign(layer=None)
    rows = pd.concat([findings.trajectory.astype({"layer": "Int64"}), means.astype({"layer": "Int64"})])
    rows = rows[rows.arm == UNBLOCKED].sort_values(["organism", "prompts", "run"], kind="stable")
    columns = ("run", "step", "layer", "prompts", "alignment", "projection", "fraction", "drift_norm")
    return _records(rows.assign(run=rows.organism + "/" + rows.run), columns)


def _interval(intervals: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the intervals of each organism's mean over runs and layers at the last step; a single run has null."""
    last = intervals[(intervals.step == intervals.step.max()) & (intervals.run == "mean")]
    return _records(last, ("organism", "measure", "estimate", "low", "high"))


def _claims(findings: Findings) -> list[dict[str, Any]]:
    """Return the verdict on each organism, with the demands of every level."""
    demands = {
        organism: _records(rows, ("level", "name", "holds", "figures"))
        for organism, rows in findings.demands.groupby("organism", sort=False)
    }
    verdicts = _records(findings.verdicts, ("organism", "level", "sentence", "capped_by"))
    return [{**verdict, "demands": demands[verdict["organism"]]} for verdict in verdicts]


def spread(values: pd.Series, organisms: pd.Series) -> dict[str, Any]:
    """Return mean ± SEM over runs, or over the anchors' means with several anchors: the anchor is then the unit."""
    values = values.astype(float)
    units = (values if organisms.nunique() == 1 else values.groupby(organisms).mean()).dropna().to_numpy()
    mean = float(units.mean()) if len(units) else None
    sem = float(stats.sem(units)) if len(units) > 1 else None
    return {"mean": mean, "sem": sem, "runs": values.tolist()}


def _summary(means: pd.DataFrame, steps: Sequence[int]) -> dict[str, Any]:
    rows = means[(means.arm == UNBLOCKED) & (means.prompts == "held_out")]
    named = {"first_step": steps[0], "step_20": 20, "final": steps[-1]}
    return {
        name: {
            measure: spread(rows[rows.step == step][measure], rows[rows.step == step].organism)
            for measure in ("alignment", "fraction")
        }
        for name, step in named.items()
    }


def _null(rows: pd.DataFrame) -> dict[str, Any]:
    by_step = rows.groupby("step").p99.mean()
    return {
        "p99": float(by_step.max()),
        "p99_by_step": {str(step): float(p99) for step, p99 in by_step.items()},
        "n_pairs": len(rows),
        "n_above": int(rows.above.sum()),
    }


def _control_columns(name: str) -> tuple[str, ...]:
    return (*FINALS, "closure_final") if name == "unaligned_twin" else FINALS


def _arm_names(findings: Findings) -> list[str]:
    more = [arm for arm in findings.arms.arm.unique() if arm not in (*ARMS, *CONTROLS)]
    return [*ARMS, *more]


def _spreads(table: pd.DataFrame, key: str, name: str, columns: Iterable[str]) -> dict[str, Any] | None:
    rows = table[table[key] == name]
    return None if rows.empty else {column: spread(rows[column], rows.organism) for column in columns}


def _records(table: pd.DataFrame, columns: Sequence[str]) -> list[dict[str, Any]]:
    return json.loads(table[list(columns)].to_json(orient="records"))


def environment(organism: Organism, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return versions, threads, and wall-clock seconds per phase."""
    return {
        "gravlens": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "threads": organism.threads,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


# --- files ------------------------------------------------------------------------------------------------------
def _write_sequence(study: Study, path: Path) -> None:
    """Write the history as a file for `gravlens locate` and the scripts of analyses/."""
    lines = [f"{name} = {_quoted(study.home.resolve() / name)}" for name in ("witness", "anchor")]
    for key, prompts in study.prompts.items():
        rows = "".join(json.dumps({"prompt": text}) + "\n" for text in prompts)
        write_atomically(path.parent / f"{path.stem}-{key}.jsonl", rows.encode())
        lines.append(f'{key} = "{path.stem}-{key}.jsonl"')
    lines += ["[runs]"]
    for name, run in study.with_runs().runs.items():
        folder = glob.escape(str(Path(str(run[0].source)).parent.resolve()))
        lines.append(f"{name} = {_quoted(folder + '/checkpoint-*')}")
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _quoted(path: Path | str) -> str:
    # TOML quotes strings as JSON does, but for non-ASCII
    return json.dumps(str(path), ensure_ascii=False)


def draw_figures(findings: Findings, folder: Path) -> None:
    """Draw the figures as PDF, SVG and PNG."""
    layers, means = (
        table[table.arm == UNBLOCKED].assign(run=table.organism + "/" + table.run)
        for table in (findings.trajectory, findings.trajectory_layer_mean)
    )
    nulls = findings.nulls_layer_mean[findings.nulls_layer_mean.null.isin(DRAWN)]
    history = findings.behavior[findings.behavior.arm == "history"].groupby("run").compliance_rate.mean()
    reference = {str(name): float(value) for name, value in history.items()}
    arms = findings.arms[~findings.arms.arm.isin(list(CONTROLS))]
    figures: dict[str, Callable[[], Any]] = {
        "alignment": lambda: plots.plot_alignment(means, nulls=nulls),
        "fraction": lambda: plots.plot_alignment(means, value="fraction"),
        "layers": lambda: plots.plot_layers(layers),
        "compliance_rate": lambda: plots.plot_arms(arms, measure="compliance_rate", reference=reference),
        "arm_fraction": lambda: plots.plot_arms(arms, measure="fraction_final"),
        "task_loss": lambda: plots.plot_arms(arms, measure="task_loss"),
    }
    for name, draw in figures.items():
        save_figure(draw(), folder / name, formats=("pdf", "svg", "png"))
