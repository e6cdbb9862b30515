"""On an accelerator: states, answers, interventions and training equal the CPU's. Skips where there is none.

GRAVLENS_TEST_DEVICE names the device; `cpu` runs the tests against the CPU itself (benchmarks/device.sh --dry).
"""

import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, assert_same_states

from gravlens.activations.residuals import cache_residuals, read_residuals
from gravlens.blockers.penalty import Penalty
from gravlens.blockers.projection import UpdateProjection
from gravlens.directions.vrev import locate_vrev
from gravlens.history.prompts import Example
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.edits import Ablate, everywhere
from gravlens.interventions.hooks import intervene
from gravlens.models.forward import final_logits, generate
from gravlens.models.opening import open_model
from gravlens.models.placement import Placement, as_device
from gravlens.training.finetune import Recipe, finetune

ALL = range(tiny.LAYERS)


@pytest.fixture(scope="module")
def device() -> str:
    found = as_device(os.environ.get("GRAVLENS_TEST_DEVICE", "auto"))
    if found.type == "cpu" and "GRAVLENS_TEST_DEVICE" not in os.environ:
        pytest.skip("no accelerator here")
    return str(found)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> ModelSequence:
    home = tmp_path_factory.mktemp("history")
    folders = [tiny.save(tiny.llama(seed), home / str(seed)) for seed in (0, 1, 2)]
    return ModelSequence.from_folders(
        witness=folders[0], anchor=folders[1], runs={"run": Path(f"{home}/2")}, probes=tiny.PROMPTS
    )


def test_states_of_a_history_are_those_of_the_cpu(history: ModelSequence, device: str, tmp_path: Path) -> None:
    wanted = cache_residuals(history)
    for store in (None, tmp_path / "store"):
        found = cache_residuals(history, placement=Placement(device=device), store=store)
        assert_same_states(found.values, wanted.values)
    rough = cache_residuals(history, placement=Placement(device=device, dtype="bf16")).values
    off = np.linalg.norm(rough - wanted.values, axis=-1) / np.linalg.norm(wanted.values, axis=-1)
    assert 0 < off.mean() < 0.05, "bf16 rounds, and no more"


def test_answers_and_ablation_are_those_of_the_cpu(history: ModelSequence, device: str) -> None:
    direction = locate_vrev(cache_residuals(history), layer=1)
    here, there = (open_model(history.anchor, device=name) for name in ("cpu", device))
    assert generate(here, PROMPT_IDS, max_new_tokens=4) == generate(there, PROMPT_IDS, max_new_tokens=4)
    wanted = final_logits(here, PROMPT_IDS)
    with intervene(there, Ablate(everywhere(direction, there))):
        changed = read_residuals(there, PROMPT_IDS, layers=ALL)
        logits = final_logits(there, PROMPT_IDS)
    along = np.abs(changed[:, 1].numpy() @ direction.vector) / np.linalg.norm(changed[:, 1].numpy(), axis=-1)
    assert (along < 1e-4).all() and not torch.allclose(logits.cpu(), wanted, atol=1e-3)
    assert torch.allclose(final_logits(there, PROMPT_IDS).cpu(), wanted, atol=1e-3), "and is gone afterwards"


@pytest.mark.parametrize("kind", [None, Penalty, UpdateProjection])
def test_blocked_runs_train_on_the_device(
    history: ModelSequence, device: str, tmp_path: Path, kind: type | None
) -> None:
    vs = locate_vrev(cache_residuals(history))
    examples = [Example(prompt, prompt.split()[-1]) for prompt in tiny.PROMPTS]
    run = finetune(
        history.anchor,
        examples,
        out=tmp_path / "run",
        recipe=Recipe(steps=2, batch=2, learning_rate=1e-3),
        save_steps=(2,),
        blocker=kind and kind(vs, history.require_probes()),
    )
    assert np.isfinite(run.log.loss).all() and len(run.checkpoints) == 1
    moved = cache_residuals(history, checkpoints=[history.anchor, *run.checkpoints]).values
    assert np.linalg.norm(moved[1] - moved[0]) > 0
