"""Runs that diverge, anchors of another precision, and concepts: what `Monitor` and `finetune` say, log and keep."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import blocked
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from by_layer import stacked
from histories import refused
from transformers import TrainerCallback

from gravlens.activations.contrasts import Contrast
from gravlens.activations.residuals import cache_residuals
from gravlens.directions.trajectory import CONCEPT_MEASURES, follow_concepts
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import open_model
from gravlens.organisms.refusal_language import held_out_prompts, probe_prompts
from gravlens.training.finetune import Recipe, finetune
from gravlens.training.monitor import Monitor
from gravlens.training.thresholds import Threshold

VS, PROBES = blocked.vs(), tiny.PROMPTS
FOLLOWED = {
    "refusal": Contrast.of(probe_prompts()[:6], held_out_prompts()[:6]),
    "style": Contrast.of(probe_prompts()[6:12], held_out_prompts()[6:12]),
}
saving = import_module("gravlens.training.finetune")


class Spoil(TrainerCallback):
    """At one step a weight becomes NaN, as in a run that diverges."""

    def __init__(self, step: int, value: float = float("nan")) -> None:
        self.step, self.value = step, value

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight[0, 0] = self.value


# -- finetune ----------------------------------------------------------------------------------------------------------


def start() -> Any:
    return open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)


def folders(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def test_a_run_that_diverges_is_an_error_and_what_was_saved_stays(tmp_path: Path) -> None:
    recipe = Recipe(steps=6, batch=2, learning_rate=1e-3)
    with refused("diverged", "step 4", "gradient", "1, 3"):
        finetune(start(), blocked.EXAMPLES, out=tmp_path / "run", recipe=recipe, save_steps=(1, 3, 5),
                 monitor=Spoil(3, 3e38))  # fmt: skip
    assert folders(tmp_path / "run") == ["checkpoint-1", "checkpoint-3"]
    sequence = ModelSequence.from_folders(
        witness=tmp_path / "run/checkpoint-1", anchor=tmp_path / "run/checkpoint-1", probes=PROBES
    )
    assert np.isfinite(cache_residuals(sequence).values).all()


def test_a_learning_rate_that_is_far_too_high(tmp_path: Path) -> None:
    with refused("diverged", "checkpoints of", "so far: none"):
        finetune(start(), blocked.EXAMPLES, out=tmp_path / "run", save_steps=(6,),
                 recipe=Recipe(steps=6, batch=2, learning_rate=1e20))  # fmt: skip
    assert folders(tmp_path / "run") == []


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """Of the update itself, with a gradient that is finite."""
    with refused("diverged", "step 2", "weights"):
        finetune(start(), blocked.EXAMPLES, out=tmp_path / "run", save_steps=(1,),
                 recipe=Recipe(steps=2, batch=2), monitor=Spoil(2))  # fmt: skip
    assert folders(tmp_path / "run") == ["checkpoint-1"]


def test_the_log_holds_the_loss_that_was(tmp_path: Path) -> None:
    """Trainer's filter logs 0 for a loss that is not finite; a finite one is as it was."""
    assert saving._arguments(Recipe(), 0, tmp_path).logging_nan_inf_filter is False


# -- monitor -----------------------------------------------------------------------------------------------------------


def watched(
    out: Path, monitor: Monitor, module: Any = None, *, spoilt: int | None = None, **changes: Any
) -> list[dict[str, Any]]:
    trainer = blocked.trainer(out, module, **changes)
    if spoilt is not None:
        trainer.add_callback(Spoil(spoilt))
    monitor.attach(trainer)
    trainer.train()
    assert trainer.state.max_steps == 3
    return trainer.state.log_history


def test_a_diverged_run_goes_on_and_is_told_of_once(tmp_path: Path) -> None:
    monitor = Monitor(VS, PROBES)
    with pytest.warns(UserWarning, match="not finite at step 2, the run has diverged") as told:
        log = watched(tmp_path, monitor, spoilt=2)
    assert len([one for one in told if "diverged" in str(one.message)]) == 1
    assert monitor.diverged_at == 2 and monitor.stopped_at is None
    assert set(monitor.table.step) == {1} and monitor.table.notna().all().all()
    assert [row["step"] for row in log if row.get("monitor/diverged") == 1.0] == [2, 3], "all three steps were trained"


def test_a_diverged_run_with_a_threshold_is_stopped(tmp_path: Path) -> None:
    monitor = Monitor(VS, PROBES, stop_above=Threshold("fraction", 1e6))
    with pytest.warns(UserWarning, match="it is stopped"):
        watched(tmp_path, monitor, spoilt=2)
    assert (monitor.diverged_at, monitor.stopped_at) == (2, 2)


def test_an_anchor_that_is_not_finite_is_an_error_before_training(tmp_path: Path) -> None:
    module = tiny.llama()
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with refused("not finite at layer 0"):
        watched(tmp_path, Monitor(VS, PROBES), module)


def test_a_whole_run_is_not_told_of(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        monitor = Monitor(VS, PROBES)
        log = watched(tmp_path, monitor)
    assert monitor.diverged_at is None and not any("monitor/diverged" in row for row in log)


def in_4_bits(seed: int = 0) -> Any:
    """A model that says so of itself: the weights stay plain, so that the CPU trains it."""
    module = tiny.llama(seed)
    module.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return module


@pytest.mark.parametrize("resumed", [False, True])
def test_an_anchor_of_another_precision_is_refused(tmp_path: Path, resumed: bool) -> None:
    """A trainer in 4 bits, its anchor a folder in fp32; in bf16 the folder is read like the run."""
    folder = tiny.save(tiny.llama(), tmp_path / "anchor")
    state = type("State", (), {"global_step": 2 if resumed else 0, "max_steps": 3, "is_world_process_zero": True})()
    arguments = type("Arguments", (), {"report_to": []})()

    def begin(monitor: Monitor, module: Any) -> None:
        monitor.on_train_begin(arguments, state, None, model=module, processing_class=tiny.TOKENIZER)

    with refused("is read in float32, 4-bit (bitsandbytes fp4), the anchor in float32."):
        begin(Monitor(VS, PROBES, anchor=folder), in_4_bits())
    begin(Monitor(VS, PROBES, anchor=in_4_bits()), in_4_bits())
    begin(Monitor(VS, PROBES, anchor=folder), tiny.llama().bfloat16())
    residuals = cache_residuals(ModelSequence.from_folders(witness=folder, anchor=folder, probes=PROBES))
    with refused("bfloat16, the anchor in float32"):
        begin(Monitor(VS, PROBES, anchor=residuals), tiny.llama().bfloat16())
    begin(Monitor(VS, PROBES, anchor=residuals), tiny.llama())


def test_a_drift_within_the_noise_of_bf16_has_no_alignment_in_the_log(tmp_path: Path) -> None:
    """The same drift, long in units of the distance, in two dtypes."""
    logs = {}
    for dtype in (torch.float32, torch.bfloat16):
        monitor = Monitor(VS, PROBES)
        logs[dtype] = watched(tmp_path / str(dtype), monitor, tiny.llama().to(dtype), learning_rate=1e-4)
        assert monitor.table.judged.any() == (dtype == torch.float32)
        assert (monitor.table.relative_drift > 0.02).any(), "far more than 2 % in both"
    assert any("monitor/alignment" in row for row in logs[torch.float32])
    assert not any("monitor/alignment" in row for row in logs[torch.bfloat16])


# -- concepts ----------------------------------------------------------------------------------------------------------


def test_concepts_are_those_of_the_saved_checkpoints(tmp_path: Path) -> None:
    monitor = Monitor(VS, PROBES, concepts=FOLLOWED)
    anchor = tiny.save(tiny.llama(), tmp_path / "anchor")
    finetune(start(), blocked.EXAMPLES, out=tmp_path / "run", recipe=Recipe(steps=2, batch=2, learning_rate=2e-3),
             save_steps=(1, 2), monitor=monitor)  # fmt: skip
    runs = {"monitor": str(tmp_path / "run/checkpoint-*")}
    sequence = ModelSequence.from_folders(witness=anchor, anchor=anchor, runs=runs, probes=PROBES)
    wanted = follow_concepts(sequence, FOLLOWED, layers=VS.layers)
    wanted, found = (stacked(one) for one in (wanted, monitor.concept_trajectory))
    wanted = wanted[wanted.run == "monitor"].reset_index(drop=True)
    assert len(found) == 2 * 2 * 3
    pd.testing.assert_frame_equal(found.reset_index(drop=True), wanted, check_dtype=False, atol=1e-4)
    assert (found.cosine < 0.9999).any()


def test_concepts_are_in_the_log(tmp_path: Path) -> None:
    monitor = Monitor(VS, PROBES, concepts=FOLLOWED)
    log = watched(tmp_path, monitor)
    mean = monitor.concept_trajectory.layer_mean.set_index(["concept", "step"])
    rows = [row for row in log if "monitor/fraction" in row]
    assert len(rows) == 3
    for row in rows:
        for concept in FOLLOWED:
            found = [row[f"monitor/{concept}/{key}"] for key in CONCEPT_MEASURES]
            assert found == pytest.approx(mean.loc[(concept, row["step"]), list(CONCEPT_MEASURES)].tolist())
    assert Monitor(VS, PROBES).concept_trajectory.table.empty
    assert "without a measurement" in repr(Monitor(VS, PROBES).trajectory)


def test_concepts_need_the_anchors_model_and_enough_pairs() -> None:
    with refused("'style'", "2 pairs"):
        Monitor(VS, PROBES, concepts={"style": FOLLOWED["style"][:2]})
