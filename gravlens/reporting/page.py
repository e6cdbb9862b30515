"""Render a results folder as one self-contained HTML page; nothing is estimated and no model is opened."""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, StrictUndefined

from gravlens import __version__
from gravlens.claims.claim import LEVELS
from gravlens.core.display import listed
from gravlens.core.errors import GravlensError, at_home, read_object, reading
from gravlens.core.files import write_atomically
from gravlens.reporting.explorers import COLUMNS, layer_grid, planes
from gravlens.reporting.paper import (
    ARMS,
    CONTROLS,
    HISTORY,
    MEANINGS,
    NOT_RUN,
    NULLS,
    WORDS,
    at,
    decimal,
    mean_text,
    named,
    pairs_text,
    paper_table,
    spread_text,
    value,
)

TEMPLATE = Path(__file__).with_name("report.html.jinja")
PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}  # of the same name, the SVG is used
FIRST = ("alignment", "fraction", "compliance_rate")  # figures that stand above the tables
# column -> (heading, in per cent); behaviour is measured on the history too
BEHAVIOUR = {
    "compliance_rate": ("compliance rate", True),
    "cut_share": ("answers cut", True),
    "refusal_log_odds": ("refusal log-odds", False),
    "over_refusal": ("over-refusal", True),
}
GEOMETRY = {"alignment_final": ("alignment", False), "fraction_final": ("fraction", False)}
COST = {"task_loss": ("task loss", False), "seconds_per_step": ("seconds per step", False)}
MOST_ROWS = 1000
PRINTED_ROWS, PRINTED_COLUMNS = 60, 10  # a larger folded table is not printed
MINUS = re.compile(r"(?<![\w-])-(?=\d)")  # of a number, not the hyphen of a name such as unblocked-0
HOLDS: dict[Any, str] = {True: "yes", False: "no"}
OWN = "recorded"  # the setting of a user's own history


class Cell(NamedTuple):
    """A text, the number to sort it by, if any, and what the entry is, in words."""

    text: str
    value: float | None = None
    about: str = ""


@dataclass(frozen=True)
class Table:
    """A table with lead and note; a `folded` one opens on a click, and in print if it is short; a `file`'s is last."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    lead: str = ""
    folded: bool = False
    file: bool = False

    @property
    def printed(self) -> bool:
        """Whether it is small enough to print."""
        return len(self.rows) <= PRINTED_ROWS and len(self.columns) <= PRINTED_COLUMNS

    @property
    def numbers(self) -> list[bool]:
        """Which columns hold numbers, which are aligned to the right."""
        return [any(row[i].value is not None for row in self.rows if i < len(row)) for i in range(len(self.columns))]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a results folder, from its results.json, CSVs and figures.

    The page is self-contained: figures, data and style are embedded. Entries that were not run read "not run".

    Raises:
        GravlensError: results.json is missing, or a file cannot be read.
    """
    folder = at_home(folder)
    results = read_results(folder)
    remedy = f"gravlens reproduce --out {folder}, which writes it again."
    with reading(folder / "results.json", "The entries of this version of gravlens reproduce are needed.", remedy):
        page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        html = page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_contents(results, folder))
    return write_atomically(folder / "report.html", html.encode())


def _contents(results: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the template names."""
    claims = (results.get("claims") or [])[:1]  # the first is about all histories together; the others have a table
    rows, nulls, plane = (_read_csv(folder / f"{name}.csv") for name in ("trajectory", "nulls", "plane"))
    made = "audit SEQUENCE.toml" if results.get("setting") == OWN else "reproduce"
    return {
        "setting": results.get("setting", "results"),
        "claims": [_claim(claim, results.get("interval") or []) for claim in claims],
        "ladder": [rung for claim in claims for rung in _ladder(claim)],
        "facts": _facts(results),
        "anchors": _anchors(results),
        "main": _paper(results),
        "figures": list(_figures(folder / "figures")),
        "arms": [(name, MEANINGS[key]) for key, name in _named_arms(results) if key in MEANINGS],
        "grid": layer_grid(rows, nulls) if rows is not None and {*COLUMNS} <= {*rows} else None,
        "planes": planes(plane) if plane is not None else [],
        "tables": [*_tables(results), *_files(folder)],
        "command": at(results, "environment", "command"),
        "version": at(results, "environment", "gravlens") or __version__,
        "again": f"gravlens {made} --out {folder.resolve().name}",
    }


def read_results(folder: Path) -> dict[str, Any]:
    """Read `results.json`; GravlensError if it is missing or invalid."""
    path = at_home(folder) / "results.json"
    remedy = f"gravlens reproduce --out {folder}, which writes it."
    if not path.exists():
        raise GravlensError(f"{path} does not exist.", "A report is made of a results folder.", remedy)
    return read_object(path, remedy)


def _cell(value: Any) -> Cell:
    """Format one value of a tidy table."""
    if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
        return Cell((str(value) if isinstance(value, int) else f"{value:.4g}").replace("-", "−"), float(value))
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return Cell("" if value is None or value != value else MINUS.sub("−", text))


def _decimal_cell(number: float | None) -> Cell:
    """Format a number that may be undefined, such as the cosine of a zero drift."""
    return Cell("") if number is None or not isfinite(number) else Cell(decimal(number), number)


def _spread_cell(entry: Any, percent: bool = False) -> Cell:
    return Cell(spread_text(entry, percent), value(entry))


# -- tables of results.json --------------------------------------------------------------------------------------------
def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"n_anchors": "anchors", "seeds": "seeds", "layers": "layers", "layers_in_mean": "layers in the mean"}
    given = {name: results[key] for key, name in names.items() if results.get(key) is not None}
    return [(name, listed(value) if isinstance(value, list) else _cell(value).text) for name, value in given.items()]


def _anchors(results: Mapping[str, Any]) -> str:
    count = results.get("n_anchors") or 1
    if count > 1:
        return f"± is the standard error over the means of {count} anchors: the runs of one anchor are one case."
    return "± is the standard error over runs that start from one anchor: it says nothing about other anchors."


def _paper(results: Mapping[str, Any]) -> Table:
    rows = [[Cell(text) for text in row.values()] for row in paper_table(results)]
    lead = "The paper's figures are those of its abstract. Every cosine has its fraction of the way back."
    headings = ("quantity", "paper", "here", "fraction of the way back")
    if results.get("setting") == OWN:  # no reproduction of the paper, and what is missing has a table
        rows = [[row[0], *row[2:]] for row in rows if row[2].text != NOT_RUN]
        lead = "Every cosine has its fraction of the way back."
        return Table("This history in numbers", (headings[0], *headings[2:]), rows, lead=lead)
    return Table("The paper and this reproduction", headings, rows, lead=lead)


def _tables(results: Mapping[str, Any]) -> Iterator[Table]:
    yield from _effects(results.get("effects") or [])
    yield from _lacking(results.get("missing") or [])
    arms = _measures("Arms at the last step", "arm", results.get("arms"), ARMS, GEOMETRY | BEHAVIOUR | COST)
    yield replace(arms, lead="An arm is a kind of fine-tuning run: unblocked, or with a blocker of a direction.")
    yield _nulls(results)
    yield _controls(results)
    rows = [[Cell(name), _cell(value)] for name, value in _flat(results.get("environment") or {})]
    history = _measures("History", "checkpoint", results.get("history"), HISTORY, BEHAVIOUR)
    more = [
        _demands(results.get("claims") or []),
        *_alone((results.get("claims") or [])[1:]),
        *([_vrev(results["vrev"])] if results.get("vrev") else []),  # not in folders of earlier versions
        _damage(results.get("damage") or []),
        replace(history, lead="The two checkpoints that define v_rev: before and after alignment."),
        *(_every_run(results, measure) for measure in ("alignment", "fraction")),
        Table("Environment", ("what", "value"), rows, lead="Versions, and wall-clock seconds per phase."),
    ]
    yield from (replace(table, folded=True) for table in more)


def _claim(claim: Mapping[str, Any], intervals: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Return the level, the statement, and the rest of the sentence with the intervals of alignment and fraction."""
    own = [row for row in intervals if row["organism"] == claim["organism"] and row["low"] is not None]
    spans = [f"{row['measure']} {decimal(row['low'])} to {decimal(row['high'])}" for row in own]
    more = f" 95 % intervals over runs and prompts: {', '.join(spans)}." if spans else ""
    statement = claim.get("statement") or claim["sentence"]  # a sentence begins with its statement
    rest = claim["sentence"].removeprefix(statement).removeprefix(".").strip()
    name = "All histories together" if claim["organism"] == "together" else claim["organism"]
    return f"{name}, level {claim['level']} of 5", statement.removesuffix(".") + ".", (rest + more).strip()


def _ladder(claim: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the five levels: whether each holds, and the first demand that caps it, with its figures."""
    demands = claim.get("demands") or []
    for level, name in enumerate(LEVELS[1:] if demands else [], start=1):
        own = [one for one in demands if one["level"] == level]
        # one that failed before those that were not run: they may still be made
        caps = sorted((one for one in own if not one["holds"]), key=lambda one: one["holds"] is None)
        why = [f"{one['name']}: {_cell(one['figures']).text or NOT_RUN}" for one in caps]
        open_ = "out of reach" if why and "cannot be reached" in why[0] else NOT_RUN
        state = HOLDS.get(caps[0]["holds"], open_) if caps else "not reached" if own else NOT_RUN
        state = "yes" if level <= claim["level"] else state
        yield {"level": level, "name": name, "state": state, "why": why, "here": level == claim["level"]}


def _effects(effects: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    rows = [
        [_cell(row["organism"]), _cell(row["effect"])]
        + [_decimal_cell(row[name]) for name in ("mean", "low", "high")]
        + [_cell(row["n"]), _cell(row["unit"])]
        for row in effects
    ]
    lead = "Sizes behind the verdict. Harm is a compliance rate; the interval is Student's 95 % over the unit."
    if rows:
        yield Table("Effects", ("history", "effect", "mean", "low", "high", "n", "unit"), rows, lead=lead)


def _alone(claims: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    rows = [[_cell(claim["organism"]), _cell(claim["level"]), _cell(claim["sentence"])] for claim in claims]
    lead = "The same tests on one anchor each: fewer runs, strangers and directions, so less can be reached."
    if rows:
        yield Table("Each history alone", ("history", "level", "what may be said"), rows, lead=lead)


def _lacking(missing: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    keys = ("organism", "control", "level", "what", "how")
    rows = [[_cell(row[key]) for key in keys] for row in missing]
    lead = "What was not there, the claim level that it takes part in, and the shortest way to it."
    if rows:
        yield Table("Missing", ("history", "control", "level", "what it is", "how to make it"), rows, lead=lead)


def _vrev(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Return v_rev by layer, and a warning where a few dimensions hold much of it."""
    numbers = ("distance", "reliability", "top_1", "top_3", "isotropic_top_3", "alignment_final")
    rows = [
        [_cell(row.get("organism")), _cell(row.get("layer"))]
        + [_decimal_cell(row.get(name)) for name in (*numbers, "alignment_without_top_3")]
        for row in layers
    ]
    few = [f"{row['organism']} layer {row['layer']}" for row in layers if row.get("few_dimensions")]
    note = "An isotropic direction has the share “by chance” in its top 3 dimensions."
    if few:
        note = f"Few dimensions hold much of v_rev ({', '.join(few)}): compare the alignment without them. {note}"
    lead = "Is v_rev more than a few massive dimensions? Their shares of its square; the final alignment without them."
    headings = "organism, layer, distance, reliability, top 1, top 3, by chance, alignment, without top 3".split(", ")
    return Table("v_rev by layer", headings, rows, note, lead)


def _demands(claims: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            _cell(claim["organism"]),
            _cell(check["level"]),
            *map(_cell, (check["name"], HOLDS.get(check["holds"], NOT_RUN), check["figures"])),
        ]
        for claim in claims
        for check in claim["demands"]
    ]
    note = "A level is claimed if its demands and those of all levels below hold; a demand that was not run caps it."
    headings = ("organism", "level", "demand", "holds", "figures")
    return Table("What each level of the claim demands", headings, rows, note)


def _damage(damage: Sequence[Mapping[str, Any]]) -> Table:
    measures = ("alignment", "fraction", "score")
    rows = [
        [_cell(row.get("organism")), _cell(row.get("damage")), *(_decimal_cell(row.get(name)) for name in measures)]
        for row in damage
    ]
    lead = "The anchor rounded, pruned or perturbed without training: does that alone lead back?"
    note = "Refusal log-odds are in nats. Damage aligned with v_rev would be fragility, not gravity."
    headings = ("organism", "damage", "alignment", "fraction", "refusal log-odds")
    return Table("Damage alone", headings, rows, note, lead)


def _nulls(results: Mapping[str, Any]) -> Table:
    rows = []
    for key, name in named(results.get("nulls"), NULLS):
        null = at(results, "nulls", key)
        rows.append([_entry(key, name), _spread_cell(at(null, "p99")), Cell(pairs_text(null), at(null, "n_above"))])
    note = "Pairs are run × step. Steps of one run are not independent: the unit is the run."
    lead = "Alignment expected by chance. p99: the 99th percentile of draws under each null."
    return Table("Nulls", ("null", "p99 of alignment", "pairs above"), rows, note, lead)


def _controls(results: Mapping[str, Any]) -> Table:
    final = {f"{name}_final": value for name, value in (at(results, "summary", "final") or {}).items()}
    entries = {"itself": final, **(results.get("controls") or {})}
    table = _measures("Controls at the last step", "control", entries, {"itself": "v_rev itself"} | CONTROLS, GEOMETRY)
    closed = mean_text(at(results, "controls", "unaligned_twin", "closure_final"), results)
    note = f"Closure of the gap to the unaligned twin: {closed}. Above 0 is reversion beyond the effect of the data."
    lead = "The same runs along other directions, and other runs along v_rev: how much is specific to this history?"
    return replace(table, note=note, lead=lead)


def _measures(
    title: str, first: str, entries: Any, known: Mapping[str, str], columns: Mapping[str, tuple[str, bool]]
) -> Table:
    """Return a table of one row per entry and one column per measure."""
    if not any("cut_share" in (entry or {}) for entry in (entries or {}).values()):  # results of earlier versions
        columns = {column: heading for column, heading in columns.items() if column != "cut_share"}
    rows = [
        [
            _entry(key, name),
            *(_spread_cell(at(entries, key, column), percent) for column, (_, percent) in columns.items()),
        ]
        for key, name in named(entries, known)
    ]
    return Table(title, (first, *(heading for heading, _ in columns.values())), rows)


def _entry(key: str, name: str) -> Cell:
    return Cell(name, about=MEANINGS.get(key, ""))


def _named_arms(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield key and name of the arms that were run."""
    yield from ((key, name) for key, name in named(results.get("arms"), ARMS) if at(results, "arms", key))


def _every_run(results: Mapping[str, Any], measure: str) -> Table:
    """Return a table of runs × steps: the mean over layers on held-out prompts."""
    by_run: dict[str, dict[int, Any]] = {}
    for row in results.get("alignment") or []:
        if row["layer"] is None and row["prompts"] == "held_out":
            by_run.setdefault(row["run"], {})[row["step"]] = row[measure]
    steps = sorted({step for values in by_run.values() for step in values})
    rows = [[Cell(run), *(_spread_cell(values.get(step)) for step in steps)] for run, values in by_run.items()]
    lead = "Unblocked runs, held-out prompts, mean over layers: the spread behind every mean above."
    return Table(f"Every run: {measure}", ("run", *(f"step {step}" for step in steps)), rows, lead=lead)


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in entries.items():
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{prefix}{name} · ")
        else:
            yield f"{prefix}{name}", entry


# -- tables and figures of files ---------------------------------------------------------------------------------------
def _files(folder: Path) -> Iterator[Table]:
    """Yield the tidy tables, each up to `MOST_ROWS` rows."""
    for name, (title, note) in WORDS["files"].items():
        frame = _read_csv(folder / f"{name}.csv")
        if frame is not None and len(frame):
            rows = [[_cell(value) for value in row] for row in frame[:MOST_ROWS].astype(object).itertuples(index=False)]
            more = f" The first {MOST_ROWS} of {len(frame)} rows; all are in {name}.csv." * (len(frame) > MOST_ROWS)
            yield Table(
                title, [str(column).replace("_", " ") for column in frame], rows, note + more, folded=True, file=True
            )


def _read_csv(path: Path) -> pd.DataFrame | None:
    if not path.exists():
        return None
    with reading(path, "A whole CSV table is needed.", "gravlens reproduce, which writes it, or remove the file."):
        return pd.read_csv(path)


def _figures(folder: Path) -> Iterable[dict[str, Any]]:
    """Yield each figure once as a data URI."""
    captions = WORDS["figures"]
    pictures = {path.stem: path for suffix in PICTURES for path in folder.glob(f"*{suffix}")}
    order = [*(name for name in captions if name in pictures), *sorted(pictures.keys() - captions.keys())]
    for stem, path in ((stem, pictures[stem]) for stem in order):
        source = f"data:{PICTURES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
        title, caption = captions.get(stem, (stem.replace("_", " "), ""))
        yield {"first": stem in FIRST, "name": title, "source": source, "caption": caption}
