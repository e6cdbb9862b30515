"""The likely first tries of a newcomer: what is clear is done, all else is one `GravlensError` that shows the call."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from histories import between, moved, refused, sequence_on_disk, synthetic

import gravlens as gl
from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.edits import Ablate, Clamp, Patch, Steer, everywhere
from gravlens.interventions.effects import causal_effect, dose_response, layerwise_effect
from gravlens.models.opening import open_model
from gravlens.organisms.refusal_language import REFUSALS, probe_prompts, task_examples

EXAMPLES = task_examples()[:4]
SCORE = partial(gl.refusal_log_odds, openings=REFUSALS[:1])
RAW = tiny.llama()
RAW.tokenizer = tiny.TOKENIZER  # pyright: ignore[reportArgumentType]: as a TransformerBridge carries it
OPENED = open_model(RAW)
VECTOR = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(0))
V = direction_from(VECTOR.numpy(), layer=1)
STATES = synthetic(
    {
        name: np.random.default_rng(i).standard_normal((4, tiny.LAYERS, tiny.WIDTH))
        for i, name in enumerate(("witness", "anchor", "seed0/5"))
    }
)


def kind_of(given: Any) -> str:
    return given.__name__ if isinstance(given, type) else type(given).__name__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    witness = moved(RAW, seed=1)
    runs = {f"ft/seed0/checkpoint-{step}": between(RAW, witness, share) for step, share in {1: 0.1, 5: 0.4}.items()}
    models = {"witness": witness, "anchor": RAW, **runs, "ft/seed1/checkpoint-1": moved(RAW, seed=2)}
    return sequence_on_disk(tmp_path_factory.mktemp("history"), models, {"seed0": "ft/seed0/checkpoint-*"})


@pytest.fixture(scope="module")
def history(folder: Path) -> ModelSequence:
    return ModelSequence.from_toml(folder / "SEQUENCE.toml")


# -- a history ---------------------------------------------------------------------------------------------------------


def test_the_path_of_a_sequence_file_is_a_sequence(folder: Path, history: ModelSequence) -> None:
    for path in (folder / "SEQUENCE.toml", str(folder / "SEQUENCE.toml")):
        np.testing.assert_array_equal(locate_vrev(path).vectors, locate_vrev(history).vectors)
        assert len(gl.inspect_sequence(path)) == 4


@pytest.mark.parametrize("read", [locate_vrev, cache_residuals, gl.inspect_sequence, gl.cost.plan_reading])
@pytest.mark.parametrize("given", [["base", "aligned"], [RAW, RAW], None, V, "base", RAW, OPENED], ids=kind_of)
def test_what_is_no_history_is_shown_how_to_make_one(read: Callable[[Any], Any], given: Any) -> None:
    with pytest.raises(GravlensError, match=r"from_folders\(witness=.*anchor=.*from_models"):
        read(given)


def test_a_list_of_witness_and_anchor_does_not_say_which_is_which() -> None:
    with refused("A list was given"):
        locate_vrev(["base", "aligned"], prompts=["a"])  # pyright: ignore


@pytest.mark.parametrize("runs", ["seed0", "seed0/", "seed0/checkpoint-*", "seed0/checkpoint-5"])
def test_one_run_as_a_text_is_named_by_its_folder(folder: Path, runs: str) -> None:
    found = ModelSequence.from_folders(
        witness=folder / "witness", anchor=folder / "anchor", runs=f"{folder}/ft/{runs}"
    ).runs
    assert {name: [one.step for one in run][-1] for name, run in found.items()} == {"seed0": 5}


def test_a_list_of_runs_is_named_by_their_folders(folder: Path) -> None:
    places = [folder / "ft/seed0", f"{folder}/ft/seed1/checkpoint-*"]
    found = ModelSequence.from_folders(witness=folder / "witness", anchor=folder / "anchor", runs=places).runs
    assert {name: [one.step for one in run] for name, run in found.items()} == {"seed0": [1, 5], "seed1": [1]}


def test_a_list_of_checkpoints_of_one_run_is_not_taken_for_runs(folder: Path) -> None:
    places = [f"{folder}/ft/seed0/checkpoint-{step}" for step in (1, 5)]
    with refused("Two runs would be called 'seed0'"):
        ModelSequence.from_folders(witness=folder / "witness", anchor=folder / "anchor", runs=places)


def test_models_where_folders_are_wanted_and_the_other_way_round() -> None:
    with pytest.raises(GravlensError, match="from_models"):
        ModelSequence.from_folders(witness=RAW, anchor=RAW)  # pyright: ignore
    with pytest.raises(GravlensError, match="from_models"):
        ModelSequence.from_folders(witness="base", anchor=[RAW])  # pyright: ignore
    with pytest.raises(GravlensError, match=r"\.module"):
        ModelSequence.from_models(witness=OPENED, anchor=OPENED)  # pyright: ignore


@pytest.mark.parametrize("runs", [[RAW, RAW], {20: RAW}, RAW], ids=["list", "steps", "model"])
def test_runs_of_models_without_a_name(runs: Any) -> None:
    with pytest.raises(GravlensError, match=r'runs=\{"seed0": \{20: model\}\}'):
        ModelSequence.from_models(witness=RAW, anchor=RAW, runs=runs)


def test_a_run_of_one_model_is_its_first_step() -> None:
    run = ModelSequence.from_models(witness=RAW, anchor=RAW, runs={"seed0": RAW}).runs["seed0"]
    assert [(one.step, one.source) for one in run] == [(1, RAW)]


# -- residuals and trajectories ----------------------------------------------------------------------------------------


def test_a_sequence_is_followed_on_its_probes_and_held_out_prompts(history: ModelSequence) -> None:
    sets = [cache_residuals(history), cache_residuals(history, history.held_out)]
    vs = locate_vrev(sets[0])
    pd.testing.assert_frame_equal(follow(history, vs).table, follow(sets, vs).table)
    elsewhere = Directions((V,))  # of no prompts: both sets would be held out
    pd.testing.assert_frame_equal(follow(history, elsewhere).table, follow(sets[1], elsewhere).table)


def test_one_direction_is_followed_and_one_layer_is_a_mean() -> None:
    vs = locate_vrev(STATES)
    pd.testing.assert_frame_equal(follow(STATES, vs[1]).table, follow(STATES, vs.at([1])).table)
    pd.testing.assert_frame_equal(
        follow(STATES, vs, layers_in_mean=1).table, follow(STATES, vs, layers_in_mean=[1]).table
    )
    assert vs.at(1).layers == (1,)


def test_some_layers_are_located(history: ModelSequence) -> None:
    for source in (history, cache_residuals(history)):
        some = locate_vrev(source, layer=[0, 2])
        np.testing.assert_allclose(some.vectors, locate_vrev(history).at([0, 2]).vectors, atol=1e-6)
    assert cache_residuals(history, layers=2).layers == (2,)


NEED_RESIDUALS: dict[str, Callable[[Any], Any]] = {
    "follow": lambda given: follow([given], Directions((V,))),
    "cross_fit": lambda given: gl.stats.cross_fit(given, repeats=2, rng=np.random.default_rng(0)),
    "split_half_reliability": lambda given: gl.stats.split_half_reliability(
        given, repeats=2, rng=np.random.default_rng(0)
    ),
    "split_drift": lambda given: gl.decomposition.split_drift(given, {"v_rev": Directions((V,))}),
    "ancestor_pull": lambda given: gl.decomposition.ancestor_pull(given, ["witness"]),
    "anchor_ratio": lambda given: gl.controls.anchor_ratio(
        given, siblings=["sibling"], layers=[1], draws=2, rng=np.random.default_rng(0)
    ),
    "residual_plane": lambda given: gl.plot.residual_plane(given, V),
    "compare_choices": lambda given: gl.stats.compare_choices(given),
    "substitute": lambda given: gl.controls.substitute(given, witness="a", anchor="b"),
    "bootstrap_alignment": lambda given: gl.stats.bootstrap_alignment(
        given, Directions((V,)), draws=2, rng=np.random.default_rng(0)
    ),
    "drift_subspaces": lambda given: gl.subspaces.drift_subspaces(given, Directions((V,)), at=["seed0/5"]),
    "whitened": gl.geometry.whitened,
    "Clamp": lambda given: Clamp(V, given),
    "Patch": lambda given: Patch(V, given, [[1]]),
}


@pytest.mark.parametrize("name", NEED_RESIDUALS)
@pytest.mark.parametrize("given", ["history", [STATES], "states.safetensors", Directions((V,))], ids=kind_of)
def test_what_holds_no_states_is_shown_how_to_cache_them(name: str, given: Any, history: ModelSequence) -> None:
    with pytest.raises(GravlensError, match="cache_residuals"):
        NEED_RESIDUALS[name](history if given == "history" else given)


@pytest.mark.parametrize("given", [[VECTOR], VECTOR, "v.safetensors", None, OPENED, 1, STATES], ids=kind_of)
def test_what_is_no_direction_is_shown_how_to_make_one(given: Any) -> None:
    tries: list[Callable[[Any], Any]] = [
        Ablate,
        Steer,
        partial(Clamp, residuals=STATES),
        partial(follow, STATES),
        partial(layerwise_effect, OPENED, score=SCORE, prompts=tiny.PROMPTS),
        partial(gl.nulls.isotropic, steps=[1], draws=2, rng=np.random.default_rng(0)),
        partial(gl.exchange.to_npz, path="v.npz"),
        partial(gl.directions.random_like, rng=np.random.default_rng(0)),
        partial(gl.readout.readout, OPENED),
    ]
    for attempt in tries:
        with pytest.raises(GravlensError, match=r"direction_from\(vector, layer=…\)"):
            attempt(given)


def test_directions_of_several_layers_where_one_is_needed() -> None:
    for attempt in (partial(gl.readout.readout, OPENED), partial(gl.plot.residual_plane, STATES)):
        with pytest.raises(GravlensError, match=r"directions\[layer\]"):
            attempt(locate_vrev(STATES))  # pyright: ignore


# -- interventions and effects -----------------------------------------------------------------------------------------


def test_one_intervention_is_one_condition() -> None:
    given = {"score": SCORE, "prompts": tiny.PROMPTS[:3], "n_random": 2}
    effect = causal_effect(OPENED, Ablate(V), **given)
    pd.testing.assert_frame_equal(effect.table, causal_effect(OPENED, {"ablate": Ablate(V)}, **given).table)


@pytest.mark.parametrize("given", [V, {"ablated": V}, [Ablate(V)], Ablate, {"ablated": Ablate}], ids=kind_of)
def test_what_is_no_condition_is_shown_as_one(given: Any) -> None:
    with pytest.raises(GravlensError, match=r"Ablate\(direction\)"):
        causal_effect(OPENED, given, score=SCORE, prompts=tiny.PROMPTS)


@pytest.mark.parametrize("given", [V, [Ablate(V)], Ablate, VECTOR], ids=kind_of)
def test_what_is_no_intervention_is_shown_as_one(given: Any) -> None:
    with pytest.raises(GravlensError, match=r"Ablate\(direction\)"), gl.intervene(OPENED, given):
        pass


@pytest.mark.parametrize("score", ["refusal_log_odds", np.zeros(6)], ids=kind_of)
def test_a_score_is_a_function(score: Any) -> None:
    with pytest.raises(GravlensError, match="refusal_log_odds"):
        causal_effect(OPENED, Ablate(V), score=score, prompts=tiny.PROMPTS)


def test_one_strength_and_one_layers_direction() -> None:
    with pytest.raises(GravlensError, match="strengths=1"):
        dose_response(OPENED, V, 1, score=SCORE, prompts=tiny.PROMPTS)  # pyright: ignore
    given = {"score": SCORE, "prompts": tiny.PROMPTS[:3], "n_random": 2}
    assert layerwise_effect(OPENED, V, **given).table.layer.tolist() == [1]


# -- models, prompts and examples --------------------------------------------------------------------------------------

NEED_A_MODEL: dict[str, Callable[[Any], Any]] = {
    "generate_answers": lambda model: gl.generate_answers(model, tiny.PROMPTS, max_new_tokens=3),
    "refusal_log_odds": lambda model: SCORE(model, tiny.PROMPTS),
    "two_sided_log_odds": lambda model: gl.scores.two_sided_log_odds(
        model, tiny.PROMPTS, refusals=REFUSALS[:1], compliances=["get"]
    ),
    "task_loss": lambda model: gl.scores.task_loss(model, EXAMPLES),
    "perplexity": lambda model: gl.scores.perplexity(model, EXAMPLES),
    "kl_from": lambda model: gl.divergence.kl_from(model, OPENED, tiny.PROMPTS, max_new_tokens=2),
    "kl_from, the other": lambda model: gl.divergence.kl_from(OPENED, model, tiny.PROMPTS, max_new_tokens=2),
    "answer_log_likelihood": lambda model: gl.divergence.answer_log_likelihood(
        model, [one.prompt for one in EXAMPLES], [one.answer for one in EXAMPLES]
    ),
    "forward_noise": lambda model: gl.stats.forward_noise(
        model, tiny.PROMPTS, layers=[1], repeats=2, rng=np.random.default_rng(0)
    ),
    "update_norms": lambda model: gl.damage.update_norms(model, OPENED),
    "causal_effect": lambda model: (
        causal_effect(model, Ablate(V), score=SCORE, prompts=tiny.PROMPTS[:2], n_random=1).baseline
    ),
    "readout": lambda model: gl.readout.readout(model, V, top=3).to_numpy(),
}


@pytest.mark.parametrize("kind", ["bridge", "hooked_transformer"])
def test_a_model_of_transformer_lens_answers_without_being_opened(kind: str, tmp_path: Path) -> None:
    opened = tiny.opened(kind, tmp_path)
    if kind == "hooked_transformer":  # a bridge carries its own
        opened.module.tokenizer = tiny.TOKENIZER
    for ask in (NEED_A_MODEL["generate_answers"], NEED_A_MODEL["refusal_log_odds"], NEED_A_MODEL["task_loss"]):
        assert repr(ask(opened.module)) == repr(ask(opened))


@pytest.mark.parametrize("name", NEED_A_MODEL)
@pytest.mark.parametrize("kind", ["module", "folder", "checkpoint"])
def test_a_model_need_not_be_opened(name: str, kind: str, folder: Path) -> None:
    path = folder / "anchor"
    given = {"module": RAW, "folder": str(path), "checkpoint": gl.Checkpoint("anchor", path)}[kind]
    found, wanted = NEED_A_MODEL[name](given), NEED_A_MODEL[name](OPENED)
    assert repr(found) == repr(wanted)


@pytest.mark.parametrize("name", NEED_A_MODEL)
@pytest.mark.parametrize("given", [None, ["base"], V, STATES, tiny.TOKENIZER], ids=kind_of)
def test_what_is_no_model_is_said(name: str, given: Any) -> None:
    with pytest.raises(GravlensError, match=r"TransformerBridge or .*open_model"):
        NEED_A_MODEL[name](given)


def test_a_sequence_is_no_model(history: ModelSequence) -> None:
    with pytest.raises(GravlensError, match=r"sequence\.anchor"):
        gl.generate_answers(history, tiny.PROMPTS)  # pyright: ignore


@pytest.mark.parametrize("given", [3, None, {"prompt": 1}, [{"prompt": "a"}, "b"], STATES], ids=kind_of)
def test_what_is_no_prompt_is_said(given: Any) -> None:
    with pytest.raises(GravlensError, match=r"PromptSet\.of\(\['"):
        gl.generate_answers(OPENED, given)


def test_one_prompt_as_a_text_is_shown_as_a_list() -> None:
    with pytest.raises(GravlensError, match=r"\[prompt\]"):
        gl.generate_answers(OPENED, "get the sponge")


@pytest.mark.parametrize("given", [["get the sponge"], "data.jsonl", EXAMPLES[0], None, [None]], ids=kind_of)
def test_what_is_no_example_is_said(given: Any) -> None:
    with pytest.raises(GravlensError, match=r"Example\(prompt, answer\)"):
        gl.scores.task_loss(OPENED, given)


def test_a_plain_pair_is_an_example() -> None:
    pairs: Any = [(one.prompt, one.answer) for one in EXAMPLES]
    assert gl.scores.task_loss(OPENED, pairs) == gl.scores.task_loss(OPENED, EXAMPLES)


def test_probes_are_a_list_as_well_as_a_set(folder: Path) -> None:
    sequence = ModelSequence.from_folders(witness=folder / "witness", anchor=folder / "anchor")
    texts = probe_prompts()[:3]
    one, other = (locate_vrev(sequence, prompts=p, layer=1).vector for p in (texts, PromptSet.of(texts)))
    np.testing.assert_array_equal(one, other)
    assert isinstance(cache_residuals(sequence, texts), Residuals)


# -- results, plots, blockers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [STATES, None, [STATES], Directions((V,)), "t.csv"], ids=kind_of)
def test_what_is_no_trajectory_or_table_is_shown_how_to_follow(given: Any) -> None:
    null = gl.nulls.isotropic(V, steps=[5], draws=3, rng=np.random.default_rng(0))  # pyright: ignore
    tries: list[Callable[[Any], Any]] = [
        lambda one: gl.compare(one, null),
        partial(gl.nulls.sign_flips, draws=3, rng=np.random.default_rng(0)),
        gl.plot_alignment,
        gl.plot.plot_layers,
        gl.plot.plot_effect,
        gl.claim,
    ]
    for attempt in tries:
        with pytest.raises(GravlensError, match=r"follow\(residuals, directions\)"):
            attempt(given)


def test_other_parts_that_are_easily_confused() -> None:
    wrong: dict[str, Callable[[], Any]] = {
        "isotropic": lambda: gl.compare(follow(STATES, V), V),  # pyright: ignore
        "cache_residuals": lambda: gl.decomposition.leak_map(Directions((V,))),  # pyright: ignore
        r"Ablate\(direction\)": lambda: gl.At(V, "last"),  # pyright: ignore
        r"PromptSet\.of": lambda: gl.read_prompts(["a"]),
        r"Contrast\.of": lambda: gl.contrasts.read_contrast(["a"], ["b"]),
        "direction_from": lambda: gl.controls.partialled_out(Directions((V,)), VECTOR),  # pyright: ignore
        r"direction_from\(": lambda: gl.Monitor(VECTOR, tiny.PROMPTS),  # pyright: ignore
        "Directions.load": lambda: gl.blockers.Penalty(VECTOR, probes=PromptSet.of(tiny.PROMPTS)),  # pyright: ignore
        r"layer=…\)": lambda: gl.blockers.UpdateProjection(VECTOR, probes=PromptSet.of(tiny.PROMPTS)),  # pyright: ignore
        "locate_vrev": lambda: gl.subspaces.random_like([1], rng=np.random.default_rng(0)),  # pyright: ignore
    }
    for remedy, attempt in wrong.items():
        with pytest.raises(GravlensError, match=remedy):
            attempt()


@pytest.mark.parametrize(
    "vector", [VECTOR.bfloat16(), VECTOR.clone().requires_grad_(), VECTOR.tolist(), VECTOR.numpy()], ids=kind_of
)
def test_any_vector_becomes_a_direction(vector: Any) -> None:
    np.testing.assert_allclose(direction_from(vector, layer=1).vector, V.vector, atol=5e-3)


def test_a_direction_stands_at_every_layer_of_a_model_that_is_not_opened() -> None:
    assert everywhere(V, RAW).layers == everywhere(V, OPENED).layers == (0, 1, 2)
