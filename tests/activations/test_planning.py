"""Forecasts: tokens are those that an embedding sees, operations those that torch counts, sums are closed forms."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from histories import refused, sequence_on_disk
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MixtralConfig

from gravlens.activations import plan as readings
from gravlens.activations.cost import (
    Machine,
    Pass,
    amount,
    duration,
    flops_of,
    forecast,
    measured_machine,
    named_machine,
    passes_of,
    plan_reading,
    shape_of,
    without_files,
)
from gravlens.activations.plan import Plan, read_block
from gravlens.activations.positions import Answers, Query, queries_of, queries_of_ids
from gravlens.activations.reader import TOKENS, Reader, reuses_keys, tokens_for
from gravlens.activations.residuals import cache_residuals
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import OpenModel, open_model
from gravlens.models.placement import Placement

PROMPTS = PromptSet.of(list(tiny.PROMPTS), "harmful")
SHARED = [[*range(1, 12), *range(20, 20 + n)] for n in (2, 3, 5, 9, 14)]
MACHINE = Machine(1e9, 1e8, 1e9, 1e8, 0.5, True, 1024, False)
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)


def read(model: OpenModel, plan: Plan) -> None:
    reader = Reader(model, layers=plan.layers, prefix=plan.prefix)
    for block in plan.blocks:
        list(read_block(reader, [plan.queries[i] for i in block]))


def seen(model: OpenModel, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens that the embedding sees while a plan is read; a hook on it would forbid the reuse of keys and values."""
    embedding, count = model.module.get_input_embeddings(), 0
    forward = embedding.forward

    def counting(ids: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += ids.numel()
        return forward(ids)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "forward", counting)
        read(model, plan)
    return count


def counted(model: OpenModel, plan: Plan) -> int:
    """Operations that torch counts."""
    with FlopCounterMode(display=False) as counter:
        read(model, plan)
    return counter.get_total_flops()


def queries(kind: str) -> list[Query]:
    if kind == "shared":
        return queries_of_ids(SHARED)
    if kind == "all":
        return queries_of_ids(SHARED, "all")
    positions = Answers([text[:40].rpartition(" ")[0] for text in PROMPTS]) if kind == "answers" else "last"
    return queries_of(tiny.TOKENIZER, PROMPTS, positions)


@pytest.mark.parametrize("tokens", [24, 1024])
@pytest.mark.parametrize("kind", ["last", "answers", "shared", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "grouped"])
def test_tokens_and_operations_are_those_of_the_passes(
    family: str, kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOKENS, "cpu", tokens)
    if tokens == 24:  # several blocks
        monkeypatch.setattr(readings, "BLOCK_BYTES", 0)
        monkeypatch.setattr(readings, "TOKENS_ELSEWHERE", 5)
    module = {"llama": tiny.llama, "gpt2": tiny.gpt2, "grouped": lambda: tiny.llama(num_key_value_heads=2)}[family]()
    module.set_attn_implementation("eager")  # of the fused kernel torch counts nothing on a CPU
    model, shape = open_model(module, tokenizer=tiny.TOKENIZER), shape_of(module.config)
    plan = Plan.of(queries(kind), [0, 1], model.d_model)
    assert reuses_keys(model) and (tokens == 1024 or len(plan.blocks) > 1)
    passes = list(passes_of(plan, shape, tokens=tokens_for(model), reuse=True))
    assert sum(one.tokens for one in passes) == seen(model, plan, monkeypatch)
    assert sum(flops_of(one, shape, 1) for one in passes) == pytest.approx(counted(model, plan), rel=0.01)


def test_a_70b_llamas_numbers() -> None:
    shape = shape_of(LLAMA_70B)
    block = 8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672
    assert shape.matrices == (block,) * 80 and shape.inputs == 8192 * (8192 + 2 * 1024)
    assert shape.parameters == 80 * (block + 2 * 8192) + 2 * 128256 * 8192 + 8192
    assert flops_of(Pass(2, 100, 0, True), shape, 79) == 200 * (2 * 80 * block + 80 * 4 * 8192 * 100)


def test_of_experts_those_count_that_a_token_meets() -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=100,
    )  # fmt: skip
    assert shape_of(config).matrices == (4 * 64 * 64 + 8 * 64 + 2 * 3 * 64 * 96,) * 2


def test_a_forecast_adds_up() -> None:
    plan, shape = without_files(tiny.llama().config, [10] * 40, layers=[0, 2])
    found = forecast(plan, shape, sizes=[1000] * 5, machine=MACHINE, least=1 << 16, width=4)
    assert (found.checkpoints, found.prompts, found.tokens, found.tokens_run, found.tasks) == (5, 40, 400, 400, 5)
    assert found.bytes_stored == 5 * 40 * 2 * tiny.WIDTH * 4 and found.bytes_read == 5000
    assert found.total == pytest.approx(sum(found.seconds.values()))
    assert found.seconds["digests"] == pytest.approx(5000 * (1 / 1e8 + 1 / 1e9))
    assert found.memory > 4 * shape.parameters
    assert found.seconds["passes"] == pytest.approx(found.flops / 1e9, rel=0.6)


def test_workers_share_all_but_what_the_driver_does_and_the_last_round_is_seen() -> None:
    plan, shape = without_files(tiny.llama().config, [10] * 40, layers=[0])

    def with_workers(n: int) -> dict[str, float]:
        return forecast(plan, shape, sizes=[1000] * 6, machine=MACHINE, workers=n, least=1 << 16, width=4).seconds

    two, three, four, six = (with_workers(n) for n in (2, 3, 4, 6))
    assert three["passes"] == pytest.approx(2 / 3 * two["passes"]) and six["passes"] == pytest.approx(two["passes"] / 3)
    assert four["passes"] == three["passes"], "six tasks of four workers take two rounds, as of three"
    assert two["storing"] < 3 * six["storing"]


def test_a_plan_of_a_sequence_counts_what_cache_residuals_stores(tmp_path: Path) -> None:
    models = {"witness": tiny.llama(0), "anchor": tiny.llama(1), "ft/checkpoint-1": tiny.llama(2)}
    history = ModelSequence.from_toml(sequence_on_disk(tmp_path, models) / "SEQUENCE.toml")
    found = plan_reading(history, layers=[0, 1])
    values = cache_residuals(history, layers=[0, 1], store=tmp_path / "store").values
    assert found.machine.measured and found.machine.reuse
    assert found.bytes_stored == values.nbytes and found.checkpoints == 3
    assert found.bytes_read == sum(path.stat().st_size for path in tmp_path.rglob("model.safetensors"))
    assert found.seconds.keys() == {"digests", "opening", "passes", "storing"} and 0 < found.total < 60


def test_models_in_memory_and_models_too_large_to_be_timed_are_refused() -> None:
    models = ModelSequence.from_models(witness=tiny.llama(0), anchor=tiny.llama(1), tokenizer=tiny.TOKENIZER)
    with refused("anchor", "in memory"):
        plan_reading(models, PROMPTS)
    plan, _ = without_files(tiny.llama().config, [10], layers=[0])
    huge = replace(shape_of(LLAMA_70B), parameters=10**13)
    with refused("1.2e+11"):
        measured_machine(plan, huge, LLAMA_70B, None, Placement())


def test_a_named_machine_is_reckoned_with_less_than_its_peak() -> None:
    named = named_machine(peak_flops=1e15, disk=2e9)
    assert named.flops == 0.4e15 and named.read == named.written == 2e9 and not named.measured
    assert (named.tokens, named_machine(peak_flops=1, disk=1, device="cpu").tokens) == (16384, 1024)
    with refused("1e+15", "0 bytes"):
        named_machine(peak_flops=1e15, disk=0)


def test_amounts_and_durations_are_said_in_their_own_units() -> None:
    assert [amount(size) for size in (0, 999, 1.5e6, 2.621e12, 5e15)] == [
        "0 B",
        "999 B",
        "1.5 MB",
        "2.62 TB",
        "5e+03 TB",
    ]
    assert [duration(seconds) for seconds in (0.5, 119, 120, 7199, 7200)] == [
        "0.5 s",
        "119 s",
        "2 min",
        "120 min",
        "2 h",
    ]


def test_torch_is_left_as_it_was() -> None:
    shape_of(tiny.llama().config)
    assert torch.empty(1).device.type == "cpu" and torch.get_default_dtype() == torch.float32
