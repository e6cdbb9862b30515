"""Audit training histories: make what is to be made, measure and judge them, and write a results folder."""

import glob
import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from scipy import stats

from gravlens import __version__
from gravlens.claims.preregistration import Preregistration
from gravlens.core.errors import GravlensError, at_home
from gravlens.core.files import write_atomically, write_json, write_table
from gravlens.history.sequence import ModelSequence
from gravlens.organisms.base import UNBLOCKED, Organism
from gravlens.organisms.fetch import cache_folder
from gravlens.organisms.recorded import RecordedHistory, missing
from gravlens.plot import lines as plots
from gravlens.plot.style import axes_of, save_figure
from gravlens.reporting.page import write_report
from gravlens.reporting.paper import ARMS, CONTROLS
from gravlens.studies.evidence import Findings, findings_of
from gravlens.studies.experiment import carry_out
from gravlens.studies.study import Study

Histories: TypeAlias = ModelSequence | Path | str | Sequence[ModelSequence | Path | str] | Mapping[str, Organism]
SCHEMA_VERSION = 3
RANDOM = re.compile(r"^(\w+_random)_\d+$")  # the arms along single random directions
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


def audit(
    histories: Histories,
    out: Path | str,
    *,
    cache: Path | str | None = None,
    workers: int | None = None,
    preregistration: Preregistration | Path | str | None = None,
) -> dict[str, Any]:
    """Judge training histories with everything that they allow, write a results folder, return its `results.json`.

    Reads the states of all checkpoints, measures behavior at both ends and at the runs' last steps, draws every null,
    measures damage and geometry, and makes one claim on all histories together and one on each; the witness of each is
    a stranger to the others. Complete parts are cached, so an interrupted call resumes (docs/audit.md).

    Args:
        histories: a history or its SEQUENCE.toml, several of them, or name -> organism, which is made first.
        out: results folder: `results.json`, CSVs, `figures/`, `report.html`, and a `SEQUENCE.toml` per
            organism.
        cache: folder of checkpoints and measurements; default: GRAVLENS_CACHE.
        workers: number of processes (default: as many as the organisms' threads allow).
        preregistration: what was fixed before the runs, or its file (docs/power.md). Without it layers and step of
            runs that exist count as chosen afterwards.

    Raises:
        GravlensError: a history without runs, probes or held-out prompts, or a control of another shape.

    Examples:
        >>> results = gl.audit("SEQUENCE.toml", "results", cache="cache", workers=1)
        >>> 0 <= results["claims"][0]["level"] <= 5
        True
    """
    organisms, seconds, out = _organisms(histories), dict[str, float](), at_home(out)
    fixed = Preregistration.from_toml(preregistration) if isinstance(preregistration, Path | str) else preregistration
    with _timed(seconds, "make and measure"):
        studies = carry_out(organisms, at_home(cache or cache_folder()), workers=workers)
    with _timed(seconds, "judge"):
        findings = findings_of(studies, preregistration=fixed)
    first = next(iter(organisms.values()))
    results = summarise(findings, first) | {"missing": _missing(organisms)}
    results["environment"] = environment(first, seconds)
    out.mkdir(parents=True, exist_ok=True)
    for name, table in vars(findings).items():
        write_table(out / f"{name}.csv", table)
    made = {name: study for name, study in studies.items() if not isinstance(study.organism, RecordedHistory)}
    for name, study in made.items():  # of a recorded history its user has the file
        _write_sequence(study, out / f"{name if len(studies) > 1 else 'SEQUENCE'}.toml")
    draw_figures(findings, out / "figures")
    write_json(out / "results.json", results)
    write_report(out)
    return results


def _organisms(histories: Histories) -> Mapping[str, Organism]:
    """Name the histories: by their keys, else by the folders of their files."""
    found: Mapping[str, Organism]
    if isinstance(histories, Mapping):
        found = histories
    else:
        several = [histories] if isinstance(histories, ModelSequence | Path | str) else list(histories)
        stems = [Path(one).stem if isinstance(one, Path | str) else "history" for one in several]
        names = stems if len(set(stems)) == len(stems) else [f"{stem}{i}" for i, stem in enumerate(stems, 1)]
        found = {name: RecordedHistory(ModelSequence.of(one)) for name, one in zip(names, several, strict=True)}
    if not found:
        raise GravlensError("No history was given.", "An audit is of one at least.", "gl.audit('SEQUENCE.toml', out).")
    return found


def _missing(organisms: Mapping[str, Organism]) -> list[dict[str, Any]]:
    """Return the controls that recorded histories lack, the level that each opens, and the shortest way to it."""
    recorded = {name: one for name, one in organisms.items() if isinstance(one, RecordedHistory)}
    tables = [missing(one).assign(organism=name) for name, one in recorded.items()]
    return json.loads(pd.concat(tables).to_json(orient="records")) if tables else []


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
        "effects": _records(findings.effects, ("organism", "effect", "mean", "low", "high", "n", "unit")),
        "revised": {name: spread(rows.value, rows.organism) for name, rows in findings.revised.groupby("quantity")},
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
    verdicts = _records(findings.verdicts, ("organism", "level", "statement", "setting", "sentence", "capped_by"))
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
    """The arms of the paper's table, then the others; random directions are one arm together."""
    more = [arm for arm in findings.arms.arm.unique() if arm not in (*ARMS, *CONTROLS) and not RANDOM.match(arm)]
    return [*ARMS, *more]


def _spreads(table: pd.DataFrame, key: str, name: str, columns: Iterable[str]) -> dict[str, Any] | None:
    rows = table[table[key].str.replace(RANDOM, r"\1", regex=True) == name]
    return None if rows.empty else {column: spread(rows[column], rows.organism) for column in columns}


def _records(table: pd.DataFrame, columns: Sequence[str]) -> list[dict[str, Any]]:
    # by way of JSON: `to_dict` would keep NaN and numpy's scalars, which are no JSON
    return json.loads(table[list(columns)].to_json(orient="records"))


def environment(organism: Organism, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the command, if it was one, versions, threads, and wall-clock seconds per phase."""
    return {
        # of a call in Python, sys.argv is that of some other program
        "command": shlex.join(["gravlens", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "gravlens" else None,
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
    # runs that start elsewhere or learn other data are controls, and no arms to compare
    arms = findings.arms[~findings.arms.arm.isin(list(CONTROLS))]
    figures: dict[str, Callable[..., Any]] = {
        "alignment": lambda ax: plots.plot_alignment(means, nulls=nulls, ax=ax),
        "fraction": lambda ax: plots.plot_alignment(means, value="fraction", ax=ax),
        "layers": lambda ax: plots.plot_layers(layers, ax=ax),
        "compliance_rate": lambda ax: plots.plot_arms(arms, measure="compliance_rate", reference=reference, ax=ax),
        "arm_fraction": lambda ax: plots.plot_arms(arms, measure="fraction_final", ax=ax),
        "task_loss": lambda ax: plots.plot_arms(arms, measure="task_loss", ax=ax),
    }
    for name, draw in figures.items():
        save_figure(draw(axes_of(None, hidden=True)), folder / name, formats=("pdf", "svg", "png"))
