"""Forecasts: tokens are those that the embedding sees, operations those that torch counts, sums are closed forms."""

from pathlib import Path

import pytest
import tiny
import torch
from histories import refused, sequence_on_disk
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from gravlens.activations import reader as readings
from gravlens.activations import store
from gravlens.activations.cost import Machine, forecast, named_machine, plan_reading
from gravlens.activations.machine import count_parameters, measured_rates
from gravlens.activations.positions import queries_of_ids
from gravlens.activations.reader import Plan, Reader, read_block, reuses_keys
from gravlens.activations.residuals import cache_residuals
from gravlens.core.display import amount, duration
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import OpenModel, open_model
from gravlens.models.placement import Placement

PROMPTS = PromptSet.of(list(tiny.PROMPTS), "harmful")
SHARED = [[*range(1, 12), *range(20 + i, 40 + i)] for i in range(5)]  # prompts of one length that share 11 tokens
MACHINE = Machine(1e9, 1e8)
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
    forward = type(embedding).forward

    def counting(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += ids.numel() if self is embedding else 0
        return forward(self, ids)

    with monkeypatch.context() as patch:  # of the class: one replaced in a model would forbid it too
        patch.setattr(type(embedding), "forward", counting)
        read(model, plan)
    return count


def counted(model: OpenModel, plan: Plan) -> int:
    """Operations that torch counts."""
    with FlopCounterMode(display=False) as counter:
        read(model, plan)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "gpt2", "grouped"])
def test_tokens_and_operations_are_those_of_the_passes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but attention's scores and sums, which are left out: 4 · width · (tokens of the prompt)² for each block."""
    module = {"llama": tiny.llama, "gpt2": tiny.gpt2, "grouped": lambda: tiny.llama(num_key_value_heads=2)}[family]()
    module.set_attn_implementation("eager")  # torch counts nothing for the fused kernel on a CPU
    model = open_model(module, tokenizer=tiny.TOKENIZER)
    plan = Plan.of(queries_of_ids(SHARED, lambda ids: range(11, len(ids))), [0, 1], model.d_model)
    assert reuses_keys(model) and len(plan.prefix) == 11
    found = forecast(plan, module.config, sizes=[1], machine=MACHINE)
    assert found.tokens == seen(model, plan, monkeypatch) == 11 + 5 * 20
    whole = Plan.of(queries_of_ids([[i, *range(20, 50)] for i in range(5)], "all"), [0, 1], model.d_model)
    attention = 2 * 4 * model.d_model * 5 * 31**2
    wanted = counted(model, whole) - attention
    assert forecast(whole, module.config, sizes=[1], machine=MACHINE).flops == pytest.approx(wanted, rel=0.01)


def test_a_70b_llamas_numbers() -> None:
    block = 8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672
    assert count_parameters(LLAMA_70B) == (80 * (block + 2 * 8192) + 2 * 128256 * 8192 + 8192, (block,) * 80)
    found = forecast(plan_of([100] * 3, layers=[39], d_model=8192), LLAMA_70B, sizes=[None] * 2, machine=MACHINE)
    assert found.flops == 2 * (2 * 40 * block) * 300
    assert found.bytes_read == found.bytes_downloaded == 2 * 4 * count_parameters(LLAMA_70B)[0]


def test_only_active_experts_count() -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=100,
    )  # fmt: skip
    assert count_parameters(config)[1] == (4 * 64 * 64 + 8 * 64 + 2 * 3 * 64 * 96,) * 2


def plan_of(lengths: list[int], *, layers: list[int], d_model: int = tiny.WIDTH) -> Plan:
    """A plan of prompts that share nothing."""
    return Plan.of(queries_of_ids([[i] * length for i, length in enumerate(lengths)]), layers, d_model)


def config() -> PretrainedConfig:
    return tiny.llama().config


def test_a_forecast_adds_up() -> None:
    plan = plan_of([10] * 40, layers=[0, 2])
    found = forecast(plan, config(), sizes=[1000] * 5, machine=MACHINE)
    assert (found.checkpoints, found.prompts, found.tokens, found.tasks) == (5, 40, 400, 5)
    assert found.bytes_stored == 5 * 40 * 2 * tiny.WIDTH * 4 and found.bytes_read == 5000 and not found.bytes_downloaded
    assert found.total == pytest.approx(sum(found.seconds.values()))
    assert found.seconds["digests"] == found.seconds["opening"] == pytest.approx(5000 / 1e8)
    assert found.seconds["passes"] == pytest.approx(found.flops / 1e9)
    assert found.seconds["storing"] == pytest.approx(3 * found.bytes_stored / 1e8)
    halved = forecast(plan, config(), sizes=[1000] * 5, machine=MACHINE, placement=Placement(dtype="bf16"))
    assert found.memory == 2 * halved.memory == 4 * count_parameters(config())[0]


def test_workers_share_all_but_what_the_driver_does_and_the_last_round_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of([10] * 40, layers=[0])

    def with_workers(n: int) -> dict[str, float]:
        return forecast(plan, config(), sizes=[1000] * 6, machine=MACHINE, workers=n).seconds

    two, three, four, six = (with_workers(n) for n in (2, 3, 4, 6))
    assert three["passes"] == pytest.approx(2 / 3 * two["passes"]) and six["passes"] == pytest.approx(two["passes"] / 3)
    assert four["passes"] == three["passes"], "six tasks of four workers take two rounds, as of three"
    assert two["storing"] == six["storing"]
    monkeypatch.setitem(store.TASK_TOKENS, "cpu", 100)
    monkeypatch.setattr(readings, "BLOCK_BYTES", 0)
    monkeypatch.setattr(readings, "TOKENS_ELSEWHERE", 90)
    found = forecast(plan_of([10] * 40, layers=[0]), config(), sizes=[1000], machine=MACHINE, workers=4)
    assert found.tasks == 4, "each opens the checkpoint, whose digest one worker computes"
    assert found.seconds["opening"] == found.seconds["digests"] == pytest.approx(1000 / 1e8)


def test_a_plan_of_a_sequence_counts_what_cache_residuals_stores(tmp_path: Path) -> None:
    models = {"witness": tiny.llama(0), "anchor": tiny.llama(1), "ft/checkpoint-1": tiny.llama(2)}
    history = ModelSequence.from_toml(sequence_on_disk(tmp_path, models) / "SEQUENCE.toml")
    found = plan_reading(history, layers=[0, 1])
    values = cache_residuals(history, layers=[0, 1], store=tmp_path / "store").values
    assert found.machine.measured and found.machine.flops > 0 and found.machine.disk > 0
    assert found.bytes_stored == values.nbytes and found.checkpoints == 3
    assert found.bytes_read == sum(path.stat().st_size for path in tmp_path.rglob("model.safetensors"))
    assert found.seconds.keys() == {"digests", "opening", "passes", "storing"} and 0 < found.total < 60


def test_models_in_memory_and_models_too_large_to_be_timed_are_refused(tmp_path: Path) -> None:
    models = ModelSequence.from_models(witness=tiny.llama(0), anchor=tiny.llama(1), tokenizer=tiny.TOKENIZER)
    with refused("witness", "in memory"):
        plan_reading(models, PROMPTS)
    huge = LlamaConfig(hidden_size=65536, intermediate_size=65536, num_hidden_layers=2, num_attention_heads=64)
    with refused("3.0e+10"):
        measured_rates(plan_of([10], layers=[0]), huge, tmp_path, Placement())


def test_a_named_machine_reaches_a_share_of_its_peak() -> None:
    assert named_machine(peak_flops=1e15, disk=2e9) == Machine(0.4e15, 2e9, measured=False)
    with refused("1e+15", "0 bytes"):
        named_machine(peak_flops=1e15, disk=0)


def test_amounts_and_durations_have_units() -> None:
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
    count_parameters(config())
    assert torch.empty(1).device.type == "cpu" and torch.get_default_dtype() == torch.float32
