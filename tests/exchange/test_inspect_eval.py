"""Inspect evaluates a checkpoint with and without an intervention; the logs are read back with its own reader."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from histories import refused

from gravlens import Ablate, Steer, generate_answers, intervene, open_model
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from
from gravlens.exchange.control_vectors import to_gguf
from gravlens.exchange.inspect_eval import answer, edits_of, refusal
from gravlens.exchange.projections import to_projection
from gravlens.history.prompts import PromptSet

RNG = np.random.default_rng(0)
VS = Directions(tuple(direction_from(RNG.standard_normal(tiny.WIDTH), layer=i, distance=9.0) for i in (1, 2)))
MODEL = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
CONDITIONS = ("plain", "projection", "steer")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    tiny.save(MODEL.module, folder / "model")
    to_projection(Ablate(VS), folder / "ablate.safetensors", model=MODEL)
    to_gguf(VS, folder / "v.gguf")
    (folder / "held_out.txt").write_text("\n".join(tiny.PROMPTS) + "\n")
    return folder


def arguments(condition: str, folder: Path) -> dict[str, Any]:
    files = {"projection": {"projection": str(folder / "ablate.safetensors")},
             "steer": {"steer": str(folder / "v.gguf"), "strength": -1.0}}  # fmt: skip
    return files.get(condition, {})


def expected(condition: str) -> list[str]:
    """The answers by gravlens alone."""
    if condition == "plain":
        return list(map(str, generate_answers(MODEL, PromptSet.of(tiny.PROMPTS), max_new_tokens=6)))
    with intervene(MODEL, Ablate(VS) if condition == "projection" else Steer(VS, -1.0)):
        return list(map(str, generate_answers(MODEL, PromptSet.of(tiny.PROMPTS), max_new_tokens=6)))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_answer_is_that_of_generate_answers(condition: str, here: Path) -> None:
    given = {"projection": None, "steer": None, "strength": 1.0, **arguments(condition, here)}
    edits = edits_of(**given)
    found = [str(answer(MODEL, [("user", prompt)], edits, 6)) for prompt in tiny.PROMPTS]
    assert found == expected(condition)
    assert condition == "plain" or found != expected("plain"), "the edit is large enough to be seen"


def test_a_conversation_that_does_not_end_with_the_user_is_refused() -> None:
    with refused("assistant"):
        answer(MODEL, [("user", "what?"), ("assistant", "so")], [], 6)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_inspect_evaluates_each_condition_and_its_log_says_which(condition: str, here: Path, tmp_path: Path) -> None:
    inspect_ai = pytest.importorskip("inspect_ai")
    log = pytest.importorskip("inspect_ai.log")
    task = refusal(prompts=str(here / "held_out.txt"), max_tokens=6)
    how = {"model_args": arguments(condition, here), "log_dir": str(tmp_path), "display": "none"}
    (done,) = inspect_ai.eval(task, model=f"gravlens/{here / 'model'}", **how)
    assert done.status == "success", done.error
    (file,) = tmp_path.glob("*.eval")
    read = log.read_eval_log(str(file))
    assert [sample.output.completion for sample in read.samples] == expected(condition)
    assert read.eval.model_args == arguments(condition, here)
    (score,) = read.results.scores
    values = [sample.scores["refused"].value for sample in read.samples]
    assert score.metrics["mean"].value == pytest.approx(np.mean(values)) and set(values) <= {0.0, 1.0}


def test_the_scorer_tells_a_refusal_from_an_answer(here: Path, tmp_path: Path) -> None:
    inspect_ai, model = pytest.importorskip("inspect_ai"), pytest.importorskip("inspect_ai.model")
    said = ["I'm sorry, but I can't help with that.", *["Mix flour, water and salt."] * 5]
    outputs = [model.ModelOutput.from_content("mockllm/model", text) for text in said]
    for output in outputs:
        output.usage = model.ModelUsage()  # else the mock counts tokens with a vocabulary that it downloads
    mock = model.get_model("mockllm/model", custom_outputs=outputs)
    task = refusal(prompts=str(here / "held_out.txt"))
    (done,) = inspect_ai.eval(task, model=mock, log_dir=str(tmp_path), display="none", max_samples=1)
    assert done.status == "success", done.error
    assert done.results.scores[0].metrics["mean"].value == pytest.approx(1 / 6)


def test_sampling_is_refused(here: Path, tmp_path: Path) -> None:
    inspect_ai = pytest.importorskip("inspect_ai")
    task = refusal(prompts=str(here / "held_out.txt"), max_tokens=6)
    how = {"log_dir": str(tmp_path), "display": "none", "temperature": 0.7}
    (done,) = inspect_ai.eval(task, model=f"gravlens/{here / 'model'}", **how)
    assert done.status == "error" and "temperature" in done.error.message


def test_a_conversation_is_asked_with_its_earlier_turns(here: Path, tmp_path: Path) -> None:
    inspect_ai = pytest.importorskip("inspect_ai")
    first, second = tiny.PROMPTS[:2]
    earlier = [{"role": "user", "content": first}, {"role": "assistant", "content": "sorry"}]
    path = tmp_path / "asked.jsonl"
    rows = [{"messages": [*earlier, {"role": "user", "content": second}]}, {"messages": [earlier[0]]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = refusal(prompts=str(path), max_tokens=6)
    told = [[(one.role, one.text) for one in sample.input] for sample in task.dataset]
    assert told == [[("user", first), ("assistant", "sorry"), ("user", second)], [("user", first)]]
    (done,) = inspect_ai.eval(task, model=f"gravlens/{here / 'model'}", log_dir=str(tmp_path), display="none")
    asked = PromptSet.of(str(path))
    assert [one.output.completion for one in done.samples] == list(generate_answers(MODEL, asked, max_new_tokens=6))
