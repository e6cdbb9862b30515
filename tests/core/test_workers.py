"""Worker processes at Ctrl-C: the running job cleans up, no other begins, and nobody says a word."""

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
import sys, time
from functools import partial
from pathlib import Path

from gravlens.core.parallel import processes


def job(folder, name):
    try:
        (folder / f"{name}-began").touch()
        time.sleep(60)
    finally:
        (folder / f"{name}-cleaned").touch()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        with processes(1, 1) as run_all:
            run_all("jobs", [partial(job, folder, name) for name in "abcd"])
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.long
def test_ctrl_c_ends_workers_with_their_main_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as main:
        while not (tmp_path / "a-began").exists() and main.poll() is None:
            time.sleep(0.05)
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
