"""Every public call leaves the process as it was: generators, settings, filters, logging, environment, open files.

The examples of docs/ are the cases of most names; those that no example calls have one in `CASES`. A new public name
without either fails the test.
"""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import small
import test_docs
import tiny
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from histories import history_on_disk, write_rows
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from manners import Watch, changed, snapshot
from peft import LoraConfig, get_peft_model
from test_public_types import public
from transformers.utils import logging as transformers_logging

import gravlens as gl
from gravlens.core.process_state import quiet

ROOT = Path(__file__).resolve().parents[2]
UNBLOCKED = gl.organisms.Arm("unblocked", (0, 1))


# What an import of these does to itself, such as numpy's filters of its own warnings, is theirs: whoever imports them
# has it too, and without it they would not work as meant. torch._inductor notes its cache in the environment,
# scikit-learn how OpenMP starts.
THEIRS = (
    "numpy scipy scipy.special scipy.stats pandas torch torch._inductor.runtime.cache_dir_utils sklearn matplotlib "
    "matplotlib.backends.backend_agg xarray transformers accelerate peft sympy plotly.tools "
    "plotly.graph_objs._deprecations"
).split()


class Things:
    """Small inputs, made when they are first asked for."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.prompts, self.rng = tiny.PROMPTS, np.random.default_rng(0)

    @cached_property
    def sequence(self) -> Any:
        return gl.ModelSequence.from_toml(self.home / "SEQUENCE.toml")

    @cached_property
    def states(self) -> Any:
        return gl.cache_residuals(self.sequence)

    @cached_property
    def vs(self) -> Any:
        return gl.locate_vrev(self.states).at([0, 1])

    @cached_property
    def samples(self) -> Any:
        return self.rng.standard_normal((9, 2, 8))

    @cached_property
    def pair(self) -> Any:
        return self.samples[:, 0], self.samples[:, 1]

    @property
    def model(self) -> Any:
        return gl.open_model(self.home / "aligned")

    @cached_property
    def space(self) -> Any:
        return gl.subspaces.span_of(self.samples[:2, 0], layer=0, distance=1.0)

    @cached_property
    def adapter(self) -> Path:
        """An adapter over `aligned`, as PEFT saves it."""
        base = transformers.AutoModelForCausalLM.from_pretrained(self.home / "aligned")
        base.name_or_path = str(self.home / "aligned")
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        config.base_model_name_or_path = str(self.home / "aligned")
        get_peft_model(base, config).save_pretrained(self.home / "adapter")
        return self.home / "adapter"

    def tune(self, **further: Any) -> Any:
        out, recipe = self.home / f"tuned{self.rng.integers(10**9)}", gl.Recipe(steps=2, batch=2)
        examples = gl.read_examples(self.home / "data.jsonl")
        return gl.finetune(self.home / "aligned", examples, out=out, **{"recipe": recipe, **further})

    @cached_property
    def table(self) -> pd.DataFrame:
        arms, runs = ["unblocked", "held", "random_twin"], [0, 1]
        rows = [{"blocker": arm, "arm": arm, "organism": "o", "run": run} for arm in arms for run in runs]
        measures = {"compliance_rate": 0.5, "fraction_heldout": 0.2, "task_loss": 1.0, "step": 5, "seed": 0}
        return pd.DataFrame([{**row, **measures, "compliance_rate": 0.1 * i} for i, row in enumerate(rows)])

    @cached_property
    def study(self) -> Any:
        """Two runs of an organism."""
        plan = {**small.PLAN, "recipe": gl.Recipe(4, 4, 1e-3), "save_steps": (1, 4), "noise_draws": 1}
        with in_this_process() as experiment:
            return experiment.carry_out({"one": small.Short(**plan)}, self.home / "cache", arms=[UNBLOCKED])["one"]

    def audit(self) -> Any:
        history = gl.organisms.RecordedHistory(self.sequence, measures=small.organism().measures)
        with in_this_process():
            return gl.audit({"one": history}, self.home / "results", cache=self.home / "cache", workers=1)


@contextmanager
def in_this_process() -> Iterator[Any]:
    """Experiments without worker processes, which would leave their traces elsewhere."""
    experiment = import_module("gravlens.studies.experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "processes", small.inline)
        yield experiment


def within(made: Any) -> None:
    """Enter a context and leave it."""
    with made:
        pass


def damaged(t: Things, name: str, *given: Any) -> None:
    within(getattr(gl.damage, name)(t.model, *given))


JUDGES = {"guard_judge": {"safe": "x y z"}, "classifier_judge": {"harmful_labels": ["bad"]}}


def judged(t: Things, name: str) -> None:
    """A judge of a model that cannot judge: one error, and no trace either."""
    with pytest.raises(gl.GravlensError):
        getattr(gl.judges, name)(t.home / "aligned", **JUDGES[name])(["how"], ["so"])


def intervened(t: Things) -> None:
    model = t.model
    with gl.intervene(model, gl.Ablate(t.vs)):
        gl.generate_answers(model, t.prompts[:1], max_new_tokens=2)


def compared(t: Things, name: str) -> Any:
    return getattr(gl.studies, name)(t.study, [UNBLOCKED], organism="o")


def inspected(t: Things) -> None:
    """Without inspect-ai, which `dev` leaves out, one error."""
    with suppress(gl.GravlensError):
        gl.exchange.to_inspect_log(["a"], t.home / "log.json", scores={"harm": [1.0]}, model="tiny")


CASES: dict[str, Callable[[Things], Any]] = {
    "activations.Answers": lambda t: gl.activations.Answers(["one", "two"]),
    "audit": lambda t: t.audit(),
    "behavior.Answer": lambda t: gl.behavior.Answer("yes"),
    "blockers.ConstrainedSFT": lambda t: t.tune(blocker=gl.blockers.ConstrainedSFT()),
    "blockers.GradientAblation": lambda t: t.tune(blocker=gl.blockers.GradientAblation(t.vs)),
    "blockers.PreventativeSteering": lambda t: t.tune(blocker=gl.blockers.PreventativeSteering(t.vs)),
    "blockers.Ramp": lambda t: gl.blockers.Ramp(3)(1),
    "blockers.TaskVectorProjection": lambda t: t.tune(blocker=gl.blockers.TaskVectorProjection(t.home / "base")),
    "blockers.TrainingAblation": lambda t: t.tune(blocker=gl.blockers.TrainingAblation(t.vs)),
    "claims.interval": lambda t: gl.claims.interval([0.1, 0.2, 0.4]),
    "contrasts.read_contrast": lambda t: gl.contrasts.read_contrast(t.home / "pairs.jsonl"),
    "cost.plan_reading": lambda t: gl.cost.plan_reading(t.sequence),
    "covariance.draw_from_covariance": lambda t: gl.covariance.draw_from_covariance(t.samples, draws=2, rng=t.rng),
    "covariance.participation_ratio": lambda t: gl.covariance.participation_ratio(t.samples[:, 0]),
    "covariance.shrunk_covariance": lambda t: gl.covariance.shrunk_covariance(t.samples[:, 0]),
    "covariance.whitening": lambda t: gl.covariance.whitening(t.samples[:, 0]),
    "damage.pruned": lambda t: damaged(t, "pruned", 0.5),
    "damage.reweighted": lambda t: damaged(t, "reweighted", {"model.norm.weight": torch.zeros(tiny.WIDTH)}),
    "damage.rounded": lambda t: damaged(t, "rounded", 4),
    "damage.sign_flipped": lambda t: damaged(t, "sign_flipped", t.home / "base"),
    "damage.updated": lambda t: damaged(t, "updated", t.home / "base"),
    "estimators.first_component": lambda t: gl.estimators.first_component(*t.pair),
    "estimators.geometric_median": lambda t: gl.estimators.geometric_median(*t.pair),
    "estimators.lda": lambda t: gl.estimators.lda(*t.pair),
    "estimators.logistic_probe": lambda t: gl.estimators.logistic_probe(*t.pair),
    "exchange.from_npz": lambda t: gl.exchange.from_npz(gl.exchange.to_npz(t.vs, t.home / "v.npz")),
    "exchange.from_steered": lambda t: gl.exchange.from_steered(gl.exchange.to_steered(t.vs, t.home / "v.pt")),
    "exchange.to_inspect_log": inspected,
    "geometry.centred": lambda t: gl.geometry.locate_in(gl.geometry.centred(t.states), t.states),
    "geometry.raw": lambda t: gl.geometry.locate_in(gl.geometry.raw(t.states), t.states),
    "geometry.whitened": lambda t: gl.geometry.locate_in(gl.geometry.whitened(t.states), t.states),
    "geometry.without_top": lambda t: gl.geometry.locate_in(gl.geometry.without_top(t.states), t.states),
    "history.RandomClamp": lambda t: gl.history.RandomClamp("v.safetensors", {}),
    "intervene": intervened,
    "interventions.fwd_hooks": lambda t: gl.interventions.fwd_hooks(
        gl.open_model(t.home / "aligned", through="bridge"), gl.Ablate(t.vs)
    ),
    "judges.classifier_judge": lambda t: judged(t, "classifier_judge"),
    "judges.guard_judge": lambda t: judged(t, "guard_judge"),
    "judges.rubric_rater": lambda t: gl.judges.rubric_rater(t.model, rubric="r {forbidden_prompt} {response}"),
    "models.sequence_tokenizer": lambda t: gl.models.sequence_tokenizer(t.sequence),
    "open_model": lambda t: [gl.open_model(t.adapter), gl.open_model(t.home / "aligned", through="bridge")],
    "organisms.GivenHistory": lambda t: gl.organisms.GivenHistory(
        t.home / "SEQUENCE.toml", t.home / "data.jsonl", t.home / "harmless.jsonl"
    ),
    "organisms.Grounds": lambda t: gl.organisms.Grounds(
        t.sequence, t.states, t.vs, None, [], gl.PromptSet(("a",)), t.rng
    ),
    "organisms.Pretrained": lambda t: gl.organisms.Pretrained("m", Path("a"), Path("b")),
    "plot.plot_arms": lambda t: gl.plot.plot_arms(t.table),
    "plot.plot_frontier": lambda t: gl.plot.save_figure(gl.plot.plot_frontier(t.table), t.home / "frontier"),
    "stats.least_p_value": lambda t: gl.stats.least_p_value(5),
    "stats.rank_test": lambda t: gl.stats.rank_test([1, 2], [4, 4]),
    "studies.Study": lambda t: gl.studies.Study(t.study.organism, t.study.home),
    "studies.compare_arms": lambda t: compared(t, "compare_arms"),
    "studies.compare_layers": lambda t: compared(t, "compare_layers"),
    "studies.orderings": lambda t: gl.studies.orderings(t.table),
    "subspaces.principal_angles": lambda t: gl.subspaces.principal_angles(t.space, t.space),
    "subspaces.share_within": lambda t: gl.subspaces.share_within(t.samples[:, 0], t.space),
    "finetune": lambda t: [t.tune(recipe=gl.Recipe(steps=1, batch=2, bf16=bf16, lora=2)) for bf16 in (True, False)],
}


def names() -> list[str]:
    """Of the public functions and classes; a protocol is not called."""
    return [name for name, value in public().items() if not getattr(value, "_is_protocol", False)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manners")
    history_on_disk(folder)
    (toml,) = test_docs.blocks(test_docs.TEXTS["docs/sequence.md"], "toml")
    (folder / "SEQUENCE.toml").write_text(toml)
    write_rows(folder / "pairs.jsonl", [{"harmful": "Pick a lock", "harmless": "Buy a lock"}])
    write_rows(folder / "harmless.jsonl", [{"prompt": text} for text in tiny.PROMPTS[:4]])
    return folder


@contextmanager
def watching() -> Iterator[Watch]:
    watch, found = Watch(), public()
    holders = {name.rpartition(".")[0]: getattr(gl, name.partition(".")[0]) for name in found if "." in name}
    with watch.over({name: found[name] for name in names()}, {"": gl, **holders}):
        yield watch


@pytest.fixture(scope="module")
def watched(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Watch:
    """All examples of docs/ and all cases."""
    here, _ = Path.cwd(), [import_module(name) for name in THEIRS]
    with watching() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for page in test_docs.WITH_EXAMPLES:
                folder = shutil.copytree(home, tmp_path_factory.mktemp("page") / "home")
                os.chdir(folder)
                test_docs.run(page)
        finally:
            os.chdir(here)
        things = Things(shutil.copytree(home, tmp_path_factory.mktemp("cases") / "home"))
        for case in CASES.values():
            case(things)
    return watch


def may_leave(name: str) -> set[str]:
    """A plot's figure is pyplot's, to show it, where the user has loaded pyplot; nothing else may register one."""
    return {"figures of pyplot"} if re.search(r"(^|\.)plot_\w+$", name) else set()


@pytest.mark.long
@pytest.mark.parametrize("name", names())
def test_a_public_call_leaves_the_process_as_it_was(name: str, watched: Watch) -> None:
    calls = {label: found for label, found in watched.changes.items() if label == name or label.startswith(f"{name}.")}
    assert calls, f"neither an example in docs/ nor a case of CASES uses {name}"
    assert {label: found for label, found in calls.items() if found - may_leave(name)} == {}


def test_every_case_is_of_a_public_name() -> None:
    assert CASES.keys() <= set(names())


def test_the_user_s_accelerator_is_as_it_was(home: Path, tmp_path: Path) -> None:
    things, kinds = Things(shutil.copytree(home, tmp_path / "home")), (AcceleratorState, PartialState, GradientState)
    for kind in kinds:  # of an example in docs/ that trains by itself
        kind._shared_state.clear()
    try:
        own = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=3)
        before = snapshot()
        things.tune()
        assert changed(before, snapshot()) == []
        assert (own.gradient_accumulation_steps, own.gradient_state.num_steps) == (3, 3)
        assert (own.mixed_precision, Accelerator().mixed_precision) == ("bf16", "bf16")
    finally:
        for kind in kinds:
            kind._shared_state.clear()
    things.tune(recipe=gl.Recipe(steps=1, batch=2, bf16=True))
    assert [kind._shared_state for kind in kinds] == [{}, {}, {}]


QUICK = ["open_model", "finetune", "cost.plan_reading", "intervene", "plot.plot_frontier", "judges.guard_judge"]


@pytest.mark.parametrize("name", QUICK)
def test_a_call_through_each_door_to_another_library(name: str, home: Path, tmp_path: Path) -> None:
    things = Things(shutil.copytree(home, tmp_path / "home"))
    _ = things.adapter, things.vs, things.table  # PEFT draws an adapter's weights here
    before = snapshot()
    CASES[name](things)
    assert set(changed(before, snapshot())) <= may_leave(name)


# -- the positive control: each wrong is seen, as what it is -----------------------------------------------------------


def touched(undo: Callable[[], object], wrong: Callable[[], object]) -> Callable[[], Callable[[], object]]:
    def commit() -> Callable[[], object]:
        wrong()
        return undo

    return commit


HELD: list[Any] = []


def wrongs(folder: Path) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What changes -> how to change it, how to undo that."""
    kept: Any = SimpleNamespace(
        **{"filters": [*warnings.filters], "umask": os.umask(0o022), "path": [*sys.path], "cwd": Path.cwd()},
        **{"states": [dict(kind._shared_state) for kind in (AcceleratorState, PartialState, GradientState)]},
        **{"verbosity": transformers_logging.get_verbosity(), "threads": torch.get_num_threads()},
    )
    os.umask(kept.umask)
    logger, handler = logging.getLogger("transformers"), logging.NullHandler()

    def restore_states() -> None:
        for kind, state in zip((AcceleratorState, PartialState, GradientState), kept.states, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)

    return {
        "generator of random": (random.random, lambda: random.seed(0)),
        "generator of numpy": (np.random.rand, lambda: np.random.seed(0)),
        "generator of torch": (lambda: torch.rand(1), lambda: torch.manual_seed(0)),
        "default dtype": (
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_default_dtype(torch.float32),
        ),
        "grad mode": (lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)),
        "threads of torch": (
            lambda: torch.set_num_threads(kept.threads + 1),
            lambda: torch.set_num_threads(kept.threads),
        ),
        "environment": (lambda: os.environ.update(GRAVLENS_X="1"), lambda: os.environ.pop("GRAVLENS_X")),
        "working folder": (lambda: os.chdir(folder), lambda: os.chdir(kept.cwd)),
        "umask": (lambda: os.umask(0o077), lambda: os.umask(kept.umask)),
        "sys.path": (lambda: sys.path.append("x"), lambda: sys.path.remove("x")),
        "warning filters": (
            lambda: warnings.simplefilter("ignore", FutureWarning),
            lambda: warnings.filters.__setitem__(slice(None), kept.filters),
        ),
        "signals": (
            lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
            lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL),
        ),
        "loggers": (
            transformers_logging.set_verbosity_debug,
            lambda: transformers_logging.set_verbosity(kept.verbosity),
        ),
        "loggers ": (lambda: logger.addHandler(handler), lambda: logger.removeHandler(handler)),
        "bars of huggingface_hub": (disable_progress_bars, enable_progress_bars),
        "rcParams": (lambda: mpl.rcParams.update({"font.size": 3}), lambda: mpl.rcParams.update({"font.size": 10})),
        "accelerate's state": (lambda: Accelerator(cpu=True), restore_states),
        "open files": (lambda: HELD.append((folder / "x").open("w")), lambda: HELD.pop().close()),
    }


@pytest.mark.parametrize("what", wrongs(Path()))
def test_each_wrong_is_seen(what: str, tmp_path: Path) -> None:
    restore_states = wrongs(tmp_path)["accelerate's state"][1]
    if what == "accelerate's state":
        for kind in (AcceleratorState, PartialState, GradientState):
            kind._shared_state.clear()
    wrong, undo = wrongs(tmp_path)[what]
    before, watch = snapshot(), Watch()
    try:
        watch.watched("wrong", wrong)()
    finally:
        undo()
        restore_states()
    assert watch.changes["wrong"] == {what.strip()}
    if "generator" not in what and what != "accelerate's state":
        assert changed(before, snapshot()) == []
    watch.watched("right", lambda: None)()
    assert watch.changes["right"] == set()


# -- threads -----------------------------------------------------------------------------------------------------------


def in_step(works: list[Callable[[Callable[[], None]], None]]) -> None:
    """Run works in threads; each calls what it is given to wait for the others."""
    barrier, errors = threading.Barrier(len(works), timeout=20), list[BaseException]()

    def run(work: Callable[[Callable[[], None]], None]) -> None:
        try:
            work(lambda: barrier.wait() and None)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_threads_that_silence_transformers_do_not_undo_each_other() -> None:
    """The second enters before the first leaves, and leaves last: restored one by one, it would stay silent."""
    seen: list[int] = []

    def first(wait: Callable[[], None]) -> None:
        with quiet():
            wait()
            wait()
            warnings.simplefilter("ignore", FutureWarning)
        wait()
        wait()

    def second(wait: Callable[[], None]) -> None:
        wait()
        with quiet():
            wait()
            wait()
            seen.append(transformers_logging.get_verbosity())
        wait()

    transformers_logging.set_verbosity(logging.WARNING)  # an earlier test may have silenced it
    before = snapshot()
    in_step([first, second])
    assert seen == [logging.ERROR], "still silent where the second is inside"
    assert changed(before, snapshot()) == []


def test_two_threads_open_models_of_two_dtypes_at_once(home: Path) -> None:
    """transformers sets the default dtype, and functions of torch.nn.init, for the process while it makes a model."""
    before, found = snapshot(), dict[str, Any]()

    def opening(name: str, dtype: torch.dtype) -> Callable[[Callable[[], None]], None]:
        def work(wait: Callable[[], None]) -> None:
            wait()
            for _ in range(4):
                found[name] = gl.open_model(home / name, dtype=dtype)

        return work

    in_step([opening("base", torch.float32), opening("aligned", torch.bfloat16)])
    assert (found["base"].dtype, found["aligned"].dtype) == (torch.float32, torch.bfloat16)
    alone = gl.open_model(home / "base").weights
    assert all(torch.equal(weight, alone[name]) for name, weight in found["base"].weights.items())
    assert changed(before, snapshot()) == []


def test_two_threads_that_train_end_as_one_does(home: Path, tmp_path: Path) -> None:
    things = Things(shutil.copytree(home, tmp_path / "home"))
    alone = things.tune(recipe=gl.Recipe(steps=2, batch=2, bf16=True)).log
    before, logs = snapshot(), list[Any]()

    def training(bf16: bool) -> Callable[[Callable[[], None]], None]:
        def work(wait: Callable[[], None]) -> None:
            wait()
            logs.append((bf16, things.tune(recipe=gl.Recipe(steps=2, batch=2, bf16=bf16)).log))

        return work

    in_step([training(True), training(False)])
    found = dict(logs)
    pd.testing.assert_frame_equal(found[True], alone)
    assert (found[False].loss != alone.loss).any()
    assert changed(before, snapshot()) == []


# -- the first use, with its imports -----------------------------------------------------------------------------------

FIRST = {
    "import": "import gravlens",
    "states": "import gravlens as gl; gl.cache_residuals('SEQUENCE.toml')",
    "adapter": "import gravlens as gl; gl.open_model('adapter')",
    "bridge": "import gravlens as gl; gl.open_model('aligned', through='bridge')",
    "training": "import gravlens as gl; gl.finetune('aligned', gl.read_examples('data.jsonl'), out='run', "
    "recipe=gl.Recipe(steps=1, batch=1))",
    "figure": "import gravlens as gl; vs = gl.locate_vrev('SEQUENCE.toml'); "
    "found = gl.follow(gl.cache_residuals('SEQUENCE.toml'), vs); "
    "gl.plot.save_figure(gl.plot_alignment(found, prompts='given'), 'figure')",
}
# PEFT and TransformerLens make bars of tqdm's, which start a thread, and whose lock chooses the start method.
FOREIGN = {name: {"threads", "start method"} for name in ("adapter", "bridge")}


def child(code: str, folder: Path) -> dict[str, Any]:
    told = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    command = [sys.executable, str(ROOT / "tests/manners.py"), code]
    ran = subprocess.run(command, cwd=folder, env=told, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip().count("\n") == 0, "it prints nothing"
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def theirs(home: Path) -> dict[str, Any]:
    return child(f"import {', '.join(THEIRS)}", home)


@pytest.mark.long
@pytest.mark.parametrize("name", FIRST)
def test_the_first_use_changes_no_more_than_the_imports_of_the_libraries_themselves(
    name: str, home: Path, tmp_path: Path, theirs: dict[str, Any]
) -> None:
    things = Things(shutil.copytree(home, tmp_path / "home"))
    if name == "adapter":
        _ = things.adapter
    found = child(FIRST[name], things.home)
    assert set(found["changed"]) <= {"warning filters", "environment", "loggers", *FOREIGN.get(name, ())}
    assert set(found["filters"]) <= set(theirs["filters"])
    extra = {key: value for key, value in found["environment"].items() if theirs["environment"].get(key) != value}
    assert extra == {}
    if name != "import":
        assert found["verbosity"] == theirs["verbosity"]
