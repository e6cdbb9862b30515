"""The table that compares the paper's abstract with results, and the formatting of its numbers."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NOT_RUN, NOT_REPORTED = "not run", "not reported"
WORDS: dict[str, dict[str, tuple[str, str]]] = tomllib.loads(
    Path(__file__).with_name("words.toml").read_text(encoding="utf-8")
)
# Known entries come first, in this order, and read "not run" if absent; others follow.
NULLS, CONTROLS, ARMS, HISTORY = (
    {key: name for key, (name, _) in WORDS[kind].items()} for kind in ("nulls", "controls", "arms", "history")
)
MEANINGS = {key: about for kind in [*WORDS][:5] for key, (_, about) in WORDS[kind].items()}  # the last: figures, files
# From the paper's abstract, which has one blocked arm; it is compared with both of ours.
PAPER_STEPS = {
    "first_step": ("alignment, first step", "0.429 ± 0.052 (step 1)"),
    "step_20": ("alignment, step 20", "0.647 ± 0.021"),
    "final": ("alignment, last step", "0.648 ± 0.009 (step 100)"),
}
PAPER_PAIRS = "24 of 24"
BLOCKED, RANDOM = ("penalty", "penalty_margin"), {"clamp_random": NOT_REPORTED}
PAPER_ALIGNMENT = dict.fromkeys(BLOCKED, "−0.211 ± 0.021") | RANDOM
PAPER_HARM = {"unblocked": "19.0 ± 4.0 %"} | dict.fromkeys(BLOCKED, "8.5 ± 1.5 %") | RANDOM
PAPER_LOSS = {"unblocked": NOT_REPORTED, "penalty": "little cost"}


def paper_table(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the main table, nulls and controls included.

    Each row has `quantity`, `paper` (from its abstract), `here` (mean ± SEM over runs, and the number of anchors if
    there are several) and `fraction`, the fraction of the way back for rows that are cosines, "" for others.
    """
    return [dict(zip(("quantity", "paper", "here", "fraction"), row, strict=True)) for row in _paper_rows(results)]


def _paper_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for key, (quantity, paper) in PAPER_STEPS.items():
        yield _cosine(results, quantity, paper, "summary", key)
    for key, name in named(results.get("nulls"), NULLS):
        paper = PAPER_PAIRS if key == "isotropic" else NOT_REPORTED
        yield f"run-step pairs above p99 of: {name}", paper, pairs_text(at(results, "nulls", key)), ""
    for key, name in named(results.get("controls"), CONTROLS):
        yield _cosine(results, f"control: {name}, last step", NOT_REPORTED, "controls", key, suffix="_final")
    closure = at(results, "controls", "unaligned_twin", "closure_final")
    yield "closure of the gap to the unaligned twin", NOT_REPORTED, mean_text(closure, results), ""
    for arm, name, paper in _paper_arms(results, PAPER_ALIGNMENT):
        yield _cosine(results, f"alignment: {name}", paper, "arms", arm, suffix="_final")
    anchor = spread_text(at(results, "history", "anchor", "compliance_rate"), True)
    yield "harmfulness: anchor", NOT_REPORTED, anchor + _cut(results, "history", "anchor"), ""
    for arm, name, paper in _paper_arms(results, PAPER_HARM):
        rate = mean_text(at(results, "arms", arm, "compliance_rate"), results, True)
        yield f"harmfulness: {name}", paper, rate + _cut(results, "arms", arm), ""
    for arm, name, paper in _paper_arms(results, PAPER_LOSS):
        yield f"task loss: {name}", paper, mean_text(at(results, "arms", arm, "task_loss"), results), ""


def _paper_arms(results: Mapping[str, Any], paper: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield arm, name and the paper's figure: the paper's arms first, then those of this organism only."""
    yield from ((arm, ARMS[arm], figure) for arm, figure in paper.items())
    yield from ((arm, name, NOT_REPORTED) for arm, name in named(results.get("arms"), ARMS) if arm not in ARMS)


def _cut(results: Mapping[str, Any], *keys: str) -> str:
    """Tell the share of answers that were cut, where there are any."""
    share = value(at(results, *keys, "cut_share"))
    return f", {decimal(share, True)} % of the answers cut" if share else ""


def _cosine(
    results: Mapping[str, Any], quantity: str, paper: str, *keys: str, suffix: str = ""
) -> tuple[str, str, str, str]:
    """Return a row with both cosine and fraction."""
    here, fraction = (at(results, *keys, f"{measure}{suffix}") for measure in ("alignment", "fraction"))
    return quantity, paper, mean_text(here, results), "" if value(here) is None else spread_text(fraction)


# -- formatting --------------------------------------------------------------------------------------------------------
def at(results: Any, *keys: str) -> Any:
    """Return the nested value under the keys, or None."""
    for key in keys:
        results = results.get(key) if isinstance(results, Mapping) else None
    return results


def value(entry: Any, part: str = "mean") -> float | None:
    """Return the number of a plain entry or of one part of a spread; None if it was not run."""
    found = entry.get(part) if isinstance(entry, Mapping) else entry
    return found if isinstance(found, int | float) and found == found else None


def decimal(number: float, percent: bool = False) -> str:
    """Format with three decimals, or as a percentage with one, with a true minus sign."""
    return (f"{100 * number:.1f}" if percent else f"{number:.3f}").replace("-", "−")


def spread_text(entry: Any, percent: bool = False) -> str:
    """Format mean ± SEM, or only the mean of a single run."""
    middle, sem = value(entry), value(entry, "sem") if isinstance(entry, Mapping) else None
    if middle is None:
        return NOT_RUN
    return f"{decimal(middle, percent)}{'' if sem is None else f' ± {decimal(sem, percent)}'}{' %' * percent}"


def mean_text(entry: Any, results: Mapping[str, Any], percent: bool = False) -> str:
    """Format mean ± SEM with the number of runs, and of anchors if there are several."""
    runs = at(entry, "runs")
    if value(entry) is None or runs is None:
        return spread_text(entry, percent)
    count = runs if isinstance(runs, int) else sum(run is not None for run in runs)
    anchors = results.get("n_anchors") or 1
    among = f", {anchors} anchors" if anchors > 1 else ""
    return f"{spread_text(entry, percent)} ({count} run{'s' * (count != 1)}{among})"


def pairs_text(null: Any) -> str:
    """Format the count of pairs above the null."""
    if at(null, "n_above") is None or at(null, "n_pairs") is None:
        return NOT_RUN
    return f"{null['n_above']} of {null['n_pairs']}"


def named(entries: Any, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield keys and their names, the known ones first even if not run."""
    yield from known.items()
    yield from ((key, key.replace("_", " ")) for key in (entries or {}) if key not in known)
