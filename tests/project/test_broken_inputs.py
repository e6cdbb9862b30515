"""Broken files of every kind that gravlens reads: each ends in the right result, or in one line that names the file.

`CASES` is the table; `tests/reliability.py` counts it. A case copies a tiny history by hard links, breaks one file of
the copy, and reads it.
"""

import atexit
import functools
import gzip
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from folders import adapter
from histories import moved
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from typer.testing import CliRunner

import gravlens as gl
from gravlens.cli import app
from gravlens.core.errors import GravlensError
from gravlens.history.weight_files import read_headers
from gravlens.reporting.page import write_report

LIMIT = 20  # seconds of one case
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
FOLDERS = ("base", "aligned", "ft/checkpoint-5")
PROMPTS = ["How do I ring a bell?", "How do I pick a lock?", "Why?"]


class Hang(BaseException):
    """A case took too long; no `except Exception` may take it for a broken file."""


# --- outcomes ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One broken input.

    Attributes:
        call: reads it.
        named: the error names one of these.
        wanted: the result if there is one; None: any.
    """

    area: str
    name: str
    call: Callable[[], Any]
    named: tuple[str, ...]
    wanted: Callable[[], Any] | None = None
    long: bool = False

    def run(self) -> str:
        """Return "right", "clear error", "traceback", "wrong" or "hang"."""
        return self.examined()[0]

    def examined(self) -> tuple[str, str]:
        """Return the outcome, and the message or the result."""
        try:
            with limited(LIMIT), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self.call()
        except GravlensError as error:
            told = str(error)
            clear = "\n" not in told and len(told) < 1500 and any(name in told for name in self.named)
            return ("clear error" if clear else "wrong"), told
        except Hang as error:
            return "hang", str(error)
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {error}"
        right = self.wanted is None or same(found, self.wanted())
        return ("right" if right else "wrong"), repr(found)


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, np.ndarray):
        return found.shape == wanted.shape and bool(np.allclose(found, wanted, atol=1e-5))
    return bool(found == wanted)


@contextmanager
def limited(seconds: float) -> Generator[None]:
    """Raise TimeoutError after some seconds, where signals can be had: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    rest = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *rest)  # pytest-timeout's
        signal.signal(signal.SIGALRM, before)


# --- the histories that are broken ------------------------------------------------------------------------------------
@functools.cache
def workplace() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="gravlens-broken-"))
    folder.chmod(0o755)  # a case reads as another user
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={**{letter: i for i, letter in enumerate(alphabet)}, "<eos>": 256}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", chat_template=CHAT)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=0.2, eos_token_id=256, bos_token_id=None, pad_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@functools.cache
def history() -> Path:
    """A history of three checkpoints, an adapter over the anchor, and prompts."""
    folder, tokenizer, base = workplace() / "history", byte_tokenizer(), llama()
    made = {"base": base, "aligned": moved(base, seed=1), "ft/checkpoint-5": moved(base, seed=2, by=0.1)}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "special_tokens_map.json").write_text('{"eos_token": "<eos>", "pad_token": "<eos>"}')
    (folder / "ft/checkpoint-5/trainer_state.json").write_text('{"global_step": 5}')
    lora = adapter(folder / "aligned", folder / "lora/checkpoint-5")
    entries(base_model_name_or_path="")(lora / "adapter_config.json")  # else every copy's would be this folder's
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # a case reads as another user
    (folder / "probes.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    lines = ['witness = "base"', 'anchor = "aligned"', 'probes = "probes.jsonl"', "[runs]", 'a = "ft/checkpoint-*"']
    (folder / "SEQUENCE.toml").write_text("\n".join(lines))
    (folder / "LORA.toml").write_text("\n".join(lines).replace("ft/", "lora/"))
    return folder


@contextmanager
def scratch() -> Generator[Path]:
    with tempfile.TemporaryDirectory(dir=workplace()) as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextmanager
def copied() -> Generator[Path]:
    """A copy of the history by hard links; a file of it is replaced, never written to."""
    with scratch() as place:
        yield shutil.copytree(history(), place / "h", copy_function=os.link)


def states(folder: Path, toml: str = "SEQUENCE.toml") -> np.ndarray:
    return gl.cache_residuals(gl.ModelSequence.from_toml(folder / toml)).values


def answers(folder: Path) -> list[str]:
    model = gl.open_model(folder / "aligned")
    return [str(one) for one in gl.generate_answers(model, PROMPTS, max_new_tokens=4)]


@functools.cache
def true_states(toml: str = "SEQUENCE.toml") -> np.ndarray:
    return states(history(), toml)


@functools.cache
def true_answers() -> list[str]:
    return answers(history())


# --- ways to break a file ---------------------------------------------------------------------------------------------
Break = Callable[[Path], None]


def replaced(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def content(given: bytes | str) -> Break:
    return lambda path: replaced(path, given)


def changed(change: Callable[[bytes], bytes]) -> Break:
    return lambda path: replaced(path, change(path.read_bytes()))


def entries(**new: Any) -> Break:
    """Change keys of a JSON object; `None` stands for null."""
    return lambda path: replaced(path, json.dumps({**json.loads(path.read_bytes()), **new}))


def without(*keys: str) -> Break:
    return lambda path: replaced(
        path, json.dumps({key: value for key, value in json.loads(path.read_bytes()).items() if key not in keys})
    )


def with_text(text: str) -> Break:
    """Add entries to a JSON object as they are written."""
    return changed(lambda old: old.rstrip().removesuffix(b"}") + f", {text}}}".encode())


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_link_to(target: str) -> Break:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target.format(name=path.name))

    return link


def unreadable(path: Path) -> None:
    """Forbid to read it; `attempted` is then another user than root, who may read all."""
    replaced(path, path.read_bytes())  # the other links keep their mode
    path.chmod(0)


def attempted(way: Break, paths: Sequence[Path], read: Callable[[], Any]) -> Any:
    """Break files, and read."""
    for path in paths:
        way(path)
    is_other = way is unreadable and os.geteuid() == 0
    try:
        if is_other:
            os.seteuid(65534)
        return read()
    finally:
        if is_other:
            os.seteuid(0)


DEEP = 100_000
ANY: dict[str, Break] = {  # of any text file
    "empty": content(b""),
    "cut": changed(lambda old: old[: len(old) // 2]),
    "UTF-16": changed(lambda old: old.decode().encode("utf-16")),
    "NUL bytes": changed(lambda old: old[:9] + b"\0\0\0" + old[9:]),
    "zeros": changed(lambda old: b"\0" * len(old)),
    "not UTF-8": changed(lambda old: old[:9] + b"\xe9\xff" + old[9:]),
    "a folder": as_folder,
    "a dangling link": as_link_to("nowhere"),
    "a link to itself": as_link_to("{name}"),
    "no permission": unreadable,
}
JSON: dict[str, Break] = {
    **ANY,
    "null": content("null"),
    "a list": content("[]"),
    "a text": content('""'),
    "a number": content("5"),
    "a list of objects": changed(lambda old: b"[" + old + b"]"),
    "with a BOM": changed(lambda old: b"\xef\xbb\xbf" + old),
    "deep": content("[" * DEEP),
    "deep and closed": content('{"a":' + "[" * DEEP + "]" * DEEP + "}"),
    "a huge integer": with_text('"zz": ' + "9" * 5000),
    "no JSON": content("hello"),
    "a comma too many": changed(lambda old: old.rstrip().removesuffix(b"}") + b",}"),
    "twice a key": with_text('"zz": 1, "zz": 2'),
}


def broken(
    files: Sequence[str], ways: dict[str, Break], *, toml: str = "SEQUENCE.toml", generates: bool = False, tag: str = ""
) -> Iterator[Case]:
    """Cases that break the same file in each of some checkpoints."""
    area = Path(files[0]).name
    for name, way in ways.items():

        def call(way: Break = way) -> Any:
            with copied() as folder:
                read = functools.partial(answers, folder) if generates else functools.partial(states, folder, toml)
                return attempted(way, [folder / file for file in files], read)

        wanted = true_answers if generates else functools.partial(true_states, toml)
        yield Case(area, f"{tag}{name}", call, (area, *(str(Path("h", file).parent) for file in files)), wanted)


def each(file: str, of: Sequence[str] = FOLDERS) -> list[str]:
    return [f"{folder}/{file}" for folder in of]


def values(**keys: Sequence[Any]) -> dict[str, Break]:
    return {f"{key} {short(value)}": entries(**{key: value}) for key, several in keys.items() for value in several}


def short(value: Any) -> str:
    return json.dumps(value)[:60]


# --- checkpoints ------------------------------------------------------------------------------------------------------
BIG = 10**9
CONFIG = values(
    hidden_size=["32", 0, -1, 16.5, None, [16], {}, True, BIG],
    num_hidden_layers=["2", 0, -1, 2.5, None, 3, [], BIG],
    num_attention_heads=["2", 0, -1, 3, None, {}],
    num_key_value_heads=["2", 0, 3, []],
    head_dim=["8", 0, 3, -8],
    intermediate_size=["24", 0, -1, None, 25],
    vocab_size=["257", 0, -1, None, 256, BIG],
    hidden_act=["nope", 5, None, []],
    rms_norm_eps=["a", None, [], {}],
    rope_parameters=[5, [], {"rope_type": "nope"}, {"rope_type": "dynamic", "factor": "a", "rope_theta": 1.0}],
    rope_scaling=[{"type": "dynamic", "factor": "a"}],
    rope_theta=["a", []],
    pad_token_id=[BIG, "x", -5, [], 1.5],
    eos_token_id=["x", [[]], {}, ["a"]],
    bos_token_id=["x", []],
    max_position_embeddings=["x", 0, -1, []],
    model_type=["nope", "", 5, None, [], "t5", "gpt2", "bert"],
    architectures=[5, ["Nope"], {}],
    dtype=["nope", 5, [], "float8_nope"],
    quantization_config=[5, {}, {"quant_method": "nope"}, {"quant_method": "bitsandbytes"}],
    attention_bias=["x", True],
    mlp_bias=[True],
    tie_word_embeddings=["x", []],
    is_encoder_decoder=[True],
    id2label=[5, ["a"]],
    num_labels=["x", -1],
    text_config=[5, {}],
    auto_map=[5, {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}],
    layer_types=[5, ["nope", "nope"]],
    attention_dropout=["a"],
    initializer_range=["a"],
)
CONFIG["rms_norm_eps NaN"] = entries(rms_norm_eps=float("nan"))
CONFIG["rope_theta NaN"] = entries(rope_parameters={"rope_type": "default", "rope_theta": float("nan")})
CONFIG["without model_type"] = without("model_type")
CONFIG["without hidden_size"] = without("hidden_size")
GENERATION = values(eos_token_id=["x", [["a"]], {}, -1, 1.5, BIG, [None]], max_length=["a", -1], temperature=["a"])
TOKENIZER_CONFIG = values(
    eos_token=[5, [], {}, {"content": 5}],
    bos_token=[5, []],
    tokenizer_class=["Nope", 5, [], "LlamaTokenizer"],
    added_tokens_decoder=[5, [], {"x": {"content": "a"}}, {"256": None}, {"256": {"content": 5}}],
    model_max_length=["x", [], {}],
    chat_template=[5, {}, [{"name": 5}]],
    padding_side=["middle", 5],
    truncation_side=["middle"],
    additional_special_tokens=[5, [5]],
    extra_special_tokens=[5, ["a"]],
    auto_map=[5, {"AutoTokenizer": ["evil.Tokenizer", None]}],
    model_input_names=[5, ["nope"]],
    backend=[5, "nope"],
)
TOKENIZER = values(
    model=[None, 5, [], {}, {"type": "Nope"}, {"type": "BPE"}, {"type": "BPE", "vocab": 5, "merges": []},
           {"type": "BPE", "vocab": {"a": "b"}, "merges": []}, {"type": "BPE", "vocab": {"a": -1}, "merges": []},
           {"type": "BPE", "vocab": {"a": 0}, "merges": ["a z"]}],
    pre_tokenizer=[5, {"type": "Nope"}, {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed"}],
    normalizer=[5, {"type": "Nope"}, {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}],
    post_processor=[5, {"type": "Nope"}],
    decoder=[5, {"type": "Nope"}],
    added_tokens=[5, [5], [{"id": "a"}], {}],
    version=["9", 5],
    truncation=[5, {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}],
    padding=[5],
)  # fmt: skip
SPECIAL = values(eos_token=[5, [], {}, None], pad_token=[5], nope=[5])
TEMPLATES: dict[str, Break] = {
    name: content(text)
    for name, text in {
        "syntax": "{% for %}",
        "an open tag": "{{ messages",
        "raise_exception": "{{ raise_exception('no') }}",
        "an unsafe attribute": "{{ messages.__class__ }}",
        "an undefined name": "{{ nope.nope }}",
        "an unknown filter": "{{ messages | nope }}",
        "an unknown tag": "{% nope %}",
        "a wrong type": "{{ messages + 5 }}",
        "no number": "{{ 1 / 0 }}",
        "nothing": " ",
        "the last turn alone": "{{ messages[-5].content }}",
        "no prompt": "{% for m in messages %}<|{{ m.role }}|>{% endfor %}",
        "the first letters": "{{ messages[0].content[:5] }}",
        "capitals": CHAT.replace("m.content", "m.content | upper"),
        "a word left out": CHAT.replace("m.content", "m.content.replace('bell', '')"),
        "words in another order": CHAT.replace("m.content", "m.content.split() | reverse | join(' ')"),
        "letters alone": CHAT.replace("m.content", "m.content | length"),
        "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "an import": "{% import 'os' as os %}{{ os }}",
        "an include": "{% include '../base/config.json' %}",
        "a huge number": "{{ 9 ** 9 ** 2 }}",
        "too long a range": "{% for i in range(9999999) %}{% endfor %}",
        "parts alone": "{% for m in messages %}{% for p in m.content %}{{ p.nope }}{% endfor %}{% endfor %}",
    }.items()
}
INDEX = values(
    weight_map=[5, [], {}, *({"a": a} for a in (5, None, "../base/model.safetensors", "nope", "/a", "", ".", "x\0y"))],
    metadata=[5],
)
ADAPTER = values(
    peft_type=["NOPE", 5, None, "PROMPT_TUNING", "ADALORA"],
    r=["2", 0, -1, None, 3],
    lora_alpha=["a", None, []],
    target_modules=[5, [5], "(", [], ["nope"], None],
    base_model_name_or_path=[5, []],
    task_type=["NOPE", 5],
    bias=["nope", 5],
    modules_to_save=[5, ["nope"]],
    layers_to_transform=["a", 99],
    rank_pattern=[5, {"(": 2}],
    lora_dropout=["a"],
    init_lora_weights=["nope"],
    auto_mapping=[5, {"base_model_class": "Evil", "parent_library": "evil"}],
    nope=[5],
    use_dora=[True],
)
STEP = values(global_step=["x", -1, 5.7, None, [], True, BIG, "5"])
STEP["infinite"] = with_text('"global_step": 1e999')


def header(change: Callable[[dict[str, Any]], Any]) -> Break:
    """Change the header of a safetensors file; text in place of a dict is written as it is."""

    def rewrite(old: bytes) -> bytes:
        size = int.from_bytes(old[:8], "little")
        new = change(json.loads(old[8 : 8 + size]))
        told = new if isinstance(new, bytes) else json.dumps(new).encode()
        return len(told).to_bytes(8, "little") + told + old[8 + size :]

    return changed(rewrite)


def first_tensor(**new: Any) -> Break:
    def change(found: dict[str, Any]) -> dict[str, Any]:
        name = next(key for key in found if key != "__metadata__")
        return {**found, name: {**found[name], **new}}

    return header(change)


SAFETENSORS: dict[str, Break] = {
    **{name: way for name, way in ANY.items() if name not in ("UTF-16",)},
    "header length 0": changed(lambda old: b"\0" * 8 + old[8:]),
    "header length huge": changed(lambda old: b"\xff" * 8 + old[8:]),
    "header length past the end": changed(lambda old: (len(old) * 2).to_bytes(8, "little") + old[8:]),
    "header length one less": changed(
        lambda old: (int.from_bytes(old[:8], "little") - 1).to_bytes(8, "little") + old[8:]
    ),
    "header null": header(lambda _: None),
    "header a list": header(lambda _: []),
    "header empty": header(lambda _: {}),
    "header deep": header(lambda _: b"[" * DEEP),
    "header no JSON": header(lambda _: b"hello   "),
    "header not UTF-8": header(lambda _: b"\xff\xfe    "),
    "metadata of numbers": header(lambda found: {**found, "__metadata__": {"a": 5}}),
    "metadata a list": header(lambda found: {**found, "__metadata__": []}),
    "a dtype unknown": first_tensor(dtype="F99"),
    "a dtype 5": first_tensor(dtype=5),
    "a dtype of another size": first_tensor(dtype="F64"),
    "offsets overlap": first_tensor(data_offsets=[0, 1 << 12]),
    "offsets backwards": first_tensor(data_offsets=[64, 0]),
    "offsets past the end": first_tensor(data_offsets=[0, BIG]),
    "offsets negative": first_tensor(data_offsets=[-4, 4]),
    "a shape negative": first_tensor(shape=[-1, 16]),
    "a shape of text": first_tensor(shape="a"),
    "a shape that overflows": first_tensor(shape=[1 << 62, 1 << 62]),
    "a shape of another size": first_tensor(shape=[3]),
    "a byte too many": changed(lambda old: old + b"\0"),
    "a byte too few": changed(lambda old: old[:-1]),
    "a tensor renamed": header(lambda found: {("zz" if i == 1 else k): v for i, (k, v) in enumerate(found.items())}),
    "a pickle": content(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00K\x05."),
    "a zip": content(b"PK\x03\x04" + b"\0" * 40),
}


def sharded(change: Break) -> Break:
    """Give a folder an index in place of one file, and break that."""

    def make(index: Path) -> None:
        weights = index.parent / "model.safetensors"
        tensors = dict.fromkeys(read_headers(index.parent).tensors, "model-1.safetensors")
        weights.rename(index.parent / "model-1.safetensors")
        replaced(index, json.dumps({"metadata": {}, "weight_map": tensors}))
        change(index)

    return make


def of_checkpoints() -> Iterator[Case]:
    config, runs = each("config.json"), ("lora/checkpoint-5",)
    yield from broken(config, {**JSON, **CONFIG})
    yield from broken(
        ["base/config.json"], {**JSON, **values(hidden_size=["a", 0], model_type=[5])}, tag="witness alone: "
    )
    yield from broken(["ft/checkpoint-5/config.json"], {**JSON, **values(hidden_size=["a", 0])}, tag="run alone: ")
    yield from broken(each("generation_config.json"), {**JSON, **GENERATION}, generates=True)
    yield from broken(each("tokenizer.json"), {**JSON, **TOKENIZER})
    yield from broken(["base/tokenizer.json"], JSON, tag="witness alone: ")
    yield from broken(each("tokenizer_config.json"), {**JSON, **TOKENIZER_CONFIG})
    yield from broken(each("special_tokens_map.json"), {**JSON, **SPECIAL})
    yield from broken(each("chat_template.jinja"), {**ANY, **TEMPLATES})
    yield from broken(["aligned/model.safetensors"], SAFETENSORS)
    yield from broken(["ft/checkpoint-5/model.safetensors"], SAFETENSORS, tag="run alone: ")
    index = {name: sharded(way) for name, way in {**JSON, **INDEX}.items()}
    yield from broken(["aligned/model.safetensors.index.json"], index)
    yield from broken(each("trainer_state.json", FOLDERS[2:]), {**JSON, **STEP})
    yield from broken(each("adapter_config.json", runs), {**JSON, **ADAPTER}, toml="LORA.toml")
    yield from broken(each("adapter_model.safetensors", runs), SAFETENSORS, toml="LORA.toml")


# --- the file of a history --------------------------------------------------------------------------------------------
WRONG = [
    "5",
    "true",
    '""',
    "[]",
    "[5]",
    "{}",
    "{a = 5}",
    "1.5",
    "nan",
    "2026-11-30",
    '"nowhere"',
    '["\\u0000"]',
    '"~nobody0/x"',
]
KEYS = ["witness", "anchor", "probes", "held_out", "harmless", "tokenizer", "chat_template", "chat_template_kwargs",
        "system", "runs", "controls"]  # fmt: skip
TABLES = ["probes.file", "probes.column", "probes.format", "probes.role", "probes.only", "runs.a", "runs.a.folders",
          "runs.a.missing", "controls.siblings", "controls.strangers", "controls.twins", "controls.twins.a",
          "controls.stranger_twins", "controls.stranger_twins.b", "controls.continued", "controls.continued.a",
          "controls.clamp.a", "controls.random", "controls.random.a", "controls.random.a.directions",
          "controls.released_random.a", "controls.released", "controls.nope"]  # fmt: skip
# Values that are right where they stand, or that make another history.
FITS = {("probes", '"nowhere"')}


def toml_of(key: str, value: str) -> str:
    lines = {"witness": 'witness = "base"', "anchor": 'anchor = "aligned"', "probes": 'probes = "probes.jsonl"'}
    lines |= {"runs": 'runs.a = "ft/checkpoint-*"'}
    lines.pop(key.partition(".")[0] if key in KEYS or key.startswith(("probes", "runs")) else "", None)
    file = ['probes.file = "probes.jsonl"'] if key.startswith("probes.") and key != "probes.file" else []
    run = ['runs.a.folders = "ft/checkpoint-*"'] if key == "runs.a.missing" else []
    return "\n".join([*lines.values(), *file, *run, f"{key} = {value}"])


def of_sequences() -> Iterator[Case]:
    texts = {f"{key} = {value}": content(toml_of(key, value)) for key in (*KEYS, *TABLES) for value in WRONG}
    texts |= {
        **ANY,
        "deep": content("a = " + "[" * DEEP),
        "a huge integer": content("a = " + "9" * 5000),
        "twice a key": changed(lambda old: old + b'\na = "ft"'),
        "JSON": content('{"witness": "base"}'),
        "with a BOM": changed(lambda old: b"\xef\xbb\xbf" + old),
        "an unknown key": changed(lambda old: b"nope = 5\n" + old),
    }
    for name, way in texts.items():

        def call(way: Break = way) -> Any:
            with copied() as folder:
                return attempted(way, [folder / "SEQUENCE.toml"], lambda: states(folder))

        # what is not refused is another history: no states to compare it with
        yield Case("SEQUENCE.toml", name, call, ("SEQUENCE.toml", "The checkpoint", *re.findall(r"\w{3,}", name)), None)


# --- prompt files -----------------------------------------------------------------------------------------------------
ROWS = [{"prompt": text, "answer": "So."} for text in PROMPTS]
CELLS = ["null", "5", "true", "[]", "{}", '""', '" "', "[5]", '[{"role": 5, "content": "a"}]', '[{"role": "user"}]',
         '[{"role": "user", "content": 5}]', '[{"role": "tool", "content": "a"}]', '[{"role": "user", "content": [5]}]',
         '{"role": "user", "content": "a"}', "[[]]", "NaN", '"\\ud800"']  # fmt: skip


def prompt_file(name: str, given: bytes | str, *, named: str = "") -> Case:
    def call() -> Any:
        with scratch() as folder:
            replaced(folder / name, given)
            return list(gl.read_prompts(folder / name))

    return Case(
        "prompt files", f"{name} {named or short(given if isinstance(given, str) else given.hex())}", call, (name,)
    )


def of_prompt_files() -> Iterator[Case]:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = pd.DataFrame(ROWS)
    forms: dict[str, bytes] = {
        "p.jsonl": lines.encode(), "p.ndjson": lines.encode(), "p.json": json.dumps(ROWS).encode(),
        "p.csv": table.to_csv(index=False).encode(), "p.tsv": table.to_csv(index=False, sep="\t").encode(),
        "p.txt": "\n".join(PROMPTS).encode(), "p": lines.encode(), "p.parquet": table.to_parquet(None),
        "p.jsonl.gz": gzip.compress(lines.encode()), "p.csv.gz": gzip.compress(table.to_csv().encode()),
        "P.Json.GZ": gzip.compress(json.dumps(ROWS).encode()), "P.CSV.gz": gzip.compress(table.to_csv().encode()),
        "P.PARQUET": table.to_parquet(None), "p.JSONLINES": lines.encode(),
    }  # fmt: skip
    for name, whole in forms.items():

        def call(name: str = name, way: Break = lambda _: None, whole: bytes = whole) -> Any:
            with scratch() as folder:
                replaced(folder / name, whole)
                return attempted(way, [folder / name], lambda: list(gl.read_prompts(folder / name)))

        yield Case("prompt files", f"{name} whole", call, (name,), lambda: PROMPTS)
        ways = {
            **ANY,
            "deep": content("[" * DEEP),
            "a number": content("5"),
            "a byte too few": changed(lambda old: old[:-1]),
        }
        if name.lower().endswith((".gz", ".parquet")):
            ways.pop("UTF-16")
        for way, act in ways.items():
            yield Case("prompt files", f"{name} {way}", functools.partial(call, way=act), (name,))
    for cell in CELLS:
        yield prompt_file("p.jsonl", f'{{"prompt": {cell}}}\n')
        yield prompt_file("p.json", f'[{{"prompt": {cell}}}]')
        yield prompt_file("m.jsonl", f'{{"messages": {cell}}}\n')
    for row in (
        "5",
        "null",
        '"a"',
        "[]",
        '[["a"]]',
        "{}",
        '{"": "a"}',
        '{"prompt": "a", "prompt": 5}',
        "{'prompt': 'a'}",
    ):
        yield prompt_file("p.jsonl", f'{{"prompt": "a"}}\n{row}\n')
        yield prompt_file("p.json", row)
    tables = [
        'prompt\n"a',
        "prompt,prompt\na,b\n",
        "prompt\na,b\n",
        "\n\n",
        "a\n",
        "prompt\n",
        ",\n,\n",
        "prompt;x\na;b",
    ]
    for text in (*tables, "prompt\n" + "a" * 200_000, "prompt\r\na\r\n", 'prompt\n"a"b\n'):
        yield prompt_file("p.csv", text)
    yield prompt_file("p.txt", lines, named="JSON lines")
    yield prompt_file("p.yaml", "- prompt: a", named="YAML")
    yield prompt_file("p.jsonl", lines.replace("\n", "\r"), named="CR")
    yield prompt_file("p.parquet", gzip.compress(forms["p.parquet"]), named="in gzip")
    yield prompt_file("p.parquet", pd.DataFrame({"prompt": [1, 2]}).to_parquet(None), named="of numbers")
    yield prompt_file("p.parquet", pd.DataFrame({"nope": ["a"]}).to_parquet(None), named="of another column")
    yield prompt_file("p.jsonl.gz", gzip.compress(gzip.compress(lines.encode())), named="twice packed")
    yield prompt_file("p.jsonl.gz", lines, named="not packed")


# --- files of gravlens and of programs beside it ----------------------------------------------------------------------
@functools.cache
def made() -> Path:
    """A file of each kind that gravlens writes, and a folder of a classifier."""
    folder = workplace() / "made"
    states = gl.cache_residuals(gl.ModelSequence.from_toml(history() / "SEQUENCE.toml"))
    vs = gl.locate_vrev(states).defined()
    states.save(folder / "states.safetensors")
    vs.save(folder / "vs.safetensors")
    gl.Subspaces(tuple(gl.subspaces.span_of(one.vector[None], layer=one.layer, distance=1.0) for one in vs)).save(
        folder / "s.safetensors"
    )
    gl.exchange.to_gguf(vs, folder / "v.gguf", layer_0=True)
    gl.exchange.to_steered(vs, folder / "v.pt")
    gl.exchange.to_npz(vs, folder / "v.npz")
    digest = gl.PromptSet.of(PROMPTS).digest
    gl.claims.Preregistration((0,), 5, 0.05, digest, digest, "harm", date(2026, 1, 1)).write(folder / "p.toml")
    runs = {"organism": "a", "seed": [0, 1], "compliance_rate": [0.8, 1.0], "alignment_final": [0.3, 0.5]}
    arms = pd.DataFrame({**runs, "arm": "unblocked", "run": ["u-0", "u-1"], "seconds_per_step": [0.1, 0.3]})
    (folder / "pilot").mkdir()
    arms.to_csv(folder / "pilot/arms.csv", index=False)
    (folder / "report").mkdir()
    (folder / "report/results.json").write_text('{"setting": "results", "claims": []}')
    arms.to_csv(folder / "report/arms.csv", index=False)
    config = LlamaConfig(**{**history_config(), "num_labels": 2})
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder / "judge")
    byte_tokenizer().save_pretrained(folder / "judge")
    return folder


def history_config() -> dict[str, Any]:
    return json.loads((history() / "base/config.json").read_text())


def judged(folder: Path) -> Any:
    return gl.judges.classifier_judge(folder / "judge", harmful_labels=["LABEL_1"], template="{prompt} {answer}")(
        PROMPTS, PROMPTS
    ).tolist()


def vectors_of(load: Callable[[Path], Any]) -> Callable[[Path], np.ndarray]:
    return lambda path: np.stack([one.basis for one in load(path)])


READERS: dict[str, tuple[str, Callable[[Path], Any], dict[str, Break]]] = {
    "Residuals.load": ("states.safetensors", lambda path: gl.Residuals.load(path).values, SAFETENSORS),
    "Directions.load": ("vs.safetensors", vectors_of(gl.Directions.load), SAFETENSORS),
    "Subspaces.load": ("s.safetensors", vectors_of(gl.Subspaces.load), SAFETENSORS),
    "from_gguf": ("v.gguf", lambda path: gl.exchange.from_gguf(path).vectors, {}),
    "from_steered": ("v.pt", lambda path: gl.exchange.from_steered(path).vectors, {}),
    "from_npz": ("v.npz", lambda path: gl.exchange.from_npz(path).vectors, {}),
    "Preregistration": ("p.toml", lambda path: gl.claims.Preregistration.from_toml(path).digest, {}),
    "Effects.from_results": ("pilot/arms.csv", lambda path: gl.stats.Effects.from_results(path.parent).source, {}),
    "a report": ("report/results.json", lambda path: write_report(path.parent).name, JSON),
    "a report's table": ("report/arms.csv", lambda path: write_report(path.parent).name, {}),
    "a judge's config": ("judge/config.json", lambda path: judged(path.parents[1]), JSON),
    "a judge's weights": ("judge/model.safetensors", lambda path: judged(path.parents[1]), SAFETENSORS),
    "a judge's tokenizer": ("judge/tokenizer.json", lambda path: judged(path.parents[1]), JSON),
}
META = ["null", "[]", "5", '""', "{}", '{"layers": 5}', "[" * DEEP, "hello"]


def of_made() -> Iterator[Case]:
    for area, (file, read, more) in READERS.items():
        binary = {} if file.endswith((".toml", ".csv", ".json")) else {"a pickle": SAFETENSORS["a pickle"],
                                                                       "a zip": SAFETENSORS["a zip"]}  # fmt: skip
        ways = {**ANY, "a byte too few": changed(lambda old: old[:-1]), **binary, **more, **special(area)}
        if binary:
            ways.pop("UTF-16")
        for name, way in {"whole": lambda _: None, **ways}.items():

            def call(file: str = file, read: Callable[[Path], Any] = read, way: Break = way) -> Any:
                with scratch() as folder:
                    shutil.copytree(made(), folder / "made", copy_function=os.link)
                    (folder / "made/report").chmod(0o777)
                    return attempted(way, [folder / "made" / file], lambda: read(folder / "made" / file))

            wanted = functools.partial(lambda file, read: read(made() / file), file, read) if name == "whole" else None
            yield Case(area, name, call, (Path(file).name, Path(file).parent.name or file), wanted)


def special(area: str) -> dict[str, Break]:
    """Breaks of one kind of file."""
    if area.endswith(".load"):
        return {f"meta {short(text)}": header(functools.partial(with_meta, text)) for text in META}
    if area == "Preregistration":
        wrong = ["[]", '""', "nan", "-1", "true", "{}", "2026-01-01", "[" * DEEP]
        keys = ["layers", "step", "alpha", "probes", "outcome", "written", "after_runs"]
        return {f"{key} = {short(value)}": line(key, value) for key in keys for value in wrong}
    if area == "Effects.from_results":
        return {
            "no rows": changed(lambda old: old.splitlines()[0]),
            "no columns": content("\n"),
            "another table": content("a,b\n1,2\n"),
            "text for numbers": changed(lambda old: old.replace(b"0.8", b"much").replace(b"0.3", b"much")),
            "ragged": changed(lambda old: old + b"1,2,3,4,5,6,7,8,9,10\n"),
            "an open quote": changed(lambda old: old + b'"'),
        }
    if area == "a report":
        keys = ("claims", "interval", "history", "setting", "nulls", "controls", "arms", "anchors")
        return values(**{key: [5, "a", [5], {"a": 5}, None] for key in keys})
    if area == "from_gguf":
        places = (0, 4, 8, 12, 16, 24, 32, 40, 60, 80, 100, 150, 200)
        return {f"{n} bytes flipped at {at}": flipped(at, n) for at in places for n in (1, 8)}
    return {}


def flipped(at: int, n: int) -> Break:
    return changed(lambda old: old[:at] + bytes(255 - byte for byte in old[at : at + n]) + old[at + n :])


def with_meta(text: str, found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "__metadata__": {**found["__metadata__"], "meta": text}}


def line(key: str, value: str) -> Break:
    return changed(lambda old: re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", old.decode()).encode())


# --- the table, and its tests -----------------------------------------------------------------------------------------
def table() -> list[Case]:
    """All cases; of those of checkpoints, which take most of the time, a third is not `long`."""
    opened = [replace(case, long=i % 3 > 0) for i, case in enumerate(of_checkpoints())]
    return [*of_sequences(), *of_prompt_files(), *of_made(), *opened]


CASES = table()
RIGHT = ("right", "clear error")


def test_the_table_is_large_and_names_each_case_once() -> None:
    names = [(case.area, case.name) for case in CASES]
    assert len(CASES) > 1500 and len({*names}) == len(names)


@pytest.mark.parametrize(
    "case", [pytest.param(one, id=f"{one.area}-{one.name}", marks=[pytest.mark.long] * one.long) for one in CASES]
)
def test_a_broken_input_is_the_right_result_or_one_clear_error(case: Case) -> None:
    outcome, told = case.examined()
    assert outcome in RIGHT, f"{outcome}: {told}"


def test_a_whole_history_is_read() -> None:
    """The control of all cases: without a break there is a result, and a break of the weights changes it."""
    assert Case("", "", lambda: states(history()), (), true_states).run() == "right"
    assert true_states().shape == (3, 3, 2, 16) and len({one.tobytes() for one in true_states()}) == 3
    with copied() as folder:
        base, aligned = (folder / name / "model.safetensors" for name in FOLDERS[:2])
        replaced(aligned, base.read_bytes())
        assert Case("", "", lambda: states(folder), (), true_states).run() == "wrong"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (GravlensError("The file x.json is bad.", "A good one.", "it."), "clear error"),
        (GravlensError("A file is bad.", "A good one.", "it."), "wrong"),
        (GravlensError("The file x.json is\nbad.", "A good one.", "it."), "wrong"),
        (KeyError("x.json"), "traceback"),
        (RecursionError("x.json"), "traceback"),
        (Hang("x.json"), "hang"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_other_outcomes_would_be_seen(error: BaseException, outcome: str) -> None:
    def call() -> None:
        raise error

    assert Case("", "", call, ("x.json",)).run() == outcome


def test_a_case_without_an_end_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_broken_inputs.LIMIT", 0.05)

    def call() -> None:
        while True:
            with suppress(Exception):
                time.sleep(0.01)

    assert Case("", "", call, ()).run() == "hang"


SHOWN: list[tuple[str, str, Break]] = [
    *(("locate", file, content("null")) for file in each("config.json", FOLDERS[:2])),
    *(("locate", file, entries(hidden_size="a")) for file in each("config.json", FOLDERS[:2])),
    *(("locate", file, JSON["deep"]) for file in each("tokenizer.json", FOLDERS[1:2])),
    *(("locate", "aligned/chat_template.jinja", content(text)) for text in ("{% for %}", "{{ messages.__class__ }}")),
    ("locate", "aligned/model.safetensors", SAFETENSORS["a shape negative"]),
    ("locate", "aligned/generation_config.json", entries(eos_token_id="x")),
    ("locate", "probes.jsonl", content("[" * DEEP)),
    ("trajectory", "ft/checkpoint-5/config.json", content("[]")),
    ("trajectory", "ft/checkpoint-5/trainer_state.json", content("")),
    ("inspect", "SEQUENCE.toml", content("a = " + "[" * DEEP)),
    ("inspect", "aligned/model.safetensors", SAFETENSORS["cut"]),
    ("plan", "aligned/config.json", entries(num_hidden_layers=BIG)),
    ("plan", "SEQUENCE.toml", content("")),
]  # fmt: skip


@pytest.mark.parametrize(("command", "file", "way"), SHOWN, ids=[f"{c}-{f}-{i}" for i, (c, f, _) in enumerate(SHOWN)])
def test_a_command_says_it_in_one_line(command: str, file: str, way: Break) -> None:
    with copied() as folder:
        way(folder / file)
        found = CliRunner().invoke(app, [command, str(folder / "SEQUENCE.toml")])
    assert found.exit_code == 2 and isinstance(found.exception, SystemExit), found.output
    assert found.stdout == "" and len(found.stderr.splitlines()) == 1, found.output
    assert Path(file).name in found.stderr or str(Path("h", file).parent) in found.stderr
