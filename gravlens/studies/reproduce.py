"""The main job: make a history, follow it, hold it against nulls and controls, block it, show it beside the paper."""

import glob
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from gravlens import __version__
from gravlens.core.files import write_atomically, write_json, write_table
from gravlens.organisms.base import Setting
from gravlens.plot import lines as plots
from gravlens.plot.style import save_figure
from gravlens.reporting.page import write_report
from gravlens.reporting.paper import ARMS, CONTROLS
from gravlens.studies.evidence import Findings, findings_of
from gravlens.studies.experiment import carry_out, home_of, sequence_of

SCHEMA_VERSION = 1
FINALS = ("alignment_final", "fraction_final")
BEHAVIOR = ("harmfulness", "refusal_log_odds", "over_refusal", "task_loss", "seconds_per_step")
DAMAGE = ("organism", "damage", "alignment", "fraction", "drift_norm", "judged", "weight_norm", "score")
DRAWN = ("isotropic", "weight_noise", "covariance_of_states", "independent_endpoints")  # in the figure
PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "scipy")


def reproduce(settings: Mapping[str, Setting], out: Path, *, cache: Path, workers: int | None = None) -> dict[str, Any]:
    """Carry out one setting or several (organism name -> setting), write a results folder, and return `results.json`.

    Args:
        settings: the histories; each name is a column value of every table.
        out: results folder: `results.json`, CSVs, `figures/`, `report.html`, `SEQUENCE.toml` of each history.
        cache: where checkpoints and runs lie; what is complete there is not made again.
        workers: processes at a time (default: as many as the setting's threads allow).
    """
    seconds: dict[str, float] = {}
    parts = []
    for name, setting in settings.items():
        began = time.perf_counter()
        home = carry_out(setting, cache, workers=workers)
        seconds[f"make {name}"] = time.perf_counter() - began
        began = time.perf_counter()
        parts.append(findings_of(setting, home, organism=name))
        seconds[f"judge {name}"] = time.perf_counter() - began
    began = time.perf_counter()
    findings = Findings.concat(parts)
    setting = next(iter(settings.values()))
    results = summarise(findings, setting)
    seconds["tables"] = time.perf_counter() - began
    results["environment"] = environment(setting, seconds)
    out.mkdir(parents=True, exist_ok=True)
    write_tables(findings, results, out)
    for name, one in settings.items():
        _write_sequence(one, home_of(one, cache), out / f"{name}.toml" if len(settings) > 1 else out / "SEQUENCE.toml")
    draw_figures(findings, out / "figures")
    write_json(out / "results.json", results)
    write_report(out)
    return results


# --- results.json -----------------------------------------------------------------------------------------------
def summarise(findings: Findings, setting: Setting) -> dict[str, Any]:
    """The content of `results.json` (docs/results.md), without the environment."""
    unblocked = findings.trajectory[findings.trajectory.arm == "unblocked"]
    history = findings.behavior[findings.behavior.arm == "history"]
    return {
        "schema_version": SCHEMA_VERSION,
        "setting": setting.name,
        "organisms": findings.arms.organism.unique().tolist(),
        "n_anchors": int(findings.arms.organism.nunique()),
        "seeds": sorted(int(seed) for seed in findings.arms.seed.unique()),
        "layers": sorted(int(layer) for layer in unblocked.layer.unique()),
        "layers_in_mean": list(setting.layers_in_mean),
        "alignment": _alignment(findings),
        "summary": _summary(findings.trajectory_layer_mean, setting.save_steps),
        "nulls": {name: _null(rows) for name, rows in findings.nulls_layer_mean.groupby("null")},
        "controls": {name: _spreads(findings.controls, "control", name, _control_columns(name)) for name in CONTROLS},
        "arms": {name: _spreads(findings.arms, "arm", name, FINALS + BEHAVIOR) for name in _arm_names(findings)},
        "history": {name: _spreads(history, "run", name, BEHAVIOR[:3]) for name in ("witness", "anchor")},
        "checks": checks(findings),
        "claims": _claims(findings),
        "interval": _interval(findings.intervals_layer_mean),
        "damage": _records(findings.damage_layer_mean, DAMAGE),
    }


def _alignment(findings: Findings) -> list[dict[str, Any]]:
    """Every unblocked run, prompt set, step and layer; the mean over layers has the layer null."""
    means = findings.trajectory_layer_mean.assign(layer=None)
    rows = pd.concat([findings.trajectory.astype({"layer": "Int64"}), means.astype({"layer": "Int64"})])
    rows = rows[rows.arm == "unblocked"].sort_values(["organism", "prompts", "run"], kind="stable")
    columns = ("run", "step", "layer", "prompts", "alignment", "projection", "fraction", "drift_norm")
    return _records(rows.assign(run=rows.organism + "/" + rows.run), columns)


def _interval(intervals: pd.DataFrame) -> list[dict[str, Any]]:
    """Of each organism's mean over runs and layers at the last step; null where one run has none."""
    last = intervals[(intervals.step == intervals.step.max()) & (intervals.run == "mean")]
    return _records(last, ("organism", "measure", "estimate", "low", "high"))


def _claims(findings: Findings) -> list[dict[str, Any]]:
    """The verdict on each organism, with what each level demands."""
    demands = {
        organism: _records(rows, ("level", "name", "holds", "figures"))
        for organism, rows in findings.demands.groupby("organism", sort=False)
    }
    verdicts = _records(findings.verdicts, ("organism", "level", "sentence", "capped_by"))
    return [{**verdict, "demands": demands[verdict["organism"]]} for verdict in verdicts]


def spread(values: pd.Series, organisms: pd.Series) -> dict[str, Any]:
    """Mean ± SEM over runs; with several anchors over the anchors' means, since the anchor is then the unit."""
    values = values.astype(float)
    units = (values if organisms.nunique() == 1 else values.groupby(organisms).mean()).dropna().to_numpy()
    mean = float(units.mean()) if len(units) else None
    sem = float(stats.sem(units)) if len(units) > 1 else None
    return {"mean": mean, "sem": sem, "runs": values.tolist()}


def _summary(means: pd.DataFrame, steps: Sequence[int]) -> dict[str, Any]:
    rows = means[(means.arm == "unblocked") & (means.prompts == "held_out")]
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


def checks(findings: Findings) -> list[dict[str, Any]]:
    """What the paper's picture says, held against each organism, with the figures; a seed where it fails is shown.

    `holds` is None where there is nothing to block: the unblocked runs' harm is not above the anchor's.
    """
    rows = []
    for organism, arms in findings.arms.groupby("organism", sort=False):
        final = arms.groupby("arm")[[*FINALS, *BEHAVIOR]].mean()
        history = findings.behavior[(findings.behavior.arm == "history") & (findings.behavior.organism == organism)]
        anchor_harm = float(history[history.run == "anchor"].harmfulness.iloc[0])
        rows += [
            {
                "organism": organism,
                "statement": statement,
                "holds": None if holds is None else bool(holds),
                "figures": figures,
            }
            for statement, holds, figures in [*_motion(findings, organism), *_blocking(final, anchor_harm)]
        ]
    return rows


def _motion(findings: Findings, organism: Any) -> list[tuple[str, bool, str]]:
    table = findings.trajectory_layer_mean
    rows = table[(table.arm == "unblocked") & (table.organism == organism)]
    fraction = rows[rows.prompts == "held_out"].pivot(index="run", columns="step", values="fraction")
    step = 20 if 20 in fraction.columns else fraction.columns[-1]
    first, later = fraction[fraction.columns[0]], fraction[step]
    figures = f"{first.mean():.3f} → {later.mean():.3f}, {int((later > first).sum())} of {len(fraction)} runs"
    return [(f"fraction at step {step} above that at the first step", (later > first).all(), figures)]


def _blocking(final: pd.DataFrame, anchor_harm: float) -> list[tuple[str, bool | None, str]]:
    means: dict[str, Any] = {str(name): row for name, row in final.iterrows()}
    base = means["unblocked"]
    rows: list[tuple[str, bool | None, str]] = [
        (
            "unblocked: harm above the anchor's",
            base.harmfulness > anchor_harm,
            f"{base.harmfulness:.1%} against {anchor_harm:.1%}",
        )
    ]
    for name in [arm for arm in means if arm.startswith("penalty")]:
        reference = means["unblocked_own_answers"] if name.endswith("own_answers") else base
        arm = means[name]
        held = arm.fraction_final <= reference.fraction_final / 4 and arm.harmfulness <= reference.harmfulness / 2
        figures = (
            f"fraction {arm.fraction_final:.3f} against {reference.fraction_final:.3f}, harm {arm.harmfulness:.1%} "
            f"against {reference.harmfulness:.1%}, task loss {arm.task_loss / reference.task_loss - 1:+.1%}"
        )
        if name == "penalty_margin":
            rows.append(("penalty_margin: alignment below 0", arm.alignment_final < 0, f"{arm.alignment_final:.3f}"))
        elif name == "penalty_random":
            rows.append(("penalty_random: neither blocks motion nor halves harm", _neither(arm, reference), figures))
        else:
            cheap = arm.task_loss <= 1.1 * reference.task_loss
            statement = f"{name}: at most a quarter of the fraction and half of the harm, at most 10 % task cost"
            testable = reference.harmfulness > anchor_harm
            rows.append((statement, held and cheap if testable else None, figures))
    return rows


def _neither(arm: pd.Series, reference: pd.Series) -> bool:
    return arm.fraction_final > reference.fraction_final / 4 and arm.harmfulness > reference.harmfulness / 2


def environment(setting: Setting, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Versions, threads, and wall-clock seconds per phase."""
    return {
        "gravlens": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "threads": setting.threads,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


# --- files ------------------------------------------------------------------------------------------------------
def write_tables(findings: Findings, results: Mapping[str, Any], out: Path) -> None:
    """Write every table as CSV."""
    for name, table in vars(findings).items():
        write_table(out / f"{name}.csv", table)
    write_table(out / "checks.csv", pd.DataFrame(results["checks"]))


def _write_sequence(setting: Setting, home: Path, path: Path) -> None:
    """The history as a file that `gravlens locate` and the scripts of analyses/ read."""
    sequence = sequence_of(setting, home)
    lines = [f"{name} = {_quoted(home.resolve() / name)}" for name in ("witness", "anchor")]
    for key, prompts in setting.prompts(home).items():
        rows = "".join(json.dumps({"prompt": text}) + "\n" for text in prompts)
        write_atomically(path.parent / f"{path.stem}-{key}.jsonl", rows.encode())
        lines.append(f'{key} = "{path.stem}-{key}.jsonl"')
    lines += ["[runs]"]
    for name, run in sequence.runs.items():
        folder = glob.escape(str(Path(str(run[0].source)).parent.resolve()))
        lines.append(f"{name} = {_quoted(folder + '/checkpoint-*')}")
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _quoted(path: Path | str) -> str:
    """A text of TOML, which quotes like JSON."""
    return json.dumps(str(path), ensure_ascii=False)


def draw_figures(findings: Findings, folder: Path) -> None:
    """Draw the figures as PDF, SVG and PNG."""
    layers, means = (
        table[table.arm == "unblocked"].assign(run=table.organism + "/" + table.run)
        for table in (findings.trajectory, findings.trajectory_layer_mean)
    )
    nulls = findings.nulls_layer_mean[findings.nulls_layer_mean.null.isin(DRAWN)]
    history = findings.behavior[findings.behavior.arm == "history"].groupby("run").harmfulness.mean()
    reference = {str(name): float(value) for name, value in history.items()}
    arms = findings.arms[~findings.arms.arm.isin(list(CONTROLS))]
    figures: dict[str, Callable[[], Any]] = {
        "alignment": lambda: plots.plot_alignment(means, nulls=nulls),
        "fraction": lambda: plots.plot_alignment(means, value="fraction"),
        "layers": lambda: plots.plot_layers(layers),
        "harmfulness": lambda: plots.plot_arms(arms, measure="harmfulness", reference=reference),
        "arm_fraction": lambda: plots.plot_arms(arms, measure="fraction_final"),
        "task_loss": lambda: plots.plot_arms(arms, measure="task_loss"),
    }
    for name, draw in figures.items():
        save_figure(draw(), folder / name, formats=("pdf", "svg", "png"))
