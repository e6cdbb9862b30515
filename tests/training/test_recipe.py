"""Recipes, steps and seeds are checked where they are given."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from blocked import EXAMPLES
from histories import refused

from gravlens.models.opening import open_model
from gravlens.training.finetune import finetune
from gravlens.training.recipe import Recipe

WRONG: dict[str, list[Any]] = {
    "steps": [0, -1, 2.0, 1.5, "10", None, True],
    "batch": [0, math.nan],
    "accumulation": [0, "2"],
    "warmup_steps": [-1, 0.1],
    "lora": [0, -4, 8.0, "16", True],
    "learning_rate": [-1e-5, math.inf, math.nan, "1e-3", None],
    "weight_decay": [-0.1, math.inf],
    "beta2": [1, 1.0, -0.1, math.nan],
    "schedule": ["cosin", "linear", "Cosine", None, 3],
    "bf16": ["no", 1],
    "freeze_embeddings": [None],
    "gradient_checkpointing": ["yes"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_wrong_field_is_named_with_its_value(field: str, value: Any) -> None:
    with refused(f"Recipe({field}={value!r})"):
        Recipe(**{field: value})


def test_every_field_is_checked() -> None:
    assert WRONG.keys() == vars(Recipe()).keys()


def test_right_recipes_stay() -> None:
    numbers = Recipe(np.int64(3), 1, np.float32(0.5), 0, 0.0, 0, "cosine", True, lora=np.int32(4))
    assert (numbers.steps, numbers.learning_rate, numbers.weight_decay, numbers.lora) == (3, 0.5, 0, 4)
    assert Recipe(learning_rate=0.0, lora=None) == Recipe(learning_rate=0)


@pytest.mark.parametrize("steps", [(0,), (-1, 2), (1.5,), ("1",), (True,), (11, 20)])
def test_steps_that_no_run_reaches_are_refused(steps: Any) -> None:
    with refused(f"save_steps={steps!r}", "10 steps"):
        Recipe(steps=10).saved_steps(steps)


def test_steps_beyond_a_run_are_left_out_beside_others() -> None:
    assert Recipe(steps=10).saved_steps((20, 5, np.int64(2), 5)) == (2, 5, 10)
    assert Recipe(steps=10).saved_steps(()) == (10,) == Recipe(steps=10).saved_steps(iter([10]))


@pytest.mark.parametrize("seed", [-1, 1.0, "0", None, True, 2**32])
def test_a_seed_of_another_kind_is_refused(seed: Any, tmp_path: Path) -> None:
    with refused(f"seed={seed!r}"):
        finetune(open_model(tiny.llama(), tokenizer=tiny.TOKENIZER), EXAMPLES, out=tmp_path / "run", seed=seed)
    assert not list(tmp_path.iterdir())
