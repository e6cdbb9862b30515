"""Small programs that a checkpoint brings along end in bounded time and memory; ordinary ones pass, once each."""

import copy
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from folders import adapter
from histories import refused

from gravlens.core import limits
from gravlens.core.errors import GravlensError
from gravlens.core.limits import check_template, patterns_exceed
from gravlens.history.encoding import encode
from gravlens.models.opening import open_model

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LONG = {
    "loops": LOOPS,
    "loops after a conversation": "{% if messages|length > 2 %}" + LOOPS + "{% endif %}{{ messages[-1].content }}",
    "loops for parts": "{% if messages[0].content is not string %}" + LOOPS + "{% endif %}{{ messages[0].content }}",
    "loops where the model is trained": "{% generation %}" + LOOPS + "{% endgeneration %}",
    "a number": "{{ 10**(10**10) }}",
}
LARGE = {
    "a text": "{{ 'a' * 10**10 }}",
    "a text that the compiler would compute": "{% set x = 'a' * (10**10) %}",
    "doubled": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "padding": "{{ 'a'|center(10**10) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
}
SLOW = [r"(\w+\.?)+x", r"(a|a|\w)*\.(a|a|\w)*\.(\w|\w)*\.(\w|\w)*!", r"((\w+)*\.?)*!"]


@pytest.fixture(autouse=True)
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1)


def reading(template: str) -> Any:
    tokenizer = copy.deepcopy(tiny.TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", LONG.values(), ids=LONG)
def test_a_template_that_takes_too_long_is_refused(template: str) -> None:
    begun = time.monotonic()
    with refused("more than 1 s"):
        encode(reading(template), ["the"])
    assert time.monotonic() - begun < limits._WALL


@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_a_template_that_takes_too_much_memory_is_refused(template: str) -> None:
    with refused("MiB"):
        encode(reading(template), ["the"])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
        "{{ raise_exception('no') if messages[0].role == 'system' else messages[0].content }}",
        "{{ messages[0].content|tojson(indent=2) }}{{ bos_token }}",
        "{% for i in range(99) %}{{ messages[0].content }}{% endfor %}",
        "{{ nope.nope }}",  # a fault, which is named where the template is used
        "{% for %}",
    ],
)
def test_ordinary_templates_pass_and_so_do_faults(template: str) -> None:
    check_template(template, tiny.TOKENIZER.special_tokens_map)


def test_a_template_is_tried_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, plain = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, **more: runs.append(1) or plain(*given, **more))
    for _ in range(3):
        encode(reading("{% for m in messages %}{{ m.content }}{% endfor %}{# tried once #}"), tiny.PROMPTS[:2])
    assert len(runs) == 1


def test_where_no_process_can_be_started_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.warns(UserWarning, match="limits of time and memory are not checked"):
        check_template("{{ messages }}{# untried #}", {})


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_takes_too_long_is_found(pattern: str) -> None:
    names = [f"model.layers.{layer}.self_attn.aaaaaaaaaaaaaaaaaaaaaaaaa_proj" for layer in range(4)]
    assert "more than 1 s" in patterns_exceed([pattern], names)


def test_ordinary_patterns_pass_and_names_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(80)]
    assert patterns_exceed([r".*\.(q|v)_proj", r"model\.layers\.\d+\..*", "("], names) == ""  # PEFT names the last
    monkeypatch.setattr(subprocess, "run", None)
    assert patterns_exceed(["q_proj", "all-linear", "layers.0.self_attn", ""], names) == ""


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"]
)
def test_an_adapter_whose_pattern_takes_too_long_is_refused(tmp_path: Path, key: str) -> None:
    """PEFT would match it for years."""
    base = tiny.save(tiny.llama(), tmp_path / "base")
    folder, slow = adapter(base, tmp_path / "adapter"), r"((\w+)*\.?)*!"
    assert open_model(folder).n_layers == tiny.LAYERS
    value = {"modules_to_save": [slow], "rank_pattern": {slow: 2}, "alpha_pattern": {slow: 2}}.get(key, slow)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with refused(str(folder), "regular expression", "more than 1 s"):
        open_model(folder)


@pytest.mark.parametrize("kind", ["XLORA", "SHADOW"])
def test_an_adapter_that_names_other_models_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    base = tiny.save(tiny.llama(), tmp_path / "base")
    folder = adapter(base, tmp_path / "adapter")
    path, own = folder / "adapter_config.json", {"XLORA": {"adapters": {"0": "a/b"}}, "SHADOW": {"shadow_model": "a/b"}}
    kept = {
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
        "peft_type": kind,
        "hidden_size": tiny.WIDTH,
    }
    path.write_text(json.dumps({**kept, **own[kind]}))
    monkeypatch.setattr("peft.PeftModel.__init__", lambda *_, **__: pytest.fail("PEFT would open them here"))
    with pytest.raises(GravlensError, match="loads other models"):
        open_model(folder)
