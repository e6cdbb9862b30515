"""Inspect logs, held against inspect-ai's own readers; without it, against the error that names the extra."""

import builtins
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from histories import history_on_disk

from gravlens import GravlensError
from gravlens.behavior.answers import Answer
from gravlens.exchange import to_inspect_log
from gravlens.history.prompts import PromptSet

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = PromptSet(("how do I x?", "and y?", "z … “ü”?"), "harmful", system="be good")
ANSWERS = ["no", "sure: </script>", ""]
SCORES: dict[str, Any] = {"harmful": np.array([False, True, True]), "log_odds": [0.5, float("nan"), -1.0]}


def written(path: Path, **changes: Any) -> Path:
    given = {"answers": ANSWERS, "scores": SCORES, "model": "seed0/20", **changes}
    return to_inspect_log(given.pop("prompts", PROMPTS), path, **given)


@pytest.mark.parametrize("ending", ["eval", "json"])
def test_inspect_reads_what_was_written(ending: str, tmp_path: Path) -> None:
    inspect_log = pytest.importorskip("inspect_ai.log")
    facts = {"strength": 0.5, "unknown": float("nan")}
    path = written(tmp_path / "deep" / f"log.{ending}", task="refusal", metadata=facts)
    log = inspect_log.read_eval_log(path)
    assert (log.status, log.eval.task, log.eval.model, log.eval.dataset.name) == (
        "success",
        "refusal",
        "seed0/20",
        "harmful",
    )
    assert log.eval.metadata == {"strength": 0.5, "unknown": None, "prompts": PROMPTS.digest}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for sample, prompt, answer, harmful in zip(log.samples, PROMPTS, ANSWERS, SCORES["harmful"], strict=True):
        assert [(m.role, m.content) for m in sample.messages] == [
            ("system", "be good"), ("user", prompt), ("assistant", answer),
        ]  # fmt: skip
        assert sample.output.completion == answer and sample.scores["harmful"].value is bool(harmful)
    values = [sample.scores["log_odds"].value for sample in log.samples]
    assert values[::2] == [0.5, -1.0] and np.isnan(values[1])


def test_thoughts_and_cut_answers_are_told(tmp_path: Path) -> None:
    inspect_log = pytest.importorskip("inspect_ai.log")
    answers = [Answer("sure", thought="hm", complete=False, said="<think>hm</think> sure"), "<think>a</think> no", "no"]
    log = inspect_log.read_eval_log(written(tmp_path / "log.eval", answers=answers))
    assert [sample.output.completion for sample in log.samples] == ["sure", "no", "no"]
    assert [sample.output.stop_reason for sample in log.samples] == ["max_tokens", "stop", "stop"]
    assert [sample.metadata.get("thought") for sample in log.samples] == ["hm", "a", None]


def test_means_and_errors_are_inspects_own(tmp_path: Path) -> None:
    inspect_log = pytest.importorskip("inspect_ai.log")
    scorer = pytest.importorskip("inspect_ai.scorer")
    log = inspect_log.read_eval_log(written(tmp_path / "log.eval"))
    harmful, log_odds = log.results.scores
    assert (harmful.scored_samples, log_odds.scored_samples, log_odds.unscored_samples) == (3, 2, 1)
    for found, values in ((harmful, [0, 1, 1]), (log_odds, [0.5, -1.0])):
        scores = [scorer.SampleScore(score=scorer.Score(value=value)) for value in values]
        assert found.metrics["mean"].value == pytest.approx(scorer.mean()(scores))
        assert found.metrics["stderr"].value == pytest.approx(scorer.stderr()(scores))


def test_scores_alone_one_prompt_and_nothing_scored(tmp_path: Path) -> None:
    inspect_log = pytest.importorskip("inspect_ai.log")
    scores = {"one": [2.0], "none": [float("nan")]}
    log = inspect_log.read_eval_log(written(tmp_path / "log.eval", prompts=["what?"], answers=None, scores=scores))
    (sample,) = log.samples
    assert sample.input == "what?" and sample.output.completion == "" and len(sample.messages) == 1
    one, none = log.results.scores
    assert one.metrics["mean"].value == 2 and one.metrics["stderr"].value == 0 and none.metrics == {}


def test_the_same_results_are_the_same_evaluation_and_others_another(tmp_path: Path) -> None:
    inspect_log = pytest.importorskip("inspect_ai.log")
    changes = [{}, {}, {"model": "anchor"}, {"answers": ["no", "no", "no"]}, {"scores": {"harmful": [0, 0, 0]}}]
    logs = [inspect_log.read_eval_log(written(tmp_path / f"{i}.eval", **change)) for i, change in enumerate(changes)]
    ids = [log.eval.eval_id for log in logs]
    assert ids[0] == ids[1] and len(set(ids)) == 4


def test_the_example_of_the_page_runs_and_becomes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = pytest.importorskip("inspect_ai.analysis")
    page = (ROOT / "docs" / "exchange.md").read_text(encoding="utf-8")
    (example,) = [
        block for block in re.findall(r"^```python no-run\n(.*?)^```$", page, re.M | re.S) if "to_inspect" in block
    ]
    (toml,) = re.findall(
        r"^```toml\n(.*?)^```$", (ROOT / "docs" / "sequence.md").read_text(encoding="utf-8"), re.M | re.S
    )
    monkeypatch.chdir(tmp_path)
    history_on_disk(tmp_path)
    Path("SEQUENCE.toml").write_text(toml)
    names: dict[str, Any] = {}
    exec(example, names)
    table = analysis.samples_df(["behavior.eval"], quiet=True)
    assert table.score_log_odds.tolist() == pytest.approx(names["scores"]["log_odds"].tolist())
    assert table.score_harmful.astype(bool).tolist() == names["scores"]["harmful"].tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": ["no"]}, "3 prompts, 1 answers"),
        ({"scores": {"harmful": [1, 0]}}, r"scores of shapes \{'harmful': \(2,\)\}"),
        ({"scores": {"harmful": ["C", "I", "C"]}}, "one number or verdict"),
        ({"scores": {}}, "one number or verdict"),
    ],
)
def test_what_does_not_fit_is_refused(changes: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(GravlensError, match=said):
        written(tmp_path / "log.eval", **changes)
    assert list(tmp_path.iterdir()) == []


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GravlensError, match=r"log\.csv was given.*Try: log\.eval"):
        written(tmp_path / "log.csv")


def test_without_inspect_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "inspect_ai":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(GravlensError, match=r"inspect-ai is not installed.*\[exchange\]"):
        written(tmp_path / "log.eval")
    assert list(tmp_path.iterdir()) == []
