"""A verdict on the terminal: the first screen of 80 columns and 24 lines, and the rest on request."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from gravlens import claims, reporting
from gravlens.cli.output import console, print_line, print_table

HOLDS = {True: "yes", False: "NO", None: "not run"}
# effect of results.json -> its name on the screen, and whether it is a share
ROWS = {
    "alignment": ("alignment", False),
    "fraction": ("fraction of the way", False),
    "harm": ("harm", True),
    "harm, blocked": ("harm, blocked", True),
    "harm, random": ("harm, random blocks", True),
}
WIDTH = 78
OWN = "recorded"  # the setting of a user's own history


def print_verdict(results: Mapping[str, Any], *, full: bool = False) -> None:
    """Print the verdict of `results.json`: sentence, ladder and five effects; `full`: every table as well."""
    first, *others = results.get("claims") or [{}]
    if first:
        print_line(f"Level {first['level']} of 5. {first['statement']}", width=WIDTH)
        print_line(first["setting"], width=WIDTH)
        print_line("")
        for line in ladder(first):
            print_line(line)
        print_line("")
    for line in effect_lines(results):
        print_line(line)
    for line in missing_lines(results.get("missing") or [], first.get("level", 0), full=full):
        print_line(line, width=WIDTH)
    if full:
        _print_rest(results, [first, *others] if first else [])


def ladder(claim: Mapping[str, Any]) -> Iterator[str]:
    """One line a level: whether its demands hold, and the first that does not, failed ones first."""
    names = claims.claim.LEVELS
    for level, group in groupby(claim["demands"], key=lambda demand: demand["level"]):
        demands = list(group)
        # one that failed before those that were not run: they may still be made
        caps = sorted((one for one in demands if not one["holds"]), key=lambda one: one["holds"] is None)
        word = HOLDS[caps[0]["holds"]] if caps else "yes"
        why = "" if not caps else caps[0]["name"] + (f" (+{len(caps) - 1})" if len(caps) > 1 else "")
        mark = ">" if level == claim["level"] else " "
        yield f"{mark}{level} {names[level]:<25}{word:<8}{why}"[:WIDTH]


def effect_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The five effects of the first claim, with intervals over their unit."""
    of = (results.get("claims") or [{}])[0].get("organism")
    found = {row["effect"]: row for row in results.get("effects") or [] if row["organism"] == of}
    anchor = (found.get("harm of the anchor") or {}).get("mean")  # None: harm was measured, and not of the anchor
    for effect, (name, share) in ROWS.items():
        row = found.get(effect)
        if row is None or row["mean"] is None:
            yield f"  {name:<20}not run"
            continue
        number = reporting.paper.decimal
        span = ""
        if row["low"] is not None:
            low, high = (max(0.0, min(1.0, row[end])) if share else row[end] for end in ("low", "high"))
            span = f"95 %: {number(low, share)} to {number(high, share)}"
        count = f"{row['n']} {row['unit']}{'s' * (row['n'] != 1)}"
        before = f"  (anchor {number(anchor, True)} %)" if anchor is not None and effect == "harm" else ""
        yield f"  {name:<20}{number(row['mean'], share) + (' %' if share else ''):<8}{span:<23}{count}{before}"


def missing_lines(lacking: Sequence[Mapping[str, Any]], level: int, *, full: bool) -> Iterator[str]:
    """The missing controls with their levels, and how to get the first of those that the levels above ask for."""
    if not lacking:
        return
    # no-break spaces: a name is told with its level, or not at all
    names = dict.fromkeys(
        f"{row['control']}\N{NO-BREAK SPACE}(level\N{NO-BREAK SPACE}{row['level']})" for row in lacking
    )
    line, *more = textwrap.wrap(f"missing: {', '.join(names)}", WIDTH - 10)
    yield line.replace("\N{NO-BREAK SPACE}", " ") + " …" * bool(more) + ("" if full else "; --full")
    above = sorted((row for row in lacking if row["level"] > level), key=lambda row: row["level"])
    yield from [f"{row['control']} (level {row['level']}): {row['how']}" for row in above[:1]]


def _print_rest(results: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> None:
    title = f"{results['setting']}: mean ± SEM, {results['n_anchors']} anchor(s)"
    names = {"quantity": "quantity", "paper": "paper", "here": "here", "fraction": "fraction of the way back"}
    table = reporting.paper.paper_table(results)
    if results["setting"] == OWN:  # a user's history is no reproduction of the paper, and what it lacks is told below
        del names["paper"]
        table = [row for row in table if row["here"] != reporting.paper.NOT_RUN]
    print_table((*names.values(),), ([row[key] for key in names] for row in table), title=title)
    demands = (
        (claim["organism"], demand["level"], demand["name"], HOLDS[demand["holds"]], demand["figures"])
        for claim in found
        for demand in claim["demands"]
    )
    print_table(("organism", "level", "criterion", "holds", "figures"), demands, title="criteria of each claim level")
    if lacking := results.get("missing"):
        columns = ("organism", "control", "level", "what", "how")
        print_table(columns, ([row[key] for key in columns] for row in lacking), title="missing, and how to make it")
    for claim in found:
        print_line(f"\n{claim['organism']}, claim level {claim['level']} of 5: {claim['sentence']}")
    console.print()
