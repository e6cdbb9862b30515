"""Logits of prompts with a shared prefix: it is run once, under the same edits, and they are those of whole prompts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.nn.modules import module

from gravlens.activations.reader import reuses_keys
from gravlens.activations.residuals import Residuals, read_residuals
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from
from gravlens.interventions.edits import Ablate, At, Clamp, Intervention, Patch, Steer
from gravlens.interventions.hooks import intervene
from gravlens.models import forward
from gravlens.models.forward import final_logits, sequence_logprobs
from gravlens.models.opening import OpenModel, open_model

PREFIX = [3, 14, 15, 9, 26, 5, 35, 8, 97, 93, 23, 84]
IDS = [[*PREFIX, *rest] for rest in ([40, 41, 42, 43], [50, 51], [60, 61, 62, 63, 64, 65, 66], [50, 51, 7])]
SAID = [[70], [71, 72, 73], [74, 75], [76]]
FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": tiny.llama,
    "GPT-2": tiny.gpt2,
    "BLOOM": lambda: built("Bloom", n_layer=3, n_head=4),
    "Mistral": lambda: built("Mistral", sliding_window=64, **ROTARY),
}
ROTARY = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def built(name: str, **changes: Any) -> Any:
    """A random model of a family of transformers."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": tiny.WIDTH, "initializer_range": 0.2}
    return getattr(transformers, f"{name}ForCausalLM")(config(**sizes, **changes)).eval()


def opened(model: Any) -> OpenModel:
    return open_model(model, tokenizer=tiny.TOKENIZER)


def direction(layer: int) -> Any:
    vector = np.random.default_rng(layer).standard_normal(tiny.WIDTH)
    return direction_from(vector, layer=layer, distance=2.0)


def edits(model: OpenModel) -> dict[str, list[Intervention]]:
    """Each kind of intervention, at all positions and at some."""
    both = Directions((direction(0), direction(1)))
    states = read_residuals(model, IDS, layers=range(tiny.LAYERS)).numpy()
    others = Residuals(states[None, ::-1].copy(), ("anchor",), tuple(range(tiny.LAYERS)), "others")
    steer = Steer(both, 1.5)
    return {
        "none": [],
        "steer": [steer],
        "ablate": [Ablate(both)],
        "clamp": [Clamp(both, others, 0.5)],
        "patch": [Patch(both, others, IDS)],
        "several": [Ablate(both), At(Steer(direction(1)), "last"), At(steer, "prompt")],
        "at the answer": [At(steer, "answer"), Ablate(direction(2))],
        "at offsets": [At(steer, (-1, -3))],
        "at an offset in the prefix of a short prompt": [At(steer, (-6,))],
    }


@contextmanager
def passes(model: OpenModel) -> Iterator[list[int]]:
    """How many tokens each pass through the embedding runs, seen without a hook and by its class, not the model."""
    seen: list[int] = []
    embedding = model.module.get_input_embeddings()
    kind: Any = type(embedding)
    own = kind.forward
    kind.forward = lambda part, ids: (seen.extend([ids.numel()] * (part is embedding)), own(part, ids))[1]
    try:
        yield seen
    finally:
        kind.forward = own


@contextmanager
def whole() -> Iterator[None]:
    """Prompts are not cut inside the block."""
    kept, forward.SHORTEST_PREFIX = forward.SHORTEST_PREFIX, 10**6
    try:
        yield
    finally:
        forward.SHORTEST_PREFIX = kept


def both_ways(model: OpenModel, edit: Sequence[Intervention], run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    def edited() -> torch.Tensor:
        if not edit:
            return run()
        with intervene(model, *edit):
            return run()

    cut = edited()
    with whole():
        return [cut, edited()]


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape and float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_hugging_faces_of_each_prompt_alone(family: str) -> None:
    model = opened(FAMILIES[family]())
    final_logits(model, IDS)  # the trials, once per model
    with passes(model) as seen:
        found = final_logits(model, IDS)
    assert sum(seen) < sum(map(len, IDS)) and seen[0] == len(PREFIX)
    with torch.no_grad():
        assert_same(found, torch.stack([model.module(torch.tensor([one])).logits[0, -1] for one in IDS]))


@pytest.mark.parametrize("kind", edits(opened(tiny.llama())))
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_act_as_in_whole_prompts(family: str, kind: str) -> None:
    model = opened(FAMILIES[family]())
    edit = edits(model)[kind]
    if kind != "at the answer":  # of which final_logits has none
        found, wanted = both_ways(model, edit, lambda: final_logits(model, IDS))
        assert_same(found, wanted)
        assert not edit or float((found - final_logits(model, IDS)).norm() / wanted.norm()) > 1e-3
    if kind != "patch":  # which knows no prompts with answers
        found, wanted = both_ways(model, edit, lambda: sequence_logprobs(model, IDS, SAID))
        assert_same(found, wanted)
        assert not edit or float((found - sequence_logprobs(model, IDS, SAID)).abs().max()) > 1e-3


def test_the_part_that_offsets_tell_apart_is_not_shared() -> None:
    model = opened(tiny.llama())
    final_logits(model, IDS)
    shortest = min(map(len, IDS))
    for offset, shared in ((-1, len(PREFIX)), (-5, shortest - 5), (-6, shortest - 6), (-shortest, None)):
        with passes(model) as seen, intervene(model, At(Steer(direction(1)), (offset,))):
            final_logits(model, IDS)
        assert seen[0] == (shared or len(IDS) * max(map(len, IDS)))


# -- whole, where cutting would be wrong -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstToken:
    """Somebody's own edit, of the first token of a pass."""

    directions: Any

    def edit(self, hidden: torch.Tensor, direction: Any) -> torch.Tensor:
        moved = hidden.clone()
        moved[:, 0] += torch.tensor(direction.vector, dtype=hidden.dtype) * 9
        return moved

    def with_directions(self, directions: Any) -> "FirstToken":
        return FirstToken(directions)


@pytest.mark.parametrize("edit", [FirstToken(direction(0)), At(FirstToken(direction(0)), "prompt")], ids=["own", "at"])
def test_an_edit_of_ones_own_sees_whole_prompts(edit: Any) -> None:
    model = opened(tiny.llama())
    same = [one for one in IDS if len(one) == len(IDS[0])] * 2  # without padding: the first token is the prompt's
    final_logits(model, IDS)  # the trials, once per model
    with passes(model) as seen, intervene(model, edit):
        final_logits(model, same)
    assert seen == [sum(map(len, same))]


def test_hooks_of_others_and_training_keep_prompts_whole() -> None:
    model, everything = opened(tiny.llama()), len(IDS) * max(map(len, IDS))
    final_logits(model, IDS)
    handle = model.blocks[1].self_attn.register_forward_hook(lambda *_: None)
    with passes(model) as seen:
        final_logits(model, IDS)
    handle.remove()
    model.module.train()
    with passes(model) as also:
        final_logits(model, IDS)
    assert seen == also == [everything]


@contextmanager
def hooked_everywhere(act: Callable[[torch.Tensor], torch.Tensor], part: Any) -> Iterator[None]:
    handle = module.register_module_forward_hook(lambda one, _, out: act(out) if one is part else None)
    yield
    handle.remove()


@contextmanager
def replaced(act: Callable[[torch.Tensor], torch.Tensor], part: Any) -> Iterator[None]:
    own = part.forward
    part.forward = lambda hidden: act(own(hidden))
    yield
    del part.forward


@pytest.mark.parametrize("how", [hooked_everywhere, replaced])
def test_what_acts_on_a_model_from_outside_sees_whole_prompts(how: Any) -> None:
    model = opened(tiny.llama())
    before = final_logits(model, IDS)  # the model is tried as it is: what comes later must be seen each time

    def first_token(out: torch.Tensor) -> torch.Tensor:  # in a part of a pass it would be another one
        return torch.cat([out[:, :1] + 3, out[:, 1:]], dim=1)

    with how(first_token, model.blocks[1].mlp):
        found = torch.cat([final_logits(model, [ids, ids])[:1] for ids in IDS])
        with torch.no_grad():
            wanted = torch.cat([model.module(torch.tensor([ids, ids])).logits[:1, -1] for ids in IDS])
        assert not reuses_keys(model)
    assert_same(found, wanted)
    assert reuses_keys(model) and torch.equal(final_logits(model, IDS), before)


def test_devices_of_accelerate_are_no_reason_to_run_whole_prompts() -> None:
    model = opened(tiny.llama())
    final_logits(model, IDS)
    add_hook_to_module(model.blocks[1].mlp, ModelHook())  # as `device_map` does with every part
    assert "forward" in vars(model.blocks[1].mlp) and reuses_keys(model)
    with passes(model) as seen:
        final_logits(model, IDS)
    assert seen[0] == len(PREFIX)


def test_a_window_shorter_than_the_prompts_keeps_them_whole() -> None:
    model = opened(built("Mistral", sliding_window=6, **ROTARY))
    with passes(model) as seen:
        found = final_logits(model, IDS)
    assert seen[-1] == len(IDS) * max(map(len, IDS)) and len(PREFIX) not in seen
    with torch.no_grad():
        assert_same(found, torch.stack([model.module(torch.tensor([one])).logits[0, -1] for one in IDS]))


def test_a_model_whose_cache_gives_other_logits_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that forgets positions once there is a cache: the trial sees it."""
    model = opened(tiny.llama())
    own = model.module.model.rotary_emb.forward

    def forgets(hidden: Any, position_ids: Any) -> Any:
        return own(hidden, position_ids=position_ids - position_ids[:, :1])

    monkeypatch.setattr(model.module.model.rotary_emb, "forward", forgets)
    found = final_logits(model, IDS)
    with torch.no_grad():
        assert_same(found, torch.stack([model.module(torch.tensor([one])).logits[0, -1] for one in IDS]))


@pytest.mark.parametrize("kind", ["bridge", "hooked_transformer"])
def test_models_of_transformer_lens_are_run_whole(kind: str, tmp_path: Path) -> None:
    model = tiny.opened(kind, tmp_path)
    found, wanted = both_ways(model, [Ablate(direction(1))], lambda: final_logits(model, IDS))
    assert torch.equal(found, wanted)


def test_prompts_without_a_shared_prefix_are_run_whole() -> None:
    model = opened(tiny.llama())
    apart = [one[len(PREFIX) :] for one in IDS]
    final_logits(model, IDS)
    with passes(model) as seen:
        final_logits(model, apart)
        final_logits(model, IDS[:1])
    assert len(seen) == 2
