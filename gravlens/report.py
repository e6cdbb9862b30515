"""A results folder in, one HTML page out that stands alone. It estimates and draws nothing and opens no model."""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, StrictUndefined

from gravlens.errors import GravlensError
from gravlens.store import write_atomically

NOT_RUN, NOT_REPORTED = "not run", "not reported"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}  # the last one found is taken
# Figures in their order, and what each says; others follow without a word.
CAPTIONS = {
    "alignment": "Mean over layers at each step, held-out prompts: every run thin, mean ± SEM bold, nulls dashed.",
    "fraction": "How far back: 0 is the anchor, 1 the witness. A cosine tells the heading, this tells the way made.",
    "layers": "Every layer beside the mean, since a mean over layers hides layers.",
    "effect": "What an intervention at inference does to the score, with its 95 % interval and the random directions.",
    "harmfulness": "Every run as a small point, mean ± SEM above it, the history dashed.",
    "arm_fraction": "How far back each arm ends.",
    "task_loss": "What blocking costs.",
}
# Known entries come first, in this order, and read "not run" where they are absent; others follow.
NULLS = {"isotropic": "isotropic", "weight_noise": "weight noise"}
CONTROLS = {
    "wrong_witness": "wrong witness",
    "sibling_anchor": "sibling anchor",
    "unaligned_twin": "unaligned twin",
    "continued_alignment": "continued alignment",
}
ARMS = {
    "unblocked": "unblocked",
    "unblocked_new_facts": "unblocked, new facts only",
    "penalty": "penalty",
    "penalty_margin": "penalty with a margin (a push)",
    "penalty_random": "penalty on a random direction",
}
HISTORY = {"witness": "witness", "anchor": "anchor"}
# What the paper's abstract says; its one blocked arm stands beside both of ours.
PAPER_STEPS = {
    "first_step": ("alignment, first step", "0.429 ± 0.052 (step 1)"),
    "step_20": ("alignment, step 20", "0.647 ± 0.021"),
    "final": ("alignment, last step", "0.648 ± 0.009 (step 100)"),
}
PAPER_PAIRS = "24 of 24"
BLOCKED, RANDOM = ("penalty", "penalty_margin"), {"penalty_random": NOT_REPORTED}
PAPER_ALIGNMENT = dict.fromkeys(BLOCKED, "−0.211 ± 0.021") | RANDOM
PAPER_HARM = {"unblocked": "19.0 ± 4.0 %"} | dict.fromkeys(BLOCKED, "8.5 ± 1.5 %") | RANDOM
PAPER_LOSS = {"unblocked": NOT_REPORTED, "penalty": "little cost"}
# column -> (heading, in per cent); behaviour is measured on the history too
BEHAVIOUR = {
    "harmfulness": ("harmfulness", True),
    "refusal_log_odds": ("refusal log-odds", False),
    "over_refusal": ("over-refusal", True),
}
GEOMETRY = {"alignment_final": ("alignment", False), "fraction_final": ("fraction", False)}
COST = {"task_loss": ("task loss", False), "seconds_per_step": ("seconds per step", False)}
FILES = {
    "arms": ("Arms: every run", ""),
    "behavior": ("Behaviour: every run and step", ""),
    "controls": ("Controls: every run", ""),
    "effects": ("Effects of interventions at inference", "Where no layer stands, the intervention acts on several."),
    "nulls": ("Nulls: every run, step and layer", "Where no layer stands, it is the mean over layers."),
    "trajectory": ("Trajectory: every run, step and layer", "Where no layer stands, it is the mean over layers."),
}
MOST_ROWS = 1000


class Cell(NamedTuple):
    """A text to show and the number to sort it by, if it has one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of the page; `folded` ones open at a click."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False


def write_report(folder: Path) -> Path:
    """Write `report.html` into a results folder, from its results.json, its CSVs and its figures.

    The page stands alone: figures and style lie within it, nothing is fetched. What was not run reads "not run".
    GravlensError where results.json or a CSV is missing its mark or cannot be read.
    """
    folder = Path(folder)
    results = read_results(folder)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        setting=results.get("setting", "results"),
        verdict=results.get("verdict") or [],
        facts=_facts(results),
        anchors=_anchors(results),
        main=_paper(results),
        figures=list(_figures(folder / "figures")),
        tables=[*_tables(results), *_files(folder)],
    )
    return write_atomically(folder / "report.html", html.encode())


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` of a folder; GravlensError where it is absent or broken."""
    path = Path(folder) / "results.json"
    remedy = f"gravlens reproduce --out {folder}, which writes it."
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GravlensError(f"{path} does not exist.", "A report is made from a results folder.", remedy) from error
    except ValueError as error:
        raise GravlensError(f"{path} is no JSON ({error}).", "A whole results.json is needed.", remedy) from error
    if not isinstance(results, dict):
        raise GravlensError(f"{path} holds a {type(results).__name__}.", "A JSON object is needed.", remedy)
    return results


def paper_table(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The main table: the paper's figure and this one, nulls and controls among the rows.

    Each row has `quantity`, `paper`, `here` (mean ± SEM over runs, and the number of anchors where it is not one) and
    `fraction`: how far back, beside every cosine ("" elsewhere). The paper's figures are those of its abstract.
    """
    return [dict(zip(("quantity", "paper", "here", "fraction"), row, strict=True)) for row in _paper_rows(results)]


def _paper_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for key, (quantity, paper) in PAPER_STEPS.items():
        yield _cosine(results, quantity, paper, "summary", key)
    for key, name in _named(results.get("nulls"), NULLS):
        paper = PAPER_PAIRS if key == "isotropic" else NOT_REPORTED
        yield f"run-step pairs above p99 of: {name}", paper, _pairs(_at(results, "nulls", key)), ""
    for key, name in _named(results.get("controls"), CONTROLS):
        yield _cosine(results, f"control: {name}, last step", NOT_REPORTED, "controls", key, suffix="_final")
    closure = _at(results, "controls", "unaligned_twin", "closure_final")
    yield "closure of the gap to the unaligned twin", NOT_REPORTED, _mean(closure, results), ""
    for arm, name, paper in _paper_arms(results, PAPER_ALIGNMENT):
        yield _cosine(results, f"alignment: {name}", paper, "arms", arm, suffix="_final")
    yield "harmfulness: anchor", NOT_REPORTED, _spread(_at(results, "history", "anchor", "harmfulness"), True), ""
    for arm, name, paper in _paper_arms(results, PAPER_HARM):
        yield f"harmfulness: {name}", paper, _mean(_at(results, "arms", arm, "harmfulness"), results, True), ""
    for arm, name, paper in _paper_arms(results, PAPER_LOSS):
        yield f"task loss: {name}", paper, _mean(_at(results, "arms", arm, "task_loss"), results), ""


def _paper_arms(results: Mapping[str, Any], paper: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Arm, name, paper's figure: the arms that the paper speaks of, then those that only this setting has."""
    yield from ((arm, ARMS[arm], figure) for arm, figure in paper.items())
    yield from ((arm, name, NOT_REPORTED) for arm, name in _named(results.get("arms"), ARMS) if arm not in ARMS)


def _cosine(
    results: Mapping[str, Any], quantity: str, paper: str, *keys: str, suffix: str = ""
) -> tuple[str, str, str, str]:
    """A row with the fraction beside the cosine."""
    here, fraction = (_at(results, *keys, f"{measure}{suffix}") for measure in ("alignment", "fraction"))
    return quantity, paper, _mean(here, results), "" if _value(here) is None else _spread(fraction)


# -- numbers into words ------------------------------------------------------------------------------------------------


def _at(results: Any, *keys: str) -> Any:
    """What lies under the keys, None where the way ends."""
    for key in keys:
        results = results.get(key) if isinstance(results, Mapping) else None
    return results


def _value(entry: Any, part: str = "mean") -> float | None:
    """The number of a plain entry or the named part of a spread; None where it was not run."""
    value = entry.get(part) if isinstance(entry, Mapping) else entry
    return value if isinstance(value, int | float) and value == value else None


def _number(value: float, percent: bool = False) -> str:
    return (f"{100 * value:.1f}" if percent else f"{value:.3f}").replace("-", "−")


def _spread(entry: Any, percent: bool = False) -> str:
    """Mean ± SEM, or the mean alone where one run has no SEM."""
    mean, sem = _value(entry), _value(entry, "sem") if isinstance(entry, Mapping) else None
    if mean is None:
        return NOT_RUN
    return f"{_number(mean, percent)}{'' if sem is None else f' ± {_number(sem, percent)}'}{' %' * percent}"


def _mean(entry: Any, results: Mapping[str, Any], percent: bool = False) -> str:
    """Mean ± SEM with the number of runs, and of anchors where they are several."""
    runs = _at(entry, "runs")
    if _value(entry) is None or runs is None:
        return _spread(entry, percent)
    count = runs if isinstance(runs, int) else sum(run is not None for run in runs)
    anchors = results.get("n_anchors") or 1
    among = f", {anchors} anchors" if anchors > 1 else ""
    return f"{_spread(entry, percent)} ({count} run{'s' * (count != 1)}{among})"


def _pairs(null: Any) -> str:
    if _at(null, "n_above") is None or _at(null, "n_pairs") is None:
        return NOT_RUN
    return f"{null['n_above']} of {null['n_pairs']}"


def _cell(value: Any) -> Cell:
    """One value of a tidy table."""
    if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
        return Cell((str(value) if isinstance(value, int) else f"{value:.4g}").replace("-", "−"), float(value))
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return Cell("" if value is None or value != value else text)


def _spread_cell(entry: Any, percent: bool = False) -> Cell:
    return Cell(_spread(entry, percent), _value(entry))


# -- results into tables -----------------------------------------------------------------------------------------------


def _named(entries: Any, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Keys with their names: the known ones first, whether run or not."""
    yield from known.items()
    yield from ((key, key.replace("_", " ")) for key in (entries or {}) if key not in known)


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"n_anchors": "anchors", "seeds": "seeds", "layers": "layers", "layers_in_mean": "layers in the mean"}
    return [(name, _cell(results[key]).text) for key, name in names.items() if results.get(key) is not None]


def _anchors(results: Mapping[str, Any]) -> str:
    count = results.get("n_anchors") or 1
    if count > 1:
        return f"± is the standard error over the means of {count} anchors: the runs of one anchor are one case."
    return "± is the standard error over runs that start from one anchor: it says nothing about other anchors."


def _paper(results: Mapping[str, Any]) -> Table:
    rows = [[Cell(text) for text in row.values()] for row in paper_table(results)]
    return Table("Paper · here", ("quantity", "paper", "here", "fraction of the way back"), rows)


def _tables(results: Mapping[str, Any]) -> Iterator[Table]:
    yield _checks(results.get("checks") or [])
    yield _nulls(results)
    yield _controls(results)
    yield _measures("Arms at the last step", "arm", results.get("arms"), ARMS, GEOMETRY | BEHAVIOUR | COST)
    yield _measures("History", "checkpoint", results.get("history"), HISTORY, BEHAVIOUR)
    for measure in ("alignment", "fraction"):
        yield _every_run(results, measure)
    rows = [[Cell(name), _cell(value)] for name, value in _flat(results.get("environment") or {})]
    yield Table("Environment", ("what", "value"), rows)


def _checks(checks: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("organism", "statement", "holds", "figures")
    rows = [[_cell(check.get(column)) for column in columns] for check in checks]
    return Table("The paper's picture, held against each history", columns, rows)


def _nulls(results: Mapping[str, Any]) -> Table:
    rows = []
    for key, name in _named(results.get("nulls"), NULLS):
        null = _at(results, "nulls", key)
        rows.append([Cell(name), _spread_cell(_at(null, "p99")), Cell(_pairs(null), _at(null, "n_above"))])
    note = "Pairs are run × step. Steps of one run are not independent: the unit is the run."
    return Table("Nulls", ("null", "p99 of alignment", "pairs above"), rows, note)


def _controls(results: Mapping[str, Any]) -> Table:
    final = {f"{name}_final": value for name, value in (_at(results, "summary", "final") or {}).items()}
    entries = {"itself": final, **(results.get("controls") or {})}
    table = _measures("Controls at the last step", "control", entries, {"itself": "v_rev itself"} | CONTROLS, GEOMETRY)
    closed = _mean(_at(results, "controls", "unaligned_twin", "closure_final"), results)
    note = f"Closure of the gap to the unaligned twin: {closed}. Above 0 is reversion beyond what the data does anyway."
    return replace(table, note=note)


def _measures(
    title: str, first: str, entries: Any, known: Mapping[str, str], columns: Mapping[str, tuple[str, bool]]
) -> Table:
    """A row per entry, a column per measure."""
    rows = [
        [Cell(name), *(_spread_cell(_at(entries, key, column), percent) for column, (_, percent) in columns.items())]
        for key, name in _named(entries, known)
    ]
    return Table(title, (first, *(heading for heading, _ in columns.values())), rows)


def _every_run(results: Mapping[str, Any], measure: str) -> Table:
    """Runs down, steps across: the mean over layers on held-out prompts."""
    by_run: dict[str, dict[int, Any]] = {}
    for row in results.get("alignment") or []:
        if row["layer"] is None and row["prompts"] == "held_out":
            by_run.setdefault(row["run"], {})[row["step"]] = row[measure]
    steps = sorted({step for values in by_run.values() for step in values})
    rows = [[Cell(run), *(_spread_cell(values.get(step)) for step in steps)] for run, values in by_run.items()]
    return Table(f"Every run: {measure}", ("run", *(f"step {step}" for step in steps)), rows)


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} · ")
        else:
            yield f"{prefix}{name}", value


# -- files into tables and pictures ------------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[Table]:
    """The tidy tables in full, as far as a page can hold them."""
    for name, (title, note) in FILES.items():
        frame = _read_csv(folder / f"{name}.csv")
        if frame is not None and len(frame):
            rows = [[_cell(value) for value in row] for row in frame[:MOST_ROWS].astype(object).itertuples(index=False)]
            more = f" The first {MOST_ROWS} of {len(frame)} rows; all stand in {name}.csv." * (len(frame) > MOST_ROWS)
            yield Table(title, [str(column).replace("_", " ") for column in frame], rows, note + more, folded=True)


def _read_csv(path: Path) -> pd.DataFrame | None:
    try:
        return pd.read_csv(path)
    except FileNotFoundError:
        return None
    except ValueError as error:  # of pandas' parser, and of the decoder
        remedy = "gravlens reproduce once more, or remove the file."
        raise GravlensError(f"{path} is no CSV table ({error}).", "A whole table is needed.", remedy) from error


def _figures(folder: Path) -> Iterable[dict[str, str]]:
    """Each figure once, as an address that holds the picture itself; SVG before PNG."""
    pictures = {path.stem: path for suffix in PICTURES for path in folder.glob(f"*{suffix}")}
    order = [*(name for name in CAPTIONS if name in pictures), *sorted(pictures.keys() - CAPTIONS.keys())]
    for stem, path in ((stem, pictures[stem]) for stem in order):
        source = f"data:{PICTURES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
        yield {"name": stem.replace("_", " "), "source": source, "caption": CAPTIONS.get(stem, "")}
