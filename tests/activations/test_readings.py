"""Which prompts are read together: blocks, rows, and prompts that are there twice."""

from itertools import pairwise

import numpy as np
import pytest
import tiny

from gravlens.activations import reader as readings
from gravlens.activations.positions import Query
from gravlens.activations.reader import Plan
from gravlens.activations.residuals import cache_residuals
from gravlens.history.sequence import ModelSequence


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "BLOCK_BYTES", 4 * 8 * 3)
    monkeypatch.setattr(readings, "TOKENS_ELSEWHERE", 10)


def query(*ids: int) -> Query:
    return Query(ids, ((len(ids) - 1,),))


def test_every_prompt_is_in_one_block_and_blocks_are_of_similar_lengths() -> None:
    rng = np.random.default_rng(0)
    queries = [query(*map(int, rng.integers(99, size=int(n)))) for n in rng.integers(2, 30, size=50)]
    plan = Plan.of(queries, [0, 2], 8)
    assert sorted(i for block in plan.blocks for i in block) == list(range(50)) and len(plan.blocks) > 5
    lengths = [[queries[i].end for i in block] for block in plan.blocks]
    assert all(max(one) <= min(other) for one, other in pairwise(lengths))


def test_the_same_prompt_is_in_the_same_block_however_often_and_wherever_it_stands() -> None:
    rng = np.random.default_rng(1)
    few = [query(*map(int, rng.integers(9, size=6))) for _ in range(7)]
    queries = [few[i] for i in rng.integers(7, size=200)]
    plan = Plan.of(queries, [0], 8)
    where = {i: number for number, block in enumerate(plan.blocks) for i in block}
    assert len(plan.blocks) > 3
    for one in few:
        assert len({where[i] for i, other in enumerate(queries) if other == one}) <= 1


def test_rows_and_index_follow_the_prompts_as_they_were_given() -> None:
    queries = [Query((1, 2, 3), ((0,), (2,))), Query((4,), ((0,),)), Query((5, 6), ((0,), (1,)))]
    plan = Plan.of(queries, [0], 8)
    assert [list(plan.rows(i)) for i in range(3)] == [[0, 1], [2], [3, 4]] and plan.index is not None
    assert plan.index.tolist() == [[0, 0], [0, 2], [1, 0], [2, 0], [2, 1]]
    assert Plan.of([query(1), query(2, 3)], [0], 8).index is None


def test_prompts_that_are_there_twice_have_the_same_states() -> None:
    seq = ModelSequence.from_models(witness=tiny.llama(0), anchor=tiny.llama(1), tokenizer=tiny.TOKENIZER)
    few = list(tiny.PROMPTS)
    found = cache_residuals(seq, [*few, *few[::-1], few[0]]).values
    once = cache_residuals(seq, few).values
    n = len(few)
    np.testing.assert_allclose(found[:, :n], once, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[:, n : 2 * n], once[:, ::-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[:, -1], once[:, 0], rtol=1e-4, atol=1e-6)
