"""benchmarks/device.sh, dry: the script that is run where there is an accelerator works from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_the_device_script_runs_dry(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "benchmarks/device.sh"), "--dry", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "device.json").read_text())
    assert found["machine"]["device"] == "cpu" and found["size"] == "tiny"
    reading = found["reading"]
    assert {"gravlens", "hugging_face", "transformer_lens"} <= reading["ratio_to_floor"].keys()
    # bf16: the same prompts in other batches round otherwise
    assert all(off < 0.1 for off in reading["largest_relative_difference"].values())
    assert found["generation"]["tokens_per_second"] > 0 and found["generation"]["ratio_to_plain"].keys() == {
        *("plain", "steer", "ablate"),
    }
    assert all(took > 0 for took in found["blocking"]["seconds_per_step"].values())


def test_an_unknown_option_is_answered_with_the_usage() -> None:
    script = str(ROOT / "benchmarks/device.sh")
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and "--dry" in done.stdout
