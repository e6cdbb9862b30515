"""Worker processes at Ctrl-C, where the running job cleans up and no other begins, and when their parent is killed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from gravlens.core import parallel

SCRIPT = """
import os, signal, sys, time
from functools import partial
from pathlib import Path

from gravlens.core.parallel import processes


def job(folder, name):
    try:
        (folder / f"{name}-began").write_text(str(os.getpid()))
        time.sleep(60)
    finally:
        (folder / f"{name}-cleaned").touch()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
    folder = Path(sys.argv[1])
    try:
        with processes(1, 1) as run_all:
            run_all("jobs", [partial(job, folder, name) for name in "abcd"])
    except KeyboardInterrupt:
        sys.exit(130)
"""


def started(folder: Path) -> "subprocess.Popen[str]":
    """A main process whose one worker is in its first job."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    main = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not ((folder / "a-began").exists() and (folder / "a-began").read_text()) and main.poll() is None:
        time.sleep(0.05)
    return main


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, name: str) -> None:
    with started(tmp_path) as main:
        worker = Path(f"/proc/{(tmp_path / 'a-began').read_text()}")
        assert worker.exists()
        os.kill(main.pid, getattr(signal, name))  # it alone, as a scheduler or the kernel does
        main.wait(timeout=30)
    until = time.monotonic() + 20
    while worker.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not worker.exists() and [path.name for path in tmp_path.glob("?-began")] == ["a-began"]


@pytest.mark.long
def test_ctrl_c_ends_workers_with_their_main_process(tmp_path: Path) -> None:
    with started(tmp_path) as main:
        os.killpg(main.pid, signal.SIGINT)  # as a terminal does: to all of them
        try:
            _, said = main.communicate(timeout=30)
        finally:
            if main.poll() is None:
                os.killpg(main.pid, signal.SIGKILL)
    assert main.returncode == 130 and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.glob("?-*")) == ["a-began", "a-cleaned"]


@pytest.mark.long
def test_a_long_job_has_its_bar_before_it_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(parallel, "TICK", 0.1)
    with parallel.processes(1, 1) as run_all:
        run_all("jobs", [partial(time.sleep, 0.5)])
    bars = capfd.readouterr().err.split("\r")
    assert any("jobs:   0%" in bar and "0/1" in bar for bar in bars) and "1/1" in bars[-1]
