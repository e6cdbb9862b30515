"""Export answers and scores as a log of Inspect (inspect-ai), for its viewer and its data frames."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from gravlens import __version__
from gravlens.behavior.answers import Prompts, as_answer
from gravlens.core.errors import GravlensError, at_home
from gravlens.core.files import without_nan, write_atomically, writing
from gravlens.history.prompts import PromptSet

Columns: TypeAlias = Mapping[str, np.ndarray]  # of a score's values, by its name


def to_inspect_log(
    prompts: Prompts,
    path: Path | str,
    *,
    answers: Sequence[str] | None = None,
    scores: Mapping[str, Sequence[float] | Float[np.ndarray, " prompt"]],
    model: str,
    task: str = "gravlens",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write an Inspect log with one sample per prompt, and the mean and standard error of each score.

    Read it with `inspect view`, `inspect_ai.log.read_eval_log` or `inspect_ai.analysis.samples_df`. NaN means "not
    scored", as in Inspect: it does not enter the mean and its standard error, std / √n.

    Args:
        path: with suffix `.eval` (Inspect's format) or `.json`.
        answers: one per prompt, as from `generate_answers`; None if there are only scores. One that was cut has
            the stop reason `max_tokens`, and a thought is in the sample's metadata.
        scores: name -> one number or verdict per prompt: values of a `Score`, verdicts of a `Judge`.
        model: names in the log.
        task: likewise.
        metadata: more facts (the intervention, its strength) for JSON.

    Raises:
        GravlensError: inspect-ai is not installed; another suffix; not one answer and score per prompt.

    Examples:
        >>> answers = gl.generate_answers(model, prompts, max_new_tokens=8)
        >>> scores = {"log_odds": gl.refusal_log_odds(model, prompts)}
        >>> gl.exchange.to_inspect_log(prompts, "log.eval", answers=answers, scores=scores, model="seed0/20").name
        'log.eval'
    """
    path, prompts = at_home(path), PromptSet.of(prompts)
    columns = {name: np.asarray(values) for name, values in scores.items()}
    _check(path, prompts, answers, columns)
    log = _inspect().log
    samples = _samples(prompts, answers, columns, model)
    spec = log.EvalSpec(
        **_identities([sample.model_dump(mode="json") for sample in samples], model, task),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=task,
        model=model,
        dataset=log.EvalDataset(name=prompts.role, samples=len(prompts), sample_ids=[one.id for one in samples]),
        config=log.EvalConfig(),
        packages={"gravlens": __version__},
        metadata=without_nan({**(metadata or {}), "prompts": prompts.digest}),
    )
    n, summaries = len(samples), [_summary(name, values) for name, values in columns.items()]
    results = log.EvalResults(total_samples=n, completed_samples=n, scores=summaries)
    with writing(path), tempfile.TemporaryDirectory() as scratch:  # Inspect's writer chooses the format by the suffix
        written = Path(scratch) / path.name
        log.write_eval_log(log.EvalLog(status="success", eval=spec, results=results, samples=samples), written)
        return write_atomically(path, written.read_bytes())


def _inspect() -> Any:
    try:
        for part in ("log", "model", "scorer"):
            import_module(f"inspect_ai.{part}")
        return import_module("inspect_ai")
    except ImportError as error:
        remedy = "pip install inspect-ai, or gravlens with its extra: pip install -e '.[exchange]'."
        raise GravlensError("inspect-ai is not installed.", "Logs are written with it.", remedy) from error


def _check(path: Path, prompts: PromptSet, answers: Sequence[str] | None, columns: Columns) -> None:
    if path.suffix not in (".eval", ".json"):
        raise GravlensError(f"The path {path.name} was given.", "A log is a .eval or .json.", f"{path.stem}.eval.")
    shapes = {name: values.shape for name, values in columns.items()}
    numbers = all(values.dtype.kind in "biuf" for values in columns.values())
    given = len(prompts) if answers is None else len(answers)
    if not shapes or not numbers or set(shapes.values()) != {(len(prompts),)} or given != len(prompts):
        found = f"{len(prompts)} prompts, {'no' if answers is None else given} answers and scores of shapes {shapes}"
        wanted = "Each prompt needs one number or verdict per score, and at most one answer."
        raise GravlensError(f"{found} were given.", wanted, "scores={'refused': judge(prompts, answers), …}.")


def _samples(prompts: PromptSet, answers: Sequence[str] | None, columns: Columns, model: str) -> list[Any]:
    """Make one `EvalSample` per prompt."""
    inspect_ai = _inspect()
    chat, samples = inspect_ai.model, []
    message = {"system": chat.ChatMessageSystem, "user": chat.ChatMessageUser, "assistant": chat.ChatMessageAssistant}
    for row, (prompt, turns) in enumerate(zip(prompts, prompts.turns, strict=True)):
        said = None if answers is None else as_answer(answers[row])
        asked = [
            message[turn["role"]](content=turn["content"], id=f"{turn['role']}-{row + 1}-{i + 1}")
            for i, turn in enumerate(turns)
        ]
        output = chat.ModelOutput(model=model)
        if said is not None:
            reason = "stop" if said.complete else "max_tokens"
            output = chat.ModelOutput.from_content(model, str(said), stop_reason=reason)
        for choice in output.choices:
            choice.message.id = f"answer-{row + 1}"  # by default random: the same results would be another log
        values = {name: column[row].item() for name, column in columns.items()}
        sample = inspect_ai.log.EvalSample(
            id=row + 1,
            epoch=1,
            input=asked if turns[:-1] else prompt,  # text only, where it says all
            target="",
            messages=[*asked, *(choice.message for choice in output.choices)],
            output=output,
            metadata={"thought": said.thought} if said is not None and said.thought else {},
            scores={name: inspect_ai.scorer.Score(value=value, answer=said) for name, value in values.items()},
        )
        samples.append(sample)
    return samples


def _summary(name: str, values: np.ndarray) -> Any:
    log = _inspect().log
    scored = values[np.isfinite(values)].astype(np.float64)  # fp64: scores may be fp32, verdicts bool
    error = scored.std(ddof=1) / np.sqrt(len(scored)) if len(scored) > 1 else 0.0
    found = {"mean": float(scored.mean()), "stderr": float(error)} if len(scored) else {}
    return log.EvalScore(
        name=name,
        scorer=name,
        scored_samples=len(scored),
        unscored_samples=len(values) - len(scored),
        metrics={metric: log.EvalMetric(name=metric, value=value) for metric, value in found.items()},
    )


def _identities(samples: Any, model: str, task: str) -> dict[str, str]:
    """Derive Inspect's ids from the content: by default they are random."""
    text = json.dumps([task, model, samples], sort_keys=True)
    names = ("eval_id", "run_id", "task_id")  # Inspect's own have 22 characters
    return {name: hashlib.sha256(f"{name}{text}".encode()).hexdigest()[:22] for name in names}
