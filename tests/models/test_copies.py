"""A model in memory is copied only without hooks on it: the copy would keep them, and the edits of `intervene`."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocked import EXAMPLES
from histories import refused
from torch import nn

from gravlens.blockers.constrained_sft import ConstrainedSFT
from gravlens.directions.vrev import direction_from
from gravlens.interventions.edits import Ablate
from gravlens.interventions.hooks import intervene
from gravlens.interventions.orthogonalization import orthogonalize
from gravlens.models.families import copied
from gravlens.models.opening import OpenModel, open_model
from gravlens.training.finetune import Recipe, finetune

V = direction_from(np.ones(tiny.WIDTH), layer=1, distance=1.0)


def tune(model: OpenModel, out: Path) -> Any:
    return finetune(model, EXAMPLES, out=out / "run", recipe=Recipe(steps=1, batch=2))


COPYING: dict[str, Callable[[OpenModel, Path], Any]] = {
    "finetune": tune,
    "orthogonalize": lambda model, out: orthogonalize(model, V, out=out / "written"),
    "constrained SFT": lambda model, _: ConstrainedSFT().bind(model, rng=np.random.default_rng(0)),
}


@pytest.mark.parametrize("name", COPYING)
def test_no_copy_is_made_inside_intervene(name: str, tmp_path: Path) -> None:
    model = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
    with ExitStack() as block:
        firings = block.enter_context(intervene(model, Ablate(V)))
        model.module(torch.tensor([[1, 2, 3]]))
        assert firings.total == 1
        with refused("LlamaForCausalLM", "hooks", "model.layers.1"):
            COPYING[name](model, tmp_path)
    assert not list(tmp_path.iterdir())
    COPYING[name](model, tmp_path)  # and outside it is


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda part: part.register_forward_hook(lambda *_: None),
    "before": lambda part: part.register_forward_pre_hook(lambda *_: None),
    "backward": lambda part: part.register_full_backward_hook(lambda *_: None),
    "before backward": lambda part: part.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["", "model.layers.0.mlp"])
def test_hooks_of_the_users_are_refused_too(kind: str, where: str) -> None:
    model = tiny.llama()
    handle = HOOKS[kind](model.get_submodule(where))
    with refused("hooks", where or "on the whole model"):
        copied(model)
    handle.remove()
    twin = copied(model)
    assert twin is not model and torch.equal(twin(torch.tensor([[1, 2]])).logits, model(torch.tensor([[1, 2]])).logits)


def test_a_part_that_was_replaced_may_have_them() -> None:
    model = tiny.llama()
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp)
    copied(model)
    model.model.layers[1].mlp[0].register_forward_hook(lambda *_: None)
    with refused("model.layers.1.mlp.0"):
        copied(model)


def test_hooks_of_transformers_that_only_record_do_not_count() -> None:
    model = tiny.llama()
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    model.enable_input_require_grads()
    copied(model)
