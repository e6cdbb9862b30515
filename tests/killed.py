"""A store that is killed, run by test_stored_readings.py: python tests/killed.py FOLDER KILLS

The parent only forks; children read a small history into a store and are killed at random instants, some of them twice.
What they leave is completed by one more child and held, byte by byte, against a store that nobody disturbed.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from histories import history_on_disk

from gravlens.activations import reader as passes
from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.history.sequence import ModelSequence
from gravlens.organisms.refusal_language import probe_prompts

torch.set_num_threads(1)
passes.TOKENS["cpu"] = 40
passes.BLOCK_BYTES, passes.TOKENS_ELSEWHERE = 1000, 60  # several files for each checkpoint


def read(home: Path, store: Path) -> Residuals:
    """The whole history into a store."""
    runs = {"seed0": str(home / "ft/seed0/checkpoint-*")}
    seq = ModelSequence.from_folders(witness=home / "base", anchor=home / "aligned", runs=runs)
    prompts = probe_prompts()[:24]
    return cache_residuals(seq, [*prompts, *prompts[::5]], store=store)  # some of them twice


def child(work: Callable[[], object]) -> int:
    """The number of a forked process that works and ends."""
    number = os.fork()
    if number:
        return number
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def finished(number: int) -> bool:
    return os.waitpid(number, 0)[1] == 0


def files(store: Path) -> dict[str, bytes]:
    """Every file of states and answers; scratch of killed processes does not count."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*.safetensors"))}


def main(home: Path, kills: int) -> None:
    """Print a line, or fail."""
    assert finished(child(lambda: history_on_disk(home)))
    whole, rng = home / "whole", random.Random(0)
    start = time.perf_counter()
    assert finished(child(lambda: read(home, whole)))
    takes = time.perf_counter() - start
    wanted, states = files(whole), 0
    for trial in range(kills):
        store = home / f"store{trial}"
        for _ in range(1 + trial % 2):
            number = child(lambda store=store: read(home, store))
            time.sleep(rng.uniform(0.02, 1.05 * takes))
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
        left = files(store)
        states += len(left)
        other = [name for name, content in left.items() if wanted.get(name) != content]
        assert not other, f"half written, or other bytes: {other}"
        assert finished(child(lambda store=store: read(home, store)))
        assert files(store) == wanted, f"trial {trial}"
        shutil.rmtree(store)
    both = home / "both"
    assert all(map(finished, [child(lambda: read(home, both)) for _ in range(2)]))
    assert files(both) == wanted
    print(f"{kills} kills, {states / kills:.1f} of {len(wanted)} files there on the average, all ended alike")
    assert 0 < states / kills < len(wanted) - 1, "kills before the first or after the last file show nothing"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
