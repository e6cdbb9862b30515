"""Make the table of docs/reliability.md: python tests/reliability.py --out docs/data/reliability.csv [--quick]

Cases by area and outcome, from the crash harness (tests/crash), kills at random instants, the broken inputs of
tests/project/test_broken_inputs.py, the random trees around a store of tests/activations/test_store_folders.py, and
terminals of few letters and columns.
Prints the table as Markdown and each fault on stderr, and ends with 1 where there is one.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
from crash.harness import OUTCOMES, cases
from typer.testing import CliRunner

from gravlens.cli import app

TESTS = Path(__file__).resolve().parent

KILLED = ("store cold", "store damaged", "finetune", "finetune resumed", "arm", "gravlens trajectory")
KINDS = {
    "fail": "one call fails",
    "kill": "killed at a call",
    "full": "disk full from a call on",
    "short": "short write",
    "random kill": "killed at random",
}
COLUMNS = ("area", "disturbance", "cases", *OUTCOMES)
Row = dict[str, Any]


def crashes(home: Path, *, failing: int, at_most: int, kills: int) -> Iterator[Row]:
    """The writing calls of every operation, and kills at random instants."""
    parts = [
        ("--modes", "fail", "--at-most", str(failing)),
        ("--modes", "kill,full,short", "--at-most", str(at_most)),
        ("--modes", "", "--at-random", str(kills), "--only", *KILLED),
    ]
    with ThreadPoolExecutor(2) as beside:  # each waits for a process of its own
        jobs = [beside.submit(cases, home / str(number), *part) for number, part in enumerate(parts)]
        for one in [row for job in jobs for row in job.result()]:
            yield {**one, "disturbance": KINDS[one["kind"]], "case": f"{one['operation']}, {one['case']}"}


def broken_inputs(at_most: int) -> Iterator[Row]:
    """Hostile checkpoints, prompts, histories and commands."""
    sys.path.append(str(TESTS / "project"))
    every = import_module("test_broken_inputs").CASES
    for one in every[:: max(1, len(every) // at_most)]:
        outcome, told = one.examined()
        named = {"right": "right result", "hang": "traceback"}.get(outcome, outcome)
        yield {"area": one.area, "disturbance": "broken input", "case": one.name, "outcome": named, "text": told}


def trees_around_stores(examples: int) -> Iterator[Row]:
    """Stores among random trees of other files, pruned, listed and verified."""
    sys.path.append(str(TESTS / "activations"))
    from hypothesis import given, settings
    from hypothesis import strategies as st

    folders: Any = import_module("test_store_folders")
    inner, found = folders.test_only_what_a_store_wrote_is_removed.hypothesis.inner_test, []
    scratch = SimpleNamespace(mktemp=lambda name: Path(tempfile.mkdtemp(prefix=name)))

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(tree=folders.TREES, unused=st.sampled_from([None, 0.0, 1.0]))
    def one(tree: Any, unused: Any) -> None:
        try:
            inner(scratch, tree, unused)
            found.append(("right result", ""))
        except AssertionError as error:
            found.append(("lost", str(error)))
        except Exception as error:
            found.append(("traceback", repr(error)))

    one()
    for outcome, text in found:
        named = {"area": "activation cache", "disturbance": "random files around it", "case": "random tree"}
        yield {**named, "outcome": outcome, "text": text}


def terminals(columns: Sequence[str]) -> Iterator[Row]:
    """Help, results and errors of every command in terminals of few letters and few columns."""
    sys.path.append(str(TESTS / "cli"))
    told: Any = import_module("test_terminals")
    with tempfile.TemporaryDirectory() as folder:
        history = str(told.history_in(Path(folder)))
        asked = [[*words, "--help"] for words in told.COMMANDS]
        asked += [[name, history] for name in ("inspect", "trajectory", "plan", "locate")]
        asked += [["locate", f"{told.RUN}.toml"], ["store", "list", folder], ["no such command"]]
        for charset, width, words in product(("ascii", "latin-1", "utf-8"), columns, asked):
            found = CliRunner(charset=charset).invoke(app, words, env={"COLUMNS": width})
            clean = found.exception is None or isinstance(found.exception, SystemExit)
            ended = {0: "right result", 2: "clear error"}.get(found.exit_code, "wrong")
            named = {
                "area": "terminals",
                "disturbance": "letters and columns",
                "case": " ".join([charset, width, *words]),
            }
            yield {**named, "outcome": ended if clean else "traceback", "text": repr(found.exception)}


def counted(rows: Iterable[Row]) -> list[Row]:
    """One row for each area and disturbance, and the sum of all."""
    tables: dict[tuple[str, str], Counter[str]] = {}
    for one in rows:
        tables.setdefault((one["area"], one["disturbance"]), Counter())[one["outcome"]] += 1
    found = [(*names, counts) for names, counts in sorted(tables.items())]
    found.append(("all", "", sum((counts for *_, counts in found), Counter())))
    return [
        {"area": area, "disturbance": disturbance, "cases": counts.total(), **{name: counts[name] for name in OUTCOMES}}
        for area, disturbance, counts in found
    ]


def markdown(table: Sequence[Row]) -> str:
    """The table as docs/reliability.md shows it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * 2 + "|---:" * (len(COLUMNS) - 2) + "|"]
    lines += ["| " + " | ".join(f"{row[name]}" for name in COLUMNS) + " |" for row in table]
    return "\n".join(lines).replace("|  |", "| |")


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--quick", action="store_true", help="a sample, in about three minutes")
    parser.add_argument(
        "--at-most",
        type=int,
        default=10**6,
        help="calls of an operation that kill, find the disk full or write half of their bytes; default: all",
    )
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # before torch is imported
    quick = given.quick
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as beside:  # it waits for another process
        asked = {
            "failing": 1 if quick else 10**6,
            "at_most": 1 if quick else given.at_most,
            "kills": 1 if quick else 12,
        }
        crashed = beside.submit(lambda: list(crashes(Path(scratch), **asked)))
        rows += broken_inputs(100 if quick else 10**6)
        rows += trees_around_stores(20 if quick else 300)
        rows += terminals(["20"] if quick else ["1", "20", "80"])
        rows += crashed.result()
    table = counted(rows)
    pd.DataFrame(table).to_csv(given.out, index=False)
    print(markdown(table))
    faults = [one for one in rows if one["outcome"] in OUTCOMES[2:]]
    for one in faults:
        print(f"{one['outcome']}: {one['area']}, {one['case']}: {one['text']}", file=sys.stderr)
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
