"""The refusal organism gives one answer on processors that round differently, emulated by older instruction sets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROCESSORS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "sse": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
ROUNDING = """
import hashlib, torch
x = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
print(hashlib.sha256(((x @ x.T) / 30).log_softmax(1).numpy().tobytes()).hexdigest())"""
HISTORY = """
import hashlib, json, sys
from pathlib import Path
from gravlens.directions.trajectory import follow
from gravlens.organisms.base import Arm
from gravlens.organisms.arms import made_by
from gravlens.organisms.refusal import RefusalOrganism
from gravlens.studies.experiment import carry_out

if __name__ == "__main__":  # worker processes import this file
    organism = RefusalOrganism(organism=4)
    arms = [Arm("unblocked", (0,), keep=True), Arm("clamp", (0,), blocker=made_by("clamp"))]
    study = carry_out(organism, Path(sys.argv[1]), arms=arms, workers=1)
    found = {"witness": hashlib.sha256((study.home / "witness/model.safetensors").read_bytes()).hexdigest()}
    for arm in arms:
        table = study.follow(arm).layer_mean
        rows = table[(table.prompts == "held_out")].set_index("step")
        found[arm.name] = {
            "alignment": rows.alignment.to_dict(),
            "fraction": rows.fraction.to_dict(),
            "harm": study.facts(arm, 0)["behavior"][str(organism.recipe.steps)]["compliance_rate"],
        }
    print(json.dumps(found))"""


def told(code: Path, *given: str, processor: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **PROCESSORS[processor]}
    command = [sys.executable, str(code), *given]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[
        -1
    ]


def leaves(found: Any) -> list[float]:
    return [leaf for one in found.values() for leaf in leaves(one)] if isinstance(found, dict) else [found]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_organism_is_the_same_on_other_processors(tmp_path: Path) -> None:
    rounding, history = tmp_path / "rounding.py", tmp_path / "history.py"
    rounding.write_text(ROUNDING)
    history.write_text(HISTORY)
    if len({told(rounding, processor=name) for name in PROCESSORS}) < 2:
        pytest.skip("this machine's instruction sets cannot be switched")
    made = {name: json.loads(told(history, str(tmp_path / name), processor=name)) for name in PROCESSORS}
    assert len({found.pop("witness") for found in made.values()}) > 1, "weights differ, if only in their last digits"
    (tmp_path / "figures.json").write_text(json.dumps(made))
    native = made.pop("native")
    for found in made.values():
        for arm, figures in found.items():
            for name, within in {"alignment": 0.05, "fraction": 0.05, "harm": 0.05}.items():
                one, other = ({name: each[arm][name]} for each in (found, native))
                assert leaves(one) == pytest.approx(leaves(other), abs=within), (arm, name, figures)
    assert native["clamp"]["harm"] < native["unblocked"]["harm"]
