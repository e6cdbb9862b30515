"""A GGUF file written here, with llama.cpp's own conventions, must come back as the model it was made from."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import gravlens.organisms.gguf
from gravlens.core.errors import GravlensError
from gravlens.organisms.fetch import SMOLLM2, bring, cache_folder, fetched_smollm2
from gravlens.organisms.gguf import gguf_to_folder, is_converted

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}</s>{% endif %}"
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    for weights in model.parameters():  # norms too, so that a mixed-up norm shows
        torch.nn.init.normal_(weights, std=0.3)
    return model


def llama_cpp_order(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two rotary halves of each head in q and k."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path, model: LlamaForCausalLM, *, skip: str = "", template: str | None = TEMPLATE, packed: Any = None
) -> Path:
    writer, config = GGUFWriter(path, "llama"), model.config
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, template)
    for name, weights in model.state_dict().items():
        if name != "lm_head.weight" and (not skip or skip not in name):
            array = in_gguf_order(name, weights, config).numpy()
            kind = packed if array.ndim == 2 else None
            array = array if kind is None else quantize(np.ascontiguousarray(array), kind)
            writer.add_tensor(gguf_name(name), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(writer: GGUFWriter, template: str | None) -> None:
    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template:
        writer.add_chat_template(template)


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, *rest = name.split(".")
        return f"blk.{layer}.{NAMES['.'.join(rest[:-1])]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def in_gguf_order(name: str, weights: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((llama_cpp_order(weights, n) for key, n in heads.items() if key in name), weights)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    model = tiny_llama()
    return model, write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_the_folder_is_the_model_that_the_file_was_made_from(
    tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    model, gguf = tiny
    folder = gguf_to_folder(gguf, tmp_path / "made" / "tiny")
    opened = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.arange(3, 27).reshape(2, 12)
    assert (logits(opened, ids) - logits(model, ids)).abs().max() < 1e-5 * logits(model, ids).abs().max()
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert {weights.dtype for weights in opened.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not list(folder.glob("*.bin"))


def test_the_tokenizer_comes_along(tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf_to_folder(tiny[1], tmp_path / "tiny"))
    text = "Hi ab, naïve"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("ab") == [259]  # the one merge
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], add_generation_prompt=True, return_dict=False
    )
    assert chat == [1, 259, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_a_file_without_a_chat_template_is_welcome(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "base.gguf", tiny_llama(), template=None)
    assert AutoTokenizer.from_pretrained(gguf_to_folder(gguf, tmp_path / "base")).chat_template is None


def test_neighbours_of_the_file_are_not_read(tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(tiny[1].read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("another template")
    assert AutoTokenizer.from_pretrained(gguf_to_folder(gguf, tmp_path / "made")).chat_template == TEMPLATE


def test_the_second_call_converts_nothing(
    tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gguf_to_folder(tiny[1], tmp_path / "tiny")
    with monkeypatch.context() as patch:
        patch.delattr(gravlens.organisms.gguf, "_convert")
        assert gguf_to_folder(tiny[1], folder) == folder
    other = write_gguf(tmp_path / "other.gguf", tiny[0], template=None)
    gguf_to_folder(other, folder)  # other content, our own folder: made anew
    assert AutoTokenizer.from_pretrained(folder).chat_template is None


def test_a_kill_leaves_no_folder(
    tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"

    def killed(gguf: Path, made: Path) -> None:
        (made / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gravlens.organisms.gguf, "_convert", killed)
        with pytest.raises(KeyboardInterrupt):
            gguf_to_folder(tiny[1], folder)
    assert not list(tmp_path.iterdir())
    assert not is_converted(folder)
    assert is_converted(gguf_to_folder(tiny[1], folder))


def test_a_folder_of_somebody_else_is_left_alone(tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(GravlensError, match=r"did not write"):
        gguf_to_folder(tiny[1], tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


@pytest.mark.parametrize("kept", [20, 3000, -2000])
def test_a_truncated_file_is_one_clear_error(tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path, kept: int) -> None:
    gguf = tmp_path / "cut.gguf"
    gguf.write_bytes(tiny[1].read_bytes()[:kept])
    with pytest.raises(GravlensError, match=r"cut.gguf cannot be read.*download it again"):
        gguf_to_folder(gguf, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_file_that_lacks_a_tensor_is_not_filled_with_noise(
    tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    gguf = write_gguf(tmp_path / "holes.gguf", tiny[0], skip="layers.1.mlp.up_proj")
    with pytest.raises(GravlensError, match=r"no weights for 1 tensors, such as model.layers.1.mlp.up_proj"):
        gguf_to_folder(gguf, tmp_path / "made")


def test_an_absent_file_and_another_kind_of_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(GravlensError, match=r"There is no file .*none.gguf"):
        gguf_to_folder(tmp_path / "none.gguf", tmp_path / "made")
    (tmp_path / "pickle.gguf").write_bytes(b"\x80\x04 no gguf")
    with pytest.raises(GravlensError, match=r"pickle.gguf does not begin"):
        gguf_to_folder(tmp_path / "pickle.gguf", tmp_path / "made")


@pytest.mark.pretrained
def test_smollm2_is_whole() -> None:
    """Finite residuals, the attention-sink token of the real model, and a sensible greedy answer."""
    folder = fetched_smollm2()
    if folder is None:
        pytest.skip("no weights in the cache: run `gravlens fetch smollm2` first")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I bake bread?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        states = model(**chat, output_hidden_states=True).hidden_states
        answer = model.generate(**chat, max_new_tokens=48, do_sample=False)
    assert len(states) == 31
    assert all(state.isfinite().all() for state in states)
    assert max(state.abs().max() for state in states) == pytest.approx(2.5e4, rel=0.02)
    assert "flour" in tokenizer.decode(answer[0, chat["input_ids"].shape[1] :])


@pytest.mark.pretrained
def test_smollm2_folder_equals_what_transformers_reads_from_the_gguf() -> None:
    folder = fetched_smollm2()
    if folder is None:
        pytest.skip("no weights in the cache: run `gravlens fetch smollm2` first")
    gguf = bring(SMOLLM2, cache_folder())
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ids = torch.arange(100, 116)[None]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder), ids), logits(read, ids))


def test_packed_weights_are_read_without_fetched_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers multiplies those of some architectures with a kernel of the hub, if the package `kernels` is there.

    This one stands in for them, up to where the kernel is asked for.
    """
    asked = []
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), packed=GGMLQuantizationType.Q8_0)
    gguf_to_folder(gguf, tmp_path / "whole")
    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.get_gguf_kernel", lambda: asked.append("kernel"))
    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.is_gguf_arch_supported", lambda _: True)
    with suppress(GravlensError):
        gguf_to_folder(gguf, tmp_path / "folder")
    assert asked == []
    with suppress(Exception):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name)
    assert asked == ["kernel"]
