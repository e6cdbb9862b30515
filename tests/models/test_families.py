"""A library that gravlens does not know is one subclass of `Family`; and the names that `through` takes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import refused
from torch import Tensor, nn

from gravlens.activations.residuals import read_residuals
from gravlens.directions.vrev import direction_from
from gravlens.interventions.edits import Ablate
from gravlens.interventions.hooks import intervene
from gravlens.models.families import Family, Inputs, Write
from gravlens.models.forward import final_logits, generate, sequence_logprobs
from gravlens.models.opening import OpenModel, open_model

IDS = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]


class Bigrams(nn.Module):
    """Embedding, two linear blocks, unembedding: a token's logits depend on that token alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.out = nn.Embedding(12, tiny.WIDTH), nn.Linear(tiny.WIDTH, 12, bias=False)
        self.layers = nn.ModuleList(nn.Linear(tiny.WIDTH, tiny.WIDTH) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.rows(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.out(hidden)


class BigramFamily(Family):
    name, unprocessed = "bigrams", "Bigrams()."
    own_tensors = kv_cache = False
    padding = True

    def __init__(self, module: Bigrams) -> None:
        super().__init__(module, module.layers, tiny.WIDTH)

    embedding = property(lambda self: self.module.rows.weight)
    vocabulary = property(lambda self: 12)
    head = property(lambda self: self.module.out)
    unembedding = property(lambda self: self.module.out.weight)

    def trunk(self, inputs: Inputs, cache: Any | None = None) -> None:
        self.module(inputs["input_ids"])

    def logits(self, inputs: Inputs, keep: int) -> Tensor:
        return self.module(inputs["input_ids"])[:, -keep:]

    def generate(self, inputs: Inputs, max_new_tokens: int, ends: Sequence[int]) -> Tensor:
        ids = inputs["input_ids"]
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self.module(ids)[:, -1:].argmax(-1)], dim=1)
        return ids

    def writes(self) -> Iterator[Write]:
        yield Write("rows", self.module.rows, ((self.module.rows.weight, 1),))


@pytest.fixture
def model() -> OpenModel:
    return OpenModel(BigramFamily(Bigrams()), None, {})


def test_a_new_library_is_read_scored_and_generated_with(model: OpenModel) -> None:
    module, last = model.module, torch.tensor([ids[-1] for ids in IDS])
    with torch.no_grad():
        states = module.layers[0](module.rows(last))
        torch.testing.assert_close(read_residuals(model, IDS, layers=[0])[:, 0], states)
        torch.testing.assert_close(final_logits(model, IDS), module(last))
        log_p = module(last).log_softmax(-1)[:, 7].double()
        torch.testing.assert_close(sequence_logprobs(model, IDS, [[7]] * len(IDS)), log_p)
    assert [new[0] for new in generate(model, IDS, max_new_tokens=2)] == module(last).argmax(-1).tolist()


def test_a_new_library_is_intervened_on(model: OpenModel) -> None:
    v = np.eye(tiny.WIDTH)[3]
    with intervene(model, Ablate(direction_from(v, layer=1))), torch.no_grad():
        found = final_logits(model, IDS)
    hidden = model.module.layers[1](model.module.layers[0](model.module.rows(torch.tensor([ids[-1] for ids in IDS]))))
    hidden = hidden * torch.tensor(1 - v, dtype=torch.float32)
    torch.testing.assert_close(found, model.module.out(hidden).detach())


@pytest.mark.parametrize("through", ["nnsight", "hooked_transformer"])
def test_what_folders_are_not_opened_through_is_an_error(through: Any, tmp_path: Path) -> None:
    with refused(f"through='{through}'"):
        open_model(tiny.save(tiny.llama(), tmp_path), through=through)
