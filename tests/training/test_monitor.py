"""The live monitor: what it reports is what `follow` reads of saved checkpoints, and the training never feels it."""

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
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
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback

from gravlens.activations.residuals import cache_residuals
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import MEASURES, Trajectory, follow
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode, prompts_digest
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import open_model
from gravlens.stats.nulls import NullDraws, compare
from gravlens.training.finetune import Recipe, finetune
from gravlens.training.monitor import Monitor, check_whole, undisturbed
from gravlens.training.thresholds import Threshold, calibrate

VS, PROBES = blocked.vs(), PromptSet.of(tiny.PROMPTS)
RECIPE = Recipe(steps=4, batch=2, learning_rate=2e-3)


def dropping() -> Any:
    """A model that no two training passes of are alike."""
    return tiny.llama(attention_dropout=0.3)


def by_follow(out: Path, folder: Path, anchor: Any = None) -> pd.DataFrame:
    start = tiny.save(dropping() if anchor is None else anchor, folder / "anchor")
    runs = {"monitor": str(out / "checkpoint-*")}
    sequence = ModelSequence.from_folders(witness=start, anchor=start, runs=runs, probes=PROBES)
    return follow(cache_residuals(sequence), VS).table


def assert_same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    rows = [t.sort_values(["step", "layer"]).reset_index(drop=True) for t in (found, wanted)]
    columns = ["run", "step", "layer", "judged", "prompts"]
    pd.testing.assert_frame_equal(rows[0][columns], rows[1][columns])
    measures = [table[list(MEASURES)].astype(float) for table in rows]
    # The states agree to about 1e-6; the cosine of a short drift divides that by its norm (1.25e-5 on one processor).
    np.testing.assert_allclose(*measures, rtol=1e-3, atol=1e-4)


# -- the same numbers as of saved checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"lora": 4, "gradient_checkpointing": True}])
def test_it_reports_what_follow_reads_of_the_checkpoints(changes: dict[str, Any], tmp_path: Path) -> None:
    start, monitor = open_model(dropping(), tokenizer=tiny.TOKENIZER), Monitor(VS, PROBES)
    made = finetune(start, blocked.EXAMPLES, out=tmp_path / "run", recipe=replace(RECIPE, **changes),
                    save_steps=(1, 2, 3, 4), monitor=monitor)  # fmt: skip
    assert_same(monitor.table, by_follow(tmp_path / "run", tmp_path))
    assert len(made.log) == 4 and monitor.table.judged.any() and monitor.table.fraction.abs().max() > 0.01
    mean = monitor.trajectory.layer_mean.relative_drift.to_numpy()
    layers = [monitor.table[monitor.table.layer == v.layer].drift_norm.to_numpy() / v.distance for v in VS]
    np.testing.assert_allclose(mean, np.mean(layers, 0))


def test_by_hand_of_hugging_faces_own_hidden_states(tmp_path: Path) -> None:
    monitor = Monitor(VS, PROBES, every=3)
    trainer = blocked.trainer(tmp_path, tiny.llama())
    monitor.attach(trainer)
    trainer.train()
    drift = means(trainer.model.eval()) - means(tiny.llama())
    for v in VS:
        (row,) = monitor.table[monitor.table.layer == v.layer].to_dict("records")
        along = float(drift[v.layer] @ np.float64(v.vector))
        assert row["step"] == 3 and row["fraction"] == pytest.approx(along / v.distance, abs=1e-5)
        assert row["alignment"] == pytest.approx(along / np.linalg.norm(drift[v.layer]), abs=1e-5)


def means(module: Any) -> dict[int, np.ndarray]:
    with torch.no_grad():
        states = [
            module(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for ids in encode(tiny.TOKENIZER, PROBES)
        ]
    return State({v.layer: np.mean([one[v.layer + 1][0, -1].double().numpy() for one in states], 0) for v in VS})


class State(dict[int, np.ndarray]):
    def __sub__(self, other: Mapping[int, np.ndarray]) -> "State":
        return State({layer: mean - other[layer] for layer, mean in self.items()})


def test_its_trajectory_serves_what_a_trajectory_serves(tmp_path: Path) -> None:
    named = Directions(tuple(replace(v, prompts=prompts_digest(encode(tiny.TOKENIZER, PROBES))) for v in VS))
    monitor = Monitor(named, PROBES)
    assert monitor.table.empty
    trainer = blocked.trainer(tmp_path)
    monitor.attach(trainer)
    trainer.train()
    assert set(monitor.table.prompts) == {"given"} and monitor.trajectory.layers_in_mean == VS.layers
    null = NullDraws("noise", np.random.default_rng(0).uniform(-0.1, 0.1, (99, 3, 2)), (1, 2, 3), VS.layers)
    assert len(stacked(compare(monitor.trajectory, null, prompts="given"))) == 9


# -- the training never feels it ---------------------------------------------------------------------------------------


def with_adapters(module: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(module, config)


def plain(out: Path, **further: Any) -> Trainer:
    return blocked.trainer(out, dropping(), **further)


def lora(out: Path, **further: Any) -> Trainer:
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    return blocked.trainer(out, with_adapters(dropping()), **checkpointing, **further)


def sft(out: Path, **further: Any) -> Trainer:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    args = trl.SFTConfig(
        output_dir=str(out),
        **{"max_steps": 3, "logging_steps": 2, **further},
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        neftune_noise_alpha=5.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    rows = datasets.Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in blocked.ROWS])
    return trl.SFTTrainer(dropping(), args=args, train_dataset=rows, processing_class=tiny.TOKENIZER)


@pytest.mark.parametrize("make", [plain, lora, sft])
def test_the_training_is_the_same_bit_for_bit(make: Callable[..., Trainer], tmp_path: Path) -> None:
    ends = []
    for watched in (False, True):
        trainer = make(tmp_path)
        monitor = Monitor(VS, PROBES).attach(trainer) if watched else None
        trainer.train()
        own = [row for row in trainer.state.log_history if "monitor/fraction" not in row]
        logs = [{k: v for k, v in row.items() if "per_second" not in k and "runtime" not in k} for row in own]
        ends.append((trainer.model.state_dict(), logs, torch.get_rng_state(), trainer.model.config.use_cache))
    (weights, logs, random, cache), (weights_, logs_, random_, cache_) = ends
    assert monitor is not None and list(monitor.table.step.unique()) == [1, 2, 3]
    assert all(torch.equal(weight, weights_[name]) for name, weight in weights.items())
    assert logs == logs_ and torch.equal(random, random_) and cache == cache_


def test_an_sft_run_is_followed(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    monitor = Monitor(VS, PROBES).attach(trainer)
    trainer.train()
    tiny.save(trainer.model, tmp_path / "run" / "checkpoint-3")
    last = monitor.table[monitor.table.step == 3]
    assert_same(last, by_follow(tmp_path / "run", tmp_path))


def test_modes_and_random_numbers_are_put_back_when_a_pass_fails() -> None:
    module = tiny.llama().train()
    module.model.layers[1].eval()
    modes, random = [part.training for part in module.modules()], torch.get_rng_state()
    with contextlib.suppress(KeyError), undisturbed(module):
        assert not any(part.training for part in module.modules())
        torch.rand(3)
        raise KeyError
    assert [part.training for part in module.modules()] == modes and torch.equal(torch.get_rng_state(), random)


# -- what it reports ---------------------------------------------------------------------------------------------------


class Integration(TrainerCallback):
    """Takes down what it is told, as those of `report_to` do: it stands before the monitor."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append({**logs, "step": state.global_step})


def test_logs_reach_integrations_and_the_history_at_every_evaluation(tmp_path: Path) -> None:
    integration = Integration()
    trainer = blocked.trainer(tmp_path, callback=integration, max_steps=4, logging_steps=2)
    monitor = Monitor(VS, PROBES, every=2, stop_above=Threshold("fraction", 9.0)).attach(trainer)
    other = Monitor(blocked.vs(5), PROBES, name="twin").attach(trainer)
    trainer.train()
    told = {row["step"]: row for row in integration.rows if "monitor/fraction" in row}
    assert list(told) == [2, 4] and [row["step"] for row in integration.rows if "twin/fraction" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in integration.rows if "loss" in row] == [2, 4], "the trainer's own rows still come"
    assert [row for row in trainer.state.log_history if "monitor/fraction" in row] == list(told.values())
    for step, row in told.items():
        mean = monitor.trajectory.layer_mean.set_index("step").loc[step]
        second = monitor.table[monitor.table.layer == 1].set_index("step").loc[step]
        assert row["monitor/fraction"] == pytest.approx(mean.fraction) and row["monitor/threshold"] == 9.0
        assert row["monitor/drift"] == pytest.approx(mean.relative_drift)
        assert row["monitor/layer_1/alignment"] == pytest.approx(second.alignment)
    assert set(other.table.run) == {"twin"}


def test_a_cosine_of_almost_no_drift_is_not_logged(tmp_path: Path) -> None:
    far = Directions((VS[0], replace(VS[1], distance=1e6)))
    trainer = blocked.trainer(tmp_path)
    Monitor(far, PROBES, stop_above=Threshold("alignment", -2.0)).attach(trainer)
    trainer.train()
    row = [row for row in trainer.state.log_history if "monitor/fraction" in row][-1]
    assert row["step"] == 3, "a cosine that is not judged exceeds nothing"
    assert "monitor/layer_0/alignment" in row and "monitor/layer_1/fraction" in row
    assert "monitor/layer_1/alignment" not in row and "monitor/alignment" not in row


def test_as_a_plain_callback_it_needs_no_trainer_where_nothing_is_reported_to(tmp_path: Path) -> None:
    monitor = Monitor(VS, PROBES)
    trainer = blocked.trainer(tmp_path, callback=monitor)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "monitor/fraction" in row] == [1, 2, 3]
    unbound = blocked.trainer(tmp_path, callback=Monitor(VS, PROBES))
    unbound.args.report_to = ["wandb"]
    with refused("wandb"):
        unbound.train()


def test_tensorboard_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = blocked.trainer(tmp_path, report_to=["tensorboard"])
    monitor = Monitor(VS, PROBES).attach(trainer)
    trainer.train()
    found = reading.EventAccumulator(str(tmp_path / "tb")).Reload()
    shown = [(event.step, event.value) for event in found.Scalars("train/monitor/fraction")]
    means = monitor.trajectory.layer_mean
    assert shown == [(step, pytest.approx(fraction)) for step, fraction in zip(means.step, means.fraction, strict=True)]


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_an_unknown_statistic_is_named() -> None:
    wrong: Any = "fractoin"
    with refused("'fractoin'"):
        calibrate([null_run(np.ones(5))] * 19, statistic=wrong, quantile=0.95)


@pytest.mark.parametrize(("statistic", "patience"), [("fraction", 1), ("alignment", 2)])
def test_it_stops_at_the_first_step_above_the_threshold(statistic: Any, patience: int, tmp_path: Path) -> None:
    free = blocked.trainer(tmp_path, max_steps=6)
    seen = Monitor(VS, PROBES).attach(free)
    free.train()
    values = seen.trajectory.layer_mean.set_index("step")[statistic]
    value = float(np.sort(values)[1])  # four of six lie above, two of them in a row at least
    streaks = (values > value).astype(int).rolling(patience).sum() == patience
    trainer = blocked.trainer(tmp_path, max_steps=6)
    monitor = Monitor(VS, PROBES, stop_above=Threshold(statistic, value, patience=patience)).attach(trainer)
    trainer.train()
    first = int(streaks.idxmax())
    assert streaks.any() and monitor.stopped_at == trainer.state.global_step == monitor.table.step.max() == first


def test_finetune_saves_the_state_that_it_was_stopped_at(tmp_path: Path) -> None:
    monitor = Monitor(VS, PROBES, every=2, stop_above=Threshold("fraction", -9.0))
    start = open_model(dropping(), tokenizer=tiny.TOKENIZER)
    made = finetune(start, blocked.EXAMPLES, out=tmp_path / "r", recipe=RECIPE, save_steps=(1, 4), monitor=monitor)
    assert monitor.stopped_at == 2 and [one.step for one in made.checkpoints] == [1, 2]
    wanted = by_follow(tmp_path / "r", tmp_path)
    assert_same(monitor.table, wanted[wanted.step == 2])


class Stopping(TrainerCallback):
    """Knows nothing of gravlens: notes what it is given, and stops at step 2."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.began, self.tokenizer = state.global_step, given["processing_class"]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_finetune_takes_any_callback_as_monitor(tmp_path: Path) -> None:
    watcher, start = Stopping(), open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
    made = finetune(start, blocked.EXAMPLES, out=tmp_path / "r", recipe=RECIPE, save_steps=(1,), monitor=watcher)
    assert (watcher.began, watcher.tokenizer) == (0, tiny.TOKENIZER)
    assert [one.step for one in made.checkpoints] == [1, 2] and len(made.log) == 2


# -- runs that go on ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_resumed_run_counts_from_the_given_anchor(tmp_path: Path) -> None:
    whole = blocked.trainer(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2)
    wanted = Monitor(VS, PROBES).attach(whole)
    whole.train()
    stopped = str(tmp_path / "whole" / "checkpoint-2")
    folder = tiny.save(tiny.llama(), tmp_path / "anchor")
    sequence = ModelSequence.from_folders(witness=folder, anchor=folder, probes=PROBES)
    later = wanted.table[wanted.table.step > 2]
    for anchor in (folder, cache_residuals(sequence), tiny.llama()):
        trainer = blocked.trainer(tmp_path / "parts", tiny.llama(7), max_steps=4)
        monitor = Monitor(VS, PROBES, anchor=anchor).attach(trainer)
        trainer.train(resume_from_checkpoint=stopped)
        assert_same(monitor.table, later)
    trainer = blocked.trainer(tmp_path / "parts", max_steps=4)
    Monitor(VS, PROBES).attach(trainer)
    with refused("goes on at step 2"):
        trainer.train(resume_from_checkpoint=stopped)
    with refused("of prompts"):
        other = Monitor(VS, PROBES, anchor=cache_residuals(sequence, list(PROBES[:2])))
        other.attach(blocked.trainer(tmp_path / "parts"))._trainer.train()  # pyright: ignore


class Dying(Monitor):
    def on_step_end(self, args: Any, state: Any, control: Any, **further: Any) -> None:
        super().on_step_end(args, state, control, **further)
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.long
def test_a_run_of_finetune_that_was_killed_goes_on_from_its_anchor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("gravlens.training.finetune"), "RESUMABLE_AFTER", 0.0)
    wanted, died, rest = Monitor(VS, PROBES), Dying(VS, PROBES), Monitor(VS, PROBES)
    start = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
    finetune(start, blocked.EXAMPLES, out=tmp_path / "whole", recipe=RECIPE, monitor=wanted)
    with pytest.raises(KeyboardInterrupt):
        finetune(start, blocked.EXAMPLES, out=tmp_path / "parts", recipe=RECIPE, monitor=died)
    finetune(start, blocked.EXAMPLES, out=tmp_path / "parts", recipe=RECIPE, monitor=rest)
    assert_same(died.table, wanted.table[wanted.table.step <= 3])
    assert_same(rest.table, wanted.table[wanted.table.step > 2])


# -- calibration -------------------------------------------------------------------------------------------------------


def null_run(values: np.ndarray, *, judged: bool = True, prompts: tuple[str, ...] = ("held_out",)) -> Trajectory:
    """A run whose layers' mean takes these values, and each layer others."""
    steps = np.arange(1, 1 + len(values))
    rows = [
        {"run": "monitor", "prompts": name, "step": step, "layer": layer, "fraction": said, "alignment": said}
        for name in prompts
        for step, value in zip(steps, values, strict=True)
        for layer, said in zip(VS.layers, (value - 9, value + 9), strict=True)
    ]
    return Trajectory.from_table(pd.DataFrame(rows).assign(judged=judged, drift_norm=1.0))


def test_the_threshold_is_the_rank_that_one_further_run_exceeds_at_most_so_often() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((99, 5))
    tables = [null_run(one) for one in values]
    found = calibrate(tables)
    values = np.stack([one.layer_mean.fraction for one in tables])  # ± 9 has cost the last bits
    assert found == Threshold("fraction", values.max(), 1, 0.99, 99, 5, VS.layers, "null runs")
    at = calibrate(tables, quantile=0.9)
    assert at.value == np.sort(values.max(1))[89]
    held = calibrate(tables, quantile=0.9, patience=2)
    assert held.value == np.sort(np.minimum(values[:, 1:], values[:, :-1]).max(1))[89] and held.patience == 2


@pytest.mark.parametrize("patience", [1, 3])
def test_runs_like_the_null_ones_are_stopped_as_often_as_it_says(patience: int) -> None:
    """Random walks, whose steps hang together, as those of a run do; a further walk stands in for the monitored run."""
    rng, exceeded = np.random.default_rng(0), []
    for _ in range(300):
        walks = rng.standard_normal((20, 6)).cumsum(1)
        null = NullDraws("walks", walks[:19, :, None], tuple(range(6)), (0,))
        threshold = calibrate(null, quantile=0.95, patience=patience)
        above = np.convolve(walks[19] > threshold.value, np.ones(patience), "valid") == patience
        exceeded.append(above.any())
    assert 0.025 < np.mean(exceeded) < 0.08, "1 in 20"


def test_draws_of_a_null_give_a_threshold_of_the_alignment() -> None:
    cosines = np.random.default_rng(0).uniform(-1, 1, (200, 3, 2))
    found = calibrate(NullDraws("weight_noise", cosines, (1, 5, 20), VS.layers), quantile=0.95)
    largest = np.sort(cosines.mean(2).max(1))
    assert found == Threshold("alignment", largest[190], 1, 0.95, 200, 20, VS.layers, "weight_noise")


def test_too_few_null_runs_and_null_runs_of_different_kinds_are_refused() -> None:
    tables = [null_run(one) for one in np.random.default_rng(0).standard_normal((98, 5))]
    with refused("98 null runs", "0.99"):
        calibrate(tables)
    assert calibrate(tables[:19], quantile=0.95).n_runs == 19
    for some, quantile in ((tables[:18], 0.95), ([], 0.5)):
        with refused(f"{len(some)} null runs"):
            calibrate(some, quantile=quantile)
    with refused("different steps"):
        calibrate([*tables[:2], null_run(np.zeros(4))])
    with refused("given and held_out"):
        calibrate([null_run(np.zeros(5), prompts=("given", "held_out"))])
    with refused("alignment is -inf"):
        calibrate([null_run(np.ones(5), judged=False)] * 19, statistic="alignment", quantile=0.95)
    for wrong in ({"quantile": 1.0}, {"patience": 6}, {"patience": 0}):
        with refused("calibrate("):
            calibrate(tables[:3], **wrong)
    draws = NullDraws("sign_flips", np.zeros((99, 2, 2)), (1, 2), VS.layers, of="mean")
    for null, statistic in ((draws, "alignment"), (replace(draws, of="run"), "fraction")):
        with refused("sign_flips"):
            calibrate(null, statistic=statistic)
    with refused("Threshold("):
        Threshold("fraction", float("nan"))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_threshold_serves_no_longer_run_and_no_other_layers(tmp_path: Path) -> None:
    short = Threshold("fraction", 9.0, last_step=2, layers=VS.layers)
    trainer = blocked.trainer(tmp_path)
    Monitor(VS, PROBES, stop_above=short).attach(trainer)
    with refused("3 steps", "null runs of 2"):
        trainer.train()
    with refused("(0, 1)"):
        Monitor(VS.at([0]), PROBES, stop_above=short)


def test_a_second_run_and_a_senseless_monitor_are_refused(tmp_path: Path) -> None:
    trainer = blocked.trainer(tmp_path)
    monitor = Monitor(VS, PROBES).attach(trainer)
    trainer.train()
    with refused("to step 3"):
        trainer.train()
    with refused("to step 3"):
        monitor.attach(blocked.trainer(tmp_path))
    with refused("every=0"):
        Monitor(VS, PROBES, every=0)


def test_directions_of_other_states_are_refused(tmp_path: Path) -> None:
    for facts in ({"geometry": "whitened"}, {"positions": "instruction"}):
        with refused(*facts.values()):
            Monitor(Directions(tuple(replace(v, made_from=facts) for v in VS)), PROBES)
    assert Monitor(Directions(tuple(replace(v, made_from={"positions": -2}) for v in VS)), PROBES)._positions == -2
    narrow = Directions((direction_from(np.ones(4), layer=0, distance=1.0),))
    bare = Directions(tuple(replace(v, made_from={"chat_template": "none"}) for v in VS))
    for directions, named in ((narrow, "width 32"), (bare, "chat template")):
        trainer = blocked.trainer(tmp_path)
        Monitor(directions, PROBES).attach(trainer)
        with refused(named):
            trainer.train()


def test_a_sharded_model_is_refused() -> None:
    zero3, meta = tiny.llama(), copy.deepcopy(tiny.llama()).to("meta")
    next(zero3.parameters()).ds_id = 0  # pyright: ignore

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    for module in (zero3, meta, FullyShardedDataParallel(tiny.llama())):
        with refused("not whole"):
            check_whole(module)
    check_whole(tiny.llama())


def test_only_the_first_process_reports_and_all_stop_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = blocked.trainer(tmp_path, callback=(integration := Integration()))
    monitor = Monitor(VS, PROBES, stop_above=Threshold("fraction", 9.0)).attach(trainer)
    told = iter([False, True])
    monkeypatch.setattr("gravlens.training.monitor._told_by_first", lambda stop, device: next(told))
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda self: False)
    trainer.train()
    assert monitor.stopped_at == 2 and monitor.table.empty
    assert not any("monitor/fraction" in row for row in integration.rows)
