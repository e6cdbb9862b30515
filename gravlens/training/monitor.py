"""Trainer callback that measures a run's drift along directions, as `follow` does, and can stop it at a threshold."""

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import nn
from transformers import Trainer, TrainerCallback

from gravlens.activations.residuals import Offset, Residuals, read_residuals, rounding_noise
from gravlens.core.display import gist
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import (
    CONCEPT_MEASURES,
    MEASURES,
    ByLayer,
    Pairs,
    Trajectory,
    as_dataset,
    check_pairs,
    concept_direction,
    concept_table,
    judged_from,
    mean_state,
    measure_concept,
    measure_drift,
)
from gravlens.history.encoding import KWARGS, encode, prompts_digest, template_kwargs
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint, Prompts
from gravlens.models.opening import OpenModel, open_model, text_tokenizer
from gravlens.training.thresholds import Threshold

Anchor = Checkpoint | Path | str | nn.Module | OpenModel | Residuals


class Monitor(TrainerCallback):
    """Measure drift along directions every few optimizer steps of one run.

    The anchor's states on the probes are read when the run begins. Later the training model is read in eval mode,
    without gradients; its mode and the random generators are restored. For each layer and their mean, `alignment` (if
    the drift is long enough for a cosine), `fraction` and `drift` (norm in units of the distance) are logged through
    Trainer, as `monitor/fraction` and `monitor/layer_2/fraction`.

        monitor = Monitor(vs, probes).attach(trainer)

    With an empty `report_to`, `callbacks=[monitor]` does the same and logs to `trainer.state.log_history`.

    Args:
        directions: one per layer; the mean is over all defined ones (select with `vs.at(layers)`).
        probes: preferably held out: not those that the directions were estimated on.
        every: optimizer steps between evaluations.
        stop_above: threshold at which to stop the run.
        anchor: a checkpoint, or `Residuals` of these probes with `anchor`. Default: the model when the run begins.
            Required for a run that Trainer resumes.
        tokenizer: default: the trainer's `processing_class`.
        name: prefix of the names in the log, and the run's name in the table.
        concepts: name -> contrast, as in `follow_concepts`: the means over layers are logged as
            `monitor/<concept>/cosine`, `…/auroc_frozen` and `…/auroc_refit`.

    A run whose states are not finite has diverged: a warning and `monitor/diverged` in the log say so, and the run goes
    on without measurements. With `stop_above` it is stopped.

    Attributes:
        stopped_at: step at which it stopped the run, or None.
        diverged_at: first step at which the states were not finite, or None.

    Examples:
        >>> monitor = gl.Monitor(vs, prompts, every=2)
        >>> done = gl.finetune(seq.anchor, examples, out="ft/monitored", recipe=gl.Recipe(steps=4), monitor=monitor)
        >>> monitor.trajectory.layer_mean.step.tolist()
        [2, 4]
    """

    def __init__(
        self,
        directions: Directions,
        probes: Prompts,
        *,
        every: int = 1,
        stop_above: Threshold | None = None,
        anchor: Anchor | None = None,
        tokenizer: Any | None = None,
        name: str = "monitor",
        concepts: Mapping[str, Pairs] = MappingProxyType({}),
    ) -> None:
        self.directions, self.probes = directions, PromptSet.of(probes)
        self.every, self.stop_above, self.anchor, self.tokenizer, self.name = every, stop_above, anchor, tokenizer, name
        self.stopped_at: int | None = None
        self.diverged_at: int | None = None
        self._defined = Directions.of(directions).defined()
        self._positions: Offset = _positions_of(directions)
        self._trainer: Trainer | None = None
        self._ids: list[list[int]] | None = None
        self._start: Float[np.ndarray, "layer d_model"] | None = None
        self._least: Float[np.ndarray, " layer"] | None = None  # drift of which a cosine is judged
        self._measures: dict[int, dict[str, Float[np.ndarray, " layer"]]] = {}
        self._above = 0  # evaluations in a row
        self.concepts, self._concepts = dict(concepts), dict[str, _Concept]()
        for concept, contrast in self.concepts.items():
            check_pairs(concept, contrast)
        if every < 1:
            raise GravlensError(f"Monitor(every={every}) was given.", "It counts optimizer steps.", "every=1.")
        if stop_above is not None and stop_above.layers not in (None, self._defined.layers):
            given = f"The threshold is of layers {stop_above.layers}, the directions of {self._defined.layers}."
            wanted = "A threshold is valid for the mean over the layers that it was calibrated on."
            raise GravlensError(given, wanted, "directions.at(layers) for one of them.")

    def __repr__(self) -> str:
        of = f"{gist(self.directions)}, {gist(self.probes)}"
        return f"Monitor({of}, every={self.every}, name={self.name!r}, measured at {len(self._measures)} steps)"

    def attach(self, trainer: Trainer) -> "Monitor":
        """Add the monitor to a trainer's callbacks, and log through it to all integrations of `report_to`.

        Args:
            trainer: a Hugging Face `Trainer` or one of TRL's, not yet trained.
        """
        if self._measures:
            raise self._used()
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    @property
    def table(self) -> pd.DataFrame:
        """Measurements with the columns of `Trajectory.table`, and `relative_drift` (drift_norm / distance)."""
        return self.trajectory.table

    @property
    def trajectory(self) -> Trajectory:
        """The measurements as a result of `follow`, for plots and null distributions."""
        steps, shape = sorted(self._measures), (len(self._measures), len(self._defined))
        measures = {
            name: np.array([self._measures[step][name] for step in steps]).reshape(shape)
            for name in (*MEASURES, "relative_drift")
        }
        given = self._ids is not None and prompts_digest(self._ids) == self._defined.directions[0].prompts
        least = self._defined.distances if self._least is None else self._least  # not yet trained: no row
        data = as_dataset(self.name, "given" if given else "held_out", steps, measures, self._defined, least)
        undefined = {one.layer: one.undefined for one in self.directions if one.undefined is not None}
        return Trajectory(data, self._defined.layers, undefined)

    @property
    def concept_trajectory(self) -> ByLayer:
        """The measurements of the concepts as a result of `follow_concepts`."""
        tables = []
        for name, one in self._concepts.items():
            places = [(self.name, step) for step in sorted(one.measures)]
            values = {key: np.stack([one.measures[at][key] for _, at in places]) for key in CONCEPT_MEASURES if places}
            tables += [concept_table(name, places, self._defined.layers, values)] if places else []
        return ByLayer.concat(tables) if tables else ByLayer(pd.DataFrame(), pd.DataFrame())

    # -- Trainer's events ----------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        """Read the anchor's states; for a resumed run, keep the measurements up to its step."""
        check_whole(model)
        self._check_run(args, state)
        self.tokenizer = text_tokenizer(self.tokenizer or processing_class)
        self._model = open_model(model, tokenizer=self.tokenizer)
        if self._start is None or state.global_step == 0:  # a resumed run keeps the anchor that it began with
            self._start, noise = self._anchor_states(self._model)
            self._least = judged_from(self._defined, noise)
        for kept in (self._measures, *(one.measures for one in self._concepts.values())):
            for step in [step for step in kept if step > state.global_step]:
                del kept[step]
        self.stopped_at, self.diverged_at, self._above = None, None, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure, log, and stop the run above the threshold."""
        if state.global_step % self.every:
            return
        stop = state.is_world_process_zero and self._evaluate(state, control)  # the weights are alike in all processes
        if self.stop_above is not None and _told_by_first(stop, args.device):
            self.stopped_at = state.global_step
            control.should_training_stop = True

    def _evaluate(self, state: Any, control: Any) -> bool:
        """Measure and log; return whether to stop."""
        states = self._states(self._model, finite=False)
        if not np.isfinite(states).all():
            return self._diverged(state, control)
        measures = measure_drift(states.mean(0, dtype=np.float64) - self._start, self._defined)
        measures["relative_drift"] = measures["drift_norm"] / self._defined.distances
        self._measures[state.global_step] = measures
        enough = measures["drift_norm"] > self._least
        logs = _named(self.name, measures, enough, self._defined.layers)
        for concept, one in self._concepts.items():
            found = one.measure(self._read(self._model, one.ids, finite=False), state.global_step)
            logs |= {f"{self.name}/{concept}/{key}": value for key, value in found.items() if np.isfinite(value)}
        self._report(logs, state, control)
        if self.stop_above is None:
            return False
        judged = self.stop_above.statistic == "fraction" or bool(enough.all())
        above = judged and float(measures[self.stop_above.statistic].mean()) > self.stop_above.value
        self._above = self._above + 1 if above else 0
        return self._above >= self.stop_above.patience

    def _diverged(self, state: Any, control: Any) -> bool:
        """Warn once of states that are not finite, and log them; stop only a run that has a threshold."""
        if self.diverged_at is None:
            self.diverged_at = state.global_step
            end = "it is not measured any further" if self.stop_above is None else "it is stopped"
            text = f"{self.name}: the states are not finite at step {state.global_step}, the run has diverged; {end}."
            warnings.warn(text, stacklevel=2)
        self._report({f"{self.name}/diverged": 1.0}, state, control)
        return self.stop_above is not None

    def _report(self, logs: dict[str, float], state: Any, control: Any) -> None:
        if self.stop_above is not None:
            logs[f"{self.name}/threshold"] = self.stop_above.value
        if self._trainer is None:
            state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
            return
        # Trainer's method: TRL's override would move the training's running averages into this row and reset them.
        wanted = control.should_log
        Trainer.log(self._trainer, logs)
        control.should_log = wanted  # Trainer.log resets it, and the step's own row is still to come

    def _states(self, model: OpenModel, *, finite: bool = True) -> Float[np.ndarray, "prompt layer d_model"]:
        ids = self._probe_ids()
        _check_width(model, self._defined)
        return self._read(model, ids, finite=finite)

    def _probe_ids(self) -> list[list[int]]:
        if self._ids is None:
            _check_template(self.tokenizer, self.directions)
            self._ids = encode(self.tokenizer, self.probes)
        return self._ids

    def _read(
        self, model: OpenModel, ids: Sequence[Sequence[int]], *, finite: bool = True
    ) -> Float[np.ndarray, "prompt layer d_model"]:
        reading: dict[str, Any] = {"layers": self._defined.layers, "positions": self._positions}
        with undisturbed(model.module):
            return read_residuals(model, ids, **reading, finite=finite).numpy()

    def _anchor_states(
        self, model: OpenModel
    ) -> tuple[Float[np.ndarray, "layer d_model"], Residuals | Float[np.ndarray, " layer"]]:
        """Return the anchor's mean states, and what their noise is known by."""
        anchor = self.anchor
        if not isinstance(anchor, Residuals):
            where: dict[str, Any] = {"tokenizer": self.tokenizer, "device": model.device, "dtype": model.dtype}
            opened = model if anchor is None else open_model(anchor, **where)
            _check_precision(model, opened.precision)
            states = self._states(opened)
            for name, contrast in self.concepts.items():
                ids = encode(self.tokenizer, contrast.both)
                self._concepts[name] = _Concept.of(ids, self._read(opened, ids), opened.precision)
            noise = rounding_noise(np.linalg.norm(states, axis=-1).mean(0, dtype=np.float64), model.precision)
            return states.mean(0, dtype=np.float64), noise
        read, probes = anchor.meta.get("positions", "last"), prompts_digest(self._probe_ids())
        if anchor.prompts != probes or read != self._positions or anchor.index is not None:
            given = f"The anchor's residuals are of prompts {anchor.prompts[:12]} at {read!r}."
            wanted = f"The monitor reads {probes[:12]} at {self._positions!r}: the same texts by one chat template."
            raise GravlensError(given, wanted, "cache_residuals(sequence, probes), or the anchor's checkpoint.")
        if self.concepts:
            given = f"Concepts {', '.join(self.concepts)} and an anchor as residuals of the probes were given."
            raise GravlensError(given, "A concept's direction is the anchor's.", "anchor=the anchor's checkpoint.")
        for precision in anchor.meta.get("dtype", ()):
            _check_precision(model, precision)
        return mean_state(anchor, "anchor", self._defined.layers), anchor

    def _check_run(self, args: Any, state: Any) -> None:
        if self._trainer is None and args.report_to:
            given = f"The monitor stands among the callbacks, and the trainer reports to {', '.join(args.report_to)}."
            wanted = "Those integrations are callbacks too and run before it, so it cannot log to them."
            raise GravlensError(given, wanted, "monitor.attach(trainer).")
        if state.global_step == 0 and self._measures:
            raise self._used()
        if state.global_step > 0 and self.anchor is None and self._start is None:
            given = f"The run goes on at step {state.global_step}, and its anchor was not given."
            wanted = "Drift is measured from the anchor, not from the weights that a run resumes with."
            raise GravlensError(given, wanted, "Monitor(…, anchor=the checkpoint that the run started from).")
        last = None if self.stop_above is None else self.stop_above.last_step
        if last is not None and state.max_steps > last:
            given = f"The run has {state.max_steps} steps, and the threshold comes from null runs of {last}."
            wanted = "Null runs drift with every step too, so a threshold is valid up to their last step."
            raise GravlensError(given, wanted, f"null runs of {state.max_steps} steps, or max_steps={last}.")

    def _used(self) -> GravlensError:
        given = f"This monitor has watched a run already, to step {max(self._measures)}."
        return GravlensError(given, "A monitor measures one run, from its anchor.", "a new Monitor(…).")


@dataclass(frozen=True)
class _Concept:
    """A concept's prompts, the anchor's direction, and what was measured at each step."""

    ids: list[list[int]]
    frozen: Float[np.ndarray, "layer d_model"]
    noise: Float[np.ndarray, " layer"]
    measures: dict[int, dict[str, Float[np.ndarray, " layer"]]] = field(default_factory=dict)

    @classmethod
    def of(cls, ids: list[list[int]], states: Float[np.ndarray, "prompt layer d_model"], precision: str) -> "_Concept":
        noise = rounding_noise(np.linalg.norm(states, axis=-1).mean(0, dtype=np.float64), precision)
        return cls(ids, concept_direction(states, noise), noise)

    def measure(self, states: Float[np.ndarray, "prompt layer d_model"], step: int) -> dict[str, float]:
        """Keep the measures at a step, and return their means over the layers with a direction."""
        self.measures[step] = found = measure_concept(states, self.frozen, self.noise)
        known = np.isfinite(self.frozen).all(-1)
        return {name: float(values[known].mean()) if known.any() else np.nan for name, values in found.items()}


def _named(
    name: str,
    measures: dict[str, Float[np.ndarray, " layer"]],
    judged: Bool[np.ndarray, " layer"],
    layers: Sequence[int],
) -> dict[str, float]:
    """Name the logged values, for the mean and each layer; a cosine of too short a drift is left out."""
    logs = {}
    rows = {name: slice(None), **{f"{name}/layer_{layer}": slice(i, i + 1) for i, layer in enumerate(layers)}}
    for prefix, part in rows.items():
        if judged[part].all():
            logs[f"{prefix}/alignment"] = float(measures["alignment"][part].mean())
        logs[f"{prefix}/fraction"] = float(measures["fraction"][part].mean())
        logs[f"{prefix}/drift"] = float(measures["relative_drift"][part].mean())
    return logs


def _told_by_first(stop: bool, device: torch.device) -> bool:
    """Broadcast rank 0's decision, so that no rank stops alone and deadlocks the others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return stop
    told = torch.tensor(int(stop), device=device)
    torch.distributed.broadcast(told, src=0)
    return bool(told)


@contextmanager
def undisturbed(module: nn.Module) -> Generator[None]:
    """Put all submodules in eval mode; restore their modes and the random generators on exit."""
    training = [part for part in module.modules() if part.training]
    devices = sorted({weight.device.index for weight in module.parameters() if weight.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            for part in training:
                part.training = False  # not eval(): some modules override it and rewrite their weights
            yield
        finally:
            for part in training:
                part.training = True


def check_whole(module: nn.Module) -> None:
    """Raise where the weights are sharded over processes (FSDP, DeepSpeed ZeRO-3, tensor parallel) or offloaded."""
    fsdp = {"FullyShardedDataParallel", "FSDPModule"}  # by name: not every build of torch has them
    wrapped = [one for part in module.modules() for cls in type(part).__mro__ if (one := cls.__name__) in fsdp]
    # ZeRO-3 sets `ds_id` on its parameters; FSDP 2 and tensor parallelism use DTensors, which have a mesh.
    parts = [
        name
        for name, weight in module.named_parameters()
        if weight.is_meta or hasattr(weight, "ds_id") or hasattr(weight, "device_mesh")
    ]
    if wrapped or parts:
        given = f"The model in training is not whole in this process ({', '.join([*wrapped, *parts][:2])}, …)."
        wanted = "The monitor needs all weights in one process: one device, several in one process, or DDP."
        raise GravlensError(given, wanted, "DDP or DeepSpeed ZeRO-1 or -2; or save checkpoints, and follow() them.")


def _positions_of(directions: Directions) -> Offset:
    """Return the read position of the directions; raise where the monitor cannot read it."""
    facts = [direction.made_from for direction in directions.defined()]
    geometries = {one.get("geometry", "raw") for one in facts}
    positions = {one.get("positions", "last") for one in facts}
    first: Any = next(iter(positions))
    if geometries != {"raw"} or len(positions) > 1 or not (first == "last" or isinstance(first, int)):
        given = f"The directions were located at {', '.join(map(str, positions))} in {', '.join(geometries)} geometry."
        wanted = 'The monitor reads raw states at one token of each prompt, "last" or an offset from its end.'
        raise GravlensError(given, wanted, "directions of such states: locate_vrev(sequence).")
    return "last" if first == "last" else int(first)


def _check_template(tokenizer: Any, directions: Directions) -> None:
    """Raise where probes would be read with a chat template and the directions were not, or the reverse."""
    facts = [direction.made_from for direction in directions.defined()]
    located = {str(one["chat_template"]) for one in facts if "chat_template" in one}
    templated = bool(getattr(tokenizer, "chat_template", None))
    if tokenizer is not None and located and templated != (located != {"none"}):
        raise GravlensError(
            f"The tokenizer has {'a' if templated else 'no'} chat template, and the directions were located with "
            f"{', '.join(sorted(located))}.",
            "Probes must be read as the prompts of the directions were.",
            "Monitor(…, tokenizer=) with " + ("chat_template = None." if templated else "the anchor's."),
        )
    told = [one.get(KWARGS, {}) for one in facts if "chat_template" in one]
    if tokenizer is not None and templated and any(one != template_kwargs(tokenizer) for one in told):
        given = (
            f"The chat template has the arguments {template_kwargs(tokenizer)}, and the directions were located with "
        )
        remedy = "Monitor(…, tokenizer=sequence_tokenizer(sequence)), or with_template_kwargs(tokenizer, {…})."
        raise GravlensError(f"{given}{told[0]}.", "Probes must be read as the prompts of the directions were.", remedy)


def _check_precision(model: OpenModel, anchor: str) -> None:
    """Raise where the anchor's states are of another precision than those of the run."""
    if anchor != model.precision:
        given = f"The model in training is read in {model.precision}, the anchor in {anchor}."
        wanted = "A drift needs one precision: else the rounding between them would count as drift."
        remedy = "anchor=the model loaded as for training (the same dtype and quantization_config)."
        raise GravlensError(given, wanted, remedy)


def _check_width(model: OpenModel, directions: Directions) -> None:
    if model.d_model != directions.vectors.shape[1]:
        given = f"This {type(model.module).__name__} has states of width {model.d_model}."
        wanted = f"The directions have {directions.vectors.shape[1]} dimensions."
        raise GravlensError(given, wanted, "directions and an anchor of the history that is trained.")
