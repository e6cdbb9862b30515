"""Passes that reuse keys and values, against Hugging Face on each prompt alone; and what they do not compute."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from histories import assert_same_states, hidden_states, hooks_on, reference, refused

from gravlens.activations import reader as passes
from gravlens.activations.positions import Query, queries_of_ids
from gravlens.activations.reader import Reader, batches_of, common_prefix, reuses_keys
from gravlens.models.opening import OpenModel, open_model

PREFIX = list(range(10, 22))
TAILS = [[7, 9, 11, 30, 31, 5, 8, 21, 40, 3, 4], [12], [50, 60, 2], [3, 70, 80, 4], [90, 100, 0], [33, 34]]
IDS = [PREFIX + tail for tail in TAILS]
BELOW = range(tiny.LAYERS - 1)  # Hugging Face's last hidden state is after the final norm
ALL = range(tiny.LAYERS)
USUAL = {
    "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2,
}  # fmt: skip
ROTARY = {**USUAL, "intermediate_size": 48, "max_position_embeddings": 128}


def random(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config)).eval()


FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": tiny.llama,
    "GPT-2": tiny.gpt2,
    "GPT-NeoX": lambda: random("GPTNeoX", **ROTARY),
    "Mixtral": lambda: random("Mixtral", **ROTARY, num_key_value_heads=2),
    "Falcon with ALiBi": lambda: random("Falcon", **USUAL, alibi=True),
    "BLOOM": lambda: random("Bloom", **{**USUAL, "n_layer": 3, "n_head": 4}),
    "Mistral": lambda: random("Mistral", **ROTARY, num_key_value_heads=2, sliding_window=64),
}


def opened(model: Any) -> OpenModel:
    return open_model(model, tokenizer=tiny.TOKENIZER)


@contextmanager
def tokens_run(model: OpenModel) -> Iterator[list[int]]:
    """How many tokens each pass puts in."""
    seen: list[int] = []
    handle = model.module.get_input_embeddings().register_forward_hook(
        lambda _, given, __: seen.append(given[0].numel())
    )
    yield seen
    handle.remove()


def read(model: OpenModel, queries: list[Query], *, reuse: bool = True, layers: range = ALL) -> torch.Tensor:
    prefix = queries[0].ids[: common_prefix(queries)]
    return Reader(model, layers=layers, prefix=prefix, reuse=reuse).read(queries)


# -- the same states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ids", [IDS, TAILS], ids=["behind a prefix", "nothing in common"])
def test_reused_keys_give_hugging_faces_states(family: str, ids: list[list[int]]) -> None:
    model = opened(FAMILIES[family]())
    assert reuses_keys(model)
    before, found = hooks_on(model), read(model, queries_of_ids(ids))
    assert hooks_on(model) == before == 0
    assert_same_states(found[:, :-1], reference(model.module, ids, BELOW))
    assert_same_states(found, read(model, queries_of_ids(ids), reuse=False))
    assert reuses_keys(model), "hooks that transformers itself leaves behind are no reason to read plainly"


@pytest.mark.parametrize("layer", ALL)
def test_the_deepest_layer_that_is_read_may_be_any(layer: int) -> None:
    model = opened(tiny.llama())
    one, plain = (
        read(model, queries_of_ids(IDS), reuse=reuse, layers=range(layer, layer + 1)) for reuse in (True, False)
    )
    assert_same_states(one, plain)


def test_rows_may_be_means_and_several_to_a_prompt() -> None:
    model = opened(tiny.gpt2())
    queries = [Query(tuple(ids), (tuple(range(12, len(ids))), (12,), (len(ids) - 1,))) for ids in IDS]
    found = read(model, queries).view(len(IDS), 3, tiny.LAYERS, tiny.WIDTH)[:, :, :-1]
    for ids, rows in zip(IDS, found, strict=True):
        states = torch.stack(hidden_states(model.module, ids)[1:-1], 1)
        assert_same_states(rows, torch.stack([states[12:].mean(0), states[12], states[-1]]))


def test_a_window_of_attention_shorter_than_the_prompts_is_read_plainly() -> None:
    """The cache would count padding in the midst of what it holds."""
    model = opened(random("Mistral", **ROTARY, num_key_value_heads=2, sliding_window=6))
    with tokens_run(model) as seen:
        found = read(model, queries_of_ids(IDS))
    assert seen == [len(IDS) * max(map(len, IDS))]
    assert_same_states(found[:, :-1], reference(model.module, IDS, BELOW))


def test_a_family_without_such_a_cache_is_read_plainly() -> None:
    config = transformers.MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=3)
    model = opened(transformers.MambaForCausalLM(config).eval())
    assert not reuses_keys(model)
    found = Reader(model, layers=ALL).read(queries_of_ids(IDS))
    alone = torch.cat([Reader(model, layers=ALL).read(queries_of_ids([ids])) for ids in IDS])
    assert_same_states(found, alone)


@pytest.mark.parametrize("kind", ["bridge", "hooked_transformer"])
def test_models_of_transformer_lens_are_read_through_their_hooks(kind: str, tmp_path: Path) -> None:
    model = tiny.opened(kind, tmp_path)
    assert not reuses_keys(model)
    assert_same_states(
        Reader(model, layers=ALL).read(queries_of_ids(IDS)),
        torch.cat([Reader(model, layers=ALL).read(queries_of_ids([ids])) for ids in IDS]),
    )


# -- where it would be wrong -------------------------------------------------------------------------------------------


def test_hooks_of_others_and_training_keep_passes_whole() -> None:
    model = opened(tiny.llama())
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    assert not reuses_keys(model)
    handle.remove()
    assert reuses_keys(model)
    model.module.train()
    assert not reuses_keys(model)


def test_a_model_whose_cache_gives_other_states_is_read_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that forgets positions once there is a cache: the trial sees it."""
    model = opened(tiny.llama())
    forward = model.module.model.rotary_emb.forward

    def forgets(hidden: Any, position_ids: Any) -> Any:
        return forward(hidden, position_ids=position_ids - position_ids[:, :1])

    monkeypatch.setattr(model.module.model.rotary_emb, "forward", forgets)
    assert not reuses_keys(model)
    found = Reader(model, layers=ALL).read(queries_of_ids(IDS))
    assert_same_states(found[:, :-1], reference(model.module, IDS, BELOW))


# -- what is not computed ----------------------------------------------------------------------------------------------


def test_the_prefix_is_run_once_and_nothing_after_the_last_read_position() -> None:
    model = opened(tiny.llama())
    queries = queries_of_ids([[*PREFIX, 40, 41, 42, 43], [*PREFIX, 50, 51, 52, 53]], -2)
    reader = Reader(model, layers=ALL, prefix=PREFIX)
    with tokens_run(model) as seen:
        reader.read(queries)
        reader.read(queries)
    # The prefix once; of each prompt the two tokens before the one that is read, then that one.
    assert seen == [len(PREFIX), 4, 2, 4, 2]


def test_blocks_above_the_deepest_layer_are_not_run_and_that_one_only_where_it_is_read() -> None:
    model = opened(tiny.llama())
    rows: dict[int, int] = {0: 0, 1: 0, 2: 0}
    queries = queries_of_ids(IDS)
    reader = Reader(model, layers=[1], prefix=PREFIX)
    handles = [
        block.mlp.register_forward_hook(lambda _, given, __, i=i: rows.update({i: rows[i] + given[0][..., 0].numel()}))
        for i, block in enumerate(model.blocks)
    ]
    reader.read(queries)
    for handle in handles:
        handle.remove()
    width = max(len(tail) - 1 for tail in TAILS)
    assert rows == {0: len(PREFIX) + len(IDS) * width + len(IDS), 1: len(IDS), 2: 0}


def test_prefixes_end_before_what_is_read_and_short_ones_are_not_worth_it() -> None:
    assert common_prefix(queries_of_ids(IDS)) == len(PREFIX)
    assert common_prefix([Query(tuple(ids), ((9,),)) for ids in IDS]) == 9
    assert common_prefix(queries_of_ids([PREFIX, [*PREFIX, 3]])) == len(PREFIX) - 1
    assert common_prefix(queries_of_ids([ids[6:] for ids in IDS])) == 0
    assert common_prefix(queries_of_ids(IDS[:1])) == 0


@pytest.mark.parametrize("tokens", [1, 7, 20, 1000])
def test_batches_hold_every_prompt_once_and_no_more_tokens_than_asked(tokens: int) -> None:
    queries = queries_of_ids(IDS)
    batches = batches_of(queries, prefix=len(PREFIX), tokens=tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(IDS)))
    for batch in batches:
        longest = max(len(TAILS[i]) for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens


# -- memory ------------------------------------------------------------------------------------------------------------


def starved(model: OpenModel, most: int, kind: type[RuntimeError] = RuntimeError) -> Any:
    """Memory runs out above so many prompts at a time."""

    def hook(_: Any, given: Any, __: Any) -> None:
        if len(given[0]) > most:
            said = "CUDA out of memory." if kind is not RuntimeError else "allocator: can't allocate memory"
            raise kind(said)

    return model.module.get_input_embeddings().register_forward_hook(hook)


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_where_memory_runs_out_half_as_many_prompts_are_run(kind: type[RuntimeError]) -> None:
    model = opened(tiny.llama())
    queries, wanted = queries_of_ids(IDS), read(opened(tiny.llama()), queries_of_ids(IDS))
    reader = Reader(model, layers=ALL, prefix=PREFIX)
    handle = starved(model, 2, kind)
    assert_same_states(reader.read(queries), wanted)
    handle.remove()
    starved(model, 0, kind)
    with refused("one prompt of"):
        reader.read(queries)


def test_a_beginning_that_ran_out_of_memory_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the prompts after it would be read without it."""
    model = opened(tiny.llama())
    wanted, reader = read(model, queries_of_ids(IDS)), Reader(model, layers=ALL, prefix=PREFIX)
    forward, left = model.blocks[1].forward, [1]

    def fails_once(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("allocator: can't allocate memory")
        return forward(*given, **named)

    monkeypatch.setattr(model.blocks[1], "forward", fails_once)
    assert_same_states(reader.read(queries_of_ids(IDS)), wanted)


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    model = opened(tiny.llama())
    reader = Reader(model, layers=ALL)
    model.blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        reader.read(queries_of_ids(IDS))


def test_kept_states_are_no_views_of_live_buffers() -> None:
    model = opened(tiny.llama())
    found = read(model, queries_of_ids(IDS))
    assert found.untyped_storage().nbytes() == found.numel() * 4 and passes.TOKENS["cpu"] > 0
