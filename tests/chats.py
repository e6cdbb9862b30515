"""Tokenizers of the usual kinds, and chat templates that behave like those of published models."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["hello there\n\nSorry, I cannot help.\n", "Sure, here it is.\n\nhello\n", "user\nassistant\nsystem\n\n"] * 20
PIECES = "<unk> <s> </s> ▁[INST] ▁[/INST] ▁<|assistant|> <|assistant|> ▁ ▁Sorry Sorry ▁Sure Sure ▁hello hello".split()


def word_level(template: str) -> Any:
    """Words between spaces, as Gemma's turns: the end of turn is a token of its own beside <eos>."""
    words = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "hello", "Sorry", "Sure", "user", "model"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=template,
    )


def sentencepiece(template: str) -> Any:
    """Llama 2's kind: ▁ stands for a space, and is put before the first word of a text."""
    pieces = [*PIECES, "\n"]
    raw = Tokenizer(models.Unigram([(p, -float(len(p) == 1) * 5 - 1.0) for p in pieces], unk_id=0))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **tokens, chat_template=template)


def byte_level(template: str | None, *, turns: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> Any:
    """Byte-level BPE that merges line feeds, with a base model's eos beside the tokens of turns and thoughts."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    end, more = "<|endoftext|>", list(turns)
    tokens = {"eos_token": end, "pad_token": end, "additional_special_tokens": more}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **tokens, chat_template=template)
    tokenizer.add_tokens(["<think>", "</think>"])  # added, not special: as in Qwen 3
    return tokenizer


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn> {{ 'model' if m.role == 'assistant' else m.role }} "
    "{{ m.content | trim }} <end_of_turn> {% endfor %}{% if add_generation_prompt %}<start_of_turn> model {% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}</s>\n"
    "{% else %}<|assistant|>\n{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# With transformers' own marks of what an assistant writes.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
# Qwen 3's rules: the last answer has a thought, earlier ones lose theirs; enable_thinking=False closes an empty one.
QWEN3 = """\
{%- set place = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set place.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set thought = '' %}{% set content = m.content %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > place.last %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
# DeepSeek-R1's rules: a thought is opened for generation, and finished answers have none.
R1 = """\
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content }}{% endif %}
    {%- if m.role == 'assistant' %}{{ '<|im_start|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|><think>\\n' }}{% endif %}"""
# Llama 3.2's rules for the date.
DATED = """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{{- 'Today: ' + date_string + '\\n' }}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Of image-text models: a turn is a list of parts, and a plain text has none.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
