"""Run the commands of docs/first_minutes.md in a folder, and put their real output into the page.

python docs/first_minutes.py FOLDER CHECKPOINTS [--installed]

CHECKPOINTS holds base, aligned, ft/*/checkpoint-*, probes.jsonl and held_out.jsonl; nothing is written there. The
commands stand in the page alone: each block that begins with `$ ` is a command and its output, and the TOML block is
written to SEQUENCE.toml. With --installed the gravlens on PATH is used, and the block that installs keeps its output.
"""

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PAGE = HERE / "first_minutes.md"
BLOCK = re.compile(r"^```text\n\$ (.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOML = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOTAL = re.compile(r"(<!-- total -->\n).*?(\n<!-- end -->)", re.DOTALL)
INSTALLS = "pip install"


class Ran(NamedTuple):
    """A command's output, its seconds, and those of processor time."""

    output: str
    seconds: float
    processor: float


def in_shell(folder: Path, environment: dict[str, str]) -> Callable[[str], Ran]:
    """Run commands one after the other, as a user in `folder` would."""

    def run(command: str) -> Ran:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        ended = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        lines = [line.rstrip() for line in ended.stdout.replace(f"{folder}/", "").splitlines()]
        said = f"({seconds:.0f} s, {processor:.0f} s of processor time, exit code {ended.returncode})"
        return Ran("\n".join([*lines, said]) + "\n", seconds, processor)

    return run


def renewed(page: str, run: Callable[[str], Ran], *, installed: bool, machine: Callable[[], str]) -> str:
    """The page with the output of each command, in their order, and the time of all."""
    times: list[Ran] = []

    def again(block: re.Match[str]) -> str:
        if installed and INSTALLS in block[1]:
            return block[0]
        print(f"$ {block[1]}", file=sys.stderr)
        times.append(run(block[1]))
        print(times[-1].output, file=sys.stderr)
        return f"```text\n$ {block[1]}\n{times[-1].output}```"

    page = BLOCK.sub(again, page)
    seconds, processor = (sum(getattr(one, name) for one in times) / 60 for name in ("seconds", "processor"))
    after = " after installing" if installed else ""
    total = f"**{seconds:.0f} minutes in all**{after}, {processor:.1f} minutes of processor time: {machine()}."
    return TOTAL.sub(lambda found: f"{found[1]}{total}{found[2]}", page)


def processor() -> str:
    """The processor, its cores, and how busy they are."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    return f"{os.cpu_count()} cores of {name[1] if name else 'a processor'}, load {os.getloadavg()[1]:.0f} at the end"


def main(folder: str, checkpoints: str, *options: str) -> None:
    """Run all, and write the page."""
    where = Path(folder).resolve()
    where.mkdir(parents=True, exist_ok=True)
    page = PAGE.read_text(encoding="utf-8")
    (toml,) = TOML.findall(page)
    (where / "SEQUENCE.toml").write_text(toml, encoding="utf-8")
    (where / "models").unlink(missing_ok=True)
    (where / "models").symlink_to(Path(checkpoints).resolve())
    environment = {**os.environ, "GRAVLENS_CACHE": str(where / "cache"), "REPOSITORY": str(HERE.parent)}
    environment |= {"TQDM_DISABLE": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    if "--installed" not in options:
        environment["PATH"] = f"{where / 'gravlens/.venv/bin'}{os.pathsep}{environment['PATH']}"
        environment.pop("PYTHONPATH", None)  # what was cloned is run
    run = in_shell(where, environment)
    PAGE.write_text(renewed(page, run, installed="--installed" in options, machine=processor), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
