"""Run the harness; see harness.py."""

import argparse
import json
import sys
from pathlib import Path

from crash.careless import careless
from crash.harness import Bench
from crash.shim import Mode


def main() -> None:
    """Print a line of JSON for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--at-most", type=int, default=10**6, help="cases of an operation in each mode")
    parser.add_argument("--at-random", type=int, default=0)
    parser.add_argument("--modes", default="fail,kill,full,short")
    given = parser.parse_args()
    home = given.home.resolve()
    controls = {one.name: one for one in careless()}
    chosen = [controls[name] for name in given.only or () if name in controls]
    if not chosen:
        from crash.operations import operations  # imports torch and transformers

        chosen = [one for one in operations(home / "inputs") if not given.only or one.name in given.only]
    for operation in chosen:
        bench = Bench(operation, home)
        print(f"{operation.name}: {len(bench.wanted.calls)} calls, {bench.seconds:.2f} s", file=sys.stderr, flush=True)
        modes = [Mode[name.upper()] for name in given.modes.split(",") if name]
        for row in (*bench.disturbed(given.at_most, modes), *bench.at_random(given.at_random)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
