"""A monitor's values in TensorBoard's and W&B's own files, read back with their own readers; skipped without them."""

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blocked
import numpy as np
import pytest
import tiny

from gravlens.history.prompts import PromptSet
from gravlens.training.monitor import Monitor

VS, PROBES = blocked.vs(), PromptSet.of(tiny.PROMPTS)
NAMED = ("monitor/fraction", "monitor/drift", "monitor/layer_0/fraction", "monitor/layer_1/fraction")


def trained(out: Path, report_to: str) -> Monitor:
    """A monitored run of three steps that reports to one integration."""
    trainer = blocked.trainer(out, report_to=[report_to], run_name="watched")
    monitor = Monitor(VS, PROBES).attach(trainer)
    trainer.train()
    return monitor


def measured(monitor: Monitor) -> dict[str, list[float]]:
    """What the monitor itself has of the logged names, by step."""
    table, mean = monitor.table, monitor.trajectory.layer_mean
    fractions = {f"monitor/layer_{layer}/fraction": table[table.layer == layer].fraction.tolist() for layer in (0, 1)}
    return {"monitor/fraction": mean.fraction.tolist(), "monitor/drift": mean.relative_drift.tolist(), **fractions}


def same(found: dict[str, list[float]], monitor: Monitor) -> None:
    wanted = measured(monitor)
    assert found.keys() == wanted.keys() == set(NAMED)
    for name, values in wanted.items():
        assert len(values) == 3 and np.abs(values).max() > 1e-3
        np.testing.assert_allclose(found[name], values, rtol=1e-5)


def test_tensorboards_event_file_has_the_values_by_step(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = trained(tmp_path, "tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = reader.EventAccumulator(str(file)).Reload()
    assert "train/loss" in events.Tags()["scalars"], "beside Trainer's own"
    found = {name: events.Scalars(f"train/{name}") for name in NAMED}
    assert {event.step for part in found.values() for event in part} == {1, 2, 3}
    same({name: [event.value for event in part] for name, part in found.items()}, monitor)


def test_wandbs_offline_file_has_the_values_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: Any = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monitor = trained(tmp_path / "out", "wandb")
    wandb.finish()
    (file,) = tmp_path.rglob("*.wandb")
    rows = [row for row in history(file) if "train/monitor/fraction" in row]
    assert [row["train/global_step"] for row in rows] == [1, 2, 3]
    same({name: [row[f"train/{name}"] for row in rows] for name in NAMED}, monitor)


def history(file: Path) -> list[dict[str, float]]:
    """The logged rows of a W&B run that was recorded offline."""
    rows = []
    for data in records(file.read_bytes()):
        record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def records(content: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format, in which W&B writes: blocks of 32 KiB, a record whole or in parts."""
    at, data, (first, last, whole) = 7, b"", (2, 4, 1)  # after W&B's own 7 bytes
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:  # too little for a header: padding
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])  # after a checksum of 4 bytes
        part, at = content[at + 7 : at + 7 + length], at + 7 + length
        data = part if kind in (first, whole) else data + part
        if kind in (last, whole):
            yield data
